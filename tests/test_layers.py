"""Linear layers with a kernel against those without, on one device and on shards; RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanovllm_jax.layers import backend as backend_module
from nanovllm_jax.layers import collectives
from nanovllm_jax.layers.backend import DenseBackend, GpuBackend, XlaBackend
from nanovllm_jax.layers.collectives import Collectives
from nanovllm_jax.layers.linear import Linear
from nanovllm_jax.layers.norm import RMSNorm, rms_norm
from nanovllm_jax.layers.rope import Rope, rope_angles
from nanovllm_jax.models import Decoder, ModelConfig
from nanovllm_jax.sharding import make_sharding, merge_rules

LAYERS, LAYER = 3, 2
EMBED, HEADS, KV_HEADS, HEAD_DIM, FFN = 128, 8, 4, 64, 512
ROW = jnp.bfloat16
# The four products of a decoder layer: axes out, axes in, and what surrounds them. Their shards on
# four devices are the smallest that the kernel takes.
PRODUCTS = {
    "qkv": (dict(kv_heads=KV_HEADS, group=4, head_dim=HEAD_DIM), dict(embed=EMBED), ["norm"]),
    "attention output": (dict(embed=EMBED), dict(heads=HEADS, head_dim=HEAD_DIM), ["residual"]),
    "gate and up": (dict(gate_up=2, ffn=FFN), dict(embed=EMBED), ["norm", "gated"]),
    "down": (dict(embed=EMBED), dict(ffn=FFN), ["residual"]),
    "logits": (dict(vocab=64), dict(embed=EMBED), ["norm", "dtype"]),
}
each_mesh = pytest.mark.parametrize("devices", [1, 2, 4])


def values(rng, *shape, dtype=ROW):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def in_layer(value, axes, sharding, layer):
    """A parameter: `value` itself, or in its place in a stack whose other layers are NaN."""
    if layer is not None:
        value = jnp.full((LAYERS, *value.shape), jnp.nan, value.dtype).at[LAYER].set(value)
        axes = ("layers", *axes)
    return nnx.Param(jax.device_put(value, sharding.named(*axes)))


def make_product(name, sharding, layer, rows=1, dtype=ROW, bias=False, **sizes):
    """Make the arguments of `Backend.linear`, with random weights: (x, linear, layer), keywords."""
    out, inp, around = PRODUCTS[name]
    out, inp = ({axis: sizes.get(axis, n) for axis, n in axes.items()} for axes in (out, inp))
    rng = np.random.default_rng(0)
    linear = Linear(out, inp, bias=bias, dtype=dtype, rngs=nnx.Rngs(0))
    weight = linear.weight[...]
    linear.weight = in_layer(weight, linear.out_axes + linear.in_axes, sharding, layer)
    if bias:
        linear.bias = in_layer(
            values(rng, *out.values(), dtype=dtype), linear.out_axes, sharding, layer
        )
    options = {}
    if "norm" in around:
        options["norm"] = norm = RMSNorm(EMBED, 1.0, dtype=dtype)
        norm.weight = in_layer(values(rng, EMBED, dtype=dtype), ("embed",), sharding, layer)
    if "residual" in around:
        options["residual"] = values(rng, rows, *out.values(), dtype=dtype)
    if "gated" in around:
        options["gated"] = True
    if "dtype" in around:
        options["dtype"] = jnp.float32
    x = values(rng, rows, *inp.values(), dtype=dtype)
    return (x, linear, None if layer is None else jnp.int32(layer)), options


def plain(sharding):
    """The backend without kernels."""
    return XlaBackend(sharding, None, "xla")


def fusing(sharding):
    """The backend with them. No test here attends, and sums over devices are XLA's."""
    return GpuBackend(sharding, None, "triton")


def run(backend, args, options):
    """Multiply, jitted as in a step; return the product and whether a kernel computed it."""
    x, linear, layer = args
    arrays = dict(x=x, layer=layer, residual=options.get("residual"))

    def product(arrays):
        kept = options | ({"residual": arrays["residual"]} if "residual" in options else {})
        return backend.linear(arrays["x"], linear, arrays["layer"], **kept)

    traced = jax.jit(product).trace(arrays)
    return traced.lower().compile()(arrays), "fused_linear" in str(traced.jaxpr)


