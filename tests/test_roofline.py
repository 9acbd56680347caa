"""The cost model: a step's bytes and operations, from the weights' own shapes and types."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.sharding import make_sharding, merge_rules
from nanovllm_jax.tools.roofline import CostModel, Work, find_hardware
from nanovllm_jax.tools.shapes import SHAPES

# D 4, F 6, 2 layers, 2 query heads over 1 of size 2, 10 words
MODEL = ModelConfig("Qwen3ForCausalLM", 10, 4, 6, 2, 2, 1, 2, max_position_embeddings=64)
LAYER_WEIGHTS = 4 * (2 + 2) * 2 + 2 * 2 * 4 + 3 * 4 * 6  # qkv, o, gate-up-down: 32 + 16 + 72


def costs(model=MODEL, **options):
    return CostModel(model, parameters(model), **options)


def on_mesh(model=MODEL, rules=None, **mesh):
    sharding = make_sharding(mesh, merge_rules(rules or {}))
    return costs(model.sharded(sharding.size), sharding=sharding)


def test_a_decode_step():
    work = costs().categories([7, 11], [1, 1])  # contexts of 8 and 12
    kv = 20 * 2 * 2 * 2  # positions, k and v, elements, bytes
    q_and_out = 2 * 2 * 4 * 2  # rows, both, elements, bytes
    assert work["attention"].bytes == 2 * (kv + q_and_out)
    assert work["attention"].flops == 2 * 20 * (2 * 2 * 4)  # q k and p v, both over 2 heads of 2
    assert work["KV write"].bytes == 2 * 2 * (8 + 4 + 4) * 2  # qkv in; q, k, v out
    in_and_out = (4 + 8) + (4 + 4) + (4 + 12) + (6 + 4)
    head = 10 * 4 * 2 + 2 * 4 * 2 + 2 * 10 * 4  # weights, rows in, float32 logits out
    assert work["products"].bytes == 2 * (LAYER_WEIGHTS * 2 + 2 * in_and_out * 2) + head
    assert work["products"].flops == 2 * 2 * (2 * LAYER_WEIGHTS + 10 * 4)
    assert work["sampling"].bytes == 2 * 10 * 4
    norms = 2 * (4 + 4 + 2 + 2) + 4  # weights; per token: twice residual and norm, gate; ends
    others = 2 * 2 * (2 * 4 * 4 + 3 * 6) + 2 * 4 * (2 + 2)
    assert work["norms, activations, inputs"].bytes == 2 * (norms + others)
    assert "communication" not in work


def test_a_prefill_behind_a_prefix_with_an_8_bit_cache():
    work = costs(kv_itemsize=1).categories([0, 5], [3, 2])
    pairs = (1 + 2 + 3) + (6 + 7)  # each token sees itself and all before it
    assert work["attention"].flops == 2 * pairs * (2 * 2 * 4)
    assert work["attention"].bytes == 2 * ((3 + 7) * 2 * 2 * 1 + 5 * 2 * 4 * 2)
    assert work["products"].flops == 2 * (2 * 5 * LAYER_WEIGHTS + 2 * 10 * 4)  # 2 rows of logits


def test_two_devices_share_the_weights_and_exchange_hidden_states():
    one, two = costs().categories([8], [1]), on_mesh(tensor=2).categories([8], [1])
    copied = 2 * 2 * (4 * 2 * 2)  # operations of the second copy of the one KV head's k and v
    assert two["products"].flops == (one["products"].flops + copied) / 2
    assert two["sampling"].bytes == one["sampling"].bytes / 2
    assert two["attention"].flops == one["attention"].flops / 2
    assert two["communication"].bytes == (2 * 2 + 1) * 4 * 2  # a ring of 2 sends each element once


def test_devices_with_other_tokens_share_no_product_even_if_they_share_the_weight():
    one, two = costs(), on_mesh(rules={"ffn": "data"}, data=2)
    assert two.categories([8], [1])["products"].flops == one.categories([8], [1])["products"].flops
    assert two.weight_bytes == one.weight_bytes - 2 * (3 * 4 * 6) * 2 / 2
    assert "communication" not in two.categories([8], [1])


def test_weights_of_8_bits_count_as_a_byte_and_multiply_as_often():
    def narrow(path, param):
        shape = param.get_value().shape
        return param.replace(jax.ShapeDtypeStruct(shape, jnp.int8))

    wide, narrowed = costs(), CostModel(MODEL, nnx.map_state(narrow, parameters(MODEL)))
    assert narrowed.weight_bytes == wide.weight_bytes / 2
    once = dict(steps=1, tokens=2, rows=2, context=20, pairs=20)
    assert narrowed.least(**once).flops == wide.least(**once).flops
    assert wide.least(**once).bytes - narrowed.least(**once).bytes == narrowed.weight_bytes


# With 5 experts of 3 hidden units, of which a token meets 2, in the second of its layers.
MIXTURE = replace(
    MODEL, architecture="Qwen3MoeForCausalLM", num_experts=5, experts_per_token=2, expert_size=3,
    dense_layers=(0,),
)  # fmt: skip


def test_a_step_reads_the_experts_that_are_chosen_and_multiplies_by_those_of_each_token():
    dense, mixed = costs(), costs(MIXTURE)
    experts, router, mlp = 5 * 3 * 4 * 3, 4 * 5, 3 * 4 * 6
    assert mixed.weight_bytes == dense.weight_bytes + 2 * (experts + router - mlp)
    assert dense.bytes_read(1) == dense.weight_bytes
    all_but_experts = mixed.weight_bytes - 2 * experts
    assert mixed.bytes_read(1) == pytest.approx(all_but_experts + 2 * experts * 2 / 5)
    assert mixed.bytes_read(2) == pytest.approx(all_but_experts + 2 * experts * (1 - 0.6**2))
    assert mixed.bytes_read(1000) == pytest.approx(mixed.weight_bytes)
    of_dense, of_mixed = (c.categories([7], [1])["products"] for c in (dense, mixed))
    assert of_mixed.flops == of_dense.flops + 2 * (2 * 3 * 4 * 3 + router - mlp)
    arrays = (4 + 5) + 2 * (4 + 6) + (2 * 3 + 4 * 2) - (4 + 12) - (6 + 4)
    weights = 2 * (2 * 3 * 4 * 3 + router - mlp)
    assert of_mixed.bytes == pytest.approx(of_dense.bytes + weights + 2 * arrays)
    elementwise = [c.categories([7], [1])["norms, activations, inputs"] for c in (dense, mixed)]
    assert elementwise[1].bytes == elementwise[0].bytes + 2 * 1.5 * (2 * 2 * 3 - 12)


@pytest.mark.parametrize("rules", [{}, {"experts": "tensor", "expert_ffn": None}])
def test_experts_on_two_devices_cost_the_sums_of_a_dense_model(rules):
    model = replace(MIXTURE, num_experts=6, expert_size=4)
    one, two = costs(model), on_mesh(model, rules, tensor=2)
    sums = (2 * 2 + 1) * 4 * 2  # as for the dense model
    assert two.categories([8], [1])["communication"].bytes == sums
    copied = 2 * 2 * (4 * 2 * 2) + 2 * 4 * 6  # the second KV head's operations, and the router's
    flops = [c.categories([8], [1])["products"].flops for c in (one, two)]
    assert flops[1] == (flops[0] + copied) / 2


@pytest.mark.parametrize(
    ("size", "billions", "kv_bytes"),
    [
        ("0.6B", 0.596, 114688),
        ("8B", 7.57, 147456),
        ("32B", 31.98, 262144),
        ("30B-A3B", 30.22, 98304),
    ],
)
def test_the_published_sizes(size, billions, kv_bytes):
    model = costs(SHAPES[size])
    assert model.weight_bytes == pytest.approx(2e9 * billions, rel=2e-3)  # without the embedding
    assert model.kv_bytes == kv_bytes


def test_the_least_work_is_in_the_categories_of_a_step():
    model = costs(replace(SHAPES["0.6B"], num_layers=2))
    parts = model.categories([99, 199], [1, 1])
    least = model.least(steps=1, tokens=2, rows=2, context=300, pairs=300)
    assert least.flops == sum(part.flops for part in parts.values())
    assert 0.99 * sum(part.bytes for part in parts.values()) < least.bytes


def test_the_least_time_is_that_of_the_slower_resource():
    work = Work(bytes=100, flops=1000)
    assert work.seconds(memory=10, flops=1000) == 10
    assert work.seconds(memory=1000, flops=10) == 100
    assert work.seconds(memory=10, flops=None) is None
    assert Work(100).seconds(memory=10, flops=None) == 10


def test_hardware_is_found_by_the_kind_of_a_device():
    h100 = find_hardware("NVIDIA H100 80GB HBM3")
    assert h100 and (h100.name, h100.memory) == ("H100", 2.99e12)
    assert find_hardware("cpu") is None
