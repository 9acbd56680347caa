"""Changes logits before sampling as requests ask: allowed tokens, biases, bans, penalties.

The order is vLLM's: what is not allowed falls away, then single logits are edited, then tokens that
have occurred are penalized. A neutral row keeps its logits bit by bit.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from nanovllm_jax.layers.sampler import shard_ids

SEEN = 1 << 24  # Mark of a token that is in the prompt, above every count of the output's tokens.


class History(NamedTuple):
    """The tokens of B rows by position."""

    token_ids: Int32[Array, "B N"]
    lengths: Int32[Array, " B"]  # tokens that are there; those behind mean nothing
    prompt_lengths: Int32[Array, " B"]


class Penalties(NamedTuple):
    """What tokens that have occurred cost; 0, 0 and 1 cost nothing."""

    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]


class Edits(NamedTuple):
    """Changes of single logits: E entries a row, as `engine.edits` explains."""

    tokens: Int32[Array, "B E"]
    biases: Float[Array, "B E"]
    back: Int32[Array, "B E"]
    targets: Int32[Array, "B E"]
    counts: Int32[Array, " B"]  # entries that are there; those behind mean nothing
    min_ends: Int32[Array, " B"]  # position from which on the tokens that end a request may come


class AllowedTokens(NamedTuple):
    """Which tokens may be drawn: bit i % 32 of word i // 32 allows token i."""

    words: Int32[Array, "B V/32"]
    is_set: Bool[Array, " B"]  # rows that have none allow all


def edit_logits(
    logits: Float[Array, "B V"],
    history: History,
    allowed: AllowedTokens,
    edits: Edits,
    penalties: Penalties,
    *,
    axis: tuple[str, ...] = (),
) -> Float[Array, "B V"]:
    """Apply all changes. `logits` is this device's shard of the vocabulary over mesh axes `axis`.

    The rest of the arguments is the same on each of them.
    """
    ids = shard_ids(logits, axis)
    logits = jnp.where(_is_allowed(allowed, ids), logits, -jnp.inf)
    columns = _columns(edits.tokens, applying(edits, history), ids)
    logits = _at(logits, columns).add(edits.biases, mode="drop")
    return penalize(logits, history, penalties, axis=axis)


def applying(edits: Edits, history: History) -> Bool[Array, "B E"]:
    """Which of the edits change a logit of the token that is drawn now."""
    there = jnp.arange(edits.tokens.shape[1]) < edits.counts[:, None]
    positions = history.lengths[:, None] - edits.back
    found = jnp.take_along_axis(
        history.token_ids, jnp.clip(positions, 0, history.token_ids.shape[1] - 1), axis=1
    )
    matches = (positions >= history.prompt_lengths[:, None]) & (found == edits.tokens)
    missing = there & (edits.back > 0) & ~matches
    misses = _at(jnp.zeros_like(edits.tokens), edits.targets).add(
        missing.astype(jnp.int32), mode="drop"
    )
    until_min_tokens = (edits.back < 0) & (history.lengths < edits.min_ends)[:, None]
    return there & (misses == 0) & ((edits.back == 0) | until_min_tokens)


def penalize(
    logits: Float[Array, "B V"],
    history: History,
    penalties: Penalties,
    *,
    axis: tuple[str, ...] = (),
) -> Float[Array, "B V"]:
    """Penalize tokens that have occurred, by vLLM's formulas.

    Tokens of prompt and output: a positive logit is divided by `repetition`, a negative one
    multiplied (arXiv:1909.05858). Tokens of the output: `frequency` is subtracted for each time
    that one has occurred, and `presence` once.
    """
    ids = shard_ids(logits, axis)
    positions = jnp.arange(history.token_ids.shape[1])
    of_prompt = positions < history.prompt_lengths[:, None]
    of_output = ~of_prompt & (positions < history.lengths[:, None])
    repeats = penalties.repetition != 1
    counts = (penalties.presence != 0) | (penalties.frequency != 0)
    # Rows without penalties count nothing: their entries fall outside of the table.
    of_prompt &= repeats[:, None]
    of_output &= (repeats | counts)[:, None]
    table = jnp.zeros(logits.shape, jnp.int32)
    table = _at(table, _columns(history.token_ids, of_prompt, ids)).set(SEEN, mode="drop")
    table = _at(table, _columns(history.token_ids, of_output, ids)).add(1, mode="drop")

    repetition = jnp.where(repeats, penalties.repetition, 1.0)[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(table > 0, penalized, logits)
    times = table & (SEEN - 1)
    logits -= penalties.frequency[:, None] * times
    return logits - jnp.where(times > 0, penalties.presence[:, None], 0.0)


def _is_allowed(allowed: AllowedTokens, ids: Int[Array, " V"]) -> Bool[Array, "B V"]:
    words = jnp.take(allowed.words, ids >> 5, axis=1, mode="clip")
    return (((words >> (ids & 31)) & 1) == 1) | ~allowed.is_set[:, None]


def _columns(
    tokens: Int32[Array, "B N"], chosen: Bool[Array, "B N"], ids: Int[Array, " V"]
) -> Int32[Array, "B N"]:
    """The chosen tokens' columns on this device; past the last for all others, to be dropped."""
    columns = tokens - ids[0]
    return jnp.where(chosen & (columns >= 0), columns, len(ids))


def _at(x: Array, columns: Int32[Array, "B N"]):
    return x.at[jnp.arange(len(x))[:, None], columns]
