"""Greedy float32 tokens equal those of transformers on every path through the engine.

Where prompts or sampling are other than the oracle's, the reference is an engine with room for
everything, one request at a time from an empty cache. The KV cache is filled with NaN first, so
that reading a position which nobody has written shows.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import SMALL
from helpers import (
    BLOCK,
    EDGES,
    NEW,
    Spy,
    edge_prompts,
    greedy,
    poison,
    prompt,
    quick_start,
    tokens,
)

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine import block_manager

TINY_POOL = {"num_kvcache_blocks": 4}
CHUNKED = {"max_model_len": 640, "max_num_batched_tokens": 640}


@pytest.fixture
def expected(checkpoint, oracle):
    """The oracle's tokens for the edge prompts, of a shape."""
    return lambda shape="gqa", **options: oracle(checkpoint(shape, **options), edge_prompts(), NEW)


@pytest.fixture
def reference(engine):
    """reference(prompts, params) -> what each gives alone, from an empty cache."""

    def run(prompts, params):
        llm = engine()
        results = []
        for text in prompts:
            llm.reset_prefix_cache()
            results += tokens(llm, [text], params)
        return results

    return run


@pytest.fixture
def poisoned(engine):
    """Like `engine`, with NaN wherever the cache is not written."""

    def make(*args, **options):
        llm = engine(*args, **options)
        poison(llm)
        return llm

    return make


def dtypes(llm):
    """What the weights and the cache are kept in."""
    arrays = jax.tree.leaves((llm.runner.weights, llm.runner.state.cache))
    return {str(array.dtype) for array in arrays}


