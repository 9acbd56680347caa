"""Sampling against a NumPy reference in float64, over one device and over several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from nanovllm_jax.engine.request import stream_seed
from nanovllm_jax.layers.sampler import filter_logits, gumbel_noise, sample
from nanovllm_jax.sharding import make_sharding

V = 200


def words(seeds) -> np.ndarray:
    """64-bit seeds as the device takes them: [low, high] words."""
    return np.array([[seed % 2**32, seed >> 32] for seed in map(int, seeds)], np.uint32)


def logits_of(kind: str, rows: int = 24, vocab: int = V) -> np.ndarray:
    rng = np.random.default_rng(len(kind))
    x = rng.standard_normal((rows, vocab)).astype(np.float32) * 3
    if kind == "ties":
        x = np.round(x)
    elif kind == "masked":
        x[rng.random(x.shape) < 0.6] = -np.inf
        x[:, 17] = 1.0
    elif kind == "zeros":
        x[rng.random(x.shape) < 0.3] = 0.0
        x[rng.random(x.shape) < 0.3] = -0.0
    elif kind == "huge":
        x *= 1e4
    return x


def options(rows: int, **fixed):
    """Per-row options that mix all filters."""
    rng = np.random.default_rng(5)
    mixed = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.5], rows).astype(np.float32),
        "top_k": rng.choice([0, -1, 1, 2, 7, 50, V, V + 9, 2**31 - 1], rows).astype(np.int32),
        "top_p": rng.choice([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6], rows).astype(np.float32),
        "min_p": rng.choice([0.0, 0.01, 0.2, 1.0], rows).astype(np.float32),
    }
    for name, value in fixed.items():
        mixed[name] = np.full(rows, value, mixed[name].dtype)
    return mixed


OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def reference(row, temperature, top_k, top_p, min_p):
    """(kept for sure, kept perhaps): masks; the second allows for rounding at top_p's edge."""
    x = row.astype(np.float64)
    scale = 1 / max(float(temperature), 1e-6)
    weights = np.exp((x - x.max()) * scale)
    keep = weights >= float(min_p) * (1 - 1e-6)
    surely = weights >= float(min_p) * (1 + 1e-6)
    if float(min_p) in (0.0, 1.0):
        surely = keep.copy()
    if 0 < top_k < len(x):
        kth = np.sort(x)[::-1][top_k - 1]
        keep &= x >= kth
        surely &= x >= kth
    if top_p < 1:
        kept = np.where(keep, weights, 0)
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(kept[order]) - kept[order]  # the mass of what is likelier
        mass = float(top_p) * kept.sum()

        def reached(slack):
            last = order[np.nonzero(before < mass * (1 + slack) + 1e-300)[0][-1]]
            return x >= x[last]  # all that equal the threshold are kept

        keep &= reached(1e-4)
        surely &= reached(-1e-4)
    return surely & (x > -np.inf), keep & (x > -np.inf)


def apply(logits, opts, **kwargs):
    return filter_logits(
        logits, opts["temperature"], opts["top_k"], opts["top_p"], opts["min_p"], **kwargs
    )


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "zeros", "huge"])
@pytest.mark.parametrize(
    "fixed",
    [
        {},
        OFF,
        OFF | {"top_k": 1},
        OFF | {"top_k": 13},
        OFF | {"top_k": V + 1},
        OFF | {"top_p": 0.7},
        OFF | {"top_p": 1e-6},
        OFF | {"min_p": 0.05},
        OFF | {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 0.5},
    ],
    ids=str,
)
def test_filters_keep_what_the_reference_keeps(kind, fixed):
    logits = logits_of(kind)
    opts = options(len(logits), **fixed)
    got = np.asarray(apply(logits, opts, vocab_size=V))
    kept = got > -np.inf
    np.testing.assert_array_equal(got[kept], logits[kept])
    for i, row in enumerate(logits):
        surely, perhaps = reference(row, *(opts[name][i] for name in OFF))
        assert np.all(kept[i] >= surely) and np.all(kept[i] <= perhaps), (i, opts)
        assert kept[i, row.argmax()]


