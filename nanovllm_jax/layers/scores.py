"""Log probabilities of tokens, of a vocabulary that may be sharded: logits are never gathered."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from nanovllm_jax.layers.sampler import largest_of, shard_ids
from nanovllm_jax.sampling_params import MOST_LOGPROBS

CHUNK = 128  # Logits of a chunk, of which first only the largest is looked at.


class Scores(NamedTuple):
    """The scores of B tokens, each one's rank among the vocabulary, and the likeliest K instead."""

    logprobs: Float[Array, " B"]
    ranks: Int32[Array, " B"]  # tokens at least as likely, itself among them, as vLLM counts
    top_ids: Int32[Array, "B K"]  # the likeliest first; of equals the lowest id
    top_logprobs: Float[Array, "B K"]


def score(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    *,
    vocab_size: int,
    axis: tuple[str, ...] = (),
    total: Callable[[Float[Array, "B N"]], Float[Array, "B N"]] | None = None,
    largest_key: Callable[[Int32[Array, "B 2"]], Int32[Array, "B 2"]] | None = None,
) -> Scores:
    """Score one token a row. `logits` is this device's shard of the vocabulary over `axis`.

    Args:
        vocab_size: entries from here on are padding.
        total, largest_key: as for `filter_logits`.
    """
    if total is None:
        total = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x
    ids = shard_ids(logits, axis)
    top, top_ids = _likeliest(logits, ids, vocab_size)
    logits = _real(logits, ids, vocab_size)
    largest = largest_of(top[:, 0], axis, largest_key)
    mass = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
    columns = tokens - ids[0]
    own = jnp.take_along_axis(logits, jnp.clip(columns, 0, len(ids) - 1)[:, None], axis=1)[:, 0]
    own = jnp.where((columns >= 0) & (columns < len(ids)), own, 0.0)
    mass, own = jnp.moveaxis(total(jnp.stack([mass, own], axis=-1)), -1, 0)
    as_likely = jnp.sum(logits >= own[:, None], axis=-1, keepdims=True)
    ranks = total(as_likely.astype(jnp.float32))[:, 0].astype(jnp.int32)  # exact: below 2^24
    log_total = largest + jnp.log(mass)
    if axis:
        top, top_ids = _likeliest_of_all(top, top_ids, axis, total)
    most = min(MOST_LOGPROBS, vocab_size)
    top, places = jax.lax.top_k(top, most)
    top_ids = jnp.take_along_axis(top_ids, places, axis=1)
    return Scores(own - log_total, ranks, top_ids, top - log_total[:, None])


def _likeliest(
    logits: Float[Array, "B V"], ids: Int[Array, " V"], vocab_size: int
) -> tuple[Float[Array, "B K"], Int32[Array, "B K"]]:
    """The largest logits of this device and their ids, the largest first.

    All of them lie in the chunks with the largest maxima; only these are sorted.
    """
    rows, size = logits.shape
    width = math.gcd(size, CHUNK)
    most = min(MOST_LOGPROBS, size)
    if size // width <= most or width == 1:
        top, columns = jax.lax.top_k(_real(logits, ids, vocab_size), most)
        return top, ids[0] + columns
    chunks = logits.reshape(rows, -1, width)
    chunk_ids = ids.reshape(-1, width)
    largest = jnp.max(_real(chunks, chunk_ids, vocab_size), axis=-1)
    _, chosen = jax.lax.top_k(largest, most)
    chosen = jnp.sort(chosen, axis=-1)  # so that the first of equal logits has the lowest id
    candidates = jnp.take_along_axis(chunks, chosen[:, :, None], axis=1).reshape(rows, -1)
    candidate_ids = chunk_ids[chosen].reshape(rows, -1)
    top, places = jax.lax.top_k(_real(candidates, candidate_ids, vocab_size), most)
    return top, jnp.take_along_axis(candidate_ids, places, axis=1)


def _likeliest_of_all(
    top: Float[Array, "B K"], ids: Int32[Array, "B K"], axis: tuple[str, ...], total: Callable
) -> tuple[Float[Array, "B N"], Int32[Array, "B N"]]:
    """Every device's likeliest one after another, exchanged as a sum with zeros elsewhere."""
    rows, num = top.shape
    here = jax.lax.axis_index(axis)
    shards = jax.lax.psum(1, axis)
    mine = jnp.stack([top, ids.astype(jnp.float32)], axis=1)  # exact: ids are below 2^24
    everyone = jnp.zeros((rows, shards, 2 * num), jnp.float32)
    everyone = everyone.at[:, here].set(mine.reshape(rows, -1))
    everyone = total(everyone.reshape(rows, -1)).reshape(rows, shards, 2, num)
    tops, all_ids = jnp.moveaxis(everyone, 2, 0).reshape(2, rows, -1)
    return tops, all_ids.astype(jnp.int32)


def _real(logits: Float[Array, "..."], ids: Int[Array, "..."], vocab_size: int) -> Array:
    """The logits with padding at -inf, and without -0.0, which XLA would sort behind 0.0."""
    return jnp.where(ids < vocab_size, jnp.where(logits == 0, 0.0, logits), -jnp.inf)
