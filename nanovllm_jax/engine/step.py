"""One step of the engine as pure functions of arrays: the programs that are compiled."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.packed import (
    Column,
    DecodeRows,
    Sampling,
    StepInputs,
    advanced,
    allowed_of_rows,
    decode_inputs,
    decode_rows,
    decoded_slots,
    edits_of_rows,
    history_of,
    penalties_of,
    prefill_inputs,
    read_decode,
    read_masks,
    read_mixed,
    read_options,
    read_prefill,
    sampling_of,
)
from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.backend import GpuBackend, XlaBackend
from nanovllm_jax.layers.collectives import AXIS, Collectives
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.logit_edits import edit_logits
from nanovllm_jax.layers.sampler import filter_and_sample, sample
from nanovllm_jax.layers.scores import Scores, score
from nanovllm_jax.models import Decoder
from nanovllm_jax.sharding import Sharding
from nanovllm_jax.weights import Weight, stack

# Rows that `sample_all` works on at once: it makes half a dozen arrays of the logits' size. More
# rows are a multiple of it.
ROWS_AT_ONCE = 64


class DeviceState(NamedTuple):
    """What stays on the device from step to step, donated to each and updated in place."""

    cache: KVCache
    collectives: Collectives | None  # None: XLA sums over devices
    # The row of each slot (`packed.py`), plus one for padding rows; one such table per data shard.
    rows: Int32[Array, "slots R"]
    # The tokens whose keys and values the cache holds, plus one page for padding; one such table
    # per data shard.
    token_ids: Int32[Array, "P+1 S"]
    # The hidden states that the last step has drawn tokens from, for `sample`. They are no result
    # of the step: memory for those would lie elsewhere in each call.
    hidden: Float[Array, "rows D"]
    # The hidden states of all tokens of the last prefill, for `score_prompt`.
    prompt: Float[Array, "T+1 D"]
    # Options that few requests have (`packed.py`): a row for each slot, and one for padding rows.
    edits: Int32[Array, "slots 4*E"]
    allowed: Int32[Array, "slots V/32"]


@dataclass(frozen=True)
class StepFunctions:
    """The step of one model on one mesh; its methods are traced for each bucket."""

    graph: Any  # nnx.GraphDef
    treedef: Any  # PyTreeDef of the weights, which are passed as a flat list
    sharding: Sharding
    prefill: str  # attention kernels of a prefill, as pallas_kernels names them
    decode: str  # attention kernels of a decode step
    one_kernel: bool  # all layers of a decode step in one kernel, where it fits
    block_size: int
    vocab_size: int  # without padding

    def run(
        self,
        weights: list[Weight],
        state: DeviceState,
        packed: Int32[Array, " n"],
        *,
        bucket: Bucket,
    ) -> tuple[DeviceState, Int32[Array, " B"]]:
        """Compute a batch and draw a token for each row, without top-k, top-p and min-p.

        Args:
            packed: the inputs of one shard of the batch after another, each of the bucket's size.

        Returns:
            The state, from which `sample` can draw again, and the tokens.
        """
        if bucket.is_decode:
            rows, fixed = self._read_decode(packed, state.rows)
            last_tokens = rows[:, Column.LAST_TOKEN]
            state, hidden, tokens = self._decode_step(weights, state, fixed, last_tokens, step=0)
            state = state._replace(hidden=self._keep_hidden(state.hidden, hidden))
            return self._after_decode(state, rows, tokens[None]), tokens
        rows, inputs, known = self._read_prefill(packed, state.token_ids, state.rows, bucket)
        state, hidden, logits = self._forward(weights, state, inputs, self.prefill)
        ends = rows[:, Column.START] + rows[:, Column.LENGTH]
        tokens = self._draw(logits, sampling_of(rows), ends, state.collectives, filtered=False)
        kept = self._keep_hidden(state.hidden, hidden)
        state = state._replace(token_ids=known, hidden=kept)
        return self._put_rows(state, rows, tokens), tokens

    def decode_steps(
        self,
        weights: list[Weight],
        state: DeviceState,
        packed: Int32[Array, " n"],
        *,
        bucket: Bucket,
        num_steps: int,
    ) -> tuple[DeviceState, Int32[Array, "steps B"]]:
        """Take several decode steps in one call; returns the state and each step's tokens.

        A row stops after its own number of tokens; what it draws after that means nothing. The
        host starts one program for all steps, and on a GPU XLA records one command buffer: within
        a call no address changes.
        """
        rows, fixed = self._read_decode(packed, state.rows)

        def one(step, carry):
            state, last_tokens, tokens = carry
            state, _, drawn = self._decode_step(weights, state, fixed, last_tokens, step)
            return state, drawn, jax.lax.dynamic_update_slice(tokens, drawn[None], (step, 0))

        tokens = jnp.zeros((num_steps, len(rows)), jnp.int32)
        carry = state, rows[:, Column.LAST_TOKEN], tokens
        state, _, tokens = jax.lax.fori_loop(0, num_steps, one, carry)
        return self._after_decode(state, rows, tokens), tokens

    def sample(
        self,
        weights: list[Weight],
        state: DeviceState,
        slots: Int32[Array, " B"],
    ) -> tuple[DeviceState, Int32[Array, " B"]]:
        """Draw the tokens of the last step's rows again, with top-k, top-p and min-p."""
        logits = self.logits(weights, state, slots)
        rows = self._take_rows(state.rows, slots)
        sampling, positions = sampling_of(rows), rows[:, Column.START]
        tokens = self._draw(logits, sampling, positions, state.collectives, filtered=True)
        return self._put_rows(state, rows, tokens), tokens

    def sample_all(
        self,
        weights: list[Weight],
        state: DeviceState,
        slots: Int32[Array, " B"],
    ) -> tuple[DeviceState, Int32[Array, " B"], Scores]:
        """Draw the tokens of the last step's rows again, with all that a request can ask for.

        Returns:
            The state, the tokens, and their scores before any change of the logits.
        """
        logits = self.logits(weights, state, slots)
        rows = self._take_rows(state.rows, slots)
        tokens, scores = self._draw_all(logits, rows, state)
        return self._put_rows(state, rows, tokens), tokens, scores

    def score_prompt(
        self,
        weights: list[Weight],
        state: DeviceState,
        packed: Int32[Array, " n"],
    ) -> tuple[DeviceState, Scores]:
        """Score tokens of prompts by the hidden states that the last prefill has kept.

        Args:
            packed: for each shard of the batch the indices of some of its tokens, and then the
                token that follows each.
        """
        indices, tokens = self._split(packed)
        nowhere: Any = None  # no token attends here
        backend = self._backend(self.decode, nowhere, state.collectives)
        hidden = self._take_rows(state.prompt, indices)
        logits = self._logits(self._model(weights), hidden, backend)
        return state, self._score(logits, tokens, state.collectives)

    def put_options(self, state: DeviceState, packed: Int32[Array, " n"]) -> DeviceState:
        """Write the options of some slots, the same number in each shard of the batch."""
        edits, allowed = self._put_options(packed, state.edits, state.allowed)
        return state._replace(edits=edits, allowed=allowed)

    def put_masks(self, state: DeviceState, packed: Int32[Array, " n"]) -> DeviceState:
        """Write the allowed tokens alone of some slots, the same number in each shard."""
        return state._replace(allowed=self._put_masks(packed, state.allowed))

    def logits(
        self,
        weights: list[Weight],
        state: DeviceState,
        slots: Int32[Array, " B"],
    ) -> Float[Array, "B V"]:
        """The float32 logits of the last step's rows, with the padded vocabulary's at the end."""
        nowhere: Any = None  # no token attends here
        backend = self._backend(self.decode, nowhere, state.collectives)
        hidden = self._kept_hidden(state.hidden, slots)
        return self._logits(self._model(weights), hidden, backend)

    def _decode_step(
        self, weights, state: DeviceState, rows: DecodeRows, last_tokens, step
    ) -> tuple[DeviceState, Float[Array, "B D"], Int32[Array, " B"]]:
        """One decode step of a call; returns the state, the hidden states and the tokens."""
        inputs = self._decode_inputs(rows, last_tokens, step)
        state, hidden, logits = self._forward(weights, state, inputs, self.decode)
        positions = inputs.positions + 1
        tokens = self._draw(logits, rows.sampling, positions, state.collectives, filtered=False)
        return state, hidden, tokens

    def _forward(
        self, weights, state: DeviceState, inputs: StepInputs, attention: str
    ) -> tuple[DeviceState, Float[Array, "B D"], Float[Array, "B V"]]:
        """Run the model; returns the state, and hidden state and logits of each row's last token.

        The weights are put together here, inside the loop of decode steps, so that XLA reads them
        where they lie.
        """
        model = self._model(weights)
        backend = self._backend(attention, inputs.batch, state.collectives)
        hidden, cache = model(inputs.token_ids, inputs.positions, backend, state.cache)
        if inputs.batch.query_starts is not None:  # else each row has one token
            state = state._replace(prompt=self._keep_hidden(state.prompt, hidden))
            hidden = self._take_rows(hidden, inputs.sample_indices)
        return state._replace(cache=cache), hidden, self._logits(model, hidden, backend)

    def _after_decode(self, state: DeviceState, rows, tokens) -> DeviceState:
        """The state with its tables brought up to date.

        Args:
            rows: as they were before the decode steps.
            tokens: that the steps have drawn, [steps, B].
        """
        known = self._remember(state.token_ids, rows, tokens)
        return self._put_rows(state._replace(token_ids=known), rows, tokens[-1])

    def _model(self, weights: list[Weight]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, stack(weights)))

    def _backend(
        self, attention: str, batch: PagedBatch, collectives: Collectives | None
    ) -> XlaBackend:
        if attention == "xla":
            return XlaBackend(self.sharding, batch, attention)
        return GpuBackend(self.sharding, batch, attention, collectives, self.one_kernel)

    def _logits(self, model: Decoder, hidden, backend: XlaBackend) -> Float[Array, "B V"]:
        return backend.constrain(model.logits(hidden, backend), "batch", "vocab")

    # The rest works on each shard of the batch by itself. It is jitted for the eager engine's sake:
    # a shard_map is slow to run operation by operation. The cache stays out of it, since what
    # passes through a jitted function undonated is copied.

    @functools.partial(jax.jit, static_argnames=("self", "bucket"))
    def _read_prefill(self, packed, known, table, bucket: Bucket):
        """The rows, what the step computes with, and the tokens that the cache holds after it."""

        def on_shard(packed, known, table):
            token_ids, rows = read_prefill(packed, bucket)
            decodes = None
            if bucket.is_mixed:  # with a barrier as in `_read_decode`
                rows, decodes = read_mixed(rows, table, self.block_size)
                rows = jax.lax.optimization_barrier(rows)
            inputs = prefill_inputs(token_ids, rows, self.block_size, decodes)
            return rows, inputs, _remember(known, inputs.batch.slot_mapping, inputs.token_ids)

        return self._by_row(on_shard)(packed, known, table)

    @functools.partial(jax.jit, static_argnames="self")
    def _read_decode(self, packed, table):
        """The rows of a decode call, whole and taken apart.

        Barriers keep XLA from reading the table again after it has been written, and from taking
        the rows apart in each step of the call.
        """

        def on_shard(packed, table):
            rows = read_decode(packed, table, self.block_size)
            rows = jax.lax.optimization_barrier(rows)
            return rows, jax.lax.optimization_barrier(decode_rows(rows))

        return self._by_row(on_shard)(packed, table)

    @functools.partial(jax.jit, static_argnames="self")
    def _decode_inputs(self, rows, last_tokens, step):
        def on_shard(rows, last_tokens, step):
            return decode_inputs(rows, last_tokens, step, self.block_size)

        by_row, one = self.sharding.spec("batch"), self.sharding.spec()
        read = self.sharding.shard_map(on_shard, (by_row, by_row, one), by_row)
        return read(rows, last_tokens, step)

    @functools.partial(jax.jit, static_argnames="self")
    def _remember(self, known, rows, tokens):
        """The tokens that the cache holds after decode steps that have drawn `tokens`."""

        def on_shard(known, rows, tokens):
            computed = jnp.concatenate([rows[None, :, Column.LAST_TOKEN], tokens.T[:-1]])
            steps = jnp.arange(len(computed))[:, None]
            slots = decoded_slots(decode_rows(rows), steps, self.block_size)
            return _remember(known, slots, computed)

        return self._by_row(on_shard)(known, rows, tokens.T)

    @functools.partial(jax.jit, static_argnames="self")
    def _take_rows(self, table, indices):
        def on_shard(table, indices):
            return table.at[indices].get(mode="promise_in_bounds")

        return self._by_row(on_shard)(table, indices)

    @functools.partial(jax.jit, static_argnames="self")
    def _keep_hidden(self, kept, hidden):
        spec = self.sharding.spec("batch", "activation_embed")
        put = self.sharding.shard_map(lambda k, h: k.at[: len(h)].set(h), (spec, spec), spec)
        return put(kept, hidden)

    @functools.partial(jax.jit, static_argnames="self")
    def _kept_hidden(self, kept, slots):
        spec, by_row = self.sharding.spec("batch", "activation_embed"), self.sharding.spec("batch")
        take = self.sharding.shard_map(lambda k, s: k[: len(s)], (spec, by_row), spec)
        return take(kept, slots)

    def _put_rows(self, state: DeviceState, rows, last_tokens) -> DeviceState:
        """The state with these rows, as they are after the call, in its table."""
        return state._replace(rows=self._put(state.rows, rows, last_tokens))

    @functools.partial(jax.jit, static_argnames="self")
    def _put(self, table, rows, last_tokens):
        def on_shard(table, rows, last_tokens):
            at = table.at[rows[:, Column.SLOT]]
            return at.set(advanced(rows, last_tokens), mode="promise_in_bounds")

        return self._by_row(on_shard)(table, rows, last_tokens)

    @functools.partial(jax.jit, static_argnames=("self", "filtered"))
    def _draw(self, logits, sampling: Sampling, positions, collectives, *, filtered: bool):
        """Draw a token for each row, for these positions."""

        def on_shard(logits, sampling, positions, collectives):
            return self._draw_here(logits, sampling, positions, collectives, filtered)

        spec = self.sharding.spec
        by_row, layout = spec("batch"), Collectives.spec(self.sharding)
        in_axes = (spec("batch", "vocab"), by_row, by_row, layout)
        draw = self.sharding.shard_map(on_shard, in_axes, by_row)
        return draw(logits, sampling, positions, collectives)

    def _draw_all(self, logits, rows, state: DeviceState) -> tuple[Int32[Array, " B"], Scores]:
        """Change the logits of rows as they ask, draw tokens from what is left, and score them."""
        # The cache stays out of the jitted function, as above.
        tables = state.token_ids, state.edits, state.allowed
        return self._draw_all_of(logits, rows, tables, state.collectives)

    @functools.partial(jax.jit, static_argnames="self")
    def _draw_all_of(self, logits, rows, tables, collectives):
        def on_rows(tables, collectives, logits, rows):
            known, edits, allowed = tables
            edited = edit_logits(
                logits, history_of(rows, known), allowed_of_rows(rows, allowed),
                edits_of_rows(rows, edits), penalties_of(rows), axis=self._vocab_axis,
            )  # fmt: skip
            sampling, positions = sampling_of(rows), rows[:, Column.START]
            tokens = self._draw_here(edited, sampling, positions, collectives, filtered=True)
            return tokens, self._score_here(logits, tokens, collectives)

        def on_shard(logits, rows, tables, collectives):
            run = functools.partial(on_rows, tables, collectives)
            if len(rows) <= ROWS_AT_ONCE:
                return run(logits, rows)
            parts = jax.tree.map(lambda x: x.reshape(-1, ROWS_AT_ONCE, x.shape[1]), (logits, rows))
            results = jax.lax.map(lambda part: run(*part), parts)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

        spec = self.sharding.spec
        by_row, layout = spec("batch"), Collectives.spec(self.sharding)
        in_axes = (spec("batch", "vocab"), by_row, by_row, layout)
        draw = self.sharding.shard_map(on_shard, in_axes, by_row)
        return draw(logits, rows, tables, collectives)

    @functools.partial(jax.jit, static_argnames="self")
    def _score(self, logits, tokens, collectives) -> Scores:
        spec = self.sharding.spec
        by_row, layout = spec("batch"), Collectives.spec(self.sharding)
        in_axes = (spec("batch", "vocab"), by_row, layout)
        run = self.sharding.shard_map(self._score_here, in_axes, by_row)
        return run(logits, tokens, collectives)

    def _draw_here(
        self, logits, sampling: Sampling, positions, collectives, filtered: bool
    ) -> Int32[Array, " B"]:
        """Draw tokens under `shard_map`, on a device's shard of the vocabulary."""
        axis, (largest_key, total) = self._vocab_axis, self._exchange(collectives)
        options = {"vocab_size": self.vocab_size, "axis": axis, "largest_key": largest_key}
        if filtered:
            return filter_and_sample(
                logits, sampling.temperatures, sampling.top_k, sampling.top_p, sampling.min_p,
                sampling.seeds, positions, total=total, **options,
            )  # fmt: skip
        return sample(logits, sampling.temperatures, sampling.seeds, positions, **options)

    def _score_here(self, logits, tokens, collectives) -> Scores:
        """Score tokens under `shard_map`, on a device's shard of the vocabulary."""
        largest_key, total = self._exchange(collectives)
        return score(
            logits, tokens, vocab_size=self.vocab_size, axis=self._vocab_axis,
            total=total, largest_key=largest_key,
        )  # fmt: skip

    @functools.partial(jax.jit, static_argnames="self")
    def _put_options(self, packed, edits, allowed):
        def on_shard(packed, edits, allowed):
            slots, new_edits, words = read_options(packed, allowed.shape[1])
            put = functools.partial(_put_at, slots)
            return put(edits, new_edits), put(allowed, words)

        return self._by_row(on_shard)(packed, edits, allowed)

    @functools.partial(jax.jit, static_argnames="self")
    def _put_masks(self, packed, allowed):
        def on_shard(packed, allowed):
            slots, words = read_masks(packed, allowed.shape[1])
            return _put_at(slots, allowed, words)

        return self._by_row(on_shard)(packed, allowed)

    @functools.partial(jax.jit, static_argnames="self")
    def _split(self, packed):
        return self._by_row(lambda packed: tuple(packed.reshape(2, -1)))(packed)

    @property
    def _vocab_axis(self) -> tuple[str, ...]:
        """The mesh axes that the vocabulary is split over."""
        shape = self.sharding.mesh.shape
        return tuple(a for a in self.sharding.mesh_axes("vocab") if shape[a] > 1)

    def _exchange(self, collectives: Collectives | None) -> tuple[Callable | None, Callable | None]:
        """Maximum and sum over the devices that share the vocabulary; None: XLA's."""
        if collectives is None or self._vocab_axis != (AXIS,):
            return None, None
        return collectives.max, collectives.total

    def _by_row(self, on_shard: Callable) -> Callable:
        """Run a function of arrays that are split by row or by page on each shard of the batch."""
        rows = self.sharding.spec("batch")

        def run(*arrays):
            return self.sharding.shard_map(on_shard, (rows,) * len(arrays), rows)(*arrays)

        return run


def _remember(
    known: Int32[Array, "P+1 S"], slots: Int32[Array, "..."], token_ids: Int32[Array, "..."]
) -> Int32[Array, "P+1 S"]:
    """Put tokens into the table of those that the cache holds; -1 among the slots: nowhere."""
    padding = known.size - 1
    at = known.reshape(-1).at[jnp.where(slots < 0, padding, slots)]
    return at.set(token_ids, mode="promise_in_bounds").reshape(known.shape)


def _put_at(slots: Int32[Array, " N"], table: Array, values: Array) -> Array:
    return table.at[slots].set(values, mode="promise_in_bounds")
