"""Linear layers and the embedding table. Weights are stored [out, in], as checkpoints store them.

A product with one row then reads each weight row contiguously; XLA is markedly faster on it than
on [in, out].
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

Layer = Int32[Array, ""] | None  # Which layer of a stack of weights; None: not stacked.


def product(
    x: Float[Array, "T *in"], weight: Float[Array, "*out_in"], num_in: int, dtype=None
) -> Float[Array, "T *out"]:
    """Multiply over the last `num_in` axes of both."""
    exact = x.dtype == jnp.float32  # float32 means float32: never TF32 on the tensor cores
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    x_dims = tuple(range(x.ndim - num_in, x.ndim))
    w_dims = tuple(range(weight.ndim - num_in, weight.ndim))
    return jax.lax.dot_general(
        x, weight, ((x_dims, w_dims), ((), ())),
        precision=precision, preferred_element_type=dtype,
    )  # fmt: skip


class Linear(nnx.Module):
    """y[..., *out] = sum over *in of x[..., *in] * weight[*out, *in] (+ bias[*out]).

    Several axes are allowed on both sides.
    """

    def __init__(
        self, out: dict[str, int], inp: dict[str, int], *, dtype, rngs: nnx.Rngs, scale=None,
        bias: bool = False,
    ):  # fmt: skip
        self.out_axes, self.in_axes = tuple(out), tuple(inp)
        shape = (*out.values(), *inp.values())
        scale = scale or math.prod(inp.values()) ** -0.5
        value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
        self.weight = nnx.Param(value, axes=self.axes)
        self.out_shape = tuple(out.values())
        zeros = jnp.zeros(self.out_shape, dtype)
        self.bias = nnx.Param(zeros, axes=self.out_axes) if bias else None

    @property
    def axes(self) -> tuple[str, ...]:
        """The logical axes of one layer's weight."""
        return self.out_axes + self.in_axes

    def __call__(
        self, x: Float[Array, "T *in"], layer: Layer = None, dtype: DTypeLike | None = None
    ) -> Float[Array, "T *out"]:
        """Multiply by the weight, or by layer `layer` of a stack [L, *out, *in].

        Args:
            dtype: of the result; default: x's.
        """
        weight = self.weight[...] if layer is None else self.weight[...][layer]
        y = product(x, weight, len(self.in_axes), dtype)
        return y if self.bias is None else y + self.bias_at(layer)

    def bias_at(self, layer: Layer) -> Float[Array, "*out"]:
        """The bias, or that of one layer; only where there is one."""
        assert self.bias is not None
        return self.bias[...] if layer is None else self.bias[...][layer]


class Embedding(Linear):
    """The token table: a lookup on the way in, a product with every row on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        super().__init__(
            {"vocab": vocab_size}, {"embed": hidden_size}, dtype=dtype, rngs=rngs, scale=0.02
        )

    def lookup(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return self.weight[...][token_ids]
