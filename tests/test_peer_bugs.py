"""The faults that other engines were reported for, one test for each, by their numbers.

nano-vLLM's issues unless another project is named.
"""

import copy
import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import BLOCK, Spy, greedy, poison, prompt, tokens
from scipy import stats

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine import block_manager
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.model_runner import decode_buckets, prefill_buckets
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.layers.rope import rope_angles
from nanovllm_jax.layers.sampler import filter_logits, sample

TINY_POOL = {"num_kvcache_blocks": 4}


@pytest.fixture
def reference(engine):
    """What a roomy engine gives for these prompts, each from an empty cache."""

    def run(prompts, params):
        llm = engine()
        results = []
        for i, text in enumerate(prompts):
            llm.reset_prefix_cache()
            results += tokens(llm, [text], params[i] if isinstance(params, list) else params)
        return results

    return run


def test_01_a_sequence_that_outgrows_the_pool_fails_and_the_rest_finish(engine, reference):
    """#274, #277: the engine asserted or hung."""
    llm = engine(num_kvcache_blocks=2)
    prompts, lengths = [prompt(510), prompt(30), prompt(200)], [50, 12, 12]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert ["error" in output for output in outputs] == [True, False, False]
    assert "the pool has 2" in outputs[0]["error"]
    want = reference(prompts, greedy(12))
    assert outputs[0]["token_ids"] == want[0][:3]
    assert [output["token_ids"] for output in outputs[1:]] == want[1:]


def test_02_what_can_never_run_is_refused_at_add_request(engine):
    """#106: accepted, and then never scheduled."""
    llm = engine(num_kvcache_blocks=2)
    with pytest.raises(ValueError, match=r"900 tokens.*max_model_len=768"):
        llm.add_request(prompt(900), greedy())
    with pytest.raises(ValueError, match=r"600 tokens and needs 3 blocks of 256.* has 2"):
        llm.add_request(prompt(600), greedy())
    assert llm.is_finished()
    (out,) = tokens(engine(), [prompt(760)], greedy(100))
    assert len(out) == 8


def test_03_a_prefix_hit_after_preemption(engine, reference, monkeypatch):
    """#207, #210, #233: cached tokens counted after scheduling."""
    llm = engine(**TINY_POOL)
    poison(llm)
    spy = Spy(llm, monkeypatch)
    prompts = [prompt(510, seed=1), prompt(500, seed=2)]
    got = tokens(llm, prompts, greedy(20))
    assert spy.preempted == [spy.batches[0][1][1][0]], "the second is preempted, once"
    starts = [at for is_prefill, rows in spy.batches[1:] if is_prefill for _, at, _ in rows]
    assert starts == [BLOCK], "its first block is found again"
    assert got == reference(prompts, greedy(20))


def test_04_a_prompt_that_is_cached_whole(engine, reference):
    """#144, #199: a prefill of no tokens."""
    llm = engine()
    poison(llm)
    prompts = [prompt(BLOCK), prompt(2 * BLOCK)]
    want = reference(prompts, greedy())
    llm = engine()
    for _ in range(3):
        assert tokens(llm, prompts, greedy()) == want


def test_05_a_hit_in_the_same_step_reads_what_the_step_writes(engine, reference):
    """#208: blocks were hashed before their keys and values existed."""
    text = prompt(2 * BLOCK + 30)
    prompts = [text, text, text[: BLOCK + 5], text[: 2 * BLOCK]]
    want = reference(prompts, greedy())
    llm = engine()
    poison(llm)
    assert tokens(llm, prompts, greedy()) == want


def test_05_a_hit_between_the_chunks_of_a_prompt(engine, reference):
    text = prompt(630)
    prompts = [prompt(300, seed=7), text, text, text]
    want = reference(prompts, greedy(6))
    llm = engine(max_model_len=640, max_num_batched_tokens=640)
    poison(llm)
    assert tokens(llm, prompts, greedy(6)) == want


