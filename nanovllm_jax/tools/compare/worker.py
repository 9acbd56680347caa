"""Run one engine in its own process: read a job, keep the rules of fairness, append results.

A rule that is broken ends the workload with an error: every completion has exactly its length and
lies in the vocabulary; the prompts stay those of the job; each part of a timed run starts with an
empty prefix cache, after one whole warm-up run with other prompts.
"""

import contextlib
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm_jax.tools.compare import machine, results
from nanovllm_jax.tools.compare.adapters import ENGINES, Adapter, Tokens
from nanovllm_jax.tools.compare.job import Job, Workload
from nanovllm_jax.tools.compare.results import Absent, Check, Failure, Profile, Run, Skip, Start

Emit = Callable[[results.Event], None]
Done = tuple[Workload, float, float]  # a workload, seconds of its warm-up and of its slowest run


class Unfair(Exception):
    """An engine did other work than it was given; the message says which."""


def check_completions(completions: Tokens, outputs: list[int], vocab_size: int) -> None:
    """Raise Unfair unless completion i has exactly outputs[i] tokens of the vocabulary."""
    if len(completions) != len(outputs):
        raise Unfair(f"{len(completions)} completions of {len(outputs)} requests")
    for i, (tokens, n) in enumerate(zip(completions, outputs, strict=True)):
        if len(tokens) != n:
            raise Unfair(f"request {i} got {len(tokens)} output tokens in place of {n}")
        if not all(0 <= token < vocab_size for token in tokens):
            raise Unfair(f"request {i} got a token outside the vocabulary of {vocab_size}")


def empty_cache(engine: Adapter) -> None:
    """Empty the prefix cache, or raise Unfair."""
    if engine.reset_prefix_cache() is False:
        raise Unfair("the prefix cache could not be emptied")


def run_batch(engine: Adapter, workload: Workload, job: Job) -> dict[str, Any]:
    """Time each part of a workload."""
    seconds = {}
    for part, waves in workload.parts.items():
        empty_cache(engine)
        start = time.perf_counter()
        done = [engine.generate(prompts, outputs, job.temperature) for prompts, outputs in waves]
        seconds[part] = time.perf_counter() - start
        for completions, (_, outputs) in zip(done, waves, strict=True):
            check_completions(completions, outputs, job.vocab_size)
    return {"seconds": seconds}


def run_stream(engine: Adapter, workload: Workload, job: Job) -> dict[str, Any]:
    """Submit each request at its time of arrival, and step while any is unfinished.

    Returns each request's seconds from arrival to first token, and per token after that.
    """
    [[prompts, outputs]], arrivals = workload.main, workload.arrivals
    first, last = [0.0] * len(prompts), [0.0] * len(prompts)
    counts, names = [0] * len(prompts), {}
    empty_cache(engine)
    start = time.perf_counter()
    while counts != outputs:
        now, submitted = time.perf_counter() - start, len(names)
        while submitted < len(prompts) and arrivals[submitted] <= now:
            prompt, output = prompts[submitted], outputs[submitted]
            names[engine.add_request(prompt, output, job.temperature)] = submitted
            submitted += 1
        if counts[:submitted] == outputs[:submitted]:
            time.sleep(max(0.0, arrivals[submitted] - (time.perf_counter() - start)))
            continue
        progress = engine.step()
        now = time.perf_counter() - start
        for name, count in progress:
            i = names[name]
            if count > outputs[i]:
                raise Unfair(f"request {i} got {count} output tokens in place of {outputs[i]}")
            if count > counts[i]:
                first[i] = first[i] if counts[i] else now
                counts[i], last[i] = count, now
    ttft = [t - arrival for t, arrival in zip(first, arrivals, strict=True)]
    tpot = [(b - a) / (n - 1) for a, b, n in zip(first, last, outputs, strict=True) if n > 1]
    return {"seconds": {"whole": max(last)}, "ttft_s": ttft, "tpot_s": tpot}


def measure(engine: Adapter, workload: Workload, job: Job, number: int = 0) -> Run:
    """Run a workload once, with the energy that it took and the digest of what it was."""
    digest, before = workload.digest, machine.energy()
    times = (run_stream if workload.arrivals else run_batch)(engine, workload, job)
    after = machine.energy()
    joules = after - before if before and after else None
    if workload.digest != digest:
        raise Unfair("the engine changed the prompts that it was given")
    return Run(job.engine, job.round, workload.name, number, digest=digest, joules=joules, **times)


