"""The runner: nothing compiles after start-up, the cache stays in place, buffers stay unchanged."""

import copy
import itertools
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BLOCK, edge_prompts, greedy, prompt, tokens

from nanovllm_jax import SamplingParams
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.buckets import Bucket, decode_buckets, mixed_buckets, prefill_buckets
from nanovllm_jax.engine.programs import Programs, sample_all_sizes
from nanovllm_jax.sharding import make_sharding

COMPILE_EVENTS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: (
        event.startswith("/jax/core/compile") and COMPILE_EVENTS.append(event)
    )
)


def varied_requests():
    """Batches of every size, prompts of every bucket, all kinds of sampling."""
    prompts = [prompt(n, seed=6) for n in (1, 60, 65, 129, 300, 512, 600, 700, 2, 3, 4)]
    kinds = [(0, 0, 1.0, 5), (1, 5, 1.0, 9), (0.5, 0, 0.9, 2), (1, 0, 1.0, 7)] * 3
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, max_tokens=m, seed=s)
        for s, (t, k, p, m) in enumerate(kinds)
    ]
    params[4] = replace(params[4], prompt_logprobs=0)
    params[7:9] = (replace(p, logprobs=2, repetition_penalty=1.1) for p in params[7:9])
    params[9] = replace(params[9], allowed_token_ids=[5, 6, 7], logit_bias={5: 1.0})
    return prompts, params[: len(prompts)]


# --- buckets ---


def test_bucket_families_are_short():
    assert [b.num_rows for b in decode_buckets(512)] == [
        1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512,
    ]  # fmt: skip
    assert [b.num_tokens for b in prefill_buckets(16384, 512)] == [2**k for k in range(6, 15)]


@pytest.mark.parametrize("n", [*range(1, 70), 100, 127, 128, 200, 256, 257, 511, 512, 1000])
def test_buckets_reach_any_max_num_seqs(n):
    """nano-vLLM #216: they missed what is no multiple of 16."""
    rows = [bucket.num_rows for bucket in decode_buckets(n)]
    assert rows == sorted(set(rows)) and rows[-1] == n
    for batch in range(1, n + 1):
        bucket = next(size for size in rows if size >= batch)
        assert bucket < 2 * batch, "less than half of it is padding"
    for most in (n + 255, 1000, 16384):
        buckets = prefill_buckets(most, n)
        assert buckets[-1].num_tokens == most
        assert all(min(n, 8) <= bucket.num_rows <= max(n, 8) for bucket in buckets)


def test_mixed_buckets_hold_all_that_decode_and_as_many_tokens_of_prompts():
    sizes = [(64, 32), (128, 64), (256, 128), (512, 256), (1024, 512)]
    assert [b[:2] for b in mixed_buckets(512, 16384, 512)] == sizes
    assert [b[:2] for b in mixed_buckets(300, 16384, 200)] == [*sizes[:3], (512, 200)]
    assert [b[:2] for b in mixed_buckets(None, 1000, 20)] == [
        (64, 20), (128, 20), (256, 20), (512, 20), (1000, 20)
    ]  # fmt: skip
    for bucket in mixed_buckets(None, 16384, 512):
        assert bucket.is_mixed and bucket.num_rows <= bucket.num_tokens // 2
    assert mixed_buckets(None, 8, 4) == [], "too few tokens for the fewest rows"