def test_filters_off_change_nothing():
    logits = logits_of("masked")
    np.testing.assert_array_equal(apply(logits, options(24, **OFF), vocab_size=V), logits)


@pytest.mark.parametrize("k", [1, 5, 199, 200, 201, 2**31 - 1])
def test_top_k_keeps_exactly_k_without_ties(k):
    got = np.asarray(apply(logits_of("normal"), options(24, **OFF | {"top_k": k}), vocab_size=V))
    assert np.all((got > -np.inf).sum(axis=1) == min(k, V))


def test_a_tiny_top_p_keeps_the_likeliest_alone():
    logits = logits_of("normal")
    got = np.asarray(apply(logits, options(24, **OFF | {"top_p": 1e-7}), vocab_size=V))
    assert np.all((got > -np.inf).sum(axis=1) == 1)
    np.testing.assert_array_equal(got.argmax(axis=1), logits.argmax(axis=1))


def test_padding_is_never_kept_nor_drawn():
    logits = logits_of("normal")
    logits[:, 190:] = 1e6
    for opts in (options(24), options(24, **OFF)):
        got = np.asarray(apply(logits, opts, vocab_size=190))
        assert np.all(got[:, 190:] == -np.inf)
    rows = np.arange(24)
    drawn = sample(logits, np.ones(24, np.float32), words(rows), rows, vocab_size=190)
    assert np.all(np.asarray(drawn) < 190)


def test_greedy_takes_the_first_of_the_largest():
    logits = logits_of("ties")
    rows = np.arange(24)
    zeros = np.zeros(24, np.float32)
    got = sample(logits, zeros, words(rows), rows, vocab_size=V)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))


def test_greedy_ignores_the_filters():
    logits = logits_of("ties")
    rows = np.arange(24)
    kept = apply(logits, options(24, temperature=0.0), vocab_size=V)
    got = sample(kept, np.zeros(24, np.float32), words(rows), rows, vocab_size=V)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))


def largest_key_over(axis, keys):
    """What `one_shot_max` computes, which is a kernel for GPUs."""
    low, high = (
        jax.lax.all_gather(jax.lax.bitcast_convert_type(keys[:, i], jnp.uint32), axis)
        for i in range(2)
    )
    top = high.max(axis=0)
    of_those = jnp.where(high == top, low, 0).max(axis=0)
    return jax.lax.bitcast_convert_type(jnp.stack([of_those, top], axis=-1), jnp.int32)


