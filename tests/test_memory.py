"""What fits on a device, worked out for invented cards; and failures that end in an error."""

import threading
import time

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax.engine import cuda_driver, memory
from nanovllm_jax.engine.cuda_driver import GpuMemory

MIB, GIB = 1 << 20, 1 << 30
H100 = 81_080 * MIB  # what the driver tells of an 80 GB card


def test_one_gpu_keeps_the_share_that_was_measured():
    assert memory.pool_share(H100, num_gpus=1, num_programs=35) == 0.95


def test_two_gpus_leave_room_for_what_they_need_outside_the_pool():
    """Two H100s with 8B's shape used 4,378 MiB outside; with 0.95 they ran out of memory."""
    share = memory.pool_share(H100, num_gpus=2, num_programs=35)
    outside = (1 - share) * H100
    assert outside > 4_378 * MIB + GIB
    assert share > 0.9, "and most of the card is still the pool's"


@pytest.mark.parametrize("total", [81_559, 23_028, 15_360], ids=["H100", "A10G", "T4"])
@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("programs", [4, 34, 120])
def test_the_pool_leaves_room_for_what_lives_outside(total, gpus, programs):
    share = memory.pool_share(total * MIB, gpus, programs)
    outside = (1 - share) * total
    assert outside >= 0.7 * 1024, "the context and the programs of one GPU"
    if gpus > 1:
        assert outside >= 3.4 * 1024 + programs * 26, "NCCL and its programs"
    assert 0.1 <= share <= memory.pool_share(total * MIB, 1, programs) <= 0.95


def test_more_programs_need_more_room_outside():
    few, many = (memory.pool_share(H100, num_gpus=4, num_programs=n) for n in (3, 60))
    assert few > many


def test_a_small_card_leaves_room_too():
    share = memory.pool_share(16 * GIB, num_gpus=1, num_programs=35)
    assert (1 - share) * 16 * GIB == pytest.approx(1536 * MIB)
    assert memory.pool_share(2 * GIB, num_gpus=2, num_programs=35) == 0.1


def test_the_cache_is_sized_from_what_this_engine_uses():
    """nano-vLLM's formula counted other processes' memory, and gave negative numbers of blocks."""
    block = 2 * 2 * 2 * 16 * 4 * 256
    sizes, step, share = memory.Sizes(total=2 * GIB, pool=2 * GIB, in_use=0), 0, 0.9
    budget = memory.gpu_budget(sizes, step, share)
    assert budget.num_bytes == int(0.9 * 2 * GIB) - memory.MARGIN_BYTES
    blocks = memory.num_cache_blocks(budget, block)
    assert 0.9 * budget.num_bytes <= blocks * block <= budget.num_bytes
    half = sizes._replace(pool=GIB)
    for less in (
        (sizes._replace(in_use=GIB), step, share), (sizes, GIB, share), (sizes, step, 0.5),
        (half, step, share),
    ):  # fmt: skip
        smaller = memory.num_cache_blocks(memory.gpu_budget(*less), block)
        assert 0 < smaller < blocks


def test_the_share_is_of_the_card_and_the_pool_is_the_most():
    """As vLLM counts. Of the pool's share, 30B-A3B had a smaller cache than there."""
    sizes = memory.Sizes(total=80 * GIB, pool=76 * GIB, in_use=0)
    by_share = {share: memory.gpu_budget(sizes, 0, share).num_bytes for share in (0.9, 0.95, 1.0)}
    margin = memory.MARGIN_BYTES
    assert by_share == {0.9: 72 * GIB - margin, 0.95: 76 * GIB - margin, 1.0: 76 * GIB - margin}


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


def test_a_cache_on_a_cpu_is_no_larger_than_its_sequences():
    budget = memory.cpu_budget(64 * GIB)
    assert budget.num_bytes == 2 * GIB
    assert memory.num_cache_blocks(budget, MIB, most=24) == 24


def test_no_room_is_an_error_with_the_numbers():
    budget = memory.gpu_budget(memory.Sizes(GIB, GIB, 700 * MIB), step=0, utilization=0.9)
    with pytest.raises(ValueError, match=r"0.9 x 1024 MiB,.* 700 .* a block takes 1.00 MiB.*Raise"):
        memory.num_cache_blocks(budget, MIB)


