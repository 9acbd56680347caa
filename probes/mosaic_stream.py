"""A persistent Mosaic kernel that streams a decoder's weights: bandwidth, exchanges, and both.

    python probes/mosaic_stream.py            # on an H100
    python probes/mosaic_stream.py --aot      # compile only

Each of 128 programs owns rows of every product. One warpgroup copies its rows into a ring of 16 KiB
stages by TMA and never waits for others. The other multiplies by wgmma: a stage is 8 rows of 1,024
numbers, taken as [64, 128] as they lie in memory (row, eighth of its columns); x is [8, 128] by
eighths; of the product [64, 8] only the pairs of equal eighths count, and their sum over the
eighths is the output. (So up to 8 sequences would cost the same: x is then [8 * 8, 128].)
Outputs go to memory in bfloat16, a counter in memory tells that all have arrived (spins are
limited), and TMA brings them back as the next x. A layer has four products, shaped as 0.6B's.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
parser = argparse.ArgumentParser()
parser.add_argument("--aot", action="store_true")
parser.add_argument("--layers", type=int, default=28)
parser.add_argument("--budget", type=float, default=100)
A = parser.parse_args()
if A.aot:
    from nanovllm_jax.tools.h100_target import h100s

    DEVICES = h100s(1)
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm

G, CHUNK, SPINS = 128, 128, 1 << 20
# rows and columns of a layer's products, and how many of its outputs are the next product's input
PRODUCTS = ((4096, 1024, 2048), (1024, 2048, 1024), (6144, 1024, 3072), (1024, 3072, 1024))
SWIZZLED = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))


def arrive_and_wait(bar_ref, count, target):
    """All programs have come here: add 1 to a counter, wait until it has reached `target`."""

    @mgpu.inline_mgpu(arg_types=(mgpu.RefType(), mgpu.Layout.WG_SPLAT(()), ))
    def run(ctx, bar, target):
        i32 = ir.IntegerType.get_signless(32)
        ptr = utils.memref_ptr(bar)
        [want] = target.registers.flat
        utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        utils.warpgroup_barrier()
        utils.inline_ptx(
            "{ .reg .pred first, more; .reg .b32 t, seen, n; mov.u32 t, %tid.x; and.b32 t, t, 127;"
            "setp.ne.u32 first, t, 0; @first bra DONE;"
            "red.release.gpu.global.add.u32 [$0], 1; mov.u32 n, 0;"
            "AGAIN: ld.acquire.gpu.global.u32 seen, [$0]; sub.s32 seen, seen, $1;"
            f"add.u32 n, n, 1; setp.lt.s32 more, seen, 0; setp.lt.and.u32 more, n, {SPINS}, more;"
            "@more bra AGAIN; DONE: }".replace("DONE", "DONE_${:uid}").replace("AGAIN", "AGAIN_${:uid}"),
            ptr, want, has_side_effects=True,
        )  # fmt: skip
        utils.warpgroup_barrier()
        utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    run(bar_ref, target)


def publish(out_ref, sums, first):
    """Sum over the eighths of 8 rows, and store the rows as bfloat16 from element `first` on."""

    @mgpu.inline_mgpu(
        arg_types=(mgpu.RefType(), mgpu.Layout.WGMMA.reduce(1), mgpu.Layout.WG_SPLAT(()))
    )
    def run(ctx, out, sums, first):
        a, b = sums.registers.flat  # rows lane / 4 of the warp's 16, and 8 more
        values = []
        for value in (a, b):
            if isinstance(value.type, ir.VectorType):
                value = utils.vector.extract(
                    value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
                )
            for distance in (4, 8, 16):
                value = arith.addf(value, utils.shfl_bfly(value, distance))
            values.append(value)
        [start] = first.registers.flat
        utils.inline_ptx(
            "{ .reg .pred lead; .reg .b32 t, w, v; .reg .b64 o, p; mov.u32 t, %tid.x;"
            "and.b32 w, t, 31; setp.eq.u32 lead, w, 0; shr.u32 w, t, 5; and.b32 w, w, 3;"
            "shl.b32 w, w, 1; add.u32 w, w, $1; mul.wide.u32 o, w, 2; add.u64 p, $0, o;"
            "cvt.rn.bf16x2.f32 v, $3, $2; @lead st.global.b32 [p], v; }",
            utils.memref_ptr(out), start, values[0], values[1], has_side_effects=True,
        )  # fmt: skip


    run(out_ref, sums, first)


def kernel(*refs, stages, layers, stream, exchange, **smem):
    weights, x_ref, bar_ref, bufs = refs[:4], refs[4], refs[5], refs[6:]
    ring, x_smem, ready, free, got = (smem[n] for n in ("ring", "x_smem", "ready", "free", "got"))
    c, wg = lax.axis_index("c"), lax.axis_index("wg")
    per_layer = [(n // G // 8, k // 8 // CHUNK) for n, k, _ in PRODUCTS]  # groups of 8 rows, stages
    total = sum(g * s for g, s in per_layer)

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == 1)
    def _():
        if not stream:
            return

        def layer(l, _):
            step = l * total
            for (n, _, _), w, (groups, parts) in zip(PRODUCTS, weights, per_layer, strict=True):
                for g in range(groups):
                    row = (l * n + c * (groups * 8) + g * 8) * 8
                    for part in range(parts):
                        slot = slot_of(step)
                        pl.when(step >= stages)(lambda slot=slot: mgpu.barrier_wait(free.at[slot]))
                        mgpu.copy_gmem_to_smem(
                            w.at[pl.ds(row, 64), pl.ds(part * CHUNK, CHUNK)], ring.at[slot],
                            ready.at[slot],
                        )  # fmt: skip
                        step += 1

        lax.fori_loop(0, layers, layer, None)

    @pl.when(wg == 0)
    def _():
        rows = mgpu.broadcasted_iota(jnp.int32, (64, 8), 0, layout=mgpu.Layout.WGMMA)
        cols = mgpu.broadcasted_iota(jnp.int32, (64, 8), 1, layout=mgpu.Layout.WGMMA)
        own = (rows & 7) == cols
        mgpu.copy_gmem_to_smem(x_ref, x_smem.at[:, pl.ds(0, CHUNK)], got)
        mgpu.barrier_wait(got)

        def layer(l, _):
            step = l * total
            for p, ((n, k, used), (groups, parts)) in enumerate(
                zip(PRODUCTS, per_layer, strict=True)
            ):
                for g in range(groups):

                    def product(acc, step=step, parts=parts):
                        for part in range(parts):
                            slot = slot_of(step + part)
                            if stream:
                                mgpu.barrier_wait(ready.at[slot])
                            x = x_smem.at[:, pl.ds(part * CHUNK, CHUNK)].transpose((1, 0))
                            mgpu.wgmma(acc, ring.at[slot], x)
                        mgpu.wgmma_wait(0)
                        return acc[...]

                    sums = pl.run_scoped(product, mgpu.ACC((64, 8), jnp.float32))
                    if stream:
                        for part in range(parts):
                            slot = slot_of(step + part)
                            pl.when(step + part + stages < layers * total)(
                                lambda slot=slot: mgpu.barrier_arrive(free.at[slot])
                            )
                    step += parts
                    sums = jnp.where(own, sums, 0.0).sum(axis=1)
                    publish(bufs[p], sums, c * (groups * 8) + g * 8)
                if exchange:
                    arrive_and_wait(bar_ref, None, (l * 4 + p + 1) * G)
                    width = used // 8
                    for part in range(width // CHUNK):
                        cut = pl.ds(part * CHUNK, CHUNK)
                        mgpu.copy_gmem_to_smem(
                            bufs[p].at[pl.ds(0, 8), cut], x_smem.at[:, cut], got
                        )
                        mgpu.barrier_wait(got)

        lax.fori_loop(0, layers, layer, None)


def make(stages=10, layers=A.layers, stream=True, exchange=True):
    bf = jnp.bfloat16
    outs = [jax.ShapeDtypeStruct((n // (k2 // 8), k2 // 8), bf) for n, _, k2 in PRODUCTS]

    def run(w, x):
        bar = jax.new_ref(jnp.zeros((32,), jnp.int32))
        call = mgpu.kernel(
            functools.partial(
                kernel, stages=stages, layers=layers, stream=stream,
                exchange=exchange,
            ),
            out_type=tuple(outs), grid=(G,), grid_names=("c",), num_threads=2, thread_name="wg",
            scratch_types=dict(
                ring=mgpu.SMEM((stages, 64, CHUNK), bf, transforms=SWIZZLED),
                x_smem=mgpu.SMEM((8, 384), bf, transforms=SWIZZLED),
                ready=mgpu.Barrier(num_barriers=stages),
                free=mgpu.Barrier(num_barriers=stages),
                got=mgpu.Barrier(),
            ),
            compiler_params=mgpu.CompilerParams(
                approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
            ),
        )  # fmt: skip
        return call(*w, x.reshape(8, 128), bar)

    return run


VARIANTS = {
    "stream + exchange": {},
    "stream alone": dict(exchange=False),
    "exchange alone": dict(stream=False),
    "stream + exchange, 4 stages": dict(stages=4),
    "stream + exchange, 3 stages": dict(stages=3),
    "stream alone, 4 stages": dict(stages=4, exchange=False),
    "stream alone, 3 stages": dict(stages=3, exchange=False),
}


def shapes(layers):
    return [(layers * n * 8, k // 8) for n, k, _ in PRODUCTS]


def reference(w, x, layers):
    """In float32, rounded to bfloat16 where the kernel does."""
    for l in range(layers):
        for (n, k, used), m in zip(PRODUCTS, w, strict=True):
            m = m.reshape(layers, n, k)[l].astype(jnp.float32)
            x = jnp.dot(m, x.astype(jnp.float32)[:k], precision="highest").astype(jnp.bfloat16)[:used]
    return x


def main():
    if A.aot:
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from jax._src.mesh import AbstractDevice

        layout = NamedSharding(Mesh(np.array(DEVICES), ("x",)), PartitionSpec())
        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
        mesh = jax.sharding.AbstractMesh(
            (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
        )
        for name, options in list(VARIANTS.items())[: 3]:
            t = time.time()
            w = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=layout) for s in shapes(A.layers)]
            x = jax.ShapeDtypeStruct((1024,), jnp.bfloat16, sharding=layout)
            with jax.sharding.use_abstract_mesh(mesh):
                jax.jit(make(**options)).lower(w, x).compile()
            print(f"{name}: compiled in {time.time() - t:.1f} s", flush=True)
        return
    began = time.time()
    print(jax.devices()[0], jax.__version__, flush=True)
    key = jax.random.key(0)
    scale = [k**-0.5 for _, k, _ in PRODUCTS]
    w = [
        jax.jit(lambda k, s=s, f=f: jax.random.normal(k, s, jnp.bfloat16) * jnp.bfloat16(f),
                static_argnums=())(jax.random.fold_in(key, i))
        for i, (s, f) in enumerate(zip(shapes(A.layers), scale, strict=True))
    ]  # fmt: skip
    x = jax.random.normal(jax.random.key(9), (1024,), jnp.bfloat16)
    size = sum(a.size * 2 for a in w)
    # few layers: rounding differences double with each
    few = 3
    part = [a[: a.shape[0] // A.layers * few] for a in w]
    got = np.asarray(jax.jit(make(layers=few))(part, x)[3].reshape(-1), np.float32)
    want = np.asarray(jax.jit(reference, static_argnums=2)(part, x, few), np.float32)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"{few} layers: relative error {error:.2e} (bfloat16 between products: some 1e-2)",
          flush=True)  # fmt: skip
    for name, options in VARIANTS.items():
        if time.time() - began > A.budget:
            print("no time left for", name)
            continue
        f = jax.jit(make(**options))
        jax.block_until_ready(f(w, x))
        times = []
        for _ in range(7):
            t = time.perf_counter()
            for _ in range(20):
                y = f(w, x)
            jax.block_until_ready(y)
            times.append((time.perf_counter() - t) / 20)
        t = statistics.median(times)
        print(f"{name:30} {t * 1e3:.4f} ms, {size / t / 1e12:.2f} TB/s of {size / 1e9:.2f} GB, "
              f"{t / A.layers * 1e6:.2f} us a layer", flush=True)  # fmt: skip


main()
