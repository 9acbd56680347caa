"""How evenly tokens come while requests arrive, at the same rate under several settings.

    python -m scripts.bench_arrivals --random-weights 0.6B --rates 20 40 --chunks 0 512 --mixed 512

Requests arrive at random moments (a Poisson process) whether or not the ones before them have
ended, from this process, and are told of their tokens as a server's would be. Every setting gets
the same requests at the same moments: those of --chunks (`chunked_prefill_size`; 0: no limit), and
those of --mixed, the same with `enable_mixed_chunk`. They take turns, --repeats times, so that a
change of the clock meets all of them.

The columns: time to first token (TTFT) counts from the moment of arrival; inter-token latency (ITL)
is between two tokens of a request, as its reader sees them; stalls are the share of these that are
longer than --stall ms. What comes in the first --warm seconds, while the batch fills, does not
count; throughput is that of the time after it until the last arrival, and "drain" is how long after
that the last token came: where it grows with a setting, the engine has fallen behind.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.commands import RequestId
from nanovllm_jax.engine.owner import Listener
from nanovllm_jax.tools import options
from nanovllm_jax.tools.shapes import SHAPES, model_directory


class Arrival(NamedTuple):
    """A request that is going to arrive."""

    at: float  # seconds after the start
    prompt: list[int]
    num_tokens: int  # of its output


@dataclass
class Stream:
    """A request under way, and when its tokens came."""

    due: float  # time.perf_counter() of its arrival
    times: list[float] = field(default_factory=list)


class Reader(Listener):
    """Notes when tokens come, in the engine's thread, after each round."""

    def __init__(self):
        super().__init__(self._note)
        self.streams: dict[RequestId, Stream] = {}
        self.all_ended = threading.Event()
        self.num_left = 0

    def _note(self) -> None:
        now = time.perf_counter()
        for request in [*self.under_way.values(), *self.ended]:
            times = self.streams[request.request_id].times
            times.extend([now] * (request.seqs[0].num_completion_tokens - len(times)))
        self.num_left -= len(self.ended)
        self.ended.clear()
        if self.failure or not self.num_left:
            self.all_ended.set()


def arrivals(args: argparse.Namespace, rate: float, vocab_size: int) -> Iterator[Arrival]:
    """Draw the requests of a run: the same in each, except for the prompts' tokens."""
    lengths, tokens = random.Random(args.seed), random.Random()
    at, top = 0.0, min(10_000, vocab_size - 1)
    while (at := at + lengths.expovariate(rate)) < args.seconds:
        prompt = lengths.randint(*args.prompt)
        yield Arrival(
            at, [tokens.randint(0, top) for _ in range(prompt)], lengths.randint(*args.output)
        )


def run(llm: LLM, work: list[Arrival]) -> tuple[float, list[Stream]]:
    """Have requests arrive, and wait until all have ended; returns the start and the streams."""
    reader = Reader()
    reader.num_left = len(work)
    start = time.perf_counter()
    for number, arrival in enumerate(work):
        due = start + arrival.at
        time.sleep(max(0.0, due - time.perf_counter()))
        forced = SamplingParams(max_tokens=arrival.num_tokens, ignore_eos=True, detokenize=False)
        reader.streams[str(number)] = Stream(due)
        llm.start(arrival.prompt, forced, reader, str(number))
    reader.all_ended.wait()
    reader.check()
    streams = list(reader.streams.values())
    assert [len(s.times) for s in streams] == [arrival.num_tokens for arrival in work]
    return start, streams


def report(start: float, streams: list[Stream], args: argparse.Namespace) -> dict[str, float]:
    """Sum a run up: milliseconds, and tokens a second."""
    begin, end = start + args.warm, start + args.seconds
    firsts = [(s.times[0] - s.due) * 1e3 for s in streams if s.due >= begin]
    gaps = np.concatenate([np.diff([t for t in s.times if t >= begin]) for s in streams]) * 1e3
    count = sum(begin <= t < end for s in streams for t in s.times)
    return {
        "tok/s": count / (end - begin),
        "TTFT p50": float(np.percentile(firsts, 50)),
        "TTFT p99": float(np.percentile(firsts, 99)),
        "ITL p50": float(np.percentile(gaps, 50)),
        "ITL p99": float(np.percentile(gaps, 99)),
        "ITL max": float(gaps.max()),
        "stalls": float((gaps > args.stall).mean() * 100),
        "drain": (max(s.times[-1] for s in streams) - end) * 1e3,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = options.Parser(prog="bench_arrivals", description="Token latency under arrivals.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="model directory")
    add("--random-weights", choices=SHAPES, metavar="SIZE", help=f"instead: {', '.join(SHAPES)}")
    add("--rates", type=float, nargs="+", default=[10.0], help="requests a second")
    add("--chunks", type=int, nargs="+", default=[0, 2048, 512], help="chunked_prefill_size, or 0")
    add("--mixed", type=int, nargs="*", default=[], help="the same, with enable_mixed_chunk")
    add("--seconds", type=float, default=20.0, help="of arrivals in a run (default: 20)")
    add("--warm", type=float, default=5.0, help="seconds that do not count (default: 5)")
    add("--prompt", type=int, nargs=2, default=[100, 3000], metavar=("LEAST", "MOST"))
    add("--output", type=int, nargs=2, default=[50, 400], metavar=("LEAST", "MOST"))
    add("--stall", type=float, default=50.0, help="ITL that counts as a stall, in ms (default: 50)")
    add("--repeats", type=int, default=2)
    add("--seed", type=int, default=0)
    options.add_engine_options(parser)
    args = parser.parse_args(argv)
    if (args.model is None) == (args.random_weights is None):
        raise options.UsageError("give either MODEL_DIR or --random-weights SIZE")
    return args


def main(argv: list[str]) -> int:
    """Measure, print a table for each rate and turn, and return 0."""
    args = parse(argv)
    given: dict[str, Any] = {"max_model_len": 4096} | options.engine_options(args)
    if args.mixed:  # an engine that has all the programs; which of them run is up to its scheduler
        given |= {"enable_mixed_chunk": True}
        given |= {"chunked_prefill_size": None if 0 in args.mixed else max(args.mixed)}
    with model_directory(args) as path:
        llm = LLM(str(path), **given)
    with llm:
        assert llm.runner
        programs = llm.runner.programs
        settings = {
            f"{'mixed' if is_mixed else ''} {size or 'none'}": (
                programs.chunk(size) if size else None,
                programs.mixed_rooms(size or None) if is_mixed else [],
            )
            for is_mixed, sizes in ((False, args.chunks), (True, args.mixed))
            for size in sizes
        }
        warm = list(arrivals(args, args.rates[0], llm.vocab_size))
        run(llm, warm[: 1 + len(warm) // 4])
        for rate in args.rates:
            for repeat in range(args.repeats):
                for name, (chunk, mixed) in settings.items():
                    llm.reset_prefix_cache()
                    llm.scheduler.chunk, llm.scheduler.mixed = chunk, mixed
                    row = report(*run(llm, list(arrivals(args, rate, llm.vocab_size))), args)
                    if name == next(iter(settings)):
                        titles = "".join(f"{title:>10}" for title in row)
                        print(f"\nrate {rate:g}/s, turn {repeat + 1}\n{'chunk':>11}{titles}")
                    print(f"{name:>11}" + "".join(f"{x:10.1f}" for x in row.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