def test_decode_rows_leave_half_of_a_mixed_batch_to_prompts(engine):
    programs = engine(every_bucket=True, enable_mixed_chunk=True).runner.programs
    assert programs.mixed_rooms(None) == programs.mixed_buckets[-1:]
    for size in (1, 3, 15, 16, 63, 64, 65, 500, 1000, 1024):
        first, *others = rooms = programs.mixed_rooms(size)
        assert first.num_tokens == size and others[-1].num_rows >= programs.config.max_num_seqs
        assert all(room.num_rows <= room.num_tokens // 2 for room in rooms)


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ([512, 384, 256, 192, 128, 96, 64, 32, 16, 8, 4, 2, 1], [512, 256, 128, 64, 32, 16, 8]),
        ([500, 384, 256, 192, 128, 96, 64, 32], [512, 256, 128, 64, 32]),
        ([65, 64, 32, 16, 8, 4], [128, 64, 32, 16, 8]),
        ([4, 2, 1], [4]),
        ([1], [1]),
    ],
)
def test_sampling_with_all_options_has_fewer_sizes(counts, kept):
    assert sample_all_sizes(counts) == kept


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_decode_batch_runs_in_the_smallest_bucket_that_holds_it(engine, monkeypatch, count):
    llm = engine(every_bucket=True)
    used = []
    prepare = llm.runner.prepare_inputs

    def recording(batch):
        inputs = prepare(batch)
        used.append((inputs.bucket, batch.num_steps))
        return inputs

    monkeypatch.setattr(llm.runner, "prepare_inputs", recording)
    tokens(llm, [prompt(30, seed=s) for s in range(count)], greedy(7, ignore_eos=True))
    (prefill, _), *decode = used
    assert prefill.num_tokens == {1: 64, 2: 64, 3: 128, 4: 128}[count]
    bucket = Bucket(0, {1: 1, 2: 2, 3: 4, 4: 4}[count])
    assert decode == [(bucket, 4), (bucket, 1), (bucket, 1)], "six tokens after the first"


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
        (("mosaic", "triton"), {"backend": "mosaic"}),
        (("xla", "xla"), {"backend": "xla"}),
    ],
)
def test_the_kernels_that_a_device_gets(want, changes):
    assert programs_on(**changes)._attention_kernels() == want


def test_mosaic_is_refused_with_the_cuda_that_masks_wrongly():
    with pytest.raises(ValueError, match=r"12\.8\.0 to 12\.9\.0.*triton"):
        programs_on(backend="mosaic", cuda=12090)._attention_kernels()


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
    llm = new_engine(checkpoint(), every_bucket=True)
    prompts, params = varied_requests()
    COMPILE_EVENTS.clear()
    for _ in range(2):
        tokens(llm, prompts, params)
    for text in llm.stream(prompt(5), greedy(4)):
        assert text
    assert COMPILE_EVENTS == []


@pytest.mark.parametrize("mixed", [0, 5])
def test_every_bucket_is_compiled_at_start_up(engine, mixed):
    programs = engine(every_bucket=True, enable_mixed_chunk=mixed > 0).runner.programs
    assert (len(programs.steps), len(programs.samples)) == (3 + 5 + mixed, 4)
    assert set(programs.decode_steps) == set(programs.decode_buckets)
    families = programs.prefill_buckets, programs.mixed_buckets, programs.decode_buckets
    assert set(programs.steps) == {*itertools.chain(*families)}
    assert set(programs.samples) == {bucket.num_rows for bucket in programs.steps}
    assert set(programs.samples_all) == {8}
    assert programs.score_prompt and programs.put_options


def all_programs(runner):
    p = runner.programs
    several = (p.steps, p.decode_steps, p.samples, p.samples_all)
    return [*(run for programs in several for run in programs.values()), p.score_prompt]


# --- the cache ---


def cache_shapes(llm):
    """The cache's shape on one device, as HLO writes it, whole and of one layer."""
    shape = llm.runner.state.cache.k.addressable_shards[0].data.shape
    kind = {"float32": "f32", "bfloat16": "bf16"}[str(llm.runner.state.cache.k.dtype)]
    return [f"{kind}[{','.join(map(str, s))}]" for s in (shape, shape[1:], (1, *shape[1:]))]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("gqa", {"every_bucket": True, "enable_mixed_chunk": True}),
        ("eight_heads", {"tensor_parallel_size": 2}),
    ],
)
def test_no_compiled_step_copies_the_cache(engine, shape, options):
    llm = engine(shape, **options)
    shapes = cache_shapes(llm)
    programs = llm.runner.programs
    steps = [*programs.steps.items(), *programs.decode_steps.items()]
    others = [programs.samples, programs.samples_all, {0: programs.score_prompt}]
    for bucket, program in [*steps, *(item for kind in others for item in kind.items())]:
        text = program.as_text()
        if isinstance(bucket, Bucket):
            assert shapes[0] in text
        for line in text.splitlines():
            made = re.search(r"= (\w+\[[\d,]*\])\S* (copy|copy-start|transpose)\(", line)
            assert not (made and made[1] in shapes), (bucket, line.strip()[:200])


