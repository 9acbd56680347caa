"""Time the sums of tensor parallelism over all GPUs of this machine, beside XLA's.

    NCCL_NVLS_ENABLE=0 python scripts/bench_all_reduce.py

A decode step sums [rows, hidden size] bfloat16 over the GPUs twice a layer. Each case is a chain of
such sums in one compiled loop, each of which takes what the one before it gave. The limit is one
crossing of NVLink: (n - 1) times the bytes over its rate, below 1 us for all but the largest.
"""

import statistics
import time
from argparse import ArgumentParser

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import make_mailboxes, one_shot_all_reduce, one_shot_all_reduce_norm

MOST = 1 << 19  # words of the largest sum, as in nanovllm_jax/layers/collectives.py
LOOPS, CALLS = 8, 16  # chains of so many sums in a loop
SHAPES = [(1, 1024), (1, 4096), (16, 1024), (16, 4096), (16, 5120), (64, 4096), (128, 4096)]


def xla_sum(part, residual, weight, address):
    """The sum by XLA: an all-reduce, then the residual."""
    return (residual + lax.psum(part.astype(jnp.float32), "tensor")).astype(part.dtype)


def one_shot(part, residual, weight, address):
    """The engine's kernel."""
    return one_shot_all_reduce(part, residual, address, "tensor", MOST)


def one_shot_norm(part, residual, weight, address):
    """The same with the RMSNorm that follows, in one kernel."""
    options = {"eps": 1e-6, "max_words": MOST}
    return one_shot_all_reduce_norm(
        part, residual, weight, jnp.int32(0), address, "tensor", **options
    )[1]


def measure(add, mesh: Mesh, shape: tuple[int, int], mailboxes, repeats: int) -> float:
    """The median seconds of one sum of [rows, hidden size]."""

    def chain(x, address):
        part = x * (1 + lax.axis_index("tensor")).astype(x.dtype)  # each GPU's own
        weight = jnp.ones((1, shape[1]), x.dtype)

        def body(_, total):
            for _ in range(CALLS):  # which grow by the number of GPUs each
                total = add(total, part, weight, address)
            return total * float(mesh.size) ** -CALLS

        return lax.fori_loop(0, LOOPS, body, part)

    parts = PartitionSpec("tensor")
    run = jax.jit(
        jax.shard_map(
            chain, mesh=mesh, in_specs=(PartitionSpec(), parts), out_specs=parts, check_vma=False
        )
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    seconds = []
    for _ in range(repeats + 2):  # the first compiles, the second warms up
        start = time.perf_counter()
        out = jax.block_until_ready(run(x, mailboxes.addresses))
        seconds.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise FloatingPointError(f"{add.__name__} {shape}: the output is not finite")
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
    adds = (one_shot, one_shot_norm, xla_sum)
    print(f"{mesh.size} x {devices[0].device_kind}, jax {jax.__version__}; us a sum")
    print(f"{'rows':>5}{'hidden':>8}{'KiB':>7}" + "".join(f"{add.__name__:>15}" for add in adds))
    for shape in SHAPES:
        times = [measure(add, mesh, shape, mailboxes, options.repeats) * 1e6 for add in adds]
        kib = 2 * shape[0] * shape[1] / 1024
        print(f"{shape[0]:5}{shape[1]:8}{kib:7.0f}" + "".join(f"{t:15.1f}" for t in times))


if __name__ == "__main__":
    main()
