"""The one int32 array that a step takes, and how the step reads it. `inputs.py` writes it.

    prefill: [ token ids, T | row 0 | row 1 | ... ]     row = [ Column fields | block table, W ]
    decode:  [ change 0 | change 1 | ... ]              change = [ Change fields ]

A prefill brings whole rows. They stay on the device, one for each slot, and every step brings its
own up to date; so a decode step only has to be told which slots it is for, and of new blocks. One
array a step keeps the dispatch cheap. Floats travel as their bits. A mixed step's array is that of
a prefill, in which the rows of sequences that decode come first, have START -1, and say no more
than a change does (`KNOWN_ROW`).

What few requests have, and what is long, has tables of its own, which only `sample_all` reads. A
small program writes them, when such a request has been given its slot:

    options: [ option 0 | option 1 | ... ]     option = [ slot | edits, 4 E | allowed tokens, V/32 ]
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.edits import MOST_EDITS
from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.logit_edits import AllowedTokens, Edits, History, Penalties


class Column(IntEnum):
    """The fields of a row, ahead of its block table."""

    SLOT = 0  # where the row is kept on the device
    START = 1  # tokens computed so far, which is the position of the next one
    LENGTH = 2  # tokens that the row computes in this call; 0 marks a padding row
    LAST_TOKEN = 3  # the token that was drawn last, which is the next one to compute
    CACHED = 4  # positions below it come from the prefix cache and are not written
    SEED_LOW = 5  # the two words of a 64-bit number
    SEED_HIGH = 6
    TEMPERATURE = 7
    TOP_K = 8
    TOP_P = 9
    MIN_P = 10
    PROMPT = 11  # tokens of the prompt
    NUM_EDITS = 12  # entries of the slot's edits
    IS_ALLOWED_SET = 13  # 1: the slot's allowed tokens count; 0: every token is allowed
    MIN_END = 14  # position from which on a token may end the request
    PRESENCE = 15
    FREQUENCY = 16
    REPETITION = 17


class Change(IntEnum):
    """The fields of what a decode step is told of a row."""

    SLOT = 0
    LENGTH = 1  # tokens to compute in this call, one after another; 0 marks a padding row
    NEW_BLOCK = 2  # the block of the last of them, if it is new; or -1


# Where the fields of a change lie in a row of a mixed step's array that decodes.
KNOWN_ROW = [Column.SLOT, Column.LENGTH, Column.CACHED]


class StepInputs(NamedTuple):
    """What a step computes with: T tokens in B rows."""

    token_ids: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    sample_indices: Int32[Array, " B"]  # index of each row's last token among the T
    batch: PagedBatch


class Sampling(NamedTuple):
    """How the tokens of B rows are drawn."""

    temperatures: Float[Array, " B"]
    seeds: UInt32[Array, "B 2"]  # as words [low, high]
    top_k: Int32[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]


class DecodeRows(NamedTuple):
    """What all steps of a decode call read of their rows; see `Column`."""

    starts: Int32[Array, " B"]
    lengths: Int32[Array, " B"]
    block_tables: Int32[Array, "B W"]
    sampling: Sampling


def read_prefill(
    packed: Int32[Array, " n"], bucket: Bucket
) -> tuple[Int32[Array, " T"], Int32[Array, "B R"]]:
    """The token ids and the rows of a prefill's packed array."""
    token_ids, rows = packed[: bucket.num_tokens], packed[bucket.num_tokens :]
    return token_ids, rows.reshape(bucket.num_rows, -1)


def read_decode(
    packed: Int32[Array, " n"], table: Int32[Array, "slots R"], block_size: int
) -> Int32[Array, "B R"]:
    """The rows of a decode call: those of the table, with the changes of a packed array."""
    return _changed(table, packed.reshape(-1, len(Change)), block_size)


def read_mixed(
    rows: Int32[Array, "B R"], table: Int32[Array, "slots R"], block_size: int
) -> tuple[Int32[Array, "B R"], Bool[Array, " B"]]:
    """The rows of a mixed step, all of them whole; and which of them decode."""
    decodes = rows[:, Column.START] < 0
    known = _changed(table, jnp.stack([rows[:, c] for c in KNOWN_ROW], axis=1), block_size)
    return jnp.where(decodes[:, None], known, rows), decodes


