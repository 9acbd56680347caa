"""What fits on a device, computed for invented ones, and what is said when nothing does."""

import atexit
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.errors import JaxRuntimeError

from nanovllm_jax.engine import memory
from nanovllm_jax.engine.cuda_driver import GpuMemory
from nanovllm_jax.engine.memory import MIB

GIB = 1 << 30
CARDS = {"H100": 81_559 * MIB, "A10G": 23_028 * MIB, "T4": 15_360 * MIB}


@pytest.mark.parametrize("total", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("programs", [4, 34, 120])
def test_the_pool_leaves_room_for_what_lives_outside(total, gpus, programs):
    share = memory.pool_share(total, gpus, programs)
    outside = (1 - share) * total
    assert outside >= 0.7 * GIB, "the context and the programs of one GPU"
    if gpus > 1:
        assert outside >= 0.7 * GIB + 2.7 * GIB + programs * 26 * MIB, "NCCL and its programs"
    assert 0.1 <= share <= 0.95
    assert share <= memory.pool_share(total, 1, programs)


def test_two_h100s_leave_room_for_an_8b_model():
    """With 95% for the pool, Qwen3-8B failed to start: 3.8 GiB more were needed outside."""
    assert (1 - memory.pool_share(CARDS["H100"], 2, 34)) * CARDS["H100"] > 0.7 * GIB + 3.8 * GIB


def test_a_budget_is_what_is_left_of_the_pool():
    budget = memory.gpu_budget(limit=10 * GIB, in_use=3 * GIB, step=2 * GIB, utilization=0.9)
    assert budget.num_bytes == 9 * GIB - 5 * GIB - memory.MARGIN_BYTES
    for number in ("10240 MiB x 0.9", "3072", "2048", f"{budget.num_bytes // MIB} MiB"):
        assert number in budget.account


def test_a_cpu_gives_a_share_of_its_memory():
    assert memory.cpu_budget(64 * GIB).num_bytes == 2 * GIB


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    left=st.integers(-(1 << 34), 1 << 40),
    block=st.integers(1 << 10, 1 << 30),
    most=st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_blocks_fill_the_budget_and_never_exceed_it(left, block, most):
    budget = memory.Budget(left, "some MiB")
    fitting = max(0, left) // block if most is None else min(max(0, left) // block, most)
    if fitting == 0:
        with pytest.raises(ValueError, match=r"no memory for the KV cache\. some MiB.*num_kvcache"):
            memory.num_cache_blocks(budget, block, most)
        return
    blocks = memory.num_cache_blocks(budget, block, most)
    assert fitting - fitting / 16 < blocks <= fitting
    assert len(bin(blocks)[2:].rstrip("0")) <= 5, "more than five binary digits"


def test_devices_are_described_with_their_numbers():
    pool = {"bytes_in_use": 3 * GIB, "bytes_limit": 60 * GIB}
    said = memory.describe([pool, pool], [GpuMemory(5 * GIB, 80 * GIB), GpuMemory(0, 80 * GIB)])
    assert "device 0: 3072 of 61440 MiB of JAX's pool in use, 5120 of 81920 MiB free" in said
    assert "device 1: " in said and ", 0 of 81920 MiB free outside" in said
    assert "device 0" in memory.describe([None], [])


def test_a_failed_allocation_is_a_memory_error_with_the_numbers_and_the_remedy():
    with (
        pytest.raises(MemoryError, match=r"Out of memory.*THE NUMBERS.*gpu_memory_utilization"),
        memory.memory_errors(lambda: "THE NUMBERS"),
    ):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while\ntrying")


def test_other_errors_pass_unchanged():
    with pytest.raises(JaxRuntimeError, match="INTERNAL"), memory.memory_errors(lambda: ""):
        raise JaxRuntimeError("INTERNAL: something else")


def test_what_ends_in_time_returns_or_raises():
    done = []
    memory.finish_in_time(lambda: done.append(1), "it", lambda: "")
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        memory.finish_in_time(lambda: 1 / 0, "it", lambda: "")


def test_what_hangs_is_given_up_with_the_numbers(monkeypatch):
    ended, registered = threading.Event(), []
    monkeypatch.setattr(memory, "DEADLINE_S", 0.05)
    monkeypatch.setattr(atexit, "register", lambda *args: registered.append(args))
    with pytest.raises(RuntimeError, match=r"the first run.*THE NUMBERS.*XLA_CLIENT_MEM_FRACTION"):
        memory.finish_in_time(ended.wait, "the first run", lambda: "THE NUMBERS")
    ended.set()
    assert registered == [(os._exit, 1)], "the process can end all the same"
