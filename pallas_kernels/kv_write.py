"""Norms and rotates queries and keys, and writes keys and values into the paged cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import (
    Implementation,
    cache_row,
    check_cache,
    check_implementation,
    load_rows,
    next_power_of_2,
    store_rows,
    to_cache,
    use_interpreter,
)


@functools.partial(
    jax.jit,
    static_argnames=("eps", "implementation", "interpret"),
    donate_argnames=("k_cache", "v_cache"),
)
def norm_rope_write(
    qkv: Float[Array, "T K G2 H"],
    q_norm: Float[Array, "*L H"] | None,
    k_norm: Float[Array, "*L H"] | None,
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    slot_mapping: Int32[Array, " T"],
    k_cache: Float[Array, "L P S K H"],
    v_cache: Float[Array, "L P S K H"],
    layer: Int32[Array, ""],
    *,
    eps: float,
    implementation: Implementation,
    interpret: bool | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P S K H"], Float[Array, "L P S K H"]]:
    """Return the queries, normed and rotated, and the caches with this layer's new K and V in them.

    The caches are updated in place and those passed in are consumed: go on with the ones returned.

    Args:
        qkv: a KV head of a token has its G query heads, then the key, then the value: G2 = G + 2.
        q_norm, k_norm: the weights of the RMSNorm of each query and key head, either this layer's,
            `[H]`, or all layers', `[L, H]`. Stacked weights save the GPU the copy of a slice. None
            for both: there is no norm.
        cos, sin: the float32 cosine and sine of each token's position times the H/2 inverse
            frequencies. The caller computes them once a step, because a sine of 32,000 radians is
            slow on a GPU and every layer needs the same ones.
        slot_mapping: the position in the cache, page * S + offset, that each token's key and value
            are written to, the same in each layer; a negative one writes nothing. No two tokens may
            share a position.
        layer: the layer whose part of the caches is written.
        eps: the epsilon of the RMSNorm.
        interpret: run the Triton kernel in Pallas's interpreter; None: if there is no GPU.

    Returns:
        (q, k_cache, v_cache), where head n = k*G + g of q is query head g of KV head k.

    Raises:
        ValueError: the shapes do not fit each other, or the implementation is unknown.

    The norm follows Qwen3RMSNorm of transformers: float32, rounded to the activations' dtype, then
    times the weight. RoPE (Su et al., 2021, arXiv:2104.09864) rotates the pairs (i, i + H/2) in
    float32 and rounds once.
    """
    check_implementation(implementation)
    operands = (qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer)
    check_write(*operands)
    if implementation == "xla":
        return _norm_rope_write_xla(*operands, eps=eps)
    return _norm_rope_write_triton(*operands, eps=eps, interpret=use_interpreter(interpret))


def check_write(qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer) -> None:
    """Raise ValueError unless these arguments of `norm_rope_write` fit each other."""
    num_tokens, num_kv_heads, per_group, head_dim = qkv.shape
    check_cache(k_cache, v_cache, (per_group - 2) * num_kv_heads, head_dim, layer)
    if per_group < 3 or num_kv_heads != k_cache.shape[3]:
        raise ValueError(f"qkv {qkv.shape} is not [T, K, G+2, H] for the cache {k_cache.shape}")
    if head_dim % 2 or not cos.shape == sin.shape == (num_tokens, head_dim // 2):
        raise ValueError(f"cos {cos.shape}, sin {sin.shape} are not [T, H/2] for qkv {qkv.shape}")
    norms = tuple(None if norm is None else norm.shape for norm in (q_norm, k_norm))
    allowed = (None, (head_dim,), (k_cache.shape[0], head_dim))
    if norms[0] != norms[1] or norms[0] not in allowed:
        raise ValueError(f"q_norm {norms[0]}, k_norm {norms[1]} are not [H], [L, H] or None")
    if slot_mapping.shape != (num_tokens,):
        raise ValueError(f"slot_mapping {slot_mapping.shape} is not [T] for qkv {qkv.shape}")


def _norm_rope(halves, weights, cos, sin, head_dim, eps):
    """Norm (unless `weights` is None) and rotate heads, given as their two halves `[..., H/2]`."""
    dtype = halves[0].dtype
    x1, x2 = (x.astype(jnp.float32) for x in halves)
    if weights is not None:
        weight1, weight2 = (weight.astype(dtype) for weight in weights)
        squares = (x1 * x1).sum(axis=-1, keepdims=True) + (x2 * x2).sum(axis=-1, keepdims=True)
        inv_rms = lax.rsqrt(squares / head_dim + eps)
        # Rounded before and after the weight, because Qwen3RMSNorm is.
        x1 = ((x1 * inv_rms).astype(dtype) * weight1).astype(jnp.float32)
        x2 = ((x2 * inv_rms).astype(dtype) * weight2).astype(jnp.float32)
    return (x1 * cos - x2 * sin).astype(dtype), (x2 * cos + x1 * sin).astype(dtype)


# --- XLA -------------------------------------------------------------------------------------


def _norm_rope_write_xla(
    qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer, *, eps
):
    num_tokens, _, _, head_dim = qkv.shape
    num_pages, page_size = k_cache.shape[1:3]

    def norm_rope(heads, weight):  # heads [T, heads, H]
        halves = jnp.split(heads, 2, axis=-1)
        if weight is not None:
            weight = jnp.split(weight[layer] if weight.ndim == 2 else weight, 2)
        halves = _norm_rope(halves, weight, cos[:, None], sin[:, None], head_dim, eps)
        return jnp.concatenate(halves, axis=-1)

    q = norm_rope(qkv[:, :, :-2].reshape(num_tokens, -1, head_dim), q_norm)
    k = norm_rope(qkv[:, :, -2], k_norm)
    v = qkv[:, :, -1]

    # mode="drop" skips the page that does not exist; a negative index would count from the end.
    pages = jnp.where(slot_mapping >= 0, slot_mapping // page_size, num_pages)

    def write(cache, rows):
        # In place when the cache is donated, except in bfloat16 on a CPU: there XLA's scatter
        # converts the whole cache to float32 and back. (Use float32 on a CPU.)
        at = cache.at[layer, pages, slot_mapping % page_size]
        return at.set(to_cache(rows, cache.dtype), mode="drop")

    return q, write(k_cache, k), write(v_cache, v)


# --- Triton ----------------------------------------------------------------------------------


def _kernel(
    qkv_ref, cos_ref, sin_ref, slot_mapping_ref, layer_ref, _k_in, _v_in, *refs,
    group: int, cache_shape: tuple[int, ...], eps: float,
):  # fmt: skip
    """Run one program per token. Matrices have rows of half a head, since RoPE pairs the halves."""
    *norm_refs, q_ref, k_ref, v_ref = refs
    q_norm_ref, k_norm_ref = norm_refs or (None, None)
    token = pl.program_id(0)
    num_kv_heads, head_dim = cache_shape[3:]
    num_heads = num_kv_heads * group
    layer = layer_ref[0]
    one = jnp.arange(1)
    cos, sin = load_rows(cos_ref, token + one), load_rows(sin_ref, token + one)

    def load_halves(heads, mask):
        rows = 2 * (token * num_kv_heads * (group + 2) + heads)
        return load_rows(qkv_ref, rows, mask), load_rows(qkv_ref, rows + 1, mask)

    def store_halves(ref, rows, halves, mask):
        store_rows(ref, 2 * rows, halves[0], mask)
        store_rows(ref, 2 * rows + 1, halves[1], mask)

    def norm_rope(halves, norm_ref):
        weights = None
        if norm_ref is not None:
            row = 2 * layer + one if norm_ref.shape[0] > 2 else one  # all layers', or one's
            weights = load_rows(norm_ref, row), load_rows(norm_ref, row + 1)
        return _norm_rope(halves, weights, cos, sin, head_dim, eps)

    n = jnp.arange(next_power_of_2(num_heads))
    n_mask = None if n.shape[0] == num_heads else n < num_heads
    n_heads = lax.div(n, jnp.int32(group)) * (group + 2) + lax.rem(n, jnp.int32(group))
    q = norm_rope(load_halves(n_heads, n_mask), q_norm_ref)
    store_halves(q_ref, token * num_heads + n, q, n_mask)

    slot = slot_mapping_ref[token]

    @pl.when(slot >= 0)
    def _():
        k = jnp.arange(next_power_of_2(num_kv_heads))
        k_mask = None if k.shape[0] == num_kv_heads else k < num_kv_heads
        # slot = page * S + offset, so page 0 and position `slot` name the same row.
        rows = cache_row(cache_shape, layer, 0, slot, k)
        key = load_halves(k * (group + 2) + group, k_mask)
        value = load_halves(k * (group + 2) + group + 1, k_mask)
        for ref, halves in ((k_ref, norm_rope(key, k_norm_ref)), (v_ref, value)):
            store_halves(ref, rows, [to_cache(half, ref.dtype) for half in halves], k_mask)


def _norm_rope_write_triton(
    qkv, q_norm, k_norm, cos, sin, slot_mapping, k_cache, v_cache, layer, *, eps, interpret
):
    num_tokens, num_kv_heads, per_group, head_dim = qkv.shape
    num_heads = num_kv_heads * (per_group - 2)
    half = head_dim // 2
    k_rows, v_rows = k_cache.reshape(-1, half), v_cache.reshape(-1, half)
    norms = [norm.reshape(-1, half) for norm in (q_norm, k_norm) if norm is not None]
    kernel = functools.partial(_kernel, group=per_group - 2, cache_shape=k_cache.shape, eps=eps)
    q, k_rows, v_rows = pl.pallas_call(
        kernel,
        grid=(num_tokens,),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens * num_heads * 2, half), qkv.dtype),
            jax.ShapeDtypeStruct(k_rows.shape, k_rows.dtype),
            jax.ShapeDtypeStruct(v_rows.shape, v_rows.dtype),
        ],
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="norm_rope_write",
    )(
        qkv.reshape(-1, half), cos, sin, slot_mapping, jnp.reshape(layer, 1), k_rows, v_rows,
        *norms,
    )  # fmt: skip
    return (
        q.reshape(num_tokens, num_heads, head_dim),
        k_rows.reshape(k_cache.shape),
        v_rows.reshape(v_cache.shape),
    )
