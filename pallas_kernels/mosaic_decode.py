"""Paged decode for Hopper in Mosaic GPU, kept as insurance against the removal of Pallas's Triton.

No default chooses this kernel, since the Triton one is as fast: 2.63 TB/s against 2.59 on an H100.
But JAX has deprecated Triton in Pallas. Until it goes, `attention_backend="mosaic"` runs this, and
so do the tests.

A step of decoding reads the keys and values of every sequence once and does little else, so what
counts is to keep the memory busy from the first moment to the last:

- The positions of all sequences form one list of chunks, cut into equal parts, one per CTA. A part
  may begin and end within a sequence; a small second kernel merges the pieces of each sequence.
- In each CTA one warpgroup does nothing but copy chunks, with all KV heads of a position (one run
  of memory), into a ring of tiles in shared memory; it runs ahead across blocks and sequences.
- The other warpgroup computes. A wgmma has 64 rows, and the query heads of one sequence are at
  most 64, so they are the rows. For each KV head, the rows of other heads are zeroed in the left
  operand: all heads add to one accumulator, and one softmax serves them all.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from pallas_kernels._common import LOG2_E, MASKED, cdiv, load_rows, store_rows
from pallas_kernels._compat import mosaic_interpreter

# Rows of a wgmma, and so the most query heads.
_ROWS = 64
# Positions per tile and softmax step.
_BLOCK = 64
# Bytes of shared memory that one CTA has on an H100.
_SMEM_BYTES = 227 * 1024
# Pieces that the combine kernel takes at a time.
_COMBINE_PIECES = 16


class Tuning(NamedTuple):
    """Settings that change the speed and not the result.

    chunk: positions per copy, and to which the work of the CTAs is balanced; a power of two up to
        64. The greatest common divisor with the page size is used.
    tile_heads: KV heads per tile of the ring, and per copy; the greatest common divisor with the
        number of KV heads is used.
    num_slots: tiles in the ring, up to 32; None: as many as shared memory holds.
    num_ctas: CTAs of the grid. An H100 has 132 SMs, and each runs one CTA at a time.
    """

    chunk: int = 16
    tile_heads: int = 2
    num_slots: int | None = None
    num_ctas: int = 132


def supports_mosaic_decode(
    dtype: DTypeLike, cache_dtype: DTypeLike, num_heads: int, head_dim: int
) -> bool:
    """Whether `paged_decode` takes such queries and caches with implementation "mosaic"."""
    bfloat16 = jnp.dtype(dtype) == jnp.dtype(cache_dtype) == jnp.bfloat16
    heads = num_heads % 8 == 0 and 8 <= num_heads <= _ROWS
    return bfloat16 and heads and head_dim in (64, 128)


def paged_decode_mosaic(
    q, k_cache, v_cache, block_tables, context_lens, layer, *, scale, tuning=None, interpret=False
):
    """Compute `paged_decode` on Hopper; `interpret` runs it without a GPU, slowly.

    Raises:
        ValueError: the kernel does not support these shapes or dtypes.
    """
    if not supports_mosaic_decode(q.dtype, k_cache.dtype, *q.shape[1:]):
        raise ValueError(
            "implementation 'mosaic' supports bfloat16 queries and caches, head_dim 64 or 128, "
            f"and 8 to 64 query heads, a multiple of 8; q is {q.dtype}{q.shape} and the cache is "
            f"{k_cache.dtype}{k_cache.shape}: use 'triton'"
        )
    tuning = tuning or Tuning()
    chunk = math.gcd(k_cache.shape[2], tuning.chunk)
    plan = _plan(context_lens, chunk, tuning.num_ctas)
    parts, lse = _attend_pieces(
        q, k_cache, v_cache, block_tables, jnp.reshape(layer, 1).astype(jnp.int32), plan,
        scale=scale, chunk=chunk, tuning=tuning, interpret=interpret,
    )  # fmt: skip
    return _combine(parts, lse, plan, interpret=interpret)


# --- The division of the work ----------------------------------------------------------------


class _Plan(NamedTuple):
    """The division of the work among CTAs, which follows from the context lengths.

    The piece of sequence b that CTA c attends to has number b + c. No two pieces share a number,
    because a CTA begins where the one before it ended.
    """

    work: Int32[Array, "C 4"]  # a CTA's first and last sequence, first chunk, end of its chunks
    first_chunk: Int32[Array, " B"]  # a sequence's, in the list of all chunks
    context_lens: Int32[Array, " B"]
    pieces: Int32[Array, "B 2"]  # the number of a sequence's first piece, and how many it has


def _plan(context_lens, chunk: int, num_ctas: int) -> _Plan:
    chunks = cdiv(context_lens, chunk)
    ends = jnp.cumsum(chunks, dtype=jnp.int32)
    starts = ends - chunks
    total = jnp.sum(chunks, dtype=jnp.int32)
    share, rest = lax.div(total, jnp.int32(num_ctas)), lax.rem(total, jnp.int32(num_ctas))
    cta = jnp.arange(num_ctas + 1, dtype=jnp.int32)
    bounds = cta * share + jnp.minimum(cta, rest)

    def owner(chunk_ends, chunk_number):
        """Return the part that holds a chunk: its number is that of the parts that end before."""
        return (chunk_ends[None, :] <= chunk_number[:, None]).sum(axis=1, dtype=jnp.int32)

    begin, end = bounds[:-1], bounds[1:]
    work = jnp.stack([owner(ends, begin), owner(ends, end - 1), begin, end], axis=1)
    first_cta, last_cta = owner(end, starts), owner(end, ends - 1)
    count = jnp.where(chunks > 0, last_cta - first_cta + 1, 0)
    sequence = jnp.arange(context_lens.size, dtype=jnp.int32)
    pieces = jnp.stack([sequence + first_cta, count], axis=1)
    return _Plan(work, starts, context_lens, pieces)


# --- The attention kernel --------------------------------------------------------------------


def _attend_pieces(
    q, k_cache, v_cache, block_tables, layer, plan, *, scale, chunk, tuning, interpret
):
    """Attend to each piece on its own.

    Returns the means of the pieces' values, weighted by softmax, `[pieces, N, H]` in the dtype of
    q, and the base-2 logarithms of their softmax sums, `[pieces, 64]`, one per head.
    """
    batch, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads = k_cache.shape[1:4]
    group = num_heads // num_kv_heads
    tile_heads = math.gcd(num_kv_heads, tuning.tile_heads)
    num_tiles = num_kv_heads // tile_heads  # per block of keys, and as many per block of values
    tile_width = tile_heads * head_dim
    tile_bytes = _BLOCK * tile_width * q.dtype.itemsize
    own_bytes = _ROWS * head_dim * q.dtype.itemsize + 4096  # queries or output, and small things
    num_slots = tuning.num_slots or min(32, (_SMEM_BYTES - own_bytes) // tile_bytes)
    copies = _BLOCK // chunk  # per tile

    def next_slot(slot):
        return jnp.where(slot == num_slots - 1, 0, slot + 1)

    def kernel(
        q_ref, k_ref, v_ref, tables_ref, layer_ref, work_ref, starts_ref, lens_ref,
        parts_ref, lse_ref, q_smem, tiles, lse_smem, q_ready, full, empty, *staging,
    ):  # fmt: skip
        cta = lax.axis_index("cta")

        # Barriers. A tile is `full` after one arrival per copy; a copy that is not wanted arrives
        # all the same. It is `empty` once when the kernel starts and then whenever the computing
        # warpgroup has used it. Each side waits once per tile, so that their phases agree.

        def for_each_piece(body, state):
            """Update state = body(sequence, first position, end, state), piece by piece."""
            begin, end = work_ref[cta, 2], work_ref[cta, 3]

            def piece(b, state):
                start = starts_ref[b]
                first = jnp.maximum(begin - start, 0) * chunk
                last = jnp.minimum((end - start) * chunk, lens_ref[b])
                return body(b, first, jnp.maximum(first, last), state)

            return lax.fori_loop(work_ref[cta, 0], work_ref[cta, 1] + 1, piece, state)

        def copy_piece(b, first, end, slot):
            layer_start = layer_ref[0] * num_pages

            def copy_block(i, slot):
                rows, wanted = [], []
                for c in range(copies):
                    position = first + i * _BLOCK + c * chunk
                    wanted.append(position < end)
                    position = jnp.minimum(position, end - 1)  # the table ends with the context
                    page = tables_ref[b, lax.div(position, jnp.int32(page_size))]
                    offset = lax.rem(position, jnp.int32(page_size))
                    rows.append((layer_start + page) * page_size + offset)

                def copy_tile(ref, tile, slot):
                    mgpu.barrier_wait(empty.at[slot])
                    columns = pl.ds(tile * tile_width, tile_width)
                    for c in range(copies):

                        def copy(c=c):
                            mgpu.copy_gmem_to_smem(
                                ref.at[pl.ds(rows[c], chunk), columns],
                                tiles.at[slot, pl.ds(c * chunk, chunk)],
                                full.at[slot],
                            )

                        if c == 0:  # a block has at least one position
                            copy()
                        else:
                            pl.when(wanted[c])(copy)
                            pl.when(jnp.logical_not(wanted[c]))(
                                lambda: mgpu.barrier_arrive(full.at[slot])
                            )
                    return next_slot(slot)

                for ref in (k_ref, v_ref):
                    slot = lax.fori_loop(
                        0, num_tiles, lambda tile, slot, ref=ref: copy_tile(ref, tile, slot), slot
                    )
                return slot

            return lax.fori_loop(0, cdiv(end - first, _BLOCK), copy_block, slot)

        def multiply(acc, left, right):
            """Start acc += left @ right."""
            if staging:  # the interpreter takes operands from shared memory only
                place = staging[0].at[:, pl.ds(0, left.shape[1])]
                place[...] = left
                mgpu.commit_smem()
                left = place
            mgpu.wgmma(acc, left, right)

        def multiply_heads(acc, left, slot, right, prepare=lambda slot: None):
            """Add the sum over KV heads of (the head's rows of left) @ right(slot, column) to acc.

            The heads' tiles begin at `slot`; they are free afterwards.
            """

            @pl.loop(0, num_tiles)  # a loop, not unrolled: it halves the time to compile
            def _(tile):
                tile_slot = lax.rem(slot + tile, jnp.int32(num_slots))
                mgpu.barrier_wait(full.at[tile_slot])
                prepare(tile_slot)
                head = lax.div(_iota(left.shape, 0), jnp.int32(group)) - tile * tile_heads
                for h in range(tile_heads):
                    own = jnp.where(head == h, left, jnp.zeros_like(left))
                    multiply(acc, own, right(tile_slot, h * head_dim))
                mgpu.wgmma_wait(0)
                mgpu.barrier_arrive(empty.at[tile_slot])

        def key_columns(slot, column):
            return tiles.at[slot, :, pl.ds(column, head_dim)].transpose((1, 0))

        def value_columns(slot, column):
            return tiles.at[slot, :, pl.ds(column, head_dim)]

        def attend_piece(b, first, end, slot):
            mgpu.copy_gmem_to_smem(q_ref.at[b], q_smem.at[pl.ds(0, num_heads)], q_ready)
            mgpu.barrier_wait(q_ready)

            def attend_block(i, state):
                acc, row_max, row_sum, slot = state
                value_slot = lax.rem(slot + num_tiles, jnp.int32(num_slots))
                valid = end - (first + i * _BLOCK)

                # Loaded anew for each block: kept, they would take registers from the products.
                q_rows = mgpu.layout_cast(q_smem[...], mgpu.Layout.WGMMA)

                def score(acc):
                    multiply_heads(acc, q_rows, slot, key_columns)
                    return acc[...]

                scores = pl.run_scoped(
                    score, mgpu.WGMMAAccumulatorRef((_ROWS, _BLOCK), jnp.float32)
                )
                # Keys past the end are whatever the tile held before, perhaps NaN.
                scores = jnp.where(
                    _iota((_ROWS, _BLOCK), 1) < valid, scores * (scale * LOG2_E), MASKED
                )
                new_max = jnp.maximum(row_max, scores.max(axis=1))
                rescale = jnp.exp2(row_max - new_max)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new_max, scores.shape, [0]))
                row_sum = row_sum * rescale + weights.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])

                def clear_values(slot):
                    """Zero the values past the end: they may be NaN too, and 0 * NaN is NaN."""

                    @pl.when(valid < _BLOCK)
                    def _():
                        for h in range(tile_heads):
                            place = value_columns(slot, h * head_dim)
                            values = mgpu.layout_cast(place[...], mgpu.Layout.WGMMA)
                            inside = _iota(values.shape, 0) < valid
                            place[...] = jnp.where(inside, values, jnp.zeros_like(values))
                        mgpu.commit_smem()

                def add_values(acc):
                    left = weights.astype(q.dtype)
                    multiply_heads(acc, left, value_slot, value_columns, clear_values)

                if interpret:  # the interpreter has no accumulators with an initial value
                    new = mgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32)
                    acc = acc + pl.run_scoped(lambda new: (add_values(new), new[...])[1], new)
                else:
                    acc = pl.run_state(add_values)(mgpu.WGMMAAccumulatorRef.init(acc))
                slot = lax.rem(value_slot + num_tiles, jnp.int32(num_slots))
                return acc, new_max, row_sum, slot

            def rows(value):
                full = jnp.full((_ROWS,), value, jnp.float32)
                return mgpu.layout_cast(full, mgpu.Layout.WGMMA.reduce(1))

            acc = jnp.zeros((_ROWS, head_dim), jnp.float32)
            state = mgpu.layout_cast(acc, mgpu.Layout.WGMMA), rows(MASKED), rows(0.0), slot
            state = lax.fori_loop(0, cdiv(end - first, _BLOCK), attend_block, state)
            acc, row_max, row_sum, slot = state
            acc = acc / lax.broadcast_in_dim(row_sum, acc.shape, [0])
            q_smem[...] = acc.astype(q.dtype)  # the queries are no longer needed
            lse_smem[...] = row_max + jnp.log(row_sum) * LOG2_E
            mgpu.commit_smem()
            mgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, num_heads)], parts_ref.at[b + cta])
            mgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b + cta])
            mgpu.wait_smem_to_gmem(0)
            return slot

        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            for_each_piece(copy_piece, jnp.int32(0))
            for slot in range(num_slots):  # leave no arrival unobserved
                mgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup == 1)
        def _():
            for slot in range(num_slots):
                mgpu.barrier_arrive(empty.at[slot])
            for_each_piece(attend_piece, jnp.int32(0))

    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    operand = mgpu.SMEM((_ROWS, head_dim), q.dtype, transforms=swizzled)
    num_pieces = batch + tuning.num_ctas - 1
    return mgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_pieces, num_heads, head_dim), q.dtype),
            jax.ShapeDtypeStruct((num_pieces, _ROWS), jnp.float32),
        ),
        scratch_types=[
            operand,
            mgpu.SMEM((num_slots, _BLOCK, tile_width), q.dtype, transforms=swizzled),
            mgpu.SMEM((_ROWS,), jnp.float32),
            mgpu.Barrier(),
            mgpu.Barrier(num_arrivals=copies, num_barriers=num_slots),
            mgpu.Barrier(num_barriers=num_slots),
            *([mgpu.SMEM((_ROWS, 128), q.dtype, transforms=swizzled)] if interpret else []),
        ],
        grid=(tuning.num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        interpret=mosaic_interpreter(interpret),
    )(
        q,
        k_cache.reshape(-1, num_kv_heads * head_dim),
        v_cache.reshape(-1, num_kv_heads * head_dim),
        block_tables,
        layer,
        plan.work,
        plan.first_chunk,
        plan.context_lens,
    )


def _iota(shape, axis):
    return mgpu.broadcasted_iota(jnp.int32, shape, axis, layout=mgpu.Layout.WGMMA)


# --- The merging of pieces -------------------------------------------------------------------


def _combine_kernel(parts_ref, lse_ref, pieces_ref, out_ref, *, num_heads: int):
    """Run one program per sequence and query head: it averages pieces, weighted by exp2(lse)."""
    b, head = pl.program_id(0), pl.program_id(1)
    first, count = pieces_ref[b, 0], pieces_ref[b, 1]

    def step(i, state):
        acc, row_max, row_sum = state
        n = i * _COMBINE_PIECES + jnp.arange(_COMBINE_PIECES)
        valid, piece = n < count, first + n
        lse = plgpu.load(lse_ref.at[piece * _ROWS + head], mask=valid, other=MASKED)
        new_max = jnp.maximum(row_max, lse.max())
        rescale = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(lse - new_max)
        parts = load_rows(parts_ref, piece * num_heads + head, valid).astype(jnp.float32)
        acc = acc * rescale + (parts * weights[:, None]).sum(axis=0)
        return acc, new_max, row_sum * rescale + weights.sum()

    acc = jnp.zeros((parts_ref.shape[1],), jnp.float32)
    state = acc, jnp.float32(MASKED), jnp.float32(0.0)
    acc, _, row_sum = lax.fori_loop(0, cdiv(count, _COMBINE_PIECES), step, state)
    out = acc / jnp.where(row_sum > 0, row_sum, 1.0)
    store_rows(out_ref, b * num_heads + head + jnp.arange(1), out[None, :])


def _combine(parts, lse, plan, *, interpret):
    _, num_heads, head_dim = parts.shape
    batch = plan.context_lens.size
    out = pl.pallas_call(
        functools.partial(_combine_kernel, num_heads=num_heads),
        grid=(batch, num_heads),
        out_shape=jax.ShapeDtypeStruct((batch * num_heads, head_dim), parts.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="paged_decode_merge",
    )(parts.reshape(-1, head_dim), lse.reshape(-1), plan.pieces)
    return out.reshape(batch, num_heads, head_dim)
