"""Attention of one new token per sequence over its pages of the KV cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import (
    MASKED,
    Implementation,
    attend,
    cache_row,
    cdiv,
    check_cache,
    check_implementation,
    empty_attention,
    finish_attention,
    kv_block_size,
    load_rows,
    next_power_of_2,
    num_stages,
    store_rows,
    use_interpreter,
)
from pallas_kernels.mosaic_decode import paged_decode_mosaic

# An H100 has 132 multiprocessors; four programs for each keep its memory busy.
_TARGET_PROGRAMS = 4 * 132
_MAX_SPLITS = 32


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "interpret"))
def paged_decode(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "L P S K H"],
    v_cache: Float[Array, "L P S K H"],
    block_tables: Int32[Array, "B W"],
    context_lens: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
    implementation: Implementation,
    interpret: bool | None = None,
) -> Float[Array, "B N H"]:
    """Return softmax(scale * q k^T) v of each row over the pages of its sequence.

    The time of a row follows its own context length; the width of the block table costs nothing.

    Args:
        q: one query token per row; head n belongs to KV head n // (N/K).
        block_tables: page ids of each sequence in order. Entries past the context are never used.
        context_lens: positions to attend to, the newest (already in the cache) included; 0 marks
            a padding row, whose output is zeros.
        layer: the layer whose part of the caches is read.
        scale: of the scores, usually H**-0.5.
        interpret: run the kernels in Pallas's interpreter; None: where there is no GPU.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or shapes and dtypes that
            "mosaic" does not support (`check_mosaic_decode`).

    Paging is PagedAttention's (Kwon et al., 2023, arXiv:2309.06180). A small batch leaves most of
    a GPU idle, so there the context of each row is split as in Flash-Decoding (Dao et al., 2023):
    each part is attended to on its own, and a second kernel merges the parts.
    """
    check_implementation(implementation)
    check_cache(k_cache, v_cache, q.shape[1], q.shape[2], layer)
    if block_tables.ndim != 2 or not len(block_tables) == len(q) == context_lens.size:
        raise ValueError(
            f"q {q.shape}, block_tables {block_tables.shape} and context_lens "
            f"{context_lens.shape} are not [B, N, H], [B, W] and [B]"
        )
    operands = (q, k_cache, v_cache, block_tables, context_lens, layer)
    if implementation == "xla":
        return _paged_decode_xla(*operands, scale=scale)
    if implementation == "mosaic":
        return paged_decode_mosaic(*operands, scale=scale, interpret=use_interpreter(interpret))
    splits = _choose_splits(q.shape[0], k_cache, block_tables.shape[1])
    return _paged_decode_triton(
        *operands, scale=scale, num_splits=splits, interpret=use_interpreter(interpret)
    )


# --- XLA -------------------------------------------------------------------------------------


def _paged_decode_xla(q, k_cache, v_cache, block_tables, context_lens, layer, *, scale):
    """All sequences advance together, a page at a time, as far as the longest context."""
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    group = num_heads // num_kv_heads
    # attend() takes matrices: map it over the sequences, then over the KV heads.
    attend_heads = jax.vmap(functools.partial(attend, scale=scale), in_axes=(0, 1, 1, None, 0))
    attend_batch = jax.vmap(attend_heads)

    def page_step(i, state):
        first = i * page_size
        valid = first + jnp.arange(page_size) < context_lens[:, None]
        pages = jnp.where(first < context_lens, block_tables[:, i], 0)
        k, v = k_cache[layer, pages], v_cache[layer, pages]  # [B, S, K, H]
        v = jnp.where(valid[:, :, None, None], v, 0)
        mask = jnp.broadcast_to(valid[:, None, :], (batch, group, page_size))
        return attend_batch(q.reshape(batch, num_kv_heads, group, head_dim), k, v, mask, state)

    state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (batch, num_kv_heads, *x.shape)),
        empty_attention(group, head_dim),
    )
    state = lax.fori_loop(0, cdiv(context_lens.max(), page_size), page_step, state)
    # A padding row has seen masked positions only: scores all equal, values all zero.
    out = jax.vmap(jax.vmap(finish_attention))(state)
    return out.reshape(q.shape).astype(q.dtype)


# --- Triton ----------------------------------------------------------------------------------


def _choose_splits(batch: int, k_cache, table_width: int) -> int:
    """Into how many parts to cut every context: a power of two; 1 where the rows fill the GPU."""
    page_size, num_kv_heads = k_cache.shape[2:4]
    most_blocks = table_width * page_size // kv_block_size(page_size, k_cache.dtype)
    wanted = min(_TARGET_PROGRAMS // (batch * num_kv_heads), most_blocks, _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


def _decode_kernel(
    q_ref, k_ref, v_ref, tables_ref, lens_ref, layer_ref, out_ref, *lse_ref,
    cache_shape: tuple[int, ...], group: int, block_n: int, num_splits: int, scale: float,
):  # fmt: skip
    """One program per sequence, KV head and part of the context.

    With one part, `out_ref` is the output; with more, it has a row per query head and part, and
    `lse_ref` has the base-2 logarithm of each one's softmax denominator.
    """
    b, kv_head, split = (pl.program_id(axis) for axis in range(3))
    page_size, num_kv_heads = cache_shape[2:4]
    context, layer = lens_ref[b], layer_ref[0]

    blocks_per_split = cdiv(cdiv(context, block_n), num_splits)
    first_block = split * blocks_per_split
    end = jnp.minimum(context, (first_block + blocks_per_split) * block_n)

    # A matrix product needs 16 rows: the query heads that share this KV head, and padding.
    g = jnp.arange(max(16, next_power_of_2(group)))
    q_rows = (b * num_kv_heads + kv_head) * group + g
    q = load_rows(q_ref, q_rows, g < group)

    def block_step(i, state, last: bool):
        position = i * block_n
        page = tables_ref[b, lax.div(position, jnp.int32(page_size))]
        n = jnp.arange(block_n)
        offset = lax.rem(position, jnp.int32(page_size)) + n
        rows = cache_row(cache_shape, layer, page, offset, kv_head)
        valid = position + n < end if last else None
        k, v = load_rows(k_ref, rows, valid), load_rows(v_ref, rows, valid)
        mask = None if valid is None else jnp.broadcast_to(valid[None, :], (g.shape[0], block_n))
        return attend(q, k, v, mask, state, scale)

    full_blocks = lax.div(end, jnp.int32(block_n))  # only the last block needs masks
    state = empty_attention(*q.shape)
    state = lax.fori_loop(
        first_block, full_blocks, functools.partial(block_step, last=False), state
    )
    state = lax.fori_loop(
        jnp.maximum(first_block, full_blocks),
        cdiv(end, block_n),
        functools.partial(block_step, last=True),
        state,
    )
    out = finish_attention(state)
    if num_splits == 1:
        store_rows(out_ref, q_rows, out, g < group)
    else:
        _, row_max, row_sum = state
        lse = jnp.where(row_sum > 0, row_max + jnp.log2(row_sum), MASKED)
        store_rows(out_ref, q_rows * num_splits + split, out, g < group)
        plgpu.store(lse_ref[0].at[q_rows * num_splits + split], lse, mask=g < group)


def _combine_kernel(parts_ref, lse_ref, out_ref, *, num_splits: int):
    """One program per sequence and query head: the mean of its parts, weighted by exp2(lse)."""
    row = pl.program_id(0)
    split_rows = row * num_splits + jnp.arange(num_splits)
    lse = plgpu.load(lse_ref.at[split_rows])
    weights = jnp.exp2(lse - lse.max())
    parts = load_rows(parts_ref, split_rows)
    out = (parts * weights[:, None]).sum(axis=0) / weights.sum()
    store_rows(out_ref, row + jnp.arange(1), out[None, :])


def _paged_decode_triton(
    q, k_cache, v_cache, block_tables, context_lens, layer, *, scale, num_splits, interpret
):
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    rows = batch * num_heads
    block_n = kv_block_size(page_size, k_cache.dtype)
    kernel = functools.partial(
        _decode_kernel,
        cache_shape=k_cache.shape,
        group=num_heads // num_kv_heads,
        block_n=block_n,
        num_splits=num_splits,
        scale=scale,
    )
    out_shape = [jax.ShapeDtypeStruct((rows, head_dim), q.dtype)]
    if num_splits > 1:
        out_shape = [
            jax.ShapeDtypeStruct((rows * num_splits, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows * num_splits,), jnp.float32),
        ]
    outputs = pl.pallas_call(
        kernel,
        grid=(batch, num_kv_heads, num_splits),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=4, num_stages=num_stages(block_n, k_cache.shape, k_cache.dtype, most=5)
        ),
        interpret=interpret,
        name="paged_decode",
    )(
        q.reshape(rows, head_dim),
        k_cache.reshape(-1, head_dim),
        v_cache.reshape(-1, head_dim),
        block_tables,
        context_lens,
        jnp.reshape(layer, 1),
    )
    if num_splits == 1:
        return outputs[0].reshape(q.shape)
    out = pl.pallas_call(
        functools.partial(_combine_kernel, num_splits=num_splits),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, head_dim), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_combine",
    )(*outputs)
    return out.reshape(q.shape)
