"""Experts' MLPs against a float64 loop over tokens and their choices.

Weights are NaN in all other layers, and in every expert that no token chose. The interpreter fills
what a kernel has not written with NaN, too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import kernels_in, lower_for_h100
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import expert_mlp, mosaic_product
from pallas_kernels.expert_schedule import places, schedule, schedule_triton
from pallas_kernels.grouped_linear import _block_rows

LAYERS, LAYER = 3, 1
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}  # of the largest output
each_implementation = pytest.mark.parametrize("implementation", ["xla", "triton"])


# --- Data and reference, shared with tests/gpu -----------------------------------------------


def reference(x, gate_up, down, choices, weights):
    """The weighted sum over every token's choices, in float64."""
    out = np.zeros(x.shape)
    for expert in np.unique(choices):
        if 0 <= expert < len(gate_up):
            token, choice = np.nonzero(choices == expert)
            gate, up = (x[token] @ gate_up[expert, i].T for i in range(2))
            y = (gate / (1 + np.exp(-gate)) * up) @ down[expert].T
            np.add.at(out, token, y * weights[token, choice][:, None])
    return out


def choose(rng, num_tokens, num_choices, among):
    """Different experts for each token, of those that are numbered in `among`."""
    return np.stack([rng.permutation(among)[:num_choices] for _ in range(num_tokens)])


def check_expert_mlp(
    implementation, choices, *, num_experts, width, hidden, dtype="float32", seed=0
):
    rng = np.random.default_rng([seed, *choices.shape, width, hidden])

    def values(*shape, scale=1.0):
        x = jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)
        return np.asarray(x, np.float64)  # exactly what the kernel reads

    x = values(len(choices), width)
    gate_up = values(num_experts, 2, hidden, width, scale=width**-0.5)
    down = values(num_experts, width, hidden, scale=hidden**-0.5)
    weights = rng.random(choices.shape, np.float32)
    want = reference(x, gate_up, down, choices, weights)

    def stacked(value):
        value = jnp.asarray(value, dtype)
        chosen = np.isin(np.arange(num_experts), choices).reshape(-1, *[1] * (value.ndim - 1))
        value = jnp.where(chosen, value, jnp.nan)
        return jnp.full((LAYERS, *value.shape), jnp.nan, dtype).at[LAYER].set(value)

    got = expert_mlp(
        jnp.asarray(x, dtype), stacked(gate_up), stacked(down), jnp.asarray(choices, jnp.int32),
        jnp.asarray(weights), jnp.int32(LAYER), implementation=implementation,
    )  # fmt: skip
    assert got.shape == x.shape and got.dtype == dtype
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error <= TOLERANCE[dtype] * np.abs(want).max()


# --- On a CPU ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(num_experts=16, width=64, hidden=48)
# Tokens, choices a token and the experts among which they are, with what is unlike SMALL.
CASES = {
    "one row": (1, 4, 16, {}),
    "each row is a block": (3, 2, 32, dict(num_experts=32)),
    "a few rows": (5, 4, 16, {}),
    "two kinds of blocks": (33, 4, 16, {}),
    "many rows": (300, 4, 16, {}),
    "most experts have no rows": (40, 4, 5, {}),
    "all rows have one expert": (130, 1, 1, {}),
    "128 experts": (9, 8, 128, dict(num_experts=128, width=32, hidden=16)),
    "hidden units beyond a tile": (20, 2, 4, dict(num_experts=4, hidden=100)),
    "widths that no tile divides": (20, 2, 4, dict(num_experts=4, width=136, hidden=24)),
}


@each_implementation
@pytest.mark.parametrize("case", CASES)
def test_expert_mlp(case, implementation):
    tokens, chosen, among, shape = CASES[case]
    choices = choose(np.random.default_rng(0), tokens, chosen, among)
    check_expert_mlp(implementation, choices, **(SMALL | shape))


@each_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 40, 300])  # blocks of 16 to 128 rows
def test_expert_mlp_in_16_bits(tokens, dtype, implementation):
    shape = SMALL | dict(num_experts=8, width=160, hidden=72)  # two and a half and more chunks
    choices = choose(np.random.default_rng(1), tokens, 2, 8)
    check_expert_mlp(implementation, choices, dtype=dtype, **shape)


@each_implementation
def test_experts_of_other_devices_add_nothing(implementation):
    rng = np.random.default_rng(2)
    for low, high in [(-16, 16), (0, 48), (16, 32)]:  # the last: none is here
        for tokens in (1, 21):
            choices = low + choose(rng, tokens, 4, high - low)
            check_expert_mlp(implementation, choices, **SMALL)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's interpreter is too old")
@pytest.mark.parametrize("low", [0, -3])  # with -3, some are another device's
def test_expert_mlp_by_mosaic(low, monkeypatch):
    monkeypatch.setattr(mosaic_product, "PROGRAMS", 3)  # so that each has several tiles
    params = mgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(mosaic_product, "mosaic_interpreter", lambda interpret: params)
    choices = low + choose(np.random.default_rng(4), 150, 2, 4)  # blocks of 128 and of less
    shape = dict(num_experts=4, width=512, hidden=256, dtype="bfloat16")
    check_expert_mlp("mosaic", choices, **shape)


