"""Decode: one new token per sequence attends over the sequence's pages of the KV cache."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import ahead as chaining
from pallas_kernels._common import (
    LOG2_E,
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
    load_tile,
    next_power_of_2,
    num_stages,
    product_dtype,
    store_rows,
    to_cache,
    use_interpreter,
)
from pallas_kernels.ahead import Ahead, Chain
from pallas_kernels.kv_write import check_write, norm_rope_write

# Programs that keep the memory of an H100 busy: four for each of its 132 multiprocessors.
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
    A large batch is fastest if its longest contexts come first: programs start in the order of the
    rows, and short ones fill the gaps that long ones leave at the end.

    Args:
        q: one query token per row; head n belongs to KV head n // (N/K).
        block_tables: page ids of each sequence in order. Entries past the context are never used.
        context_lens: positions to attend to, the newest (already in the cache) included; 0 marks
            a padding row, whose output is zeros.
        layer: the layer whose part of the caches is read.
        implementation: "mosaic" decodes in Triton, too.
        scale: the factor of the scores, usually H**-0.5.
        interpret: run the kernels in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: the shapes do not fit each other, or the implementation is unknown.

    Paging is PagedAttention's (Kwon et al., 2023, arXiv:2309.06180). A small batch leaves most of
    a GPU idle, so there the context of each row is split as in Flash-Decoding (Dao et al., 2023):
    each part is attended to on its own, and a second kernel merges the parts.
    """
    check_implementation(implementation)
    operands = (q, k_cache, v_cache, block_tables, context_lens, layer)
    _check_decode(q.shape, *operands[1:])
    if implementation == "xla":
        return _paged_decode_xla(*operands, scale=scale)
    splits = _choose_splits(q.shape[0], k_cache, block_tables.shape[1])
    return _paged_decode_triton(
        *operands, scale=scale, num_splits=splits, interpret=use_interpreter(interpret)
    )


@functools.partial(
    jax.jit,
    static_argnames=("eps", "scale", "implementation", "chain", "interpret"),
    donate_argnames=("k_cache", "v_cache"),
)
def decode_step(
    qkv: Float[Array, "B K G2 H"],
    q_norm: Float[Array, "*L H"] | None,
    k_norm: Float[Array, "*L H"] | None,
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    slot_mapping: Int32[Array, " B"],
    k_cache: Float[Array, "L P S K H"],
    v_cache: Float[Array, "L P S K H"],
    block_tables: Int32[Array, "B W"],
    context_lens: Int32[Array, " B"],
    layer: Int32[Array, ""],
    ahead: tuple[Ahead, ...] = (),
    ahead_of_merge: tuple[Ahead, ...] = (),
    *,
    eps: float,
    scale: float,
    implementation: Implementation,
    chain: Chain = Chain(),  # noqa: B008
    interpret: bool | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "L P S K H"], Float[Array, "L P S K H"]]:
    """Do `norm_rope_write`, then `paged_decode`; returns the attention and the caches.

    It has their arguments and errors. A row's `slot_mapping` must point to its position
    context_lens - 1. If there are so few rows that the GPU waits for kernels to start, both are one
    Triton kernel, which attends to the new position without reading it back. More rows hide the
    start, and two kernels are as fast.
    """
    check_implementation(implementation)
    check_write(qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer)
    batch, num_kv_heads, per_group, head_dim = qkv.shape
    q_shape = (batch, num_kv_heads * (per_group - 2), head_dim)
    _check_decode(q_shape, k_cache, v_cache, block_tables, context_lens, layer)
    num_splits = _choose_splits(batch, k_cache, block_tables.shape[1])
    if implementation == "xla" or num_splits == 1:
        q, k_cache, v_cache = norm_rope_write(
            qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer,
            eps=eps, implementation=implementation, interpret=interpret,
        )  # fmt: skip
        out = paged_decode(
            q, k_cache, v_cache, block_tables, context_lens, layer,
            scale=scale, implementation=implementation, interpret=interpret,
        )  # fmt: skip
        return out, k_cache, v_cache
    return _decode_step_triton(
        qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens,
        layer, ahead, ahead_of_merge, eps=eps, scale=scale, num_splits=num_splits, chain=chain,
        interpret=use_interpreter(interpret),
    )  # fmt: skip