def test_oracle_outputs_are_diverse(expected):
    outputs = expected()
    assert len({tuple(out) for out in outputs}) == len(EDGES)
    assert all(len(set(out)) > NEW // 2 for out in outputs)


# --- prompts, options, dtypes ---


@pytest.mark.parametrize("shape", ["gqa", "mqa", "mha"])
def test_prompts_around_block_edges(poisoned, expected, shape):
    assert tokens(poisoned(shape), edge_prompts(), greedy()) == expected(shape)


def test_long_outputs_cross_blocks(engine, checkpoint, oracle):
    prompts = [prompt(n, seed=3) for n in (3, 250, 500)]
    assert tokens(engine(), prompts, greedy(40)) == oracle(checkpoint(), prompts, 40)


def test_every_bucket(poisoned, expected):
    """Batches run in the buckets that fit them, not in the largest of each kind alone."""
    llm = poisoned(every_bucket=True)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    llm.reset_prefix_cache()
    assert [tokens(llm, [text], greedy())[0] for text in edge_prompts()] == expected()


@pytest.mark.parametrize("max_num_seqs", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_few_slots(poisoned, expected, monkeypatch, max_num_seqs):
    """nano-vLLM #216: buckets missed batch sizes that are no multiple of 16."""
    llm = poisoned(max_num_seqs=max_num_seqs)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    assert max(len(rows) for _, rows in spy.batches) == max_num_seqs


def test_eager(poisoned, expected):
    assert tokens(poisoned(enforce_eager=True), edge_prompts(), greedy()) == expected()


def test_the_block_size_belongs_to_the_engine(engine, poisoned, reference):
    """nano-vLLM kept it in the class of sequences, where two engines overwrote each other's."""
    prompts = [prompt(n, seed=5) for n in (511, 512, 513, 700)]
    want = reference(prompts, greedy())
    small, large = engine(), poisoned(kvcache_block_size=512, num_kvcache_blocks=8)
    for llm in (large, small, large):
        assert tokens(llm, prompts, greedy()) == want
    assert small.pools[0].block_size == 256 and large.pools[0].block_size == 512


def test_bfloat16_agrees_mostly(engine, checkpoint, oracle):
    """Rounding flips near ties, and what follows a flip differs: compare first tokens alone."""
    llm = engine("mqa", dtype="bfloat16", checkpoint={"dtype": "bfloat16"})
    assert dtypes(llm) == {"bfloat16"}
    got = tokens(llm, edge_prompts(), greedy())
    want = oracle(checkpoint("mqa", dtype="bfloat16"), edge_prompts(), NEW)
    agree = sum(a[0] == b[0] for a, b in zip(got, want, strict=True))
    assert agree >= len(EDGES) - 2
    assert all(len(out) == NEW for out in got)


def test_a_bfloat16_checkpoint_on_a_cpu_computes_in_float32(engine, checkpoint, oracle):
    want = oracle(checkpoint("mqa", dtype="bfloat16"), edge_prompts(), NEW)
    for dtype in ("float32", None):
        llm = engine("mqa", dtype=dtype, checkpoint={"dtype": "bfloat16"})
        assert dtypes(llm) == {"float32"}
        assert tokens(llm, edge_prompts(), greedy()) == want


# --- several devices, several engines ---


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
def test_tensor_parallel(poisoned, engine, expected, size):
    llm = poisoned("eight_heads", tensor_parallel_size=size)
    assert tokens(llm, edge_prompts(), greedy()) == expected("eight_heads")
    shards = llm.runner.state.cache.k.sharding
    assert len(shards.device_set) == size and not shards.is_fully_replicated

    params = [SamplingParams(seed=i, max_tokens=20, top_p=0.9, top_k=40) for i in range(5)]
    prompts = [prompt(20, seed=i) for i in range(5)]
    assert tokens(llm, prompts, params) == tokens(engine("eight_heads"), prompts, params)


def test_two_engines_in_two_threads(checkpoint, expected):
    """They start, and then generate, at the same time."""

    def run(blocks):
        with LLM(str(checkpoint()), **(SMALL | {"num_kvcache_blocks": blocks})) as llm:
            return [tokens(llm, edge_prompts(), greedy()) for _ in range(4)]

    with quick_start(), ThreadPoolExecutor(2) as pool:
        for outputs in pool.map(run, (4, 16)):
            assert outputs == [expected()] * 4


# --- chunked prefill, preemption ---


def test_chunked_prefill(poisoned, expected, reference, monkeypatch):
    """nano-vLLM #212: chunks attended to positions that nobody had written."""
    prompts = [prompt(n, seed=3) for n in (500, 630, 257, 300)]
    want = reference(prompts, greedy())
    llm = poisoned(**CHUNKED)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    assert spy.prefill_tokens == sum(EDGES)
    assert tokens(llm, prompts, greedy()) == want
    chunks = [row for is_prefill, rows in spy.batches if is_prefill for row in rows]
    assert sum(start > 0 for _, start, _ in chunks) >= 3, "hardly a prompt was cut"


def arrive(llm, prompts, params, every: int) -> list[list[int]]:
    """Enter requests one by one, `every` rounds apart, and return what they give."""
    ids, results, rounds = [], {}, 0
    while len(results) < len(prompts):
        if rounds % every == 0 and len(ids) < len(prompts):
            ids.append(llm.add_request(prompts[len(ids)], params))
        results |= llm.step()[0]
        rounds += 1
    return [results[i] for i in ids]


@pytest.mark.parametrize("ahead", [True, False])
def test_small_chunks_beside_sequences_that_decode(poisoned, reference, monkeypatch, ahead):
    prompts = [prompt(n, seed=4) for n in (20, 300, 500, 257, 64)]
    want = reference(prompts, greedy(40))
    llm = poisoned(chunked_prefill_size=64, async_scheduling=ahead)
    spy = Spy(llm, monkeypatch)
    assert arrive(llm, prompts, greedy(40), every=3) == want
    sizes = [sum(n for _, _, n in rows) for is_prefill, rows in spy.batches if is_prefill]
    assert max(sizes) == 64 and len(sizes) >= 1000 // 64
    kinds = "".join("dp"[is_prefill] for is_prefill, _ in spy.batches)
    assert "pp" not in kinds, "sequences that decode wait for two prefills"


MIXED = {"enable_mixed_chunk": True, "chunked_prefill_size": 64}


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"mesh_shape": {"data": 2}}])
def test_mixed_steps(poisoned, reference, monkeypatch, options):
    prompts = [prompt(n, seed=4) for n in (20, 300, 500, 257, 64, 1)]
    want = reference(prompts, greedy(40))
    llm = poisoned(**MIXED, **options)
    spy = Spy(llm, monkeypatch)
    assert arrive(llm, prompts, greedy(40), every=3) == want
    mixed = [rows for (_, rows), n in zip(spy.batches, spy.num_decodes, strict=True) if n]
    assert max(sum(n for _, _, n in rows) for rows in mixed) == 64
    assert max(spy.num_decodes) >= 2 and len(mixed) >= 1000 // 64
    assert any(not is_prefill for is_prefill, _ in spy.batches), "mixed without chunks"


