"""Experts' MLPs natively on a GPU, at an expert's shapes in Qwen3-30B-A3B and at odd ones."""

import jax
import numpy as np
import pytest
from test_grouped_linear import check_expert_mlp, choose

from pallas_kernels import mosaic_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 2000])
@pytest.mark.parametrize("hidden", [768, 96, 100])  # whole, on one of 8 GPUs, and an odd one
def test_expert_mlp(tokens, hidden):
    shape = dict(num_experts=32, width=2048, hidden=hidden, dtype="bfloat16")
    rng = np.random.default_rng(tokens)
    for among in (32, 9):  # all experts; a few
        check_expert_mlp("triton", choose(rng, tokens, 8, among), **shape)
    check_expert_mlp("triton", choose(rng, tokens, 8, 64) - 16, **shape)  # half of them elsewhere


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or mosaic_problem(jax.devices()[0]) is not None,
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("tokens", [300, 2000])
@pytest.mark.parametrize("hidden", [768, 384])  # whole, and on one of two GPUs
def test_expert_mlp_by_mosaic(tokens, hidden):
    shape = dict(num_experts=32, width=2048, hidden=hidden, dtype="bfloat16")
    rng = np.random.default_rng(tokens)
    for among in (32, 9):
        check_expert_mlp("mosaic", choose(rng, tokens, 8, among), **shape)
    check_expert_mlp("mosaic", choose(rng, tokens, 8, 64) - 16, **shape)  # half of them elsewhere


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_expert_mlp_in_other_types(tokens, dtype):
    choices = choose(np.random.default_rng(0), tokens, 4, 16)
    check_expert_mlp("triton", choices, num_experts=16, width=136, hidden=72, dtype=dtype)
