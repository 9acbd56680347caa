"""The shapes of published models, for measurements with random weights, and their config.json."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm_jax.layers.rope import Rope
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.models.families import ARCHITECTURES

# Hidden size, width of the MLP, layers and query heads by size, and whether the head is tied.
_SIZES = {
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False), "32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
SHAPES = {
    size: ModelConfig(
        "Qwen3ForCausalLM", vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=layers, num_heads=heads, num_kv_heads=8, head_dim=128, rope=Rope(1e6),
        max_position_embeddings=40960, tie_word_embeddings=tied, eos_token_ids=(151645,),
    )
    for size, (hidden, intermediate, layers, heads, tied) in _SIZES.items()
}  # fmt: skip
SHAPES["30B-A3B"] = replace(
    SHAPES["8B"], architecture="Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144,
    num_layers=48, num_kv_heads=4, num_experts=128, experts_per_token=8, expert_size=768,
    norm_topk_prob=True,
)  # fmt: skip


_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
SHAPES |= {
    "Llama-3.2-1B": ModelConfig(
        "LlamaForCausalLM", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, max_position_embeddings=131072,
        rope=Rope(5e5, "llama3", tuple(sorted(_LLAMA3.items()))), rms_norm_eps=1e-5,
        tie_word_embeddings=True, qk_norm=False, eos_token_ids=(128001, 128008, 128009),
    ),
    "Qwen2.5-7B": ModelConfig(
        "Qwen2ForCausalLM", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, max_position_embeddings=32768,
        rope=Rope(1e6), qk_norm=False, qkv_bias=True, eos_token_ids=(151645,),
    ),
}  # fmt: skip


def full_name(size: str) -> str:
    """The name of a shape; those of Qwen3 go by their size alone."""
    return f"Qwen3-{size}" if SHAPES[size].architecture.startswith("Qwen3") else size


def as_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, in the spelling that transformers 4 and 5 both read."""
    eos, rope, family = list(config.eos_token_ids), config.rope, ARCHITECTURES[config.architecture]
    switches = {
        key: getattr(config, switch)
        for switch, key in family.switches.items()
        if isinstance(key, str)
    }
    if "no_rope_layers" in family.defaults:
        switches["no_rope_layers"] = [
            int(i not in config.layers_without_rope) for i in range(config.num_layers)
        ]
    if "num_experts" in family.defaults:
        switches |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
        }
    return switches | {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size - config.vocab_padding,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads // config.kv_head_copies,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": (
            None if rope.kind == "default" else {"rope_type": rope.kind, **dict(rope.numbers)}
        ),
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }


def write_config(config: ModelConfig, directory: Path) -> None:
    """Write the config.json of a model into its directory."""
    (directory / "config.json").write_text(json.dumps(as_json(config)), "utf-8")


@contextlib.contextmanager
def model_directory(args: argparse.Namespace) -> Iterator[Path]:
    """Yield `args.model`, or a temporary directory with the config.json of `args.random_weights`.

    A config.json is all that an engine with random weights reads.
    """
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(SHAPES[args.random_weights], Path(folder))
        yield Path(folder)
