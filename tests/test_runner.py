"""The runner: nothing compiles after start-up, the cache stays in place, buffers stay unchanged."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BLOCK, edge_prompts, greedy, prompt, tokens

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.inputs import (
    Column,
    RowTable,
    floats,
    sampled_positions,
    seeds,
    unpack,
)
from nanovllm_jax.engine.model_runner import (
    Bucket,
    decode_buckets,
    prefill_buckets,
)
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.engine.sequence import Sequence

COMPILE_EVENTS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: (
        event.startswith("/jax/core/compile") and COMPILE_EVENTS.append(event)
    )
)


def varied_requests():
    """Batches of every size, prompts of every bucket, all kinds of sampling."""
    prompts = [prompt(n, seed=6) for n in (1, 60, 65, 129, 300, 512, 600, 700, 2, 3, 4)]
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, max_tokens=m, seed=s)
        for s, (t, k, p, m) in enumerate(
            [(0, 0, 1.0, 5), (1, 5, 1.0, 9), (0.5, 0, 0.9, 2), (1, 0, 1.0, 7)] * 3
        )
    ]
    return prompts, params[: len(prompts)]


# --- buckets ---


def test_bucket_families_are_short():
    assert [b.num_rows for b in decode_buckets(512)] == [
        1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512,
    ]  # fmt: skip
    assert [b.num_tokens for b in prefill_buckets(16384, 512)] == [2**k for k in range(6, 15)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_decode_batch_runs_in_the_smallest_bucket_that_holds_it(engine, monkeypatch, count):
    llm = engine()
    used = []
    for bucket, step in llm.runner.steps.items():
        monkeypatch.setitem(
            llm.runner.steps, bucket, lambda *a, b=bucket, s=step: (used.append(b), s(*a))[1]
        )
    tokens(llm, [prompt(30, seed=s) for s in range(count)], greedy(3, ignore_eos=True))
    prefill, *decode = used
    assert prefill.num_tokens == {1: 64, 2: 64, 3: 128, 4: 128}[count]
    assert decode == [Bucket(0, {1: 1, 2: 2, 3: 4, 4: 4}[count])] * 2


# --- kernels ---


@pytest.mark.parametrize(
    ("want", "changes"),
    [
        (("mosaic", "triton"), {}),
        (("mosaic", "triton"), {"head_dim": 64}),
        (("triton", "triton"), {"head_dim": 80}),
        (("triton", "triton"), {"capability": "8.0"}),
        (("triton", "triton"), {"capability": "10.0"}),
        (("triton", "triton"), {"dtype": "float32"}),
        (("triton", "triton"), {"kv_cache_dtype": "fp8"}),
        (("mosaic", "triton"), {"cuda": 12091}),
        (("triton", "triton"), {"cuda": 12090}),
        (("triton", "triton"), {"cuda": 12080}),
        (("mosaic", "triton"), {"cuda": 12079}),
        (("xla", "xla"), {"platform": "cpu"}),
        (("triton", "triton"), {"platform": "cpu", "backend": "triton"}),
        (("mosaic", "mosaic"), {"backend": "mosaic"}),
        (("xla", "xla"), {"backend": "xla"}),
    ],
)
def test_the_kernels_that_a_device_gets(want, changes):
    assert programs_on(**changes)._attention_backends() == want


def test_mosaic_is_refused_with_the_cuda_that_masks_wrongly():
    with pytest.raises(ValueError, match=r"12\.8\.0 to 12\.9\.0.*triton"):
        programs_on(backend="mosaic", cuda=12090)._attention_backends()


def programs_on(**changes):
    """Programs of no model, on a device that is described only."""
    options = dict(
        platform="gpu", capability="9.0", backend="auto", dtype="bfloat16", head_dim=128,
        kv_cache_dtype="auto", cuda=13000,
    )  # fmt: skip
    o = SimpleNamespace(**(options | changes))
    programs = Programs.__new__(Programs)
    programs.platform = o.platform
    client = SimpleNamespace(platform_version=f"PJRT C API\ncuda {o.cuda}")
    device = SimpleNamespace(compute_capability=o.capability, client=client)
    programs.sharding = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([device])))
    programs.config = SimpleNamespace(attention_backend=o.backend, kv_cache_dtype=o.kv_cache_dtype)
    programs.model_config = SimpleNamespace(dtype=o.dtype, head_dim=o.head_dim)
    return programs


# --- compilation ---


def test_the_listener_sees_a_compilation():
    COMPILE_EVENTS.clear()
    jax.jit(lambda x: x * 3 + len(COMPILE_EVENTS))(jnp.arange(11))
    assert COMPILE_EVENTS


def test_nothing_compiles_after_start_up(new_engine, checkpoint):
    llm = new_engine(checkpoint())
    prompts, params = varied_requests()
    COMPILE_EVENTS.clear()
    for _ in range(2):
        tokens(llm, prompts, params)
    for text in llm.stream(prompt(5), greedy(4)):
        assert text
    assert COMPILE_EVENTS == []


def test_every_bucket_is_compiled_at_start_up(engine):
    runner = engine().runner
    assert set(runner.steps) == {*runner.prefill_buckets, *runner.decode_buckets}
    assert set(runner.redraws) == {bucket.num_rows for bucket in runner.steps}


# --- the cache ---


def cache_shapes(llm):
    """The cache's shape on one device, as HLO writes it, whole and of one layer."""
    shape = llm.runner.state.cache.k.addressable_shards[0].data.shape
    kind = {"float32": "f32", "bfloat16": "bf16"}[str(llm.runner.state.cache.k.dtype)]
    return [f"{kind}[{','.join(map(str, s))}]" for s in (shape, shape[1:], (1, *shape[1:]))]


