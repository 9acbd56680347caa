"""What fits on a device: JAX's share of it, the KV cache's size, and errors that have the numbers.

A GPU's memory is divided so:

    | outside JAX's pool: context, kernels, CUDA graphs, NCCL | JAX's pool |
                                                              | weights | largest step | KV cache |
"""

import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.errors import JaxRuntimeError

from nanovllm_jax.engine.cuda_driver import GpuMemory

MIB = 1 << 20

MARGIN_BYTES = 512 * MIB  # Bytes held back in the pool for what the compiler does not report.
CPU_CACHE_SHARE = 1 / 32  # Share of the process's memory that a cache on a CPU may take.

# Bytes outside the pool, measured on H100s with jax 0.11: the context and all programs of one GPU
# took 0.7 GiB. Two GPUs took up to 3.4 GiB more for NCCL's channels, which come in steps of 0.7 to
# 0.9, and up to 30 MiB for each program that communicates (Qwen3-0.6B: 2.0 GiB, 8B: 3.8 beside the
# context).
ONE_GPU_BYTES = 1536 * MIB
CHANNEL_BYTES = 4096 * MIB
PROGRAM_BYTES = 32 * MIB

LARGEST_POOL_SHARE = 0.95
# What XLA says when an allocation fails: in JAX's pool, and outside of it.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Failed to allocate")
DEADLINE_S = 20.0  # Seconds after which a program that should take milliseconds is given up.


def pool_share(total_bytes: int, num_gpus: int, num_programs: int) -> float:
    """The share of a GPU that JAX's pool can take.

    Args:
        total_bytes: memory of the GPU.
        num_gpus: GPUs that compute together.
        num_programs: programs that are compiled for them.
    """
    outside = ONE_GPU_BYTES
    if num_gpus > 1:
        outside += CHANNEL_BYTES + num_programs * PROGRAM_BYTES
    return max(0.1, min(LARGEST_POOL_SHARE, 1 - outside / total_bytes))


Pool = Mapping[str, int] | None  # JAX's statistics of a device, if it has any


class Budget(NamedTuple):
    """Bytes for the KV cache, and how they were found."""

    num_bytes: int
    account: str


class Sizes(NamedTuple):
    """Bytes of the GPU that has the least of several."""

    total: int  # of the card
    pool: int  # that JAX may use for arrays
    in_use: int  # of the pool, on the GPU where it is the most


def gpu_budget(sizes: Sizes, step: int, utilization: float) -> Budget:
    """What is left for the cache on a GPU.

    Args:
        sizes: of the GPU; weights and other arrays are in use already.
        step: bytes that the largest step takes beside them.
        utilization: share of the card to use; the pool is the most.
    """
    limit = min(int(sizes.total * utilization), sizes.pool)
    left = limit - sizes.in_use - step - MARGIN_BYTES
    account = (
        f"{utilization} x {sizes.total // MIB} MiB, at most {sizes.pool // MIB} of JAX's pool - "
        f"weights and other arrays {sizes.in_use // MIB} - largest step {step // MIB} - margin "
        f"{MARGIN_BYTES // MIB} = {left // MIB} MiB"
    )
    return Budget(left, account)


def cpu_budget(memory: int) -> Budget:
    """What the cache may take of the memory that the process may use, in bytes."""
    left = int(memory * CPU_CACHE_SHARE)
    return Budget(left, f"{CPU_CACHE_SHARE:.1%} of {memory // MIB} MiB memory = {left // MIB} MiB")


def sizes(pools: Sequence[Pool], gpus: Sequence[GpuMemory]) -> Sizes:
    """What several GPUs have for arrays, and what is in use.

    The driver tells of the card, and JAX of its pool. Some of its allocators keep no account; then
    the driver's figures of the whole card count, with whatever else is on it. If the driver tells
    nothing, the pool is all there is.

    Args:
        pools, gpus: as for `describe`.

    Raises:
        ValueError: neither tells.
    """
    known = len(gpus) == len(pools)
    if all(pool and "bytes_limit" in pool for pool in pools):
        found = [(pool["bytes_limit"], pool["bytes_in_use"]) for pool in pools if pool]
    elif known:
        found = [(gpu.total, gpu.total - gpu.free) for gpu in gpus]
    else:
        raise ValueError(
            "the KV cache cannot be sized, because neither JAX nor the driver tells how much "
            "memory the devices have: set num_kvcache_blocks"
        )
    pool = min(limit for limit, _ in found)
    total = min(gpu.total for gpu in gpus) if known else pool
    return Sizes(total, pool, max(in_use for _, in_use in found))