def _check_decode(q_shape, k_cache, v_cache, block_tables, context_lens, layer) -> None:
    """Raise ValueError unless these arguments of `paged_decode` fit each other."""
    check_cache(k_cache, v_cache, q_shape[1], q_shape[2], layer)
    if block_tables.ndim != 2 or not len(block_tables) == q_shape[0] == context_lens.size:
        raise ValueError(
            f"q {q_shape}, block_tables {block_tables.shape} and context_lens "
            f"{context_lens.shape} are not [B, N, H], [B, W] and [B]"
        )


# --- XLA -------------------------------------------------------------------------------------


def _paged_decode_xla(q, k_cache, v_cache, block_tables, context_lens, layer, *, scale):
    """All sequences advance together, a block at a time, as far as the longest context.

    The query heads of all KV heads are multiplied with whole cache rows [K*H] at once, each with
    zeros in the other heads' columns: a CPU would spend longer on sorting the keys by head than on
    those zeros. Blocks are small, so that they stay in its cache from copy to product.
    """
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    block_n = math.gcd(page_size, 64)
    own_head = jnp.eye(num_kv_heads, dtype=bool)[:, None, :, None]
    # The barrier keeps XLA from computing q's norm and rotation anew for every column of zeros.
    q = lax.optimization_barrier(q)
    q_rows = jnp.where(own_head, q.reshape(batch, num_kv_heads, -1, 1, head_dim), 0)
    q_rows = q_rows.reshape(batch, num_heads, num_kv_heads * head_dim)
    attend_batch = jax.vmap(functools.partial(attend, scale=scale))

    def read(cache, pages, offset):
        """The block at `offset` of each of the pages: [B, block_n, K*H]."""
        size = (1, 1, block_n, num_kv_heads, head_dim)
        block = jax.vmap(lambda page: lax.dynamic_slice(cache, (layer, page, offset, 0, 0), size))
        return block(pages).reshape(batch, block_n, -1)

    def block_step(i, state):
        first = i * block_n
        valid = first + jnp.arange(block_n) < context_lens[:, None]
        pages = jnp.where(first < context_lens, block_tables[:, first // page_size], 0)
        k, v = (read(cache, pages, first % page_size) for cache in (k_cache, v_cache))
        v = jnp.where(valid[:, :, None], v, 0)
        mask = jnp.broadcast_to(valid[:, None, :], (batch, num_heads, block_n))
        return attend_batch(q_rows, k, v, mask, state)

    state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (batch, *x.shape)), empty_attention(*q_rows.shape[1:])
    )
    state = lax.fori_loop(0, cdiv(context_lens.max(), block_n), block_step, state)
    # A padding row has seen masked positions only: scores all equal, values all zero.
    out = jax.vmap(finish_attention)(state).reshape(batch, num_kv_heads, -1, num_kv_heads, head_dim)
    out = jnp.where(own_head, out, 0).sum(axis=3)
    return out.reshape(batch, num_heads, head_dim).astype(q.dtype)


# --- Triton ----------------------------------------------------------------------------------


