"""The work that the command hands to an engine's process.

Neither this file nor the worker imports JAX: in another engine's process it has no business.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm_jax.tools.compare.adapters import Limits

Wave = tuple[list[list[int]], list[int]]  # prompts, output lengths


@dataclass(frozen=True)
class Workload:
    """Work in parts, which are timed one by one, each starting with an empty prefix cache.

    A part is a list of waves: a wave is submitted when the one before it is complete.
    """

    name: str
    title: str
    parts: dict[str, list[Wave]]
    arrivals: list[float] = field(default_factory=list)  # seconds from the start, ascending

    @property
    def main(self) -> list[Wave]:
        """The part that the title describes."""
        return next(iter(self.parts.values()))

    @property
    def batch(self) -> int:
        """Most requests at a time; 64 at most, which is as far as rates grow for every engine."""
        return min(64, max(len(prompts) for prompts, _ in self.main))

    @property
    def output_tokens(self) -> int:
        """Output tokens of all parts."""
        return sum(sum(outputs) for waves in self.parts.values() for _, outputs in waves)

    @property
    def digest(self) -> str:
        """A name of the token ids, lengths and arrivals, equal for equal work only."""
        content = json.dumps([self.parts, self.arrivals])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """The work of one process, which reads it pickled: what all share, then what is its own."""

    model: str
    limits: Limits
    vocab_size: int
    temperature: float
    runs: int
    check: Wave  # what the engines' greedy tokens are compared on
    cases: list[tuple[Workload, Workload]]  # what is timed, and the same kind to warm up with
    results: Path  # file that records are appended to
    profiled: Workload | None = None  # is run once more, the first round under a profiler
    engine: str = ""
    round: int = 0
    started: float = 0.0  # time.time() when the process was started
    seconds: float = 0.0  # the time that it has, once the engine has started

    @property
    def log(self) -> Path:
        """The file for what the engine prints."""
        return self.results.with_suffix(f".{self.engine}.log")