def test_mixed_steps_in_every_bucket(new_engine, checkpoint, reference, monkeypatch):
    prompts = [prompt(n, seed=5) for n in (20, 300, 3, 630, 64, 1)]
    want = reference(prompts, greedy(20))
    llm = new_engine(checkpoint(), every_bucket=True, enable_mixed_chunk=True)
    poison(llm)
    buckets, prepare = set(), llm.runner.packer.prepare

    def recording(batch, bucket, shards):
        buckets.add(bucket)
        return prepare(batch, bucket, shards)

    monkeypatch.setattr(llm.runner.packer, "prepare", recording)
    assert arrive(llm, prompts, greedy(20), every=2) == want
    assert sum(bucket.is_mixed for bucket in buckets) >= 3


def test_mixed_steps_with_preemption(poisoned, expected, monkeypatch):
    llm = poisoned(**TINY_POOL, **MIXED)
    spy = Spy(llm, monkeypatch)
    for every in (1, 2):
        assert arrive(llm, edge_prompts(), greedy(), every) == expected()
    assert spy.preempted and any(spy.num_decodes)


def test_preemption(poisoned, expected, monkeypatch):
    llm = poisoned(**TINY_POOL)
    spy = Spy(llm, monkeypatch)
    prompts, want = edge_prompts(), expected()
    order = [2, 3, 0, 1, 4, 5]  # 255 and 256 first: both soon need a second block
    got = tokens(llm, [prompts[i] for i in order], greedy())
    assert got == [want[i] for i in order]
    assert spy.preempted
    llm.pools[0].check([])


@pytest.mark.parametrize("ahead", [True, False])
def test_no_token_is_lost_when_a_preempted_sequence_is_computed_again(
    poisoned, reference, monkeypatch, ahead
):
    """nano-vLLM #217."""
    prompts = [prompt(n, seed=4) for n in (250, 251, 252, 253)]
    want = reference(prompts, greedy(30))
    llm = poisoned(**TINY_POOL, async_scheduling=ahead)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, prompts, greedy(30)) == want
    assert spy.preempted


def test_a_prefix_hit_after_preemption(poisoned, reference, monkeypatch):
    """nano-vLLM #207, #210, #233: cached tokens were counted after scheduling."""
    prompts = [prompt(510, seed=1), prompt(500, seed=2)]
    want = reference(prompts, greedy(20))
    llm = poisoned(**TINY_POOL)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, prompts, greedy(20)) == want
    assert spy.preempted == [spy.batches[0][1][1][0]], "the second is preempted, once"
    starts = [at for is_prefill, rows in spy.batches[1:] if is_prefill for _, at, _ in rows]
    assert starts == [BLOCK], "its first block is found again"


def test_a_sequence_that_outgrows_the_pool_fails_alone(poisoned, reference):
    """nano-vLLM #274, #277: the engine asserted or hung."""
    prompts, lengths = [prompt(510), prompt(30), prompt(200)], [50, 12, 12]
    want = reference(prompts, greedy(12))
    llm = poisoned(num_kvcache_blocks=2)
    big, *others = llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert "513 tokens need 3 blocks of 256, the pool has 2" in big["error"]
    assert big["token_ids"] == want[0][:3]
    assert not any("error" in output for output in others)
    assert [output["token_ids"] for output in others] == want[1:]
    assert llm.is_finished()
    llm.pools[0].check([])
    assert tokens(llm, prompts[1:], greedy(12)) == want[1:]


# --- prefix cache ---


def test_repeated_prompts_are_prefix_hits(poisoned, expected, monkeypatch):
    """nano-vLLM #144, #199: a prompt that was cached whole gave a prefill of no tokens."""
    llm = poisoned()
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    assert spy.prefill_tokens == sum(EDGES)
    for _ in range(2):
        spy.batches.clear()
        assert tokens(llm, edge_prompts(), greedy()) == expected()
        # What is left to compute: all of a short prompt, one token of a prompt of full blocks.
        assert spy.prefill_tokens == 1 + 5 + 255 + 1 + 1 + 1


def test_a_hit_in_the_same_step_reads_what_the_step_writes(poisoned, reference):
    """nano-vLLM #208: blocks were hashed before their keys and values existed."""
    text = prompt(2 * BLOCK + 30)
    prompts = [text, text, text[: BLOCK + 5], text[: 2 * BLOCK]]
    want = reference(prompts, greedy())
    assert tokens(poisoned(), prompts, greedy()) == want


