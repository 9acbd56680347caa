"""The 8-bit KV cache: weights scaled for it are the same model, and use e4m3's range well."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, greedy, make_checkpoint, prompt, tokens
from safetensors.numpy import load_file, save_file

from nanovllm_jax.layers.kv_cache import balance_keys_and_values
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.weights import load_weights


def shrink(path: Path, size: float) -> Path:
    """Make keys and values `size` times as large, and undo it behind the cache."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    normed = any("k_norm" in name for name in tensors)
    factors = {"v_proj": size, "o_proj": 1 / size}
    factors |= {f"k_{'norm' if normed else 'proj'}": size}
    factors |= {f"q_{'norm' if normed else 'proj'}": 1 / size}
    for name in tensors:
        for part, factor in factors.items():
            if part in name:
                tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, file)
    return path


def scaled(path: Path, devices: int = 1):
    sharding = make_sharding({"tensor": devices})
    config = ModelConfig.from_directory(path).sharded(sharding.size)
    before, after = (load_weights(config, sharding, path) for _ in range(2))
    return before, jax.jit(balance_keys_and_values)(after)


@pytest.mark.parametrize("size", [2.0**-9, 1.0, 2.0**9])
def test_keys_and_values_get_a_mean_square_near_1(tmp_path, size):
    _, weights = scaled(shrink(make_checkpoint(tmp_path / "model"), size))
    layers = weights["layers"]
    k_norm = layers["self_attn"]["k_norm"]["weight"].get_value()
    assert np.all((jnp.square(k_norm).mean(axis=1) > 0.5) & (jnp.square(k_norm).mean(axis=1) < 2))
    qkv = layers["self_attn"]["qkv_proj"]["weight"].get_value()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, qkv.shape[-1])).astype(np.float32)
    x = x * np.asarray(layers["input_layernorm"]["weight"].get_value())[:, None]
    values = np.einsum("ltd,lkhd->lkth", x, qkv[:, :, -1])
    sizes = np.square(values).mean(axis=(2, 3))
    assert np.all((sizes > 0.5) & (sizes < 2.0)), sizes


@pytest.mark.parametrize("size", [2.0**-9, 1.0, 2.0**9])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_keys_without_a_norm_are_scaled_by_their_projection(tmp_path, family, size):
    path = shrink(make_checkpoint(tmp_path / "model", **FAMILIES[family]), size)
    before, after = scaled(path)
    qkv = after["layers"]["self_attn"]["qkv_proj"]
    x = np.random.default_rng(0).standard_normal((4000, qkv["weight"].shape[-1]))
    x = x * np.asarray(after["layers"]["input_layernorm"]["weight"].get_value())[:, None]
    out = np.einsum("ltd,lkghd->ltkgh", x, qkv["weight"].get_value())
    if family == "qwen2":
        out = out + qkv["bias"].get_value()[:, None]
    sizes = np.square(out[:, :, :, -2:]).mean(axis=(1, 4))  # keys and values
    assert np.all((sizes > 0.4) & (sizes < 2.5)), sizes
    for kind in qkv:
        old, new = (w["layers"]["self_attn"]["qkv_proj"][kind].get_value() for w in (before, after))
        ratio = np.asarray(new) / np.asarray(old)
        np.testing.assert_array_equal((ratio[:, :, :-2] * ratio[:, :, -2:-1]), 1)
        assert np.all(np.log2(ratio) % 1 == 0)


@pytest.mark.parametrize("devices", [1, 2])
def test_scaling_is_by_powers_of_two_that_cancel(tmp_path, devices):
    before, after = scaled(shrink(make_checkpoint(tmp_path / "model"), 2.0**-7), devices)

    def ratios(module):
        old, new = (w["layers"]["self_attn"][module]["weight"].get_value() for w in (before, after))
        return np.asarray(new) / np.asarray(old)

    for module in ("q_norm", "k_norm", "qkv_proj", "o_proj"):
        assert np.all(np.log2(ratios(module)) % 1 == 0), module
    np.testing.assert_array_equal(ratios("q_norm") * ratios("k_norm"), 1)
    qkv = ratios("qkv_proj")
    assert np.all(qkv[:, :, :-1] == 1) and np.all(qkv[:, :, -1] > 1)
    per_head = np.repeat(qkv[:, :, -1, 0, 0], qkv.shape[2] - 2, axis=1)
    np.testing.assert_array_equal(ratios("o_proj") * per_head[:, None, :, None], 1)
    untouched = [w["layers"]["mlp"] for w in (before, after)]
    for old, new in zip(*map(jax.tree.leaves, untouched), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("family", [None, "qwen2"])
def test_tokens_do_not_depend_on_the_size_of_keys_and_values(tmp_path, new_engine, family):
    """e4m3 alone would flush values of 2^-9 to zero."""
    answers = []
    for size in (1.0, 2.0**-9):
        changes = FAMILIES[family] if family else {}
        path = shrink(make_checkpoint(tmp_path / str(size), **changes), size)
        llm = new_engine(path, kv_cache_dtype="fp8")
        answers.append(tokens(llm, [prompt(5), prompt(120)], greedy()))
    assert answers[0] == answers[1]
