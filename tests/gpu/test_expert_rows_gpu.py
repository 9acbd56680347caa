"""Experts of a few tokens natively on a GPU, at Qwen3-30B-A3B's shapes, and their choice."""

import jax
import numpy as np
import pytest
from test_expert_rows import check_choices, check_expert_rows
from test_grouped_linear import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("hidden", [768, 384])  # whole, and on one of two GPUs
def test_expert_rows(tokens, hidden):
    shape = dict(num_experts=128, width=2048, hidden=hidden)
    rng = np.random.default_rng(tokens)
    check_expert_rows(choose(rng, tokens, 8, 128), normed=True, residual=True, **shape)
    check_expert_rows(choose(rng, tokens, 8, 256) - 64, **shape)  # half of them elsewhere


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "count"), [(1, 128, 8), (3000, 128, 8), (64, 6, 4)])
def test_choices(tokens, experts, count, normalize):
    check_choices(tokens, experts, count, normalize=normalize)