def _choose_splits(batch: int, k_cache, table_width: int) -> int:
    """Return how many parts to cut each context into: a power of two, 1 if the rows fill a GPU."""
    page_size, num_kv_heads = k_cache.shape[2:4]
    most_blocks = table_width * page_size // kv_block_size(page_size, k_cache.dtype)
    wanted = min(_TARGET_PROGRAMS // (batch * num_kv_heads), most_blocks, _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


def _decode_kernel(
    q_ref, k_ref, v_ref, tables_ref, lens_ref, layer_ref, out_ref, *lse_ref,
    cache_shape: tuple[int, ...], group: int, block_n: int, num_splits: int, scale: float,
):  # fmt: skip
    """Run one program per sequence, KV head and part of the context.

    With one part, `out_ref` is the output; with more, it has a row per query head and part, and
    `lse_ref` has the base-2 logarithm of each one's softmax denominator.
    """
    kv_head, b, split = (pl.program_id(axis) for axis in range(3))
    part = _part_of(lens_ref[b], split, block_n, num_splits)
    g, g_mask = _group_rows(group)
    q_rows = (b * cache_shape[3] + kv_head) * group + g
    q = load_rows(q_ref, q_rows, g_mask)
    q = q.astype(product_dtype(q.dtype, k_ref.dtype))
    state = _attend_to_pages(
        q, k_ref, v_ref, tables_ref, part, empty_attention(*q.shape),
        cache_shape=cache_shape, layer=layer_ref[0], block_n=block_n, scale=scale,
    )  # fmt: skip
    _store_part(state, out_ref, lse_ref, q_rows, g_mask, split, num_splits)


def _fused_kernel(
    qkv_ref, cos_ref, sin_ref, slot_mapping_ref, _k_in, _v_in, tables_ref, lens_ref, layer_ref,
    *refs, cache_shape: tuple[int, ...], group: int, block_n: int, num_splits: int, scale: float,
    eps: float, normed: bool, chain: Chain | None, num_ahead: int,
):  # fmt: skip
    """Do what `_decode_kernel` does, and also norm, rotate, and write the new key and value.

    The newest position is attended to in registers, by the program that writes it: nothing is
    read that another program of this kernel writes.
    """
    first, last = 2 * normed, 2 * normed + num_ahead
    norm_refs, help_next, (k_ref, v_ref, out_ref, *lse_ref) = (
        refs[:first], refs[first:last], refs[last:],
    )  # fmt: skip
    if chain is not None:
        chaining.begin(chain, qkv_ref, help_next, 3)
    q_norm_ref, k_norm_ref = norm_refs or (None, None)
    kv_head, b, split = (pl.program_id(axis) for axis in range(3))
    num_kv_heads, head_dim = cache_shape[3:]
    context, layer = lens_ref[b], layer_ref[0]
    old = jnp.maximum(context - 1, 0)
    part = _part_of(old, split, block_n, num_splits)
    g, g_mask = _group_rows(group)
    qkv_row = (b * num_kv_heads + kv_head) * (group + 2)

    cols = jnp.arange(max(16, next_power_of_2(head_dim)))
    half = head_dim // 2
    pair = lax.rem(cols + half, jnp.int32(head_dim))  # RoPE rotates a column together with this one
    in_head = None if cols.shape[0] == head_dim else cols < head_dim
    angle = lax.rem(cols, jnp.int32(half))
    one = jnp.arange(1)
    cos, sin = (load_tile(ref, b + one, angle, None, in_head) for ref in (cos_ref, sin_ref))
    sin = jnp.where(cols < half, -sin, sin)

    def norm_rope(rows, norm_ref, mask):
        x, other = (load_tile(qkv_ref, rows, c, mask, in_head) for c in (cols, pair))
        if norm_ref is None:
            x32, other = x.astype(jnp.float32), other.astype(jnp.float32)
            return (x32 * cos + other * sin).astype(x.dtype)
        norm_row = (layer if norm_ref.shape[0] > 1 else 0) + one
        w, other_w = (load_tile(norm_ref, norm_row, c, None, in_head) for c in (cols, pair))
        x32 = x.astype(jnp.float32)
        inv_rms = lax.rsqrt((x32 * x32).sum(axis=1, keepdims=True) / head_dim + eps)

        def norm(x, w):
            normed = (x.astype(jnp.float32) * inv_rms).astype(x.dtype) * w.astype(x.dtype)
            return normed.astype(jnp.float32)

        return (norm(x, w) * cos + norm(other, other_w) * sin).astype(x.dtype)

    q = norm_rope(qkv_row + g, q_norm_ref, g_mask)
    q = q.astype(product_dtype(q.dtype, k_ref.dtype))
    k = to_cache(norm_rope(qkv_row + group + one, k_norm_ref, None), k_ref.dtype)
    v = to_cache(load_rows(qkv_ref, qkv_row + group + 1 + one), v_ref.dtype)
    is_last = (split == num_splits - 1) & (context > 0)

    @pl.when(is_last & (slot_mapping_ref[b] >= 0))
    def _():
        row = cache_row(cache_shape, layer, 0, slot_mapping_ref[b], kv_head) + one
        store_rows(k_ref, row, k)
        store_rows(v_ref, row, v)

    score = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=1) * (scale * LOG2_E)
    state = (
        jnp.where(is_last, jnp.broadcast_to(v.astype(jnp.float32), q.shape), 0.0),
        jnp.where(is_last, score, MASKED),
        jnp.where(is_last, jnp.ones_like(score), 0.0),
    )
    state = _attend_to_pages(
        q, k_ref, v_ref, tables_ref, part, state,
        cache_shape=cache_shape, layer=layer, block_n=block_n, scale=scale,
    )  # fmt: skip
    q_rows = (b * num_kv_heads + kv_head) * group + g
    _store_part(state, out_ref, lse_ref, q_rows, g_mask, split, num_splits)
    if chain is not None:
        chaining.end(chain, help_next, 3)


