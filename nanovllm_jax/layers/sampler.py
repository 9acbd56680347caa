"""Sampling on the device, over a vocabulary that may be sharded: full logits are never gathered.

A token is the arg max of logits + temperature * Gumbel noise (the Gumbel-max trick: the same
distribution as softmax(logits / temperature), and greedy decoding at temperature 0). The noise is
a hash of (request seed, token position, vocabulary entry), so a sample depends on nothing else:
not on the batch, its order, the step or the mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt32

from pallas_kernels import draw, filter_thresholds, gumbel, random_bits, stream_words


def gumbel_noise(
    seeds: UInt32[Array, "B 2"], positions: Int[Array, " B"], vocab_ids: Int[Array, " V"]
) -> Float[Array, "B V"]:
    """Standard Gumbel noise from a counter-based hash (see `pallas_kernels.draw`).

    Args:
        seeds: 64 bits a row, as words [low, high].
    """
    words = stream_words(seeds[:, 0], seeds[:, 1], positions)
    return gumbel(random_bits([word[:, None] for word in words], vocab_ids[None, :]))


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

    def on_gpu(logits, temperatures, seeds, positions):
        first_id = jax.lax.axis_index(axis) * logits.shape[1] if axis else None
        return draw(
            logits, temperatures, seeds, positions, first_id,
            vocab_size=vocab_size, interpret=False,
        )  # fmt: skip

    def anywhere(logits, temperatures, seeds, positions):
        ids = shard_ids(logits, axis)

        def noise():
            return temperatures[:, None] * gumbel_noise(seeds, positions, ids)

        # Where all rows are greedy there is no noise: on a CPU it would take as long as a layer of
        # a small model.
        greedy = (temperatures == 0).all()
        zeros = jnp.zeros(logits.shape, jnp.float32)
        scores = logits + jax.lax.cond(greedy, lambda: zeros, noise)
        scores = jnp.where(ids[None, :] < vocab_size, scores, -jnp.inf)
        best = jnp.argmax(scores, axis=-1)
        score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
        return score, ids[0] + best.astype(jnp.int32)

    score, token = jax.lax.platform_dependent(
        logits, temperatures, seeds, positions, cuda=on_gpu, default=anywhere
    )
    if not axis:
        return token
    if largest_key:
        order = jax.lax.bitcast_convert_type(_ordered_key(score), jnp.int32)
        return ~largest_key(jnp.stack([~token, order], axis=-1))[:, 0]  # ~: the lowest token wins
    shards, tokens = jax.lax.all_gather((score, token), axis)  # [shards, B] each
    winner = jnp.argmax(shards, axis=0)  # the first of equals: the lowest token id
    return jnp.take_along_axis(tokens, winner[None, :], axis=0)[0]


def filter_and_sample(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    seeds: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    *,
    vocab_size: int,
    axis: tuple[str, ...] = (),
    total: Callable[[Float[Array, "B N"]], Float[Array, "B N"]] | None = None,
    largest_key: Callable[[Int32[Array, "B 2"]], Int32[Array, "B 2"]] | None = None,
) -> Int[Array, " B"]:
    """One token a row of those that the filters keep: `filter_logits`, then `sample`.

    A GPU that has the whole vocabulary does not write the logits that are left, but finds the
    lowest of them and draws from those that reach it.
    """

    def on_gpu(logits, temperatures, top_k, top_p, min_p, seeds, positions):
        options = {"vocab_size": vocab_size, "interpret": False}
        lowest = filter_thresholds(logits, temperatures, top_k, top_p, min_p, **options)
        return draw(logits, temperatures, seeds, positions, thresholds=lowest, **options)[1]

    def anywhere(logits, temperatures, top_k, top_p, min_p, seeds, positions):
        logits = filter_logits(
            logits, temperatures, top_k, top_p, min_p,
            vocab_size=vocab_size, axis=axis, total=total, largest_key=largest_key,
        )  # fmt: skip
        return sample(
            logits, temperatures, seeds, positions,
            vocab_size=vocab_size, axis=axis, largest_key=largest_key,
        )  # fmt: skip

    args = logits, temperatures, top_k, top_p, min_p, seeds, positions
    if axis:
        return anywhere(*args)
    return jax.lax.platform_dependent(*args, cuda=on_gpu, default=anywhere)


def filter_logits(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    vocab_size: int,
    axis: tuple[str, ...] = (),
    total: Callable[[Float[Array, "B N"]], Float[Array, "B N"]] | None = None,
    largest_key: Callable[[Int32[Array, "B 2"]], Int32[Array, "B 2"]] | None = None,
    bits: int | None = None,
) -> Float[Array, "B V"]:
    """Set to -inf what min_p, top_k and then top_p drop, in vLLM's order.

    Each filter keeps the logits above some threshold. It is found without sorting and exactly,
    as an unsigned integer in the order of the floats: each pass over the logits tells its next few
    bits. Logits that equal the threshold are all kept.

    Args:
        top_k: 0 or less keeps all.
        top_p: in (0, 1], and no subnormal number; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        total: the sum over `axis`, the same on every device; without it XLA's.
        largest_key: the maximum over `axis` of unsigned 64-bit integers, as words [low, high];
            without it XLA takes the maximum.
        bits: how many bits of a threshold a pass finds. Default: 1 on a CPU, whose passes are bound
            by arithmetic; elsewhere 3, for a third of the reads and exchanges.
    """
    if total is None:
        total = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x

    def threshold(weights, wanted):
        find = functools.partial(_highest_key, keys, weights, wanted, total)
        if bits is not None:
            return find(bits)
        return jax.lax.platform_dependent(cpu=lambda: find(1), default=lambda: find(3))

    ids = shard_ids(logits, axis)
    logits = jnp.where(ids[None, :] < vocab_size, logits, -jnp.inf)
    keys = _ordered_key(logits)
    largest = largest_of(jnp.max(logits, axis=-1), axis, largest_key)
    scale = 1 / jnp.maximum(temperatures, 1e-6)
    weights = jnp.exp((logits - largest[:, None]) * scale[:, None])  # likeliest = 1

    wanted = jnp.where(top_k > 0, top_k, vocab_size).astype(jnp.float32)
    keep = (keys >= threshold(1.0, wanted)[:, None]) & (weights >= min_p[:, None])

    weights = jnp.where(keep, weights, 0.0)
    mass = jnp.where(top_p < 1, top_p, 0) * total(jnp.sum(weights, axis=-1, keepdims=True))[:, 0]
    keep &= (keys >= threshold(weights, mass)[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _highest_key(
    keys: UInt32[Array, "B V"],
    weights: Float[Array, "B V"] | float,
    wanted: Float[Array, " B"],
    total: Callable[[Float[Array, "B N"]], Float[Array, "B N"]],
    bits: int,
) -> UInt32[Array, " B"]:
    """Per row, the largest t for which the total weight of the keys >= t is at least `wanted`.

    It is found from its highest bits down, like the digits of a long division: a pass sums up
    above every value that the next `bits` bits can have, and takes the largest that suffices.
    """

    def add(sums, more):
        return tuple(a + b for a, b in zip(sums, more, strict=True))

    def find_digit(i, t):
        shift = jnp.maximum(32 - bits * (i + 1), 0).astype(jnp.uint32)  # the last may overlap
        candidates = [t | (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits)]
        above = tuple(jnp.where(keys >= c[:, None], weights, 0.0) for c in candidates)
        # A single reduction of several arrays, for XLA to read keys and weights only once.
        sums = jax.lax.reduce(above, (jnp.float32(0),) * len(above), add, (1,))
        enough = total(jnp.stack(sums, axis=-1)) >= wanted[:, None]
        return functools.reduce(
            jnp.maximum, (jnp.where(enough[:, j], c, t) for j, c in enumerate(candidates))
        )

    return jax.lax.fori_loop(0, -(-32 // bits), find_digit, jnp.zeros(wanted.shape, jnp.uint32))


def largest_of(x: Float[Array, " B"], axis: tuple[str, ...], largest_key) -> Float[Array, " B"]:
    """The maximum over `axis`, by `largest_key` if there is one."""
    if not largest_key:
        return jax.lax.pmax(x, axis) if axis else x
    order = jax.lax.bitcast_convert_type(_ordered_key(x), jnp.int32)
    order = largest_key(jnp.stack([order, order], axis=-1))[:, 1]
    bits = jax.lax.bitcast_convert_type(order, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits >= sign, bits ^ sign, ~bits)  # `_ordered_key` undone
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def shard_ids(logits: Float[Array, "B V"], axis: tuple[str, ...]) -> Int[Array, " V"]:
    """The vocabulary entries of this device's columns."""
    local = logits.shape[-1]
    first = jax.lax.axis_index(axis) * local if axis else 0
    return jnp.arange(local, dtype=jnp.int32) + first


def _ordered_key(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats; 0.0 and -0.0 get the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
