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
    packed: Int32[np.ndarray | jax.Array, " n"]  # what the step takes
    slots: Int32[np.ndarray, " B"]  # what the `sample` program takes; B counts all shards' rows
    order: list[int]  # index, among the B rows, of each sequence of the batch


class Packer:
    """Packs batches. Every array is a fresh one: on a CPU it may *be* the device's buffer."""

    def __init__(self, num_slots: int, table_width: int, block_size: int):
        self.padding_slot, self.block_size = num_slots, block_size
        self.row_width = len(Column) + table_width

    def prepare(self, batch: Batch, bucket: Bucket, shards: list[list[int]]) -> PreparedBatch:
        """Write a batch, one shard after another.

        Args:
            shards: for each shard of the batch, the indices of its sequences.
        """
        pack = self._prefill_rows if batch.is_prefill else self._changes
        order, parts, slots = [0] * len(batch.seqs), [], []
        for number, shard in enumerate(shards):
            if not batch.is_prefill:
                # The longest contexts first: programs of `paged_decode` start in this order.
                shard = sorted(shard, key=lambda i: -batch.starts[i])
            rows = pack(batch, shard, bucket.num_rows)
            if batch.is_prefill:
                token_ids = np.zeros(bucket.num_tokens, np.int32)
                new = batch.token_ids(shard)
                token_ids[: len(new)] = new
                parts.append(token_ids)
            parts.append(rows.ravel())
            slots.append(rows[:, 0])
            for row, i in enumerate(shard):
                order[i] = number * bucket.num_rows + row
        return PreparedBatch(bucket, np.concatenate(parts), np.concatenate(slots), order)

    def padding(self, bucket: Bucket, num_shards: int) -> PreparedBatch:
        """A batch of nothing but padding."""
        batch = Batch.empty(is_prefill=not bucket.is_decode)
        return self.prepare(batch, bucket, [[]] * num_shards)

    def _changes(self, batch: Batch, indices: list[int], num_rows: int) -> np.ndarray:
        """What a decode step is told of some of a batch's sequences, then of padding rows."""
        changes = [
            (batch.seqs[i].slot, batch.lengths[i], self._new_block(batch, i)) for i in indices
        ]
        padding = (self.padding_slot, 0, -1)
        return np.array(changes + [padding] * (num_rows - len(changes)), np.int32)

    def _new_block(self, batch: Batch, i: int) -> int:
        """The block of the last token that a row computes, if no earlier step knew it; or -1."""
        start, size = batch.starts[i], self.block_size
        last = (start + batch.lengths[i] - 1) // size
        return batch.seqs[i].block_table[last] if last > (start - 1) // size else -1

    def _prefill_rows(self, batch: Batch, indices: list[int], num_rows: int) -> np.ndarray:
        rows = np.zeros((num_rows, self.row_width), np.int32)
        rows[len(indices) :, Column.SLOT] = self.padding_slot
        for row, i in zip(rows, indices, strict=False):
            row[Column.START], row[Column.LENGTH] = batch.starts[i], batch.lengths[i]
            _write(row, batch.seqs[i])
        return rows


def _write(row: Int32[np.ndarray, " R"], seq: Sequence) -> None:
    """Write what a row says of its sequence at any time."""
    params = seq.params
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
