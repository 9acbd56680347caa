"""The engine under a user's hands: threads, interruptions, failing rounds, JAX settings, forks.

`llm` has a runner whose tokens are checksums: what these tests are about does not depend on what
the model computes. Where it matters that keys and values are really there, the engine is real, and
its cache is poisoned with NaN.
"""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain

import jax
import numpy as np
import pytest
from helpers import Spy, edge_prompts, greedy, poison, prompt, tokens
from jax.sharding import Mesh

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.engine_thread import EngineThread

# What a signal handler raises in a destructor or a garbage collection, Python drops, and warns.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LONG = greedy(20, ignore_eos=True)


@pytest.fixture
def llm(fake_engine):
    return fake_engine()


@contextmanager
def interrupted_after(seconds):
    """Raise KeyboardInterrupt in the main thread, once, at some moment of the block."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_idle(llm):
    """All books balance, and nothing is left of any request."""
    assert llm.is_finished() and not llm.scheduler.waiting and not llm.scheduler.running
    for pool in llm.pools:
        pool.check([])
    slots = chain(*llm.scheduler.free_slots)
    assert sorted(slots) == list(range(llm.config.max_num_seqs))


# --- threads ---


def test_two_threads_get_their_own_tokens_batched_together(engine, monkeypatch):
    llm = engine()
    prompts = [edge_prompts(seed) for seed in range(2)]
    want = [tokens(llm, part, LONG) for part in prompts]
    llm.reset_prefix_cache()
    poison(llm)
    spy, gate = Spy(llm, monkeypatch), threading.Barrier(2)

    def serve(part):
        gate.wait()
        return tokens(llm, part, LONG)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, prompts)) == want
    together = [{seq_id for seq_id, _, _ in rows} for _, rows in spy.batches]
    first = min(set().union(*together))
    first, second = (set(range(n, n + 6)) for n in (first, first + 6))
    assert any(batch & first and batch & second for batch in together)
    check_idle(llm)


def test_many_threads_generate_stream_and_step(llm):
    """As the endpoints of a web server do that runs each request in a thread."""
    rng = random.Random(5)
    work = [(prompt(rng.randrange(1, 600), i), rng.randrange(1, 30)) for i in range(120)]
    want = [tokens(llm, [p], greedy(n, ignore_eos=True))[0] for p, n in work]
    llm.reset_prefix_cache()

    def serve(i):
        ids, params = work[i][0], greedy(work[i][1], ignore_eos=True)
        if i % 3 == 0:
            return [*chain(*llm.stream(ids, params))]
        if i % 3 == 1:
            return tokens(llm, [ids], params)[0]
        stream = llm.stream(ids, params)
        next(stream)
        stream.close()  # a client that goes away
        return want[i]

    stepped = [llm.add_request(p, greedy(n, ignore_eos=True)) for p, n in work[:10]]
    reported = {}
    with ThreadPoolExecutor(20) as pool:
        served = pool.map(serve, range(len(work)))
        while len(reported) < len(stepped):
            reported |= llm.step()[0]
        assert list(served) == want
    assert [reported[i] for i in stepped] == want[:10]
    check_idle(llm)


def test_two_threads_that_step_report_each_request_once(llm):
    ids = [llm.add_request(prompt(n), greedy()) for n in range(1, 60)]
    reported = []

    def run():
        while not llm.is_finished():
            reported.extend(request_id for request_id, _ in llm.step()[0])

    with ThreadPoolExecutor(2) as pool:
        for thread in [pool.submit(run) for _ in range(2)]:
            thread.result()
    assert sorted(reported) == ids


@contextmanager
def long_generate(llm):
    """Generate 700 tokens slowly in another thread, and yield the future of them."""
    llm.runner.before_read = lambda: time.sleep(0.002)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(tokens, llm, [prompt(5)], greedy(700, ignore_eos=True))
        while llm.is_finished():
            time.sleep(0.001)
        yield future


def test_a_long_generate_does_not_keep_another_thread_waiting(llm):
    with long_generate(llm) as long:
        tokens(llm, [prompt(6)], greedy(3))
        assert not long.done()
        llm.abort_request(0)
        assert len(long.result()[0]) < 700


def test_exit_ends_the_waits_of_other_threads(llm):
    with long_generate(llm) as waits:
        llm.exit()
        with pytest.raises(RuntimeError, match=r"exit\(\)"):
            waits.result(timeout=10)


# --- interruptions ---


def test_generate_may_be_interrupted_at_any_moment(llm):
    prompts = edge_prompts()
    llm.runner.before_read = lambda: time.sleep(0.0005)
    want = tokens(llm, prompts, LONG)
    start = time.perf_counter()
    tokens(llm, prompts, LONG)
    whole = time.perf_counter() - start
    rng, interrupts = random.Random(1), 0
    for _ in range(150):
        try:
            with interrupted_after(max(1e-6, rng.random() * whole)):
                tokens(llm, prompts, LONG)
        except KeyboardInterrupt:
            interrupts += 1
        if rng.random() < 0.3:
            assert tokens(llm, prompts, LONG) == want
            check_idle(llm)
    assert interrupts > 50
    assert tokens(llm, prompts, LONG) == want
    check_idle(llm)


def test_an_interruption_leaves_no_unwritten_block_in_the_prefix_cache(engine):
    llm = engine()
    prompts = edge_prompts(3)
    want = tokens(llm, prompts, LONG)
    start = time.perf_counter()
    tokens(llm, prompts, LONG)
    whole = time.perf_counter() - start
    rng = random.Random(2)
    for _ in range(12):
        llm.reset_prefix_cache()
        poison(llm)
        with suppress(KeyboardInterrupt), interrupted_after(max(1e-6, rng.random() * whole)):
            tokens(llm, prompts, LONG)
        assert tokens(llm, prompts, LONG) == want
        check_idle(llm)


def test_step_may_be_interrupted_and_reports_every_request(llm):
    rng, interrupts, reported = random.Random(3), 0, {}
    llm.runner.before_read = lambda: time.sleep(0.0002)
    ids = [llm.add_request(prompt(n), greedy(20, ignore_eos=True)) for n in range(1, 40)]
    while not llm.is_finished():
        try:
            with interrupted_after(max(1e-6, rng.random() * 0.002)):
                llm.step_outputs()
        except KeyboardInterrupt:
            interrupts += 1
        else:
            break
    for _ in range(10_000):
        if llm.is_finished():
            break
        for output in llm.step_outputs():
            if output.finished:
                reported[output.request_id] = output.outputs[0].token_ids
    assert interrupts
    assert reported.keys() == set(ids)
    assert [reported[i] for i in ids] == tokens(
        llm, [prompt(n) for n in range(1, 40)], greedy(20, ignore_eos=True)
    )


def test_an_interrupted_start_ends_the_thread(fake_engine, monkeypatch):
    core = pytest.importorskip("nanovllm_jax.engine.core")
    runner = core.ModelRunner
    started = threading.Event()

    class SlowToStart(runner):
        def __init__(self, config):
            started.set()
            time.sleep(0.3)
            super().__init__(config)

    monkeypatch.setattr(core, "ModelRunner", SlowToStart)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.2):
        fake_engine()
        started.wait(5)
        time.sleep(5)
    for thread in threading.enumerate():
        if thread.name == "nanovllm_jax" and started.is_set():
            thread.join(5)
    assert started.is_set()


# --- rounds that fail ---


@pytest.mark.parametrize("call", ["dispatch", "run", "sample"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_round_that_fails_is_undone(engine, monkeypatch, call, at):
    """Blocks enter the prefix cache when a step is scheduled: if it never runs, they must leave."""
    llm = engine()
    prompts = edge_prompts(4)
    params = SamplingParams(temperature=0.8, top_k=50, seed=1, max_tokens=8, ignore_eos=True)
    want = tokens(llm, prompts, params)
    llm.reset_prefix_cache()
    poison(llm)
    calls, original = [], getattr(llm.runner, call)

    def failing(*args):
        calls.append(call)
        if len(calls) == at:
            raise KeyboardInterrupt if at == 2 else MemoryError("a device has no memory left")
        return original(*args)

    waiting = llm.add_request(prompt(300, 9), greedy())
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, call, failing)
        with pytest.raises((MemoryError, KeyboardInterrupt)):
            tokens(llm, prompts, params)
    assert len(calls) == at
    assert tokens(llm, prompts, params) == want
    reported = {}
    while not llm.is_finished():
        reported |= llm.step()[0]
    assert reported == {waiting: tokens(llm, [prompt(300, 9)], greedy())[0]}
    check_idle(llm)


def test_a_state_that_a_failed_step_has_taken_is_made_anew(engine, monkeypatch):
    llm = engine()
    want = tokens(llm, [prompt(300)], LONG)

    def take(inputs):
        for array in jax.tree.leaves(llm.runner.state):
            array.delete()  # as a donation does
        raise RuntimeError("the device failed")

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "run", take)
        with pytest.raises(RuntimeError, match="the device failed"):
            tokens(llm, [prompt(300)], LONG)
    assert tokens(llm, [prompt(300)], LONG) == want


def test_a_request_that_fails_in_a_failing_round_ends_once(fake_engine, monkeypatch):
    """It has failed for want of room, and is aborted before the scheduler could report it."""
    llm = fake_engine(num_kvcache_blocks=2)
    other, schedule = llm.add_request(prompt(5), greedy(3, ignore_eos=True)), llm.scheduler.schedule

    def failing(num_steps):
        batch = schedule(num_steps)
        if llm.scheduler.failed:
            raise MemoryError("a device has no memory left")
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(llm.scheduler, "schedule", failing)
        with pytest.raises(MemoryError):
            llm.generate([prompt(505)], greedy(100), use_tqdm=False)
    reported = {}
    while not llm.is_finished():
        reported |= llm.step()[0]
    assert len(reported[other]) == 3
    check_idle(llm)


def test_all_who_wait_are_told_of_a_failure(llm):
    gate = threading.Event()

    def fail():
        gate.wait(10)
        raise MemoryError("a device has no memory left")

    llm.runner.before_read = fail
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(tokens, llm, [prompt(n)], LONG) for n in (5, 6)]
        while len(llm._core.requests) + llm._thread._calls.qsize() < 2:
            time.sleep(0.001)
        gate.set()
        for wait in waits:
            with pytest.raises(MemoryError):
                wait.result(10)
    llm.runner.before_read = lambda: None
    assert tokens(llm, [prompt(5)], LONG)
    check_idle(llm)


# --- a random user ---


@pytest.mark.parametrize("seed", range(25))
def test_a_random_user_with_two_threads(llm, seed):
    """Generates, streams, aborts, resets, failures and interruptions, from two threads at once."""
    rng = random.Random(seed)
    llm.reset_prefix_cache()
    failing = random.Random(seed + 1)

    def before_read():
        if failing.random() < 0.02:
            raise MemoryError("a device has no memory left")

    want = {}

    def expected(length, count):
        return want[length][:count]

    llm.runner.before_read = lambda: None
    for length in (1, 255, 256, 300, 600):
        [want[length]] = tokens(llm, [prompt(length)], greedy(30, ignore_eos=True))
    llm.runner.before_read = before_read

    def use(rng, rounds):
        for _ in range(rounds):
            lengths = rng.choices(list(want), k=rng.randrange(1, 5))
            count, action = rng.randrange(1, 30), rng.random()
            params = greedy(count, ignore_eos=True)
            with suppress(MemoryError):
                if action < 0.5:
                    got = tokens(llm, [prompt(n) for n in lengths], params)
                    assert got == [expected(n, count) for n in lengths]
                elif action < 0.8:
                    got = [*chain(*llm.stream(prompt(lengths[0]), params))]
                    assert got == expected(lengths[0], count)
                elif action < 0.9:
                    stream = llm.stream(prompt(lengths[0]), params)
                    assert next(stream)[0] == expected(lengths[0], 1)[0]
                    stream.close()
                else:
                    llm.reset_prefix_cache()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(use, random.Random(seed + 2), 20)
        for _ in range(20):
            with suppress(KeyboardInterrupt), interrupted_after(max(1e-6, rng.random() * 0.01)):
                use(rng, 3)
        other.result()
    llm.runner.before_read = lambda: None
    check_idle(llm)


# --- the user's JAX settings ---

SETTINGS = {
    "jax_enable_x64": True,
    "jax_transfer_guard": "disallow",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_check_tracer_leaks": True,
    "jax_disable_jit": True,
    "jax_enable_checks": True,
}


@pytest.mark.parametrize("how", ["for all threads", "in this thread"])
def test_the_users_jax_settings_stay_outside(new_engine, engine, checkpoint, how):
    prompts = edge_prompts(6)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True)
    want = tokens(engine(), prompts, params), tokens(engine(), prompts, greedy())
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    mesh = Mesh(np.array(jax.devices()[4:6]), ("mine",))
    with jax.default_device(jax.devices()[3]):
        if how == "for all threads":
            for name, value in SETTINGS.items():
                jax.config.update(name, value)
            context = nullcontext()
        else:
            context = jax.transfer_guard("disallow")
        try:
            with context, jax.set_mesh(mesh):
                llm = new_engine(checkpoint())
                llm.reset_prefix_cache()
                poison_outside(llm)
                got = tokens(llm, prompts, params), tokens(llm, prompts, greedy())
                assert jax.sharding.get_mesh() == mesh
            assert {n: getattr(jax.config, n) for n in SETTINGS} == (
                SETTINGS if how == "for all threads" else before
            )
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
    assert got == want


def poison_outside(llm):
    """Poison the cache from the engine's own thread, where the user's settings do not reach."""
    llm._thread.call(poison, llm)


def test_disable_jit_names_the_engines_own_option(fake_engine, caplog):
    with jax.disable_jit():
        fake_engine()
    assert "enforce_eager=True" in caplog.text


# --- processes, and the end ---

FORK = """
import os, sys
from nanovllm_jax import LLM, SamplingParams