def test_a_hit_between_the_chunks_of_a_prompt(poisoned, reference):
    text = prompt(630)
    prompts = [prompt(300, seed=7), text, text, text]
    want = reference(prompts, greedy(6))
    assert tokens(poisoned(**CHUNKED), prompts, greedy(6)) == want


def test_identical_prompts_in_one_step_share_blocks(engine, monkeypatch):
    """nano-vLLM #219: they shared none, or a later hash overwrote the first."""
    llm = engine()
    spy = Spy(llm, monkeypatch)
    first, *rest = tokens(llm, [prompt(BLOCK + 40)] * 3, greedy(4))
    assert rest == [first] * 2
    assert [n for _, _, n in spy.batches[0][1]] == [BLOCK + 40, 40, 40]
    assert len(llm.pools[0].cached) == 1
    assert tokens(llm, [prompt(BLOCK + 40)], greedy(4)) == [first]


def test_no_stale_hash_after_blocks_are_reused(poisoned, reference):
    """nano-vLLM #163."""
    rng = np.random.default_rng(0)
    bases = [prompt(600, seed=s) for s in range(3)]
    prompts = [bases[rng.integers(3)][: rng.choice([200, 256, 300, 512, 600])] for _ in range(14)]
    want = reference(prompts, greedy(4))
    llm = poisoned(**TINY_POOL)
    for start in range(0, 14, 5):
        part = slice(start, start + 5)
        assert tokens(llm, prompts[part], greedy(4)) == want[part]
        llm.pools[0].check([])


@pytest.mark.parametrize(
    "collide",
    [
        lambda parent, content: 42,
        lambda parent, content: (parent + 1) % 2**64,
        lambda parent, content: 1 + content[0],
        lambda parent, content: int.from_bytes(content[:64]) % 2**61,
    ],
    ids=["constant", "of the parent alone", "of few tokens", "without the parent"],
)
def test_a_hash_collision_gives_nobody_anothers_cache(poisoned, reference, monkeypatch, collide):
    """Other engines compare hashes alone."""
    prompts = [prompt(n, seed=s) for s in (8, 9) for n in (600, 256, 257, 512)]
    shared = prompt(BLOCK, seed=10)  # the same block behind two prefixes
    prompts += [[*prompt(BLOCK, seed=s), *shared, 5] for s in (11, 12)]
    want = reference(prompts, greedy(4))
    monkeypatch.setattr(block_manager, "hash_block", collide)
    llm = poisoned()
    for _ in range(2):
        assert tokens(llm, prompts, greedy(4)) == want
        llm.pools[0].check([])


# --- one step ahead ---


def churn(llm, count):
    """Many short requests of mixed sampling, some of which end early; their tokens."""
    rng = np.random.default_rng(0)
    prompts = [prompt(int(n), seed=i) for i, n in enumerate(rng.integers(1, 60, count))]
    params = [
        SamplingParams(
            temperature=(0.0, 1.0, 0.7)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            max_tokens=1 + i % 7,
            seed=i,
            stop_token_ids=range(0, 131, 2) if i % 2 == 0 else (),
        )
        for i in range(count)
    ]
    return tokens(llm, prompts, params), params


def test_asynchronous_equals_synchronous(engine, expected):
    in_step = engine(async_scheduling=False)
    poison(in_step)
    assert tokens(in_step, edge_prompts(), greedy()) == expected()
    one_ahead, params = churn(engine(), 3 * 4 + 5)
    assert one_ahead == churn(in_step, 3 * 4 + 5)[0]
    lengths = [len(out) for out in one_ahead]
    assert any(n < p.max_tokens for n, p in zip(lengths, params, strict=True)), "none stopped early"


def test_asynchronous_equals_synchronous_with_eos(engine, monkeypatch):
    outputs = []
    for options in ({}, {"async_scheduling": False}):
        llm = engine(**options)
        monkeypatch.setattr(llm.scheduler, "eos_token_ids", frozenset(range(0, 131, 5)))
        outputs.append(tokens(llm, edge_prompts() * 2, SamplingParams(seed=3, max_tokens=30)))
    assert outputs[0] == outputs[1]
    assert any(len(out) < 30 for out in outputs[0])


