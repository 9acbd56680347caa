"""Prefill: packed prompt chunks attend causally over their sequences' pages of the KV cache."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import (
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
    product_dtype,
    store_rows,
    use_interpreter,
)
from pallas_kernels.mosaic_prefill import paged_prefill_mosaic


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "interpret"))
def paged_prefill(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "L P S K H"],
    v_cache: Float[Array, "L P S K H"],
    block_tables: Int32[Array, "B W"],
    query_starts: Int32[Array, " B+1"],
    context_lens: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
    implementation: Implementation,
    interpret: bool | None = None,
) -> Float[Array, "T N H"]:
    """Return causal softmax(scale * q k^T) v of packed queries over the pages of their sequences.

    The queries of a sequence are the last tokens of its context. Their own keys and values are in
    the cache already, and so are a cached prefix's and earlier chunks'.

    Args:
        q: the query tokens of all sequences, one sequence after the other; head n belongs to KV
            head n // (N/K).
        block_tables: page ids of each sequence in order. Entries past the context are never used.
        query_starts: sequence b owns the rows query_starts[b] to query_starts[b+1] of q; a padding
            sequence owns none. Rows from query_starts[B] on are padding: their output is zeros.
            That of rows before query_starts[0], which nobody owns, is undefined.
        context_lens: positions in each sequence's cache, its query tokens included.
        layer: the layer whose part of the caches is read.
        scale: the factor of the scores, usually H**-0.5.
        interpret: run the kernel in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: the shapes do not fit each other, the implementation is unknown, or "mosaic"
            does not support these dtypes or this head_dim (`supports_mosaic_prefill`).

    This is FlashAttention-2 (Dao, 2023, arXiv:2307.08691) over the pages of PagedAttention (Kwon
    et al., 2023, arXiv:2309.06180). The schedule of tiles depends on `query_starts` and
    `context_lens` alone: the layers of one compiled step share it, because XLA merges equal
    computations.
    """
    check_implementation(implementation)
    check_cache(k_cache, v_cache, q.shape[1], q.shape[2], layer)
    batch = context_lens.size
    if block_tables.ndim != 2 or not len(block_tables) == query_starts.size - 1 == batch:
        raise ValueError(
            f"block_tables {block_tables.shape}, query_starts {query_starts.shape} and "
            f"context_lens {context_lens.shape} are not [B, W], [B+1] and [B]"
        )
    operands = (q, k_cache, v_cache, block_tables, query_starts, context_lens, layer)
    if implementation == "xla":
        return _paged_prefill_xla(*operands, scale=scale)
    kernel = _paged_prefill_triton if implementation == "triton" else paged_prefill_mosaic
    return kernel(*operands, scale=scale, interpret=use_interpreter(interpret))


def _schedule(query_starts, context_lens, num_tokens: int, block_m: int) -> Int32[Array, "tiles 4"]:
    """Cut the packed queries into tiles of at most `block_m` tokens of one sequence.

    Each row is (sequence, first row in q, number of rows, end of the context that the last of them
    sees). The padding rows after the last sequence form one more sequence, without a context; the
    schedule is filled up with tiles of no rows.
    """
    batch = context_lens.size
    num_tiles = num_tokens // block_m + min(batch + 1, num_tokens)  # most that can be needed
    starts = query_starts
    lengths = jnp.append(starts[1:], num_tokens) - starts  # [B+1]
    contexts = jnp.append(context_lens, 0)
    tiles_end = jnp.cumsum((lengths + block_m - 1) // block_m)

    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    sequence = (tiles_end[None, :] <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, batch)  # tiles past the end find no rows left there
    tiles_before = jnp.append(0, tiles_end)[sequence]
    offset = (tile - tiles_before) * block_m
    rows_left = lengths[sequence] - offset
    rows = jnp.clip(rows_left, 0, block_m)
    context_end = jnp.maximum(contexts[sequence] - rows_left + rows, 0)
    return jnp.stack([sequence, starts[sequence] + offset, rows, context_end], axis=1)


# --- XLA -------------------------------------------------------------------------------------


def _paged_prefill_xla(
    q, k_cache, v_cache, block_tables, query_starts, context_lens, layer, *, scale
):
    """Tile after tile, and within a tile block after block up to the diagonal."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    group = num_heads // num_kv_heads
    block_m = min(64, next_power_of_2(num_tokens))
    block_n = math.gcd(page_size, 128)
    tiles = _schedule(query_starts, context_lens, num_tokens, block_m)
    attend_heads = jax.vmap(functools.partial(attend, scale=scale), in_axes=(0, 1, 1, None, 0))
    # A tile always reads and writes block_m rows, so there must be some after the last token.
    q = jnp.pad(q, ((0, block_m), (0, 0), (0, 0)))

    def tile_step(t, out):
        sequence, first_row, rows, context_end = tiles[t]
        q_tile = lax.dynamic_slice_in_dim(q, first_row, block_m)
        # Matrix row m * G + g of a KV head is its query head g of token m.
        q_tile = q_tile.reshape(block_m, num_kv_heads, group, head_dim).swapaxes(0, 1)
        q_tile = q_tile.reshape(num_kv_heads, block_m * group, head_dim)
        q_position = context_end - rows + jnp.repeat(jnp.arange(block_m), group)

        def block_step(i, state):
            first = i * block_n
            position = first + jnp.arange(block_n)
            at = (layer, block_tables[sequence, first // page_size], first % page_size, 0, 0)
            size = (1, 1, block_n, num_kv_heads, head_dim)
            k, v = (lax.dynamic_slice(cache, at, size)[0, 0] for cache in (k_cache, v_cache))
            written = position < context_end
            v = jnp.where(written[:, None, None], v, 0)
            mask = (position <= q_position[:, None]) & written
            return attend_heads(q_tile, k, v, mask, state)

        state = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_kv_heads, *x.shape)),
            empty_attention(block_m * group, head_dim),
        )
        state = lax.fori_loop(0, cdiv(context_end, block_n), block_step, state)
        tile_out = jax.vmap(finish_attention)(state)
        tile_out = tile_out.reshape(num_kv_heads, block_m, group, head_dim).swapaxes(0, 1)
        tile_out = tile_out.reshape(block_m, num_heads, head_dim).astype(out.dtype)
        tile_out = jnp.where(jnp.arange(block_m)[:, None, None] < rows, tile_out, 0)
        # Zeros may fall on the next sequence's rows; its own tile comes later and fills them.
        return lax.dynamic_update_slice_in_dim(out, tile_out, first_row, axis=0)

    used = (tiles[:, 2] > 0) & (tiles[:, 3] > 0)  # tiles with rows and a context come first
    num_tiles = used.sum(dtype=jnp.int32)
    return lax.fori_loop(0, num_tiles, tile_step, jnp.zeros_like(q))[:num_tokens]


