"""Thresholds of min_p, top_k and top_p by a kernel, against sorted rows in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import kernels_in, lower_for_h100

from nanovllm_jax.layers.sampler import filter_and_sample, filter_logits, sample
from pallas_kernels import draw, filter_thresholds

# A row of the kind "stride" has its highest logits in one lane of the kernel, which keeps six. They
# differ by as little as floats can.
LANES = 2048
KINDS = (
    "normal", "ties", "equal", "one", "few", "masked", "zeros", "huge", "peaked", "flat",
    "descending", "stride", "edge", "negative",
)  # fmt: skip
TEMPERATURES = (0, 1e-3, 0.3, 0.6, 1, 2.5, 1e30)
TOP_K = (0, -1, 1, 2, 7, 20, 50, 1000, 2**31 - 1)
TOP_P = (1, 1, 1 - 2**-24, 0.9999, 0.95, 0.9, 0.5, 0.1, 1e-7, 1e-37)
MIN_P = (0, 0, 0, 1e-9, 0.01, 0.2, 1)


def row_of(kind: str, width: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(width).astype(np.float32) * 3
    if kind == "ties":
        x = np.round(x)
    elif kind == "equal":
        x[:] = x[0]
    elif kind in ("one", "few"):
        finite = rng.permutation(width)[: 1 if kind == "one" else 30]
        x, x[finite] = np.full_like(x, -np.inf), x[finite]
    elif kind == "masked":
        x[1:][rng.random(width - 1) < 0.6] = -np.inf
    elif kind == "zeros":
        x[rng.random(width) < 0.3] = 0.0
        x[rng.random(width) < 0.3] = -0.0
        x = np.minimum(x, 0) if rng.random() < 0.5 else x
    elif kind == "huge":
        x *= 1e4
    elif kind == "peaked":
        x[rng.permutation(width)[:10]] += 12
    elif kind == "flat":
        x *= 0.01
    elif kind == "descending":
        x = -np.sort(-x)
    elif kind == "stride":
        lane = x[rng.integers(min(width, LANES)) :: LANES]
        lane[:] = 20 - rng.permutation(lane.size) * np.spacing(np.float32(19))
    elif kind == "edge":  # half of what top_k keeps is lost if -0.0 is less than 0.0
        x = rng.choice(np.array([0.0, -0.0], np.float32), width)
        x[rng.integers(width)] = np.log(width / 1.5)
    elif kind == "negative":
        x -= 60
    return x


def batch_of(kinds, rows: int, width: int, vocab_size: int, seed: int, **fixed):
    """Logits of these kinds in turn, and the options: temperature, top_k, top_p, min_p."""
    rng = np.random.default_rng([seed, rows, width])
    logits = np.full((rows, width), 1e6, np.float32)  # what is padding would be drawn
    for i in range(rows):
        logits[i, :vocab_size] = row_of(kinds[i % len(kinds)], vocab_size, rng)
    choices = {"temperature": TEMPERATURES, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
    drawn = {name: rng.choice(values, rows) for name, values in choices.items()}
    drawn |= {name: np.full(rows, value) for name, value in fixed.items()}
    dtypes = {name: np.int32 if name == "top_k" else np.float32 for name in choices}
    return logits, [drawn[name].astype(dtypes[name]) for name in choices]


def check_row(row, kept, temperature, top_k, top_p, min_p) -> bool:
    """Assert that this is what the filters keep; returns whether top_p's edge was off at all.

    The mass above the last token kept may differ from what top_p asks for by 1e-6 of the whole.
    """
    x = row.astype(np.float64)
    weights = np.exp((x - x.max()) / max(float(temperature), 1e-6))
    keep = (weights >= float(min_p)) & (x > -np.inf)
    if 0 < top_k < len(x):
        keep &= x >= np.sort(x)[-top_k]
    if top_p >= 1:
        np.testing.assert_array_equal(kept, keep)
        return False
    assert kept.any() and not (kept & ~keep).any()
    last = x[kept].min()
    np.testing.assert_array_equal(kept, keep & (x >= last))  # it is a threshold
    mass = weights[keep].sum()
    above, with_it = weights[keep & (x > last)].sum() / mass, weights[kept].sum() / mass
    assert above < float(top_p) + 1e-6 and with_it > float(top_p) - 1e-6
    return not above < float(top_p) <= with_it


def check_filter(kinds, rows, width, *, vocab_size=None, seed=0, **fixed) -> int:
    """Check the thresholds of a batch; returns how many rows are off at the edge of top_p."""
    vocab_size = vocab_size or width
    logits, options = batch_of(kinds, rows, width, vocab_size, seed, **fixed)
    thresholds = np.asarray(filter_thresholds(logits, *options, vocab_size=vocab_size))
    logits = logits[:, :vocab_size]
    kept = (logits >= thresholds[:, None]) & (logits > -np.inf)
    return sum(check_row(*of_row) for of_row in zip(logits, kept, *options, strict=True))


OFF = {"top_k": 0, "top_p": 1, "min_p": 0}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    OFF | {"top_p": 0.95, "temperature": 1},
    OFF | {"min_p": 0.05},
    OFF | {"top_k": 7},
    OFF | {"min_p": 1, "temperature": 1e-3},
    # What top_k or min_p keeps is more than lanes keep, and what top_p keeps of that is not.
    OFF | {"top_k": 5000, "top_p": 0.1, "temperature": 2.5},
    OFF | {"min_p": 1e-5, "top_p": 0.5, "temperature": 1},
    OFF | {"top_k": 20, "top_p": 0.5, "temperature": 1},
)


# Up to one entry for a lane; up to three, so that all are kept; and more than are kept.
@pytest.mark.parametrize(("width", "vocab_size"), [(200, 195), (5000, None), (20011, 20001)])
def test_thresholds_keep_what_sorted_rows_keep(width, vocab_size):
    off = [
        check_filter(KINDS, 56, width, vocab_size=vocab_size, seed=seed, **fixed)
        for seed in range(2)
        for fixed in OPTIONS
    ]
    assert sum(off) <= 10, "of 1,008 rows, a few at most are off by float32's rounding"


def test_other_rows_change_nothing():
    logits, options = batch_of(KINDS, 56, 20011, 20001, seed=9)
    whole = np.asarray(filter_thresholds(logits, *options, vocab_size=20001))
    order = np.random.default_rng(0).permutation(56)
    order[:20] = order[20]  # so that half of the rows have other neighbours
    logits, options = logits[order], [option[order] for option in options]
    again = np.asarray(filter_thresholds(logits, *options, vocab_size=20001))
    np.testing.assert_array_equal(again, whole[order])


def check_tokens(rows, width, vocab_size, seed=0):
    """A draw with thresholds against one from logits of which the rest is -inf."""
    logits, options = batch_of(KINDS, rows, width, vocab_size, seed)
    rng = np.random.default_rng(seed)
    seeds = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    positions = rng.integers(0, 40000, rows).astype(np.int32)
    stream = options[0], seeds, positions
    thresholds = filter_thresholds(logits, *options, vocab_size=vocab_size)
    masked = jnp.where(logits >= thresholds[:, None], logits, -jnp.inf)
    want = draw(masked, *stream, vocab_size=vocab_size)
    got = draw(logits, *stream, thresholds=thresholds, vocab_size=vocab_size)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    kept = np.take_along_axis(np.asarray(masked), np.asarray(got[1])[:, None], axis=1)
    assert np.all(kept > -np.inf)


def test_a_draw_with_thresholds_is_one_from_masked_logits():
    for seed in range(3):
        check_tokens(56, 5000, 4990, seed)


@functools.partial(jax.jit, static_argnames="whole")
def tokens_of(logits, temperatures, top_k, top_p, min_p, seeds, positions, whole):
    filters = logits, temperatures, top_k, top_p, min_p
    if whole:
        return filter_and_sample(*filters, seeds, positions, vocab_size=4990)
    kept = filter_logits(*filters, vocab_size=4990)
    return sample(kept, temperatures, seeds, positions, vocab_size=4990)


def test_filtering_and_sampling_is_both_in_turn():
    logits, options = batch_of(KINDS, 56, 5000, 4990, seed=0)
    positions = np.arange(56, dtype=np.int32)
    seeds = np.stack([positions, positions], axis=1).astype(np.uint32)
    one, other = (
        tokens_of(logits, *options, seeds, positions, whole=whole) for whole in (True, False)
    )
    np.testing.assert_array_equal(one, other)


def test_filters_lower_for_a_gpu():
    struct = jax.ShapeDtypeStruct
    row = struct((3,), jnp.float32)
    args = struct((3, 5000), jnp.float32), row, struct((3,), jnp.int32), row, row
    args += struct((3, 2), jnp.uint32), struct((3,), jnp.int32)
    run = jax.jit(functools.partial(filter_and_sample, vocab_size=4990))
    kernels = kernels_in(lower_for_h100(run, *args))
    assert kernels == ["filter_collect", "filter_choose", "draw"]
