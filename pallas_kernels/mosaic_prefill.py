"""Paged prefill with Hopper's own instructions: copies by the TMA unit, products by warpgroups.

Pallas's Mosaic GPU backend; sm_90 only. The contract is that of `paged_prefill`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels._common import LOG2_E, MASKED, cdiv
from pallas_kernels._compat import mosaic_interpreter, store_unoptimized

# One warpgroup multiplies 64 rows at a time. The rows are 64 tokens of one query head.
ROWS = 64
# Two warpgroups compute; a third one issues the copies.
COMPUTE_WARPGROUPS = 2
# Blocks of K and V in shared memory: with 128 positions each, 2 x 2 x 32 KiB of its 227.
BLOCK_N = 128
STAGES = 2
# Programs of a launch: one for each multiprocessor of an H100 or H200 (SXM). More would queue.
PROGRAMS = 132
# Tiles are sorted by their work among those of so many rounds of programs; see `_schedule`.
SORTED_ROUNDS = 4
# TMA copies start at rows of Q and of the output that are a multiple of this.
ALIGNMENT = 8
# Registers per thread: 2 * 128 * 232 + 128 * 40 are the 168 * 384 that such a program starts with.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40


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
    """`paged_prefill` on Hopper, for bfloat16 and heads of 64 or 128 elements.

    Args:
        scale: of the scores; positive.
        block_n: positions of a block of K and V: 64 or 128.
        stages: blocks of K, and of V, that shared memory holds; at least 2.
        sorted_rounds: rounds of programs among whose tiles the longest go first.
        interpret: run in Mosaic's interpreter; from jax 0.11 on.

    Raises:
        ValueError: a dtype, head dim or scale that this kernel does not support, or `interpret`
            with an older jax.

    FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608): warpgroups specialised in copying or
    computing, and the softmax of one computing warpgroup under the products of the other. (The two
    are left to alternate by themselves: made to take turns, they are a fifth slower.)
    """
    num_tokens, num_heads, head_dim = q.shape
    if {q.dtype, k_cache.dtype} != {jnp.dtype(jnp.bfloat16)} or head_dim not in (64, 128):
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
    max_items = head_tiles * _max_tiles(num_tokens, context_lens.size, tile_tokens)
    programs = min(PROGRAMS, max_items)
    tiles, num_tiles = _schedule(
        query_starts,
        context_lens,
        num_tokens=num_tokens,
        tile_tokens=tile_tokens,
        block_n=block_n,
        window=max(1, programs * sorted_rounds // head_tiles),
    )
    kernel = functools.partial(
        _kernel,
        programs=programs,
        group=group,
        heads_per_tile=heads_per_tile,
        head_tiles=head_tiles,
        num_pages=num_pages,
        page_size=page_size,
        scale=scale * LOG2_E,
        block_n=block_n,
        stages=stages,
        interpret=interpret,
    )
    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    copies = block_n // math.gcd(page_size, block_n)
    kv_block = mgpu.SMEM((stages, block_n, head_dim), q.dtype, transforms=swizzled)
    q_tiles = (2, COMPUTE_WARPGROUPS, ROWS, head_dim)
    out = mgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_padded.shape, q.dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=mosaic_interpreter(interpret),
        kernel_name="paged_prefill_mosaic",
        scratch_types=dict(
            q_smem=mgpu.SMEM(q_tiles, q.dtype, transforms=swizzled),
            k_smem=kv_block,
            v_smem=kv_block,
            rows_smem=mgpu.SMEM(q_tiles[1:], q.dtype),
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
    """The most tiles that any cut of `num_tokens` into `batch` sequences and padding can need."""
    sequences = min(batch + 1, num_tokens)
    return (num_tokens + sequences * (ALIGNMENT - 1 + tile_tokens - 1)) // tile_tokens


def _schedule(
    query_starts, context_lens, *, num_tokens: int, tile_tokens: int, block_n: int, window: int
) -> tuple[Int32[Array, "tiles 6"], Int32[Array, " 1"]]:
    """Cut the packed queries into tiles, and put them in the order in which programs take them.

    A tile begins at a multiple of `ALIGNMENT` rows of the packed array, and so perhaps before its
    sequence: its own rows are those from `begin` to `end`. Each row of the result is
    (sequence, first row, begin, end, position of the first row, context length). The position may
    be negative where the tile begins before its sequence, and is where the tile is padding: the
    rows after the last sequence form one more, of context 0.

    Tiles are in the order of the packed array, so that programs that run at a time share the keys
    in the second-level cache; but within each `window` of tiles the longest ones come first.

    Returns the tiles, and how many of them exist: the others, at the end, are to be ignored.
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
    blocks = (jnp.maximum(position + end, 0) + block_n - 1) // block_n
    columns = (jnp.minimum(sequence, batch - 1), first_row, begin, end, position, context)

    # The number of a window and the blocks of a tile in one key, which grows with the former and
    # falls with the latter. Tiles that do not exist come last.
    blocks = (jnp.maximum(position + end, 0) + block_n - 1) // block_n
    window_of_tile = jnp.where(tile < tiles_end[-1], tile // window, 2**11 - 1)
    order = jnp.argsort(window_of_tile * 2**20 - blocks)
    return jnp.stack(columns, axis=1)[order], tiles_end[-1:]


# --- Kernel ----------------------------------------------------------------------------------


def _kernel(
    q_ref, k_ref, v_ref, tables_ref, tiles_ref, num_tiles_ref, layer_ref, out_ref, *,
    q_smem, k_smem, v_smem, rows_smem,
    q_ready, q_free, k_ready, k_free, v_ready, v_free, cleared,
    programs: int, group: int, heads_per_tile: int, head_tiles: int, num_pages: int,
    page_size: int, scale: float, block_n: int, stages: int, interpret: bool,
):  # fmt: skip
    """A persistent program: item after item, so that the copies for one start under another.

    An item is a tile of tokens and `heads_per_tile` query heads. K and V pass through rings of
    `stages` blocks that run on from item to item, Q through a ring of two tiles, which also stages
    the output. Each has two barriers: "ready" (the copies have landed) and "free" (both warpgroups
    are done). Every warpgroup follows the same items and blocks.
    """
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    num_items = num_tiles_ref[0] * head_tiles
    head_dim = q_ref.shape[2]
    token_offset = 0 if heads_per_tile > 1 else ROWS  # of the second warpgroup's rows

    def nth_item(n):
        # Every other round is dealt backwards: who had the longest item then gets the shortest.
        backwards = lax.rem(n, jnp.int32(2)) == 1
        return n * programs + jnp.where(backwards, programs - 1 - program, program)

    full_rounds = lax.div(num_items, jnp.int32(programs))
    rounds = full_rounds + (nth_item(full_rounds) < num_items).astype(jnp.int32)

    def read_item(n):
        item = nth_item(n)
        tile = lax.div(item, jnp.int32(head_tiles))
        head = lax.rem(item, jnp.int32(head_tiles)) * heads_per_tile
        sequence, first_row, begin, end, position, context = (
            tiles_ref[tile, column] for column in range(6)
        )
        blocks = cdiv(jnp.maximum(position + end, 0), block_n)
        return sequence, head, first_row, begin, end, position, context, blocks

    def copy_item(n, step):
        """Copy Q, K and V of one item; `step` counts the blocks before it."""
        sequence, head, first_row, _, end, position, _, blocks = read_item(n)
        slot = lax.rem(n, jnp.int32(2))
        pl.when(n >= 2)(lambda: mgpu.barrier_wait(q_free.at[slot]))
        for w in range(COMPUTE_WARPGROUPS):
            rows = pl.ds(first_row + w * token_offset, ROWS)
            q_head = head + w if heads_per_tile > 1 else head
            mgpu.copy_gmem_to_smem(q_ref.at[rows, q_head], q_smem.at[slot, w], q_ready.at[slot])

        kv_head = lax.div(head, jnp.int32(group))
        first_cache_row = layer_ref[0] * (num_pages * page_size)
        piece = math.gcd(page_size, block_n)  # that lies in one page

        def copy_block(i, _):
            slot = lax.rem(step + i, jnp.int32(stages))
            reused = step + i >= stages
            sources = []
            for offset in range(0, block_n, piece):
                # Past the end any page will do, but the table's entries there are no pages.
                at = jnp.minimum(i * block_n + offset, position + end - 1)
                page = tables_ref[sequence, lax.div(at, jnp.int32(page_size))]
                row = lax.rem(i * block_n + offset, jnp.int32(page_size))
                sources.append(first_cache_row + page * page_size + row)
            for ref, smem, ready, free in (
                (k_ref, k_smem, k_ready, k_free),
                (v_ref, v_smem, v_ready, v_free),
            ):
                pl.when(reused)(lambda free=free: mgpu.barrier_wait(free.at[slot]))
                for j, source in enumerate(sources):
                    target = smem.at[slot]
                    if len(sources) > 1:
                        target = smem.at[slot, pl.ds(j * piece, piece)]
                    rows = pl.ds(source, piece)
                    mgpu.copy_gmem_to_smem(ref.at[rows, kv_head], target, ready.at[slot])

        lax.fori_loop(0, blocks, copy_block, None)
        return step + blocks

    def compute_item(n, step):
        """Attention of one item; `step` counts the blocks before it."""
        _, head, first_row, begin, end, position, context, blocks = read_item(n)
        q_slot = lax.rem(n, jnp.int32(2))
        q_head = head + warpgroup if heads_per_tile > 1 else head
        own_offset = warpgroup * token_offset
        q_tile = q_smem.at[q_slot, warpgroup]
        mgpu.barrier_wait(q_ready.at[q_slot])

        def block_step(i, state, masked: bool):
            acc, row_max, row_sum = state
            slot = lax.rem(step + i, jnp.int32(stages))
            mgpu.barrier_wait(k_ready.at[slot])

            def multiply_keys(scores_ref):
                mgpu.wgmma(scores_ref, q_tile, k_smem.at[slot].transpose((1, 0)))
                return scores_ref[...]

            scores = pl.run_scoped(
                multiply_keys, mgpu.WGMMAAccumulatorRef((ROWS, block_n), jnp.float32)
            )
            mgpu.barrier_arrive(k_free.at[slot])
            if masked:
                row, column = (
                    mgpu.broadcasted_iota(
                        jnp.int32, scores.shape, dimension, layout=mgpu.Layout.WGMMA
                    )
                    for dimension in range(2)
                )
                seen = column - row <= position + own_offset - i * block_n
                scores = jnp.where(seen, scores, MASKED)
            new_max = jnp.maximum(row_max, scores.max(axis=1) * scale)
            rescale = jnp.exp2(row_max - new_max)
            weights = jnp.exp2(scores * scale - _across(new_max, scores.shape))
            row_sum = row_sum * rescale + weights.sum(axis=1)
            acc = acc * _across(rescale, acc.shape)
            weights = weights.astype(q_ref.dtype)
            acc, new_max, row_sum, weights = lax.optimization_barrier(
                (acc, new_max, row_sum, weights)
            )
            mgpu.barrier_wait(v_ready.at[slot])
            if masked:
                clear_unwritten(v_smem.at[slot], context - i * block_n)

            def multiply_values(acc_ref):
                mgpu.wgmma(acc_ref, weights, v_smem.at[slot])

            if interpret:  # which knows no products of registers
                acc += jnp.dot(weights, v_smem[slot], preferred_element_type=jnp.float32)
                mgpu.commit_smem()
            else:
                acc = pl.run_state(multiply_values)(mgpu.WGMMAAccumulatorRef.init(acc))
            mgpu.barrier_arrive(v_free.at[slot])
            return acc, new_max, row_sum

        def clear_unwritten(v_block, written):
            """Zero the rows from `written` on: memory of no token may hold NaN, and 0 * NaN is NaN.

            The first warpgroup does it for both, and the second waits for it.
            """

            @pl.when(written < block_n)
            def _():
                @pl.when(warpgroup == 0)
                def _():
                    for first in range(0, block_n, ROWS):
                        part = v_block.at[pl.ds(first, ROWS)]
                        values = mgpu.layout_cast(part[...], mgpu.Layout.WGMMA)
                        row = mgpu.broadcasted_iota(
                            jnp.int32, part.shape, 0, layout=mgpu.Layout.WGMMA
                        )
                        part[...] = jnp.where(row < written - first, values, jnp.zeros_like(values))
                    mgpu.commit_smem()

                mgpu.barrier_arrive(cleared)
                mgpu.barrier_wait(cleared)

        # Every own row sees the whole of the blocks up to the first own row's position.
        full_blocks = lax.div(jnp.maximum(position + begin + 1, 0), jnp.int32(block_n))
        full_blocks = jnp.minimum(full_blocks, blocks)
        layout = mgpu.Layout.WGMMA
        state = (
            mgpu.layout_cast(jnp.full((ROWS, head_dim), 0, jnp.float32), layout),
            mgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), layout.reduce(1)),
            mgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), layout.reduce(1)),
        )
        state = lax.fori_loop(0, full_blocks, functools.partial(block_step, masked=False), state)
        state = lax.fori_loop(
            full_blocks, blocks, functools.partial(block_step, masked=True), state
        )

        acc, _, row_sum = state
        inverse = jnp.where(row_sum > 0, 1 / row_sum, jnp.zeros_like(row_sum))
        out = (acc * _across(inverse, acc.shape)).astype(out_ref.dtype)

        begin = jnp.maximum(begin - own_offset, 0)
        end = jnp.minimum(end - own_offset, ROWS)
        first_row = first_row + own_offset
        whole = (begin == 0) & (end == ROWS)

        @pl.when(whole)
        def _():
            q_tile[...] = out
            mgpu.commit_smem()
            mgpu.copy_smem_to_gmem(q_tile, out_ref.at[pl.ds(first_row, ROWS), q_head])

        @pl.when(jnp.logical_not(whole))
        def _():
            store_unoptimized(rows_smem.at[warpgroup], out)
            mgpu.commit_smem()

            def store_row(row, _):
                source = rows_smem.at[warpgroup, pl.ds(row, 1)]
                mgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(first_row + row, 1), q_head])

            lax.fori_loop(begin, end, store_row, None)

        mgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mgpu.barrier_arrive(q_free.at[q_slot])
        return step + blocks

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        lax.fori_loop(0, rounds, compute_item, jnp.int32(0))

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        mgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        blocks = lax.fori_loop(0, rounds, copy_item, jnp.int32(0))

        # Await the last of what nobody reuses, so that every barrier has been waited for.
        def await_free(i, _, barriers, size: int):
            for barrier in barriers:
                mgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(size))])

        def await_last(count, barriers, size: int):
            body = functools.partial(await_free, barriers=barriers, size=size)
            lax.fori_loop(jnp.maximum(count - size, 0), count, body, None)

        await_last(blocks, (k_free, v_free), stages)
        await_last(rounds, (q_free,), 2)


def _across(rows, shape):
    """One number per row, repeated along the row."""
    return lax.broadcast_in_dim(rows, shape, [0])
