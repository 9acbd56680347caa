"""How a layer computes: plain JAX everywhere, the project's kernels on GPUs, dense for training.

A model is written once against `Backend`. A backend is made inside the traced step, since it holds
the arrays that say where the step's tokens lie in the cache.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from nanovllm_jax.layers.attention import Angles, PagedBatch, dense_attention, paged_attention
from nanovllm_jax.layers.collectives import AXIS, Collectives
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.linear import Embedding, Layer, Linear, product
from nanovllm_jax.layers.norm import Hidden, NormAt, Normed, RMSNorm, plain
from nanovllm_jax.sharding import Sharding
from pallas_kernels import (
    LayerWeights,
    choose_experts,
    decode_layers,
    expert_mlp,
    expert_rows,
    fused_linear,
    gated_linear,
    plan_decode_layers,
    supports_expert_rows,
    supports_fused_linear,
    supports_gated_linear,
)


class Choice(NamedTuple):
    """How many experts a token chooses, and whether their weights add up to 1."""

    count: int
    normalize: bool

    def __call__(self, scores, slots, dtype, implementation: str):
        return choose_experts(
            scores, slots, num_choices=self.count, normalize=self.normalize, dtype=dtype,
            implementation=implementation,
        )  # fmt: skip


class Backend(Protocol):
    """What a decoder asks for, in the order in which a layer does."""

    def embed(self, table: Embedding, token_ids: Int[Array, " T"], then: NormAt) -> Hidden:
        """Look up the tokens' rows of an embedding table; `then` is that of `linear`."""
        ...

    def linear(
        self,
        x: Float[Array, "T *in"] | Normed,
        linear: Linear,
        layer: Layer = None,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Float[Array, "T *out"] | Normed | None = None,
        then: NormAt | None = None,
        dtype: DTypeLike | None = None,
    ) -> Any:
        """Apply a Linear together with the norm before it and the gate or residual after it.

        Args:
            layer: which layer of a stack of weights; None if the weights are not stacked.
            norm: applied to the input, unless the input is `Normed` and brings it along.
            gated: return silu(first half of the output) * second half (SwiGLU).
            residual: added to the output.
            then: the norm that comes next, which a backend may compute here.
            dtype: of the output; default: x's.

        Returns:
            The output [T, *out]; or `Normed`, if `then` was given and computed.
        """
        ...

    def experts(
        self,
        x: Hidden,
        gate_up: Linear,
        down: Linear,
        scores: Float[Array, "T E"],
        choice: Choice,
        layer: Int32[Array, ""],
        *,
        norm: RMSNorm,
        then: NormAt | None = None,
    ) -> Hidden:
        """Add to x the weighted sum of the MLPs of the experts that are chosen for norm(x).

        Args:
            gate_up, down: stacks of the weights of all experts, [L, E, 2, F, D] and [L, E, D, F].
            choice: which experts are taken by their scores.
            norm, then: as for `linear`.
        """
        ...

    def attend(
        self,
        qkv: Float[Array, "T K G+2 H"],
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rope: Angles,
        cache: Any,
        layer: Int32[Array, ""],
    ) -> tuple[Float[Array, "T N H"], Any]:
        """Norm (if at all) and rotate q and k, attend, and return the cache with k and v, too."""
        ...

    def all_layers(
        self,
        x: Float[Array, "T D"],
        weights: LayerWeights,
        rope: Angles,
        cache: Any,
        *,
        eps: float,
        layers_without_rope: tuple[int, ...],
    ) -> tuple[Float[Array, "T D"], Any] | None:
        """Compute all layers of a model without experts at once, where a backend can.

        Args:
            eps: the epsilon of all norms.
            layers_without_rope: numbers of the layers that rotate nothing.

        Returns:
            Hidden states and the cache; or None: the layers are to be computed one by one.
        """
        ...

    def constrain(self, x: Hidden, *axes: str | None) -> Hidden:
        """Tell the compiler how an intermediate array with these logical axes is sharded."""
        ...


def _split(x, norm: RMSNorm | None):
    """The array that a Linear takes, and the norm that is still to be applied to it."""
    if norm is not None and isinstance(x, Normed):
        return x.normed, None
    return plain(x), norm