@each_mesh
@pytest.mark.parametrize("layer", [None, LAYER])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_products_are_the_plain_ones(name, layer, devices, bias):
    sharding = make_sharding({"tensor": devices})
    args, options = make_product(name, sharding, layer, bias=bias)
    got, fused = run(fusing(sharding), args, options)
    want, plain_fused = run(plain(sharding), args, options)
    # A bias before a gate is the one thing that the kernel does not know.
    assert fused != (bias and "gated" in options) and not plain_fused
    assert got.shape == want.shape and got.dtype == want.dtype
    # In bfloat16: the plain norm and gate are rounded on the way, and so are the shards' sums.
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", dict(rows=2)),
        ("qkv", dict(dtype=jnp.float32)),
        ("gate and up", dict(ffn=20)),  # two halves of 10 on each of two devices
        ("down", dict(ffn=320)),  # 160 on each
        ("logits", dict(vocab=132)),
    ],
)
def test_what_the_kernel_does_not_take_is_computed_plainly(name, change):
    sharding = make_sharding({"tensor": 2})
    args, options = make_product(name, sharding, LAYER, **change)
    got, fused = run(fusing(sharding), args, options)
    assert not fused
    np.testing.assert_array_equal(got, run(plain(sharding), args, options)[0])


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("layer", [None, LAYER])
def test_gate_and_up_of_many_rows_are_the_plain_ones(layer, mesh, monkeypatch):
    """With a stand-in for the kernel, which needs a GPU; weights of another layer would be NaN."""
    asked = []

    def supports(num_rows, num_out, width, dtype, device):
        asked.append((num_rows, num_out, width, dtype, device.platform))
        return True

    def gated_linear(x, weight, layer):
        gate, up = jnp.einsum("td,gfd->gtf", x, weight[layer], preferred_element_type=jnp.float32)
        return (jax.nn.silu(gate) * up).astype(x.dtype)

    monkeypatch.setattr(backend_module, "supports_gated_linear", supports)
    monkeypatch.setattr(backend_module, "gated_linear", gated_linear)
    sharding = make_sharding(mesh)
    args, options = make_product("gate and up", sharding, layer, rows=48)
    got, fused = run(fusing(sharding), args, options)
    want, _ = run(plain(sharding), args, options)
    data, tensor = (mesh.get(axis, 1) for axis in ("data", "tensor"))
    assert asked == [(48 // data, FFN // tensor, EMBED, ROW, "cpu")] and not fused
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    # In bfloat16: XLA rounds gate and up before it multiplies them.
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    assert np.abs(want).max() > 1 and not np.array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate and up", dict(residual=True)),
        ("gate and up", dict(rules={"embed": "tensor", "ffn": None})),
        ("qkv", {}),
        ("down", {}),
    ],
)
def test_only_whole_gated_products_take_the_kernel_for_many_rows(name, change, monkeypatch):
    monkeypatch.setattr(backend_module, "supports_gated_linear", lambda *_: True)
    sharding = make_sharding({"tensor": 2}, merge_rules(change.get("rules", {})))
    (x, linear, _), options = make_product(name, sharding, LAYER, rows=48)
    gated, residual = options.get("gated", False), change.get("residual", False)
    plan = fusing(sharding).plan(linear, len(x), x.dtype, gated=gated, residual=residual)
    assert plan is None


