"""The models that the engine can run, by the architecture that config.json names."""

from flax import nnx

from nanovllm_jax.models.config import ModelConfig
from nanovllm_jax.models.decoder import Decoder
from nanovllm_jax.models.families import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Decoder", "ModelConfig", "parameters"]


def parameters(config: ModelConfig) -> nnx.State:
    """The decoder's parameters as shapes and dtypes; no array is made and no device touched.

    Each is an `nnx.Param` of a `jax.ShapeDtypeStruct`, with its logical axes as metadata `axes`.
    Parameters under "layers" have a leading axis of layers, which `axes` does not name.
    """
    whole = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return nnx.state(whole, nnx.Param)
