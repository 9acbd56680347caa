"""The layer of experts against transformers' and against itself on shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanovllm_jax.layers import collectives
from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.backend import DenseBackend, GpuBackend, XlaBackend
from nanovllm_jax.layers.collectives import Collectives
from nanovllm_jax.layers.moe import MoE
from nanovllm_jax.layers.norm import Normed, RMSNorm, rms_norm
from nanovllm_jax.sharding import make_sharding, merge_rules

LAYERS, LAYER = 2, 1
EMBED, EXPERT, EXPERTS, CHOICES = 128, 32, 16, 4
BY_EXPERT = {"experts": "tensor", "expert_ffn": None}
MESHES = {
    "one device": ({}, {}),
    "tensor": ({"tensor": 4}, {}),
    "experts": ({"tensor": 4}, BY_EXPERT),
    "data and tensor": ({"data": 2, "tensor": 2}, {}),
    "data and experts": ({"data": 2, "tensor": 2}, BY_EXPERT),
    "hidden size": ({"tensor": 2}, {"activation_embed": "tensor"}),
    "whole": ({"tensor": 2}, {"expert_ffn": None}),
}
each_mesh = pytest.mark.parametrize("mesh", MESHES)


def shard(mesh):
    shape, rules = MESHES[mesh]
    return make_sharding(shape, merge_rules(rules))


def make_layer(rows, *, dtype=jnp.float32, normalize=True, sharding=None):
    """A layer with random weights among layers of NaN, and its arguments up to the backend."""
    rng = np.random.default_rng(rows)
    sharding = sharding or shard("one device")

    def values(*shape, mean=0.0):
        return jnp.asarray(mean + rng.standard_normal(shape, np.float32), dtype)

    def put(param, value, *axes):
        value = jnp.full((LAYERS, *value.shape), jnp.nan, dtype).at[LAYER].set(value)
        return param.replace(jax.device_put(value, sharding.named("layers", *axes)))

    moe = MoE(
        EMBED, EXPERT, EXPERTS, CHOICES, normalize=normalize, dtype=dtype, rngs=nnx.Rngs(rows)
    )
    for linear in (moe.router, moe.gate_up_proj, moe.down_proj):
        linear.weight = put(linear.weight, linear.weight[...], *linear.axes)
    norm = RMSNorm(EMBED, 1e-6, dtype=dtype)
    norm.weight = put(norm.weight, values(EMBED, mean=1), "embed")
    return moe, values(rows, EMBED), norm, jnp.int32(LAYER)


def batch_of(rows, padding=0):
    """Where rows are written to: anywhere, but padding rows nowhere."""
    slots = jnp.where(jnp.arange(rows) < rows - padding, 7, -1)
    return PagedBatch(slots, jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32))


def run(moe, x, norm, layer, backend):
    then = norm.at(layer)
    return jax.jit(lambda x: moe(x, norm, layer, backend, then))(x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_experts_are_those_of_transformers(rows, normalize):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    from transformers import Qwen3MoeConfig

    moe, x, norm, layer = make_layer(rows, normalize=normalize)
    config = Qwen3MoeConfig(
        hidden_size=EMBED, moe_intermediate_size=EXPERT, num_experts=EXPERTS,
        num_experts_per_tok=CHOICES, norm_topk_prob=normalize,
    )  # fmt: skip
    block = modeling.Qwen3MoeSparseMoeBlock(config)

    def tensor(array):
        return torch.tensor(np.asarray(array))

    linears = [moe.router, moe.gate_up_proj, moe.down_proj]
    router, gate_up, down = (linear.weight[...][LAYER] for linear in linears)
    names = [f"experts.{e}.{part}_proj.weight" for e in range(EXPERTS) for part in ("gate", "up")]
    state = {"gate.weight": router}
    if "experts.gate_up_proj" in block.state_dict():  # transformers 5
        state |= {"experts.gate_up_proj": gate_up.reshape(EXPERTS, -1, EMBED)}
        state |= {"experts.down_proj": down}
    else:
        state |= dict(zip(names, gate_up.reshape(-1, EXPERT, EMBED), strict=True))
        state |= {f"experts.{e}.down_proj.weight": down[e] for e in range(EXPERTS)}
    block.load_state_dict({name: tensor(value) for name, value in state.items()})
    normed = rms_norm(x, norm.weight[...][LAYER], norm.eps)
    with torch.no_grad():
        want = block(tensor(normed)[None])
    want = want[0] if isinstance(want, tuple) else want
    got = run(moe, x, norm, layer, XlaBackend(shard("one device"), batch_of(rows), "xla"))
    np.testing.assert_allclose(got, x + want[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [XlaBackend, GpuBackend])
@each_mesh
def test_shards_add_up_to_the_whole(mesh, backend):
    """The plain backend and the kernels, which the interpreter runs."""
    kernels = "xla" if backend is XlaBackend else "triton"
    for rows in (2, 40):
        whole = DenseBackend(jnp.ones((1, 1, 1), bool))
        want = run(*make_layer(rows), whole)
        got = run(
            *make_layer(rows, sharding=shard(mesh)), backend(shard(mesh), batch_of(rows), kernels)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["tensor", "experts", "whole"])
def test_the_sum_and_the_norm_after_it_take_one_kernel(mesh, monkeypatch):
    """With stand-ins for the kernels that sum; one that nobody asks for must not run."""
    calls = []

    def add_and_norm(x, residual, weight, layer, address, axis, max_words, *, eps):
        calls.append(axis)
        x = (jax.lax.psum(x.astype(jnp.float32), axis) + residual).astype(x.dtype)
        return x, rms_norm(x, weight[layer], eps)

    monkeypatch.setattr(collectives, "one_shot_all_reduce_norm", add_and_norm)
    monkeypatch.setattr("nanovllm_jax.layers.collectives.supports_one_shot_norm", lambda *_: True)
    sharding, options = shard(mesh), {"dtype": jnp.bfloat16}
    want = run(*make_layer(6, **options), XlaBackend(shard("one device"), batch_of(6), "xla"))
    addresses = Collectives(jnp.zeros((sharding.mesh.size, 2), jnp.int32))
    layer = make_layer(6, **options, sharding=sharding)
    got = run(*layer, GpuBackend(sharding, batch_of(6), "triton", addresses))
    if mesh == "whole":
        assert not calls and not isinstance(got, Normed)
        return
    assert calls == ["tensor"] and isinstance(got, Normed)
    np.testing.assert_allclose(*(np.float32(y) for y in (got.x, want)), rtol=0.05, atol=0.1)
    normed = rms_norm(got.x, layer[2].weight[...][LAYER], 1e-6)
    np.testing.assert_array_equal(np.float32(got.normed), np.float32(normed))
    # What comes in may bring its norm along, which is then not computed again.
    moe, x, norm, number = layer
    nan = RMSNorm(EMBED, 1e-6, dtype=jnp.bfloat16)
    nan.weight = nnx.Param(jnp.full((LAYERS, EMBED), jnp.nan, jnp.bfloat16))
    backend = GpuBackend(sharding, batch_of(6), "triton", addresses)
    again = run(moe, Normed(x, rms_norm(x, norm.weight[...][LAYER], 1e-6)), nan, number, backend)
    np.testing.assert_array_equal(np.float32(again.x), np.float32(got.x))


def test_experts_cost_one_sum_and_no_other_exchange():
    for mesh in ("tensor", "experts", "data and experts"):
        sharding = shard(mesh)
        moe, x, norm, layer = make_layer(8, sharding=sharding)
        backend = XlaBackend(sharding, batch_of(8), "xla")
        x = jax.device_put(x, sharding.named("batch"))

        graph, weights = nnx.split(moe)

        def step(x, weights, graph=graph, norm=norm, layer=layer, backend=backend):
            return nnx.merge(graph, weights)(x, norm, layer, backend, norm.at(layer))

        text = jax.jit(step).lower(x, weights).compile().as_text()
        exchanges = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        found = {
            name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in exchanges
        }
        assert found == dict.fromkeys(exchanges, 0) | {"all-reduce": 1}, mesh


def test_experts_cannot_be_dealt_out_among_devices_with_other_tokens():
    sharding = make_sharding({"data": 2}, merge_rules({"experts": "data"}))
    with pytest.raises(ValueError, match="twice over the same mesh axis"):
        run(*make_layer(4, sharding=sharding), XlaBackend(sharding, batch_of(4), "xla"))


@pytest.mark.parametrize("mesh", ["one device", "data and experts"])
def test_padding_rows_choose_no_expert(mesh):
    """They would have weights read that no token needs."""
    layer, sharding = make_layer(8, sharding=shard(mesh)), shard(mesh)
    want = run(*layer, XlaBackend(sharding, batch_of(8), "xla"))
    got = run(*layer, XlaBackend(sharding, batch_of(8, padding=3), "xla"))
    np.testing.assert_array_equal(got[:5], want[:5])
    np.testing.assert_array_equal(got[5:], layer[1][5:])
