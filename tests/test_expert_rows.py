"""Experts of a few tokens, and their choice, against float64; NaN in all that nobody chose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import kernels_in, lower_for_h100
from test_grouped_linear import LAYER, LAYERS, choose, reference

from pallas_kernels import choose_experts, expert_rows, supports_expert_rows

# --- Data and reference, shared with tests/gpu -----------------------------------------------


def check_expert_rows(
    choices, *, num_experts, width, hidden, dtype="bfloat16", normed=False, residual=False, seed=0
):
    rng = np.random.default_rng([seed, *choices.shape, width, hidden])
    eps = 1e-2  # large enough to be seen

    def values(*shape, scale=1.0):
        x = jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)
        return np.asarray(x, np.float64)  # exactly what the kernel reads

    def of_layer(value, kept=True):
        value = jnp.where(kept, jnp.asarray(value, dtype), jnp.nan)
        return jnp.full((LAYERS, *value.shape), jnp.nan, dtype).at[LAYER].set(value)

    shape = len(choices), width
    x, norm, add = values(*shape, scale=0.5), values(width), values(*shape)
    gate_up = values(num_experts, 2, hidden, width, scale=width**-0.5)
    down = values(num_experts, width, hidden, scale=hidden**-0.5)
    weights = rng.random(choices.shape, np.float32)
    rows = x
    if normed:
        rows = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * norm
    want = reference(rows, gate_up, down, choices, weights) + (add if residual else 0)

    chosen = np.isin(np.arange(num_experts), choices)
    got = expert_rows(
        jnp.asarray(x, dtype), of_layer(gate_up, chosen[:, None, None, None]),
        of_layer(down, chosen[:, None, None]), jnp.asarray(choices, jnp.int32),
        jnp.asarray(weights), jnp.int32(LAYER), of_layer(norm) if normed else None,
        jnp.asarray(add, dtype) if residual else None, eps=eps,
    )  # fmt: skip
    assert got.shape == x.shape and got.dtype == dtype
    # What the gate lets through is rounded once, and the result once.
    error = np.abs(np.asarray(got, np.float64) - want)
    ulp = float(jnp.finfo(dtype).eps)
    assert (error <= ulp / 2 * np.abs(want) + 2 * ulp * np.sqrt(choices.shape[1])).all()


def check_choices(tokens, experts, count, *, normalize, seed=0):
    """Equal to sorting by score and number; a third of the scores are ties."""
    rng = np.random.default_rng([seed, tokens, experts, count])
    scores = rng.standard_normal((tokens, experts)).astype(np.float32) * 3
    scores[:, ::3] = np.round(scores[:, ::3])
    slots = rng.integers(-1, 3, tokens).astype(np.int32)
    want = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    p = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    want_weights = np.take_along_axis(p, want, axis=1)
    if normalize:
        want_weights /= want_weights.sum(axis=1, keepdims=True)
    want = np.where(slots[:, None] >= 0, want, -1)
    for implementation in ("xla", "triton"):
        choices, weights = choose_experts(
            jnp.asarray(scores), jnp.asarray(slots), num_choices=count, normalize=normalize,
            dtype=jnp.float32, implementation=implementation,
        )  # fmt: skip
        np.testing.assert_array_equal(choices, want)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)


# --- On a CPU ----------------------------------------------------------------------------------

SMALL = dict(num_experts=32, width=256, hidden=128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_expert_rows(normed, residual, dtype):
    choices = choose(np.random.default_rng(0), 2, 4, 32)
    check_expert_rows(choices, normed=normed, residual=residual, dtype=dtype, **SMALL)


@pytest.mark.parametrize(
    "shape",
    [
        dict(num_experts=128, width=128, hidden=384),  # three chunks of down
        dict(num_experts=64, width=896, hidden=128),  # seven chunks of gate and up
    ],
)
def test_shapes(shape):
    check_expert_rows(choose(np.random.default_rng(1), 1, 8, 64), normed=True, **shape)


def test_experts_of_other_devices_add_nothing():
    for low, high in [(-16, 16), (16, 80), (32, 48)]:  # the last: none is here
        choices = low + choose(np.random.default_rng(2), 2, 4, high - low)
        check_expert_rows(choices, residual=True, **SMALL)


def test_repeated_choices_add_up():
    check_expert_rows(np.array([[3, 3, 1, 3]]), **SMALL)


@pytest.mark.parametrize(
    ("pairs", "experts", "hidden", "width", "dtype", "fits"),
    [
        (8, 128, 768, 2048, "bfloat16", True),  # Qwen3-30B-A3B at batch 1
        (32, 128, 1536, 4096, "bfloat16", True),  # 235B-A22B at batch 4
        (40, 128, 768, 2048, "bfloat16", False),
        (8, 128, 96, 2048, "bfloat16", False),
        (8, 128, 768, 2000, "bfloat16", False),
        (8, 128, 768, 2048, "float32", False),
    ],
)
def test_what_is_taken(pairs, experts, hidden, width, dtype, fits):
    assert supports_expert_rows(pairs, experts, hidden, width, dtype) == fits


def test_what_is_not_taken_is_refused():
    x, choices = jnp.ones((2, 128), "bfloat16"), jnp.zeros((2, 4), jnp.int32)
    gate_up, down = jnp.ones((1, 16, 2, 128, 128), x.dtype), jnp.ones((1, 16, 128, 128), x.dtype)
    with pytest.raises(ValueError, match="a quarter of the experts"):
        expert_rows(x, gate_up, down, choices, jnp.ones((2, 4)), jnp.int32(0))
    gate_up, down = jnp.ones((1, 32, 2, 128, 128), x.dtype), jnp.ones((1, 32, 128, 128), x.dtype)
    args = dict(x=x, gate_up=gate_up, down=down, choices=choices, weights=jnp.ones((2, 4)))
    expert_rows(**args, layer=jnp.int32(0))
    for wrong in (
        dict(x=x[:1]), dict(x=jnp.ones((2, 256), x.dtype)), dict(gate_up=gate_up[:, :, :1]),
        dict(down=down[:, :16]), dict(weights=jnp.ones((2, 3))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"gate_up .* and down"):
            expert_rows(**(args | wrong), layer=jnp.int32(0))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "count"), [(1, 128, 8), (9, 6, 6), (5, 16, 1)])
def test_choices(tokens, experts, count, normalize):
    check_choices(tokens, experts, count, normalize=normalize)


def test_impossible_choices_are_refused():
    choice = dict(num_choices=5, normalize=True, dtype=jnp.float32)
    with pytest.raises(ValueError, match="5 experts cannot be chosen from 4"):
        choose_experts(jnp.ones((1, 4)), jnp.zeros(1, jnp.int32), **choice, implementation="xla")
    with pytest.raises(ValueError, match="unknown implementation"):
        choose_experts(jnp.ones((1, 8)), jnp.zeros(1, jnp.int32), **choice, implementation="cuda")


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("hidden", [768, 384])  # of Qwen3-30B-A3B, whole and on one of two GPUs
def test_kernels_lower_for_h100s(tokens, hidden):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    numbers = [shape(tokens, 8, dtype=jnp.int32), shape(tokens, 8)]
    weights = [shape(48, 128, 2, hidden, 2048), shape(48, 128, 2048, hidden)]
    text = lower_for_h100(
        jax.jit(functools.partial(expert_rows, eps=1e-6)),
        shape(tokens, 2048), *weights, *numbers, shape(dtype=jnp.int32), shape(48, 2048),
        shape(tokens, 2048),
    )  # fmt: skip
    assert kernels_in(text) == ["expert_rows_gate_up", "expert_rows_down"]
    choice = dict(num_choices=8, normalize=True, dtype=jnp.bfloat16, implementation="triton")
    text = lower_for_h100(
        jax.jit(functools.partial(choose_experts, **choice)),
        shape(tokens, 128, dtype=jnp.float32), shape(tokens, dtype=jnp.int32),
    )  # fmt: skip
    assert kernels_in(text) == ["choose_experts"]
