"""The kernels natively on a GPU, at the shapes of Qwen3-0.6B (G = 2) and Qwen3-8B (G = 4).

Also of Qwen2.5-7B (G = 7) and SmolLM2 (G = 3), and at odd ones: a head dim of 80, small pages.
"""

import jax
import numpy as np
import pytest
from test_kernels import (
    DRAW_KINDS,
    FP8,
    IMPLEMENTATIONS,
    check_decode,
    check_decode_step,
    check_draw,
    check_fused_linear,
    check_gated_linear,
    check_prefill,
    check_write,
    each_normed,
)

from pallas_kernels import mosaic_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

SHAPES = [
    dict(group=2, kv_heads=8, head_dim=128, page_size=256, dtype="bfloat16"),
    dict(group=4, kv_heads=8, head_dim=128, page_size=256, dtype="bfloat16"),
    dict(group=2, kv_heads=8, head_dim=64, page_size=256, dtype="bfloat16"),
    dict(group=2, kv_heads=8, head_dim=128, page_size=256, dtype="bfloat16", cache_dtype=FP8),
    dict(group=2, kv_heads=8, head_dim=128, page_size=256, dtype="float32"),
    dict(group=7, kv_heads=4, head_dim=128, page_size=256, dtype="bfloat16"),
    dict(group=3, kv_heads=3, head_dim=64, page_size=256, dtype="bfloat16"),
    dict(group=7, kv_heads=2, head_dim=80, page_size=16, dtype="bfloat16"),
    dict(group=3, kv_heads=3, head_dim=80, page_size=32, dtype="float32"),
    dict(group=1, kv_heads=2, head_dim=16, page_size=16, dtype="float32"),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@each_implementation
@each_shape
@pytest.mark.parametrize("batch", [1, 8, 100])  # many splits, a few, none
def test_decode(batch, shape, implementation):
    edges = [2000, 1, 0, shape["page_size"] - 1, shape["page_size"], shape["page_size"] + 1, 63, 64]
    contexts = [*edges, *np.random.default_rng(batch).integers(0, 700, 100)][:batch]
    check_decode(implementation, [int(n) for n in contexts], **shape)


CHUNKS = [(513, 513), (1, 1), (0, 0), (200, 900), (1, 700), (256, 512), (33, 290), (0, 0)]


@each_implementation
@each_shape
def test_prefill(shape, implementation):
    check_prefill(implementation, CHUNKS, padding=150, **shape)
    check_prefill(implementation, CHUNKS, padding=0, unowned=37, **shape)


@pytest.mark.parametrize("padding", [0, 150])
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_mosaic_prefill(group, head_dim, page_size, padding):
    shape = dict(group=group, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype="bfloat16")
    check_prefill("mosaic", CHUNKS, padding=padding, **shape)
    check_prefill("mosaic", CHUNKS, padding=padding, unowned=37, **shape)
    check_prefill("mosaic", CHUNKS * 12, padding=padding, **shape)  # several tiles per program
    check_prefill("mosaic", [(5, 9)], padding=padding, **shape)


@each_implementation
@each_shape
@pytest.mark.parametrize("num_tokens", [1, 700])
@each_normed
def test_write(num_tokens, shape, implementation, normed):
    num_pages = 800 // shape["page_size"] + 1
    check_write(implementation, num_tokens, num_pages=num_pages, normed=normed, **shape)


@pytest.mark.parametrize("shape", SHAPES[::3], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("batch", [1, 8, 100])  # many splits, a few, none
@each_normed
def test_decode_step(batch, shape, normed):
    edges = [700, 1, 0, shape["page_size"] - 1, shape["page_size"], shape["page_size"] + 1, 63, 64]
    contexts = [*edges, *np.random.default_rng(batch).integers(0, 100, batch)][:batch]
    check_decode_step(
        "triton", [int(n) for n in contexts], splits=batch < 100, normed=normed, **shape
    )


# Of Qwen3-0.6B and Qwen3-8B; and a width of 3 chunks, with the fewest outputs.
LINEARS = {
    "qkv": (1024, 4096, dict(normed=True)),
    "attention output": (2048, 1024, dict(residual=True)),
    "gate and up": (1024, 3072, dict(normed=True, gated=True)),
    "down": (3072, 1024, dict(residual=True)),
    "logits": (1024, 151936, dict(normed=True, out_dtype="float32")),
    "gate and up of 8B": (4096, 12288, dict(normed=True, gated=True)),
    "down of 8B": (12288, 4096, dict(residual=True)),
    "all at once": (384, 8, dict(normed=True, gated=True, residual=True, dtype="float16")),
}


@pytest.mark.parametrize("linear", LINEARS)
def test_fused_linear(linear):
    width, num_out, options = LINEARS[linear]
    check_fused_linear(width, num_out, **options)


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or mosaic_problem(jax.devices()[0]) is not None,
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize(
    "options", [{}, {"cluster": 1, "lead": 0}, {"stages": 2, "band": 3}, {"lead": 2}], ids=str
)
@pytest.mark.parametrize(
    ("num_rows", "width", "num_out"),
    [
        (4096, 1024, 3072),
        (1032, 1024, 1536),
        (1096, 4096, 6144),
        (1024, 896, 4864),
        (128, 256, 128),
    ],
)
def test_gated_linear(num_rows, width, num_out, options):
    for seed in range(3):  # a race would not show every time
        check_gated_linear(num_rows, width, num_out, seed=seed, **options)


@pytest.mark.parametrize("kind", DRAW_KINDS)
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_draw(rows, kind):
    for seed in range(20 if kind == "random" else 2):
        check_draw(kind, rows, 151936, seed=seed)
    check_draw(kind, rows, 75968, first_id=75968, vocab_size=151900)
    check_draw(kind, rows, 1001)