def test_06_identical_prompts_in_one_step_share_blocks(engine, monkeypatch):
    """#219: they shared none, or a later hash overwrote the first."""
    llm = engine()
    spy = Spy(llm, monkeypatch)
    first, *rest = tokens(llm, [prompt(BLOCK + 40)] * 3, greedy(4))
    assert rest == [first] * 2
    assert [n for _, _, n in spy.batches[0][1]] == [BLOCK + 40, 40, 40]
    assert len(llm.pools[0].cached) == 1
    assert tokens(llm, [prompt(BLOCK + 40)], greedy(4)) == [first]


def test_07_no_stale_hash_after_blocks_are_reused(engine, reference):
    """#163: here against an engine that never reuses; at random in test_scheduler.py."""
    rng = np.random.default_rng(0)
    bases = [prompt(600, seed=s) for s in range(3)]
    prompts = [bases[rng.integers(3)][: rng.choice([200, 256, 300, 512, 600])] for _ in range(14)]
    want = reference(prompts, greedy(4))
    llm = engine(**TINY_POOL)
    poison(llm)
    for start in range(0, 14, 5):
        part = slice(start, start + 5)
        assert tokens(llm, prompts[part], greedy(4)) == want[part]
        llm.pools[0].check([])


def test_08_chunked_prefill_reads_no_unwritten_position(engine, reference, monkeypatch):
    """#212."""
    prompts = [prompt(n, seed=3) for n in (500, 630, 257, 300)]
    want = reference(prompts, greedy())
    llm = engine(max_model_len=640, max_num_batched_tokens=640)
    poison(llm)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, prompts, greedy()) == want
    cut = [row for is_prefill, rows in spy.batches if is_prefill for row in rows if row[1]]
    assert len(cut) >= 2


def test_09_no_token_is_lost_when_a_preempted_sequence_is_computed_again(
    engine, reference, monkeypatch
):
    """#217."""
    prompts = [prompt(n, seed=4) for n in (250, 251, 252, 253)]
    want = reference(prompts, greedy(30))
    for options in ({}, {"async_scheduling": False}):
        llm = engine(**TINY_POOL, **options)
        spy = Spy(llm, monkeypatch)
        got = tokens(llm, prompts, greedy(30))
        assert spy.preempted
        assert got == want


@pytest.mark.parametrize("n", [*range(1, 70), 100, 127, 128, 200, 256, 257, 511, 512, 1000])
def test_10_buckets_reach_any_max_num_seqs(n):
    """#216: they missed what is no multiple of 16."""
    rows = [bucket.num_rows for bucket in decode_buckets(n)]
    assert rows == sorted(set(rows)) and rows[-1] == n
    for batch in range(1, n + 1):
        bucket = next(size for size in rows if size >= batch)
        assert bucket < 2 * batch, "less than half of it is padding"
    for most in (n + 255, 1000, 16384):
        buckets = prefill_buckets(most, n)
        assert buckets[-1].num_tokens == most
        assert all(min(n, 8) <= bucket.num_rows <= max(n, 8) for bucket in buckets)


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_10_a_full_batch_of_an_odd_size(engine, max_num_seqs, monkeypatch):
    llm = engine(max_num_seqs=max_num_seqs)
    spy = Spy(llm, monkeypatch)
    tokens(llm, [prompt(4, seed=s) for s in range(5)], greedy(4))
    assert max(len(rows) for _, rows in spy.batches) == max_num_seqs


TWO_ENGINES = """
import sys
from nanovllm_jax import LLM, SamplingParams

sizes = dict(max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64, num_kvcache_blocks=2)
first, second = (LLM(sys.argv[1], **sizes) for _ in range(2))
params = SamplingParams(temperature=0, max_tokens=3)
outputs = [llm.generate([[1, 2, 3]], params, use_tqdm=False) for llm in (first, second)]
assert outputs[0] == outputs[1]
second.add_request([5], params)
second.step()  # requests may be under way
print("done", flush=True)
"""


