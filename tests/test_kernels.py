"""The kernels against a dense float64 reference, and what the engine relies on besides numbers.

Every cache is NaN wherever nothing was written: in the rest of a sequence's last page, in pages of
no sequence, in all other layers. Block tables are permuted, and garbage beyond the context.
"""

import contextlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import norm_rope_write, paged_decode, paged_prefill
from pallas_kernels.paged_decode import _paged_decode_triton

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
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, seed=0,
):  # fmt: skip
    """`chunks` has (query tokens, context) of each sequence; `padding` rows follow them."""
    rng = np.random.default_rng([seed, group, head_dim, page_size])
    lengths, contexts = zip(*chunks, strict=True)
    geometry = dict(kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    geometry["dtype"] = cache_dtype or dtype
    cache = PagedCache(rng, contexts, **geometry)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q = random_array(rng, (starts[-1] + padding, kv_heads * group, head_dim), dtype)
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
    """RMSNorm and rotate-half RoPE of x [T, heads, H] in float64."""
    x = x * weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    angles = (positions[:, None] * inv_freq)[:, None]
    x1, x2 = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def check_write(
    implementation, num_tokens, *,
    group, kv_heads, head_dim, page_size, dtype, cache_dtype=None, num_pages=9, seed=0,
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
        q_norm,
        k_norm,
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


@each_implementation
@each_shape
def test_write_matches_float64_and_touches_nothing_else(implementation, shape):
    check_write(
        implementation,
        13,
        kv_heads=3,
        **shape,
    )


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


def gpu_lowering_context():
    """Where jax >= 0.11 finds the GPU that a Triton kernel is lowered for, on a CPU machine."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(
            (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
        )
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

    with gpu_lowering_context():
        traced = jax.jit(step, donate_argnums=(7, 8)).trace(*two_layers_shapes(dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r'name = "(norm_rope_write|paged_\w+)"', text)
    assert sorted(set(kernels)) == (
        ["norm_rope_write", "paged_decode", "paged_decode_combine"]
        if decode
        else ["norm_rope_write", "paged_prefill"]
    )


@each_implementation
@pytest.mark.parametrize("decode", [True, False])
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
