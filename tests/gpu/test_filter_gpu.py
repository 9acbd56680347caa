"""The kernels of the filters on a GPU, with the checks of tests/test_filter.py."""

import jax
import pytest
from test_filter import KINDS, check_filter, check_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

WIDTH = 151_936
QWEN3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0}
MASS_ALONE = {"top_k": 0, "top_p": 0.95, "min_p": 0}


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("fixed", [{}, QWEN3, MASS_ALONE, {"top_p": 1}], ids=str)
def test_thresholds(rows, fixed):
    """Some rows may be off at top_p's edge by the rounding of sums of 151,936 numbers."""
    kinds = KINDS if rows > 1 else ("normal",)
    off = [check_filter(kinds, rows, WIDTH, seed=seed, **fixed) for seed in range(2)]
    print(f"{sum(off)} of {2 * rows} rows are off at the edge")
    assert sum(off) <= 2 + rows // 4


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_of_each_kind_alone(kind):
    check_filter((kind,), 4, WIDTH)
    check_filter((kind,), 3, WIDTH + 7, vocab_size=WIDTH - 300)
    check_filter((kind,), 3, 1001)


@pytest.mark.parametrize("rows", [1, 16, 256])
def test_tokens(rows):
    for seed in range(3):
        check_tokens(rows, WIDTH, WIDTH - 300, seed)
