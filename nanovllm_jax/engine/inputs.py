"""Writes the packed array of a step (`packed.py` draws it) from a batch of sequences."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.packed import Column
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.sequence import Sequence

HOTTEST = 1e30  # Temperature from which on float32 makes all tokens equally likely.
LEAST_TOP_P = float(np.finfo(np.float32).tiny)  # below, float32 is 0 on the device: nothing is kept


class PreparedBatch(NamedTuple):
    """A batch in the form that the compiled programs take."""

    bucket: Bucket
    rows: Int32[np.ndarray, "B R"]  # what the `sample` program takes; B counts all shards' rows
    packed: Int32[np.ndarray | jax.Array, " n"]  # what the step takes
    order: list[int]  # index, among the B rows, of each sequence of the batch


class RowTable:
    """One row for each slot, kept up to date on the host and copied into each step's array."""

    def __init__(self, num_slots: int, table_width: int, block_size: int):
        self.padding_slot, self.block_size = num_slots, block_size
        self.rows = np.zeros((num_slots + 1, len(Column) + table_width), np.int32)
        self.rows[num_slots, Column.SLOT] = num_slots

    def prepare(self, batch: Batch, bucket: Bucket, shards: list[list[int]]) -> PreparedBatch:
        """Write a batch, one shard after another.

        Args:
            shards: for each shard of the batch, the indices of its sequences.
        """
        rows, packed, order = [], [], [0] * len(batch.seqs)
        for number, shard in enumerate(shards):
            part = self._rows_of(batch, shard, bucket.num_rows)
            token_ids = np.zeros(bucket.num_tokens, np.int32)
            if batch.is_prefill:
                new = batch.token_ids(shard)
                token_ids[: len(new)] = new
            rows.append(part)
            packed += [token_ids, part.ravel()]
            for row, i in enumerate(shard):
                order[i] = number * bucket.num_rows + row
        return PreparedBatch(bucket, np.concatenate(rows), np.concatenate(packed), order)

    def padding(self, bucket: Bucket, num_shards: int) -> PreparedBatch:
        """A batch of nothing but padding."""
        return self.prepare(Batch.empty(), bucket, [[]] * num_shards)

    def _rows_of(self, batch: Batch, indices: list[int], num_rows: int) -> np.ndarray:
        """The rows of some of a batch's sequences, brought up to date, then padding rows.

        It is a fresh array: on a CPU a NumPy array given to JAX may *be* the device's buffer.
        """
        for i in indices:
            seq = batch.seqs[i]
            if batch.is_prefill:
                self._write_row(seq)
            elif batch.starts[i] % self.block_size == 0:
                self._write_last_block(seq)
        slots = [batch.seqs[i].slot for i in indices]
        rows = self.rows[slots + [self.padding_slot] * (num_rows - len(slots))]
        rows[: len(slots), Column.START] = [batch.starts[i] for i in indices]
        rows[: len(slots), Column.LENGTH] = [batch.lengths[i] for i in indices]
        return rows

    def _write_row(self, seq: Sequence) -> None:
        row, params = self.rows[seq.slot], seq.params
        row[:] = 0
        row[Column.SLOT] = seq.slot
        row[Column.CACHED] = seq.num_cached
        seed = np.array([seq.seed], np.dtype("<u8")).view(np.int32)
        row[Column.SEED_LOW : Column.SEED_HIGH + 1] = seed
        row[Column.TOP_K] = min(params.top_k, np.iinfo(np.int32).max)
        temperature, top_p = min(params.temperature, HOTTEST), max(params.top_p, LEAST_TOP_P)
        floats = (temperature, top_p, params.min_p)
        columns = [Column.TEMPERATURE, Column.TOP_P, Column.MIN_P]
        row[columns] = np.array(floats, np.float32).view(np.int32)
        row[len(Column) : len(Column) + len(seq.block_table)] = seq.block_table

    def _write_last_block(self, seq: Sequence) -> None:
        self.rows[seq.slot, len(Column) + len(seq.block_table) - 1] = seq.block_table[-1]
