"""The figures of a run: percentiles, goodput, and whether the server is saturated."""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nanovllm_jax.tools.compare.serving.load import Request, digest
from nanovllm_jax.tools.compare.serving.messages import Answer, ClientResult
from nanovllm_jax.tools.compare.serving.records import Point

PERCENTS = (50, 90, 99)
# Standard deviations of the number under way that are not yet a growing queue.
CHANCE = 2.0


def percentile(values: Sequence[float | None], percent: float) -> float | None:
    """The least value that `percent` % of all values do not exceed (the nearest rank).

    None is infinite, among the values and as a result: nothing is dropped, and nothing is
    interpolated between a number and infinity. No values: None.
    """
    if not values:
        return None
    ordered = sorted(math.inf if value is None else value for value in values)
    found = ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
    return None if math.isinf(found) else found


def percentiles(values: Sequence[float | None]) -> dict[str, float | None]:
    """The percentiles of a report, and the largest value."""
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    return found | {"max": percentile(values, 100)}


@dataclass(frozen=True)
class Slo:
    """The limits within which an answer is good; all in ms, None for no limit.

    Attributes:
        itl: of the 99th percentile of the request's own gaps.
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read limits such as `ttft=200ms,itl=0.05s`; ValueError names what is wrong."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"(ttft|tpot|itl|e2e)=(\d+\.?\d*|\.\d+)(ms|s)", part.strip())
            if not match:
                raise ValueError(
                    f"{part!r} is no limit: write ttft, tpot, itl or e2e, as in itl=50ms"
                )
            limits[match[1]] = float(match[2]) * (1000 if match[3] == "s" else 1)
        return cls(**limits)

    def __str__(self) -> str:
        names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
        limits = [(names[name], limit) for name, limit in vars(self).items() if limit is not None]
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits)


def goodput(point: Point, slo: Slo, seconds: float) -> float:
    """Requests a second that were answered within all limits, over the arrivals' time."""
    limits = (slo.ttft, slo.tpot, slo.itl, slo.e2e)
    columns = (point.ttft_ms, point.tpot_ms, point.worst_itl_ms, point.e2e_ms)
    good = 0
    for times in zip(*columns, strict=True):
        # A request that failed has no time to its end.
        within = [
            limit is None or (time is not None and time <= limit)
            for time, limit in zip(times, limits, strict=True)
        ]
        good += all(within) and times[-1] is not None
    return good / seconds


def is_saturated(point: Point, min_share: float, max_ttft_ms: float) -> bool:
    """Whether a server does not keep up with a rate.

    It does not if its queue grows, so that in the second half of the arrivals' time fewer than
    `min_share` of the requests that arrive are completed. The number under way varies by itself,
    about like a Poisson variable: two standard deviations of it are not counted as growth. Nor
    does it if fewer than `min_share` of all requests succeed, or if the 99th percentile of the time
    to the first token is above `max_ttft_ms`.
    """
    before, after = point.queued
    chance = CHANCE * math.sqrt(before + 1)
    grows = after - before > (1 - min_share) * point.arrived + chance
    count = len(point.ttft_ms)
    fails = count - sum(point.failures.values()) < min_share * count
    ttft = percentile(point.ttft_ms, 99)
    return grows or fails or ttft is None or ttft > max_ttft_ms


def failure(request: Request, answer: Answer, takes_ids: bool) -> str | None:
    """Why an answer is not what was asked for."""
    if answer.error:
        return answer.error
    if not answer.times:
        return "an answer without tokens"
    if not takes_ids:
        return None  # it may end where the model ends it
    if answer.completion_tokens is None:
        return "no usage: the server does not tell how many tokens it gave"
    if answer.completion_tokens != request.output:
        return "another number of output tokens than was asked for"
    if answer.prompt_tokens != len(request.prompt):
        return "the prompt was counted as another number of tokens"
    return None


def gaps(answer: Answer, error: str | None) -> list[float]:
    """The times between an answer's chunks, as vLLM's client takes them.

    Chunks that come in one piece have gaps of nothing between them. If the answer was given up,
    the time since its last chunk counts, too: a stream that stalls is no good stream.
    """
    found = [after - before for before, after in pairwise(answer.times)]
    if error and answer.times:
        found.append(answer.ended_s - answer.times[-1])
    return found


def ms(seconds: float | None) -> float | None:
    """Seconds in milliseconds, as they are recorded."""
    return None if seconds is None else round(1000 * seconds, 2)


def all_ms(values: Iterable[float]) -> dict[str, float | None]:
    """Percentiles of seconds, in milliseconds."""
    return {name: ms(value) for name, value in percentiles(list(values)).items()}


def point(
    server: str,
    rate: float,
    seconds: float,
    load: list[Request],
    answers: list[Answer],
    clients: list[ClientResult],
    *,
    takes_ids: bool = True,
) -> Point:
    """Compute the figures of a run.

    Args:
        seconds: the arrivals' time.
        answers: those of the load's requests, in their order.
        clients: what the client processes tell of themselves.
    """
    failures: Counter[str] = Counter()
    ttft, tpot, worst, e2e = [], [], [], []
    all_gaps, arrived, completed, queued = array("d"), 0, 0, [0, 0]
    middle, under_load, tokens, chunks, end = seconds / 2, 0.0, 0, 0, 0.0
    for request, answer in zip(load, answers, strict=True):
        error, times = failure(request, answer, takes_ids), answer.times
        failures[error or ""] += 1
        own_gaps = gaps(answer, error)
        all_gaps.extend(own_gaps)
        count = answer.completion_tokens or len(times)
        tokens, chunks = tokens + count, chunks + len(times)
        if times:
            in_time = sum(middle < request.due + t <= seconds for t in times)
            under_load += in_time * count / len(times)
        ended = request.due + answer.ended_s
        end = max(end, ended)
        arrived += middle < request.due <= seconds
        completed += middle < ended <= seconds and not error
        for i, moment in enumerate((middle, seconds)):
            queued[i] += request.due <= moment < ended
        ttft.append(ms(times[0]) if times else None)
        is_whole = bool(times) and not error
        e2e.append(ms(times[-1]) if is_whole else None)
        each = (times[-1] - times[0]) / max(1, count - 1) if is_whole else None
        tpot.append(ms(each))
        worst.append(ms(percentile(own_gaps, 99) or 0.0) if is_whole else None)
    del failures[""]
    prompts = [a.prompt_tokens for a in answers if a.prompt_tokens is not None]
    return Point(
        server, rate, digest(load), dict(failures.most_common()), arrived, completed, queued,
        output_tok_s=round(under_load / (seconds - middle), 1), total_tok_s=round(tokens / end, 1),
        tokens_a_chunk=round(tokens / chunks, 3) if chunks else 0.0,
        prompt_tokens=round(sum(prompts) / len(prompts), 1) if prompts else 0.0,
        itl_ms=all_ms(all_gaps), lag_ms=all_ms(a.late_s for a in answers),
        beat_ms=all_ms(beat for client in clients for beat in client.beats_s),
        cpu_share=round(max(client.cpu_share for client in clients), 3),
        ttft_ms=ttft, tpot_ms=tpot, worst_itl_ms=worst, e2e_ms=e2e,
    )  # fmt: skip