# --- Triton ----------------------------------------------------------------------------------


def _prefill_kernel(
    q_ref, k_ref, v_ref, tables_ref, tiles_ref, layer_ref, out_ref, *,
    cache_shape: tuple[int, ...], group: int, block_rows: int, block_n: int, scale: float,
):  # fmt: skip
    """Run one program per KV head and tile.

    The query heads that share a KV head share its keys: matrix row r is head r % G of the tile's
    token r // G. The last tiles, which see most of their context, are started first.
    """
    kv_head = pl.program_id(0)
    tile = tiles_ref.shape[0] - 1 - pl.program_id(1)
    sequence, first_row, rows, context_end = (tiles_ref[tile, column] for column in range(4))
    page_size, num_kv_heads = cache_shape[2:4]
    layer = layer_ref[0]

    @pl.when(rows > 0)
    def _():
        r = jnp.arange(block_rows)
        token = lax.div(r, jnp.int32(group))
        q_rows = ((first_row + token) * num_kv_heads + kv_head) * group
        q_rows = q_rows + lax.rem(r, jnp.int32(group))
        q = load_rows(q_ref, q_rows, token < rows)
        q = q.astype(product_dtype(q.dtype, k_ref.dtype))
        first_position = context_end - rows

        def block_step(i, state, diagonal: bool):
            start = i * block_n
            page = tables_ref[sequence, lax.div(start, jnp.int32(page_size))]
            n = jnp.arange(block_n)
            offset = lax.rem(start, jnp.int32(page_size)) + n
            cache_rows = cache_row(cache_shape, layer, page, offset, kv_head)
            written = start + n < context_end if diagonal else None
            k, v = load_rows(k_ref, cache_rows, written), load_rows(v_ref, cache_rows, written)
            causal = (start + n)[None, :] <= (first_position + token)[:, None] if diagonal else None
            return attend(q, k, v, causal, state, scale)

        # Every row sees the whole of the blocks up to the first row's position. (That position is
        # negative in a tile of padding rows, which has no block at all.)
        full_blocks = lax.div(jnp.maximum(first_position + 1, 0), jnp.int32(block_n))
        state = empty_attention(*q.shape)
        state = lax.fori_loop(0, full_blocks, functools.partial(block_step, diagonal=False), state)
        state = lax.fori_loop(
            full_blocks,
            cdiv(context_end, block_n),
            functools.partial(block_step, diagonal=True),
            state,
        )
        store_rows(out_ref, q_rows, finish_attention(state), token < rows)


def _paged_prefill_triton(
    q, k_cache, v_cache, block_tables, query_starts, context_lens, layer, *, scale, interpret
):
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    group = num_heads // num_kv_heads
    # float32 products run on the plain units and need many registers: smaller tiles.
    block_rows = 128 if q.dtype.itemsize == 2 else 32
    block_rows = max(block_rows, next_power_of_2(group))
    block_n = kv_block_size(page_size, k_cache.dtype)
    tiles = _schedule(query_starts, context_lens, num_tokens, block_m=block_rows // group)
    kernel = functools.partial(
        _prefill_kernel,
        cache_shape=k_cache.shape,
        group=group,
        block_rows=block_rows,
        block_n=block_n,
        scale=scale,
    )
    out = pl.pallas_call(
        kernel,
        grid=(num_kv_heads, tiles.shape[0]),
        out_shape=jax.ShapeDtypeStruct((num_tokens * num_heads, head_dim), q.dtype),
        compiler_params=plgpu.CompilerParams(
            num_warps=4,  # 8 are 12% slower on an H100
            num_stages=num_stages(block_n, k_cache.shape, k_cache.dtype, most=3),
        ),
        interpret=interpret,
        name="paged_prefill",
    )(
        q.reshape(-1, head_dim),
        k_cache.reshape(-1, head_dim),
        v_cache.reshape(-1, head_dim),
        block_tables,
        tiles,
        jnp.reshape(layer, 1),
    )
    return out.reshape(q.shape)
