"""The shapes of the published Qwen3 models, for measurements with random weights."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nanovllm_jax.layers.rope import Rope
from nanovllm_jax.models import ModelConfig

# Hidden size, width of the MLP, layers and query heads by size, and whether the head is tied.
_SIZES = {
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False), "32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
QWEN3 = {
    size: ModelConfig(
        "Qwen3ForCausalLM", vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=layers, num_heads=heads, num_kv_heads=8, head_dim=128, rope=Rope(1e6),
        max_position_embeddings=40960, tie_word_embeddings=tied, eos_token_ids=(151645,),
    )
    for size, (hidden, intermediate, layers, heads, tied) in _SIZES.items()
}  # fmt: skip
QWEN3["30B-A3B"] = replace(
    QWEN3["8B"], architecture="Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144,
    num_layers=48, num_kv_heads=4, num_experts=128, experts_per_token=8, expert_size=768,
    norm_topk_prob=True,
)  # fmt: skip


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
