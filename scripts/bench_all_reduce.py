"""Time the sums of tensor parallelism over the GPUs of this machine, beside XLA's.

    NCCL_NVLS_ENABLE=0 python scripts/bench_all_reduce.py

A decode step sums [rows, hidden size] bfloat16 over the GPUs twice a layer. Each case is a chain of
such sums in one compiled loop, each of which takes what the one before it gave. The engine's kernel
crosses NVLink once, where each GPU sends 2 (n - 1) times the bytes, or twice, with 4 (n - 1) / n:
half of what it sends are the calls' numbers.
"""

import functools
import statistics
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import (
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_all_reduce_norm,
    supports_one_shot_norm,
)

MOST = 1 << 20  # words of the largest sum, as in nanovllm_jax/layers/collectives.py
LOOPS, CALLS = 8, 16  # chains of so many sums in a loop
SHAPES = [
    (1, 1024), (1, 4096), (16, 1024), (16, 4096), (16, 5120), (32, 4096), (64, 4096), (128, 4096),
    (256, 4096), (256, 5120), (512, 4096),
]  # fmt: skip


def xla_sum(part, residual, weight, address):
    """The sum by XLA: an all-reduce, then the residual."""
    return (residual + lax.psum(part.astype(jnp.float32), "tensor")).astype(part.dtype)


def xla_bfloat16(part, residual, weight, address):
    """The same with a sum in bfloat16, as the engine has it for what does not fit its kernel."""
    return residual + lax.psum(part, "tensor")


def alone(part, residual, weight, address, *, crossings: int):
    """The engine's kernel."""
    return one_shot_all_reduce(part, residual, address, "tensor", MOST, crossings=crossings)


def norm(part, residual, weight, address, *, crossings: int):
    """The same with the RMSNorm that follows, in one kernel."""
    return one_shot_all_reduce_norm(
        part, residual, weight, jnp.int32(0), address, "tensor", MOST,
        eps=1e-6, crossings=crossings,
    )[1]  # fmt: skip


ADDS = {
    "once": functools.partial(alone, crossings=1),
    "twice": functools.partial(alone, crossings=2),
    "once, norm": functools.partial(norm, crossings=1),
    "twice, norm": functools.partial(norm, crossings=2),
    "XLA, f32": xla_sum,
    "XLA, bf16": xla_bfloat16,
}


def compile_chain(add, mesh: Mesh, shape: tuple[int, int]) -> jax.stages.Compiled:
    """A program of x [rows, hidden size] and the mailboxes' addresses, LOOPS x CALLS sums long."""

    def chain(x, address):
        part = x * (1 + lax.axis_index("tensor")).astype(x.dtype)  # each GPU's own
        weight = jnp.ones((1, shape[1]), x.dtype)

        def body(_, total):
            for _ in range(CALLS):  # which grow by the number of GPUs each
                total = add(total, part, weight, address)
            return total * float(mesh.size) ** -CALLS

        return lax.fori_loop(0, LOOPS, body, part)

    whole, parts = PartitionSpec(), PartitionSpec("tensor")
    run = jax.shard_map(chain, mesh=mesh, in_specs=(whole, parts), out_specs=parts, check_vma=False)
    layouts = NamedSharding(mesh, whole), NamedSharding(mesh, parts)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layouts[0])
    address = jax.ShapeDtypeStruct((mesh.size, 2), jnp.int32, sharding=layouts[1])
    return jax.jit(run).lower(x, address).compile()


def measure(program: jax.stages.Compiled, mesh: Mesh, shape, mailboxes, repeats: int) -> float:
    """The median seconds of one sum."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    seconds = []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        out = jax.block_until_ready(program(x, mailboxes.addresses))
        seconds.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise FloatingPointError(f"{shape}: the output is not finite")
    return statistics.median(seconds[2:]) / (LOOPS * CALLS)


def main():
    """Run the cases and print the table."""
    parser = ArgumentParser(description="Time the sums over GPUs.", allow_abbrev=False)
    parser.add_argument("--gpus", type=int, help="of how many (default: all)")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    devices = jax.devices()[: options.gpus]
    if devices[0].platform != "gpu" or len(devices) < 2:
        parser.exit(2, f"{parser.prog}: this needs two GPUs of one machine or more\n")
    mesh = Mesh(np.array(devices), ("tensor",))
    mailboxes = make_mailboxes(mesh, "tensor", MOST)
    print(f"{mesh.size} x {devices[0].device_kind}, jax {jax.__version__}; us a sum")
    print(f"{'rows':>5}{'hidden':>8}{'KiB':>7}" + "".join(f"{name:>13}" for name in ADDS))
    cases = [
        (shape, name)
        for shape in SHAPES
        for name in ADDS
        if "norm" not in name or supports_one_shot_norm(shape, jnp.bfloat16, MOST)
    ]
    with ThreadPoolExecutor() as pool:  # all before the first runs
        compiled = pool.map(lambda case: compile_chain(ADDS[case[1]], mesh, case[0]), cases)
        programs = dict(zip(cases, compiled, strict=True))
    for shape in SHAPES:
        print(f"{shape[0]:5}{shape[1]:8}{2 * shape[0] * shape[1] / 1024:7.0f}", end="")
        for name in ADDS:
            text = "-"
            if program := programs.get((shape, name)):
                seconds = measure(program, mesh, shape, mailboxes, options.repeats)
                text = f"{seconds * 1e6:.1f}"
            print(f"{text:>13}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
