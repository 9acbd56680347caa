"""The models that the engine can run, by the architecture that config.json names."""

from flax import nnx

from nanovllm_jax.models.config import ModelConfig
from nanovllm_jax.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig", "check_architecture", "parameters"]

ARCHITECTURES = ("Qwen3ForCausalLM",)


def check_architecture(config: ModelConfig) -> None:
    """Raise ValueError, naming what is supported, unless the engine can run this model."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"config.json: architecture {config.architecture!r} is not supported; "
            f"have {list(ARCHITECTURES)}"
        )


def parameters(config: ModelConfig) -> nnx.State:
    """The decoder's parameters as shapes and dtypes; no array is made and no device touched.

    Each is an `nnx.Param` of a `jax.ShapeDtypeStruct`, with its logical axes as metadata `axes`.
    Parameters under "layers" have a leading axis of layers, which `axes` does not name.
    """
    whole = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return nnx.state(whole, nnx.Param)
