"""Times and traces of an engine's steps: in its own loop, alone, and under the profiler."""

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bench
import jax
import numpy as np
from kernel_trace import Event, read_events, whole_steps

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.__main__ import UsageError
from nanovllm_jax.engine.model_runner import Bucket, ModelRunner
from nanovllm_jax.engine.scheduler import Batch

WARM_STEPS = 10
SPARE_TOKENS = 16  # that a sequence may have decoded before all of them do
PREFILL_RUNS = 5
MODULE = "jit_run"  # as XLA names the compiled step


class Measured(NamedTuple):
    """One kind of step: its batch, its times in seconds, and its trace."""

    batch: Batch
    bucket: Bucket
    loop: float  # a step of the engine's loop, without the profiler
    alone: float  # the compiled step, called back to back
    events: list[Event]
    steps: int  # that the events are
    last: str  # kernel of a step


def random_prompts(llm: LLM, prompts: int, length: int) -> list[list[int]]:
    """`prompts` prompts of random tokens."""
    return bench.fixed_workload(random.Random(0), prompts, length, 1, llm.vocab_size).prompts


def add_prompts(llm: LLM, prompts: list[list[int]], max_tokens: int) -> None:
    """Queue a request for each prompt."""
    params = SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True)
    for prompt in prompts:
        llm.add_request(prompt, params)


def abort(llm: LLM) -> None:
    """End all requests."""
    for seq in [*llm.scheduler.running, *llm.scheduler.waiting]:
        llm.scheduler.finish(seq)
    while not llm.is_finished():
        llm.step()
    llm.in_flight.clear()
    llm.reset_prefix_cache()


@contextlib.contextmanager
def tracing(llm: LLM, folder: Path) -> Iterator[None]:
    """Trace what runs inside into `folder`."""
    options = jax.profiler.ProfileOptions()
    on_cpu = runner_of(llm).platform == "cpu"  # whose operations are events of the host
    options.host_tracer_level = 2 if on_cpu else 0  # elsewhere these only slow the host down
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        yield


def measure_decode(
    llm: LLM, batch: int, context: int, steps: int, timed: int, folder: Path
) -> Measured:
    """Decode with `batch` sequences: `timed` steps timed, half of them before `steps` traced ones.

    So both see the same contexts on average.
    """
    room = llm.config.max_model_len - context
    add_prompts(llm, random_prompts(llm, batch, context), room)
    while llm.scheduler.waiting or llm.step()[1] > 0:
        llm.step()

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            llm.step()
        return time.perf_counter() - began

    run(WARM_STEPS)
    seconds = run(timed // 2)
    with tracing(llm, folder):
        run(steps // 2)
        middle = llm.in_flight[-1][0]
        run(steps - steps // 2)
    seconds += run(timed - timed // 2)
    if (running := len(llm.scheduler.running)) < batch:
        raise UsageError(
            f"of {batch} sequences only {running} ran to the end of the measurement: raise "
            "--max-model-len or --num-kvcache-blocks, or lower --batch or --timed-steps"
        )
    bucket, alone = time_alone(llm, middle, timed)
    abort(llm)
    events, found, last = whole_steps(read_events(folder, MODULE), steps)
    return Measured(middle, bucket, seconds / timed, alone, events, found, last)


def measure_prefill(llm: LLM, prompts: int, length: int, folder: Path) -> Measured:
    """Prefill one batch at a time: a few timed, one traced."""
    work = random_prompts(llm, prompts, length)

    def start() -> Batch:
        llm.reset_prefix_cache()
        add_prompts(llm, work, 1)
        batch = llm.scheduler.schedule()
        assert batch is not None and len(batch.seqs) == prompts
        llm.in_flight.append((batch, runner_of(llm).dispatch(batch)))
        return batch

    def run() -> float:
        began = time.perf_counter()
        start()
        while not llm.is_finished():
            llm.step()
        return time.perf_counter() - began

    run()  # warm-up
    seconds = statistics.median(run() for _ in range(PREFILL_RUNS))
    with tracing(llm, folder):
        run()
    batch = start()
    bucket, alone = time_alone(llm, batch, PREFILL_RUNS)
    abort(llm)
    return Measured(batch, bucket, seconds, alone, read_events(folder, MODULE), 1, "")


def time_alone(llm: LLM, batch: Batch, calls: int) -> tuple[Bucket, float]:
    """The bucket of a batch that is running, and the seconds of one of `calls` calls in a row.

    The same input again and again: the same positions of the cache are read and written, so the
    engine can go on after it (with other tokens).
    """
    runner = runner_of(llm)
    bucket, packed = step_input(runner, batch)
    packed = jax.device_put(packed, runner.sharding.named("batch"))

    def call() -> jax.Array:
        runner.state, tokens, _ = runner.steps[bucket](runner.weights, runner.state, packed)
        return tokens

    before = call()
    before.block_until_ready()
    began = time.perf_counter()
    for _ in range(calls):
        after = call()
        before.block_until_ready()  # two steps are under way: the engine has memory for no more
        before = after
    before.block_until_ready()
    return bucket, (time.perf_counter() - began) / calls


def step_input(runner: ModelRunner, batch: Batch) -> tuple[Bucket, np.ndarray]:
    """The bucket and the input array with which the runner calls the step of a batch."""
    steps, inputs = runner.steps, []

    def recorded(bucket: Bucket):
        def step(weights, state, packed):
            inputs.append((bucket, packed))
            return steps[bucket](weights, state, packed)

        return step

    runner.steps = {bucket: recorded(bucket) for bucket in steps}
    try:
        runner.dispatch(batch)
    finally:
        runner.steps = steps
    return inputs[0]


def runner_of(llm: LLM) -> ModelRunner:
    """The runner of a live engine."""
    assert llm.runner is not None
    return llm.runner
