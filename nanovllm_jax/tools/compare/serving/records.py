"""What a sweep records: one JSON line each, written as it comes."""

from dataclasses import dataclass, field
from typing import Any

from nanovllm_jax.tools.compare.results import Machine


@dataclass(frozen=True)
class SweepSettings:
    """The options of a sweep, the same for every server.

    Attributes:
        device: "gpu" or "cpu".
        prompt_tokens: shortest and longest prompt.
        output_tokens: shortest and longest output.
        seconds: time of arrivals at each rate.
        drain_s: time after it in which what is under way may finish.
        min_share, max_ttft_s: a server is saturated beyond these.
        clients: processes that send the requests.
    """

    date: str
    model: str
    device: str
    vocab_size: int
    rates: list[float]
    seconds: float
    drain_s: float
    prompt_tokens: list[int]
    output_tokens: list[int]
    temperature: float
    seed: int
    min_share: float
    max_ttft_s: float
    clients: int
    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True)
class Started:
    """A server that answers.

    Attributes:
        start_s: seconds until it did; None if it ran already.
    """

    server: str
    command: str | None
    url: str | None
    takes_ids: bool
    start_s: float | None
    version: str | None


@dataclass(frozen=True)
class Point:
    """One server at one rate. The lists have an entry for each request, in the order of arrival.

    A time that a request has not got is None: it counts as infinite, so that no failure makes a
    percentile better.

    Attributes:
        digest: of the load.
        failures: how many requests failed, by the reason.
        arrived, completed: requests in the second half of the arrivals' time.
        queued: requests under way at the middle of that time and at its end.
        output_tok_s: output tokens a second in the second half of the arrivals' time.
        total_tok_s: all output tokens over the whole run, its ramps included.
        tokens_a_chunk: output tokens over chunks.
        prompt_tokens: mean length of a prompt, as the server counts it.
        ttft_ms: from the time at which a request was due to its first chunk.
        tpot_ms: (last chunk - first chunk) / (output tokens - 1).
        worst_itl_ms: the 99th percentile of a request's gaps between chunks.
        e2e_ms: from the time at which a request was due to its last chunk.
        itl_ms: percentiles of the gaps of all requests.
        lag_ms: percentiles of how late the client sent requests.
        beat_ms: percentiles of how late the client's event loop was.
        cpu_share: processor time of the busiest client over wall time.
        is_saturated: by the rule of `figures.is_saturated`.
    """

    server: str
    rate: float
    digest: str
    failures: dict[str, int]
    arrived: int
    completed: int
    queued: list[int]
    output_tok_s: float
    total_tok_s: float
    tokens_a_chunk: float
    prompt_tokens: float
    itl_ms: dict[str, float | None]
    lag_ms: dict[str, float | None]
    beat_ms: dict[str, float | None]
    cpu_share: float
    ttft_ms: list[float | None] = field(repr=False)
    tpot_ms: list[float | None] = field(repr=False)
    worst_itl_ms: list[float | None] = field(repr=False)
    e2e_ms: list[float | None] = field(repr=False)
    is_saturated: bool = False


@dataclass(frozen=True)
class ServerFailure:
    """A server that could not be measured, or not to the end."""

    server: str
    reason: str


@dataclass(frozen=True)
class ServerAbsent:
    """A server that is not installed."""

    server: str
    missing: list[str]
    install: str


KINDS: dict[str, type[Any]] = {
    "serving": SweepSettings, "machine": Machine, "server": Started, "point": Point,
    "server failure": ServerFailure, "server absent": ServerAbsent,
}  # fmt: skip