def reason_to_skip(workload: Workload, runs: int, left: float, done: Sequence[Done]) -> str:
    """Say why a workload would not fit into the seconds that are left; empty if it would.

    A rate is taken to grow with the batch, a warm-up to lose as much time as the worst so far.
    """
    rate, extra = 0.0, max([0.0, *(warm_up - run for _, warm_up, run in done)])
    for batch, _, run in done:
        if batch.name.startswith("batch"):
            rate = batch.output_tokens / run * max(1.0, workload.batch / batch.batch)
    needed = extra + (workload.output_tokens * (runs + 1) / rate if rate else 0.0)
    told = f"would take about {needed:.0f} s or more (at {rate:,.0f} output tok/s)"
    return f"{told}, and {left:.0f} s of the time limit were left" if needed > left else ""


def work(job: Job, emit: Emit) -> None:
    """Start the engine, check it, and measure; `emit` takes the results one by one."""
    spec = ENGINES[job.engine]
    if missing := [m for m in spec.needs if importlib.util.find_spec(m) is None]:
        emit(Absent(job.engine, job.round, missing, f"pip install {spec.install}"))
        return
    adapter = importlib.import_module(f"nanovllm_jax.tools.compare.adapters.{job.engine}")
    engine = adapter.Adapter(job.model, job.limits)
    start_s, versions = round(time.time() - job.started, 2), machine.versions(spec.needs)
    emit(Start(job.engine, job.round, start_s, versions, engine.note))
    prompts, outputs = job.check
    tokens = engine.generate(prompts, outputs, 0.0)
    check_completions(tokens, outputs, job.vocab_size)
    emit(Check(job.engine, job.round, [list(row) for row in tokens]))
    measure_all(engine, job, emit)


def measure_all(engine: Adapter, job: Job, emit: Emit) -> None:
    """Time every workload of the job, then profile: profilers may leave something behind."""
    done: list[Done] = []
    for timed, warm_up in job.cases:
        left = max(job.started + job.seconds - time.time(), 0.0)
        reason = reason_to_skip(timed, job.runs, left, done)
        if timed.arrivals and not hasattr(engine, "step"):
            reason = "it takes whole batches only, no arriving requests"
        if reason:
            emit(Skip(job.engine, job.round, timed.name, reason))
            continue
        with _failures(job, timed.name, emit):
            first, slowest = measure(engine, warm_up, job), 0.0
            for number in range(job.runs):
                emit(run := measure(engine, timed, job, number))
                slowest = max(slowest, sum(run.seconds.values()))
            done.append((timed, sum(first.seconds.values()), slowest))
    if (timed := job.profiled) and job.round == 0:
        with _failures(job, timed.name, emit):
            from nanovllm_jax.tools.compare.profiling import torch_profile  # imports JAX

            whole = replace(timed, parts={"whole": timed.main})
            profile = getattr(engine, "profile", torch_profile)
            found = profile(lambda: run_batch(engine, whole, job), timed.batch)
            emit(Profile(job.engine, job.round, timed.name, **found))


@contextlib.contextmanager
def _failures(job: Job, workload: str | None, emit: Emit) -> Iterator[None]:
    """Record what fails inside, so that the next workload is tried."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        emit(Failure(job.engine, job.round, workload, f"{type(error).__name__}: {text}"))


def end_with_parent() -> None:
    """End this process, and those that its engine starts, as soon as the parent is gone.

    Standard input is a pipe that only the parent writes to, and it never does.
    """

    def watch() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str) -> None:
    """Do the job of a file. Standard output shows progress; all else goes to the job's log."""
    end_with_parent()
    job: Job = pickle.loads(Path(path).read_bytes())
    progress = os.fdopen(os.dup(1), "w")
    with open(job.log, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def emit(event: results.Event) -> None:
        results.append(job.results, event)
        told = [vars(event).get(name) for name in ("workload", "reason", "missing", "start_s")]
        if isinstance(event, Run):
            told += [f"{part} {seconds:.3f} s" for part, seconds in event.seconds.items()]
        print(" ", type(event).__name__.lower(), *filter(None, told), file=progress, flush=True)

    with _failures(job, None, emit):
        work(job, emit)
    sys.stdout.flush()
    os._exit(0)  # some engines' threads would keep the process


if __name__ == "__main__":
    main(sys.argv[1])
