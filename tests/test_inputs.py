"""The one array that a step takes: what the host packs is what the step reads, for any batch."""

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.inputs import RowTable
from nanovllm_jax.engine.packed import Column, floats, sampled_positions, seeds, unpack
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.sequence import Sequence

BLOCK = 4  # tokens of a block
SLOTS, WIDTH = 5, 6  # sequences at once, blocks of each at most
PREFILL, DECODE = Bucket(64, 8), Bucket(0, 6)


def pack(table, work, bucket):
    """Pack rows of (sequence, start, length) for a bucket."""
    seqs, starts, lengths = ([*column] for column in zip(*work, strict=True))
    batch = Batch(not bucket.is_decode, seqs, starts, lengths, [True] * len(seqs))
    prepared = table.prepare(batch, bucket, [[*range(len(seqs))]])
    assert prepared.bucket == bucket and prepared.order == [*range(len(seqs))]
    np.testing.assert_array_equal(prepared.packed[bucket.num_tokens :], prepared.rows.ravel())
    return prepared.packed


@functools.partial(jax.jit, static_argnames="bucket")
def read(packed, last_tokens, bucket):
    """Everything that a step reads of its packed array, by name."""
    inputs, rows = unpack(packed, last_tokens, bucket=bucket, block_size=BLOCK)
    batch = inputs.batch
    return {
        "token_ids": inputs.token_ids,
        "positions": inputs.positions,
        "sample_indices": inputs.sample_indices,
        "slot_mapping": batch.slot_mapping,
        "block_tables": batch.block_tables,
        "context_lens": batch.context_lens,
        "query_starts": batch.query_starts,
        "slot": rows[:, Column.SLOT],
        "top_k": rows[:, Column.TOP_K],
        "seed": seeds(rows),  # [low, high] words
        "temperature": floats(rows, Column.TEMPERATURE),
        "top_p": floats(rows, Column.TOP_P),
        "min_p": floats(rows, Column.MIN_P),
        "sampled_positions": sampled_positions(rows),
    }


