"""The one int32 array that a step takes, and how the step reads it. `inputs.py` writes it.

    [ token ids of a prefill, T | row 0 | row 1 | ... ]     row = [ Column fields | block table, W ]

One array a step keeps the dispatch cheap. Floats travel as their bits.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.layers.attention import PagedBatch


class Column(IntEnum):
    """The fields of a row, ahead of its block table."""

    SLOT = 0  # row of the runner's tables: where the row's last token is kept on the device
    START = 1  # position of the row's first token in this step
    LENGTH = 2  # number of tokens that the row computes; 0 marks a padding row
    CACHED = 3  # positions below it come from the prefix cache and are not written
    SEED_LOW = 4  # the two words of a 64-bit number
    SEED_HIGH = 5
    TEMPERATURE = 6
    TOP_K = 7
    TOP_P = 8
    MIN_P = 9


class StepInputs(NamedTuple):
    """What a step computes with, unpacked on the device: T tokens in B rows."""

    token_ids: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    sample_indices: Int32[Array, " B"]  # index of each row's last token among the T
    batch: PagedBatch


def unpack(
    packed: Int32[Array, " n"],
    last_token_of_slot: Int32[Array, " slots"],
    *,
    bucket: Bucket,
    block_size: int,
) -> tuple[StepInputs, Int32[Array, "B R"]]:
    """Read a packed array; returns the step's inputs and the rows."""
    token_ids, rows = packed[: bucket.num_tokens], packed[bucket.num_tokens :]
    rows = rows.reshape(bucket.num_rows, -1)
    if bucket.is_decode:
        return _decode_inputs(rows, last_token_of_slot, block_size), rows
    return _prefill_inputs(token_ids, rows, block_size), rows


def _decode_inputs(rows, last_token_of_slot, block_size: int) -> StepInputs:
    """Each row computes one token: the one that was drawn last in its slot."""
    starts, lengths = rows[:, Column.START], rows[:, Column.LENGTH]
    every_row = jnp.arange(len(rows))
    slot_mapping = _slot_mapping(rows, every_row, starts, lengths > 0, block_size)
    batch = PagedBatch(slot_mapping, rows[:, len(Column) :], _context_lens(rows))
    token_ids = last_token_of_slot[rows[:, Column.SLOT]]
    return StepInputs(token_ids, starts, every_row, batch)


def _prefill_inputs(token_ids, rows, block_size: int) -> StepInputs:
    """Each row computes its next tokens, which follow one another in `token_ids`."""
    starts, ends = rows[:, Column.START], jnp.cumsum(rows[:, Column.LENGTH])
    query_starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    tokens = jnp.arange(len(token_ids), dtype=jnp.int32)
    row_of = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
    row_of = jnp.minimum(row_of, len(rows) - 1)
    valid = tokens < ends[-1]
    positions = jnp.where(valid, tokens - query_starts[row_of] + starts[row_of], 0)
    slot_mapping = _slot_mapping(rows, row_of, positions, valid, block_size)
    batch = PagedBatch(slot_mapping, rows[:, len(Column) :], _context_lens(rows), query_starts)
    return StepInputs(token_ids, positions, jnp.maximum(ends - 1, 0), batch)


def _slot_mapping(
    rows: Int32[Array, "B R"],
    row_of: Int32[Array, " T"],
    positions: Int32[Array, " T"],
    valid: Bool[Array, " T"],
    block_size: int,
) -> Int32[Array, " T"]:
    """Where in the cache each token's key and value are written; -1: nowhere."""
    tables = rows[:, len(Column) :]
    page = tables[row_of, jnp.minimum(positions // block_size, tables.shape[1] - 1)]
    written = valid & (positions >= rows[row_of, Column.CACHED])
    return jnp.where(written, page * block_size + positions % block_size, -1)


def _context_lens(rows: Int32[Array, "B R"]) -> Int32[Array, " B"]:
    """Tokens that each row attends to, with those of this step; 0 for a padding row."""
    return jnp.where(rows[:, Column.LENGTH] > 0, sampled_positions(rows), 0)


def seeds(rows: Int32[Array, "B R"]) -> UInt32[Array, "B 2"]:
    """The rows' random seeds, as words [low, high]."""
    words = rows[:, Column.SEED_LOW : Column.SEED_HIGH + 1]
    return jax.lax.bitcast_convert_type(words, jnp.uint32)


def floats(rows: Int32[Array, "B R"], column: Column) -> Float[Array, " B"]:
    """A column that holds float32 bits."""
    return jax.lax.bitcast_convert_type(rows[:, column], jnp.float32)


def sampled_positions(rows: Int32[Array, "B R"]) -> Int32[Array, " B"]:
    """The position that each row's new token will take."""
    return rows[:, Column.START] + rows[:, Column.LENGTH]
