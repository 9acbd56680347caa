"""The one array that a step takes: what the host packs is what steps read, for any batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import packed as device
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.edits import Edit
from nanovllm_jax.engine.inputs import NUM_OPTIONS, NUM_SCORED, Packer
from nanovllm_jax.engine.packed import Column
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.sequence import Sequence

BLOCK = 4  # tokens of a block
SLOTS, WIDTH = 5, 6  # sequences at once, blocks of each at most
BIASES = [1.5, -np.inf, 0.0]
PREFILL, DECODE, MIXED = Bucket(64, 8), Bucket(0, 6), Bucket(64, 8, is_mixed=True)


def pack(work, bucket, packer=None, num_decodes=0):
    """Pack rows of (sequence, start, length) for a bucket."""
    packer = packer or Packer(SLOTS, WIDTH, BLOCK)
    seqs, starts, lengths = ([*column] for column in zip(*work, strict=True))
    samples = [True] * len(seqs)
    batch = Batch(not bucket.is_decode, seqs, starts, lengths, samples, num_decodes=num_decodes)
    prepared = packer.prepare(batch, bucket, [[*range(len(seqs))]])
    num_decodes = len(seqs) if bucket.is_decode else num_decodes
    rows = [*sorted(range(num_decodes), key=lambda i: -starts[i]), *range(num_decodes, len(seqs))]
    assert prepared.bucket == bucket and [rows[i] for i in prepared.order] == [*range(len(seqs))]
    padding = [SLOTS] * (bucket.num_rows - len(seqs))
    assert prepared.slots.tolist() == [seqs[i].slot for i in rows] + padding
    return prepared.packed


@jax.jit
def read_prefill(packed):
    """What a prefill step reads of its packed array, by name, and the rows after it."""
    token_ids, rows = device.read_prefill(packed, PREFILL)
    inputs = device.prefill_inputs(token_ids, rows, BLOCK)
    options = device.sampling_of(rows)
    return by_name(inputs, options), rows, device.advanced(rows, jnp.zeros(len(rows), jnp.int32))


@jax.jit
def read_mixed(packed, table):
    """What a mixed step reads, by name, its rows, and the rows after it."""
    token_ids, rows = device.read_prefill(packed, MIXED)
    rows, decodes = device.read_mixed(rows, table, BLOCK)
    inputs = device.prefill_inputs(token_ids, rows, BLOCK, decodes)
    found = by_name(inputs, device.sampling_of(rows)) | {"decode_lens": inputs.batch.decode_lens}
    return found, rows, device.advanced(rows, jnp.zeros(len(rows), jnp.int32))


@jax.jit
def read_decode(packed, table):
    """The rows that a decode call begins with."""
    return device.read_decode(packed, table, BLOCK)


@jax.jit
def decode(rows, last_tokens, step):
    """What a step of a decode call computes with, by name."""
    rows = device.decode_rows(rows)
    return by_name(device.decode_inputs(rows, last_tokens, step, BLOCK), rows.sampling)


def by_name(inputs, sampling):
    batch = inputs.batch
    return sampling._asdict() | {
        "token_ids": inputs.token_ids,
        "positions": inputs.positions,
        "sample_indices": inputs.sample_indices,
        "slot_mapping": batch.slot_mapping,
        "block_tables": batch.block_tables,
        "context_lens": batch.context_lens,
        "query_starts": batch.query_starts,
    }


def table_after(seqs):
    """The device's table after a prefill of whole sequences, each of which drew 100 + its slot."""
    bucket = Bucket(SLOTS * 20, SLOTS)
    packed = pack([(seq, 0, seq.num_tokens) for seq in seqs], bucket)
    rows = device.read_prefill(jnp.asarray(packed), bucket)[1]
    rows = device.advanced(rows, 100 + rows[:, Column.SLOT])
    table = jnp.full((SLOTS + 1, len(Column) + WIDTH), -7, jnp.int32)
    return table.at[rows[:, Column.SLOT]].set(rows)


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
    """What a step reads of row i, beside its tokens."""
    assert got["context_lens"][i] == start + length
    assert got["block_tables"][i].tolist()[: len(seq.block_table)] == seq.block_table
    low, high = map(int, got["seeds"][i])
    assert (high << 32) + low == seq.seed
    assert got["top_k"][i] == min(seq.params.top_k, 2**31 - 1)
    # What is beyond float32's range stands for its nearest number that computes alike.
    assert got["temperatures"][i] == np.float32(min(seq.params.temperature, 1e30))
    assert got["top_p"][i] == max(np.float32(seq.params.top_p), np.finfo(np.float32).tiny)
    assert got["min_p"][i] == np.float32(seq.params.min_p)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seqs=sequences(), data=st.data())
