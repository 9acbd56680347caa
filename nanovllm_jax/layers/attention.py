"""Attention as a layer does it: over the paged KV cache when serving, dense when training."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.layers.rope import apply_rope
from nanovllm_jax.sharding import Sharding
from pallas_kernels.ahead import Chain
from pallas_kernels import decode_step, norm_rope_write, paged_decode, paged_prefill

Angles = tuple[Float[Array, "T half"], Float[Array, "T half"]]  # cos and sin of each position


class PagedBatch(NamedTuple):
    """Where a step's tokens live in the cache. Without `query_starts` each row is one token.

    If the batch is sharded, each shard's part counts from its own first token and page.
    """

    slot_mapping: Int32[Array, " T"]  # cache position that a token is written to; -1: nowhere
    block_tables: Int32[Array, "B W"]
    context_lens: Int32[Array, " B"]  # counts this step's tokens too; 0: a padding row
    query_starts: Int32[Array, " B+1"] | None = None  # row b owns these tokens of the step
    # In a mixed step: the context of token b, if that is all that row b computes and it decodes; or
    # 0. It is none of the tokens that `query_starts` tells of.
    decode_lens: Int32[Array, " B"] | None = None


# Jitted with a donated cache so that the eager engine, too, updates the cache in place; inside a
# compiled step only the donation of the whole step counts.
@functools.partial(
    jax.jit, static_argnames=("eps", "sharding", "implementation", "chain"), donate_argnames="cache"
)
def paged_attention(
    qkv: Float[Array, "T K G+2 H"],
    q_norm: Float[Array, "L H"] | None,
    k_norm: Float[Array, "L H"] | None,
    rope: Angles,
    cache: KVCache,
    layer: Int32[Array, ""],
    batch: PagedBatch,
    ahead: Any = ((), ()),
    *,
    eps: float,
    sharding: Sharding,
    implementation: str,
    chain: Chain = Chain(),  # noqa: B008
) -> tuple[Float[Array, "T N H"], KVCache]:
    """Norm and rotate q and k, write k and v to their pages, and attend over the pages.

    Args:
        qkv: for each KV head its G query heads, then its key, then its value.
        q_norm, k_norm: norm weights of all layers, of which `layer` is used; None: no norm.
        implementation: the kernels, as `pallas_kernels` names them.
    """

    def on_shard(qkv, q_norm, k_norm, rope, cache, layer, batch, ahead):
        new = (qkv, q_norm, k_norm, *rope, batch.slot_mapping)
        options = {"eps": eps, "implementation": implementation}
        scale = qkv.shape[-1] ** -0.5
        if batch.query_starts is None:
            out, *cache = decode_step(
                *new, *cache, batch.block_tables, batch.context_lens, layer,
                *ahead, scale=scale, chain=chain, **options,
            )  # fmt: skip
            return out, KVCache(*cache)
        q, *cache = norm_rope_write(*new, *cache, layer, **options)
        out = paged_prefill(
            q, *cache, batch.block_tables, batch.query_starts, batch.context_lens, layer,
            scale=scale, implementation=implementation,
        )  # fmt: skip
        if (lens := batch.decode_lens) is not None:
            drawn = paged_decode(
                q[: len(lens)], *cache, batch.block_tables, lens, layer,
                scale=scale, implementation=implementation,
            )  # fmt: skip
            drawn = jnp.where(lens[:, None, None] > 0, drawn, out[: len(lens)])
            out = out.at[: len(lens)].set(drawn)
        return out, KVCache(*cache)

    spec = sharding.spec
    one: Any = spec(*KVCache.AXES)
    cache_spec = KVCache(one, one)
    rows, whole = spec("batch"), spec()
    return sharding.shard_map(
        on_shard,
        (spec("batch", "kv_heads"), whole, whole, rows, cache_spec, whole, rows, whole),
        (spec("batch", "heads"), cache_spec),
    )(qkv, q_norm, k_norm, rope, cache, layer, batch, ahead)


def dense_attention(
    qkv: Float[Array, "T K G+2 H"],
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
    rope: Angles,
    layer: Int32[Array, ""],
    mask: Bool[Array, "B S S"],
) -> Float[Array, "T N H"]:
    """Norm and rotate q and k, and attend within B rows of S tokens (T = B * S), without a cache.

    Args:
        mask: whether query i of a row may see key j.
    """
    tokens, _, _, head_dim = qkv.shape
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    q = q.reshape(tokens, -1, head_dim)
    if q_norm is not None and k_norm is not None:
        q, k = q_norm(q, layer), k_norm(k, layer)
    q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    q, k, v = (x.reshape(*mask.shape[:2], -1, head_dim) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
    return out.reshape(tokens, -1, head_dim)