def _group_rows(group: int):
    """Return a query tile's rows and their mask: a matrix product needs at least 16 rows."""
    g = jnp.arange(max(16, next_power_of_2(group)))
    return g, (None if g.shape[0] == group else g < group)


def _part_of(context, split, block_n: int, num_splits: int):
    """Return the first block of one part of a context, and the position at which the part ends."""
    blocks_per_split = cdiv(cdiv(context, block_n), num_splits)
    first_block = split * blocks_per_split
    return first_block, jnp.minimum(context, (first_block + blocks_per_split) * block_n)


def _attend_to_pages(
    q, k_ref, v_ref, tables_ref, part, state, *, cache_shape, layer, block_n, scale
):
    """Fold a part of sequence `program_id(1)`'s context into the attention of `q`."""
    kv_head, b = pl.program_id(0), pl.program_id(1)
    page_size = cache_shape[2]
    first_block, end = part

    def block_step(i, state):
        position = i * block_n
        page = tables_ref[b, lax.div(position, jnp.int32(page_size))]
        n = jnp.arange(block_n)
        offset = lax.rem(position, jnp.int32(page_size)) + n
        rows = cache_row(cache_shape, layer, page, offset, kv_head)
        valid = position + n < end
        k, v = load_rows(k_ref, rows, valid), load_rows(v_ref, rows, valid)
        mask = jnp.broadcast_to(valid[None, :], (q.shape[0], block_n))
        return attend(q, k, v, mask, state, scale)

    # Only the last block needs the mask, but a loop of its own would have to fill the software
    # pipeline anew, which takes longer than masking every block.
    return lax.fori_loop(first_block, cdiv(end, block_n), block_step, state)


def _store_part(state, out_ref, lse_ref, q_rows, g_mask, split, num_splits: int):
    out = finish_attention(state)
    if num_splits == 1:
        store_rows(out_ref, q_rows, out, g_mask)
    else:
        _, row_max, row_sum = state
        lse = jnp.where(row_sum > 0, row_max + jnp.log2(row_sum), MASKED)
        store_rows(out_ref, q_rows * num_splits + split, out, g_mask)
        plgpu.store(lse_ref[0].at[q_rows * num_splits + split], lse, mask=g_mask)


def _combine_kernel(parts_ref, lse_ref, *refs, num_splits: int, chain: Chain | None):
    """One program per sequence and query head: the mean of its parts, weighted by exp2(lse)."""
    *help_next, out_ref = refs
    if chain is not None:
        chaining.begin(chain, parts_ref, help_next)
    row = pl.program_id(0)
    split_rows = row * num_splits + jnp.arange(num_splits)
    lse = plgpu.load(lse_ref.at[split_rows])
    weights = jnp.exp2(lse - lse.max())
    parts = load_rows(parts_ref, split_rows)
    out = (parts * weights[:, None]).sum(axis=0) / weights.sum()
    store_rows(out_ref, row + jnp.arange(1), out[None, :])
    if chain is not None:
        chaining.end(chain, help_next)