@functools.cache
def filter_over(devices: int, bits: int, kernels: bool, vocab_size: int):
    """`apply` over a vocabulary on several devices, with stand-ins for the kernels or without."""
    run = functools.partial(apply, vocab_size=vocab_size, bits=bits)
    if devices == 1:
        return jax.jit(run)
    axis = ("tensor",)
    if kernels:
        total = functools.partial(jax.lax.psum, axis_name=axis)
        largest_key = functools.partial(largest_key_over, axis)
        run = functools.partial(run, total=total, largest_key=largest_key)
    sharding = make_sharding({"tensor": devices})
    by_vocab = P(None, "tensor")
    return jax.jit(sharding.shard_map(functools.partial(run, axis=axis), (by_vocab, P()), by_vocab))


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "zeros", "huge"])
@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize(
    ("devices", "kernels"), [(1, False), (2, False), (8, False), (2, True), (4, True), (8, True)]
)
def test_the_search_is_exact_on_every_mesh(devices, kernels, bits, kind):
    """Random options, those at the edges among them, against the sorting reference."""
    rows, size = 48, V - 3  # the last shard is partly padding
    rng = np.random.default_rng([devices, bits, len(kind), kernels])
    logits = logits_of(kind, rows)[rng.permutation(rows)] * rng.choice([1, -1])
    logits[:, size:] = 1e6
    logits[np.isinf(logits)] = -np.inf
    opts = {
        "temperature": rng.choice([0, 1e-3, 0.3, 1, 2.5, 1e30], rows).astype(np.float32),
        "top_k": rng.choice([0, -1, 1, 2, 7, 50, size - 1, size, V, 2**31 - 1], rows),
        "top_p": rng.choice([1, 1 - 2**-24, 0.9999, 0.9, 0.5, 0.1, 1e-7, 1e-37], rows),
        "min_p": rng.choice([0, 1e-9, 0.01, 0.2, 1], rows).astype(np.float32),
    }
    opts["top_k"] = opts["top_k"].astype(np.int32)
    opts["top_p"] = opts["top_p"].astype(np.float32)
    got = np.asarray(filter_over(devices, bits, kernels, size)(logits, opts))
    kept = got > -np.inf
    np.testing.assert_array_equal(got[kept], logits[kept])
    assert not kept[:, size:].any()
    for i, row in enumerate(logits[:, :size]):
        surely, perhaps = reference(row, *(opts[name][i] for name in OFF))
        one = {name: value[i] for name, value in opts.items()}
        assert np.all(kept[i, :size] >= surely) and np.all(kept[i, :size] <= perhaps), one


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("kind", ["normal", "ties", "masked"])
def test_a_sharded_vocabulary_gives_the_same(devices, kind):
    sharding = make_sharding({"tensor": devices})
    vocab = V - 5  # the last shard is partly padding
    logits, opts = logits_of(kind), options(24)
    seeds, positions = words(range(24)), np.arange(24, dtype=np.int32) * 7

    def run(logits, axis=()):
        kept = apply(logits, opts, vocab_size=vocab, axis=axis)
        draw = functools.partial(sample, vocab_size=vocab, axis=axis)
        plain = draw(logits, opts["temperature"], seeds, positions)
        return kept, plain, draw(kept, opts["temperature"], seeds, positions)

    over_devices = jax.jit(
        sharding.shard_map(
            functools.partial(run, axis=("tensor",)),
            (P(None, "tensor"),),
            (P(None, "tensor"), P(), P()),
        )
    )
    for one, many in zip(jax.jit(run)(logits), over_devices(logits), strict=True):
        np.testing.assert_array_equal(one, many)


