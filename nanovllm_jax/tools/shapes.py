"""The shapes of the published Qwen3 models, for measurements with random weights."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models import model_class


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, *, kv_heads: int = 8, tied: bool
) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        eos_token_ids=(151645,),
    )


QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "32B": _qwen3(5120, 25600, 64, 64, tied=False),
}


def write_config(config: ModelConfig, directory: Path) -> None:
    """Write the config.json of a model into its directory."""
    (directory / "config.json").write_text(json.dumps(_as_json(config)))


@contextlib.contextmanager
def model_directory(args: argparse.Namespace) -> Iterator[Path]:
    """Yield `args.model`, or a temporary directory with the config.json of `args.random_weights`.

    A config.json is all that an engine with random weights reads.
    """
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(QWEN3[args.random_weights], Path(folder))
        yield Path(folder)


def parameters(config: ModelConfig) -> nnx.State:
    """Return the shapes, types and logical axes of a model's parameters."""
    model = model_class(config.architecture)
    return nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param)


def _as_json(c: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [c.architecture],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_word_embeddings,
        "torch_dtype": c.dtype,
        "bos_token_id": 151643,
        "eos_token_id": c.eos_token_ids[0],
    }