def num_cache_blocks(budget: Budget, block_bytes: int, most: int | None = None) -> int:
    """How many blocks fit, and no more than `most`.

    Rounded down to five binary digits, so that the programs' shapes, and with them the compilation
    cache's entries, do not change with every few megabytes.

    Raises:
        ValueError: not even one does.
    """
    blocks = max(0, budget.num_bytes) // block_bytes
    if most is not None:
        blocks = min(blocks, most)
    if blocks < 1:
        raise ValueError(
            f"no memory for the KV cache. {budget.account}, and a block takes "
            f"{block_bytes / MIB:.2f} MiB. Raise gpu_memory_utilization, lower "
            f"max_num_batched_tokens or max_num_seqs, or set num_kvcache_blocks"
        )
    return blocks - blocks % (1 << max(0, blocks.bit_length() - 5))


@contextlib.contextmanager
def memory_errors(figures: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed inside into a MemoryError with the numbers and the remedy.

    Args:
        figures: describes the devices' memory; called if an allocation fails.
    """
    try:
        yield
    except JaxRuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        said = " ".join(str(error).split("\n")[0].split())
        raise MemoryError(
            f"a device has no memory left: {said}. {figures()}. Use more devices "
            f"(tensor_parallel_size), lower gpu_memory_utilization, num_kvcache_blocks, "
            f"max_num_batched_tokens or max_num_seqs, or give JAX's pool more (the environment "
            f"variable XLA_CLIENT_MEM_FRACTION, if it is set)"
        ) from error


def finish_in_time(run: Callable[[], None], what: str, figures: Callable[[], str]) -> None:
    """Call `run`, but wait no longer than DEADLINE_S for it.

    If one of several GPUs fails, for example because there is no memory left outside the pool, the
    others wait for it for ever inside a call that nothing can end. The process can still say so,
    and end: JAX's own clean-up, which would wait too, is then left out.

    Raises:
        RuntimeError: `run` has not returned in time; the message has the memory's numbers.
    """
    failure: list[BaseException] = []

    def body():
        try:
            run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    if thread.is_alive():
        atexit.register(os._exit, 1)
        raise RuntimeError(
            f"{what} has not ended within {DEADLINE_S:.0f} s: a GPU has failed, and others wait "
            f"for it. {figures()}. If little is left outside JAX's pool, give the pool less: set "
            f"the environment variable XLA_CLIENT_MEM_FRACTION, for example to 0.85"
        )
    if failure:
        raise failure[0]


def describe(pools: Sequence[Pool], gpus: Sequence[GpuMemory]) -> str:
    """The memory of each device in words.

    Args:
        pools: JAX's statistics of each device; None for a device that has none.
        gpus: what the driver says of each GPU; empty on a CPU.
    """
    parts = []
    for number, pool in enumerate(pools):
        said = []
        if pool and "bytes_limit" in pool:
            in_use, limit = pool["bytes_in_use"] // MIB, pool["bytes_limit"] // MIB
            said.append(f"{in_use} of {limit} MiB of JAX's pool in use")
        if number < len(gpus):
            gpu, where = gpus[number], " outside" if said else ""
            said.append(f"{gpu.free // MIB} of {gpu.total // MIB} MiB free{where}")
        parts.append(f"device {number}: {', '.join(said) or 'its memory is unknown'}")
    return "; ".join(parts)


def return_freed() -> None:
    """Give the system back what this process has freed, where the C library keeps it (glibc).

    A compiler frees most of what it takes, piece by piece in all threads. On two cores, compiling
    the demo model's 35 programs left 1,296 MiB resident without this, and 1,025 MiB with it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
