"""Writes the packed array of a step (`packed.py` draws it) from a batch of sequences."""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.edits import MOST_EDITS
from nanovllm_jax.engine.packed import KNOWN_ROW, Column, option_width
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.sequence import Sequence

HOTTEST = 1e30  # Temperature from which on float32 makes all tokens equally likely.
LEAST_TOP_P = float(np.finfo(np.float32).tiny)  # below, float32 is 0 on the device: nothing is kept


NUM_OPTIONS = 8  # Slots of a shard whose options one call writes.
NUM_SCORED = 128  # Tokens of a shard that one call of `score_prompt` scores.


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
            # The longest contexts first: programs of `paged_decode` start in this order.
            decodes = sorted(filter(batch.decodes, shard), key=lambda i: -batch.starts[i])
            shard = [*decodes, *itertools.filterfalse(batch.decodes, shard)]
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

    def options(self, shards: list[list[Sequence]], num_words: int) -> Int32[np.ndarray, " n"]:
        """Write the options of at most NUM_OPTIONS sequences of each shard.

        Args:
            num_words: words of one option's allowed tokens.
        """
        options = np.zeros((len(shards), NUM_OPTIONS, option_width(num_words)), np.int32)
        options[:, :, 0] = self.padding_slot
        for rows, seqs in zip(options, shards, strict=True):
            for row, seq in zip(rows, seqs, strict=False):
                row[0] = seq.slot
                edits = row[1 : 1 + 4 * MOST_EDITS].reshape(4, -1)[:, : len(seq.edits)]
                if seq.edits:
                    tokens, biases, back, targets = zip(*seq.edits, strict=True)
                    edits[[0, 2, 3]] = tokens, back, targets
                    edits[1] = np.array(biases, np.float32).view(np.int32)
                if (allowed := seq.params.allowed_token_ids) is not None:
                    row[1 + 4 * MOST_EDITS :] = _bits(allowed, num_words)
        return options.ravel()

    def masks(
        self, shards: list[list[Sequence]], num_rows: int, num_words: int
    ) -> Int32[np.ndarray, " n"]:
        """Write which tokens may come next, for at most `num_rows` sequences of each shard."""
        packed = np.zeros((len(shards), num_rows, 1 + num_words), np.int32)
        packed[:, :, 0] = self.padding_slot
        for rows, seqs in zip(packed, shards, strict=True):
            for row, seq in zip(rows, seqs, strict=False):
                assert seq.matcher
                row[0] = seq.slot
                seq.matcher.write_mask(row[1:])
                if (allowed := seq.params.allowed_token_ids) is not None:
                    row[1:] &= _bits(allowed, num_words)
        return packed.ravel()

    def score_requests(self, shards: list[list[tuple[int, int]]]) -> list[Int32[np.ndarray, " n"]]:
        """Write what calls of `score_prompt` take, as many calls as it needs.

        Args:
            shards: for each shard, index among a prefill's tokens and the token that follows.
        """
        calls = []
        for start in range(0, max(map(len, shards)), NUM_SCORED):
            packed = np.zeros((len(shards), 2, NUM_SCORED), np.int32)
            for part, wanted in zip(packed, shards, strict=True):
                if wanted := wanted[start : start + NUM_SCORED]:
                    part[:, : len(wanted)] = np.array(wanted, np.int32).T
            calls.append(packed.ravel())
        return calls

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
        known = [i for i in indices if batch.decodes(i)]
        if known:
            rows[: len(known), KNOWN_ROW] = self._changes(batch, known, len(known))
            rows[: len(known), Column.START] = -1
        for row, i in zip(rows[len(known) :], indices[len(known) :], strict=False):
            row[Column.START], row[Column.LENGTH] = batch.starts[i], batch.lengths[i]
            _write(row, batch.seqs[i])
        return rows


_FLOATS = [Column.TEMPERATURE, Column.TOP_P, Column.MIN_P]
_FLOATS += [Column.PRESENCE, Column.FREQUENCY, Column.REPETITION]


def _write(row: Int32[np.ndarray, " R"], seq: Sequence) -> None:
    """Write what a row says of its sequence at any time."""
    params = seq.params
    row[Column.SLOT] = seq.slot
    row[Column.CACHED] = seq.num_cached
    seed = np.array([seq.seed], np.dtype("<u8")).view(np.int32)
    row[Column.SEED_LOW : Column.SEED_HIGH + 1] = seed
    row[Column.TOP_K] = min(params.top_k, np.iinfo(np.int32).max)
    temperature, top_p = min(params.temperature, HOTTEST), max(params.top_p, LEAST_TOP_P)
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    floats = (temperature, top_p, params.min_p, *penalties)
    row[_FLOATS] = np.array(floats, np.float32).view(np.int32)
    row[Column.PROMPT] = seq.num_prompt_tokens
    row[Column.NUM_EDITS] = len(seq.edits)
    row[Column.IS_ALLOWED_SET] = params.allowed_token_ids is not None or seq.matcher is not None
    row[Column.MIN_END] = min(seq.num_prompt_tokens + params.min_tokens, np.iinfo(np.int32).max)
    row[len(Column) : len(Column) + len(seq.block_table)] = seq.block_table


def _bits(token_ids: Collection[int], num_words: int) -> Int32[np.ndarray, " V/32"]:
    """A bit for each token, 32 a word, the lowest first."""
    bits = np.zeros(32 * num_words, bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
