"""A persistent product on Hopper's tensor cores; its callers say what lies where, and what ends it.

It is written for Pallas's Mosaic GPU backend and runs on sm_90 only. Every program takes tile after
tile of 128 rows of x by 256 rows of a weight, two halves of 128 that may lie apart. What becomes of
the products, which stay in registers, is the caller's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels._compat import mosaic_interpreter

# Warpgroups of a program that compute; one more issues the copies.
COMPUTE_WARPGROUPS = 2
# Rows of x that one warpgroup multiplies, and rows of a program's tile.
ROWS = 64
TILE_ROWS = COMPUTE_WARPGROUPS * ROWS
# Rows of the weight in one half of a tile. Two halves are the 256 columns of the largest wgmma: the
# larger it is, the less often x is read from shared memory.
TILE_COLUMNS = 128
# Columns of x and of the weight that a step multiplies; in bfloat16, one swizzle of 128 bytes.
DEPTH = 64
# Steps in shared memory: four of 48 KiB and 32 KiB of output take 224 of its 227 KiB.
STAGES = 4
# Steps of a tile that the first warpgroup has done before the second begins. In step with each
# other, both would finish their tiles at the same time, and the tensor cores would then be idle:
# after the 16,384 clocks of a tile of Qwen3-0.6B, for the 2,048 of its exponentials and roots.
LEAD = 1
# Tiles of a cluster that a band has one below the other; see `_tile_at`.
BAND = 8
# Programs of a launch: one per multiprocessor of an H100 or H200 (SXM). More would queue.
PROGRAMS = 132
# Registers per thread. 2 * 128 * 232 + 128 * 40 are the 168 * 384 that such a program starts with.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40

Ref = Any  # a reference inside a kernel; Pallas has no public type for it


class Tile(NamedTuple):
    """Where a tile's weights and its output begin.

    The rows are multiples of 8, the tiling of shared memory. On a GPU, and only there, a copy from
    any other row begins at the multiple below.
    """

    weight_rows: tuple[Any, Any]  # of either half
    out_column: Any


class Plan(NamedTuple):
    """What a caller decides. The functions run inside the kernel and may read the table."""

    row_tiles: Callable[[Ref], Any]  # tiles of a cluster, one below the other
    column_tiles: int
    tile: Callable[[Ref, Any, Any], Tile]  # by the row tile of a program and the column tile
    finish: Callable[[Any], list]  # products [ROWS, 256] -> outputs [ROWS, 128] side by side


class Settings(NamedTuple):
    """The static numbers of a kernel.

    The programs of a cluster have the same columns of other rows, and each copies a part of the
    weight to all of them.
    """

    stages: int = STAGES
    lead: int = LEAD
    cluster: int = 1
    band: int = BAND

    def check(self, width: int) -> None:
        """Raise ValueError unless the settings fit each other and rows of this width."""
        if not 0 <= self.lead < self.stages or not 2 <= self.stages <= width // DEPTH:
            raise ValueError(
                f"there is no room for {self.stages} stages and a lead of {self.lead} steps"
            )


def persistent_product(
    x: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "N D"],
    table: Int32[Array, " n"],
    plan: Plan,
    settings: Settings,
    *,
    most_row_tiles: int,
    out_shape: tuple[int, int],
    interpret: bool,
    name: str,
) -> BFloat16[Array, "M F"]:
    """Multiply rows of x by rows of the weight, tile by tile as the plan says.

    A tile's outputs lie in the same rows as those of x.

    Args:
        table: what the plan's functions read: a layer's number, the experts of rows.
        most_row_tiles: as many as `plan.row_tiles` may return.
        interpret: run in Mosaic's interpreter, which needs jax 0.11.

    Rows of x past its end are read as zeros; rows past the end of the output are not written, nor
    are those of no tile.
    """
    cluster = settings.cluster
    clusters = min(PROGRAMS // cluster, most_row_tiles * plan.column_tiles)
    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    rings = functools.partial(mgpu.SMEM, dtype=x.dtype, transforms=swizzled)
    return mgpu.kernel(
        functools.partial(_kernel, plan=plan, settings=settings, clusters=clusters),
        out_type=jax.ShapeDtypeStruct(out_shape, x.dtype),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=mosaic_interpreter(interpret),
        kernel_name=name,
        scratch_types=dict(
            x_ring=rings((settings.stages, TILE_ROWS, DEPTH)),
            w_ring=rings((settings.stages, 2 * TILE_COLUMNS, DEPTH)),
            rows=rings((COMPUTE_WARPGROUPS, ROWS, TILE_COLUMNS)),
            ready=mgpu.Barrier(num_arrivals=3, num_barriers=settings.stages),
            free=mgpu.ClusterBarrier(
                collective_axes=("member",),
                num_arrivals=COMPUTE_WARPGROUPS,
                num_barriers=settings.stages,
            ),
            ahead=mgpu.Barrier(),
        ),
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
    )(x, weight, table)


class Operands(NamedTuple):
    """The kernel's arrays in the GPU's main memory; all but `out` are read."""

    x: Ref
    weight: Ref
    table: Ref
    out: Ref


class Scratch(NamedTuple):
    """A program's shared memory, and the barriers that guard it.

    x and the weight pass through a ring of `stages` steps that runs on from tile to tile. Each step
    has two barriers: "ready" (the program's three copies have landed) and "free" (all warpgroups of
    the cluster are done, since every member's copies write to all of them).
    """

    x_ring: Ref
    w_ring: Ref  # the rows of one half, then of the other
    rows: Ref  # 128 columns of a tile's output on their way to memory
    ready: Ref
    free: Ref
    ahead: Ref  # the first warpgroup has its lead


def _kernel(*operands, plan: Plan, settings: Settings, clusters: int, **scratch):
    """A persistent program: tile after tile, so that the copies for one start under another."""
    refs, smem = Operands(*operands), Scratch(**scratch)
    warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    member = lax.axis_index("member")
    steps = refs.x.shape[1] // DEPTH
    row_tiles = jnp.int32(plan.row_tiles(refs.table))
    rounds = lax.div(row_tiles * plan.column_tiles - cluster + (clusters - 1), jnp.int32(clusters))

    def each_tile(work):
        def body(n, _):
            number = cluster + n * clusters
            row, column = _tile_at(number, row_tiles, plan.column_tiles, settings.band)
            row_tile = row * settings.cluster + member
            tile = plan.tile(refs.table, row_tile, column)
            work(refs, smem, settings.stages, n * steps, row_tile * TILE_ROWS, tile)

        lax.fori_loop(0, rounds, body, None)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        each_tile(functools.partial(_compute_tile, warpgroup, plan.finish, settings.lead))
        mgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        each_tile(_copy_tile)
        # Wait for the last steps, which nobody reuses: a program must not end before all members
        # of its cluster have told it that they are done.
        total = rounds * steps

        def wait(step, _):
            mgpu.barrier_wait(smem.free.at[_slot(step, settings.stages)])

        lax.fori_loop(jnp.maximum(total - settings.stages, 0), total, wait, None)


def _tile_at(number, row_tiles, column_tiles: int, band: int):
    """Return the row tile of a cluster and the column tile that have this number.

    Tiles are numbered down the columns of one band of rows after the other. Clusters that run at
    the same time then have a block of tiles that is about as high as it is wide, which reads the
    least of x and of the weight.
    """
    tiles = jnp.int32(band * column_tiles)
    first = lax.div(number, tiles) * band
    height = jnp.minimum(band, row_tiles - first)
    within = lax.rem(number, tiles)
    return first + lax.rem(within, height), lax.div(within, height)


def _slot(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def _copy_tile(refs: Operands, smem: Scratch, stages: int, step, row, tile: Tile):
    """Copy x and the weight of the tile at `row`; `step` counts the steps before it."""

    def copy_step(k, _):
        slot = _slot(step + k, stages)
        columns = pl.ds(k * DEPTH, DEPTH)
        ready = smem.ready.at[slot]
        pl.when(step + k >= stages)(lambda: mgpu.barrier_wait(smem.free.at[slot]))
        x = refs.x.at[pl.ds(row, TILE_ROWS), columns]
        mgpu.copy_gmem_to_smem(x, smem.x_ring.at[slot], ready)
        for half, first in enumerate(tile.weight_rows):
            weight = refs.weight.at[pl.ds(first, TILE_COLUMNS), columns]
            target = smem.w_ring.at[slot, pl.ds(half * TILE_COLUMNS, TILE_COLUMNS)]
            mgpu.copy_gmem_to_smem(weight, target, ready, collective_axes="member")

    lax.fori_loop(0, refs.x.shape[1] // DEPTH, copy_step, None)


def _compute_tile(
    warpgroup, finish, lead: int, refs: Operands, smem: Scratch, stages: int, step, row, tile: Tile
):
    """Compute one warpgroup's rows of the tile at `row`; `step` counts the steps before it."""
    own = pl.ds(warpgroup * ROWS, ROWS)
    steps = refs.x.shape[1] // DEPTH

    def product(sums):
        def multiply(k):
            slot = _slot(step + k, stages)
            mgpu.barrier_wait(smem.ready.at[slot])
            weight = smem.w_ring.at[slot].transpose((1, 0))
            mgpu.wgmma(sums, smem.x_ring.at[slot, own], weight)

        def release(k):
            mgpu.barrier_arrive(smem.free.at[_slot(step + k, stages)])

        def multiply_and_release(k, _):
            multiply(k)
            mgpu.wgmma_wait(1)  # the step before is done, and this one is under way
            release(k - 1)

        # The first warpgroup cannot be a whole tile ahead, so it never arrives twice for one wait.
        if lead:
            pl.when(warpgroup == 1)(lambda: mgpu.barrier_wait(smem.ahead))
        multiply(0)
        lax.fori_loop(1, lead + 1, multiply_and_release, None)
        if lead:
            pl.when(warpgroup == 0)(lambda: mgpu.barrier_arrive(smem.ahead))
        lax.fori_loop(lead + 1, steps, multiply_and_release, None)
        done = sums[...]
        release(steps - 1)
        return done

    shape = (ROWS, 2 * TILE_COLUMNS)
    sums = pl.run_scoped(product, mgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    rows = smem.rows.at[warpgroup]
    out_rows = pl.ds(row + warpgroup * ROWS, ROWS)
    for i, outputs in enumerate(finish(sums)):
        mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there before has left
        rows[...] = outputs.astype(refs.out.dtype)
        mgpu.commit_smem()
        columns = pl.ds(tile.out_column + i * TILE_COLUMNS, TILE_COLUMNS)
        mgpu.copy_smem_to_gmem(rows, refs.out.at[out_rows, columns])