def test_the_state_is_donated_whole(engine):
    runner = engine().runner
    leaves = len(jax.tree.leaves(runner.state))
    for program in all_programs(runner):
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


# --- memory ---


def test_a_cache_of_8_bits_has_nearly_four_times_the_blocks_of_float32(engine, caplog):
    """Sized as on a GPU with 2 GiB; test_memory.py has the arithmetic."""
    blocks = {}
    stats = {"bytes_limit": 2 << 30, "bytes_in_use": 0}
    device = SimpleNamespace(memory_stats=lambda: stats)
    for kind in ("auto", "fp8"):
        runner = copy.copy(engine().runner)
        mesh = SimpleNamespace(local_devices=[device])
        runner.sharding = SimpleNamespace(mesh=mesh, size=lambda axis: 1)
        runner.config = replace(runner.config, kv_cache_dtype=kind)
        runner.programs = copy.copy(runner.programs)
        runner.programs.platform, runner.programs.config = "gpu", runner.config
        runner.programs.step_bytes = lambda weights: 100 << 20
        with caplog.at_level(logging.INFO, "nanovllm_jax"):
            blocks[kind] = runner._num_cache_blocks()
        assert f"{blocks[kind]} blocks of {BLOCK} tokens" in caplog.text
    # Not quite four times: the cache also keeps each token's id.
    assert 3.7 * blocks["auto"] < blocks["fp8"] < 4 * blocks["auto"]
    block = 2 * 2 * 2 * 16 * 4 * BLOCK  # k and v, layers, KV heads, head_dim, float32
    assert 1000 << 20 < block * blocks["auto"] < 1232 << 20


def test_num_kvcache_blocks_overrides_the_sizing(engine):
    assert engine(num_kvcache_blocks=4).runner.state.cache.k.shape[1] == 4


@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (20, 32), (32, 32), (496, 512), (900, 512)])
def test_no_decode_bucket_is_larger_than_a_cache_needs(checkpoint, blocks, rows):
    """Each row writes to a block of its own; a program takes memory and time to compile."""
    config = EngineConfig.resolve(checkpoint(), "cpu", enforce_eager=True)
    programs = Programs(config, make_sharding(config.mesh_shape, config.sharding_rules))
    programs.compile([], blocks)
    assert programs.decode_buckets == [b for b in decode_buckets(512) if b.num_rows <= rows]
    assert {b for b in programs.steps if b.is_decode} == set(programs.decode_buckets)


def test_on_a_cpu_the_cache_holds_every_sequence_at_its_longest(engine):
    assert engine().runner._num_cache_blocks() == 4 * 3


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

    p = runner.programs
    for programs in (p.steps, p.decode_steps, p.samples, p.samples_all):
        for key in list(programs):
            keep(programs, key)
    prompts, params = varied_requests()
    tokens(llm, prompts, params)
    tokens(llm, edge_prompts(), greedy())
    assert len(handed) > 30
    for array, before in handed:
        np.testing.assert_array_equal(array, before)


def test_a_warm_up_runs_every_program_and_changes_nothing(engine, monkeypatch):
    """Only GPUs need it; in the middle of requests, it must not be noticed."""
    llm, requests = engine(every_bucket=True), varied_requests()
    whole = tokens(llm, *requests)
    llm.reset_prefix_cache()
    ran, run = [], llm.runner.run

    def running(inputs):
        ran.append(inputs.bucket)
        return run(inputs)

    for p, params in zip(*requests, strict=True):
        llm.add_request(p, params)
    finished = {}
    while not llm.is_finished():
        if len(finished) == 2 and not ran:
            monkeypatch.setattr(llm.runner, "run", running)
            llm.runner.warm_up()
            monkeypatch.undo()
        finished |= dict(llm.step()[0])
    assert set(ran) == set(llm.runner.programs.steps)
    assert [finished[seq_id] for seq_id in sorted(finished)] == whole


def test_shut_down_deletes_every_array(new_engine, checkpoint):
    llm = new_engine(checkpoint(), enforce_eager=True)
    runner = llm.runner
    arrays = jax.tree.leaves((runner.weights, runner.state))
    runner.shut_down()
    runner.shut_down()
    assert all(array.is_deleted() for array in arrays)
