"""The Mosaic GPU decode kernel: numbers in its interpreter, lowering, and its division of work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import kernels_in, lower_for_h100
from test_kernels import check_decode

from pallas_kernels import mosaic_decode, paged_decode

SHAPES = [
    dict(group=4, kv_heads=2, head_dim=64, page_size=16),
    dict(group=2, kv_heads=4, head_dim=128, page_size=32),
    dict(group=8, kv_heads=1, head_dim=128, page_size=64),
]
TUNINGS = [
    dict(num_ctas=3, num_slots=2),
    dict(num_ctas=5, num_slots=3, chunk=64, tile_heads=1),
    dict(num_ctas=1),
]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="no interpreter for the kernel")
@pytest.mark.parametrize(
    "contexts, shape, tuning",
    [
        *(([1, 15, 0, 16, 17, 130], s, t) for s, t in zip(SHAPES, TUNINGS, strict=True)),
        ([0, 0], SHAPES[0], TUNINGS[0]),
    ],
)
def test_matches_dense_attention(monkeypatch, contexts, shape, tuning):
    default = functools.partial(mosaic_decode.Tuning, **tuning)
    monkeypatch.setattr(mosaic_decode, "Tuning", default)
    jax.clear_caches()  # the tuning is no part of paged_decode's signature
    check_decode("mosaic", contexts, dtype="bfloat16", **shape)


def operands(batch=5, heads=16, kv_heads=8, head_dim=128, page_size=256, dtype="bfloat16"):
    struct = jax.ShapeDtypeStruct
    cache = struct((2, 9, page_size, kv_heads, head_dim), dtype)
    ints = (struct(shape, jnp.int32) for shape in ((batch, 4), (batch,), ()))
    return struct((batch, heads, head_dim), dtype), cache, cache, *ints


def decode(*args):
    return paged_decode(*args, scale=0.1, implementation="mosaic", interpret=False)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(16, 8, 128), (64, 8, 64), (8, 1, 128)])
def test_lowers_for_a_gpu(heads, kv_heads, head_dim):
    shapes = operands(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    text = lower_for_h100(jax.jit(decode), *shapes)
    assert set(kernels_in(text)) == {"mosaic_gpu", "paged_decode_merge"}


@pytest.mark.parametrize(
    "shape", [dict(head_dim=80), dict(heads=72), dict(heads=4, kv_heads=4), dict(dtype="float32")]
)
def test_names_what_it_supports(shape):
    with pytest.raises(ValueError, match=r"'mosaic' supports bfloat16.*use 'triton'"):
        jax.eval_shape(decode, *operands(**shape))


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("num_ctas", [1, 7, 132])
@pytest.mark.parametrize("longest", [0, 1, 70, 3000])
def test_every_position_is_in_one_piece(longest, num_ctas, chunk):
    rng = np.random.default_rng(longest)
    contexts = rng.integers(0, longest + 1, 20) * (rng.random(20) < 0.8)
    plan = mosaic_decode._plan(jnp.asarray(contexts, jnp.int32), chunk, num_ctas)
    seen = [[] for _ in contexts]  # (first, end, piece) in chunks of each sequence
    numbers, loads = [], []
    for cta, (first, last, begin, end) in enumerate(np.asarray(plan.work)):
        loads.append(end - begin)
        for b in range(first, last + 1):
            start = int(plan.first_chunk[b])
            low, high = max(begin - start, 0), min(end - start, -(-contexts[b] // chunk))
            numbers.append(b + cta)
            if low < high:
                seen[b].append((low, high, b + cta))
    assert len(set(numbers)) == len(numbers)
    assert max(loads) - min(loads) <= 1
    for b, pieces in enumerate(seen):
        edges = [0, *(high for _, high, _ in pieces)]
        assert [low for low, _, _ in pieces] == edges[:-1]
        assert edges[-1] == -(-contexts[b] // chunk)
        first, count = np.asarray(plan.pieces[b])
        assert [n for *_, n in pieces] == list(range(first, first + count))
