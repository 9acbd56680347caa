"""The CUDA kernel of all layers of a decode step, run on the CPU, against its reference."""

from pathlib import Path
from typing import NamedTuple

import cuda_machine
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import LayerWeights, decode_layers
from pallas_kernels.decode_layers import MOST_SHARED, Plan, Sizes, defines

pytestmark = pytest.mark.skipif(bool(cuda_machine.problem()), reason=str(cuda_machine.problem()))

SOURCE = (Path(pallas_kernels.__file__).parent / "decode_layers.cu").read_text()
EPS = 1e-6


# --- What the plan says of the kernel --------------------------------------------------------

# Sizes of 0.6B, 8B, Llama's 1B and Qwen2.5's 0.5B: layers, hidden, heads, KV heads, head dim, FFN.
MODELS = [
    (28, 1024, 16, 8, 128, 3072),
    (36, 4096, 32, 8, 128, 12288),
    (16, 2048, 32, 8, 64, 8192),
    (24, 896, 14, 2, 64, 4864),
]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_has_the_kernels_formulas(model, batch):
    sizes = Sizes(batch, *model, pages=4, page=256, table=2)
    plan = Plan.of(sizes)
    assert plan is not None
    declarations = SOURCE.split('extern "C"')[0]
    told = cuda_machine.build(
        f"{declarations}\n"
        'extern "C" __global__ void told(int* out) {\n'
        "  if (threadIdx.x == 0) out[0] = sizeof(Shared), out[1] = LAYERS * MAIL_WORDS;\n"
        "}",
        defines_of(sizes, plan),
    )
    out = np.zeros(2, np.int32)
    told(1, 32, 0, 0, out)
    assert out.tolist() == [plan.shared_bytes, plan.mail_words]


def defines_of(sizes, plan, **changes):
    options = {"eps": EPS, "scale": sizes.head_dim**-0.5, "layers_without_rope": ()}
    options |= {"qkv_bias": False, "qk_norm": True}
    return defines(sizes, plan, **(options | changes))


# --- What it computes ------------------------------------------------------------------------


class Case(NamedTuple):
    """A small model, a step of some rows, and how the kernel divides it."""

    contexts: list[int]  # 0: padding
    blocks: int
    splits: int
    model: tuple[int, ...] = (2, 128, 8, 4, 64, 256)  # as MODELS
    stages: int = 4
    qk_norm: bool = True
    qkv_bias: bool = False
    layers_without_rope: tuple[int, ...] = ()


CASES = {
    "one row": Case([20], blocks=6, splits=1),
    "a first token": Case([1], blocks=8, splits=2),
    "parts": Case([90], blocks=16, splits=4),
    "Llama": Case([37, 70], blocks=9, splits=1, qk_norm=False),
    "Qwen2": Case([5, 0, 33, 96], blocks=16, splits=1, qk_norm=False, qkv_bias=True),
    "SmolLM3": Case([5, 30], blocks=8, splits=1, qk_norm=False, layers_without_rope=(1,)),
    "eight rows": Case(
        [5, 1, 33, 0, 7, 8, 9, 64], blocks=16, splits=1, model=(2, 128, 4, 2, 64, 192), stages=5
    ),
    "odd sizes": Case([70], blocks=5, splits=1, model=(2, 1056, 7, 1, 64, 1120), stages=5),
    "wide heads": Case([40], blocks=4, splits=2, model=(1, 128, 4, 2, 128, 128)),
}
PAGE, TABLE = 16, 6


