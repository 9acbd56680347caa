"""Paged attention over the KV cache: the engine's way for a layer to attend."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.sharding import Sharding
from pallas_kernels import decode_step, norm_rope_write, paged_prefill


class KVCache(NamedTuple):
    """Keys and values of all layers: L layers, P pages of S positions, K KV heads of size H."""

    k: Float[Array, "L P S K H"]
    v: Float[Array, "L P S K H"]

    AXES = ("layers", "batch", "positions", "kv_heads", "head_dim")


class PagedBatch(NamedTuple):
    """Where a step's tokens live in the cache. Without `query_starts` each row is one token.

    Where the batch is sharded, each shard's part counts from its own first token and page.
    """

    slots: Int32[Array, " T"]  # position in the cache that a token is written to; -1: nowhere
    block_tables: Int32[Array, "B W"]
    context_lens: Int32[Array, " B"]  # this step's tokens included; 0: a padding row
    query_starts: Int32[Array, " B+1"] | None = None  # row b owns these tokens of the step


@dataclass(frozen=True)
class PagedAttention:
    """Norms and rotates q and k, writes k and v to their pages, attends over the pages."""

    batch: PagedBatch
    sharding: Sharding
    implementation: str

    def __call__(
        self,
        qkv: Float[Array, "T K G+2 H"],
        q_norm: RMSNorm,
        k_norm: RMSNorm,
        rope: tuple[Float[Array, "T half"], Float[Array, "T half"]],
        cache: KVCache,
        layer: Int32[Array, ""],
    ) -> tuple[Float[Array, "T N H"], KVCache]:
        return _attend(
            qkv, q_norm.weight[...], k_norm.weight[...], rope, cache, layer, self.batch,
            eps=q_norm.eps, sharding=self.sharding, implementation=self.implementation,
        )  # fmt: skip


# Jitted with a donated cache for the eager engine, which would copy the cache at each write
# otherwise; inside a compiled step the donation of the whole step counts and this one does not.
@functools.partial(
    jax.jit, static_argnames=("eps", "sharding", "implementation"), donate_argnames="cache"
)
def _attend(qkv, q_norm, k_norm, rope, cache, layer, batch, *, eps, sharding, implementation):
    def on_shard(qkv, q_norm, k_norm, rope, cache, layer, batch):
        new = (qkv, q_norm, k_norm, *rope, batch.slots)
        options = {"eps": eps, "implementation": implementation}
        scale = qkv.shape[-1] ** -0.5
        if batch.query_starts is None:
            out, *cache = decode_step(
                *new, *cache, batch.block_tables, batch.context_lens, layer,
                scale=scale, **options,
            )  # fmt: skip
            return out, KVCache(*cache)
        q, *cache = norm_rope_write(*new, *cache, layer, **options)
        out = paged_prefill(
            q, *cache, batch.block_tables, batch.query_starts, batch.context_lens, layer,
            scale=scale, implementation=implementation,
        )  # fmt: skip
        return out, KVCache(*cache)

    spec = sharding.spec
    cache_spec = KVCache(*[spec(*KVCache.AXES)] * 2)
    rows, whole = spec("batch"), spec()
    return sharding.shard_map(
        on_shard,
        (spec("batch", "kv_heads"), whole, whole, rows, cache_spec, whole, rows),
        (spec("batch", "heads"), cache_spec),
    )(qkv, q_norm, k_norm, rope, cache, layer, batch)