def draws(logits, n=20_000, **options):
    """How often each token is drawn, over many positions."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    rows = {name: np.full(n, value, np.float32) for name, value in options.items()}
    logits = np.tile(np.asarray(logits, np.float32), (n, 1))
    top_k = rows["top_k"].astype(np.int32)
    filters = (rows["temperature"], top_k, rows["top_p"], rows["min_p"])
    logits = filter_logits(logits, *filters, vocab_size=logits.shape[1])
    seeds, positions = words([7] * n), np.arange(n, dtype=np.int32)
    drawn = sample(logits, rows["temperature"], seeds, positions, vocab_size=logits.shape[1])
    return np.bincount(np.asarray(drawn), minlength=logits.shape[1])


EIGHT_LOGITS = np.log([0.3, 0.02, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 3.0}, range(8)),
        ({"temperature": 1e30}, range(8)),  # the highest that `RowTable` writes: all are alike
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": 0.75}, [0, 2, 3, 4]),
        ({"min_p": 0.3}, [0, 2, 3, 4]),
        ({"top_k": 4, "top_p": 0.8}, [0, 2, 3]),  # of the four's mass, 0.8
        ({"temperature": 2.0, "min_p": 0.5}, [0, 2, 3, 4, 5]),
    ],
)
def test_samples_follow_the_distribution(options, kept):
    """Elsewhere one PRNG key was reused in each step, and a default top_k forced greedy."""
    weights = np.exp(EIGHT_LOGITS / options.get("temperature", 1.0))
    mask = np.isin(np.arange(8), list(kept))
    counts = draws(EIGHT_LOGITS, **options)
    assert counts[~mask].sum() == 0
    expected = np.where(mask, weights, 0)[mask]
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts[mask], expected).pvalue > 1e-3


def noise(seeds, positions, ids) -> np.ndarray:
    return np.asarray(gumbel_noise(words(seeds), np.asarray(positions), jnp.asarray(ids)))


@pytest.mark.parametrize("many", ["ids", "positions", "low", "high", "user's seeds"])
def test_noise_is_standard_gumbel_in_each_direction(many):
    n = 20_000
    seeds, positions, ids = [3], [5], [7]
    if many == "ids":
        ids = np.arange(n)
    elif many == "positions":
        seeds, positions = seeds * n, np.arange(n)
    else:
        positions = positions * n
        seeds = {
            "low": range(n),
            "high": [i << 32 for i in range(n)],
            "user's seeds": [stream_seed(i, [1, 2], 0, 0) for i in range(n)],
        }[many]
    got = noise(seeds, positions, ids)
    assert got.size == n and np.all(np.isfinite(got))
    assert stats.kstest(got.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("rows", ["positions", "low", "high", "requests", "engines", "prompts"])
def test_noise_of_neighbours_is_uncorrelated(rows):
    n, size = 64, 4096
    positions = range(n) if rows == "positions" else [9] * n
    seeds = {
        "positions": [9] * n,
        "low": range(n),
        "high": [i << 32 for i in range(n)],
        "requests": [stream_seed(None, [1], 0, i) for i in range(n)],
        "engines": [stream_seed(None, [1], i, 0) for i in range(n)],
        "prompts": [stream_seed(0, [i], 0, 0) for i in range(n)],
    }[rows]
    got = noise(seeds, positions, np.arange(size))
    correlation = np.corrcoef(got)[~np.eye(n, dtype=bool)]
    assert np.abs(correlation).max() < 5.5 / np.sqrt(size)
    shifted = [np.corrcoef(got[i, 1:], got[i + 1, :-1])[0, 1] for i in range(n - 1)]
    assert np.abs(shifted).max() < 5.5 / np.sqrt(size)


def test_seed_and_position_are_not_interchangeable():
    ids = np.arange(64)
    a, b, c = noise([1, 2, 1 << 32], [2, 1, 2], ids)
    assert not np.any(a == b) and not np.any(a == c)


def drawn(seeds, positions=4, vocab=1000) -> np.ndarray:
    """The tokens that seeds draw among equal ones at the first positions: [seeds, positions]."""
    rows = words(np.repeat(np.array([*seeds], np.uint64), positions))
    at = np.tile(np.arange(positions), len(rows) // positions)
    logits = np.zeros((len(rows), vocab), np.float32)
    tokens = sample(logits, np.ones(len(rows), np.float32), rows, at, vocab_size=vocab)
    return np.asarray(tokens).reshape(-1, positions)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 0x0123456789ABCDEF])
def test_every_bit_of_a_seed_counts(seed):
    """Once half of the bits were dropped. Both on the device and as the user gives it."""
    flipped = [seed, *(seed ^ (1 << bit) for bit in range(64))]
    for seeds in (flipped, [stream_seed(s, [1, 2, 3], 0, 0) for s in flipped]):
        streams = {tuple(stream) for stream in drawn(seeds).tolist()}
        assert len(streams) == 65, "two streams of four tokens among 1000 are equal"


@pytest.mark.parametrize(
    "seeds",
    [
        [stream_seed(None, [1], engine, n) for engine in range(-2, 8) for n in range(200)],
        [stream_seed(seed, [prompt], 0, 0) for seed in range(-12, -2) for prompt in range(200)],
        [stream_seed(7, [5] * n, 0, 0) for n in range(1, 2001)],
        [stream_seed(seed, [1], 0, 0) for seed in range(2000)],
    ],
    ids=["engines and requests", "seeds and prompts", "lengths", "seeds"],
)
def test_streams_of_neighbours_do_not_collide(seeds):
    """Sums of seed and request number did: seed 0's request 1 was seed 1's request 0."""
    assert len({*seeds}) == len(seeds) == 2000
    streams = drawn(seeds, positions=2, vocab=50)
    assert stats.chisquare(np.bincount(streams[:, 0], minlength=50)).pvalue > 1e-3
    pairs = np.bincount(streams[:, 0] * 50 + streams[:, 1], minlength=2500)
    assert stats.chisquare(pairs).pvalue > 1e-3
