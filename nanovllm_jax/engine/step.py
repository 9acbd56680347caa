"""One step of the engine as pure functions of arrays: the programs that the runner compiles."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanovllm_jax.engine.inputs import Column, floats, sampled_positions, seeds, unpack
from nanovllm_jax.layers.attention import KVCache, PagedAttention
from nanovllm_jax.layers.linear import MAX_ONE_SHOT_WORDS, FusedProject, project
from nanovllm_jax.layers.sampler import filter_logits, sample
from nanovllm_jax.sharding import Sharding
from pallas_kernels import one_shot_max


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["order"])
@dataclass(frozen=True)
class LayerWeights:
    """A weight of each layer apart, its axes transposed into `order`: for a CPU.

    XLA forwards the slices of `stacked()` to their origins, here and for both transpositions.
    From one array it would copy each layer's slice once a step.
    """

    layers: tuple[Array, ...]
    order: tuple[int, ...]

    @classmethod
    def from_stacked(cls, weight: Array, axes: tuple[str, ...]) -> "LayerWeights":
        """Split a weight [L, *axes], to be multiplied with activations.

        Weights of three axes or more get their inputs first, [*in, *out]: XLA multiplies with
        matrices, which it would make of the other order by a transposition at each use.
        """
        order = list(range(len(axes)))
        if len(axes) > 2:  # of a product, into the embedding or out of it
            order = order[-1:] + order[:-1] if axes[-1] == "embed" else order[1:] + order[:1]
        layers = tuple(weight[i].transpose(order) for i in range(len(weight)))
        return cls(layers, tuple(order))

    def stacked(self) -> Array:
        """The weight [L, *axes]."""
        order = [self.order.index(i) for i in range(len(self.order))]
        return jnp.stack([w.transpose(order) for w in self.layers])


Weight = Array | LayerWeights


class DeviceState(NamedTuple):
    """What stays on the device from step to step, donated to each and updated in place."""

    cache: KVCache
    mailbox: Int32[Array, "devices 2"] | None  # addresses; None: sums over devices are XLA's
    # Of each slot; one more slot takes the padding rows'. For each shard of the batch by itself.
    last_tokens: Int32[Array, " slots"]


@dataclass(frozen=True)
class StepProgram:
    """The step of one model on one mesh; its methods are traced for each bucket."""

    graph: Any  # nnx.GraphDef
    treedef: Any  # PyTreeDef of the weights, which are passed as a flat list
    sharding: Sharding
    prefill: str  # which kernels
    decode: str
    block_size: int
    vocab_size: int  # without padding

    def run(
        self, weights: list[Weight], state: DeviceState, packed: Int32[Array, " n"], *,
        num_tokens: int, num_rows: int,
    ) -> tuple[DeviceState, Int32[Array, " B"], Float[Array, "B V"]]:  # fmt: skip
        """Compute a batch; returns the state, each row's new token, and the logits behind it.

        Where the batch is sharded, `num_tokens` and `num_rows` are those of one shard, and `packed`
        holds the inputs of one shard after another.

        The tokens are drawn without top-k, top-p and min-p; where a row asks for those, `redraw`
        draws again from the logits.
        """
        stacked = [w.stacked() if isinstance(w, LayerWeights) else w for w in weights]
        model = nnx.merge(self.graph, jax.tree.unflatten(self.treedef, stacked))
        inputs, rows = self._unpack(packed, state.last_tokens, num_tokens, num_rows)
        backend = self.prefill if num_tokens else self.decode
        attend = PagedAttention(inputs.batch, self.sharding, backend)
        how = project if backend == "xla" else FusedProject(self.sharding, state.mailbox)
        hidden, cache = model(inputs.token_ids, inputs.positions, attend, state.cache, how)
        if num_tokens:
            hidden = self._last_rows(hidden, inputs.last_tokens)
        logits = self.sharding.constrain(model.logits(hidden, how), "batch", "vocab")
        last_tokens, tokens = self._draw(
            state.last_tokens, logits, rows, state.mailbox, filtered=False
        )
        return DeviceState(cache, state.mailbox, last_tokens), tokens, logits

    def redraw(
        self, state: DeviceState, logits: Float[Array, "B V"], rows: Int32[Array, "B R"]
    ) -> tuple[DeviceState, Int32[Array, " B"]]:
        """Draw the rows' tokens again, with top-k, top-p and min-p."""
        last_tokens, tokens = self._draw(
            state.last_tokens, logits, rows, state.mailbox, filtered=True
        )
        return state._replace(last_tokens=last_tokens), tokens

    # The rest works on each shard of the batch by itself. Jitted for the eager engine's sake: a
    # shard_map is slow to run operation by operation. The cache stays out of it, since what passes
    # through a jitted function undonated is copied.

    @functools.partial(jax.jit, static_argnames=("self", "num_tokens", "num_rows"))
    def _unpack(self, packed, last_tokens, num_tokens: int, num_rows: int):
        read = functools.partial(
            unpack, num_tokens=num_tokens, num_rows=num_rows, block_size=self.block_size
        )
        rows = self.sharding.spec("batch")
        return self.sharding.shard_map(read, (rows, rows), rows)(packed, last_tokens)

    @functools.partial(jax.jit, static_argnames="self")
    def _last_rows(self, hidden, last_tokens):
        rows = self.sharding.spec("batch")
        pick = self.sharding.shard_map(lambda h, last: h[last], (rows, rows), rows)
        return pick(hidden, last_tokens)

    @functools.partial(jax.jit, static_argnames=("self", "filtered"))
    def _draw(self, last_tokens, logits, rows, mailbox, *, filtered: bool):
        axis = self.sharding.mesh_axes("vocab")
        one_shot = mailbox is not None and axis == ("tensor",)

        def on_shard(last_tokens, logits, rows, mailbox):
            def largest_key(keys):
                return one_shot_max(keys, mailbox, "tensor", MAX_ONE_SHOT_WORDS)

            temperatures = floats(rows, Column.TEMPERATURE)
            if filtered:
                top_p, min_p = floats(rows, Column.TOP_P), floats(rows, Column.MIN_P)
                logits = filter_logits(
                    logits, temperatures, rows[:, Column.TOP_K], top_p, min_p,
                    vocab_size=self.vocab_size, axis=axis,
                )  # fmt: skip
            tokens = sample(
                logits, temperatures, seeds(rows), sampled_positions(rows),
                vocab_size=self.vocab_size, axis=axis,
                largest_key=largest_key if one_shot else None,
            )  # fmt: skip
            return last_tokens.at[rows[:, Column.SLOT]].set(tokens), tokens

        spec, by_row = self.sharding.spec, self.sharding.spec("batch")
        draw = self.sharding.shard_map(
            on_shard,
            (by_row, spec("batch", "vocab"), by_row, self.sharding.by_device),
            (by_row, by_row),
        )
        return draw(last_tokens, logits, rows, mailbox)
