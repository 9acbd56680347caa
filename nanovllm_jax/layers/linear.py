"""Linear layers and the embedding table. Weights are stored [out, in], as checkpoints store them.

A product with one row then reads each weight row contiguously; XLA is markedly faster on it than
on [in, out].
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.sharding import Sharding
from pallas_kernels import fits_fused_linear, fused_linear


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32: never TF32 on the tensor cores."""
    exact = dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, dtype, scale: float):
    """A normally initialised parameter whose dimensions carry logical axis names."""
    value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y[..., *out] = sum over *in of x[..., *in] * weight[*out, *in]; several axes allowed.

    In a stack of layers the weight is that of all of them, [L, *out, *in].
    """

    def __init__(self, out: dict[str, int], inp: dict[str, int], *, dtype, rngs: nnx.Rngs):
        self.out_axes, self.in_axes = tuple(out), tuple(inp)
        shape = (*out.values(), *inp.values())
        scale = math.prod(inp.values()) ** -0.5
        self.weight = normal_param(rngs, shape, self.out_axes + self.in_axes, dtype, scale)

    def __call__(self, x: Float[Array, "..."], layer: Int32[Array, ""]) -> Float[Array, "..."]:
        weight = self.weight[...][layer]
        num_in = len(self.in_axes)
        x_dims = tuple(range(x.ndim - num_in, x.ndim))
        w_dims = tuple(range(weight.ndim - num_in, weight.ndim))
        return jax.lax.dot_general(
            x, weight, ((x_dims, w_dims), ((), ())), precision=matmul_precision(x.dtype)
        )


class Project(Protocol):
    """A linear layer of the stack together with its neighbours: one fifth of a decoder layer."""

    def __call__(
        self,
        x: Float[Array, "T *in"],
        linear: Linear,
        layer: Int32[Array, ""],
        *,
        norm: RMSNorm | None = None,  # of the input
        residual: Float[Array, "T *out"] | None = None,  # added to the output
        gated: bool = False,  # SwiGLU: silu(first half of the output) * second half
    ) -> Float[Array, "T *out"]: ...


def project(x, linear, layer, *, norm=None, residual=None, gated=False):
    """`Project` in plain JAX."""
    if norm is not None:
        x = norm(x, layer)
    y = linear(x, layer)
    if gated:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y if residual is None else residual + y


@dataclass(frozen=True)
class FusedProject:
    """`Project` as one GPU kernel, for a few tokens in 16 bits; other cases fall to `project`."""

    sharding: Sharding

    def __call__(self, x, linear, layer, *, norm=None, residual=None, gated=False):
        weight, num_in = linear.weight[...], len(linear.in_axes)
        local = [
            n // self.sharding.size(axis)
            for n, axis in zip(weight.shape[1:], linear.out_axes + linear.in_axes, strict=True)
        ]
        num_out, width = math.prod(local[:-num_in]), math.prod(local[-num_in:])
        if not fits_fused_linear(len(x), num_out, width, x.dtype):
            return project(x, linear, layer, norm=norm, residual=residual, gated=gated)
        spec = self.sharding.spec
        # Devices that hold parts of the input's axes hold parts of the sum.
        summed = [axis for axis in linear.in_axes if self.sharding.size(axis) > 1]
        summed = [self.sharding.rules[axis] for axis in summed]
        inside = None if summed else residual

        def on_shard(x, weight, layer, norm_weight, residual):
            num_layers, (num_tokens, *_) = len(weight), x.shape
            out_shape = weight.shape[1 + gated : -num_in]
            x = x.reshape(num_tokens, -1)
            y = fused_linear(
                x, weight.reshape(num_layers, -1, x.shape[1]), layer, norm_weight, residual,
                eps=norm.eps if norm is not None else 0.0, gated=gated,
            )  # fmt: skip
            y = y.reshape(num_tokens, *out_shape)
            return jax.lax.psum(y, tuple(summed)) if summed else y

        out_axes = linear.out_axes[gated:]
        y = self.sharding.shard_map(
            on_shard,
            (
                spec(None, *linear.in_axes),
                spec(None, *linear.out_axes, *linear.in_axes),
                spec(),
                spec(),
                spec(None, *out_axes),
            ),
            spec(None, *out_axes),
        )(x, weight, layer, None if norm is None else norm.weight[...], inside)
        return residual + y if summed and residual is not None else y


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
