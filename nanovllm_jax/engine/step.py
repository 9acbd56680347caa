"""One step of the engine as pure functions of arrays: the programs that are compiled."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.packed import Column, floats, sampled_positions, seeds, unpack
from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.backend import GpuBackend, XlaBackend
from nanovllm_jax.layers.collectives import AXIS, Collectives
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.sampler import filter_logits, sample
from nanovllm_jax.models import Decoder
from nanovllm_jax.sharding import Sharding
from nanovllm_jax.weights import Weight, stack


class DeviceState(NamedTuple):
    """What stays on the device from step to step, donated to each and updated in place."""

    cache: KVCache
    collectives: Collectives | None  # None: XLA sums over devices
    # The last token of each slot, plus one slot for padding rows; one such table per data shard.
    last_tokens: Int32[Array, " slots"]


@dataclass(frozen=True)
class StepFunctions:
    """The step of one model on one mesh; its methods are traced for each bucket."""

    graph: Any  # nnx.GraphDef
    treedef: Any  # PyTreeDef of the weights, which are passed as a flat list
    sharding: Sharding
    prefill: str  # attention kernels of a prefill, as pallas_kernels names them
    decode: str  # attention kernels of a decode step
    block_size: int
    vocab_size: int  # without padding

    def run(
        self,
        weights: list[Weight],
        state: DeviceState,
        packed: Int32[Array, " n"],
        *,
        bucket: Bucket,
    ) -> tuple[DeviceState, Float[Array, "B D"], Int32[Array, " B"]]:
        """Compute a batch and draw a token for each row, without top-k, top-p and min-p.

        Args:
            packed: the inputs of one shard of the batch after another, each of the bucket's size.

        Returns:
            The state, the hidden state of each row's last token, from which `sample` can draw
            again, and the tokens.
        """
        model = self._model(weights)
        inputs, rows = self._unpack(packed, state.last_tokens, bucket)
        backend = self._backend(
            self.decode if bucket.is_decode else self.prefill, inputs.batch, state.collectives
        )
        hidden, cache = model(inputs.token_ids, inputs.positions, backend, state.cache)
        if not bucket.is_decode:
            hidden = self._take_rows(hidden, inputs.sample_indices)
        last_tokens, tokens = self._draw(
            state.last_tokens, self._logits(model, hidden, backend), rows, state.collectives,
            filtered=False,
        )  # fmt: skip
        return DeviceState(cache, state.collectives, last_tokens), hidden, tokens

    def sample(
        self,
        weights: list[Weight],
        state: DeviceState,
        hidden: Float[Array, "B D"],
        rows: Int32[Array, "B R"],
    ) -> tuple[DeviceState, Int32[Array, " B"]]:
        """Draw the rows' tokens again, with top-k, top-p and min-p."""
        logits = self.logits(weights, hidden, state.collectives)
        last_tokens, tokens = self._draw(
            state.last_tokens, logits, rows, state.collectives, filtered=True
        )
        return state._replace(last_tokens=last_tokens), tokens

    def logits(
        self,
        weights: list[Weight],
        hidden: Float[Array, "B D"],
        collectives: Collectives | None = None,
    ) -> Float[Array, "B V"]:
        """The float32 logits behind hidden rows, with the padded vocabulary's at the end."""
        nowhere: Any = None  # no token attends here
        return self._logits(
            self._model(weights), hidden, self._backend(self.decode, nowhere, collectives)
        )

    def _model(self, weights: list[Weight]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, stack(weights)))

    def _backend(
        self, attention: str, batch: PagedBatch, collectives: Collectives | None
    ) -> XlaBackend:
        if attention == "xla":
            return XlaBackend(self.sharding, batch, attention)
        return GpuBackend(self.sharding, batch, attention, collectives)

    def _logits(self, model: Decoder, hidden, backend: XlaBackend) -> Float[Array, "B V"]:
        return backend.constrain(model.logits(hidden, backend), "batch", "vocab")

    # The rest works on each shard of the batch by itself. It is jitted for the eager engine's sake:
    # a shard_map is slow to run operation by operation. The cache stays out of it, since what
    # passes through a jitted function undonated is copied.

    @functools.partial(jax.jit, static_argnames=("self", "bucket"))
    def _unpack(self, packed, last_tokens, bucket: Bucket):
        read = functools.partial(unpack, bucket=bucket, block_size=self.block_size)
        rows = self.sharding.spec("batch")
        return self.sharding.shard_map(read, (rows, rows), rows)(packed, last_tokens)

    @functools.partial(jax.jit, static_argnames="self")
    def _take_rows(self, hidden, indices):
        rows = self.sharding.spec("batch")
        take = self.sharding.shard_map(lambda h, i: h[i], (rows, rows), rows)
        return take(hidden, indices)

    @functools.partial(jax.jit, static_argnames=("self", "filtered"))
    def _draw(self, last_tokens, logits, rows, collectives, *, filtered: bool):
        axis, spec = self.sharding.mesh_axes("vocab"), self.sharding.spec

        def on_shard(last_tokens, logits, rows, collectives):
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
                largest_key=collectives.max if collectives and axis == (AXIS,) else None,
            )  # fmt: skip
            return last_tokens.at[rows[:, Column.SLOT]].set(tokens), tokens

        by_row = spec("batch")
        draw = self.sharding.shard_map(
            on_shard,
            (by_row, spec("batch", "vocab"), by_row, Collectives.spec(self.sharding)),
            (by_row, by_row),
        )
        return draw(last_tokens, logits, rows, collectives)
