"""One engine in its own process: reads a job, keeps the rules of fairness, appends JSON lines.

    python -m compare.worker JOB.json

The rules, each of which ends the workload with an error if it is broken: every completion has
exactly its length and lies in the vocabulary; the prompts are those of the job, before and after;
each part of a timed run starts with an empty prefix cache, after one whole warm-up run with other
prompts.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compare import machine
from compare.adapters import ENGINES, Adapter, Limits

Record = dict[str, Any]


class Unfair(Exception):
    """An engine did other work than it was given; the text says which."""


def check_completions(
    completions: Sequence[Sequence[int]], outputs: Sequence[int], vocab_size: int
) -> None:
    """Raise Unfair unless completion i has exactly outputs[i] tokens of the vocabulary."""
    if len(completions) != len(outputs):
        raise Unfair(f"{len(completions)} completions of {len(outputs)} requests")
    for i, (tokens, n) in enumerate(zip(completions, outputs, strict=True)):
        if len(tokens) != n:
            raise Unfair(f"request {i} got {len(tokens)} output tokens in place of {n}")
        if not all(0 <= token < vocab_size for token in tokens):
            raise Unfair(f"request {i} got a token outside the vocabulary of {vocab_size}")


def digest(workload: Record) -> str:
    """A name of the workload's token ids, lengths and arrivals: equal for equal work only."""
    content = json.dumps([workload["parts"], workload["arrivals"]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def empty_cache(engine: Adapter) -> None:
    """Empty the prefix cache, or raise Unfair."""
    if engine.reset_prefix_cache() is False:
        raise Unfair("the prefix cache could not be emptied")


def run_batch(engine: Adapter, workload: Record, job: Record) -> Record:
    """Time each part of a workload: {"seconds": {part: s}}."""
    seconds = {}
    for part, waves in workload["parts"].items():
        empty_cache(engine)
        start = time.perf_counter()
        done = [engine.generate(p, n, job["temperature"]) for p, n in waves]
        seconds[part] = time.perf_counter() - start
        for completions, (_, outputs) in zip(done, waves, strict=True):
            check_completions(completions, outputs, job["vocab_size"])
    return {"seconds": seconds}


def run_stream(engine: Adapter, workload: Record, job: Record) -> Record:
    """Submit each request at its time of arrival, and step while any is unfinished.

    Returns the time to the first token, from the arrival, and the time per token after it, of
    each request, in seconds.
    """
    [[prompts, outputs]] = workload["parts"]["whole"]
    arrivals = workload["arrivals"]
    first, last = [0.0] * len(prompts), [0.0] * len(prompts)
    counts, names = [0] * len(prompts), {}
    finished = submitted = 0
    empty_cache(engine)
    start = time.perf_counter()
    while finished < len(prompts):
        now = time.perf_counter() - start
        while submitted < len(prompts) and arrivals[submitted] <= now:
            request = (prompts[submitted], outputs[submitted], job["temperature"])
            names[engine.add_request(*request)] = submitted
            submitted += 1
        if finished == submitted:
            time.sleep(max(0.0, arrivals[submitted] - (time.perf_counter() - start)))
            continue
        progress = engine.step()
        now = time.perf_counter() - start
        for name, count in progress:
            i = names[name]
            if count == counts[i]:
                continue
            first[i] = first[i] if counts[i] else now
            counts[i], last[i] = count, now
            finished += count == outputs[i]
            if count > outputs[i]:
                raise Unfair(f"request {i} got {count} output tokens in place of {outputs[i]}")
    seconds = time.perf_counter() - start
    ttft = [t - arrival for t, arrival in zip(first, arrivals, strict=True)]
    steps = zip(first, last, outputs, strict=True)
    tpot = [(end - begin) / (n - 1) for begin, end, n in steps if n > 1]
    return {"seconds": {"whole": seconds}, "ttft_s": ttft, "tpot_s": tpot}


def measure(engine: Adapter, workload: Record, job: Record) -> Record:
    """One run of a workload, with the energy that it took and the digest of what it was."""
    before = digest(workload)
    joules = machine.energy()
    run = run_stream if workload["arrivals"] else run_batch
    result = run(engine, workload, job)
    used = machine.energy()
    if digest(workload) != before:
        raise Unfair("the engine changed the prompts that it was given")
    result["digest"] = before
    result["joules"] = used - joules if used is not None and joules is not None else None
    return result


def output_tokens(workload: Record) -> int:
    """Output tokens of all parts."""
    waves = [wave for part in workload["parts"].values() for wave in part]
    return sum(sum(outputs) for _, outputs in waves)


class Clock:
    """How much of the time limit is left, and whether a workload is likely to fit into it."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds
        self.rate, self.batch = 0.0, 1  # output tokens a second, of so many requests at a time
        self.extra = 0.0  # by how much the slowest warm-up was slower than the runs after it

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def learn(self, workload: Record, warm_up: float, run: float) -> None:
        """Take note of a workload that was run: one warm-up and its slowest run, in seconds."""
        self.extra = max(self.extra, warm_up - run)
        if workload["name"].startswith("batch"):
            self.rate, self.batch = output_tokens(workload) / run, _batch(workload)

    def reason_to_skip(self, workload: Record, runs: int) -> str | None:
        """Why a workload would not fit, if so. The rate is taken to grow with the batch."""
        rate = self.rate * max(1.0, _batch(workload) / self.batch)
        needed = self.extra + (output_tokens(workload) * (runs + 1) / rate if rate else 0.0)
        if needed <= self.left:
            return None
        return (
            f"would take about {needed:.0f} s or more (at {rate:,.0f} output tok/s), and "
            f"{max(self.left, 0):.0f} s of the time limit were left"
        )


def _main(workload: Record) -> list[Any]:
    """The waves of the first part."""
    return next(iter(workload["parts"].values()))


def _batch(workload: Record) -> int:
    """Requests at a time: 64 at most, which is as far as rates grow for every engine."""
    return min(64, max(len(prompts) for prompts, _ in _main(workload)))


def work(job: Record, emit: Any) -> None:
    """Do the job; `emit(kind, **fields)` writes one line."""
    name, spec = job["engine"], ENGINES[job["engine"]]
    missing = [m for m in spec.needs if importlib.util.find_spec(m) is None]
    if missing:
        emit("absent", missing=missing, install=spec.install)
        return
    clock, start = Clock(job["seconds"]), time.perf_counter()
    engine = importlib.import_module(f"compare.adapters.{name}").Adapter(
        job["model"], Limits(**job["limits"])
    )
    emit(
        "engine",
        start_s=time.perf_counter() - start,
        versions=machine.versions(spec.needs),
        note=engine.note,
    )
    prompts, outputs = job["check"]
    try:
        tokens = engine.generate(prompts, outputs, 0.0)
        check_completions(tokens, outputs, job["vocab_size"])
        emit("check", tokens=[list(row) for row in tokens])
        measure_all(engine, job, clock, emit)
    finally:
        if callable(stop := getattr(engine, "exit", None)):
            stop()


def measure_all(engine: Adapter, job: Record, clock: Clock, emit: Any) -> None:
    """Every workload of the job, then the profile: profilers may leave something behind."""
    for case in job["workloads"]:
        with _recorded(case["timed"]["name"], emit):
            _case(engine, case, job, clock, emit)
    for timed in (case["timed"] for case in job["workloads"] if case["profile"]):
        with _recorded(timed["name"], emit):
            _profile(engine, timed, job, emit)


def _case(engine: Adapter, case: Record, job: Record, clock: Clock, emit: Any) -> None:
    """Warm up for one workload and time it."""
    timed, name = case["timed"], case["timed"]["name"]
    if timed["arrivals"] and not hasattr(engine, "step"):
        emit("skip", workload=name, reason="it takes whole batches only, no arriving requests")
        return
    if reason := clock.reason_to_skip(timed, job["runs"]):
        emit("skip", workload=name, reason=reason)
        return
    start = time.perf_counter()
    measure(engine, case["warm_up"], job)
    warm_up = time.perf_counter() - start
    slowest = 0.0
    for i in range(job["runs"]):
        start = time.perf_counter()
        result = measure(engine, timed, job)
        slowest = max(slowest, time.perf_counter() - start)
        emit("run", workload=name, run=i, **result)
    clock.learn(timed, warm_up, slowest)


def _profile(engine: Adapter, timed: Record, job: Record, emit: Any) -> None:
    """Profile one more run of a workload."""
    empty_cache(engine)
    profile = engine.profile(
        lambda: [engine.generate(p, n, job["temperature"]) for p, n in _main(timed)],
        _batch(timed),
    )
    emit("profile", workload=timed["name"], **profile)


@contextlib.contextmanager
def _recorded(name: str, emit: Any) -> Iterator[None]:
    """Around one workload: if it fails that is recorded, and the next one is tried."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        emit("failure", workload=name, reason=f"{type(error).__name__}: {_short(error)}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(path: str) -> None:
    """Do the job of a file. Standard output shows progress; all else goes to the job's log."""
    job = json.loads(Path(path).read_text())
    progress = os.fdopen(os.dup(1), "w")
    with open(job["log"], "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def emit(kind: str, **fields: Any) -> None:
        record = {"kind": kind, "engine": job["engine"], "round": job["round"], **fields}
        with open(job["results"], "a") as file:  # closed at once: kept whatever happens next
            file.write(json.dumps(record) + "\n")
        print(f"  {describe(record)}", file=progress, flush=True)

    try:
        work(job, emit)
    except Exception as error:
        traceback.print_exc()
        emit("failure", workload=None, reason=f"{type(error).__name__}: {_short(error)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some engines' threads would keep the process


def describe(record: Record) -> str:
    """A line of progress."""
    kind, workload = record["kind"], record.get("workload")
    if kind == "run":
        return f"{workload}: " + ", ".join(f"{k} {s:.3f} s" for k, s in record["seconds"].items())
    if kind == "engine":
        return f"started in {record['start_s']:.1f} s"
    if kind == "absent":
        return f"absent: no module {', '.join(record['missing'])} ({record['install']})"
    if kind in ("skip", "failure"):
        return f"{workload or 'engine'} {kind}: {record['reason']}"
    return kind


if __name__ == "__main__":
    main(sys.argv[1])
