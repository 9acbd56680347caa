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
from pallas_kernels import fits_fused_linear, fits_one_shot, fused_linear, one_shot_all_reduce

Layer = Int32[Array, ""] | None  # which one of a stack

# Sums over GPUs of up to so many words (256 rows of 8B's width) take the one-shot kernel; larger
# ones are bound by the link, where each GPU should send each number once and not to all others.
MAX_ONE_SHOT_WORDS = 1 << 19


def product(
    x: Float[Array, "T *in"], weight: Float[Array, "*out_in"], num_in: int, dtype=None
) -> Float[Array, "T *out"]:
    """The product over the last `num_in` axes of both."""
    exact = x.dtype == jnp.float32  # float32 means float32: never TF32 on the tensor cores
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    x_dims = tuple(range(x.ndim - num_in, x.ndim))
    w_dims = tuple(range(weight.ndim - num_in, weight.ndim))
    return jax.lax.dot_general(
        x, weight, ((x_dims, w_dims), ((), ())),
        precision=precision, preferred_element_type=dtype,
    )  # fmt: skip


class Linear(nnx.Module):
    """y[..., *out] = sum over *in of x[..., *in] * weight[*out, *in]; several axes allowed."""

    def __init__(
        self, out: dict[str, int], inp: dict[str, int], *, dtype, rngs: nnx.Rngs, scale=None
    ):
        self.out_axes, self.in_axes = tuple(out), tuple(inp)
        shape = (*out.values(), *inp.values())
        scale = scale or math.prod(inp.values()) ** -0.5
        value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
        self.weight = nnx.Param(value, axes=self.out_axes + self.in_axes)

    def __call__(
        self, x: Float[Array, "T *in"], layer: Layer = None, dtype: DTypeLike | None = None
    ) -> Float[Array, "T *out"]:
        """The product in `dtype` (default: x's), with layer `layer` of a stack [L, *out, *in]."""
        weight = self.weight[...] if layer is None else self.weight[...][layer]
        return product(x, weight, len(self.in_axes), dtype)


class Embedding(Linear):
    """The token table: a lookup on the way in, a product with every row on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        super().__init__(
            {"vocab": vocab_size}, {"embed": hidden_size}, dtype=dtype, rngs=rngs, scale=0.02
        )

    def lookup(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return self.weight[...][token_ids]


class Project(Protocol):
    """A linear layer and what surrounds it; a decoder layer is four of these and attention.

    `lookup` is the other way to use weights: rows of an embedding table.
    """

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

    def lookup(self, table: Embedding, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]: ...


class PlainProject:
    """`Project` in plain JAX."""

    def lookup(self, table, token_ids):
        return table.lookup(token_ids)

    def __call__(self, x, linear, layer=None, *, norm=None, gated=False, residual=None, dtype=None):
        if norm is not None:
            x = norm(x, layer)
        y = linear(x, layer, dtype)
        if gated:
            y = jax.nn.silu(y[:, 0]) * y[:, 1]
        return y if residual is None else residual + y


project = PlainProject()


@dataclass(frozen=True)
class FusedProject:
    """`Project` with the project's own GPU kernels, where they fit; else `project`.

    A single token in 16 bits takes one kernel for a layer and what surrounds it. A sum over the
    GPUs that share a layer takes one kernel, with the residual, where it is small.
    """

    sharding: Sharding
    mailbox: Int32[Array, "devices 2"] | None = None  # addresses, for `one_shot_all_reduce`

    def lookup(self, table, token_ids):
        rows, spec = len(token_ids) // self.sharding.size("batch"), self.sharding.spec
        width = table.weight[...].shape[1]
        split = self.sharding.mesh_axes("vocab") == ("tensor",)
        if not (self._whole and split and self._one_shot((rows, width), table.weight.dtype)):
            return table.lookup(token_ids)

        def on_shard(weight, token_ids, mailbox):
            ids = token_ids - jax.lax.axis_index("tensor") * len(weight)
            here = (ids >= 0) & (ids < len(weight))
            part = jnp.where(here[:, None], weight[jnp.where(here, ids, 0)], 0)
            nothing = jnp.zeros_like(part)
            return one_shot_all_reduce(part, nothing, mailbox, "tensor", MAX_ONE_SHOT_WORDS)

        by_row = spec("batch")
        return self.sharding.shard_map(
            on_shard, (spec("vocab"), by_row, self.sharding.by_device), by_row
        )(table.weight[...], token_ids, self.mailbox)

    @property
    def _whole(self) -> bool:
        """Whether each device has all of the hidden size, which the kernels take for granted."""
        return all(self.sharding.size(a) == 1 for a in ("embed", "activation_embed"))

    def _one_shot(self, shape: tuple[int, ...], dtype) -> bool:
        return self.mailbox is not None and fits_one_shot(shape, dtype, MAX_ONE_SHOT_WORDS)

    def __call__(self, x, linear, layer=None, *, norm=None, gated=False, residual=None, dtype=None):
        axes, num_in = linear.out_axes + linear.in_axes, len(linear.in_axes)
        weight = linear.weight[...][None] if layer is None else linear.weight[...]
        norm_weight = None
        if norm is not None:
            norm_weight = norm.weight[...][None] if layer is None else norm.weight[...]
        local = [n // self.sharding.size(a) for n, a in zip(weight.shape[1:], axes, strict=True)]
        num_out, width = math.prod(local[:-num_in]), math.prod(local[-num_in:])
        rows = len(x) // self.sharding.size("batch")
        # Devices that hold parts of the input's axes hold parts of the sum.
        summed = [m for a in linear.in_axes for m in self.sharding.mesh_axes(a)]
        summed = [m for m in summed if self.sharding.mesh.shape[m] > 1]

        one_row = fits_fused_linear(rows, num_out // (1 + gated), width, x.dtype)
        one_shot = (
            residual is not None
            and summed == ["tensor"]
            and self._one_shot((rows, num_out), x.dtype)
        )
        if not self._whole or not (one_row or one_shot):
            return project(x, linear, layer, norm=norm, gated=gated, residual=residual, dtype=dtype)

        def on_shard(x, weight, norm_weight, residual, layer, mailbox):
            shape = (rows, *local[gated:-num_in])
            added = None if summed else residual
            if one_row:
                y = fused_linear(
                    x.reshape(1, width), weight.reshape(len(weight), -1, width), layer,
                    norm_weight, added,
                    eps=norm.eps if norm is not None else 0.0, gated=gated, dtype=dtype or x.dtype,
                ).reshape(shape)  # fmt: skip
            else:
                y = product(x, weight[layer], num_in, dtype)
            if not summed:
                return y
            if one_shot:
                return one_shot_all_reduce(y, residual, mailbox, summed[0], MAX_ONE_SHOT_WORDS)
            y = jax.lax.psum(y, tuple(summed))
            return y if residual is None else residual + y

        spec = self.sharding.spec
        layer = jnp.int32(0) if layer is None else layer
        out_spec = spec("batch", *linear.out_axes[gated:])
        return self.sharding.shard_map(
            on_shard,
            (spec("batch", *linear.in_axes), spec(None, *axes), spec(), out_spec, spec(),
             self.sharding.by_device),
            out_spec,
        )(x, weight, norm_weight, residual, layer, self.mailbox)  # fmt: skip