def _paged_decode_triton(
    q, k_cache, v_cache, block_tables, context_lens, layer, *, scale, num_splits, interpret
):
    head_dim = q.shape[-1]
    operands = (
        q.reshape(-1, head_dim), k_cache.reshape(-1, head_dim), v_cache.reshape(-1, head_dim),
        block_tables, context_lens, jnp.reshape(layer, 1),
    )  # fmt: skip
    parts = _call_decode(
        _decode_kernel, operands, q.shape, q.dtype, k_cache, num_splits=num_splits, scale=scale,
        interpret=interpret,
    )  # fmt: skip
    return _combine(parts, q.shape, q.dtype, num_splits, interpret)


def _decode_step_triton(
    qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens,
    layer, ahead, ahead_of_merge, *, eps, scale, num_splits, chain, interpret,
):  # fmt: skip
    batch, num_kv_heads, per_group, head_dim = qkv.shape
    shape = (batch, num_kv_heads * (per_group - 2), head_dim)
    rows = functools.partial(jnp.reshape, shape=(-1, head_dim))
    operands = (
        rows(qkv), cos, sin, slot_mapping, rows(k_cache), rows(v_cache), block_tables,
        context_lens, jnp.reshape(layer, 1),
        *(rows(norm) for norm in (q_norm, k_norm) if norm is not None),
    )  # fmt: skip
    help_next = () if interpret else chaining.operands(ahead)
    chain = None if interpret else chain
    new_k, new_v, *parts = _call_decode(
        functools.partial(
            _fused_kernel, eps=eps, normed=q_norm is not None, chain=chain,
            num_ahead=len(help_next),
        ),
        (*operands, *help_next), shape, qkv.dtype, k_cache, num_splits=num_splits, scale=scale,
        interpret=interpret, written=operands[4:6], input_output_aliases={4: 0, 5: 1},
    )  # fmt: skip
    merge_help = () if interpret else chaining.operands(ahead_of_merge)
    out = _combine(parts, shape, qkv.dtype, num_splits, interpret, chain, merge_help)
    return out, new_k.reshape(k_cache.shape), new_v.reshape(v_cache.shape)


def _call_decode(
    kernel, operands, q_shape, dtype, k_cache, *, num_splits, scale, interpret, written=(),
    **options,
):  # fmt: skip
    """Run a decode kernel over (KV heads, sequences, parts); returns `written`, then the parts.

    The heads of a sequence start together, because their keys are neighbours in memory.
    """
    batch, num_heads, head_dim = q_shape
    page_size, num_kv_heads = k_cache.shape[2:4]
    rows = batch * num_heads
    block_n = kv_block_size(page_size, k_cache.dtype)
    out_shape = [jax.ShapeDtypeStruct((rows, head_dim), dtype)]
    if num_splits > 1:
        out_shape = [
            jax.ShapeDtypeStruct((rows * num_splits, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows * num_splits,), jnp.float32),
        ]
    return pl.pallas_call(
        functools.partial(
            kernel, cache_shape=k_cache.shape, group=num_heads // num_kv_heads, block_n=block_n,
            num_splits=num_splits, scale=scale,
        ),
        grid=(num_kv_heads, batch, num_splits),
        out_shape=[*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in written), *out_shape],
        compiler_params=plgpu.CompilerParams(
            num_warps=4, num_stages=num_stages(block_n, k_cache.shape, k_cache.dtype, most=5)
        ),
        interpret=interpret,
        name="paged_decode",
        **options,
    )(*operands)  # fmt: skip


def _combine(parts, shape, dtype, num_splits: int, interpret, chain=None, help_next=()):
    """The outputs `[B, N, H]` from what a decode kernel wrote."""
    if num_splits == 1:
        return parts[0].reshape(shape)
    rows = shape[0] * shape[1]
    out = pl.pallas_call(
        functools.partial(_combine_kernel, num_splits=num_splits, chain=chain),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, shape[2]), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_combine",
    )(*parts, *help_next)
    return out.reshape(shape)