def test_11_two_engines_in_one_process_that_then_ends(checkpoint):
    """#19, #21, #61: ports collided, and exit hung."""
    command = [sys.executable, "-c", TWO_ENGINES, str(checkpoint())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(180, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "done\n"
        ended = time.perf_counter()
        assert process.wait(timeout=10) == 0
        assert time.perf_counter() - ended < 10
        watchdog.cancel()


def sized(llm, *, limit, in_use=0, step=0, **config):
    """The number of blocks that the engine would take on GPUs with this memory."""
    runner = copy.copy(llm.runner)
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": in_use})
    mesh = SimpleNamespace(local_devices=[device])
    runner.sharding = SimpleNamespace(mesh=mesh, size=lambda axis: 1)
    runner.platform = "gpu"
    runner._step_bytes = lambda: step
    names = ("max_num_seqs", "kvcache_block_size", "kv_cache_dtype")
    fields = {name: getattr(llm.config, name) for name in names}
    runner.config = SimpleNamespace(**(fields | {"gpu_memory_utilization": 0.9} | config))
    runner.programs = copy.copy(runner.programs)
    runner.programs.config = runner.config
    return runner._size_cache()


def test_12_the_cache_is_sized_from_what_this_engine_uses(engine, capsys):
    """The formula counted other processes' memory, and gave negative numbers of blocks."""
    llm, gib = engine(), 1 << 30
    block = 2 * 2 * 2 * 16 * 4 * BLOCK  # k and v, layers, KV heads, head_dim, float32
    blocks = sized(llm, limit=2 * gib)
    budget = 0.9 * 2 * gib - (512 << 20)
    assert 0.9 * budget <= blocks * block <= budget
    assert f"{blocks} blocks of 256 tokens" in capsys.readouterr().out
    for less in ({"in_use": gib}, {"step": gib}, {"gpu_memory_utilization": 0.5}):
        assert 0 < sized(llm, limit=2 * gib, **less) < blocks
    fp8 = sized(llm, limit=2 * gib, kv_cache_dtype="fp8")
    assert 0.9 * budget <= fp8 * block / 4 <= budget


def test_12_no_room_is_an_error_with_the_numbers(engine):
    with pytest.raises(ValueError, match=r"1024 MiB x 0.9 .* 700 .* 0 blocks.*num_kvcache_blocks"):
        sized(engine(), limit=1 << 30, in_use=700 << 20)


def test_12_num_kvcache_blocks_overrides_the_sizing(engine):
    assert engine(**TINY_POOL).runner.state.cache.k.shape[1] == 4


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None},
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "default"},
        },
    ],
)
def test_13_both_spellings_of_the_rope_settings(checkpoint, tmp_path, spelling):
    """#167, #198: transformers 5 renamed them, and the base fell back to 10,000."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint("gqa", **spelling), path)
    assert ModelConfig.from_directory(path).rope_theta == 5e5


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4}},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4}},
    ],
)
def test_13_an_unknown_rope_type_is_named(checkpoint, settings):
    with pytest.raises(ValueError, match="rope_type 'yarn'"):
        LLM(str(checkpoint("gqa", **settings)))


def test_14_decode_is_not_starved_by_arriving_prompts(engine, monkeypatch):
    """#73: while prompts arrived, running sequences waited."""
    llm = engine(max_model_len=640, max_num_batched_tokens=640)
    spy = Spy(llm, monkeypatch)
    runs = llm.add_request(prompt(5), greedy(30, ignore_eos=True))
    seed = 100
    while not llm.is_finished():
        if not any(runs == i for i, _ in llm.step()[0]) and seed < 130:
            llm.add_request(prompt(600, seed=(seed := seed + 1)), greedy(1))
    mine = [any(seq_id == runs for seq_id, _, _ in rows) for _, rows in spy.batches]
    last = max(i for i, here in enumerate(mine) if here)
    gaps = "".join("x" if here else "." for here in mine[: last + 1]).split("x")
    assert max(map(len, gaps)) <= 1, "a prefill round at most between two of its tokens"
    assert sum(is_prefill for is_prefill, _ in spy.batches[: last + 1]) > 20


def test_15_unknown_options_are_not_dropped(checkpoint):
    with pytest.raises(TypeError, match=r"max_seqs.*did you mean 'max_num_seqs'"):
        LLM(str(checkpoint()), max_seqs=3)


