"""The Mosaic GPU decode kernel natively on a Hopper GPU."""

import jax
import numpy as np
import pytest
from test_kernels import check_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or "H" not in jax.devices()[0].device_kind,
        reason="needs a Hopper GPU",
    ),
]

SHAPES = [
    dict(group=2, kv_heads=8, head_dim=128, page_size=256),
    dict(group=4, kv_heads=8, head_dim=128, page_size=64),
    dict(group=2, kv_heads=8, head_dim=64, page_size=16),
    dict(group=8, kv_heads=1, head_dim=128, page_size=256),
    dict(group=8, kv_heads=8, head_dim=128, page_size=256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("batch", [1, 8, 100])
def test_decode(batch, shape):
    edges = [2000, 1, 0, shape["page_size"] - 1, shape["page_size"], shape["page_size"] + 1, 63, 64]
    contexts = [*edges, *np.random.default_rng(batch).integers(0, 700, 100)][:batch]
    check_decode("mosaic", [int(n) for n in contexts], dtype="bfloat16", **shape)
