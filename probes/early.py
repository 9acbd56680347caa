"""Decode steps of small batches whose kernels help each other, beside today's.

    python probes/early.py --batch 1 --variants all        # on an H100
    python probes/early.py --aot --batch 1 --variants all  # compile only, without a GPU

Variants change `nanovllm_jax.layers.backend.HELP`, nothing else. The program is the engine's own
`decode_steps` (K steps a call). Checks: tokens of 32 greedy and 32 sampled steps and every bit of
the cache after them are those of the step of today.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, nargs="+", default=[1])
parser.add_argument("--size", default="0.6B")
parser.add_argument("--variants", nargs="+", default=["all"])
parser.add_argument("--aot", action="store_true")
parser.add_argument("--context", type=int, default=400)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--budget", type=float, default=200, help="seconds; later variants are skipped")
A = parser.parse_args()

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.packed import Column
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.layers import backend
from nanovllm_jax.layers.backend import Help
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tools.shapes import SHAPES, write_config
from nanovllm_jax.weights import random_weights
from pallas_kernels.ahead import Chain

K = 8
BEGAN = time.time()
# What is fetched where. "near": by the kernel before; "far": two kernels ahead, so that the weights
# have arrived when their kernel starts; "attention": only where the memory idles longest.
NEAR = dict(qkv=("o",), attention=("gate_up",), o=("down",), gate_up=("qkv",))
FAR = dict(qkv=("o",), merge=("gate_up",), o=("down",), gate_up=("qkv",))
ALL = dict(attention=("o", "gate_up", "down"), gate_up=("qkv",))
MERGE = dict(merge=("o", "gate_up", "down"), down=("qkv",))
NEXT = dict(attention=("o",), merge=("gate_up",), o=("down",), down=("qkv",))
VARIANTS = {
    "today": Help(),
    "early": Help(Chain(early=True)),
    "near": Help(Chain(), **NEAR),
    "near-late": Help(Chain(late=True), **NEAR),
    "near-early": Help(Chain(early=True), **NEAR),
    "near-late-early": Help(Chain(early=True, late=True), **NEAR),
    "far-early": Help(Chain(early=True), **FAR),
    "far-late-early": Help(Chain(early=True, late=True), **FAR),
    "all-early": Help(Chain(early=True), **ALL),
    "all-late-early": Help(Chain(early=True, late=True), **ALL),
    "merge-early": Help(Chain(early=True), **MERGE),
    "rows": Help(rows=8),
    "rows-early": Help(Chain(early=True), rows=8),
    "rows-near-late-early": Help(Chain(early=True, late=True), rows=8, **NEAR),
    "rows-all-early": Help(Chain(early=True), rows=8, **ALL),
    "next-late-early": Help(Chain(early=True, late=True), **NEXT),
}  # fmt: skip
if A.variants == ["all"]:
    A.variants = [name for name in VARIANTS if not name.startswith("rows")]
CHOSEN = A.variants


def make_programs(devices=None):
    folder = tempfile.mkdtemp()
    write_config(SHAPES[A.size], Path(folder))
    config = EngineConfig.resolve(
        Path(folder), "gpu", load_format="dummy", max_num_seqs=32, max_model_len=1024, num_kvcache_blocks=BLOCKS,
        max_num_batched_tokens=1024, num_scheduler_steps=K,
    )  # fmt: skip
    sharding = make_sharding(config.mesh_shape, config.sharding_rules, devices)
    return Programs(config, sharding)


def compiled(variants, batch, devices=None):
    """The programs of some variants; they are traced one after the other, compiled side by side."""
    lowered = {}
    for variant in variants:
        backend.HELP = VARIANTS[variant]
        programs = make_programs(devices)
        spec = programs.decode_steps_spec(Bucket(0, batch), BLOCKS)
        lowered[variant] = spec.trace().lower()
    with ThreadPoolExecutor() as pool:
        jobs = {
            name: pool.submit(program.compile, programs.compiler_options)
            for name, program in lowered.items()
        }
        return {name: job.result() for name, job in jobs.items()}


BLOCKS = 4 * max(A.batch)


def rows_of(programs, batch, temperature):
    rows = np.zeros((33, programs.row_width), np.int32)
    use = rows[:batch]
    use[:, Column.SLOT] = np.arange(batch)
    use[:, Column.START] = A.context
    use[:, Column.LAST_TOKEN] = 1000 + np.arange(batch)
    use[:, Column.SEED_LOW] = 1 + np.arange(batch)
    use[:, Column.TEMPERATURE] = np.float32(temperature).view(np.int32)
    use[:, len(Column) :] = np.random.default_rng(0).permutation(BLOCKS)[: 4 * batch].reshape(-1, 4)
    return rows


def main():
    if A.aot:
        from nanovllm_jax.tools.h100_target import h100s

        devices = h100s(1)
        for batch in A.batch:
            t = time.time()
            for variant, program in compiled(CHOSEN, batch, devices).items():
                memory = program.memory_analysis()
                print(f"{variant} batch {batch}: temporaries "
                      f"{memory.temp_size_in_bytes / 1e6:.2f} MB", flush=True)  # fmt: skip
            print(f"compiled in {time.time() - t:.1f} s")
        return
    print(jax.devices()[0], jax.__version__, flush=True)
    base = make_programs()
    weights = jax.tree.leaves(random_weights(base.model_config, base.sharding, 0))
    # Norms of 1 and products of 0.02: scale the head up, so that tokens vary.
    noise = jax.jit(
        lambda key, x: (jax.random.normal(key, x.shape, jnp.float32) * 0.5).astype(x.dtype),
        donate_argnums=1,
    )

    def fresh(batch, temperature):
        state = base.make_state(BLOCKS, None)
        k, v = (noise(jax.random.key(i), x) for i, x in enumerate(state.cache))
        rows = jax.device_put(rows_of(base, batch, temperature), base.rows_sharding)
        return state._replace(cache=type(state.cache)(k, v), rows=rows)

    def call(program, state, packed):
        return program(weights, state, packed)

    for batch in A.batch:
        change = np.array([[i, K, -1] for i in range(batch)], np.int32).ravel()
        found, times, wrong = {}, {}, {}
        reference = None
        t = time.time()
        programs = compiled(CHOSEN, batch)
        print(f"batch {batch}: compiled {len(programs)} in {time.time() - t:.1f} s", flush=True)
        for variant, program in programs.items():
            if time.time() - BEGAN > A.budget * 0.8:
                print(f"batch {batch}: no time left for {variant}", flush=True)
                continue
            results = []
            for temperature in (0.0, 0.6):
                state = fresh(batch, temperature)
                tokens = []
                for _ in range(4):
                    state, out = call(program, state, change)
                    tokens.append(np.asarray(out))
                results.append((np.concatenate(tokens), *map(checksum, state.cache)))
                del state
            if reference is None:
                reference = results
            same = [
                all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))
                for x, y in zip(results, reference, strict=True)
            ]
            distinct = len(np.unique(results[0][0])), len(np.unique(results[1][0]))
            wrong[variant] = "equal" if all(same) else f"DIFFERS {same}"
            print(f"batch {batch} {variant}: {wrong[variant]}, distinct tokens {distinct}, equal "
                  f"tokens {[(a[0] == b[0]).mean() for a, b in zip(results, reference)]}",
                  flush=True)  # fmt: skip
            found[variant] = program
        for _ in range(A.rounds):
            for variant, program in found.items():
                if time.time() - BEGAN > A.budget:
                    break
                state = fresh(batch, 0.6)
                for _ in range(3):
                    state, out = call(program, state, change)
                out.block_until_ready()
                before = None
                calls = 20
                t = time.perf_counter()
                for _ in range(calls):
                    state, out = call(program, state, change)
                    if before is not None:
                        np.asarray(before)
                    before = out
                out.block_until_ready()
                times.setdefault(variant, []).append((time.perf_counter() - t) / calls / K * 1e3)
                del state
        print(f"\nbatch {batch}, context {A.context + 24} to {A.context + 184}, {A.size}: ms a step")
        for variant, values in times.items():
            gain = statistics.median(values) - statistics.median(times["today"])
            print(f"  {variant:18} {statistics.median(values):.4f} (least {min(values):.4f}, "
                  f"{gain:+.4f})  {wrong[variant]}", flush=True)  # fmt: skip


@jax.jit
def checksum(x):
    """Sums over parts of an array's bits, which differ where a bit does, nearly always."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    flat = bits.reshape(x.shape[0], -1)
    weights = jnp.arange(flat.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) | 1
    return (flat * weights).sum(axis=1, dtype=jnp.uint32)


main()
