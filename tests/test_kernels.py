"""The kernels against a dense float64 reference, and what the engine relies on besides numbers.

Every cache is NaN wherever nothing was written: in the rest of a sequence's last page, in pages of
no sequence, in all other layers. Block tables are permuted, and garbage beyond the context.
"""

import functools
import itertools
import math
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import kernels_in, lower_for_h100
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import (
    decode_step,
    draw,
    fused_linear,
    gated_linear,
    gumbel,
    mosaic_prefill,
    mosaic_problem,
    mosaic_product,
    norm_rope_write,
    paged_decode,
    paged_prefill,
    random_bits,
    stream_words,
    supports_fused_linear,
    supports_gated_linear,
)
from pallas_kernels.paged_decode import _choose_splits, _paged_decode_triton

# The package's attributes of these names are functions.
decode_module = sys.modules["pallas_kernels.paged_decode"]
draw_module = sys.modules["pallas_kernels.draw"]


IMPLEMENTATIONS = ("xla", "triton")
LAYERS, LAYER = 3, 1
FP8 = "float8_e4m3fn"
SHAPES = [
    dict(group=1, head_dim=16, page_size=16, dtype="float32"),
    dict(group=2, head_dim=64, page_size=32, dtype="float32"),
    dict(group=3, head_dim=80, page_size=16, dtype="float32"),
    dict(group=7, head_dim=128, page_size=32, dtype="float32"),
    dict(group=2, head_dim=128, page_size=64, dtype="bfloat16"),
    dict(group=2, head_dim=64, page_size=32, dtype="float32", cache_dtype=FP8),
    dict(group=2, head_dim=128, page_size=64, dtype="bfloat16", cache_dtype=FP8),
]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
each_normed = pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# --- Data and references, shared with tests/gpu ----------------------------------------------


