"""The shapes of the published Qwen3 models, for measurements with random weights."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanovllm_jax.models import ModelConfig


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
    (directory / "config.json").write_text(json.dumps(config.as_json()))


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