@each_mesh
@pytest.mark.parametrize("tied", [False, True])
def test_fused_logits_are_the_plain_ones(tied, devices):
    config = ModelConfig(
        "Qwen3ForCausalLM", vocab_size=96, hidden_size=EMBED, intermediate_size=FFN, num_layers=1,
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=64,
        rms_norm_eps=1.0, tie_word_embeddings=tied,
    )  # fmt: skip
    model, sharding = Decoder(config, rngs=nnx.Rngs(0)), make_sharding({"tensor": devices})
    rng = np.random.default_rng(1)
    model.norm.weight = nnx.Param(values(rng, EMBED))
    head = model.embed_tokens if tied else model.lm_head
    head.weight = nnx.Param(jax.device_put(values(rng, 96, EMBED), sharding.named("vocab")))
    hidden = values(rng, 1, EMBED)
    got = jax.jit(lambda x: model.logits(x, fusing(sharding)))(hidden)
    assert got.dtype == jnp.float32 and got.shape == (1, 96)
    np.testing.assert_allclose(got, model.logits(hidden, plain(sharding)), rtol=1e-2, atol=0.1)


class DenseOnGpus(GpuBackend):
    """The backend with kernels, except that it attends as in training."""

    def attend(self, qkv, q_norm, k_norm, rope, cache, layer):
        return DenseBackend.attend(self, qkv, q_norm, k_norm, rope, cache, layer)

    @property
    def mask(self):
        return jnp.tril(jnp.ones((1, 4, 4), bool))


@pytest.mark.parametrize("hidden_size", [EMBED, 2 * EMBED])
def test_every_norm_of_a_layer_joins_the_sum_before_it(hidden_size, monkeypatch):
    """On two devices with stand-ins for the kernels; a norm of the wrong layer would show."""
    joined = []

    def add(x, residual, address, axis, max_words):
        total = jax.lax.psum(x.astype(jnp.float32), axis) + residual
        return total.astype(x.dtype)

    def add_and_norm(x, residual, weight, layer, address, axis, max_words, *, eps):
        joined.append(layer)
        x = add(x, residual, address, axis, max_words)
        return x, rms_norm(x, weight[jnp.minimum(layer, len(weight) - 1)], eps)

    monkeypatch.setattr(collectives, "one_shot_all_reduce", add)
    monkeypatch.setattr(collectives, "one_shot_all_reduce_norm", add_and_norm)
    config = ModelConfig(
        "Qwen3ForCausalLM", vocab_size=96, hidden_size=hidden_size, intermediate_size=FFN,
        num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    model, sharding = Decoder(config, rngs=nnx.Rngs(0)), make_sharding({"tensor": 2})
    rng = np.random.default_rng(2)
    for norm in (model.layers.input_layernorm, model.layers.post_attention_layernorm):
        norm.weight = nnx.Param(values(rng, LAYERS, hidden_size))
    model.norm.weight = nnx.Param(values(rng, hidden_size))
    tokens, positions = jnp.array([3, 1, 4, 1]), jnp.arange(4)

    def run(backend):
        hidden, _ = model(tokens, positions, backend)
        return model.logits(hidden, backend)

    want = jax.jit(lambda: run(DenseBackend(jnp.tril(jnp.ones((1, 4, 4), bool)))))()
    addresses = jnp.zeros((2, 2), jnp.int32)
    backend = DenseOnGpus(sharding, None, "triton", Collectives(addresses))
    got = jax.jit(lambda: run(backend))()
    # A row of 128 numbers is too short for the kernel. A layer is traced once, and has two sums.
    assert len(joined) == (0 if hidden_size == EMBED else 3)
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05 * np.abs(want).max())
    joined.clear()
    then = model.layers.input_layernorm.at(jnp.int32(0))
    alone = jax.jit(lambda: backend.embed(model.embed_tokens, tokens[:1], then))()
    assert alone.shape == (1, hidden_size) and not joined


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_angles_are_right_to_32k(head_dim, theta):
    """bfloat16 or TF32 angles round positions: an error of radians at 32k."""
    positions = np.array([0, 1, 2, 255, 256, 257, 1023, 4097, 8191, 16385, 32767])
    cos, sin = rope_angles(positions.astype(np.int32), Rope(theta), head_dim)
    angles = positions[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    # The inverse frequencies are float32: relative error 2^-23 or so of the angle.
    bound = 1e-6 + np.abs(angles) * 4 * 2.0**-23
    assert np.all(np.abs(cos - np.cos(angles)) <= bound)
    assert np.all(np.abs(sin - np.sin(angles)) <= bound)
