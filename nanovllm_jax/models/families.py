"""The architectures that load, and what each means by a config.json.

The values of missing keys are those of the architecture's own class in transformers.
"""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """What an architecture means by a config.json."""

    model_type: str
    defaults: dict[str, Any]  # the values of missing keys
    # Fields of `ModelConfig` that say what a layer does, and the key of config.json that decides.
    switches: dict[str, bool | str]
    theta: float = 10000.0  # RoPE's base, if the file names none


COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "layer_types": None,
}
QWEN = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA = COMMON | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}
BIASES: dict[str, bool | str] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
NO_BIASES: dict[str, bool | str] = dict.fromkeys(BIASES, False)

# The supported architectures.
ARCHITECTURES: dict[str, Family] = {
    "Qwen3ForCausalLM": Family(
        "qwen3",
        QWEN | {"head_dim": 128, "attention_bias": False},
        {**BIASES, "mlp_bias": False, "qk_norm": True},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        COMMON
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        {**BIASES, "mlp_bias": False, "qk_norm": True, "norm_topk_prob": "norm_topk_prob"},
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN, {**NO_BIASES, "qkv_bias": True, "qk_norm": False}),
    "LlamaForCausalLM": Family("llama", LLAMA, {**BIASES, "qk_norm": False}),
    "MistralForCausalLM": Family(
        "mistral",
        COMMON
        | {
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "eos_token_id": 2,
        },
        {**NO_BIASES, "qk_norm": False},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        LLAMA
        | {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "eos_token_id": 128001,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        {**BIASES, "qk_norm": False},
        theta=2e6,
    ),
}
