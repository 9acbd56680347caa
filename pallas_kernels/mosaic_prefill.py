"""Paged prefill with Hopper's own instructions: the TMA unit copies, warpgroups multiply.

It is written for Pallas's Mosaic GPU backend and runs on sm_90 only. `paged_prefill` calls it and
tells what it computes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels._common import LOG2_E, MASKED, cdiv
from pallas_kernels._compat import mosaic_interpreter, store_unoptimized

# Rows that one warpgroup multiplies at a time: 64 tokens of one query head.
ROWS = 64
# Warpgroups of a program that compute; one more issues the copies.
COMPUTE_WARPGROUPS = 2
# Positions per block of K and V, and blocks of each in shared memory: with 128 and 2, four blocks
# of 32 KiB take 128 of its 227 KiB.
BLOCK_N = 128
STAGES = 2
# Programs of a launch: one per multiprocessor of an H100 or H200 (SXM). More would queue.
PROGRAMS = 132
# Rounds of programs among whose tiles the longest go first; see `_schedule`.
SORTED_ROUNDS = 4
# Windows that `_schedule` sorts by: a key has 11 bits for a window, one of them for no tile.
MOST_WINDOWS = 2**11 - 1
# Rows of Q and of the output at whose multiples TMA copies may start.
ALIGNMENT = 8
# Registers per thread. 2 * 128 * 232 + 128 * 40 are the 168 * 384 that such a program starts with.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40

Ref = Any  # a reference inside a kernel; Pallas has no public type for it


def supports_mosaic_prefill(dtype: DTypeLike, cache_dtype: DTypeLike, head_dim: int) -> bool:
    """Whether `paged_prefill` takes such queries and caches with implementation "mosaic"."""
    bfloat16 = jnp.dtype(dtype) == jnp.dtype(cache_dtype) == jnp.bfloat16
    return bfloat16 and head_dim in (64, 128)


def paged_prefill_mosaic(
    q: BFloat16[Array, "T N H"],
    k_cache: BFloat16[Array, "L P S K H"],
    v_cache: BFloat16[Array, "L P S K H"],
    block_tables: Int32[Array, "B W"],
    query_starts: Int32[Array, " B+1"],
    context_lens: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
    block_n: int = BLOCK_N,
    stages: int = STAGES,
    sorted_rounds: int = SORTED_ROUNDS,
    interpret: bool = False,
) -> BFloat16[Array, "T N H"]:
    """Compute `paged_prefill` on Hopper, for bfloat16 and heads of 64 or 128 elements.

    Args:
        scale: the positive factor of the scores.
        block_n: positions per block of K and V: 64 or 128.
        stages: blocks of K, and of V, that shared memory holds; at least 2.
        sorted_rounds: rounds of programs among whose tiles the longest go first.
        interpret: run in Mosaic's interpreter, which needs jax 0.11.

    Raises:
        ValueError: this kernel does not support the dtype, the head dim or the scale, or
            `interpret` is set with an older jax.

    This is FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608): warpgroups specialize in copying
    or in computing, and the softmax of one computing warpgroup runs under the products of the
    other. (They are left to alternate by themselves: made to take turns, they are a fifth slower.)
    """
    num_tokens, num_heads, head_dim = q.shape
    if not supports_mosaic_prefill(q.dtype, k_cache.dtype, head_dim):
        raise ValueError(
            'implementation "mosaic" supports bfloat16 queries and caches with a head_dim of 64 '
            f"or 128, not {q.dtype} queries, a {k_cache.dtype} cache and head_dim {head_dim}: use "
            '"triton"'
        )
    if scale <= 0:
        raise ValueError(f'implementation "mosaic" needs a positive scale, not {scale}')
    num_pages, page_size, num_kv_heads = k_cache.shape[1:4]
    group = num_heads // num_kv_heads
    # Both warpgroups of a program read the same K and V. If they can, they take two query heads of
    # the same tokens; else two tiles of tokens of the same head.
    heads_per_tile = 2 if group % 2 == 0 else 1
    tile_tokens = ROWS * COMPUTE_WARPGROUPS // heads_per_tile
    # TMA copies need a shape of whole tiles.
    padding = max(-num_tokens % ALIGNMENT, ROWS - num_tokens)
    q_padded = jnp.pad(q, ((0, padding), (0, 0), (0, 0))) if padding > 0 else q

    head_tiles = num_heads // heads_per_tile
    max_tiles = _max_tiles(num_tokens, context_lens.size, tile_tokens)
    programs = min(PROGRAMS, head_tiles * max_tiles)
    tiles, num_tiles = _schedule(
        query_starts,
        context_lens,
        num_tokens=num_tokens,
        tile_tokens=tile_tokens,
        block_n=block_n,
        window=max(1, programs * sorted_rounds // head_tiles, -(-max_tiles // MOST_WINDOWS)),
    )
    geometry = Geometry(
        programs=programs,
        group=group,
        heads_per_tile=heads_per_tile,
        head_tiles=head_tiles,
        num_pages=num_pages,
        page_size=page_size,
        block_n=block_n,
        stages=stages,
        scale=scale * LOG2_E,
        interpret=interpret,
    )
    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    copies = block_n // geometry.piece
    kv_block = mgpu.SMEM((stages, block_n, head_dim), q.dtype, transforms=swizzled)
    q_tiles = (2, COMPUTE_WARPGROUPS, ROWS, head_dim)
    out = mgpu.kernel(
        functools.partial(_kernel, geometry=geometry),
        out_type=jax.ShapeDtypeStruct(q_padded.shape, q.dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=mosaic_interpreter(interpret),
        kernel_name="paged_prefill_mosaic",
        scratch_types=dict(
            q_ring=mgpu.SMEM(q_tiles, q.dtype, transforms=swizzled),
            k_ring=kv_block,
            v_ring=kv_block,
            rows=mgpu.SMEM(q_tiles[1:], q.dtype),
            q_ready=mgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            q_free=mgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            k_ready=mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            k_free=mgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            v_ready=mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            v_free=mgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            cleared=mgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ),
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
    )(
        q_padded,
        k_cache.reshape(-1, num_kv_heads, head_dim),
        v_cache.reshape(-1, num_kv_heads, head_dim),
        block_tables,
        tiles,
        num_tiles,
        jnp.reshape(layer, 1),
    )
    return out[:num_tokens] if padding > 0 else out


# --- Schedule --------------------------------------------------------------------------------


def _max_tiles(num_tokens: int, batch: int, tile_tokens: int) -> int:
    """Return the most tiles that `num_tokens`, cut into `batch` sequences and padding, can need."""
    sequences = min(batch + 1, num_tokens)
    return (num_tokens + sequences * (ALIGNMENT - 1 + tile_tokens - 1)) // tile_tokens


def _schedule(
    query_starts, context_lens, *, num_tokens: int, tile_tokens: int, block_n: int, window: int
) -> tuple[Int32[Array, "tiles 6"], Int32[Array, " 1"]]:
    """Cut the packed queries into tiles, and put them in the order in which programs take them.

    A tile begins at a multiple of `ALIGNMENT` rows of the packed array, and so perhaps before its
    sequence: it owns the rows from `begin` to `end`. Each row of the result is (sequence, first
    row, begin, end, position of the first row, context length). The position may be negative if the
    tile begins before its sequence, and always is in a tile of padding: the rows after the last
    sequence form one more sequence, with context 0.

    Tiles are in the order of the packed array, so that programs that run at the same time share
    keys in the second-level cache; but within each `window` of tiles the longest ones come first.

    Returns the tiles, and how many of them exist: the rest, at the end, must be ignored.
    """
    batch = context_lens.size
    starts = query_starts.astype(jnp.int32)
    ends = jnp.append(starts[1:], num_tokens).astype(jnp.int32)  # [B+1]
    contexts = jnp.append(context_lens, 0).astype(jnp.int32)
    aligned = starts // ALIGNMENT * ALIGNMENT
    num_tiles = jnp.where(starts < ends, (ends - aligned + tile_tokens - 1) // tile_tokens, 0)
    tiles_end = jnp.cumsum(num_tiles)

    tile = jnp.arange(_max_tiles(num_tokens, batch, tile_tokens), dtype=jnp.int32)
    sequence = (tiles_end[None, :] <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, batch)
    tile_in_sequence = tile - (tiles_end - num_tiles)[sequence]
    first_row = aligned[sequence] + tile_in_sequence * tile_tokens
    begin = jnp.maximum(starts[sequence] - first_row, 0)
    end = jnp.minimum(ends[sequence] - first_row, tile_tokens)
    context = contexts[sequence]
    position = context - (ends[sequence] - first_row)
    columns = (jnp.minimum(sequence, batch - 1), first_row, begin, end, position, context)

    # One key holds the number of a tile's window and its blocks: it grows with the first and falls
    # with the second. Tiles that do not exist come last.
    blocks = (jnp.maximum(position + end, 0) + block_n - 1) // block_n
    window_of_tile = jnp.where(tile < tiles_end[-1], tile // window, MOST_WINDOWS)
    order = jnp.argsort(window_of_tile * 2**20 - blocks)
    return jnp.stack(columns, axis=1)[order], tiles_end[-1:]


# --- Kernel ----------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """The static numbers of one kernel."""

    programs: int
    group: int  # query heads per KV head
    heads_per_tile: int  # query heads that a program takes at a time: 1 or 2
    head_tiles: int  # items per tile of tokens
    num_pages: int
    page_size: int
    block_n: int  # positions of a block of K and V
    stages: int  # blocks in each of the rings of K and V
    scale: float  # factor of the scores, for a softmax in base 2
    interpret: bool

    @property
    def piece(self) -> int:
        """Positions that one copy of K or V takes: the most that never straddle two pages."""
        return math.gcd(self.page_size, self.block_n)

    @property
    def token_offset(self) -> int:
        """Rows from the first warpgroup's tokens to the second's."""
        return 0 if self.heads_per_tile > 1 else ROWS


class Operands(NamedTuple):
    """The kernel's arrays in the GPU's main memory; all but `out` are read."""

    q: Ref
    k: Ref  # the cache as [L * P * S, K, H]
    v: Ref
    block_tables: Ref
    tiles: Ref
    num_tiles: Ref
    layer: Ref
    out: Ref


class Scratch(NamedTuple):
    """A program's shared memory, and the barriers that guard it.

    K and V pass through rings of `stages` blocks that run on from item to item, Q through a ring of
    two tiles, which also stages the output. Each has two barriers: "ready" (the copies have landed)
    and "free" (both warpgroups are done).
    """

    q_ring: Ref
    k_ring: Ref
    v_ring: Ref
    rows: Ref  # stages the output of a tile whose rows are not all its own
    q_ready: Ref
    q_free: Ref
    k_ready: Ref
    k_free: Ref
    v_ready: Ref
    v_free: Ref
    cleared: Ref  # the values past the context's end have been zeroed


class Item(NamedTuple):
    """A tile of tokens and the first of `heads_per_tile` query heads; see `_schedule`."""

    sequence: Array
    head: Array
    first_row: Array
    begin: Array
    end: Array
    position: Array
    context: Array
    blocks: Array  # number of key blocks that the tile sees


def _kernel(*operands, geometry: Geometry, **scratch):
    """A persistent program: item after item, so that the copies for one start under another.

    Every warpgroup follows the same items and blocks.
    """
    refs, smem = Operands(*operands), Scratch(**scratch)
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    num_items = refs.num_tiles[0] * geometry.head_tiles
    full_rounds = lax.div(num_items, jnp.int32(geometry.programs))
    one_more = _nth_item(full_rounds, program, geometry) < num_items
    rounds = full_rounds + one_more.astype(jnp.int32)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        def compute(n, step):
            item = _read_item(n, program, refs, geometry)
            return _compute_item(n, step, item, warpgroup, refs, smem, geometry)

        lax.fori_loop(0, rounds, compute, jnp.int32(0))

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def copy(n, step):
            return _copy_item(n, step, _read_item(n, program, refs, geometry), refs, smem, geometry)

        blocks = lax.fori_loop(0, rounds, copy, jnp.int32(0))
        # Wait for the last blocks, which nobody reuses: every arrival must be waited for.
        _await_last(blocks, (smem.k_free, smem.v_free), geometry.stages)
        _await_last(rounds, (smem.q_free,), 2)


def _nth_item(n, program, geometry: Geometry):
    """The number of this program's n-th item.

    Every other round is dealt backwards: the program that had the longest item then gets the
    shortest.
    """
    backwards = lax.rem(n, jnp.int32(2)) == 1
    last = geometry.programs - 1
    return n * geometry.programs + jnp.where(backwards, last - program, program)


def _read_item(n, program, refs: Operands, geometry: Geometry) -> Item:
    number = _nth_item(n, program, geometry)
    tile = lax.div(number, jnp.int32(geometry.head_tiles))
    head = lax.rem(number, jnp.int32(geometry.head_tiles)) * geometry.heads_per_tile
    sequence, first_row, begin, end, position, context = (
        refs.tiles[tile, column] for column in range(6)
    )
    blocks = cdiv(jnp.maximum(position + end, 0), geometry.block_n)
    return Item(sequence, head, first_row, begin, end, position, context, blocks)


def _await_last(count, barriers, size: int) -> None:
    """Wait once more for each of the last blocks that passed through a ring of `size`."""

    def wait(i, _):
        for barrier in barriers:
            mgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(size))])

    lax.fori_loop(jnp.maximum(count - size, 0), count, wait, None)


def _copy_item(n, step, item: Item, refs: Operands, smem: Scratch, geometry: Geometry):
    """Copy Q, K and V of the n-th item; `step` counts the blocks before it."""
    q_slot = lax.rem(n, jnp.int32(2))
    pl.when(n >= 2)(lambda: mgpu.barrier_wait(smem.q_free.at[q_slot]))
    for w in range(COMPUTE_WARPGROUPS):
        rows = pl.ds(item.first_row + w * geometry.token_offset, ROWS)
        head = item.head + w if geometry.heads_per_tile > 1 else item.head
        target, ready = smem.q_ring.at[q_slot, w], smem.q_ready.at[q_slot]
        mgpu.copy_gmem_to_smem(refs.q.at[rows, head], target, ready)

    page_size, block_n, piece = geometry.page_size, geometry.block_n, geometry.piece
    kv_head = lax.div(item.head, jnp.int32(geometry.group))
    first_cache_row = refs.layer[0] * (geometry.num_pages * page_size)

    def copy_block(i, _):
        slot = lax.rem(step + i, jnp.int32(geometry.stages))
        reused = step + i >= geometry.stages
        sources = []
        for offset in range(0, block_n, piece):
            # Past the end any page will do, but the table's entries there are no pages.
            at = jnp.minimum(i * block_n + offset, item.position + item.end - 1)
            page = refs.block_tables[item.sequence, lax.div(at, jnp.int32(page_size))]
            row = lax.rem(i * block_n + offset, jnp.int32(page_size))
            sources.append(first_cache_row + page * page_size + row)
        for ref, ring, ready, free in (
            (refs.k, smem.k_ring, smem.k_ready, smem.k_free),
            (refs.v, smem.v_ring, smem.v_ready, smem.v_free),
        ):
            pl.when(reused)(lambda free=free: mgpu.barrier_wait(free.at[slot]))
            for j, source in enumerate(sources):
                target = ring.at[slot]
                if len(sources) > 1:
                    target = ring.at[slot, pl.ds(j * piece, piece)]
                rows = pl.ds(source, piece)
                mgpu.copy_gmem_to_smem(ref.at[rows, kv_head], target, ready.at[slot])

    lax.fori_loop(0, item.blocks, copy_block, None)
    return step + item.blocks


def _compute_item(
    n, step, item: Item, warpgroup, refs: Operands, smem: Scratch, geometry: Geometry
):
    """Compute one warpgroup's part of the n-th item; `step` counts the blocks before it."""
    block_n, scale = geometry.block_n, geometry.scale
    head_dim = refs.q.shape[2]
    q_slot = lax.rem(n, jnp.int32(2))
    head = item.head + warpgroup if geometry.heads_per_tile > 1 else item.head
    own_offset = warpgroup * geometry.token_offset
    q_tile = smem.q_ring.at[q_slot, warpgroup]
    mgpu.barrier_wait(smem.q_ready.at[q_slot])

    def block_step(i, state, masked: bool):
        acc, row_max, row_sum = state
        slot = lax.rem(step + i, jnp.int32(geometry.stages))
        mgpu.barrier_wait(smem.k_ready.at[slot])

        def multiply_keys(scores_ref):
            mgpu.wgmma(scores_ref, q_tile, smem.k_ring.at[slot].transpose((1, 0)))
            return scores_ref[...]

        scores = pl.run_scoped(
            multiply_keys, mgpu.WGMMAAccumulatorRef((ROWS, block_n), jnp.float32)
        )
        mgpu.barrier_arrive(smem.k_free.at[slot])
        if masked:
            row, column = (_iota(scores.shape, dimension) for dimension in range(2))
            seen = column - row <= item.position + own_offset - i * block_n
            scores = jnp.where(seen, scores, MASKED)
        new_max = jnp.maximum(row_max, scores.max(axis=1) * scale)
        rescale = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(scores * scale - _across(new_max, scores.shape))
        row_sum = row_sum * rescale + weights.sum(axis=1)
        acc = acc * _across(rescale, acc.shape)
        weights = weights.astype(refs.q.dtype)
        acc, new_max, row_sum, weights = lax.optimization_barrier((acc, new_max, row_sum, weights))
        mgpu.barrier_wait(smem.v_ready.at[slot])
        if masked:
            written = item.context - i * block_n
            _clear_unwritten(smem.v_ring.at[slot], written, warpgroup, smem.cleared)

        def multiply_values(acc_ref):
            mgpu.wgmma(acc_ref, weights, smem.v_ring.at[slot])

        if geometry.interpret:  # the interpreter has no product whose left side is in registers
            acc += jnp.dot(weights, smem.v_ring[slot], preferred_element_type=jnp.float32)
            mgpu.commit_smem()
        else:
            acc = pl.run_state(multiply_values)(mgpu.WGMMAAccumulatorRef.init(acc))
        mgpu.barrier_arrive(smem.v_free.at[slot])
        return acc, new_max, row_sum

    # Every own row sees the whole of the blocks up to the first own row's position.
    full_blocks = lax.div(jnp.maximum(item.position + item.begin + 1, 0), jnp.int32(block_n))
    full_blocks = jnp.minimum(full_blocks, item.blocks)
    layout = mgpu.Layout.WGMMA
    state = (
        mgpu.layout_cast(jnp.full((ROWS, head_dim), 0, jnp.float32), layout),
        mgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), layout.reduce(1)),
        mgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), layout.reduce(1)),
    )
    for first, last, masked in ((0, full_blocks, False), (full_blocks, item.blocks, True)):
        body = functools.partial(block_step, masked=masked)
        state = lax.fori_loop(first, last, body, state)

    acc, _, row_sum = state
    inverse = jnp.where(row_sum > 0, 1 / row_sum, jnp.zeros_like(row_sum))
    out = (acc * _across(inverse, acc.shape)).astype(refs.out.dtype)
    begin = jnp.maximum(item.begin - own_offset, 0)
    end = jnp.minimum(item.end - own_offset, ROWS)
    first_row = item.first_row + own_offset
    whole = (begin == 0) & (end == ROWS)

    @pl.when(whole)
    def _():
        q_tile[...] = out
        mgpu.commit_smem()
        mgpu.copy_smem_to_gmem(q_tile, refs.out.at[pl.ds(first_row, ROWS), head])

    @pl.when(jnp.logical_not(whole))
    def _():
        store_unoptimized(smem.rows.at[warpgroup], out)
        mgpu.commit_smem()

        def store_row(row, _):
            source = smem.rows.at[warpgroup, pl.ds(row, 1)]
            mgpu.copy_smem_to_gmem(source, refs.out.at[pl.ds(first_row + row, 1), head])

        lax.fori_loop(begin, end, store_row, None)

    mgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mgpu.barrier_arrive(smem.q_free.at[q_slot])
    return step + item.blocks


def _clear_unwritten(v_block, written, warpgroup, cleared) -> None:
    """Zero the values from position `written` of a block on; both warpgroups call this.

    No token has been written there, so the memory may hold NaN, and 0 * NaN is NaN. The first
    warpgroup zeroes for both, and the second waits for it.
    """

    @pl.when(written < v_block.shape[0])
    def _():
        @pl.when(warpgroup == 0)
        def _():
            for first in range(0, v_block.shape[0], ROWS):
                part = v_block.at[pl.ds(first, ROWS)]
                values = mgpu.layout_cast(part[...], mgpu.Layout.WGMMA)
                inside = _iota(part.shape, 0) < written - first
                part[...] = jnp.where(inside, values, jnp.zeros_like(values))
            mgpu.commit_smem()

        mgpu.barrier_arrive(cleared)
        mgpu.barrier_wait(cleared)


def _iota(shape, axis: int):
    return mgpu.broadcasted_iota(jnp.int32, shape, axis, layout=mgpu.Layout.WGMMA)


def _across(rows, shape):
    """Repeat the number of each row along the row."""
    return lax.broadcast_in_dim(rows, shape, [0])