def test_asynchronous_equals_synchronous_in_chunks(engine):
    """sglang-jax #1504: tokens were written for unfinished chunks; a ring of futures wrapped."""
    rng = np.random.default_rng(2)
    lengths = [*rng.integers(1, 20, 12), 600, 630, 5, 620]
    prompts = [prompt(int(n), seed=i) for i, n in enumerate(lengths)]
    params = [SamplingParams(seed=i, max_tokens=1 + i % 3) for i in range(len(prompts))]
    ahead = tokens(engine(**CHUNKED), prompts, params)
    assert ahead == tokens(engine(**CHUNKED, async_scheduling=False), prompts, params)
    assert [len(out) for out in ahead] == [p.max_tokens for p in params]


# --- several decode steps in a call ---


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("ahead", [True, False])
def test_any_number_of_decode_steps_in_a_call(poisoned, expected, monkeypatch, steps, ahead):
    """Requests end inside a call, by max_tokens and by a token; blocks begin inside."""
    llm, prompts = poisoned(num_scheduler_steps=steps, async_scheduling=ahead), edge_prompts()
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, prompts, greedy()) == expected()
    assert set(spy.num_steps) == {1, steps} or steps > NEW
    whole = tokens(llm, prompts, greedy(40, ignore_eos=True))
    params = [
        greedy(40 - i, ignore_eos=True, stop_token_ids=whole[i][7 * i : 7 * i + 1])
        for i in range(len(prompts))
    ]
    want = [
        tokens[: min(40 - i, tokens.index(*params[i].stop_token_ids) + 1)]
        for i, tokens in enumerate(whole)
    ]
    assert len(set(map(len, want))) > 3
    assert tokens(llm, prompts, params) == want
    assert max(spy.num_steps) == steps


def test_a_request_may_be_aborted_inside_a_call(poisoned, reference):
    prompts = [prompt(n, seed=n) for n in (9, 254, 30)]
    want = reference(prompts, greedy(40, ignore_eos=True))
    llm = poisoned(num_scheduler_steps=16)
    for rounds in range(2, 12):  # of which the first ones are prefill and its read
        ids = [llm.add_request(text, greedy(40, ignore_eos=True)) for text in prompts]
        reported = {}
        for count in range(200):
            if count == rounds:
                llm.abort_request(ids[0])
            reported |= dict(llm.step()[0])
            if llm.is_finished():
                break
        assert [reported[i] for i in ids[1:]] == want[1:]
        assert reported[ids[0]] == want[0][: len(reported[ids[0]])]
        assert len(reported[ids[0]]) <= rounds
        llm.pools[0].check([])


def test_a_round_of_step_is_one_token_of_each_sequence(engine):
    """nano-vLLM's contract, however many steps a call takes."""
    llm = engine(num_scheduler_steps=16)
    for n in (20, 30):
        llm.add_request(prompt(n), greedy(33, ignore_eos=True))
    counts = []
    while not llm.is_finished():
        before = [seq.num_completion_tokens for seq in llm.scheduler.running]
        counts.append(llm.step()[1])
        after = [seq.num_completion_tokens for seq in llm.scheduler.running]
        if before and after:
            assert after == [n + 1 for n in before]
    assert counts == [50] + 32 * [-2]


def test_the_device_knows_the_tokens_whose_keys_it_holds(poisoned, expected):
    """What penalties and drafts will read: under chunks, hits, preemption and several steps."""
    for options in ({}, CHUNKED, TINY_POOL, {"mesh_shape": {"data": 2}}):
        llm = poisoned(**options)
        for _ in range(2):
            assert tokens(llm, edge_prompts(), greedy()) == expected()
        table = np.asarray(llm.runner.state.token_ids)
        blocks_of_a_shard = len(table) // len(llm.pools)
        known = 0
        for shard, pool in enumerate(llm.pools):
            for block in pool.cached.values():
                held = table[shard * blocks_of_a_shard + block.block_id]
                assert held.tobytes() == block.content.tokens
                known += 1
        assert known >= 3


# --- seeds ---


def test_the_same_seed_gives_the_same_tokens_in_any_batch(engine):
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


def test_requests_without_a_seed_differ(engine):
    outputs = tokens(engine(), [prompt(30)] * 6, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len({tuple(out) for out in outputs}) == 6
    assert all(len(set(out)) > 2 for out in outputs)