@pytest.mark.parametrize(
    "said",
    ["RESOURCE_EXHAUSTED: failed to allocate 64B", "INTERNAL: Failed to allocate Scratch 1 64B"],
)
def test_an_allocation_that_fails_becomes_an_error_with_numbers_and_remedy(said):
    """In JAX's pool, and outside of it, where XLA's all-reduces have their buffers."""
    with (
        pytest.raises(MemoryError, match=rf"no memory left: {said}\. device 0.*lower gpu_"),
        memory.memory_errors(lambda: "device 0: full"),
    ):
        raise jax.errors.JaxRuntimeError(f"{said}\nmore")


def test_other_errors_of_jax_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.memory_errors(str):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_device_that_never_answers_is_an_error_in_time(monkeypatch):
    ended = []
    monkeypatch.setattr(memory, "DEADLINE_S", 0.2)
    monkeypatch.setattr(memory.atexit, "register", lambda *args: ended.append(args))
    stuck = threading.Event()
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"the first run .* GPU 1: 3 MiB.*MEM_FRACTION"):
        memory.finish_in_time(stuck.wait, "the first run of a step", lambda: "GPU 1: 3 MiB free")
    assert time.perf_counter() - began < 5
    assert ended == [(memory.os._exit, 1)], "the process can end, too"
    stuck.set()


def test_what_fails_in_time_fails_with_its_own_error():
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        memory.finish_in_time(fail, "", str)
    memory.finish_in_time(lambda: None, "", str)


def test_memory_in_words():
    pools = [{"bytes_in_use": 5 * MIB, "bytes_limit": 7 * MIB}, None, {"bytes_in_use": 1}]
    said = memory.describe(pools, [GpuMemory(3 * MIB, 9 * MIB), GpuMemory(2 * MIB, 8 * MIB)])
    assert said == (
        "device 0: 5 of 7 MiB of JAX's pool in use, 3 of 9 MiB free outside; "
        "device 1: 2 of 8 MiB free; device 2: its memory is unknown"
    )


def test_without_an_account_of_jax_the_drivers_figures_count():
    """The allocator "platform" keeps none, and `memory_stats()` is None."""
    pools = [{"bytes_limit": 70 * GIB, "bytes_in_use": GIB}, {"bytes_limit": 60, "bytes_in_use": 3}]
    gpus = [GpuMemory(70 * GIB, 80 * GIB), GpuMemory(60 * GIB, 79 * GIB)]
    assert memory.sizes(pools, gpus) == (79 * GIB, 60, GIB)
    assert memory.sizes(pools, []) == (60, 60, GIB)
    for less in (None, {"bytes_in_use": 3}):
        assert memory.sizes([pools[0], less], gpus) == (79 * GIB, 79 * GIB, 19 * GIB)
        with pytest.raises(ValueError, match="set num_kvcache_blocks"):
            memory.sizes([pools[0], less], [])


def test_what_was_freed_can_be_returned():
    memory.return_freed()


@pytest.mark.parametrize("enabled", [(0, 0), (0, 1)])
def test_a_driver_tells_who_else_uses_its_gpus(monkeypatch, enabled):
    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = len(enabled)
            return 0

        def cuDeviceGet(self, device, number):
            device._obj.value = number
            return 0

        def cuDeviceGetAttribute(self, value, attribute, device):
            assert attribute == 133
            value._obj.value = enabled[device.value]
            return 0

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: Driver())
    assert cuda_driver.shared_by_mps() == any(enabled)


def test_a_driver_that_fails_tells_of_no_gpus(monkeypatch):
    """Its error must not take the place of the one that is being told."""

    class Driver:
        def cuInit(self, flags):
            return 0

        def __getattr__(self, name):
            return lambda *args: 2

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: Driver())
    assert cuda_driver.total_memory() == cuda_driver.memory() == []
    assert not cuda_driver.shared_by_mps()


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", no_library)
    assert cuda_driver.total_memory() == cuda_driver.memory() == []
    assert not cuda_driver.shared_by_mps()
