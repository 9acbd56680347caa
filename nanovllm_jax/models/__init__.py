"""The models that the engine can run, by the architecture that config.json names."""

from nanovllm_jax.models.qwen3 import Qwen3

MODELS = {"Qwen3ForCausalLM": Qwen3}


def model_class(architecture: str) -> type[Qwen3]:
    """The class for config.json's architecture; ValueError names what is supported."""
    if architecture not in MODELS:
        raise ValueError(
            f"config.json: architecture {architecture!r} is not supported; have {list(MODELS)}"
        )
    return MODELS[architecture]
