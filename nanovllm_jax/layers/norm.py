"""RMSNorm (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, the product in x's type."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


class StackedParam(nnx.Param):
    """A parameter that a layer gets with those of all layers: its reader indexes it by layer.

    For what kernels read: XLA would copy a slice out for them.
    """


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, which is a `variable` of one axis named `axis`."""

    def __init__(self, size: int, eps: float, *, axis="embed", variable=nnx.Param, dtype):
        self.eps = eps
        self.weight = variable(jnp.ones((size,), dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.weight[...], self.eps)