@pytest.mark.parametrize(
    ("shape", "options"), [("gqa", {}), ("eight_heads", {"tensor_parallel_size": 2})]
)
def test_no_compiled_step_copies_the_cache(engine, shape, options):
    llm = engine(shape, **options)
    shapes = cache_shapes(llm)
    programs = {**llm.runner.steps, **llm.runner.redraws}
    for bucket, program in programs.items():
        text = program.as_text()
        if isinstance(bucket, Bucket):
            assert shapes[0] in text
        for line in text.splitlines():
            made = re.search(r"= (\w+\[[\d,]*\])\S* (copy|copy-start|transpose)\(", line)
            assert not (made and made[1] in shapes), (bucket, line.strip()[:200])


def test_the_state_is_donated_whole(engine):
    runner = engine().runner
    leaves = len(jax.tree.leaves(runner.state))
    for program in [*runner.steps.values(), *runner.redraws.values()]:
        header = program.as_text().splitlines()[0]
        aliases = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)[1]
        assert aliases.count("-alias") == leaves


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("gqa", {}),
        ("eight_heads", {"tensor_parallel_size": 2}),
        ("gqa", {"enforce_eager": True}),
    ],
)
def test_the_cache_stays_where_it_is(engine, shape, options):
    llm = engine(shape, **options)

    def pointers():
        shards = [s for x in llm.runner.state.cache for s in x.addressable_shards]
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    tokens(llm, [prompt(9)], greedy(3))
    before, old = pointers(), llm.runner.state
    prompts, params = varied_requests()
    tokens(llm, prompts[:4], params[:4])
    assert pointers() == before
    assert all(x.is_deleted() for x in old.cache)


# --- inputs ---


