"""Linear layers and the embedding table. Weights are stored [out, in], as checkpoints store them.

A product with one row then reads each weight row contiguously; XLA is markedly faster on it than
on [in, out].
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32: never TF32 on the tensor cores."""
    exact = dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, dtype, scale: float):
    """A normally initialised parameter whose dimensions carry logical axis names."""
    value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y[..., *out] = sum over *in of x[..., *in] * weight[*out, *in]; several axes allowed."""

    def __init__(self, out: dict[str, int], inp: dict[str, int], *, dtype, rngs: nnx.Rngs):
        self.num_in = len(inp)
        shape, axes = (*out.values(), *inp.values()), (*out, *inp)
        scale = math.prod(inp.values()) ** -0.5
        self.weight = normal_param(rngs, shape, axes, dtype, scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        weight = self.weight[...]
        x_dims = tuple(range(x.ndim - self.num_in, x.ndim))
        w_dims = tuple(range(weight.ndim - self.num_in, weight.ndim))
        return jax.lax.dot_general(
            x, weight, ((x_dims, w_dims), ((), ())), precision=matmul_precision(x.dtype)
        )


class Embedding(nnx.Module):
    """The token table: a lookup on the way in, a product with every row on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        shape = (vocab_size, hidden_size)
        self.weight = normal_param(rngs, shape, ("vocab", "embed"), dtype, 0.02)

    def __call__(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return self.weight[...][token_ids]

    def logits(self, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores in float32, whatever the weights' type."""
        return jax.lax.dot_general(
            x,
            self.weight[...],
            (((1,), (1,)), ((), ())),
            precision=matmul_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
