"""The profile script's arithmetic: time that kernels cover, idle time, categories."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """The script's module, which imports another one beside it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("profile_decode")


def test_time_is_counted_once_where_kernels_overlap(script):
    events = [(0, 10, "a"), (5, 20, "b"), (6, 8, "c"), (30, 40, "a"), (40, 45, "b")]
    times, busy, idle = script.busy_times(events)
    assert times == {"a": 20, "b": 15}  # c lies within b
    assert (busy, idle) == (35, 10)


@pytest.mark.parametrize(
    ("name", "origin", "expected"),
    [
        ("paged_decode_combine", "", "attention"),
        ("paged_prefill_mosaic_mosaic_gpu_kernel", "", "attention"),
        ("norm_rope_write", "", "KV write"),
        ("nvjet_sm90_tst_48x64", "", "products"),
        ("fused_linear__2", "", "products"),
        ("input_reduce_fusion", "jit(run)/jit(_draw)/reduce", "sampling"),
        ("loop_multiply_fusion_27", "jit(run)/mul", "norms, activations, inputs"),
    ],
)
def test_category(script, name, origin, expected):
    assert script.category(name, origin) == expected


def test_origins_name_the_operations_of_a_program(script):
    def draw(x):
        with jax.named_scope("drawing"):
            return jnp.sin(x) * 2

    found = script.origins(jax.jit(draw).lower(jnp.ones(8)).compile())
    assert any("drawing" in origin for origin in found.values())