def make_arguments(case: Case, seed: int):
    """The arguments of `decode_layers` in bfloat16, with NaN in the cache where none may look."""
    rng = np.random.default_rng(seed)
    layers, hidden, heads, kv_heads, head_dim, ffn = case.model
    batch, pages, contexts = len(case.contexts), len(case.contexts) * TABLE + 1, case.contexts

    def draw(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16)

    def norm(*shape):
        return (1 + 0.2 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    per_group = heads // kv_heads + 2
    weights = LayerWeights(
        input_norm=norm(layers, hidden),
        qkv=draw(layers, kv_heads, per_group, head_dim, hidden, scale=hidden**-0.5),
        qkv_bias=draw(layers, kv_heads, per_group, head_dim) if case.qkv_bias else None,
        q_norm=norm(layers, head_dim) if case.qk_norm else None,
        k_norm=norm(layers, head_dim) if case.qk_norm else None,
        o=draw(layers, hidden, heads, head_dim, scale=(heads * head_dim) ** -0.5),
        post_norm=norm(layers, hidden),
        gate_up=draw(layers, 2, ffn, hidden, scale=hidden**-0.5),
        down=draw(layers, hidden, ffn, scale=ffn**-0.5),
    )
    tables = rng.permutation(pages - 1)[: batch * TABLE].reshape(batch, TABLE).astype(np.int32)
    caches = [np.full((layers, pages, PAGE, kv_heads, head_dim), np.nan) for _ in range(2)]
    slots = np.full(batch, -1, np.int32)
    for row, context in enumerate(contexts):
        for position in range(context - 1):
            at = tables[row, position // PAGE], position % PAGE
            for cache in caches:
                cache[:, *at] = rng.standard_normal((layers, kv_heads, head_dim))
        if context:
            slots[row] = tables[row, (context - 1) // PAGE] * PAGE + (context - 1) % PAGE
        tables[row, -(-context // PAGE) :] = pages - 1  # nobody's
    positions = np.maximum(np.array(contexts) - 1, 0)
    angles = positions[:, None] * 1e4 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    return [
        draw(batch, hidden), weights, np.float32(np.cos(angles)), np.float32(np.sin(angles)),
        slots, *(cache.astype(ml_dtypes.bfloat16) for cache in caches), tables,
        np.array(contexts, np.int32),
    ]  # fmt: skip


def run_kernel(case: Case, arguments, order: int):
    """Run the CUDA kernel as XLA calls it; returns what `decode_layers` does, as NumPy arrays."""
    x, weights, cos, sin, slots, k_cache, v_cache, tables, contexts = arguments
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    sizes = Sizes.of(weights, k_cache, len(x), TABLE)
    plan = Plan.of(sizes)
    assert plan is not None
    plan = plan._replace(blocks=case.blocks, splits=case.splits, stages=case.stages)
    kernel = cuda_machine.build(
        SOURCE,
        defines_of(
            sizes, plan, qkv_bias=case.qkv_bias, qk_norm=case.qk_norm,
            layers_without_rope=case.layers_without_rope,
        ),
    )  # fmt: skip
    absent = np.zeros(1, x.dtype)
    given = [absent if weight is None else weight for weight in weights]
    hidden, mail = np.full_like(x, np.nan), np.zeros(plan.mail_words, np.uint32)
    kernel(
        case.blocks, 288, MOST_SHARED, order,
        x, *given, cos, sin, slots, tables, contexts, k_cache, v_cache, mail,
        hidden, k_cache, v_cache, mail,
    )  # fmt: skip
    return hidden, k_cache, v_cache


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_what_the_reference_does(name, order):
    """Its errors are no larger than those of the reference in bfloat16, and it writes no more."""
    case = CASES[name]
    arguments = make_arguments(case, order)
    options = {"eps": EPS, "scale": case.model[4] ** -0.5, "implementation": "xla"}
    options |= {"layers_without_rope": case.layers_without_rope}

    def reference(dtype):
        def convert(x):
            return jnp.array(x, dtype if x.dtype == ml_dtypes.bfloat16 else x.dtype)

        return jax.device_get(decode_layers(*jax.tree.map(convert, arguments), **options))

    exact, rounded = reference("float32"), reference("bfloat16")
    got = run_kernel(case, arguments, order)
    rows = np.flatnonzero(case.contexts)
    slots = arguments[4][rows]
    for i, (a, b, c) in enumerate(zip(got, rounded, exact, strict=True)):
        if i == 0:
            new = [np.float32(y[rows]) for y in (a, b, c)]
        else:
            new = [np.float32(y[:, slots // PAGE, slots % PAGE]) for y in (a, b, c)]
            before = arguments[4 + i].copy()
            before[:, slots // PAGE, slots % PAGE] = a[:, slots // PAGE, slots % PAGE]
            np.testing.assert_array_equal(a.view(np.uint16), before.view(np.uint16))
        error, usual = (np.linalg.norm(y - new[2]) for y in new[:2])
        assert error <= 1.5 * usual
