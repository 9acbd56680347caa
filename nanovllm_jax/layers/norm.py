"""RMSNorm (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, the product in x's type."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, whose one axis is named `axis`."""

    def __init__(self, size: int, eps: float, *, axis="embed", dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=(axis,))

    def __call__(
        self, x: Float[Array, "... D"], layer: Int32[Array, ""] | None = None
    ) -> Float[Array, "... D"]:
        """Norm the rows of x; with `layer` where the weight is that of all layers, [L, D]."""
        weight = self.weight[...]
        return rms_norm(x, weight if layer is None else weight[layer], self.eps)