class _PlainLinear:
    """The parts of a backend that need no mesh and no cache."""

    def embed(self, table, token_ids, then=None):
        return table.lookup(token_ids)

    def linear(
        self, x, linear, layer=None, *,
        norm=None, gated=False, residual=None, then=None, dtype=None,
    ):  # fmt: skip
        x, norm = _split(x, norm)
        if norm is not None:
            x = self.norm(x, norm, layer)
        y = linear(x, layer, dtype)
        if gated:
            y = jax.nn.silu(y[:, 0]) * y[:, 1]
        return y if residual is None else plain(residual) + y

    def all_layers(self, x, weights, rope, cache, *, eps, layers_without_rope):
        return None

    def norm(self, x, norm, layer):
        """The norm before a Linear, by whatever computes it best."""
        return norm(x, layer)


@dataclass(frozen=True)
class DenseBackend(_PlainLinear):
    """Training: rows of equally many tokens attend under a mask, and nothing is cached."""

    mask: Bool[Array, "B S S"]

    def attend(self, qkv, q_norm, k_norm, rope, cache, layer):
        return dense_attention(qkv, q_norm, k_norm, rope, layer, self.mask), cache

    def experts(self, x, gate_up, down, scores, choice, layer, *, norm, then=None):
        x, stacks = plain(x), (gate_up.weight[...], down.weight[...])
        chosen = choice(scores, jnp.zeros(len(scores), jnp.int32), x.dtype, "xla")
        normed = self.norm(x, norm, layer)
        return x + expert_mlp(normed, *stacks, *chosen, layer, implementation="xla")

    def constrain(self, x, *axes):
        return x


