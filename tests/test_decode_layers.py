"""All layers of a decode step at once: reference, plan, the way into the model and into XLA.

The CUDA kernel itself is run by test_cuda_decode_layers.py.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from h100 import kernels_in, lower_for_h100

from nanovllm_jax.layers import backend as backend_module
from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.backend import GpuBackend, XlaBackend
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.rope import Rope, rope_angles
from nanovllm_jax.models import Decoder, ModelConfig
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tools.shapes import SHAPES
from pallas_kernels import LayerWeights, _nvrtc, decode_layers, plan_decode_layers
from pallas_kernels.decode_layers import MOST_ROWS, Plan, Sizes, defines

QWEN3 = ModelConfig(
    "Qwen3ForCausalLM", vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=3,
    num_heads=6, num_kv_heads=2, head_dim=32, max_position_embeddings=64, rope=Rope(1e4),
)  # fmt: skip
LLAMA = replace(QWEN3, qk_norm=False, rms_norm_eps=1e-5)
FAMILIES = {
    "Qwen3": QWEN3,
    "Llama": LLAMA,
    "Qwen2": replace(LLAMA, qkv_bias=True),
    "SmolLM3": replace(LLAMA, layers_without_rope=(0, 2), num_kv_heads=1),
}
WITHOUT = {  # what the kernel does not know
    "experts": replace(QWEN3, num_experts=2, experts_per_token=1, expert_size=32),
    "a bias after attention": replace(QWEN3, o_bias=True),
    "biases of the MLP": replace(QWEN3, mlp_bias=True),
}
PAGE, PAGES = 16, 6
CONTEXTS = [1, 20, 0, 33]  # of the rows of a step; the third is padding
PLAN = Plan(128, 2, 4, 2, 100_000, 1000)
OPTIONS = {"eps": 1e-6, "scale": 0.1}


def make_model(config, dtype):
    """A decoder with random weights; its norms and biases are no ones and zeros."""
    model = Decoder(replace(config, dtype=dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def draw(path, param):
        noise = jnp.asarray(rng.standard_normal(param.shape), dtype)
        name = str(path)
        if "norm" in name:
            return param.replace(1 + noise * 0.2)
        return param.replace(noise * 0.5) if "bias" in name else param

    return nnx.merge(graph, nnx.map_state(draw, state))


def make_step(config, dtype):
    """Token ids, positions, a batch and a cache for rows of CONTEXTS."""
    rng = np.random.default_rng(1)
    shape = (config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim)
    cache = KVCache(*(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)))
    tables = np.array([[4, 0, 0], [2, 5, 0], [0, 0, 0], [1, 3, 0]], np.int32)
    contexts = np.array(CONTEXTS, np.int32)
    last = np.maximum(contexts - 1, 0)
    tables[3, 2] = 0
    slots = np.where(contexts > 0, tables[range(4), last // PAGE] * PAGE + last % PAGE, -1)
    batch = PagedBatch(jnp.int32(slots), jnp.asarray(tables), jnp.asarray(contexts))
    return jnp.int32(rng.integers(0, config.vocab_size, 4)), jnp.int32(last), batch, cache


def plain_backend(batch):
    return XlaBackend(make_sharding({}), batch, "xla")


def check_same(got, want, dtype):
    """Hidden states of rows that are no padding, and all of the caches."""
    rows = np.flatnonzero(CONTEXTS)
    hidden = [np.float32(x[0])[rows] for x in (got, want)]
    for a, b in [hidden, *(map(np.float32, pair) for pair in zip(got[1], want[1], strict=True))]:
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < (1e-6 if dtype == "float32" else 1e-2)


each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_dtype
@each_family
def test_the_reference_computes_what_the_layers_do(family, dtype):
    config = FAMILIES[family]
    model, (_, positions, batch, cache) = make_model(config, dtype), make_step(config, dtype)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((4, config.hidden_size)), dtype)
    angles = rope_angles(positions, config.rope, config.head_dim)
    run = jax.jit(lambda x, cache: model.run_layers(x, angles, plain_backend(batch), cache))
    want = run(x, cache)
    hidden, *caches = decode_layers(
        x, model.layer_weights(), *angles, batch.slot_mapping, *cache, batch.block_tables,
        batch.context_lens, eps=config.rms_norm_eps, scale=config.head_dim**-0.5,
        layers_without_rope=config.layers_without_rope, implementation="xla",
    )  # fmt: skip
    assert hidden.dtype == caches[0].dtype == jnp.dtype(dtype)
    check_same((hidden, caches), want, dtype)


@pytest.fixture
def at_once(monkeypatch):
    """The steps that `GpuBackend` gives to the kernel, for which the reference stands in."""
    calls = []

    def stand_in(*args, implementation, plan, **options):
        assert (implementation, plan) == ("cuda", PLAN)
        calls.append(options)
        return decode_layers(*args, implementation="xla", **options)

    monkeypatch.setattr(backend_module, "plan_decode_layers", lambda *_: PLAN)
    monkeypatch.setattr(backend_module, "decode_layers", stand_in)
    return calls


@each_family
def test_a_model_hands_its_layers_to_the_kernel(family, at_once):
    config = FAMILIES[family]
    model, (*tokens, batch, cache) = make_model(config, "float32"), make_step(config, "float32")
    run = jax.jit(lambda backend, cache: model(*tokens, backend(batch), cache), static_argnums=0)
    got = run(lambda batch: GpuBackend(make_sharding({}), batch, "xla", one_kernel=True), cache)
    assert len(at_once) == 1
    check_same(got, run(plain_backend, cache), "float32")


@pytest.mark.parametrize("why", [*WITHOUT, "kernels named by the user", "a prefill", "two devices"])
def test_a_model_keeps_layers_that_the_kernel_does_not_know(why, at_once):
    config = WITHOUT.get(why, QWEN3)
    model, (*tokens, batch, cache) = make_model(config, "float32"), make_step(config, "float32")
    if why == "a prefill":
        batch = batch._replace(query_starts=jnp.int32([0, 1, 2, 2, 3]))
    sharding = make_sharding({"tensor": 2 if why == "two devices" else 1})
    named = why == "kernels named by the user"
    backend = GpuBackend(sharding, batch, "xla", one_kernel=not named)
    jax.eval_shape(lambda cache: model(*tokens, backend, cache), cache)
    assert not at_once


def test_an_eager_model_runs_operation_by_operation(at_once):
    model, (*tokens, batch, cache) = make_model(QWEN3, "float32"), make_step(QWEN3, "float32")
    model(*tokens, GpuBackend(make_sharding({}), batch, "xla", one_kernel=True), cache)
    assert not at_once


# --- The plan --------------------------------------------------------------------------------


def h100(**changes):
    values = {"platform": "gpu", "compute_capability": "9.0", "core_count": 132}
    return SimpleNamespace(**(values | changes))


def shapes_of(config, page=256, dtype="bfloat16", cache_dtype="bfloat16"):
    """The weights and a cache of a model as shapes."""
    config = replace(config, dtype=dtype)
    weights = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).layer_weights())
    shape = (config.num_layers, 10, page, config.num_kv_heads, config.head_dim)
    return weights, jax.ShapeDtypeStruct(shape, jnp.dtype(cache_dtype))


@pytest.fixture
def with_nvrtc(monkeypatch):
    monkeypatch.setattr(_nvrtc, "problem", lambda: None)


CASES = [(name, n) for name in ("0.6B", "1.7B", "Llama-3.2-1B") for n in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize(("name", "batch"), [*CASES, ("8B", 1), ("8B", 2), ("8B", 4)])
def test_plans_fit_the_gpu(name, batch, with_nvrtc):
    plan = plan_decode_layers(*shapes_of(SHAPES[name]), batch, h100())
    assert plan is not None
    tasks = batch * SHAPES[name].num_kv_heads * plan.splits
    assert 64 < tasks <= plan.blocks == 128 and plan.splits in (1, 2, 4, 8, 16)
    assert 4 <= plan.stages <= 12 and 1 <= plan.in_flight < plan.stages
    assert plan.shared_bytes <= 232448


SMALL = replace(SHAPES["0.6B"], num_layers=2)
UNFIT = {
    "float32": {"dtype": "float32", "cache_dtype": "float32"},
    "an 8-bit cache": {"cache_dtype": "float8_e4m3fn"},
    "many layers": {"num_layers": 65},
    "odd heads": {"head_dim": 80},
    "a large group": {"num_kv_heads": 1},
    "an odd hidden size": {"hidden_size": 1000},
    "an odd MLP": {"intermediate_size": 1000},
    "small pages": {"page": 4},
    "more key heads than blocks": {"num_heads": 256, "num_kv_heads": 256},
    "an input that shared memory does not hold": {"intermediate_size": 2**17},
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_the_kernel_does_not_take_has_no_plan(why, with_nvrtc):
    changes = dict(UNFIT[why])
    options = {key: changes.pop(key) for key in ("page", "dtype", "cache_dtype") if key in changes}
    assert plan_decode_layers(*shapes_of(replace(SMALL, **changes), **options), 1, h100()) is None


@pytest.mark.parametrize(
    "device",
    [
        h100(platform="cpu"),
        h100(compute_capability="8.0"),
        h100(compute_capability="10.0"),
        h100(core_count=114),  # of an H100 PCIe, or less, of a part of an H100
        jax.devices("cpu")[0],
    ],
)
def test_other_devices_have_no_plan(device, with_nvrtc):
    assert plan_decode_layers(*shapes_of(SMALL), 1, device) is None


def test_a_large_batch_has_no_plan(with_nvrtc):
    shapes, device = shapes_of(SMALL), h100()
    taken = [n for n in range(MOST_ROWS + 4) if plan_decode_layers(*shapes, n, device)]
    assert taken == list(range(1, MOST_ROWS + 1))


def test_without_nvrtc_there_is_no_plan(monkeypatch):
    monkeypatch.setattr(_nvrtc, "problem", lambda: "it is not installed")
    assert plan_decode_layers(*shapes_of(SMALL), 1, h100()) is None


# --- The call --------------------------------------------------------------------------------


def arguments(config, batch=2, width=3):
    """The arguments of `decode_layers` as shapes."""
    weights, cache = shapes_of(config)
    struct = jax.ShapeDtypeStruct
    half = struct((batch, config.head_dim // 2), jnp.float32)
    rows = struct((batch,), jnp.int32)
    x = struct((batch, config.hidden_size), jnp.bfloat16)
    return [x, weights, half, half, rows, cache, cache, struct((batch, width), jnp.int32), rows]


@each_family
def test_the_call_that_xla_gets(family, monkeypatch):
    sources = []

    def compile_to_ptx(source, name, architecture):
        sources.append((source, name, architecture))
        return "the PTX"

    monkeypatch.setattr(_nvrtc, "compile_to_ptx", compile_to_ptx)
    config = FAMILIES[family]
    run = functools.partial(
        decode_layers, eps=1e-6, scale=0.5, implementation="cuda", plan=PLAN,
        layers_without_rope=config.layers_without_rope,
    )  # fmt: skip
    text = lower_for_h100(jax.jit(run, donate_argnums=(5, 6)), *arguments(config))
    assert kernels_in(text) == ["decode_layers"]
    (call,) = (line for line in text.splitlines() if "custom_call" in line)
    grid = {"grid_x": 128, "grid_y": 1, "grid_z": 1, "block_x": 288, "block_y": 1, "block_z": 1}
    for name, value in (grid | {"shared_mem_bytes": 100_000}).items():
        assert f"{name} = {value} : i32" in call
    assert 'kernel_data = "the PTX", kernel_type = "ptx"' in call
    # Caches and mail, the last three of 18 operands, are results 1 to 3.
    for result, operand in enumerate((15, 16, 17), start=1):
        assert f"output_tuple_indices = [{result}], operand_index = {operand}," in call
    assert call.count("operand_index") == 3
    assert text.count("tf.aliasing_output") == 2  # the caches; the mail is made here
    assert "tensor<1000xui32>" in call
    [(source, name, architecture)] = sources
    assert (name, architecture) == ("decode_layers.cu", "compute_90")
    assert "#include" not in source
    for line in ("BATCH 2", "LAYERS 3", "TABLE 3", "BLOCKS 128", "SPLITS 2", "EPS 1e-06f"):
        assert f"#define {line}\n" in source
    assert f"#define QKV_BIAS {int(config.qkv_bias)}\n" in source
    assert f"#define QK_NORM {int(config.qk_norm)}\n" in source


def test_each_define_has_a_name_and_a_value():
    sizes = Sizes.of(*shapes_of(SMALL), batch=3, table=7)
    got = defines(
        sizes, PLAN, eps=1e-5, scale=128**-0.5, layers_without_rope=(0, 33), qkv_bias=False,
        qk_norm=True,
    )  # fmt: skip
    scale = got.pop("SCALE_LOG2E")
    assert scale[-1] == "f" and float(scale[:-1]) == pytest.approx(128**-0.5 / np.log(2))
    assert got == {
        **{"BATCH": "3", "LAYERS": "2", "HIDDEN": "1024", "HEADS": "16", "KV_HEADS": "8"},
        **{"HEAD_DIM": "128", "FFN": "3072", "PAGES": "10", "PAGE": "256", "TABLE": "7"},
        **{"BLOCKS": "128", "SPLITS": "2", "STAGES": "4", "IN_FLIGHT": "2"},
        **{"QKV_BIAS": "0", "QK_NORM": "1", "NO_ROPE_BITS": "0x200000001ull"},
        "EPS": "1e-05f",
    }


@pytest.mark.parametrize(
    ("place", "shape", "words"),
    [
        (0, (2, 63), "x must be"),
        (2, (2, 17), "cos must be"),
        (4, (3,), "slot_mapping must be"),
        (5, (3, 10, 256, 2, 64), "k_cache and v_cache"),
        (7, (4, 3), "block_tables must be"),
        (8, (3,), "context_lens must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(place, shape, words):
    args = arguments(QWEN3)
    args[place] = jax.ShapeDtypeStruct(shape, args[place].dtype)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(decode_layers, **OPTIONS, implementation="xla"), *args)


@pytest.mark.parametrize("name", LayerWeights._fields)
def test_weights_that_do_not_fit_are_named(name):
    args = arguments(FAMILIES["Qwen2"] if name == "qkv_bias" else QWEN3)
    weight = getattr(args[1], name)
    wrong = jax.ShapeDtypeStruct((*weight.shape[:-1], weight.shape[-1] - 1), weight.dtype)
    args[1] = args[1]._replace(**{name: wrong})
    with pytest.raises(ValueError, match=r"must be of shape|fit the cache"):
        jax.eval_shape(functools.partial(decode_layers, **OPTIONS, implementation="xla"), *args)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"implementation": "triton"}, "unknown"), ({"implementation": "cuda"}, "needs a plan")],
)
def test_options_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(decode_layers, **OPTIONS, **options), *arguments(QWEN3))
