"""The engines, and what an adapter of one has to offer. Adding an engine: docs/compare.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Engine:
    """What is known of an engine without importing it. Its adapter is the file of its name."""

    label: str  # in the report
    needs: tuple[str, ...]  # modules that must import; their versions are recorded
    install: str  # the hint when one of them does not
    color: str  # in every plot of the report


ENGINES = {
    "nanovllm_jax": Engine(
        "nanovllm_jax", ("nanovllm_jax", "jax"), "pip install -e .", "#0072b2"
    ),
    "vllm": Engine("vLLM", ("vllm", "torch"), "pip install vllm", "#e69f00"),
    "nanovllm": Engine(
        "nano-vLLM",
        ("nanovllm", "torch"),
        "pip install git+https://github.com/GeeeekExplorer/nano-vllm.git",
        "#009e73",
    ),
    "transformers_eager": Engine(
        "transformers, eager", ("transformers", "torch"), "pip install torch", "#cc79a7"
    ),
    "transformers_compiled": Engine(
        "transformers, torch.compile", ("transformers", "torch"), "pip install torch", "#7f7f7f"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What every engine is started with."""

    device: str  # "cuda" or "cpu"
    dtype: str  # "bfloat16" or "float32"
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def sizes(self) -> dict[str, int]:
        """The options that the engines with continuous batching have under the same names."""
        names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        return {name: getattr(self, name) for name in names}


class Adapter(Protocol):
    """One engine, made by `Adapter(model, limits)`: a directory with config.json, safetensors and
    tokenizer, and Limits. `add_request` and `step` are left out where it has no such thing:
    the stream of arrivals is then not measured.
    """

    note: str  # what a reader must know of this engine's way to work; may be empty

    def generate(
        self, prompts: list[list[int]], outputs: list[int], temperature: float
    ) -> list[list[int]]:
        """Complete prompt i with exactly outputs[i] tokens, ends of sequence ignored.

        Returns the completions alone, as token ids, in the order of the prompts.
        """
        ...

    def reset_prefix_cache(self) -> Any:
        """Forget cached prefixes; returns False if that failed."""
        ...

    def add_request(self, prompt: list[int], output: int, temperature: float) -> Any:
        """Queue a request and return the name under which `step` reports it."""
        ...

    def step(self) -> list[tuple[Any, int]]:
        """Run one step; (request, output tokens so far) of those that may have got some.

        A finished request is reported with all its tokens in the step that finishes it.
        """
        ...

    def profile(self, run: Callable[[], Any], batch: int) -> dict[str, Any]:
        """Call `run`, which decodes `batch` requests, in a function of profiling.py; its result."""
        ...