@each_implementation
def test_repeated_choices_add_up(implementation):
    check_expert_mlp(implementation, np.array([[3, 3, 1, 3], [1, 1, 1, 1]]), **SMALL)


@each_implementation
def test_a_token_alone_gets_what_it_gets_among_others(implementation):
    """The same bits, as long as blocks have the same size."""
    rng = np.random.default_rng(3)
    x, weights = (jnp.asarray(rng.random(shape, np.float32)) for shape in [(7, 64), (7, 2)])
    gate_up, down = (
        rng.standard_normal(s, np.float32) for s in [(1, 16, 2, 48, 64), (1, 16, 64, 48)]
    )
    choices = jnp.asarray(choose(rng, 7, 2, 16), jnp.int32)
    run = functools.partial(expert_mlp, implementation=implementation)
    together = run(x, gate_up, down, choices, weights, jnp.int32(0))
    for t in range(7):
        rows = jnp.array([t, *range(6)])
        again = run(x[rows], gate_up, down, choices[rows], weights[rows], jnp.int32(0))
        np.testing.assert_array_equal(again[0], together[t])


@pytest.mark.parametrize("num_experts", [1, 7, 128])
@pytest.mark.parametrize("num_rows", [1, 16, 300, 1100])
@pytest.mark.parametrize("block_rows", [1, 16, 64])
def test_schedule(num_rows, num_experts, block_rows):
    """Blocks have one expert, and all rows that have one are in one block each."""
    rng = np.random.default_rng([num_rows, num_experts])
    for spread in (num_experts + 1, min(2, num_experts), 1):  # `num_experts` is no expert
        experts = rng.integers(0, spread, num_rows).astype(np.int32)
        experts[rng.random(num_rows) < 0.1] = -3  # no expert, either
        *got, used = schedule(jnp.asarray(experts), num_experts, block_rows)
        order, blocks = map(np.asarray, got)
        seen = [order[first : first + rows] for _, first, rows in blocks]
        for (expert, _, rows), members in zip(blocks, seen, strict=True):
            assert 0 <= rows <= block_rows and (experts[members] == expert).all()
        there = np.concatenate(seen)
        assert sorted(there) == list(np.flatnonzero((experts >= 0) & (experts < num_experts)))
        assert (blocks[:used, 2] > 0).all() and not blocks[used:, 2].any()

        at = places(jnp.asarray(experts), jnp.asarray(order), num_experts, block_rows)
        for b, (_, first, rows) in enumerate(blocks):
            members = order[first : first + rows]
            np.testing.assert_array_equal(at[members], b * block_rows + np.arange(rows))

        kernel = functools.partial(schedule_triton, interpret=True)
        order, blocks_too = map(np.asarray, kernel(jnp.asarray(experts), num_experts, block_rows))
        np.testing.assert_array_equal(order[: len(there)], there)
        np.testing.assert_array_equal(blocks_too[:, 2], blocks[:, 2])
        np.testing.assert_array_equal(blocks_too[:used], blocks[:used])


def test_blocks_grow_with_the_rows_of_an_expert():
    sizes = [_block_rows(8 * tokens, 128, 16, 128) for tokens in (1, 128, 256, 512, 1024, 16384)]
    assert sizes == [16, 16, 32, 64, 128, 128]


def test_shapes_that_do_not_fit_are_refused():
    x, gate_up, down = jnp.ones((3, 64)), jnp.ones((1, 4, 2, 48, 64)), jnp.ones((1, 4, 64, 48))
    choices, weights = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    run = functools.partial(expert_mlp, layer=jnp.int32(0), implementation="xla")
    run(x, gate_up, down, choices, weights)
    for wrong in [
        (x[:, :32], gate_up, down, choices, weights),
        (x, gate_up[:, :, :1], down, choices, weights),
        (x, gate_up, down[:, :, :, :16], choices, weights),
        (x, gate_up, down[:, :2], choices, weights),
        (x, gate_up, down, choices[:2], weights[:2]),
        (x, gate_up, down, choices, weights[:, :1]),
    ]:
        with pytest.raises(ValueError, match=r"\[L, E, 2, F, D\]"):
            run(*wrong)
    with pytest.raises(ValueError, match="unknown implementation"):
        expert_mlp(x, gate_up, down, choices, weights, jnp.int32(0), implementation="cuda")


@pytest.mark.parametrize("tokens", [1, 16, 256, 16384])
@pytest.mark.parametrize("hidden", [768, 96])  # of Qwen3-30B-A3B, whole and on one of 8 GPUs
def test_kernels_lower_for_h100s_at_published_shapes(tokens, hidden):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    numbers = [shape(tokens, 8, dtype=d) for d in (jnp.int32, jnp.float32)]
    weights = [shape(48, 128, 2, hidden, 2048), shape(48, 128, 2048, hidden)]
    text = lower_for_h100(
        jax.jit(functools.partial(expert_mlp, implementation="triton")),
        shape(tokens, 2048), *weights, *numbers, shape(dtype=jnp.int32),
    )  # fmt: skip
    schedule = ["expert_schedule"] if tokens < 1000 else []
    assert kernels_in(text) == [*schedule, "expert_gate_up", "expert_down"]
