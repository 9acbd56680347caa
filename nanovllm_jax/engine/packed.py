"""The one int32 array that a step takes: its layout, written with NumPy, read inside the step.

    [ token ids of a prefill, T | row 0 | row 1 | ... ]     row = [ Column fields | block table, W ]

One array a step keeps the dispatch cheap. Floats travel as their bits.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.layers.attention import PagedBatch


class Column(IntEnum):
    """The fields of a row, ahead of its block table."""

    SLOT = 0  # where the row's last token is kept on the device
    START = 1  # position of its first token in this step
    LENGTH = 2  # how many tokens it computes; 0 marks a padding row
    CACHED = 3  # positions below come from the prefix cache and are not written
    SEED = 4
    TEMPERATURE = 5
    TOP_K = 6
    TOP_P = 7
    MIN_P = 8


class RowTable:
    """One row for each slot, kept up to date on the host and copied into each step's input."""

    def __init__(self, num_slots: int, table_width: int):
        self.padding_slot = num_slots
        self.rows = np.zeros((num_slots + 1, len(Column) + table_width), np.int32)
        self.rows[num_slots, Column.SLOT] = num_slots

    def fill(self, seq: Sequence) -> None:
        """Write a newly admitted sequence's row."""
        row, params = self.rows[seq.slot], seq.params
        row[:] = 0
        row[Column.SLOT] = seq.slot
        row[Column.CACHED] = seq.num_cached
        row[Column.SEED] = np.uint32(seq.seed).view(np.int32)
        row[Column.TOP_K] = min(params.top_k, np.iinfo(np.int32).max)
        floats = (params.temperature, params.top_p, params.min_p)
        columns = [Column.TEMPERATURE, Column.TOP_P, Column.MIN_P]
        row[columns] = np.array(floats, np.float32).view(np.int32)
        row[len(Column) : len(Column) + len(seq.block_table)] = seq.block_table

    def add_block(self, seq: Sequence) -> None:
        """Write a sequence's newest block."""
        self.rows[seq.slot, len(Column) + len(seq.block_table) - 1] = seq.block_table[-1]

    def gather(
        self, slots: list[int], starts: list[int], lengths: list[int], num_rows: int
    ) -> Int32[np.ndarray, "B R"]:
        """A fresh array of these slots' rows, padded to `num_rows`.

        Fresh, because on a CPU a NumPy array given to JAX may *be* the device's buffer.
        """
        padding = num_rows - len(slots)
        rows = self.rows[slots + [self.padding_slot] * padding]
        rows[: len(slots), Column.START] = starts
        rows[: len(slots), Column.LENGTH] = lengths
        return rows


class StepInputs(NamedTuple):
    """What a step computes with, unpacked on the device. T tokens in B rows."""

    token_ids: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    last_tokens: Int32[Array, " B"]  # index, among the T, of each row's last token
    batch: PagedBatch


def unpack(
    packed: Int32[Array, " n"], last_token_of_slot: Int32[Array, " slots"], *,
    num_tokens: int, num_rows: int, block_size: int,
) -> tuple[StepInputs, Int32[Array, "B R"]]:  # fmt: skip
    """Read a packed input. `num_tokens` 0 means decode: a token a row, kept on the device."""
    token_ids, rows = packed[:num_tokens], packed[num_tokens:].reshape(num_rows, -1)
    starts, lengths = rows[:, Column.START], rows[:, Column.LENGTH]
    tables = rows[:, len(Column) :]
    if num_tokens == 0:
        token_ids = last_token_of_slot[rows[:, Column.SLOT]]
        row_of = last_tokens = jnp.arange(num_rows)
        positions, valid, query_starts = starts, lengths > 0, None
    else:
        ends = jnp.cumsum(lengths)
        query_starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        row_of = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
        row_of = jnp.minimum(row_of, num_rows - 1)
        positions = tokens - query_starts[row_of] + starts[row_of]
        valid = tokens < ends[-1]
        positions = jnp.where(valid, positions, 0)
        last_tokens = jnp.maximum(ends - 1, 0)
    page = tables[row_of, jnp.minimum(positions // block_size, tables.shape[1] - 1)]
    written = valid & (positions >= rows[row_of, Column.CACHED])
    slots = jnp.where(written, page * block_size + positions % block_size, -1)
    context_lens = jnp.where(lengths > 0, starts + lengths, 0)
    batch = PagedBatch(slots, tables, context_lens, query_starts)
    return StepInputs(token_ids, positions, last_tokens, batch), rows


def seeds(rows: Int32[Array, "B R"]) -> UInt32[Array, " B"]:
    """The rows' random seeds."""
    return jax.lax.bitcast_convert_type(rows[:, Column.SEED], jnp.uint32)


def floats(rows: Int32[Array, "B R"], column: Column) -> Float[Array, " B"]:
    """A column that holds float32 bits."""
    return jax.lax.bitcast_convert_type(rows[:, column], jnp.float32)


def sampled_positions(rows: Int32[Array, "B R"]) -> Int32[Array, " B"]:
    """The position that each row's new token will take."""
    return rows[:, Column.START] + rows[:, Column.LENGTH]
