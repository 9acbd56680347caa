"""A checkpoint of random weights in a published Qwen3 shape, written once, for all engines."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

DONE = "complete"


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a Qwen3 checkpoint with this config.json."""
    hidden, mlp, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for i in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], hidden)
    return tensors


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write config.json, bfloat16 weights of standard deviation 0.02 and a tokenizer to `folder`.

    A folder that holds the same model already is left as it is. Returns `folder`.
    """
    stamp = json.dumps([config, seed])
    if (folder / DONE).is_file() and (folder / DONE).read_text() == stamp:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    eos = config["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    _write_tokenizer(folder, config["vocab_size"], eos)
    _write_tensors(folder / "model.safetensors", shapes(config), seed)
    (folder / DONE).write_text(stamp)
    return folder


def published(folder: Path, size: str) -> Path:
    """Write a model of a published size, as bench.py names them, below `folder`."""
    return write(folder / f"qwen3-random-{size}", bench.qwen3_config(size))


def _write_tensors(file: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    """A safetensors file: the header's length, the header as JSON, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def draw(item: tuple[int, str]) -> None:
        i, name = item
        begin, shape = header[name]["data_offsets"][0], tensors[name]
        if len(shape) == 1:
            value = np.ones(shape, np.float32)
        else:
            value = np.random.default_rng([seed, i]).standard_normal(shape, np.float32) * 0.02
        data = value.astype(ml_dtypes.bfloat16).tobytes()
        os.pwrite(descriptor, data, 8 + len(encoded) + begin)

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(descriptor, struct.pack("<Q", len(encoded)) + encoded, 0)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy lets threads run
            list(pool.map(draw, enumerate(tensors)))
    finally:
        os.close(descriptor)


def _write_tokenizer(folder: Path, vocab_size: int, eos: int) -> None:
    """A tokenizer of made-up words, for the engines that want one; no workload uses it."""
    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"t{eos}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
