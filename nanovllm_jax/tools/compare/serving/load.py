"""Make the load of one rate: when requests arrive, their token ids and output lengths."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MAX_TOKEN_ID = 10_000  # largest token id of the prompts, as in the workloads without a server


@dataclass(frozen=True)
class Request:
    """One request of a load.

    Attributes:
        due: seconds after the load's beginning at which it is sent.
        prompt: token ids, or a text for servers that take no ids.
        output: tokens that the server has to generate.
    """

    due: float
    prompt: list[int] | str
    output: int


@dataclass(frozen=True)
class Scale:
    """The sizes of a sweep: bounds of the lengths in tokens, rates, and the servers' limits."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    rates: tuple[float, ...]  # requests a second, ascending
    max_model_len: int
    max_num_seqs: int


SCALES = {
    "gpu": Scale(
        prompt=(128, 1024), output=(32, 256), rates=(4, 8, 16, 24, 32, 48, 64, 96, 128, 192),
        max_model_len=4096, max_num_seqs=256,
    ),
    "cpu": Scale(
        prompt=(16, 64), output=(8, 32), rates=(2, 4, 8, 16, 32, 64),
        max_model_len=512, max_num_seqs=16,
    ),
}  # fmt: skip


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Draw the arrival times of a Poisson process that has as many arrivals as expected.

    Given their number, the times are independent and uniform in [0, seconds), so the offered rate
    is exact (Ross, Stochastic Processes, theorem 2.3.1).
    """
    return sorted(rng.uniform(0, seconds) for _ in range(max(1, round(rate * seconds))))


def make(
    rate: float,
    seconds: float,
    prompt: Sequence[int],
    output: Sequence[int],
    vocab_size: int,
    seed: int,
) -> list[Request]:
    """Draw the load of one rate; the same arguments give the same load.

    No two rates or seeds share prompts, so a prefix cache has nothing to find.

    Args:
        prompt: shortest and longest prompt; lengths are uniform.
        output: the same of the output.
    """
    rng = random.Random(f"{seed} {rate:g}")
    ids = range(min(MAX_TOKEN_ID, vocab_size - 1) + 1)
    return [
        Request(due, rng.choices(ids, k=rng.randint(*prompt)), rng.randint(*output))
        for due in poisson(rate, seconds, rng)
    ]


def burst(count: int, load: list[Request]) -> list[Request]:
    """The first requests of a load, all at once: a warm-up."""
    return [Request(0.0, request.prompt, request.output) for request in load[:count]]


def digest(load: list[Request]) -> str:
    """A name of the load, equal for equal loads only."""
    content = json.dumps([asdict(request) for request in load])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