def test_a_packed_prefill_is_read_back(seqs, data):
    work, room = [], PREFILL.num_tokens
    for seq in seqs:
        start = data.draw(st.integers(0, seq.num_tokens - 1), label="start")
        length = data.draw(st.integers(1, seq.num_tokens - start), label="length")
        if length <= room:
            work.append((seq, start, length))
            room -= length
    got, rows, after = jax.device_get(read_prefill(pack(work, PREFILL)))
    token = 0
    for i, (seq, start, length) in enumerate(work):
        check_row(got, i, seq, start, length)
        assert rows[i, Column.SLOT] == seq.slot
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
        assert after[i, Column.START] == start + length and after[i, Column.LENGTH] == 0
    assert np.all(got["query_starts"][len(work) :] == token)
    assert np.all(got["slot_mapping"][token:] == -1), "padding is written nowhere"
    assert np.all(got["context_lens"][len(work) :] == 0)
    padding = rows[len(work) :, Column.SLOT]
    assert np.all(padding == SLOTS), "padding has a slot of its own"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seqs=sequences(), data=st.data())
def test_decode_steps_go_on_from_the_rows_on_the_device(seqs, data):
    """A call may take several; each row stops after its own number of tokens."""
    table, work = table_after(seqs), []
    steps = data.draw(st.integers(1, BLOCK), label="steps")
    for block, seq in enumerate(seqs, start=SLOTS * WIDTH):
        length = data.draw(st.integers(0 if work else 1, steps), label="length")
        if length:
            if seq.num_tokens + length > BLOCK * len(seq.block_table):
                seq.block_table.append(block)
            work.append((seq, seq.num_tokens, length))
    work.sort(key=lambda item: -item[1])  # as `Packer` does: the longest contexts first
    rows = read_decode(pack(work, DECODE), table)
    last_tokens = rows[:, Column.LAST_TOKEN]
    assert rows[:, Column.SLOT].tolist() == [
        *(seq.slot for seq, *_ in work), *[SLOTS] * (DECODE.num_rows - len(work))
    ]  # fmt: skip
    numbers = jnp.arange(steps)[:, None]
    slots = np.asarray(device.decoded_slots(device.decode_rows(rows), numbers, BLOCK))
    for step in range(steps):
        got = jax.device_get(decode(rows, last_tokens + 1000 * step, step))
        np.testing.assert_array_equal(got["slot_mapping"], slots[step])
        assert got.pop("query_starts") is None
        for i, (seq, start, length) in enumerate(work):
            if step >= length:
                assert got["slot_mapping"][i] == -1 and got["context_lens"][i] == 0
                continue
            position = start + step
            check_row(got, i, seq, position, 1)
            assert got["token_ids"][i] == 100 + seq.slot + 1000 * step
            assert got["positions"][i] == position and got["sample_indices"][i] == i
            place = seq.block_table[position // BLOCK] * BLOCK + position % BLOCK
            assert got["slot_mapping"][i] == place
        assert np.all(got["slot_mapping"][len(work) :] == -1)
        assert np.all(got["context_lens"][len(work) :] == 0)
    after = device.advanced(rows, last_tokens + 7)
    for i, (seq, start, length) in enumerate(work):
        assert after[i, Column.START] == start + length and after[i, Column.LENGTH] == 0
        assert after[i, Column.LAST_TOKEN] == 107 + seq.slot


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seqs=sequences(), data=st.data())
def test_a_mixed_step_goes_on_from_the_rows_on_the_device_and_brings_new_ones(seqs, data):
    num_decodes = data.draw(st.integers(1, len(seqs)), label="num_decodes")
    table, work, room = table_after(seqs[:num_decodes]), [], MIXED.num_tokens - num_decodes
    for block, seq in enumerate(seqs[:num_decodes], start=SLOTS * WIDTH):
        if seq.num_tokens % BLOCK == 0:
            seq.block_table.append(block)
        work.append((seq, seq.num_tokens, 1))
    for seq in seqs[num_decodes:]:
        start = data.draw(st.integers(0, seq.num_tokens - 1), label="start")
        length = data.draw(st.integers(1, seq.num_tokens - start), label="length")
        if length <= room:
            work.append((seq, start, length))
            room -= length
    packed = pack(work, MIXED, num_decodes=num_decodes)
    work[:num_decodes] = sorted(work[:num_decodes], key=lambda item: -item[1])
    got, rows, after = jax.device_get(read_mixed(packed, table))
    slots = [seq.slot for seq, *_ in work] + [SLOTS] * (MIXED.num_rows - len(work))
    assert rows[:, Column.SLOT].tolist() == slots
    token = 0
    for i, (seq, start, length) in enumerate(work):
        check_row(got, i, seq, start, length)
        decodes = i < num_decodes
        assert got["decode_lens"][i] == (start + 1 if decodes else 0)
        # The prefill kernel sees nothing of the rows that decode.
        assert got["query_starts"][i] == (num_decodes if decodes else token)
        new = [100 + seq.slot] if decodes else seq.token_ids[start : start + length]
        assert got["token_ids"][token : token + length].tolist() == new
        for position in range(start, start + length):
            assert got["positions"][token] == position
            place = seq.block_table[position // BLOCK] * BLOCK + position % BLOCK
            assert got["slot_mapping"][token] == (place if position >= seq.num_cached else -1)
            token += 1
        assert got["sample_indices"][i] == token - 1
        assert after[i, Column.START] == start + length and after[i, Column.LENGTH] == 0
    assert np.all(got["query_starts"][len(work) :] == token)
    assert np.all(got["slot_mapping"][token:] == -1)
    assert np.all(got["decode_lens"][len(work) :] == 0)


def test_a_reused_row_keeps_nothing_of_its_last_sequence():
    seq = Sequence(0, [1] * 16, SamplingParams(top_k=3), seed=1, max_tokens=1)
    seq.slot, seq.block_table = 0, [4, 5, 6, 7]
    other = Sequence(1, [1], SamplingParams(temperature=0), seed=0, max_tokens=1)
    other.slot, other.block_table = 0, [9]
    used, packer = Packer(SLOTS, WIDTH, BLOCK), Packer(SLOTS, WIDTH, BLOCK)
    pack([(seq, 0, 16)], PREFILL, used)
    packed = [pack([(other, 0, 1)], PREFILL, p) for p in (used, packer)]
    np.testing.assert_array_equal(*packed)
    assert packed[0][PREFILL.num_tokens :][len(Column) :][:2].tolist() == [9, 0]


def test_shards_are_packed_one_after_another():
    """Each shard's part is what it would be alone, and `order` finds the rows again."""
    seqs = []
    for slot, length in enumerate((3, 7, 1, 5)):
        seq = Sequence(slot, [10 * slot + i for i in range(length)], SamplingParams(), slot, 1)
        seq.slot, seq.block_table = slot, [slot, 9, 8]
        seqs.append(seq)
    shards = [[0, 2, 3], [1]]
    for bucket in (Bucket(16, 4), Bucket(0, 4)):
        starts = [len(seq.token_ids) for seq in seqs] if bucket.is_decode else [0] * 4
        lengths = [1] * 4 if bucket.is_decode else [3, 7, 1, 5]
        batch = Batch(not bucket.is_decode, seqs, starts, lengths, [True] * 4)
        whole = Packer(SLOTS, WIDTH, BLOCK).prepare(batch, bucket, shards)
        shown = [3, 0, 2] if bucket.is_decode else [0, 2, 3]  # the longest contexts first
        assert [whole.slots[place] for place in whole.order] == [0, 1, 2, 3]
        assert whole.slots.tolist() == [*shown, SLOTS, 1, SLOTS, SLOTS, SLOTS]
        alone = [pack([(seqs[i], starts[i], lengths[i]) for i in s], bucket) for s in shards]
        np.testing.assert_array_equal(whole.packed, np.concatenate(alone))


def test_options_are_read_back():
    """The lists of a request, and a bit for each token that it allows."""
    rng = np.random.default_rng(0)
    packer, num_words, vocab = Packer(SLOTS, WIDTH, BLOCK), 9, 9 * 32 - 5
    seqs = []
    for slot in range(4):
        allowed = rng.choice(vocab, 40, replace=False).tolist() if slot % 2 else None
        params = SamplingParams(
            allowed_token_ids=allowed, repetition_penalty=1.25, presence_penalty=0.5 * slot,
            frequency_penalty=-0.25, min_tokens=7,
        )  # fmt: skip
        ints = rng.integers(-1, 1000, (200 * slot, 3)).tolist()
        edits = [Edit(a, bias, b, c) for (a, b, c), bias in zip(ints, itertools.cycle(BIASES))]
        seq = Sequence(slot, [1] * (slot + 1), params, seed=1, max_tokens=9, edits=edits)
        seq.slot, seq.block_table = slot, [0]
        seqs.append(seq)
    packed = packer.options([seqs[:3], seqs[3:]], num_words)
    slots, edits, words = (np.asarray(x) for x in device.read_options(packed, num_words))
    padding = [SLOTS] * NUM_OPTIONS
    assert slots.tolist() == [0, 1, 2, *padding[3:], 3, *padding[1:]]
    table = np.full((SLOTS + 1, edits.shape[1]), 77, np.int32)
    allowed = np.zeros((SLOTS + 1, num_words), np.int32)
    table[slots], allowed[slots] = edits, words
    rows = read_prefill(pack([(seq, 0, 1) for seq in seqs], PREFILL, packer))[1]
    got = device.edits_of_rows(rows, jnp.asarray(table))
    masks = device.allowed_of_rows(rows, jnp.asarray(allowed))
    penalties = device.penalties_of(rows)
    for i, seq in enumerate(seqs):
        fields = (np.asarray(x)[i, : len(seq.edits)].tolist() for x in got[:4])
        assert [Edit(*entry) for entry in zip(*fields, strict=True)] == seq.edits
        assert got.counts[i] == len(seq.edits) and got.min_ends[i] == i + 1 + 7
        bits = np.unpackbits(np.asarray(masks.words)[i].view(np.uint8), bitorder="little")
        wanted = seq.params.allowed_token_ids
        assert np.flatnonzero(bits).tolist() == sorted(wanted or [])
        assert masks.is_set[i] == (wanted is not None)
        assert [x[i] for x in penalties] == [0.5 * i, -0.25, 1.25]
        assert rows[i, Column.PROMPT] == i + 1


def test_requests_for_scores_are_cut_into_calls():
    packer = Packer(SLOTS, WIDTH, BLOCK)
    wanted = [[(i, 1000 + i) for i in range(n)] for n in (NUM_SCORED + 2, 0)]
    first, second = packer.score_requests(wanted)
    for call, start, count in ((first, 0, NUM_SCORED), (second, NUM_SCORED, 2)):
        (indices, token_ids), nothing = call.reshape(2, 2, NUM_SCORED)
        assert indices[:count].tolist() == [*range(start, start + count)]
        assert token_ids[:count].tolist() == [*range(1000 + start, 1000 + start + count)]
        assert not indices[count:].any() and not nothing.any()
    assert packer.score_requests([[], []]) == []


def test_a_batch_of_padding_is_written_nowhere():
    packer = Packer(SLOTS, WIDTH, BLOCK)
    table = jnp.full((SLOTS + 1, len(Column) + WIDTH), 3, jnp.int32)
    prefill, whole, _ = read_prefill(packer.padding(PREFILL, num_shards=1).packed)
    rows = read_decode(packer.padding(DECODE, num_shards=1).packed, table)
    for got in (prefill, decode(rows, rows[:, Column.LAST_TOKEN], 0)):
        assert np.all(np.asarray(got["slot_mapping"]) == -1)
    assert np.all(whole[:, Column.SLOT] == SLOTS) and np.all(rows[:, Column.SLOT] == SLOTS)
    assert np.all(np.asarray(rows[:, len(Column) :]) == 3), "a block was written"