@st.composite
def sequences(draw):
    """One to five admitted sequences of up to 20 tokens in blocks and slots of their own."""
    count = draw(st.integers(1, SLOTS))
    slots = draw(st.permutations(range(SLOTS)))
    blocks = iter(draw(st.permutations(range(SLOTS * WIDTH))))
    seqs = []
    for seq_id in range(count):
        params = SamplingParams(
            temperature=draw(st.floats(0, 10, width=32) | st.sampled_from([1e30, 1e300])),
            top_k=draw(st.one_of(st.integers(-1, 200), st.integers(2**31 - 2, 2**40))),
            top_p=draw(st.floats(0.01, 1) | st.sampled_from([1e-37, 1e-40, 1e-300])),
            min_p=draw(st.floats(0, 1)),
        )
        ids = draw(st.lists(st.integers(0, 150_000), min_size=1, max_size=20))
        seed = draw(st.integers(0, 2**64 - 1))
        seq = Sequence(seq_id, ids, params, seed=seed, max_tokens=1)
        seq.slot = slots[seq_id]
        seq.block_table = [next(blocks) for _ in range(-(-len(ids) // BLOCK))]
        seq.num_cached = BLOCK * draw(st.integers(0, len(ids) // BLOCK))
        seqs.append(seq)
    return seqs


def check_row(got, i, seq, start, length):
    """What row i says of its sequence, beside the tokens."""
    assert got["slot"][i] == seq.slot
    assert got["context_lens"][i] == got["sampled_positions"][i] == start + length
    assert got["block_tables"][i].tolist()[: len(seq.block_table)] == seq.block_table
    low, high = map(int, got["seed"][i])
    assert (high << 32) + low == seq.seed
    assert got["top_k"][i] == min(seq.params.top_k, 2**31 - 1)
    # What is beyond float32's range stands for its nearest number that computes alike.
    assert got["temperature"][i] == np.float32(min(seq.params.temperature, 1e30))
    assert got["top_p"][i] == max(np.float32(seq.params.top_p), np.finfo(np.float32).tiny)
    assert got["min_p"][i] == np.float32(seq.params.min_p)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seqs=sequences(), data=st.data())
def test_a_packed_prefill_is_read_back(seqs, data):
    table, work, room = RowTable(SLOTS, WIDTH, BLOCK), [], PREFILL.num_tokens
    for seq in seqs:
        start = data.draw(st.integers(0, seq.num_tokens - 1), label="start")
        length = data.draw(st.integers(1, seq.num_tokens - start), label="length")
        if length <= room:
            work.append((seq, start, length))
            room -= length
    got = read(pack(table, work, PREFILL), np.zeros(SLOTS + 1, np.int32), PREFILL)
    got = {name: np.asarray(value) for name, value in got.items()}
    token = 0
    for i, (seq, start, length) in enumerate(work):
        check_row(got, i, seq, start, length)
        assert got["query_starts"][i] == token
        for position in range(start, start + length):
            assert got["token_ids"][token] == seq.token_ids[position]
            assert got["positions"][token] == position
            block = seq.block_table[position // BLOCK]
            place = block * BLOCK + position % BLOCK
            # A cached token may be computed again, but is never written again.
            assert got["slot_mapping"][token] == (place if position >= seq.num_cached else -1)
            token += 1
        assert got["sample_indices"][i] == token - 1
    assert np.all(got["query_starts"][len(work) :] == token)
    assert np.all(got["slot_mapping"][token:] == -1), "padding is written nowhere"
    assert np.all(got["context_lens"][len(work) :] == 0)
    assert np.all(got["slot"][len(work) :] == SLOTS), "padding samples into a slot of its own"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seqs=sequences(), data=st.data())
def test_a_packed_decode_takes_its_tokens_from_the_device(seqs, data):
    table, work = RowTable(SLOTS, WIDTH, BLOCK), []
    pack(table, [(seq, 0, seq.num_tokens) for seq in seqs], Bucket(SLOTS * 20, SLOTS))
    for block, seq in enumerate(seqs, start=SLOTS * WIDTH):
        if seq.num_tokens % BLOCK == 0:  # the next token begins a block
            seq.block_table.append(block)
        if data.draw(st.booleans(), label="decodes") or not work:
            work.append((seq, seq.num_tokens, 1))
    last_tokens = np.arange(100, 100 + SLOTS + 1, dtype=np.int32)
    got = read(pack(table, work, DECODE), last_tokens, DECODE)
    assert got.pop("query_starts") is None
    got = {name: np.asarray(value) for name, value in got.items()}
    for i, (seq, position, _) in enumerate(work):
        check_row(got, i, seq, position, 1)
        assert got["token_ids"][i] == 100 + seq.slot
        assert got["positions"][i] == position and got["sample_indices"][i] == i
        place = seq.block_table[position // BLOCK] * BLOCK + position % BLOCK
        assert got["slot_mapping"][i] == place
    assert np.all(got["slot_mapping"][len(work) :] == -1)
    assert np.all(got["context_lens"][len(work) :] == 0)
    assert np.all(got["slot"][len(work) :] == SLOTS)


def test_a_reused_row_keeps_nothing_of_its_last_sequence():
    used, fresh = (RowTable(num_slots=1, table_width=4, block_size=BLOCK) for _ in range(2))
    seq = Sequence(0, [1] * 16, SamplingParams(top_k=3), seed=1, max_tokens=1)
    seq.slot, seq.block_table = 0, [4, 5, 6, 7]
    other = Sequence(1, [1], SamplingParams(temperature=0), seed=0, max_tokens=1)
    other.slot, other.block_table = 0, [9]
    pack(used, [(seq, 0, 16)], PREFILL)
    packed = [pack(table, [(other, 0, 1)], PREFILL) for table in (used, fresh)]
    np.testing.assert_array_equal(*packed)


def test_shards_are_packed_one_after_another():
    """Each shard's part is what it would be alone, and `order` finds the rows again."""
    seqs = []
    for slot, length in enumerate((3, 7, 1, 5)):
        seq = Sequence(slot, [10 * slot + i for i in range(length)], SamplingParams(), slot, 1)
        seq.slot, seq.block_table = slot, [slot, 9]
        seqs.append(seq)
    batch = Batch(True, seqs, [0] * 4, [3, 7, 1, 5], [True] * 4)
    table = RowTable(SLOTS, WIDTH, BLOCK)
    shards, bucket = [[0, 2, 3], [1]], Bucket(16, 4)
    whole = table.prepare(batch, bucket, shards)
    assert whole.order == [0, 4, 1, 2]
    alone = [pack(table, [(seqs[i], 0, batch.lengths[i]) for i in s], bucket) for s in shards]
    np.testing.assert_array_equal(whole.packed, np.concatenate(alone))


def test_a_batch_of_padding_is_written_nowhere():
    table = RowTable(SLOTS, WIDTH, BLOCK)
    for bucket in (PREFILL, DECODE):
        packed = table.padding(bucket, num_shards=1).packed
        got = read(packed, np.zeros(SLOTS + 1, np.int32), bucket)
        assert np.all(np.asarray(got["slot_mapping"]) == -1)
        assert np.all(np.asarray(got["slot"]) == SLOTS)
