"""Sampling on the device, over a vocabulary that may be sharded: full logits are never gathered.

A token is the arg max of logits + temperature * Gumbel noise (the Gumbel-max trick: the same
distribution as softmax(logits / temperature), and greedy decoding at temperature 0). The noise is
a hash of (request seed, token position, vocabulary entry), so a sample depends on nothing else:
not on the batch, its order, the step or the mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt32


def gumbel_noise(
    seeds: UInt32[Array, "B 2"], positions: Int[Array, " B"], vocab_ids: Int[Array, " V"]
) -> Float[Array, "B V"]:
    """Standard Gumbel noise from a counter-based hash.

    Row and vocabulary entry are hashed apart before they meet, so that the streams of two rows
    are no shifted copies of one another. The second word of a row costs an entry nothing more than
    an exclusive or.

    Args:
        seeds: 64 bits a row, as words [low, high].
    """
    low, high = seeds[:, 0], seeds[:, 1]
    # A Feistel network: at one position two seeds never have both words in common, and in one
    # stream two positions never have the first. The constant (the golden ratio's) keeps the second
    # word apart from what `_hash` makes of the first and an entry, or the two would cancel out.
    first = low ^ _hash(high ^ _hash(positions.astype(jnp.uint32)))
    second = high ^ _hash(first + jnp.uint32(0x9E3779B9))
    entries = _hash(vocab_ids.astype(jnp.uint32))
    bits = _hash(_hash(first)[:, None] ^ entries[None, :]) ^ _hash(second)[:, None]
    # An exponential variate -log(1 - u) keeps its precision where it matters, at small values,
    # that is at large Gumbel values; u stays below 1, so that the noise is finite.
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def sample(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    seeds: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    *,
    vocab_size: int,
    axis: tuple[str, ...] = (),
    largest_key: Callable[[Int32[Array, "B 2"]], Int32[Array, "B 2"]] | None = None,
) -> Int[Array, " B"]:
    """One token a row. `logits` is this device's shard of the vocabulary over mesh axes `axis`.

    Args:
        temperatures: 0 is greedy; ties go to the lowest token id. At most 1e30, where all tokens
            are equally likely already: much above, products with the noise are infinite.
        seeds, positions: the request's random stream, and where in it this token is.
        vocab_size: entries from here on are padding.
        largest_key: the maximum over `axis` of unsigned 64-bit integers, as words [low, high];
            without it scores and tokens are gathered.
    """
    ids = _shard_ids(logits, axis)

    def noise():
        return temperatures[:, None] * gumbel_noise(seeds, positions, ids)

    def noise_if_any_row_draws():  # on a CPU it takes as long as a layer of a small model
        greedy = (temperatures == 0).all()
        return jax.lax.cond(greedy, lambda: jnp.zeros(logits.shape, jnp.float32), noise)

    scores = logits + jax.lax.platform_dependent(cpu=noise_if_any_row_draws, default=noise)
    scores = jnp.where(ids[None, :] < vocab_size, scores, -jnp.inf)
    best = jnp.argmax(scores, axis=-1)
    token = ids[0] + best.astype(jnp.int32)
    if not axis:
        return token
    score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
    if largest_key:
        order = jax.lax.bitcast_convert_type(_ordered_key(score), jnp.int32)
        return ~largest_key(jnp.stack([~token, order], axis=-1))[:, 0]  # ~: the lowest token wins
    shards, tokens = jax.lax.all_gather((score, token), axis)  # [shards, B] each
    winner = jnp.argmax(shards, axis=0)  # the first of equals: the lowest token id
    return jnp.take_along_axis(tokens, winner[None, :], axis=0)[0]


def filter_logits(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    vocab_size: int,
    axis: tuple[str, ...] = (),
) -> Float[Array, "B V"]:
    """Set to -inf what min_p, top_k and then top_p drop, in vLLM's order.

    Each filter keeps the logits above some threshold, which is found without sorting: by bisection
    over the 2^32 ordered float values, one pass over the logits a step, exact. Logits that equal
    the threshold are all kept.

    Args:
        top_k: 0 or less keeps all.
        top_p: in (0, 1], and no subnormal number; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
    """

    def total(x: Float[Array, "B V"]) -> Float[Array, " B"]:
        partial = jnp.sum(x, axis=-1)
        return jax.lax.psum(partial, axis) if axis else partial

    ids = _shard_ids(logits, axis)
    logits = jnp.where(ids[None, :] < vocab_size, logits, -jnp.inf)
    keys = _ordered_key(logits)
    largest = jnp.max(logits, axis=-1)
    largest = jax.lax.pmax(largest, axis) if axis else largest
    scale = 1 / jnp.maximum(temperatures, 1e-6)
    weights = jnp.exp((logits - largest[:, None]) * scale[:, None])  # likeliest = 1

    wanted = jnp.where(top_k > 0, top_k, vocab_size).astype(jnp.float32)
    threshold = _highest_key(lambda t: total((keys >= t).astype(jnp.float32)) >= wanted, wanted)
    keep = (keys >= threshold[:, None]) & (weights >= min_p[:, None])

    weights = jnp.where(keep, weights, 0.0)
    mass = jnp.where(top_p < 1, top_p, 0) * total(weights)
    threshold = _highest_key(lambda t: total(jnp.where(keys >= t, weights, 0.0)) >= mass, mass)
    keep &= (keys >= threshold[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _shard_ids(logits: Float[Array, "B V"], axis: tuple[str, ...]) -> Int[Array, " V"]:
    """The vocabulary entries of this device's columns."""
    local = logits.shape[-1]
    first = jax.lax.axis_index(axis) * local if axis else 0
    return jnp.arange(local, dtype=jnp.int32) + first


def _ordered_key(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _highest_key(holds, like: Float[Array, " B"]) -> UInt32[Array, " B"]:
    """Per row, the largest key t for which holds(t[:, None]) is true; it holds for small t only."""

    def try_bit(i, t):
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate[:, None]), candidate, t)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(like.shape, jnp.uint32))


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The "lowbias32" mixer: C. Wellons, "Prospecting for Hash Functions", 2018."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
