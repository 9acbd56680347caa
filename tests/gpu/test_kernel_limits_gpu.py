"""The kernels natively on caches as large as they can address: the last page of the last layer.

What is written there and read back must equal what a small cache gives for the same tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import addressable_pages, norm_rope_write, paged_decode, paged_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

LAYERS, PAGE, HEADS, HEAD_DIM, GROUP = 8, 256, 4, 128, 2
TOKENS = 200


def last_page(num_pages, num_layers, dtype, implementation):
    """Write tokens to the last page of a cache's last layer; what decode and prefill make of it."""
    rng = np.random.default_rng(0)
    shape = num_layers, num_pages, PAGE, HEADS, HEAD_DIM
    k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    layer, page = jnp.int32(num_layers - 1), num_pages - 1
    qkv = jnp.asarray(
        rng.standard_normal((TOKENS, HEADS, GROUP + 2, HEAD_DIM)).astype(np.float32), jnp.bfloat16
    )
    norm = jnp.ones(HEAD_DIM, jnp.bfloat16)
    angles = np.arange(TOKENS)[:, None] * 10000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    slots = page * PAGE + jnp.arange(TOKENS, dtype=jnp.int32)
    write = jax.jit(
        lambda k, v, *args: norm_rope_write(
            *args, slots, k, v, layer, eps=1e-6, implementation=implementation
        ),
        donate_argnums=(0, 1),
    )
    q, k, v = write(k, v, qkv, norm, norm, cos, sin)
    table, length = jnp.full((1, 1), page, jnp.int32), jnp.asarray([TOKENS], jnp.int32)
    options = {"scale": HEAD_DIM**-0.5, "implementation": implementation}
    decoded = jax.jit(lambda k, v: paged_decode(q[-1:], k, v, table, length, layer, **options))
    starts = jnp.asarray([0, TOKENS], jnp.int32)
    filled = jax.jit(lambda k, v: paged_prefill(q, k, v, table, starts, length, layer, **options))
    found = jax.device_get((k[-1, -1], v[-1, -1], decoded(k, v), filled(k, v)))
    assert not jnp.any(k[0]) and not jnp.any(k[-1, :-1]), "written elsewhere"
    return [np.asarray(x, np.float32) for x in found]


@pytest.mark.parametrize(
    "dtype, elements",
    [
        (jnp.float8_e4m3fn, 2**31),
        (jnp.float8_e4m3fn, 2**32 + 2**20),
        (jnp.bfloat16, 2**31),
        (jnp.bfloat16, 2**31 + 2**20),
        (jnp.bfloat16, 2**32 + 2**20),
    ],
)
def test_the_last_page_of_a_large_cache(dtype, elements):
    pages = elements // (LAYERS * PAGE * HEADS * HEAD_DIM)
    assert addressable_pages((LAYERS, pages, PAGE, HEADS, HEAD_DIM), dtype) == pages
    large = last_page(pages, LAYERS, dtype, "triton")
    small = last_page(2, 2, dtype, "triton")
    for found, want in zip(large, small, strict=True):
        assert want.any()
        np.testing.assert_array_equal(found, want)
