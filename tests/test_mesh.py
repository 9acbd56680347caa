"""Every mesh and every set of sharding rules gives the same tokens; wrong ones name the fix."""

import jax
import pytest
from helpers import NEW, Spy, edge_prompts, greedy, poison, prompt, tokens

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sharding import make_sharding, merge_rules
from nanovllm_jax.weights import load_weights

BLOCK = 4


@pytest.fixture
def expected(checkpoint, oracle):
    return lambda shape: oracle(checkpoint(shape), edge_prompts(), NEW)


@pytest.mark.parametrize(
    ("shape", "data", "tensor"),
    [
        ("eight_heads", 2, 2),  # (1 x 2, 1 x 4 and 1 x 8: test_parity.test_tensor_parallel)
        pytest.param("eight_heads", 2, 4, marks=pytest.mark.slow),
        pytest.param("eight_heads", 8, 1, marks=pytest.mark.slow),
        ("gqa", 3, 2),  # 6 query heads, an odd vocabulary, 4 slots over 3 shards
    ],
)
def test_same_tokens_on_every_mesh(engine, expected, shape, data, tensor):
    llm = engine(shape, mesh_shape={"data": data, "tensor": tensor})
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected(shape)
    assert len(llm.pools) == data
    cache = llm.runner.state.cache.k
    assert len(cache.sharding.device_set) == data * tensor
    assert cache.addressable_shards[0].data.size * data * tensor == cache.size
    for pool in llm.pools:
        pool.check([])


@pytest.mark.parametrize(
    "rules",
    [
        # the residual stream cut by tokens
        {"activation_tokens": ["data", "tensor"]},
        *(
            pytest.param(rules, marks=pytest.mark.slow)
            for rules in (
                {"ffn": None, "heads": None, "kv_heads": None, "batch": ["data", "tensor"],
                 "activation_tokens": ["data", "tensor"], "vocab": None},
                {"activation_tokens": None, "activation_embed": "tensor"},
                {"vocab": ("data", "tensor"), "batch": None, "activation_tokens": None},
                {"embed": "data", "batch": None, "activation_tokens": None},
            )
        ),
    ],
)  # fmt: skip
def test_same_tokens_under_other_rules(engine, expected, rules):
    llm = engine("eight_heads", mesh_shape={"data": 2, "tensor": 2}, sharding_rules=rules)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy()) == expected("eight_heads")


def test_same_tokens_when_chunked_preempted_and_drawn(engine):
    """Two data shards of small pools; what is drawn does not depend on where it runs."""
    params = [SamplingParams(seed=i, max_tokens=30, top_p=0.9, temperature=1.0) for i in range(8)]
    prompts = [prompt(n, seed=n) for n in (250, 255, 600, 3, 400, 254, 253, 90)]
    want = tokens(engine("eight_heads"), prompts, params)
    llm = engine("eight_heads", mesh_shape={"data": 2, "tensor": 1}, num_kvcache_blocks=4)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(llm, patch)
        assert tokens(llm, prompts, params) == want
    assert spy.preempted
    assert any(start > 0 for kind, rows in spy.batches if kind for _, start, _ in rows)


@pytest.mark.slow
def test_eager_on_a_mesh(engine, expected):
    llm = engine("eight_heads", mesh_shape={"data": 2, "tensor": 2}, enforce_eager=True)
    some = slice(1, 4)
    assert tokens(llm, edge_prompts()[some], greedy()) == expected("eight_heads")[some]


# --- the scheduler's shards ---


def make_scheduler(num_blocks=4, shards=2, max_num_seqs=5, max_tokens=8):
    return Scheduler(
        [BlockManager(num_blocks, BLOCK) for _ in range(shards)],
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_prefill_seqs=4,
    )


def add(scheduler, seq_id, length, first=None, max_tokens=20):
    ids = list(range(first or 100 * seq_id, (first or 100 * seq_id) + length))
    seq = Sequence(seq_id, ids, SamplingParams(max_tokens=max_tokens), 0, max_tokens)
    scheduler.add(seq)
    return seq


def run(scheduler):
    batch = scheduler.schedule()
    scheduler.postprocess(batch, [7] * len(batch.seqs))
    for shard, pool in enumerate(scheduler.pools):
        everyone = [*scheduler.running, *scheduler.waiting]
        pool.check([seq for seq in everyone if seq.shard == shard and seq.block_table])
    return batch


