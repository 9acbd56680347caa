"""RMSNorm (arXiv:1910.07467), and hidden states that bring theirs along."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

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

    def of_layers(self, numbers: Sequence[int]) -> "RMSNorm":
        """This norm in some layers of a stack, as a stack of its own."""
        norm = RMSNorm(self.weight.shape[-1], self.eps, dtype=self.weight.dtype)
        norm.weight = nnx.Param(self.weight[...][jnp.array(numbers)])
        return norm

    def at(self, layer: Int32[Array, ""]) -> "NormAt":
        """This norm in one layer of a stack, for a kernel that reads the weight in place."""
        return NormAt(self.weight[...], layer, self.eps)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "layer"], meta_fields=["eps"]
)
@dataclass(frozen=True)
class NormAt:
    """The arguments of an RMSNorm kernel. One layer past the last may be named, but not used."""

    weight: Float[Array, "L D"]
    layer: Int32[Array, ""]
    eps: float


class Normed(NamedTuple):
    """Hidden states and their RMSNorm, when the kernel that computed the one had both."""

    x: Float[Array, "T D"]
    normed: Float[Array, "T D"]


# Hidden states between two halves of a layer, perhaps with the norm that the next half applies.
Hidden: TypeAlias = Float[Array, "T D"] | Normed


def plain(hidden: Hidden) -> Float[Array, "T D"]:
    """The hidden states alone."""
    return hidden.x if isinstance(hidden, Normed) else hidden
