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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.sharding import Sharding
from pallas_kernels import fits_fused_linear, fused_linear

Layer = Int32[Array, ""] | None  # which one of a stack


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

    def __init__(
        self, out: dict[str, int], inp: dict[str, int], *, dtype, rngs: nnx.Rngs, scale=None
    ):
        self.out_axes, self.in_axes = tuple(out), tuple(inp)
        shape = (*out.values(), *inp.values())
        scale = scale or math.prod(inp.values()) ** -0.5
        self.weight = normal_param(rngs, shape, self.out_axes + self.in_axes, dtype, scale)

    def __call__(
        self, x: Float[Array, "T *in"], layer: Layer = None, dtype: DTypeLike | None = None
    ) -> Float[Array, "T *out"]:
        """The product in `dtype` (default: x's), with layer `layer` of a stack [L, *out, *in]."""
        weight = self.weight[...] if layer is None else self.weight[...][layer]
        num_in = len(self.in_axes)
        x_dims = tuple(range(x.ndim - num_in, x.ndim))
        w_dims = tuple(range(weight.ndim - num_in, weight.ndim))
        return jax.lax.dot_general(
            x, weight, ((x_dims, w_dims), ((), ())),
            precision=matmul_precision(x.dtype), preferred_element_type=dtype,
        )  # fmt: skip


class Embedding(Linear):
    """The token table: a lookup on the way in, a product with every row on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        super().__init__(
            {"vocab": vocab_size}, {"embed": hidden_size}, dtype=dtype, rngs=rngs, scale=0.02
        )

    def lookup(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return self.weight[...][token_ids]


class Project(Protocol):
    """A linear layer and what surrounds it; a decoder layer is four of these and attention."""

    def __call__(
        self,
        x: Float[Array, "T *in"],
        linear: Linear,
        layer: Layer = None,
        *,
        norm: RMSNorm | None = None,  # of the input
        gated: bool = False,  # SwiGLU: silu(first half of the output) * second half
        residual: Float[Array, "T *out"] | None = None,  # added to the output
        dtype: DTypeLike | None = None,  # of the output; default: x's
    ) -> Float[Array, "T *out"]: ...


def project(x, linear, layer=None, *, norm=None, gated=False, residual=None, dtype=None):
    """`Project` in plain JAX."""
    if norm is not None:
        x = norm(x, layer)
    y = linear(x, layer, dtype)
    if gated:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y if residual is None else residual + y


@dataclass(frozen=True)
class FusedProject:
    """`Project` as one GPU kernel, for a single token in 16 bits; else `project`."""

    sharding: Sharding

    def __call__(self, x, linear, layer=None, *, norm=None, gated=False, residual=None, dtype=None):
        axes, num_in = linear.out_axes + linear.in_axes, len(linear.in_axes)
        weight = linear.weight[...][None] if layer is None else linear.weight[...]
        norm_weight = None
        if norm is not None:
            norm_weight = norm.weight[...][None] if layer is None else norm.weight[...]
        local = [n // self.sharding.size(a) for n, a in zip(weight.shape[1:], axes, strict=True)]
        num_out, width = math.prod(local[:-num_in]), math.prod(local[-num_in:])
        rows = len(x) // self.sharding.size("batch")
        whole = self.sharding.size("embed") == self.sharding.size("activation_embed") == 1
        if not whole or not fits_fused_linear(rows, num_out // (1 + gated), width, x.dtype):
            return project(x, linear, layer, norm=norm, gated=gated, residual=residual, dtype=dtype)

        # Devices that hold parts of the input's axes hold parts of the sum.
        summed = [m for a in linear.in_axes for m in self.sharding.mesh_axes(a)]
        summed = [m for m in summed if self.sharding.mesh.shape[m] > 1]

        def on_shard(x, weight, norm_weight, residual, layer):
            x = x.reshape(1, width)
            y = fused_linear(
                x, weight.reshape(len(weight), -1, width), layer, norm_weight, residual,
                eps=norm.eps if norm is not None else 0.0, gated=gated, dtype=dtype or x.dtype,
            ).reshape(1, *local[gated:-num_in])  # fmt: skip
            return jax.lax.psum(y, tuple(summed)) if summed else y

        spec = self.sharding.spec
        layer = jnp.int32(0) if layer is None else layer
        out_spec = spec("batch", *linear.out_axes[gated:])
        y = self.sharding.shard_map(
            on_shard,
            (spec("batch", *linear.in_axes), spec(None, *axes), spec(), out_spec, spec()),
            out_spec,
        )(x, weight, norm_weight, None if summed else residual, layer)
        return residual + y if summed and residual is not None else y
