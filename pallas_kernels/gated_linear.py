"""One product computes gate and up of a gated MLP, and writes silu(gate) * up and nothing else.

It is written for Pallas's Mosaic GPU backend and runs on sm_90 only.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels._common import LOG2_E, mosaic_problem
from pallas_kernels._compat import mosaic_interpreter

# Warpgroups of a program that compute; one more issues the copies.
COMPUTE_WARPGROUPS = 2
# Rows of x that one warpgroup multiplies, and rows of a program's tile.
ROWS = 64
TILE_ROWS = COMPUTE_WARPGROUPS * ROWS
# Outputs of a tile. They take this many rows of gate and this many of up, which together are the
# 256 columns of the largest wgmma: the larger it is, the less often x is read from shared memory.
TILE_COLUMNS = 128
# Columns of x and of the weight that a step multiplies; in bfloat16, one swizzle of 128 bytes.
DEPTH = 64
# Steps in shared memory: four of 48 KiB and 32 KiB of output take 224 of its 227 KiB.
STAGES = 4
# Steps of a tile that the first warpgroup has done before the second begins. In step with each
# other, both would compute their gates at the same time, and the tensor cores would then be idle:
# after the 16,384 clocks of a tile of Qwen3-0.6B, for the 2,048 of its exponentials and roots.
LEAD = 1
# Programs of a cluster. They have the same columns of other rows, and each copies half of the
# weight to both. By itself, a program at the tensor cores' full rate would read 48 bytes per clock
# from the second-level cache; two read 32 each.
CLUSTER = 2
# Tiles of a cluster that a band has one below the other; see `_tile`.
BAND = 8
# Programs of a launch: one per multiprocessor of an H100 or H200 (SXM). More would queue.
PROGRAMS = 132
# Rows from which the kernel is taken. With fewer, a launch for Qwen3-0.6B would have hardly more
# tiles than programs, and nothing would hide their first copies and last gates.
FEWEST_ROWS = 1024
# Rows of x at whose multiples it may end: those of a TMA copy's tile.
ALIGNMENT = 8
# Registers per thread. 2 * 128 * 232 + 128 * 40 are the 168 * 384 that such a program starts with.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40

Ref = Any  # a reference inside a kernel; Pallas has no public type for it


def supports_gated_linear(
    num_rows: int, num_out: int, width: int, dtype: DTypeLike, device: Any
) -> bool:
    """Whether `gated_linear` takes such a layer, which has rows enough, on this device."""
    if not _fits(num_rows, num_out, width, dtype) or num_rows < FEWEST_ROWS:
        return False
    return device.platform == "gpu" and mosaic_problem(device) is None


def _fits(num_rows: int, num_out: int, width: int, dtype: DTypeLike) -> bool:
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and num_rows >= TILE_ROWS
        and width >= STAGES * DEPTH
        and num_rows % ALIGNMENT == num_out % TILE_COLUMNS == width % DEPTH == 0
    )


@functools.partial(jax.jit, static_argnames=("stages", "lead", "cluster", "band", "interpret"))
def gated_linear(
    x: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L 2 F D"],
    layer: Int32[Array, ""],
    *,
    stages: int = STAGES,
    lead: int = LEAD,
    cluster: int = CLUSTER,
    band: int = BAND,
    interpret: bool = False,
) -> BFloat16[Array, "T F"]:
    """Return silu(x @ weight[layer, 0].T) * (x @ weight[layer, 1].T) in one kernel on Hopper.

    XLA writes both products to memory and reads them back for the gate (SwiGLU, arXiv:2002.05202).
    Here they stay in registers: float32 until the result is rounded.

    Args:
        weight: gate and up of all layers, so that no slice must be copied for the kernel.
        layer: the layer whose weights are used.
        stages: steps of a tile's product that shared memory holds: 2 to D / 64.
        lead: steps of a tile that the first warpgroup has done before the second begins, fewer than
            `stages`; with 0, they do not wait for each other.
        cluster: programs that share the weight's copies.
        band: tiles of a cluster that a band has one below the other; see `_tile`.
        interpret: run in Mosaic's interpreter, which needs jax 0.11.

    Raises:
        ValueError: the shapes do not fit each other or the kernel, the settings do not fit each
            other, or `interpret` is set with an older jax.
    """
    (num_rows, width), num_out = x.shape, weight.shape[2]
    same = weight.dtype == x.dtype and weight.shape[1::2] == (2, width)
    if not same or not _fits(num_rows, num_out, width, x.dtype):
        raise ValueError(
            f"gated_linear takes bfloat16: at least {TILE_ROWS} rows in multiples of {ALIGNMENT}, "
            f"at least {STAGES * DEPTH} inputs in multiples of {DEPTH} and outputs in multiples of "
            f"{TILE_COLUMNS}, not {x.dtype}{x.shape} with {weight.dtype}{weight.shape}"
        )
    if not 0 <= lead < stages or not 2 <= stages <= width // DEPTH:
        raise ValueError(f"there is no room for {stages} stages and a lead of {lead} steps")
    row_tiles, column_tiles = pl.cdiv(num_rows, cluster * TILE_ROWS), num_out // TILE_COLUMNS
    geometry = Geometry(
        clusters=min(PROGRAMS // cluster, row_tiles * column_tiles),
        cluster=cluster,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        steps=width // DEPTH,
        stages=stages,
        lead=lead,
        band=band,
    )
    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    return mgpu.kernel(
        functools.partial(_kernel, geometry=geometry),
        out_type=jax.ShapeDtypeStruct((num_rows, num_out), x.dtype),
        grid=(geometry.clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=mosaic_interpreter(interpret),
        kernel_name="gated_linear",
        scratch_types=dict(
            x_ring=mgpu.SMEM((stages, TILE_ROWS, DEPTH), x.dtype, transforms=swizzled),
            w_ring=mgpu.SMEM((stages, 2 * TILE_COLUMNS, DEPTH), x.dtype, transforms=swizzled),
            rows=mgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, TILE_COLUMNS), x.dtype, transforms=swizzled),
            ready=mgpu.Barrier(num_arrivals=3, num_barriers=stages),
            free=mgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages
            ),
            ahead=mgpu.Barrier(),
        ),
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
    )(x, weight.reshape(-1, width), jnp.reshape(layer, 1))


class Geometry(NamedTuple):
    """The static numbers of one kernel."""

    clusters: int  # of the launch
    cluster: int  # programs in each
    row_tiles: int  # tiles of a cluster, one below the other
    column_tiles: int
    steps: int  # of a tile's product
    stages: int  # steps in shared memory
    lead: int  # steps of a tile that the first warpgroup does before the second begins
    band: int  # rows of tiles in a band


class Operands(NamedTuple):
    """The kernel's arrays in the GPU's main memory; all but `out` are read."""

    x: Ref
    weight: Ref  # as [L * 2 * F, D]
    layer: Ref
    out: Ref


class Scratch(NamedTuple):
    """A program's shared memory, and the barriers that guard it.

    x and the weight pass through a ring of `stages` steps that runs on from tile to tile. Each step
    has two barriers: "ready" (the program's three copies have landed) and "free" (all warpgroups of
    the cluster are done, since every member's copies write to all of them).
    """

    x_ring: Ref
    w_ring: Ref  # rows of gate, then of up
    rows: Ref  # the output of a tile on its way to memory
    ready: Ref
    free: Ref
    ahead: Ref  # the first warpgroup has its lead


def _kernel(*operands, geometry: Geometry, **scratch):
    """A persistent program: tile after tile, so that the copies for one start under another."""
    refs, smem = Operands(*operands), Scratch(**scratch)
    warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    clusters = jnp.int32(geometry.clusters)
    num_tiles = geometry.row_tiles * geometry.column_tiles
    rounds = lax.div(num_tiles - cluster + (clusters - 1), clusters)

    def each_tile(work):
        def body(n, _):
            work(n * geometry.steps, *_tile(cluster + n * clusters, geometry))

        lax.fori_loop(0, rounds, body, None)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        each_tile(functools.partial(_compute_tile, warpgroup, refs, smem, geometry))
        mgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        each_tile(functools.partial(_copy_tile, refs, smem, geometry))
        # Wait for the last steps, which nobody reuses: a program must not end before all members
        # of its cluster have told it that they are done.
        total = rounds * geometry.steps

        def wait(step, _):
            mgpu.barrier_wait(smem.free.at[_slot(step, geometry)])

        lax.fori_loop(jnp.maximum(total - geometry.stages, 0), total, wait, None)


def _tile(number, geometry: Geometry):
    """Return the first row of x and the first output of this program's part of a cluster's tile.

    Tiles are numbered down the columns of one band of rows after the other. Clusters that run at
    the same time then have a block of tiles that is about as high as it is wide, which reads the
    least of x and of the weight.
    """
    tiles = jnp.int32(geometry.band * geometry.column_tiles)
    first = lax.div(number, tiles) * geometry.band
    height = jnp.minimum(geometry.band, geometry.row_tiles - first)
    row = first + lax.rem(lax.rem(number, tiles), height)
    column = lax.div(lax.rem(number, tiles), height)
    member = lax.axis_index("member")
    return (row * geometry.cluster + member) * TILE_ROWS, column * TILE_COLUMNS


def _slot(step, geometry: Geometry):
    return lax.rem(step, jnp.int32(geometry.stages))


def _copy_tile(refs: Operands, smem: Scratch, geometry: Geometry, step, first_row, first_column):
    """Copy x and the weight of one tile; `step` counts the steps before it."""
    num_out = refs.out.shape[1]
    gate = refs.layer[0] * (2 * num_out) + first_column

    def copy_step(k, _):
        slot = _slot(step + k, geometry)
        columns = pl.ds(k * DEPTH, DEPTH)
        ready = smem.ready.at[slot]
        pl.when(step + k >= geometry.stages)(lambda: mgpu.barrier_wait(smem.free.at[slot]))
        # Rows of x past its end are read as zeros.
        x = refs.x.at[pl.ds(first_row, TILE_ROWS), columns]
        mgpu.copy_gmem_to_smem(x, smem.x_ring.at[slot], ready)
        for half in range(2):
            weight = refs.weight.at[pl.ds(gate + half * num_out, TILE_COLUMNS), columns]
            target = smem.w_ring.at[slot, pl.ds(half * TILE_COLUMNS, TILE_COLUMNS)]
            mgpu.copy_gmem_to_smem(weight, target, ready, collective_axes="member")

    lax.fori_loop(0, geometry.steps, copy_step, None)


def _compute_tile(
    warpgroup, refs: Operands, smem: Scratch, geometry: Geometry, step, first_row, first_column
):
    """Compute one warpgroup's rows of a tile; `step` counts the steps before it."""
    own = pl.ds(warpgroup * ROWS, ROWS)

    def product(sums):
        def multiply(k):
            slot = _slot(step + k, geometry)
            mgpu.barrier_wait(smem.ready.at[slot])
            weight = smem.w_ring.at[slot].transpose((1, 0))
            mgpu.wgmma(sums, smem.x_ring.at[slot, own], weight)

        def release(k):
            mgpu.barrier_arrive(smem.free.at[_slot(step + k, geometry)])

        def multiply_and_release(k, _):
            multiply(k)
            mgpu.wgmma_wait(1)  # the step before is done, and this one is under way
            release(k - 1)

        # The first warpgroup cannot be a whole tile ahead, so it never arrives twice for one wait.
        if geometry.lead:
            pl.when(warpgroup == 1)(lambda: mgpu.barrier_wait(smem.ahead))
        multiply(0)
        lax.fori_loop(1, geometry.lead + 1, multiply_and_release, None)
        if geometry.lead:
            pl.when(warpgroup == 0)(lambda: mgpu.barrier_arrive(smem.ahead))
        lax.fori_loop(geometry.lead + 1, geometry.steps, multiply_and_release, None)
        done = sums[...]
        release(geometry.steps - 1)
        return done

    shape = (ROWS, 2 * TILE_COLUMNS)
    sums = pl.run_scoped(product, mgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    gate, up = sums[:, :TILE_COLUMNS], sums[:, TILE_COLUMNS:]
    # The approximate reciprocal root is right to about 22 bits, and its square far quicker than an
    # exact division. Where the exponential overflows, it is zero.
    root = lax.rsqrt(1 + jnp.exp2(gate * -LOG2_E))
    gated = (gate * up * (root * root)).astype(refs.out.dtype)

    rows = smem.rows.at[warpgroup]
    mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left it
    rows[...] = gated
    mgpu.commit_smem()
    # Rows past the end of the output are not written.
    target = pl.ds(first_row + warpgroup * ROWS, ROWS), pl.ds(first_column, TILE_COLUMNS)
    mgpu.copy_smem_to_gmem(rows, refs.out.at[target])