def _changed(
    table: Int32[Array, "slots R"], changes: Int32[Array, "B 3"], block_size: int
) -> Int32[Array, "B R"]:
    """The rows of the table that changes are for, with these."""
    slots, lengths, new_blocks = changes.T
    rows = table.at[slots].get(mode="promise_in_bounds")
    last_block = len(Column) + (rows[:, Column.START] + lengths - 1) // block_size
    is_new = (_columns(rows) == last_block[:, None]) & (new_blocks >= 0)[:, None]
    rows = jnp.where(is_new, new_blocks[:, None], rows)
    # The row of a padding slot has never been written.
    return _replace(rows, {Column.SLOT: slots, Column.LENGTH: lengths})


def advanced(rows: Int32[Array, "B R"], last_tokens: Int32[Array, " B"]) -> Int32[Array, "B R"]:
    """The rows after a call, with the tokens that were drawn last."""
    ends = rows[:, Column.START] + rows[:, Column.LENGTH]
    none_left = jnp.zeros_like(ends)
    return _replace(
        rows, {Column.START: ends, Column.LENGTH: none_left, Column.LAST_TOKEN: last_tokens}
    )


def sampling_of(rows: Int32[Array, "B R"]) -> Sampling:
    """The sampling options of rows."""

    seeds = rows[:, Column.SEED_LOW : Column.SEED_HIGH + 1]
    return Sampling(
        _floats(rows, Column.TEMPERATURE),
        jax.lax.bitcast_convert_type(seeds, jnp.uint32),
        rows[:, Column.TOP_K],
        _floats(rows, Column.TOP_P),
        _floats(rows, Column.MIN_P),
    )


def penalties_of(rows: Int32[Array, "B R"]) -> Penalties:
    """What tokens that have occurred cost, of rows."""
    return Penalties(
        *(_floats(rows, c) for c in (Column.PRESENCE, Column.FREQUENCY, Column.REPETITION))
    )


def history_of(rows: Int32[Array, "B R"], known: Int32[Array, "P+1 S"]) -> History:
    """The tokens of rows that have been computed.

    Args:
        rows: as they are after the step, so that START is the position of the next token.
        known: the tokens that the cache holds.
    """
    token_ids = known.at[rows[:, len(Column) :]].get(mode="promise_in_bounds")
    return History(token_ids.reshape(len(rows), -1), rows[:, Column.START], rows[:, Column.PROMPT])


def edits_of_rows(rows: Int32[Array, "B R"], table: Int32[Array, "slots 4*E"]) -> Edits:
    """The edits of rows, from the table of all slots."""
    entries = table.at[rows[:, Column.SLOT]].get(mode="promise_in_bounds")
    tokens, biases, back, targets = jnp.split(entries, 4, axis=1)
    biases = jax.lax.bitcast_convert_type(biases, jnp.float32)
    counts, min_ends = rows[:, Column.NUM_EDITS], rows[:, Column.MIN_END]
    return Edits(tokens, biases, back, targets, counts, min_ends)


def allowed_of_rows(rows: Int32[Array, "B R"], table: Int32[Array, "slots V/32"]) -> AllowedTokens:
    """Which tokens rows may draw, from the table of all slots."""
    words = table.at[rows[:, Column.SLOT]].get(mode="promise_in_bounds")
    return AllowedTokens(words, rows[:, Column.IS_ALLOWED_SET] == 1)


def read_options(
    packed: Int32[Array, " n"], num_words: int
) -> tuple[Int32[Array, " N"], Int32[Array, "N 4*E"], Int32[Array, "N V/32"]]:
    """The slots, edits and allowed tokens of a packed array of options.

    Args:
        num_words: words of one option's allowed tokens.
    """
    options = packed.reshape(-1, option_width(num_words))
    slots, edits, words = jnp.split(options, [1, 1 + 4 * MOST_EDITS], axis=1)
    return slots[:, 0], edits, words


def read_masks(
    packed: Int32[Array, " n"], num_words: int
) -> tuple[Int32[Array, " N"], Int32[Array, "N V/32"]]:
    """The slots and allowed tokens of a packed array of masks: [ slot | allowed tokens, V/32 ]."""
    masks = packed.reshape(-1, 1 + num_words)
    return masks[:, 0], masks[:, 1:]


def option_width(num_words: int) -> int:
    """Integers of one option; see `read_options`."""
    return 1 + 4 * MOST_EDITS + num_words


