"""The kernels natively on a GPU, at the shapes of Qwen3-0.6B (G = 2) and Qwen3-8B (G = 4).

Also at odd ones: seven query heads per KV head, a head dim of 80, small pages.
"""

import jax
import numpy as np
import pytest
from test_kernels import FP8, IMPLEMENTATIONS, check_decode, check_prefill, check_write

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


@pytest.mark.parametrize("padding", [0, 150])
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_mosaic_prefill(group, head_dim, page_size, padding):
    shape = dict(group=group, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype="bfloat16")
    check_prefill("mosaic", CHUNKS, padding=padding, **shape)
    check_prefill("mosaic", CHUNKS * 12, padding=padding, **shape)  # several tiles per program
    check_prefill("mosaic", [(5, 9)], padding=padding, **shape)


@each_implementation
@each_shape
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_write(num_tokens, shape, implementation):
    check_write(implementation, num_tokens, num_pages=800 // shape["page_size"] + 1, **shape)