def test_15_every_eos_id_counts(checkpoint, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(checkpoint("gqa", eos_token_id=5), path)
    assert ModelConfig.from_directory(path).eos_token_ids == (5,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelConfig.from_directory(path).eos_token_ids == (7, 9)


def test_15_the_block_size_belongs_to_the_engine(engine, reference):
    small, large = engine(), engine(kvcache_block_size=512, num_kvcache_blocks=8)
    prompts = [prompt(n, seed=5) for n in (511, 512, 513, 700)]
    want = reference(prompts, greedy())
    poison(large)
    for llm in (large, small, large):
        assert tokens(llm, prompts, greedy()) == want
    assert small.pools[0].block_size == 256 and large.pools[0].block_size == 512


def test_15_leftover_requests_are_not_mixed_into_generate(engine):
    llm = engine()
    left = llm.add_request(prompt(20), greedy(2, ignore_eos=True))
    outputs = llm.generate([prompt(21)], greedy(9, ignore_eos=True), use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [9]
    finished, _ = llm.step()
    assert [(i, len(out)) for i, out in finished] == [(left, 2)]
    assert llm.is_finished()


def test_16_the_books_balance_after_every_step(engine):
    """mini-sglang #111, #113: abort and finish freed twice; batches in the order of a set."""
    llm = engine(**TINY_POOL)
    rng = np.random.default_rng(1)
    ids = [
        llm.add_request(prompt(int(n), seed=i), greedy(20, ignore_eos=True))
        for i, n in enumerate(rng.integers(1, 400, 10))
    ]
    seqs = {seq.seq_id: seq for seq in llm.scheduler.waiting}
    reported, aborted = [], set()
    for round_number in range(400):
        if llm.is_finished():
            break
        reported += [i for i, _ in llm.step()[0]]
        if round_number % 5 == 3:
            victim = seqs[ids[int(rng.integers(10))]]
            if not victim.is_finished:
                aborted.add(victim.seq_id)
            llm.scheduler.finish(victim)
        llm.pools[0].check([seq for seq in seqs.values() if seq.block_table])
    assert llm.is_finished()
    assert sorted(reported) == sorted(set(ids) - aborted) and aborted
    llm.pools[0].check([])


def test_16_batches_are_in_the_order_of_arrival(engine, monkeypatch):
    llm = engine()
    spy = Spy(llm, monkeypatch)
    tokens(llm, [prompt(n) for n in (9, 3, 7, 5)], greedy(5, ignore_eos=True))
    for _, rows in spy.batches:
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_17_one_step_ahead_gives_the_same_tokens(engine):
    """sglang-jax #1504: tokens written for unfinished chunks; a ring of futures wrapped."""
    rng = np.random.default_rng(2)
    lengths = [*rng.integers(1, 20, 12), 600, 630, 5, 620]
    prompts = [prompt(int(n), seed=i) for i, n in enumerate(lengths)]
    params = [SamplingParams(seed=i, max_tokens=1 + i % 3) for i in range(len(prompts))]
    chunked = {"max_model_len": 640, "max_num_batched_tokens": 640}
    ahead = tokens(engine(**chunked), prompts, params)
    assert ahead == tokens(engine(**chunked, async_scheduling=False), prompts, params)
    assert [len(out) for out in ahead] == [p.max_tokens for p in params]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_18_rope_angles_are_right_to_32k(head_dim, theta):
    """bfloat16 or TF32 angles round positions: an error of radians at 32k."""
    positions = np.array([0, 1, 2, 255, 256, 257, 1023, 4097, 8191, 16385, 32767])
    cos, sin = rope_angles(positions.astype(np.int32), head_dim, theta)
    angles = positions[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    # The inverse frequencies are float32: relative error 2^-23 or so of the angle.
    bound = 1e-6 + np.abs(angles) * 4 * 2.0**-23
    assert np.all(np.abs(cos - np.cos(angles)) <= bound)
    assert np.all(np.abs(sin - np.sin(angles)) <= bound)


def draws(logits, n=20_000, **options):
    """How often each token is drawn, over many positions."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    rows = {name: np.full(n, value, np.float32) for name, value in options.items()}
    logits = np.tile(np.asarray(logits, np.float32), (n, 1))
    top_k = rows["top_k"].astype(np.int32)
    filters = (rows["temperature"], top_k, rows["top_p"], rows["min_p"])
    logits = filter_logits(logits, *filters, vocab_size=logits.shape[1])
    seeds = np.full(n, 7, np.uint32)
    positions = np.arange(n, dtype=np.int32)
    drawn = sample(logits, rows["temperature"], seeds, positions, vocab_size=logits.shape[1])
    return np.bincount(np.asarray(drawn), minlength=logits.shape[1])


LOGITS = np.log([0.3, 0.02, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 3.0}, range(8)),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": 0.75}, [0, 2, 3, 4]),
        ({"min_p": 0.3}, [0, 2, 3, 4]),
        ({"top_k": 4, "top_p": 0.8}, [0, 2, 3]),  # of the four's mass, 0.8
        ({"temperature": 2.0, "min_p": 0.5}, [0, 2, 3, 4, 5]),
    ],
)
def test_19_samples_follow_the_distribution(options, kept):
    """One PRNG key was reused each step; a default top_k forced greedy."""
    weights = np.exp(LOGITS / options.get("temperature", 1.0))
    mask = np.isin(np.arange(8), list(kept))
    counts = draws(LOGITS, **options)
    assert counts[~mask].sum() == 0
    expected = np.where(mask, weights, 0)[mask]
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts[mask], expected).pvalue > 1e-3


def test_19_the_same_seed_gives_the_same_tokens_in_any_batch(engine):
    llm = engine()
    text = prompt(30)
    options = {"max_tokens": 12, "ignore_eos": True}
    params = SamplingParams(seed=11, top_p=0.95, temperature=1.5, **options)
    (alone,) = tokens(llm, [text], params)
    others = [SamplingParams(seed=i, top_k=i, **options) for i in range(6)]
    for place in (0, 3, 6):
        prompts = [prompt(9 + i) for i in range(6)]
        batch = [*others[:place], params, *others[place:]]
        prompts.insert(place, text)
        assert tokens(llm, prompts, batch)[place] == alone
    another = SamplingParams(seed=12, top_p=0.95, temperature=1.5, **options)
    assert tokens(llm, [text], another) != [alone]


def test_19_requests_without_a_seed_differ(engine):
    outputs = tokens(engine(), [prompt(30)] * 6, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len({tuple(out) for out in outputs}) == 6
    assert all(len(set(out)) > 2 for out in outputs)


@pytest.mark.parametrize(
    "collide",
    [
        lambda parent, content: 42,
        lambda parent, content: (parent + 1) % 2**64,
        lambda parent, content: 1 + content[0],
    ],
    ids=["constant", "of the parent alone", "of few tokens"],
)
def test_20_a_hash_collision_gives_nobody_anothers_cache(engine, reference, monkeypatch, collide):
    prompts = [prompt(n, seed=s) for s in (8, 9) for n in (600, 256, 257, 512)]
    want = reference(prompts, greedy(4))
    monkeypatch.setattr(block_manager, "hash_block", collide)
    llm = engine()
    poison(llm)
    for _ in range(2):
        assert tokens(llm, prompts, greedy(4)) == want
        llm.pools[0].check([])


def test_20_a_block_is_reused_behind_its_own_prefix_alone(engine, reference, monkeypatch):
    shared = prompt(BLOCK, seed=10)
    prompts = [[*prompt(BLOCK, seed=s), *shared, 5] for s in (11, 12)]
    want = reference(prompts, greedy(4))
    monkeypatch.setattr(  # the parent is forgotten
        block_manager, "hash_block", lambda parent, content: int.from_bytes(content[:64]) % 2**61
    )
    llm = engine()
    poison(llm)
    for _ in range(2):
        assert tokens(llm, prompts, greedy(4)) == want


def test_21_a_block_is_appended_when_the_next_token_needs_one():
    """A correct but cryptic condition was reported nine times: here it says what it means."""
    books = BlockManager(4, BLOCK)
    seq = Sequence(0, [1] * (BLOCK - 1), SamplingParams(), seed=0, max_tokens=600)
    books.allocate(seq)
    sizes = {}
    for position in range(BLOCK - 1, 2 * BLOCK + 2):
        seq.num_computed = position
        assert books.append(seq)
        sizes[position] = len(seq.block_table)
    assert sizes[BLOCK - 1] == 1 and sizes[BLOCK] == 2
    assert sizes[2 * BLOCK - 1] == 2 and sizes[2 * BLOCK] == 3