def decode_rows(rows: Int32[Array, "B R"]) -> DecodeRows:
    """Take rows apart, once for all steps of a decode call."""
    starts, lengths = rows[:, Column.START], rows[:, Column.LENGTH]
    return DecodeRows(starts, lengths, rows[:, len(Column) :], sampling_of(rows))


def prefill_inputs(
    token_ids: Int32[Array, " T"],
    rows: Int32[Array, "B R"],
    block_size: int,
    decodes: Bool[Array, " B"] | None = None,
) -> StepInputs:
    """Each row computes all of its tokens, which follow one another in `token_ids`.

    Args:
        decodes: which rows compute the one token that was drawn last; they are the first ones.
    """
    starts, lengths = rows[:, Column.START], rows[:, Column.LENGTH]
    ends = jnp.cumsum(lengths)
    query_starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    tokens = jnp.arange(len(token_ids), dtype=jnp.int32)
    row_of = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
    row_of = jnp.minimum(row_of, len(rows) - 1)
    valid = tokens < ends[-1]
    positions = jnp.where(valid, tokens - query_starts[row_of] + starts[row_of], 0)
    written = valid & (positions >= rows[row_of, Column.CACHED])
    tables = rows[:, len(Column) :]
    slot_mapping = _slot_mapping(tables, row_of, positions, written, block_size)
    context_lens = jnp.where(lengths > 0, starts + lengths, 0)
    batch = PagedBatch(slot_mapping, tables, context_lens, query_starts)
    if decodes is not None:
        drawn = jnp.where(decodes, rows[:, Column.LAST_TOKEN], token_ids[: len(rows)])
        token_ids = token_ids.at[: len(rows)].set(drawn)
        batch = batch._replace(
            query_starts=jnp.maximum(query_starts, decodes.sum(dtype=jnp.int32)),
            decode_lens=jnp.where(decodes, context_lens, 0),
        )
    return StepInputs(token_ids, positions, jnp.maximum(ends - 1, 0), batch)


def decode_inputs(
    rows: DecodeRows,
    last_tokens: Int32[Array, " B"],
    step: Int32[Array, ""] | int,
    block_size: int,
) -> StepInputs:
    """Each row computes the token that was drawn last, if it has so many to compute.

    Args:
        step: number of the decode step within the call.
    """
    positions, goes_on = rows.starts + step, step < rows.lengths
    slot_mapping = decoded_slots(rows, step, block_size)
    batch = PagedBatch(slot_mapping, rows.block_tables, jnp.where(goes_on, positions + 1, 0))
    return StepInputs(last_tokens, positions, jnp.arange(len(positions)), batch)


def decoded_slots(
    rows: DecodeRows, steps: Int32[Array, "*steps 1"] | Int32[Array, ""] | int, block_size: int
) -> Int32[Array, "*steps B"]:
    """The slot mapping of some of a call's decode steps."""
    every_row, goes_on = jnp.arange(len(rows.starts)), steps < rows.lengths
    positions = rows.starts + steps
    return _slot_mapping(rows.block_tables, every_row, positions, goes_on, block_size)


def _slot_mapping(
    block_tables: Int32[Array, "B W"],
    row_of: Int32[Array, " T"],
    positions: Int32[Array, "*steps T"],
    written: Bool[Array, "*steps T"],
    block_size: int,
) -> Int32[Array, "*steps T"]:
    """Where in the cache each token's key and value are written; -1: nowhere."""
    page = block_tables[row_of, jnp.minimum(positions // block_size, block_tables.shape[1] - 1)]
    return jnp.where(written, page * block_size + positions % block_size, -1)


def _replace(
    rows: Int32[Array, "B R"], values: dict[Column, Int32[Array, " B"]]
) -> Int32[Array, "B R"]:
    """The rows with other values in some columns, in one pass; scatters would be a kernel each."""
    for column, value in values.items():
        rows = jnp.where(_columns(rows) == column, value[:, None], rows)
    return rows


def _floats(rows: Int32[Array, "B R"], column: Column) -> Float[Array, " B"]:
    return jax.lax.bitcast_convert_type(rows[:, column], jnp.float32)


def _columns(rows: Int32[Array, "B R"]) -> Int32[Array, "1 R"]:
    return jnp.arange(rows.shape[1])[None, :]