class PagedCache:
    """Random keys and values of some sequences: dense per sequence, and paged among NaNs."""

    def __init__(self, rng, contexts, *, kv_heads, head_dim, page_size, dtype, width=None):
        needed = [-(-int(n) // page_size) for n in contexts]
        width = width or max(needed) + 2
        num_pages = sum(needed) + 3
        ids = iter(rng.permutation(num_pages))
        garbage = rng.choice(np.array([-1, num_pages, 2**31 - 1, -(2**31)]), (len(contexts), width))
        self.tables = garbage.astype(np.int32)
        shape = (LAYERS, num_pages, page_size, kv_heads, head_dim)
        paged = {"k": np.full(shape, np.nan, np.float32), "v": np.full(shape, np.nan, np.float32)}
        self.dense = {"k": [], "v": []}
        for b, context in enumerate(contexts):
            pages = [next(ids) for _ in range(needed[b])]
            self.tables[b, : len(pages)] = pages
            for name in paged:
                x = rng.standard_normal((context, kv_heads, head_dim), np.float32)
                x = np.asarray(jnp.asarray(x, dtype), np.float32)  # exactly what the cache holds
                self.dense[name].append(x)
                for i, page in enumerate(pages):
                    part = x[i * page_size : (i + 1) * page_size]
                    paged[name][LAYER, page, : len(part)] = part
        self.k, self.v = jnp.asarray(paged["k"], dtype), jnp.asarray(paged["v"], dtype)

    def attention(self, b, q, scale):
        """Dense causal attention of q [M, N, H], the last M tokens of sequence b, in float64."""
        k, v = self.dense["k"][b].astype(np.float64), self.dense["v"][b].astype(np.float64)
        tokens, heads, head_dim = q.shape
        group = heads // k.shape[1]
        q = np.asarray(q, np.float64).reshape(tokens, -1, group, head_dim)
        scores = np.einsum("mkgh,skh->kgms", q, k) * scale
        position = len(k) - tokens + np.arange(tokens)
        scores = np.where(np.arange(len(k)) <= position[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("kgms,skh->mkgh", weights, v).reshape(tokens, heads, head_dim)


def random_array(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def check_decode(
    implementation, contexts, *,
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, seed=0,
):  # fmt: skip
    rng = np.random.default_rng([seed, group, head_dim, page_size])
    geometry = dict(kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    geometry["dtype"] = cache_dtype or dtype
    cache = PagedCache(rng, contexts, **geometry)
    q = random_array(rng, (len(contexts), kv_heads * group, head_dim), dtype)
    scale = head_dim**-0.5
    tables, lens = jnp.asarray(cache.tables), jnp.asarray(contexts, jnp.int32)
    out = paged_decode(
        q, cache.k, cache.v, tables, lens, LAYER, scale=scale, implementation=implementation
    )
    assert out.shape == q.shape and out.dtype == q.dtype
    for b, context in enumerate(contexts):
        want = cache.attention(b, q[b][None], scale)[0] if context else 0
        np.testing.assert_allclose(
            np.asarray(out[b], np.float64), want, atol=TOLERANCE[dtype], err_msg=f"sequence {b}"
        )


def check_prefill(
    implementation, chunks, padding, *,
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, seed=0, unowned=0,
):  # fmt: skip
    """`chunks` has (query tokens, context) of each sequence; `padding` rows follow them.

    The first `unowned` rows belong to no sequence.
    """
    rng = np.random.default_rng([seed, group, head_dim, page_size])
    lengths, contexts = zip(*chunks, strict=True)
    geometry = dict(kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    geometry["dtype"] = cache_dtype or dtype
    cache = PagedCache(rng, contexts, **geometry)
    starts = unowned + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q = random_array(rng, (starts[-1] + padding, kv_heads * group, head_dim), dtype)
    q = q.at[:unowned].set(jnp.nan)
    scale = head_dim**-0.5
    out = paged_prefill(
        q,
        cache.k,
        cache.v,
        jnp.asarray(cache.tables),
        jnp.asarray(starts),
        jnp.asarray(contexts, jnp.int32),
        LAYER,
        scale=scale,
        implementation=implementation,
    )
    assert out.shape == q.shape and out.dtype == q.dtype
    out = np.asarray(out, np.float64)
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        if first < last:
            want = cache.attention(b, q[first:last], scale)
            np.testing.assert_allclose(
                out[first:last], want, atol=TOLERANCE[dtype], err_msg=f"sequence {b}"
            )
    np.testing.assert_array_equal(out[starts[-1] :], 0)


def norm_rope(x, weight, positions, inv_freq, eps):
    """RMSNorm (if there is a weight) and rotate-half RoPE of x [T, heads, H] in float64."""
    if weight is not None:
        x = x * weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    angles = (positions[:, None] * inv_freq)[:, None]
    x1, x2 = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def check_write(
    implementation, num_tokens, *,
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, num_pages=9, seed=0, normed=True,
):  # fmt: skip
    cache_dtype = cache_dtype or dtype
    rng = np.random.default_rng([seed, group, head_dim, page_size])
    eps = 1e-6
    qkv = random_array(rng, (num_tokens, kv_heads, group + 2, head_dim), dtype)
    qkv = qkv.at[0, :, -1].multiply(1000)  # values that an 8-bit cache cannot hold
    q_norm, k_norm = random_array(rng, (head_dim,), dtype), random_array(rng, (head_dim,), dtype)
    positions = rng.integers(0, 32769, num_tokens)
    positions[0] = 32768
    inv_freq = 1e6 ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None].astype(np.float32) * inv_freq.astype(np.float32)
    slots = rng.permutation(num_pages * page_size)[:num_tokens].astype(np.int32)
    slots[1::3] = rng.choice(np.array([-1, -page_size, -(2**31)]), len(slots[1::3]))
    before = rng.standard_normal((2, LAYERS, num_pages, page_size, kv_heads, head_dim), np.float32)
    k_cache, v_cache = (jnp.asarray(x, cache_dtype) for x in before)
    before = [np.asarray(k_cache, np.float64), np.asarray(v_cache, np.float64)]
    q, k_cache, v_cache = norm_rope_write(
        qkv,
        q_norm if normed else None,
        k_norm if normed else None,
        jnp.cos(angles),
        jnp.sin(angles),
        jnp.asarray(slots),
        k_cache,
        v_cache,
        LAYER,
        eps=eps,
        implementation=implementation,
    )
    x, q_norm, k_norm = (np.asarray(a, np.float64) for a in (qkv, q_norm, k_norm))
    heads = x[:, :, :-2].reshape(num_tokens, kv_heads * group, head_dim)
    if not normed:
        q_norm = k_norm = None
    want_q = norm_rope(heads, q_norm, positions, inv_freq, eps)
    want_k = norm_rope(x[:, :, -2], k_norm, positions, inv_freq, eps)
    # A float32 angle of 32,768 radians is off by up to 2e-3.
    tolerance = dict(atol=8e-3, rtol=1e-3) if dtype == "float32" else dict(atol=5e-2, rtol=2e-2)
    np.testing.assert_allclose(np.asarray(q, np.float64), want_q, **tolerance)

    pages, offsets = slots[slots >= 0] // page_size, slots[slots >= 0] % page_size
    k_cache, v_cache = np.asarray(k_cache, np.float64), np.asarray(v_cache, np.float64)
    written_k, written_v = k_cache[LAYER, pages, offsets], v_cache[LAYER, pages, offsets]
    want_v = x[:, :, -1]
    if cache_dtype == FP8:  # three bits of mantissa, and saturation
        tolerance = dict(atol=tolerance["atol"] + 2e-3, rtol=2**-4 + tolerance["rtol"])
        want_v = np.asarray(jnp.asarray(np.clip(want_v, -448, 448), FP8), np.float64)
        assert abs(want_v[0]).max() == 448 and slots[0] >= 0
    np.testing.assert_allclose(written_k, want_k[slots >= 0], **tolerance)
    np.testing.assert_array_equal(written_v, want_v[slots >= 0])
    for cache, old in zip((k_cache, v_cache), before, strict=True):  # and nothing else
        cache[LAYER, pages, offsets] = old[LAYER, pages, offsets]
        np.testing.assert_array_equal(cache, old)


def check_decode_step(
    implementation, contexts, *,
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, seed=0, splits=None, normed=True,
):  # fmt: skip
    """`decode_step` against `norm_rope_write` and `paged_decode`, one after the other.

    `splits`: whether the contexts must be (True) or must not be (False) cut into parts.
    """
    cache_dtype = cache_dtype or dtype
    rng = np.random.default_rng([seed, group, head_dim, page_size])
    geometry = dict(kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=cache_dtype)
    cache = PagedCache(rng, contexts, **geometry)
    batch, lens = len(contexts), np.asarray(contexts, np.int32)
    num_splits = _choose_splits(batch, cache.k, cache.tables.shape[1])
    assert splits in (None, num_splits > 1)

    qkv = random_array(rng, (batch, kv_heads, group + 2, head_dim), dtype)
    norms = jnp.full((2, LAYERS, head_dim), jnp.nan, dtype)
    norms = norms.at[:, LAYER].set(random_array(rng, (2, head_dim), dtype))
    if cache_dtype == FP8:  # values past what it can hold, and keys where queries are small
        qkv = qkv.at[0, :, -1].multiply(1000)
        norms = norms.at[:, LAYER, :: head_dim // 2].set(jnp.array([[1e-3], [1e3]], dtype))
    angles = random_array(rng, (batch, head_dim // 2), "float32")
    rows, last = np.flatnonzero(lens), lens[lens > 0] - 1
    slots = np.full(batch, -1, np.int32)
    slots[rows] = cache.tables[rows, last // page_size] * page_size + last % page_size
    at = (LAYER, slots[rows] // page_size, slots[rows] % page_size)
    caches = [x.at[at].set(jnp.nan) for x in (cache.k, cache.v)]  # the newest is not there yet
    if not normed:
        norms = (None, None)
    new = (qkv, *norms, jnp.cos(angles), jnp.sin(angles), jnp.asarray(slots))
    paged, scale = (jnp.asarray(cache.tables), jnp.asarray(lens), LAYER), head_dim**-0.5

    def copies():
        return [jnp.array(x) for x in caches]  # the kernels consume what they are given

    out, *after = decode_step(
        *new, *copies(), *paged, eps=1e-6, scale=scale, implementation=implementation
    )
    assert out.dtype == dtype
    out, after = np.asarray(out, np.float64), [np.array(x) for x in after]
    np.testing.assert_array_equal(out[lens == 0], 0)
    for reference in {"xla", implementation if num_splits > 1 else "xla"}:
        q, *want = norm_rope_write(*new, *copies(), LAYER, eps=1e-6, implementation=reference)
        want_out = paged_decode(q, *want, *paged, scale=scale, implementation=reference)
        atol, rtol = 2 * TOLERANCE[dtype], TOLERANCE[dtype] / 10
        if cache_dtype == FP8:  # a key may be rounded to its other neighbour, an eighth away
            atol, rtol = 2e-2, 2e-2
        np.testing.assert_allclose(out, np.asarray(want_out, np.float64), atol=atol, rtol=rtol)
        key, value = (np.asarray(x[at], np.float64) for x in want)
        two_ulp = 2 * float(jnp.finfo(cache_dtype).eps)
        new_key, new_value = (x[at].astype(np.float64) for x in after)
        np.testing.assert_allclose(new_key, key, rtol=two_ulp, atol=two_ulp)
        np.testing.assert_array_equal(new_value, value)
    for x, old in zip(after, map(np.asarray, caches), strict=True):  # and nothing else, bit by bit
        x[at] = old[at]
        np.testing.assert_array_equal(x.view(np.uint8), old.view(np.uint8))


def check_fused_linear(
    width, num_out, *,
    normed=False, residual=False, gated=False, dtype="bfloat16", out_dtype=None, seed=0,
):  # fmt: skip
    """`fused_linear` against float32 NumPy; the weights of all other layers are NaN."""
    rng = np.random.default_rng([seed, width, num_out])
    eps = 1e-2  # large enough to be seen

    def of_layer(value):
        stack = jnp.full((LAYERS, *value.shape), jnp.nan, dtype)
        return stack.at[LAYER].set(value)

    x = random_array(rng, (1, width), dtype) / 8
    weight = random_array(rng, (num_out * (1 + gated), width), dtype) * (8 * width**-0.5)
    weight = of_layer(weight)
    norm = of_layer(random_array(rng, (width,), dtype)) if normed else None
    add = random_array(rng, (1, num_out), dtype) if residual else None
    out = fused_linear(
        x, weight, jnp.int32(LAYER), norm, add, eps=eps, gated=gated, dtype=out_dtype
    )
    assert out.shape == (1, num_out) and out.dtype == (out_dtype or dtype)

    want = np.asarray(x, np.float32)
    if normed:
        want = want / np.sqrt((want * want).mean() + eps) * np.asarray(norm[LAYER], np.float32)
    want = want @ np.asarray(weight[LAYER], np.float32).T
    if gated:
        gate, up = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * up
    if residual:
        want = want + np.asarray(add, np.float32)
    # Rounded once, at the end. Sums of `width` float32 terms differ by their order.
    half_ulp = float(jnp.finfo(out.dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=half_ulp + 1e-4, atol=1e-4)


def check_gated_linear(num_rows, width, num_out, *, seed=0, **options):
    """`gated_linear` against float32 NumPy; the weights of all other layers are NaN."""
    rng = np.random.default_rng([seed, num_rows, width, num_out])
    x = rng.standard_normal((num_rows, width), np.float32)
    x[:: num_rows // 3] *= 100  # whose exponentials leave float32's range
    x = jnp.asarray(x, jnp.bfloat16)
    own = rng.standard_normal((2, num_out, width), np.float32) * (2 * width**-0.5)
    own = jnp.asarray(own, jnp.bfloat16)
    weight = jnp.full((LAYERS, *own.shape), jnp.nan, jnp.bfloat16).at[LAYER].set(own)
    out = gated_linear(x, weight, jnp.int32(LAYER), **options)
    assert out.shape == (num_rows, num_out) and out.dtype == jnp.bfloat16

    x, own = np.asarray(x, np.float32), np.asarray(own, np.float32)
    gate, up = (x @ half.T for half in own)
    with np.errstate(over="ignore"):
        want = gate / (1 + np.exp(-gate)) * up
    # Rounded once, at the end: a gate or an up rounded before it would be out of these bounds. The
    # products' own sums are as exact as tensor cores are for terms of their size, which counts
    # where a gate of nearly zero meets a large up: they cut off, and do not round, the sum so far.
    half_ulp = float(jnp.finfo(out.dtype).eps) / 2
    terms = [np.abs(x) @ np.abs(half).T for half in own]
    sums = 2**-22 * (1.1 * terms[0] * np.abs(up) + terms[1] * np.abs(gate))
    bound = (half_ulp + 2e-4) * np.abs(want) + 2e-4 + sums
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float32) - want), bound)


DRAW_KINDS = ("random", "ties", "zeros", "masked", "nothing", "one")


def check_draw(kind, rows, width, *, first_id=None, vocab_size=None, seed=0):
    """`draw` against an arg max over all sums: the same scores and tokens, bit by bit."""
    rng = np.random.default_rng([seed, len(kind), rows, width])
    logits = rng.standard_normal((rows, width), np.float32) * 3
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "zeros":
        logits = np.where(rng.random(logits.shape) < 0.5, np.float32(0), -np.float32(0))
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.99] = -np.inf
    elif kind == "nothing":
        logits[:] = -np.inf
    elif kind == "one":
        logits[:] = -np.inf
        logits[:, width // 2] = 1.0
    temperatures = rng.choice(np.float32([0, 1e-3, 0.6, 1, 5, 1e30]), rows)
    seeds = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    positions = rng.integers(0, 40000, rows).astype(np.int32)
    vocab_size = vocab_size or (first_id or 0) + width

    @jax.jit
    def reference(logits, temperatures, seeds, positions):
        ids = (first_id or 0) + jnp.arange(width)
        words = stream_words(seeds[:, 0], seeds[:, 1], positions)
        bits = random_bits([w[:, None] for w in words], ids[None, :])
        scores = logits + temperatures[:, None] * gumbel(bits)
        scores = jnp.where(ids < vocab_size, scores, -jnp.inf)
        return scores.max(axis=1), ids[jnp.argmax(scores, axis=1)]

    args = tuple(map(jnp.asarray, (logits, temperatures, seeds, positions)))
    shard = () if first_id is None else (jnp.int32(first_id),)
    scores, tokens = draw(*args, *shard, vocab_size=vocab_size)
    want_scores, want_tokens = reference(*args)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_array_equal(scores, want_scores)


# --- Numbers ---------------------------------------------------------------------------------


@each_implementation
@each_shape
def test_decode_matches_dense_attention(implementation, shape):
    s = shape["page_size"]
    check_decode(
        implementation,
        [1, s - 1, 0, s, s + 1, 2 * s],
        kv_heads=2,
        **shape,
    )


@each_implementation
@each_shape
def test_prefill_matches_dense_attention(implementation, shape):
    s = shape["page_size"]
    # Whole prompts around a page edge, chunks behind a prefix, one token, padding sequences.
    chunks = [(s - 1, s - 1), (1, s + 1), (s + 1, s + 1), (0, 0), (s // 2, 2 * s), (2 * s, 3 * s)]
    check_prefill(
        implementation,
        [*chunks, (0, 0)],
        padding=7,
        kv_heads=2,
        **shape,
    )
    check_prefill(implementation, chunks[:3], padding=2, unowned=3, kv_heads=2, **shape)


@each_implementation
@each_shape
@each_normed
def test_write_matches_float64_and_touches_nothing_else(implementation, shape, normed):
    check_write(implementation, 13, kv_heads=3, normed=normed, **shape)


@each_implementation
def test_all_padding(implementation):
    shape = dict(group=2, kv_heads=1, head_dim=16, page_size=16, dtype="float32")
    check_decode(implementation, [0, 0], **shape)
    check_prefill(implementation, [(0, 0), (0, 0)], padding=5, **shape)


@pytest.mark.parametrize("num_splits", [1, 2, 8])
def test_splitting_the_context_changes_nothing(num_splits):
    contexts = [0, 1, 63, 64, 200]
    rng = np.random.default_rng(num_splits)
    geometry = dict(kv_heads=2, head_dim=64, page_size=16, dtype="float32")
    cache = PagedCache(rng, contexts, **geometry)
    q = random_array(rng, (len(contexts), 4, 64), "float32")
    out = _paged_decode_triton(
        q, cache.k, cache.v, cache.tables, jnp.asarray(contexts, jnp.int32), LAYER,
        scale=0.125, num_splits=num_splits, interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(out[0], 0)
    for b in range(1, len(contexts)):
        want = cache.attention(b, q[b][None], 0.125)[0]
        np.testing.assert_allclose(out[b], want, atol=2e-5)


@pytest.fixture
def target_programs(monkeypatch):
    """target_programs(n): let the decode kernels aim at n programs; None: at the usual number."""

    def forget():
        for function in (decode_step, paged_decode):  # the number is no part of their signatures
            function.clear_cache()

    def set_to(number):
        if number is not None:
            monkeypatch.setattr(decode_module, "_TARGET_PROGRAMS", number)
            forget()

    yield set_to
    forget()


STEP_SHAPES = [
    dict(group=1, head_dim=64, page_size=16, dtype="float32"),
    dict(group=3, head_dim=80, page_size=16, dtype="float32"),
    dict(group=4, head_dim=128, page_size=32, dtype="float32"),
    dict(group=2, head_dim=128, page_size=64, dtype="bfloat16"),
    dict(group=2, head_dim=64, page_size=32, dtype="float32", cache_dtype=FP8),
    dict(group=4, head_dim=128, page_size=64, dtype="bfloat16", cache_dtype=FP8),
]
# Contexts of 0 to 3 pages and 2 KV heads: 28 programs are 2 splits, the usual number is the most.
SPLITS = {"whole": 1, "halves": 28, "many": None}


def slow_but(chosen, parameters):
    """The parameters, of which only the chosen ones are tested by `make test`."""
    slow = pytest.mark.slow
    return [p if p in chosen else pytest.param(p, marks=slow) for p in parameters]


@pytest.mark.parametrize("programs", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(
    "shape",
    slow_but(STEP_SHAPES[1:4:2], STEP_SHAPES),
    ids=lambda s: "-".join(map(str, s.values())),
)
@each_normed
def test_decode_step_is_write_and_decode(shape, programs, target_programs, normed):
    target_programs(programs)
    s = shape["page_size"]
    contexts = [s + 1, 1, 0, s, s - 1, 3 * s - 5, 2]
    check_decode_step("triton", contexts, kv_heads=2, splits=programs != 1, normed=normed, **shape)


@each_implementation
def test_decode_step_of_padding_alone(implementation):
    shape = dict(group=2, kv_heads=1, head_dim=16, page_size=16, dtype="float32")
    check_decode_step(implementation, [0, 0], **shape)


@pytest.mark.parametrize(
    ("width", "num_out"), [(128, 8), (128, 4096), (384, 2056), (1024, 24), (3072, 40)]
)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normed=True),
        dict(residual=True),
        dict(gated=True),
        dict(normed=True, gated=True),
        dict(normed=True, out_dtype="float32"),
        dict(normed=True, residual=True, gated=True, dtype="float16"),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_fused_linear_matches_float32(width, num_out, options):
    check_fused_linear(width, num_out, **options)


@pytest.mark.parametrize("kind", DRAW_KINDS)
def test_draw_is_the_arg_max_of_all_sums(kind):
    check_draw(kind, 7, 5000)
    check_draw(kind, 1, 40)


def test_draw_over_a_part_of_a_padded_vocabulary():
    check_draw("random", 5, 3000, first_id=6000, vocab_size=8000)
    check_draw("random", 3, 3000, first_id=9000, vocab_size=8000)  # nothing but padding
    check_draw("ties", 3, 3000, vocab_size=2999)


def test_quick_noise_is_within_its_margin():
    rng = np.random.default_rng(0)
    edges = np.arange(2000, dtype=np.uint32)
    some = (2 ** rng.uniform(0, 32, 100_000)).astype(np.uint32)
    bits = jnp.asarray(np.concatenate([edges, ~edges, some, ~some]))
    u = (np.asarray(bits, np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    exact = -np.log(-np.log1p(-np.minimum(u, 1 - 2.0**-24).astype(np.float64)))
    quick = np.asarray(draw_module._quick_noise(bits, True), np.float64) * math.log(2)
    difference = quick - math.log(math.log(2)) - exact
    # Here both logarithms are exact; on a GPU each is off by up to 2^-22, and one of them is
    # multiplied by up to 2^8 where the sum of powers ends.
    assert abs(difference).max() < draw_module._NOISE_MARGIN / 2 - 2.0**-14


MOSAIC_SHAPES = [
    dict(group=2, kv_heads=1, head_dim=128, page_size=256, dtype="bfloat16"),
    dict(group=1, kv_heads=2, head_dim=64, page_size=48, dtype="bfloat16"),
    dict(group=4, kv_heads=1, head_dim=64, page_size=16, dtype="bfloat16"),
]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's interpreter is too old")
@pytest.mark.parametrize("shape", MOSAIC_SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_mosaic_prefill_matches_dense_attention(shape, monkeypatch):
    # Few programs, so that each has several tiles, and some of padding that have no keys.
    monkeypatch.setattr(mosaic_prefill, "PROGRAMS", 3)
    chunks = [(130, 130), (1, 500), (0, 0), (61, 200), (3, 3)]
    check_prefill("mosaic", chunks, padding=70, **shape)
    check_prefill("mosaic", chunks[::-1], padding=3, unowned=13, **shape)
    check_prefill("mosaic", [(0, 0)], padding=5, **shape)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's interpreter is too old")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("num_rows", "width", "num_out", "options"),
    [
        (128, 256, 128, dict()),  # one tile, and a member of the cluster without rows
        (600, 256, 384, dict(band=2)),  # a band less high than the others
        (520, 320, 256, dict(stages=2, band=3)),
        (264, 320, 256, dict(lead=2)),
        (264, 320, 256, dict(lead=0)),
    ],
)
def test_gated_linear_matches_float32(num_rows, width, num_out, options, cluster, monkeypatch):
    monkeypatch.setattr(mosaic_product, "PROGRAMS", 4)  # so that each has several tiles
    params = mgpu.InterpretGPUParams(detect_races=True)  # which jax 0.12 raises
    monkeypatch.setattr(mosaic_product, "mosaic_interpreter", lambda interpret: params)
    check_gated_linear(num_rows, width, num_out, cluster=cluster, interpret=True, **options)


# --- What the engine relies on ---------------------------------------------------------------

TOKENS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 16, 8, 4, 128, 4


def two_layers(qkv, norm, cos, slots, tables, starts, lens, k_cache, v_cache, *, decode, **options):
    """Write and attend in layers 0 and 1: the part of a step that touches the caches."""

    @jax.jit
    def run_layer(qkv, k_cache, v_cache, layer):
        q, k_cache, v_cache = norm_rope_write(
            qkv, norm, norm, cos, cos, slots, k_cache, v_cache, layer, eps=1e-6, **options
        )
        args = (lens,) if decode else (starts, lens)
        attend = paged_decode if decode else paged_prefill
        out = attend(q, k_cache, v_cache, tables, *args, layer, scale=0.1, **options)
        return qkv.at[:, :, :-2].add(out.reshape(qkv[:, :, :-2].shape)), k_cache, v_cache

    for layer in range(2):
        qkv, k_cache, v_cache = run_layer(qkv, k_cache, v_cache, jnp.int32(layer))
    return qkv, k_cache, v_cache


def two_layers_shapes(dtype, page_size=256, num_pages=7):
    """Abstract arguments of `two_layers`, for as many sequences as tokens."""
    struct = jax.ShapeDtypeStruct
    cache = struct((2, num_pages, page_size, KV_HEADS, HEAD_DIM), dtype)
    return (
        struct((TOKENS, KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM), dtype),
        struct((2, HEAD_DIM), dtype),
        struct((TOKENS, HEAD_DIM // 2), jnp.float32),
        struct((TOKENS,), jnp.int32),
        struct((TOKENS, WIDTH), jnp.int32),
        struct((TOKENS + 1,), jnp.int32),
        struct((TOKENS,), jnp.int32),
        cache,
        cache,
    )


@pytest.mark.parametrize("decode", [True, False])
def test_the_donated_caches_are_not_copied(decode):
    """XLA updates the caches in place, and its loops read them where they are."""

    def step(*args):
        return two_layers(*args, decode=decode, implementation="xla")

    shapes = two_layers_shapes("float32", num_pages=50)  # more than the pages read at a time
    compiled = jax.jit(step, donate_argnums=(7, 8)).lower(*shapes).compile()
    cache = "2,50,256,4,128"
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert f"f32[{cache}]" in text
    assert not re.findall(rf"= \w+\[{cache}\]\S* (?:copy|copy-start|convert|select)\(.*", text)
    assert memory.alias_size_in_bytes >= 2 * shapes[7].size * 4
    assert memory.temp_size_in_bytes < shapes[7].size * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decode", [True, False])
def test_kernels_lower_for_a_gpu(decode, dtype):
    def step(*args):
        return two_layers(*args, decode=decode, implementation="triton", interpret=False)

    text = lower_for_h100(jax.jit(step, donate_argnums=(7, 8)), *two_layers_shapes(dtype))
    assert sorted(set(kernels_in(text))) == (
        ["norm_rope_write", "paged_decode", "paged_decode_combine"]
        if decode
        else ["norm_rope_write", "paged_prefill"]
    )


@pytest.mark.parametrize("programs", [1, None])
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", FP8])
def test_decode_step_lowers_for_a_gpu(cache_dtype, programs, target_programs):
    """It becomes one kernel and the merging of its parts, or the usual two if nothing is split."""
    target_programs(programs)
    dtype = "float32" if cache_dtype == "float32" else "bfloat16"
    qkv, norm, cos, slots, tables, _, lens, *_ = two_layers_shapes(dtype)
    cache = two_layers_shapes(cache_dtype)[-1]
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    step = functools.partial(
        decode_step, eps=1e-6, scale=0.1, implementation="triton", interpret=False
    )
    args = (qkv, norm, norm, cos, cos, slots, cache, cache, tables, lens, layer)
    text = lower_for_h100(jax.jit(step, donate_argnums=(6, 7)), *args)
    other = "norm_rope_write" if programs == 1 else "paged_decode_combine"
    assert sorted(kernels_in(text)) == sorted(["paged_decode", other])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_fused_linear_lowers_for_a_gpu(fused, gated):
    struct = jax.ShapeDtypeStruct
    x, weight = struct((1, 384), jnp.bfloat16), struct((2, 64, 384), jnp.bfloat16)
    layer, norm = struct((), jnp.int32), struct((2, 384), jnp.bfloat16)
    optional = (norm, struct((1, 64 // (1 + gated)), jnp.bfloat16)) if fused else ()
    linear = functools.partial(fused_linear, gated=gated, dtype=jnp.float32, interpret=False)
    text = lower_for_h100(jax.jit(linear), x, weight, layer, *optional)
    assert kernels_in(text) == ["fused_linear"]


@pytest.mark.parametrize(
    ("num_rows", "width", "num_out"),
    [(16384, 1024, 3072), (2048, 4096, 12288), (16384, 1024, 1536), (1096, 4096, 6144)],
)
def test_gated_linear_lowers_for_a_gpu(num_rows, width, num_out):
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = struct((num_rows, width)), struct((3, 2, num_out, width))
    text = lower_for_h100(gated_linear, *args, jax.ShapeDtypeStruct((), jnp.int32))
    assert kernels_in(text) == ["gated_linear"]


@pytest.mark.parametrize("sharded", [False, True])
def test_draw_lowers_for_a_gpu(sharded):
    struct = jax.ShapeDtypeStruct
    args = (struct((3, 5000), jnp.float32), struct((3,), jnp.float32), struct((3, 2), jnp.uint32))
    args += (struct((3,), jnp.int32),) + (struct((), jnp.int32),) * sharded
    drawn = functools.partial(draw, vocab_size=9000, interpret=False)
    assert kernels_in(lower_for_h100(jax.jit(drawn), *args)) == ["draw"]


def test_mosaic_prefill_lowers_for_a_gpu():
    def step(*args):
        return two_layers(*args, decode=False, implementation="mosaic", interpret=False)

    text = lower_for_h100(jax.jit(step, donate_argnums=(7, 8)), *two_layers_shapes("bfloat16"))
    assert kernels_in(text).count("paged_prefill_mosaic") == 1  # both layers call one kernel


@each_implementation
@pytest.mark.parametrize("decode", slow_but([True], [True, False]))
def test_sharding_the_kv_heads_changes_nothing(decode, implementation):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(decode)
    shapes = two_layers_shapes("float32", page_size=16, num_pages=TOKENS)
    qkv, norm, cos, *_, k_cache, v_cache = (
        rng.standard_normal(s.shape, np.float32) for s in shapes
    )
    tables = rng.permutation(TOKENS).astype(np.int32)[:, None]
    if decode:  # a sequence per token, each with a page of its own
        slots, starts, lens = tables[:, 0] * 16 + 4, tables[:, 0], np.full(TOKENS, 5, np.int32)
    else:  # one sequence, in one page
        slots, tables = tables[0] * 16 + np.arange(TOKENS, dtype=np.int32), tables[:1]
        starts, lens = np.array([0, TOKENS], np.int32), np.array([TOKENS], np.int32)

    def step(*args):
        return two_layers(*args, decode=decode, implementation=implementation)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tp",))
    P = jax.sharding.PartitionSpec
    heads, cache = P(None, "tp"), P(None, None, None, "tp")
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(heads, P(), P(), P(), P(), P(), P(), cache, cache),
        out_specs=(heads, cache, cache),
        check_vma=False,
    )
    args = (qkv, norm, cos, slots, tables, starts, lens, k_cache, v_cache)
    for want, got in zip(jax.jit(step)(*args), jax.jit(sharded)(*args), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_wrong_arguments_are_refused_by_name():
    cache = jnp.zeros((1, 2, 16, 2, 64))
    tables, lens = jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32)

    def decode(heads=4, head_dim=64, cache=cache, lens=lens, implementation="xla"):
        q = jnp.zeros((3, heads, head_dim))
        paged_decode(q, cache, cache, tables, lens, 0, scale=1.0, implementation=implementation)

    with pytest.raises(ValueError, match=r"'cuda'.*'triton', 'mosaic', 'xla'"):
        decode(implementation="cuda")
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 KV heads"):
        decode(heads=3)
    with pytest.raises(ValueError, match="head_dim 32, but the cache has 64"):
        decode(head_dim=32)
    with pytest.raises(ValueError, match="must be a multiple of 16, not 24"):
        decode(cache=jnp.zeros((1, 2, 24, 2, 64)))
    with pytest.raises(ValueError, match=r"are not .*\[B\]"):
        decode(lens=lens[:2])
    with pytest.raises(ValueError, match="query_starts"):
        paged_prefill(
            jnp.zeros((5, 4, 64)), cache, cache, tables, lens, lens, 0,
            scale=1.0, implementation="xla",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "cuda", "problem"),
    [
        ("9.0", 13000, None),
        ("9.0", 12079, None),
        ("9.0", 12091, None),
        ("9.0", 12080, r"12\.8\.0 to 12\.9\.0.*triton"),
        ("9.0", 12090, r"12\.8\.0 to 12\.9\.0.*triton"),
        ("8.0", 13000, r"Hopper.*not 8\.0.*triton"),
        ("10.0", 13000, "Hopper"),
    ],
)
def test_the_gpus_that_run_mosaic(capability, cuda, problem):
    client = SimpleNamespace(platform_version=f"PJRT C API\ncuda {cuda}")
    found = mosaic_problem(SimpleNamespace(compute_capability=capability, client=client))
    assert found is None if problem is None else re.search(problem, found)


def test_mosaic_prefill_names_what_it_does_not_support():
    def prefill(dtype="bfloat16", cache_dtype=None, head_dim=64, scale=0.125):
        cache = jnp.zeros((1, 2, 16, 2, head_dim), cache_dtype or dtype)
        one = jnp.ones(1, jnp.int32)
        paged_prefill(
            jnp.zeros((1, 4, head_dim), dtype), cache, cache, one[None], jnp.arange(2), one, 0,
            scale=scale, implementation="mosaic",
        )  # fmt: skip

    with pytest.raises(ValueError, match=r'not float32 queries.*"triton"'):
        prefill("float32")
    with pytest.raises(ValueError, match="float8_e4m3fn cache"):
        prefill(cache_dtype=FP8)
    with pytest.raises(ValueError, match=r"64 or 128, not .* head_dim 80"):
        prefill(head_dim=80)
    with pytest.raises(ValueError, match="positive scale, not -1"):
        prefill(scale=-1.0)


@pytest.mark.parametrize("target", [1, None])
def test_decode_step_refuses_what_its_parts_refuse(target, target_programs):
    target_programs(target)

    def step(batch=3, lens=3, slots=3, half=32, page_size=16, implementation="triton"):
        cache = jnp.zeros((1, 2, page_size, 2, 64))
        angles, norm = jnp.zeros((batch, half)), jnp.zeros(64)
        decode_step(
            jnp.zeros((batch, 2, 4, 64)), norm, norm, angles, angles, jnp.zeros(slots, jnp.int32),
            cache, cache + 0, jnp.zeros((batch, 9), jnp.int32), jnp.ones(lens, jnp.int32), 0,
            eps=1e-6, scale=1.0, implementation=implementation,
        )  # fmt: skip

    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        step(implementation="cuda")
    with pytest.raises(ValueError, match="must be a multiple of 16, not 24"):
        step(page_size=24)
    with pytest.raises(ValueError, match=r"cos \(3, 31\).*are not \[T, H/2\]"):
        step(half=31)
    with pytest.raises(ValueError, match=r"slot_mapping \(2,\) is not \[T\]"):
        step(slots=2)
    with pytest.raises(ValueError, match=r"context_lens \(2,\) are not .*\[B\]"):
        step(lens=2)


def test_fused_linear_names_what_it_does_not_take():
    def linear(rows=1, width=256, num_out=16, weight_width=None, dtype="bfloat16", **options):
        weight = jnp.zeros((2, num_out, weight_width or width), dtype)
        fused_linear(jnp.zeros((rows, width), dtype), weight, jnp.int32(0), **options)

    with pytest.raises(ValueError, match=r"one row.*bfloat16\(2, 256\)"):
        linear(rows=2)
    with pytest.raises(ValueError, match=r"16 bits.*float32\(1, 256\)"):
        linear(dtype="float32")
    with pytest.raises(ValueError, match=r"multiples of 128, not bfloat16\(1, 192\)"):
        linear(width=192)
    with pytest.raises(ValueError, match=r"multiples of 4 .* with \(2, 10, 256\)"):
        linear(num_out=10)
    with pytest.raises(ValueError, match=r"with \(2, 20, 256\)"):
        linear(num_out=20, gated=True)  # two halves of 10
    with pytest.raises(ValueError, match=r"bfloat16\(1, 256\) with \(2, 16, 128\)"):
        linear(weight_width=128)


@pytest.mark.parametrize(
    ("rows", "num_out", "width", "dtype", "fits"),
    [
        (1, 8, 128, "bfloat16", True),
        (1, 151936, 3072, "float16", True),
        (2, 8, 128, "bfloat16", False),
        (0, 8, 128, "bfloat16", False),
        (1, 10, 128, "bfloat16", False),
        (1, 8, 64, "bfloat16", False),
        (1, 8, 128, "float32", False),
        (1, 8, 128, FP8, False),
    ],
)
def test_supports_fused_linear(rows, num_out, width, dtype, fits):
    assert supports_fused_linear(rows, num_out, width, dtype) == fits


def test_gated_linear_names_what_it_does_not_take():
    def linear(
        rows=128, width=256, num_out=128, halves=2, weight_width=None, dtype="bfloat16", **options
    ):  # fmt: skip
        weight = jnp.zeros((1, halves, num_out, weight_width or width), dtype)
        gated_linear(jnp.zeros((rows, width), "bfloat16"), weight, jnp.int32(0), **options)

    with pytest.raises(ValueError, match=r"128 rows in multiples of 8.*bfloat16\(120, 256\)"):
        linear(rows=120)
    with pytest.raises(ValueError, match=r"bfloat16\(132, 256\)"):
        linear(rows=132)
    with pytest.raises(ValueError, match=r"outputs in multiples of 128.*\(1, 2, 192, 256\)"):
        linear(num_out=192)
    with pytest.raises(ValueError, match=r"inputs in multiples of 64 .*bfloat16\(128, 288\)"):
        linear(width=288)
    with pytest.raises(ValueError, match=r"at least 256 inputs .*bfloat16\(128, 192\)"):
        linear(width=192)
    with pytest.raises(ValueError, match=r"with bfloat16\(1, 2, 128, 320\)"):
        linear(weight_width=320)
    with pytest.raises(ValueError, match=r"with bfloat16\(1, 1, 128, 256\)"):
        linear(halves=1)
    with pytest.raises(ValueError, match=r"with float32\(1, 2, 128, 256\)"):
        linear(dtype="float32")
    # With these a GPU would wait for ever.
    for options in (dict(stages=5), dict(stages=1, lead=0), dict(lead=4), dict(lead=-1)):
        with pytest.raises(ValueError, match="no room for"):
            linear(**options)


@pytest.mark.parametrize(
    ("rows", "num_out", "width", "dtype", "capability", "fits"),
    [
        (1024, 3072, 1024, "bfloat16", "9.0", True),
        (16384, 1536, 1024, "bfloat16", "9.0", True),
        (1016, 3072, 1024, "bfloat16", "9.0", False),
        (1028, 3072, 1024, "bfloat16", "9.0", False),
        (1024, 3008, 1024, "bfloat16", "9.0", False),
        (1024, 3072, 1000, "bfloat16", "9.0", False),
        (1024, 3072, 192, "bfloat16", "9.0", False),
        (1024, 3072, 1024, "float16", "9.0", False),
        (1024, 3072, 1024, "bfloat16", "8.0", False),
        (1024, 3072, 1024, "bfloat16", "10.0", False),
        (1024, 3072, 1024, "bfloat16", None, False),  # a CPU
    ],
)
def test_supports_gated_linear(rows, num_out, width, dtype, capability, fits):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(platform="gpu", compute_capability=capability, client=client)
    if capability is None:
        device = SimpleNamespace(platform="cpu")
    assert supports_gated_linear(rows, num_out, width, dtype, device) == fits