@dataclass(frozen=True)
class XlaBackend(_PlainLinear):
    """Serving in plain JAX over a mesh; attention by the kernels that `attention` names."""

    sharding: Sharding
    batch: PagedBatch
    attention: str
    collectives: Collectives | None = None  # without them all sums over devices are XLA's

    def attend(self, qkv, q_norm, k_norm, rope, cache, layer):
        weights = (None if norm is None else norm.weight[...] for norm in (q_norm, k_norm))
        return paged_attention(
            qkv, *weights, rope, cache, layer, self.batch, eps=q_norm.eps if q_norm else 0.0,
            sharding=self.sharding, implementation=self.attention,
        )  # fmt: skip

    def experts(self, x, gate_up, down, scores, choice, layer, *, norm, then=None):
        """Each device adds up what its experts, or its hidden units of all, give to every token."""
        sharding, spec, kernels = self.sharding, self.sharding.spec, self.attention
        _, dealt, split = spec("batch", "experts", "expert_ffn")  # no mesh axis may serve twice
        summed = tuple(m for m in jax.tree.leaves((dealt, split)) if sharding.mesh.shape[m] > 1)
        stacks, place = [gate_up.weight[...], down.weight[...]], layer
        if kernels == "xla":  # on a CPU the weights of a layer are arrays of their own
            stacks, place = [stack[layer][None] for stack in stacks], jnp.int32(0)
        residual = plain(x)
        x, norm = _split(x, norm)
        rows = len(scores) // sharding.size("batch")
        _, experts, _, hidden, width = sharding.local_shape(stacks[0].shape, (None, *gate_up.axes))
        fits = supports_expert_rows(rows * choice.count, experts, hidden, width, x.dtype)
        few = kernels != "xla" and fits
        if norm is not None and not few:
            x, norm = self.norm(x, norm, layer), None
        one_shot = summed == (AXIS,) and self._sums((rows, width), x.dtype)
        eps, norm_weight = (0.0, None) if norm is None else (norm.eps, norm.weight[...])

        def on_shard(x, residual, gate_up, down, scores, slots, place, norm, then, collectives):
            choices, weights = choice(scores, slots, x.dtype, kernels)
            if dealt:
                choices -= jax.lax.axis_index(dealt) * gate_up.shape[1]
            chosen = gate_up, down, choices, weights, place
            if few:
                y = expert_rows(x, *chosen, norm, None if summed else residual, eps=eps)
            else:
                y = expert_mlp(x, *chosen, implementation=kernels)
            if one_shot:
                return collectives.sum(y, residual, then)
            if summed:
                y = jax.lax.psum(y, summed)
            return y if few and not summed else residual + y

        by_row, whole = spec("batch"), spec()
        parts = spec(None, "experts", None, "expert_ffn")
        mapped = sharding.shard_map(
            on_shard,
            (
                *(by_row, by_row, parts, parts, by_row, by_row),
                *(whole, whole, whole, Collectives.spec(sharding)),
            ),
            by_row,
        )
        return mapped(
            *(x, residual, *stacks, scores, self.batch.slot_mapping, place, norm_weight),
            self._joining(then, (rows, width), x.dtype) if one_shot else None,
            self.collectives,
        )

    def constrain(self, x, *axes):
        return jax.tree.map(lambda array: self.sharding.constrain(array, *axes), x)

    def _sums(self, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        return self.collectives is not None and self.collectives.fits(shape, dtype)

    def _joining(
        self, then: NormAt | None, shape: tuple[int, ...], dtype: DTypeLike
    ) -> NormAt | None:
        """The next norm, if it joins the kernel of a sum of this shape.

        That of a single row does not: it is part of the product after it.
        """
        joins = shape[0] > 1 and Collectives.fits_norm(shape, dtype)
        return then if joins else None


class LinearPlan(NamedTuple):
    """What a GPU's kernels do for one linear layer; sizes are those of a device's shard."""

    rows: int
    out: tuple[int, ...]
    width: int  # of the input
    summed: tuple[str, ...]  # mesh axes whose devices hold parts of the sum
    one_row: bool  # one kernel for norm, product, gate and residual
    one_shot: bool  # one kernel for the sum and the residual
    many_rows: bool  # one kernel for product and gate


@dataclass(frozen=True)
class GpuBackend(XlaBackend):
    """Serving with the project's own kernels, where they fit; elsewhere as `XlaBackend`.

    A decode step of a few sequences takes one kernel for all layers, on Hopper. Elsewhere, a single
    token in 16 bits takes one kernel for a Linear and what surrounds it. Many tokens take one for a
    gated Linear, which does not write what it puts through the gate. A small sum over the GPUs that
    share a layer takes one kernel, with the residual before it and the norm after it.
    """

    one_kernel: bool = False  # all layers of a decode step in one, where it fits

    def all_layers(self, x, weights, rope, cache, *, eps, layers_without_rope):
        mesh, batch = self.sharding.mesh, self.batch
        if not self.one_kernel or batch.query_starts is not None or mesh.size > 1:
            return None
        plan = plan_decode_layers(weights, cache.k, len(x), mesh.devices.flat[0])
        if plan is None:
            return None
        scale = cache.k.shape[-1] ** -0.5
        hidden, *cache = decode_layers(
            x, weights, *rope, batch.slot_mapping, *cache, batch.block_tables, batch.context_lens,
            eps=eps, scale=scale, layers_without_rope=layers_without_rope,
            implementation="cuda", plan=plan,
        )  # fmt: skip
        return hidden, KVCache(*cache)

    def embed(self, table, token_ids, then=None):
        rows, spec = len(token_ids) // self.sharding.size("batch"), self.sharding.spec
        shape, dtype = (rows, table.weight[...].shape[1]), table.weight.dtype
        split = self.sharding.mesh_axes("vocab") == (AXIS,)
        if not (split and self._holds_hidden_size and self._sums(shape, dtype)):
            return super().embed(table, token_ids)

        def on_shard(weight, token_ids, then, collectives):
            ids = token_ids - jax.lax.axis_index(AXIS) * len(weight)
            here = (ids >= 0) & (ids < len(weight))
            part = jnp.where(here[:, None], weight[jnp.where(here, ids, 0)], 0)
            return collectives.sum(part, None, then)

        return self.sharding.shard_map(
            on_shard,
            (spec("vocab"), spec("batch"), spec(), Collectives.spec(self.sharding)),
            spec("batch"),
        )(table.weight[...], token_ids, self._joining(then, shape, dtype), self.collectives)

    def linear(
        self, x, linear, layer=None, *,
        norm=None, gated=False, residual=None, then=None, dtype=None,
    ):  # fmt: skip
        x, norm = _split(x, norm)
        plan = self.plan(linear, len(x), x.dtype, gated=gated, residual=residual is not None)
        if plan is None:
            return super().linear(
                x, linear, layer, norm=norm, gated=gated, residual=residual, dtype=dtype
            )
        if plan.many_rows and norm is not None:
            x, norm = self.norm(x, norm, layer), None
        num_in, eps = len(linear.in_axes), 0.0 if norm is None else norm.eps
        if residual is not None:
            residual = plain(residual)
        if linear.bias is not None:  # each output gets it once, also where devices sum their parts
            bias = jnp.broadcast_to(linear.bias_at(layer), (len(x), *linear.out_shape))
            residual = bias if residual is None else residual + bias

        def stacked(weight):
            return weight[None] if layer is None else weight

        def on_shard(x, weight, norm_weight, residual, layer, then, collectives):
            if plan.one_row:
                y = fused_linear(
                    x.reshape(1, plan.width), weight.reshape(len(weight), -1, plan.width), layer,
                    norm_weight,
                    None if plan.summed or residual is None else residual.reshape(1, -1),
                    eps=eps, gated=gated, dtype=dtype or x.dtype,
                ).reshape(plan.rows, *plan.out)  # fmt: skip
            elif plan.many_rows:
                rows = x.reshape(plan.rows, plan.width)
                weight = weight.reshape(len(weight), 2, -1, plan.width)
                y = gated_linear(rows, weight, layer).reshape(plan.rows, *plan.out)
                y = y.astype(dtype or x.dtype)
            else:
                y = product(x, weight[layer], num_in, dtype)
            if plan.one_shot:
                return collectives.sum(y, residual, then)
            if not plan.summed:
                return y
            y = jax.lax.psum(y, plan.summed)
            return y if residual is None else residual + y

        spec = self.sharding.spec
        out_spec = spec("batch", *linear.out_axes[gated:])
        return self.sharding.shard_map(
            on_shard,
            (
                spec("batch", *linear.in_axes),
                spec(None, *linear.axes),
                spec(),
                out_spec,
                spec(),
                spec(),
                Collectives.spec(self.sharding),
            ),
            out_spec,
        )(
            x,
            stacked(linear.weight[...]),
            None if norm is None else stacked(norm.weight[...]),
            residual,
            jnp.int32(0) if layer is None else layer,
            self._joining(then, (plan.rows, *plan.out), x.dtype) if plan.one_shot else None,
            self.collectives,
        )

    def plan(
        self, linear: Linear, tokens: int, dtype: DTypeLike, *, gated: bool, residual: bool
    ) -> LinearPlan | None:
        """What the kernels do for a Linear over this many tokens; None if none of them fits."""
        num_in, sharding = len(linear.in_axes), self.sharding
        shape = linear.weight[...].shape[-len(linear.axes) :]
        local = sharding.local_shape(shape, linear.axes)
        rows, out, width = tokens // sharding.size("batch"), local[gated:-num_in], local[-num_in:]
        num_out, num_inputs = math.prod(out), math.prod(width)
        axes = [m for axis in linear.in_axes for m in sharding.mesh_axes(axis)]
        summed = tuple(m for m in axes if sharding.mesh.shape[m] > 1)
        one_row = supports_fused_linear(rows, num_out, num_inputs, dtype)
        # A product without a norm before it, and with a residual after it.
        one_shot = residual and summed == (AXIS,) and self._sums((rows, num_out), dtype)
        gated_bias = gated and linear.bias is not None  # comes before the gate, not after it
        takes_gate = gated and not residual and not summed
        many_rows = takes_gate and self._many_rows(rows, num_out, num_inputs, dtype)
        kernel = one_row or one_shot or many_rows
        if not self._holds_hidden_size or gated_bias or not kernel:
            return None
        return LinearPlan(rows, out, num_inputs, summed, one_row, one_shot, many_rows)

    def _many_rows(self, rows: int, num_out: int, num_inputs: int, dtype: DTypeLike) -> bool:
        device = self.sharding.mesh.devices.flat[0]
        return supports_gated_linear(rows, num_out, num_inputs, dtype, device)

    @property
    def _holds_hidden_size(self) -> bool:
        """Whether each device has all of the hidden size, which the kernels take for granted."""
        return all(self.sharding.size(axis) == 1 for axis in ("embed", "activation_embed"))