def sequences(table_width):
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1)
    seqs = []
    for slot, (n, cached) in enumerate([(5, 0), (300, 256), (600, 512), (256, 256)]):
        seq = Sequence(slot, prompt(n), params, seed=2**32 - 1 - slot, max_tokens=9)
        seq.slot, seq.num_cached = slot, cached
        seq.block_table = [10 * slot + i for i in range(-(-n // BLOCK))]
        assert len(seq.block_table) <= table_width
        seqs.append(seq)
    return seqs


def test_a_packed_prefill_is_read_back():
    table = RowTable(num_slots=5, table_width=3)
    seqs = sequences(3)
    order, starts, lengths = [2, 0, 3, 1], [520, 0, 255, 256], [80, 5, 1, 44]
    for i in order:
        table.fill(seqs[i])
    rows = table.gather(order, starts, lengths, num_rows=8)
    ids = np.concatenate(
        [seqs[i].token_ids[a : a + n] for i, a, n in zip(order, starts, lengths, strict=True)]
    )
    used = len(ids)
    packed = np.zeros(256, np.int32)
    packed[:used] = ids
    packed = np.concatenate([packed, rows.ravel()])
    inputs, read = unpack(
        jnp.asarray(packed), jnp.zeros(6, jnp.int32), num_tokens=256, num_rows=8, block_size=BLOCK
    )
    np.testing.assert_array_equal(read, rows)
    np.testing.assert_array_equal(inputs.token_ids[:used], ids)
    np.testing.assert_array_equal(
        inputs.positions[:used],
        np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]),
    )
    np.testing.assert_array_equal(inputs.last_tokens[:4], np.cumsum(lengths) - 1)
    batch = inputs.batch
    np.testing.assert_array_equal(batch.query_starts, [0, 80, 85, 86, 130, 130, 130, 130, 130])
    np.testing.assert_array_equal(batch.context_lens, [600, 5, 256, 300, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.block_tables[0], [20, 21, 22])
    np.testing.assert_array_equal(batch.block_tables[1], [0, 0, 0])
    want = [
        *(22 * BLOCK + np.arange(520 - 512, 600 - 512)),
        *range(5),
        -1,  # a cached token is computed, not written again
        *(11 * BLOCK + np.arange(44)),
    ]
    np.testing.assert_array_equal(batch.slots[:used], want)
    assert np.all(np.asarray(batch.slots[used:]) == -1), "padding is written nowhere"
    np.testing.assert_array_equal(seeds(read)[:4], [2**32 - 1 - i for i in order])
    np.testing.assert_array_equal(floats(read, Column.TEMPERATURE)[:4], np.float32([0.7] * 4))
    np.testing.assert_array_equal(floats(read, Column.TOP_P)[:4], np.float32([0.8] * 4))
    np.testing.assert_array_equal(floats(read, Column.MIN_P)[:4], np.float32([0.1] * 4))
    np.testing.assert_array_equal(read[:4, Column.TOP_K], [9] * 4)
    np.testing.assert_array_equal(sampled_positions(read)[:4], [600, 5, 256, 300])
    np.testing.assert_array_equal(read[4:, Column.SLOT], [5] * 4)


def test_a_packed_decode_takes_its_tokens_from_the_device():
    table = RowTable(num_slots=5, table_width=3)
    seqs = sequences(3)
    for seq in seqs:
        table.fill(seq)
    seqs[3].block_table.append(77)
    table.add_block(seqs[3])
    rows = table.gather([3, 1, 0], [256, 300, 5], [1, 1, 1], num_rows=4)
    last = jnp.array([100, 101, 102, 103, 104, 105], jnp.int32)
    inputs, _ = unpack(jnp.asarray(rows.ravel()), last, num_tokens=0, num_rows=4, block_size=BLOCK)
    np.testing.assert_array_equal(inputs.token_ids, [103, 101, 100, 105])
    np.testing.assert_array_equal(inputs.positions[:3], [256, 300, 5])
    np.testing.assert_array_equal(inputs.batch.slots, [77 * BLOCK, 11 * BLOCK + 44, 5, -1])
    np.testing.assert_array_equal(inputs.batch.context_lens, [257, 301, 6, 0])
    assert inputs.batch.query_starts is None


def test_a_reused_row_keeps_nothing_of_its_last_sequence():
    table = RowTable(num_slots=1, table_width=4)
    seq = Sequence(0, [1], SamplingParams(top_k=3), seed=1, max_tokens=1)
    seq.slot, seq.block_table = 0, [4, 5, 6, 7]
    table.fill(seq)
    other = Sequence(1, [1], SamplingParams(temperature=0), seed=0, max_tokens=1)
    other.slot, other.block_table = 0, [9]
    table.fill(other)
    fresh = RowTable(num_slots=1, table_width=4)
    fresh.fill(other)
    np.testing.assert_array_equal(table.rows, fresh.rows)


@pytest.mark.parametrize("top_k", [2**31 - 1, 2**31, 10**12])
def test_any_top_k_fits_its_column(top_k):
    table = RowTable(num_slots=1, table_width=1)
    seq = Sequence(0, [1], SamplingParams(top_k=top_k), seed=0, max_tokens=1)
    seq.slot = 0
    table.fill(seq)
    assert table.rows[0, Column.TOP_K] == 2**31 - 1


def test_buffers_handed_to_a_step_are_never_written_again(engine, monkeypatch):
    """On a CPU a NumPy array given to JAX may be the device's buffer."""
    llm = engine()
    runner, handed = llm.runner, []

    def keep(programs, key):
        program = programs[key]

        def run(*args):
            for x in args:
                if isinstance(x, np.ndarray):
                    handed.append((x, x.copy()))
            return program(*args)

        monkeypatch.setitem(programs, key, run)

    for programs in (runner.steps, runner.redraws):
        for key in list(programs):
            keep(programs, key)
    prompts, params = varied_requests()
    tokens(llm, prompts, params)
    tokens(llm, edge_prompts(), greedy())
    assert len(handed) > 30
    for array, copy in handed:
        np.testing.assert_array_equal(array, copy)
        assert not np.shares_memory(array, runner.table.rows)


def test_a_warm_up_runs_every_program_and_changes_nothing(engine, monkeypatch):
    """Only GPUs need it; in the middle of requests, it must not be noticed."""
    llm, requests = engine(), varied_requests()
    whole = tokens(llm, *requests)
    llm.reset_prefix_cache()
    ran, run = [], llm.runner._run

    def running(bucket, parts, filters):
        ran.append(bucket)
        return run(bucket, parts, filters)

    for p, params in zip(*requests, strict=True):
        llm.add_request(p, params)
    finished = {}
    while not llm.is_finished():
        if len(finished) == 2 and not ran:
            monkeypatch.setattr(llm.runner, "_run", running)
            llm.runner._warm_up()
            monkeypatch.undo()
        finished |= dict(llm.step()[0])
    assert set(ran) == set(llm.runner.steps)
    assert [finished[seq_id] for seq_id in sorted(finished)] == whole


def test_shut_down_deletes_every_array(new_engine, checkpoint):
    llm = new_engine(checkpoint(), enforce_eager=True)
    runner = llm.runner
    arrays = jax.tree.leaves((runner.weights, runner.state))
    runner.shut_down()
    runner.shut_down()
    assert all(array.is_deleted() for array in arrays)
