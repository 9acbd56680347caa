"""Checkpoints in FP8 with a scale for each block: dequantized exactly, or refused by name.

The oracle is transformers' formula, each weight times the scale of its block, computed by torch.
"""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import config_json, random_tensors, save_tensors

from nanovllm_jax.models import ModelConfig
from nanovllm_jax.quantization import SCALE, Blocks, dequantize
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tensor_files import Checkpoint
from nanovllm_jax.weights import load_weights

torch = pytest.importorskip("torch")

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
# Sizes that are no multiples of the blocks'.
SIZES = {"hidden_size": 72, "intermediate_size": 168, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 2, "head_dim": 20}


def quantize(tensor, rows, columns):
    """Scale each block to the largest float8_e4m3fn, as the published checkpoints are."""
    out, in_ = tensor.shape
    padded = np.pad(tensor, ((0, -out % rows), (0, -in_ % columns)))
    blocks = padded.reshape(len(padded) // rows, rows, -1, columns)
    scales = np.abs(blocks).max((1, 3)) / 448
    weight = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:out, :in_]
    return weight.astype(ml_dtypes.float8_e4m3fn), scales.astype(np.float32)


def write(path, blocks=(32, 16), scale_type=np.float32, edit=None, settings=None, shards=1):
    """Write a tiny checkpoint in FP8; returns its tensors."""
    path.mkdir(exist_ok=True)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization |= {"weight_block_size": list(blocks), "modules_to_not_convert": ["lm_head"]}
    config = config_json(**SIZES, dtype="bfloat16")
    config["quantization_config"] = settings or quantization
    tensors = {}
    for name, tensor in random_tensors(config).items():
        if tensor.ndim < 2 or not name.startswith("model.layers."):
            tensors[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        tensors[name], scales = quantize(tensor, *blocks)
        tensors[name + SCALE] = scales.astype(scale_type)
    if edit:
        edit(tensors)
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    save_tensors(path, tensors, shards)
    return tensors


def formula(tensors, name, blocks, dtype):
    """The weight that transformers computes with, by torch."""
    weight = torch.from_numpy(tensors[name].view(np.uint8)).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(tensors[name + SCALE].astype(np.float32))
    for axis, size in enumerate(blocks):
        scales = scales.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return (weight * scales).to(dtype).float().numpy()


def load(path, devices=1):
    sharding = make_sharding({"tensor": devices})
    config = ModelConfig.from_directory(path).sharded(sharding.size)
    return load_weights(config, sharding, path)


@pytest.mark.parametrize("blocks", [(128, 128), (32, 16), (24, 7), (1, 72)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale_type", [np.float32, ml_dtypes.bfloat16])
def test_every_weight_is_what_transformers_formula_gives(tmp_path, blocks, dtype, scale_type):
    tensors = write(tmp_path, blocks, scale_type, shards=3)
    checkpoint = Checkpoint(tmp_path, np.dtype(dtype))
    checkpoint.check(ModelConfig.from_directory(tmp_path))
    count = 0
    for name, tensor in tensors.items():
        if name + SCALE in tensors:
            found = checkpoint.read(name)
            assert str(found.dtype) == dtype
            wanted = formula(tensors, name, blocks, getattr(torch, dtype))
            np.testing.assert_array_equal(found.astype(np.float32), wanted, err_msg=name)
            count += 1
        elif not name.endswith(SCALE):
            np.testing.assert_array_equal(checkpoint.read(name), tensor)
    assert count == 2 * 7


def test_all_bytes_and_only_a_row_of_blocks_at_a_time():
    """Every byte is the number that it stands for, subnormal ones too, at the block's own scale."""
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.array([[1, 2, 0.5], [3, 1e-4, 7]], np.float32)
    found = dequantize(bits, scales, Blocks(9, 6), np.float32)
    whole = np.repeat(np.repeat(scales, 9, 0), 6, 1)[:16, :16]
    wanted = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(found).sum() == 2


@pytest.mark.parametrize("devices", [1, 2])
def test_the_parameters_are_those_of_the_dequantized_checkpoint(tmp_path, devices, caplog):
    blocks = (32, 16)
    tensors = write(tmp_path / "fp8", blocks)
    plain = {
        name: formula(tensors, name, blocks, torch.bfloat16).astype(ml_dtypes.bfloat16)
        if name + SCALE in tensors
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
    (tmp_path / "plain").mkdir()
    config = config_json(**SIZES, dtype="bfloat16")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config), "utf-8")
    save_tensors(tmp_path / "plain", plain)
    with caplog.at_level(logging.INFO, "nanovllm_jax"):
        wanted = load(tmp_path / "plain", devices)
        assert "fp8" not in caplog.text
        found = load(tmp_path / "fp8", devices)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    stored = sum(t.nbytes for n, t in tensors.items() if n + SCALE in tensors or n.endswith(SCALE))
    weights = sum(t.size for n, t in tensors.items() if n + SCALE in tensors)
    assert f"dequantizing 14 of {len(plain)} tensors from fp8 to bfloat16" in caplog.text
    assert f"{stored / 1e6:.1f} MB in the files, {2 * weights / 1e6:.1f} MB" in caplog.text


def test_transformers_dequantizes_the_same_checkpoint_to_the_same_weights(tmp_path):
    """Its own reader wants sizes that are multiples of the blocks'."""
    transformers = pytest.importorskip("transformers")
    tensors = write(tmp_path, (8, 24))
    quantization = transformers.FineGrainedFP8Config(
        weight_block_size=(8, 24), dequantize=True, modules_to_not_convert=["lm_head"]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32
    )
    theirs = {name: t.float().numpy() for name, t in model.state_dict().items()}
    checkpoint = Checkpoint(tmp_path)
    names = [name for name in tensors if name + SCALE in tensors]
    assert len(names) == 14
    for name in names:
        np.testing.assert_array_equal(checkpoint.read(name), theirs[name], err_msg=name)


# --- what is refused ---


def change(name, make):
    def edit(tensors):
        tensors[name] = make(tensors[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP + SCALE), rf"missing: {UP}{SCALE}"),
        (change(UP + SCALE, lambda x: x[1:]), rf"{UP}{SCALE} has \(5, 5\), .* implies \(6, 5\)"),
        (
            change(UP + SCALE, lambda x: np.array(x[0, 0])),
            rf"{UP}{SCALE} has \(\), .* implies \(6, 5\)",
        ),
        (lambda t: t.update({UP + "_scale": np.ones(1, np.float32)}), f"unexpected: {UP}_scale"),
        (lambda t: t.update({NORM + SCALE: np.ones(1, np.float32)}), f"unexpected: {NORM}{SCALE}"),
        (change(UP, lambda x: x.astype(ml_dtypes.bfloat16)), f"unexpected: {UP}{SCALE}"),
        (change(UP, lambda x: x.astype(ml_dtypes.float8_e5m2)), f"type other .*{UP} is F8_E5M2"),
        (change(NORM, lambda x: x.astype(ml_dtypes.float8_e4m3fn)), f"{NORM} is F8_E4M3"),
        (change(UP + SCALE, lambda x: x.astype(np.int32)), f"type other .*{UP}{SCALE} is I32"),
        (change(UP, lambda x: x.T.copy()), rf"{UP} has \(72, 168\), .* implies \(168, 72\)"),
        (change(UP + SCALE, lambda x: x * np.nan), f"{UP}{SCALE} has NaN or infinite"),
        (change(UP + SCALE, lambda x: x * np.inf), f"{UP}{SCALE} has NaN or infinite"),
        (change(UP, lambda x: (x.astype(np.float32) * np.nan).astype(x.dtype)), f"{UP} has NaN"),
        (change(UP + SCALE, lambda x: x * 0 + 3e38), f"{UP} times {UP}{SCALE} is larger than"),
    ],
)
def test_what_is_wrong_with_weights_or_scales_is_named(tmp_path, edit, message):
    write(tmp_path, edit=edit)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}"):
        load(tmp_path)


def test_8_bit_weights_that_config_json_does_not_mention_are_refused(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"of a type other than F32.*is F8_E4M3"):
        load(tmp_path)


def test_other_settings_are_refused_before_any_file_is_read(tmp_path):
    write(tmp_path, settings={"quant_method": "fp8", "activation_scheme": "static"})
    with pytest.raises(ValueError, match=r"config\.json: .*activation_scheme='static'.*; take"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: .*activation_scheme='static'.*; take"):
        Checkpoint(tmp_path)
