"""Greedy float32 tokens equal those of transformers on every path through the engine."""

import jax
import numpy as np
import pytest
from helpers import EDGES, NEW, Spy, edge_prompts, greedy, poison, prompt, tokens

from nanovllm_jax import SamplingParams


@pytest.fixture
def expected(checkpoint, oracle):
    """The oracle's tokens for the edge prompts, of a shape."""
    return lambda shape="gqa", **options: oracle(checkpoint(shape, **options), edge_prompts(), NEW)


def dtypes(llm):
    """What the weights and the cache are kept in."""
    arrays = jax.tree.leaves((llm.runner.weights, llm.runner.state.cache))
    return {str(array.dtype) for array in arrays}


def test_oracle_outputs_are_diverse(expected):
    outputs = expected()
    assert len({tuple(out) for out in outputs}) == len(EDGES)
    assert all(len(set(out)) > NEW // 2 for out in outputs)


@pytest.mark.parametrize("shape", ["gqa", "mqa", "mha"])
def test_prompts_around_block_edges(engine, expected, shape):
    llm = engine(shape)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected(shape)


def test_long_outputs_cross_blocks(engine, checkpoint, oracle):
    prompts = [prompt(n, seed=3) for n in (3, 250, 500)]
    assert tokens(engine(), prompts, greedy(40)) == oracle(checkpoint(), prompts, 40)


def test_chunked_prefill(engine, expected, monkeypatch):
    llm = engine(max_model_len=640, max_num_batched_tokens=640)
    poison(llm)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    chunks = [row for is_prefill, rows in spy.batches if is_prefill for row in rows]
    assert any(start > 0 for _, start, _ in chunks), "no prompt was cut"
    assert spy.prefill_tokens == sum(EDGES)


def test_preemption(engine, expected, monkeypatch):
    llm = engine(num_kvcache_blocks=4)
    poison(llm)
    spy = Spy(llm, monkeypatch)
    prompts, want = edge_prompts(), expected()
    order = [2, 3, 0, 1, 4, 5]  # 255 and 256 first: both soon need a second block
    got = tokens(llm, [prompts[i] for i in order], greedy())
    assert got == [want[i] for i in order]
    assert spy.preempted
    llm.pools[0].check([])


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_few_slots(engine, expected, max_num_seqs):
    llm = engine(max_num_seqs=max_num_seqs)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected()


def test_repeated_prompts_are_prefix_hits(engine, expected, monkeypatch):
    llm = engine()
    poison(llm)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    assert spy.prefill_tokens == sum(EDGES)
    spy.batches.clear()
    assert tokens(llm, edge_prompts(), greedy()) == expected()
    # What is left to compute: all of a short prompt, one token of a prompt of full blocks.
    assert spy.prefill_tokens == 1 + 5 + 255 + 1 + 1 + 1


@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel(engine, expected, size):
    llm = engine("eight_heads", tensor_parallel_size=size)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected("eight_heads")
    shards = llm.runner.state.cache.k.sharding
    assert len(shards.device_set) == size and not shards.is_fully_replicated


def test_tensor_parallel_samples_the_same_tokens(engine):
    params = [SamplingParams(seed=i, max_tokens=20, top_p=0.9, top_k=40) for i in range(5)]
    prompts = [prompt(20, seed=i) for i in range(5)]
    one, eight = (engine("eight_heads", tensor_parallel_size=n) for n in (1, 8))
    assert tokens(one, prompts, params) == tokens(eight, prompts, params)


def test_eager(engine, expected):
    llm = engine(enforce_eager=True)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected()


def test_synchronous(engine, expected):
    llm = engine(async_scheduling=False)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected()


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
            stop_token_ids=range(0, 131, 4) if i % 4 == 0 else (),
        )
        for i in range(count)
    ]
    return tokens(llm, prompts, params), params


def test_asynchronous_equals_synchronous(engine):
    one_ahead, params = churn(engine(), 3 * 4 + 5)
    in_step, _ = churn(engine(async_scheduling=False), 3 * 4 + 5)
    assert one_ahead == in_step
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


def test_bfloat16_agrees_mostly(engine, checkpoint, oracle):
    """Rounding flips near ties, and what follows a flip differs: compare first tokens alone."""
    llm = engine("mqa", dtype="bfloat16", checkpoint={"dtype": "bfloat16"})
    assert {
        str(x.dtype) for x in jax.tree.leaves((llm.runner.weights, llm.runner.state.cache))
    } == {"bfloat16"}
    got = tokens(llm, edge_prompts(), greedy())
    want = oracle(checkpoint("mqa", dtype="bfloat16"), edge_prompts(), NEW)
    agree = sum(a[0] == b[0] for a, b in zip(got, want, strict=True))
    assert agree >= len(EDGES) - 2
    assert all(len(out) == NEW for out in got)


def test_bfloat16_checkpoint_cast_to_float32(engine, checkpoint, oracle):
    llm = engine("mqa", checkpoint={"dtype": "bfloat16"})  # the fixture asks for float32
    want = oracle(checkpoint("mqa", dtype="bfloat16"), edge_prompts(), NEW)
    assert tokens(llm, edge_prompts(), greedy()) == want


def test_without_a_named_dtype_a_cpu_computes_in_float32(engine):
    llm = engine("mqa", dtype=None, checkpoint={"dtype": "bfloat16"})
    assert {
        str(x.dtype) for x in jax.tree.leaves((llm.runner.weights, llm.runner.state.cache))
    } == {"float32"}
