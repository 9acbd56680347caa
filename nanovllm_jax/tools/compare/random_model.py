"""Write a checkpoint of random weights in a published shape, once, for all engines."""

import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nanovllm_jax.models import ModelConfig
from nanovllm_jax.models.checkpoint import tensor_shapes
from nanovllm_jax.tools.shapes import write_config


def write(folder: Path, config: ModelConfig) -> Path:
    """Write a model of random bfloat16 weights to `folder`, unless it is there; return `folder`."""
    file = folder / "config.json"  # which is written last
    if file.is_file() and ModelConfig.from_directory(folder) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    _write_tokenizer(folder, config)
    _write_tensors(folder, tensor_shapes(config))
    write_config(config, folder)
    return folder


def write_without_weights(folder: Path, config: ModelConfig) -> Path:
    """Write what an engine reads that makes up its weights: config.json and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, config)
    write_config(config, folder)
    return folder


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Write a tokenizer of made-up words: engines want one, but no workload sends texts."""
    words, end = {f"t{i}": i for i in range(config.vocab_size)}, f"t{config.eos_token_ids[0]}"
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def _write_tensors(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write one safetensors file a layer, and their index; few layers are in memory at a time."""
    files: dict[str, dict[str, int]] = defaultdict(dict)  # of each tensor its seed
    for seed, name in enumerate(tensors):
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files[f"model-{layer}.safetensors"][name] = seed

    def write_file(file: str) -> None:
        drawn = {name: _draw(tensors[name], seed) for name, seed in files[file].items()}
        save_file(drawn, folder / file, {"format": "pt"})

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy lets threads run
        list(pool.map(write_file, files))
    index = {"metadata": {}, "weight_map": {n: file for file in files for n in files[file]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    normal = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (normal * 0.02).astype(ml_dtypes.bfloat16)