def test_slots_are_dealt_out_once():
    scheduler = make_scheduler(shards=3)
    assert sorted(slot for slots in scheduler.free_slots for slot in slots) == list(range(5))
    assert max(map(len, scheduler.free_slots)) == 2  # ceil(5 / 3): the rows of a shard's bucket


def test_sequences_spread_over_the_shards():
    scheduler = make_scheduler()
    seqs = [add(scheduler, i + 1, 2) for i in range(4)]
    assert len(run(scheduler).seqs) == 4
    assert sorted(seq.shard for seq in seqs) == [0, 0, 1, 1]


def test_each_shard_has_its_own_token_budget():
    scheduler = make_scheduler()
    first, second = add(scheduler, 1, 12), add(scheduler, 2, 12)
    assert run(scheduler).lengths == [8, 8]  # one chunk of each, side by side
    assert {first.shard, second.shard} == {0, 1}
    assert run(scheduler).lengths == [4, 4]


def test_a_sequence_goes_where_its_prefix_is():
    scheduler = make_scheduler()
    add(scheduler, 1, 2)
    first = add(scheduler, 2, 8)
    run(scheduler)
    again = add(scheduler, 3, 9, first=200)
    while again.slot < 0:
        run(scheduler)
    assert again.shard == first.shard and again.num_cached == 8


def test_a_shard_preempts_its_own_sequences_only():
    scheduler = make_scheduler(num_blocks=3, max_tokens=16)
    old, new, other = add(scheduler, 1, 8), add(scheduler, 2, 2), add(scheduler, 3, 2)
    run(scheduler)
    assert old.shard == other.shard != new.shard
    while all(seq.block_table for seq in (old, new, other)):
        run(scheduler)
    assert not other.block_table and old.block_table and new.block_table


def test_a_partly_computed_prompt_stays_ahead_of_a_preempted_sequence():
    scheduler = make_scheduler(num_blocks=3, max_tokens=8)
    runs = [add(scheduler, i, 3, max_tokens=8) for i in (1, 2, 3, 4)]
    run(scheduler)
    long = add(scheduler, 5, 11, max_tokens=1)  # fits nowhere yet: blocks are taken
    while not scheduler.is_finished:
        run(scheduler)
        partly = [bool(seq.block_table) for seq in scheduler.waiting]
        assert partly == sorted(partly, reverse=True)
    assert long.is_finished and all(seq.is_finished for seq in runs)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mesh_shape": {"data": 3, "tensor": 3}}, ValueError, "9 devices"),
        ({"mesh_shape": {"model": 2}}, ValueError, r"no axis 'model'. Valid: \['data', 'tensor'\]"),
        ({"mesh_shape": {"data": 0}}, ValueError, r"mesh_shape\['data'\] must be a positive"),
        ({"mesh_shape": 4}, TypeError, "mesh_shape must be a dict"),
        ({"mesh_shape": {"tensor": 2}, "tensor_parallel_size": 4}, ValueError, "contradicts"),
        ({"sharding_rules": {"head": "tensor"}}, ValueError, "did you mean 'heads'"),
        ({"sharding_rules": {"ffn": "model"}}, ValueError, "'model', which is no mesh axis"),
        ({"sharding_rules": {"heads": None}}, ValueError, "alike"),
        ({"sharding_rules": {"embed": "tensor"}}, ValueError, "twice over the same mesh axis"),
        ({"mesh_shape": {"tensor": 4}}, ValueError, r"valid tensor parallel sizes: \[1, 2, 6\]"),
    ],
)
def test_a_wrong_mesh_or_rule_is_refused_by_name(checkpoint, options, error, said):
    with pytest.raises(error, match=said):
        LLM(str(checkpoint()), **options)


def test_weights_are_placed_by_the_rules(checkpoint):
    sharding = make_sharding({"data": 2, "tensor": 2}, merge_rules({"ffn": None}))
    config = ModelConfig.from_directory(checkpoint("eight_heads")).sharded(sharding.size)
    copies = [
        len({str(shard.index) for shard in array.addressable_shards})
        for array in jax.tree.leaves(load_weights(config, sharding, checkpoint("eight_heads")))
        if array.size > 1_000
    ]
    assert set(copies) == {1, 2}