sizes = dict(max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64, num_kvcache_blocks=2)
llm = LLM(sys.argv[1], **sizes)
params = SamplingParams(temperature=0, max_tokens=3)
want = llm.generate([[1, 2, 3]], params, use_tqdm=False)
child = os.fork()
if child == 0:
    said = []
    for use in (
        lambda: llm.generate([[1, 2, 3]], params, use_tqdm=False),
        lambda: llm.add_request([1], params),
        lambda: next(llm.stream([1], params)),
        llm.step,
        lambda: LLM(sys.argv[1], **sizes),
    ):
        try:
            use()
        except RuntimeError as error:
            said.append("spawn" in str(error) and str(os.getppid()) in str(error))
    llm.exit()  # does nothing
    os._exit(0 if said == [True] * 5 else 1)  # as multiprocessing does; JAX survives no other end
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert llm.generate([[1, 2, 3]], params, use_tqdm=False) == want
print("done")
"""


def test_a_forked_child_is_told_to_spawn(checkpoint):
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(checkpoint())]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_forgotten_engine_frees_its_memory(new_engine, checkpoint, monkeypatch):
    from helpers import quick_start

    from nanovllm_jax import LLM

    with quick_start():
        llm = LLM(checkpoint(), max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64)
    tokens(llm, [prompt(5)], greedy())
    runner = llm.runner
    assert runner and runner.state
    arrays = jax.tree.leaves((runner.weights, runner.state.cache))
    del runner
    thread, engine = llm._thread._thread, weakref.ref(llm)
    del llm
    gc.collect()
    assert engine() is None and not thread.is_alive()
    assert all(array.is_deleted() for array in arrays)


def test_a_stream_that_the_engines_thread_collects_ends(llm):
    """The garbage collector runs in any thread, and closes a generator there."""
    stream = llm.stream(prompt(5), greedy(500, ignore_eos=True))
    next(stream)
    holder = [stream]
    del stream
    llm._thread.call(holder.clear)
    llm._thread.call(lambda: None)  # after what the collection has asked for
    check_idle(llm)


def test_the_thread_raises_what_the_core_raises():
    def fail():
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        EngineThread(fail)
