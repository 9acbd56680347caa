"""Runs batches on the devices: owns weights, KV cache and dispatch."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver, host, memory
from nanovllm_jax.engine.ambient import default_settings
from nanovllm_jax.engine.inputs import NUM_OPTIONS, NUM_SCORED, Packer, PreparedBatch
from nanovllm_jax.engine.multihost import check_same_options, smallest
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.token_scores import ScoreLists, StepScores, TokenScores
from nanovllm_jax.layers.collectives import Collectives
from nanovllm_jax.layers.kv_cache import balance_keys_and_values
from nanovllm_jax.layers.scores import Scores
from nanovllm_jax.sharding import make_sharding, place
from nanovllm_jax.weights import layers_apart, load_weights, random_weights

log = logging.getLogger("nanovllm_jax")


class Undrawn(NamedTuple):
    """A step that runs, and whose tokens wait for those of the step before it; see `draw`."""

    batch: Batch
    inputs: PreparedBatch
    tokens: jax.Array  # as drawn from the step's own logits


class TokenFuture:
    """The tokens that a call samples, and their scores, on their way to the host.

    Args:
        order: index, among the rows of `tokens`, of each row of the batch.
        scores: of the tokens, if a row wants them.
        prompts: scores of tokens of prompts, if a row wants them.
    """

    def __init__(
        self,
        tokens: jax.Array,
        order: list[int],
        scores: Scores | None = None,
        prompts: "PromptScores | None" = None,
    ):
        self._tokens, self._order = tokens, order
        self._scores, self._prompts = scores, prompts
        for array in jax.tree.leaves((tokens, scores, prompts and prompts.calls)):
            array.copy_to_host_async()

    def result(self) -> list[list[int]]:
        """Wait for the tokens: for each step, one for each row of the batch."""
        return np.atleast_2d(np.asarray(self._tokens))[:, self._order].tolist()

    def scores(self) -> "StepScores | None":
        """Wait for the scores; None if there are none."""
        if self._scores is None and self._prompts is None:
            return None
        rows = self._scores and ScoreLists.of(self._scores)
        prompts = self._prompts.by_row() if self._prompts else {}
        return CallScores(rows, self._order, prompts)


@dataclass(frozen=True)
class CallScores:
    """What a call has scored; see `StepScores`."""

    rows: ScoreLists | None
    order: list[int]  # see `TokenFuture`
    prompts: dict[int, list[tuple[int, TokenScores]]]

    def of_row(self, row: int, token_id: int, count: int) -> TokenScores:
        assert self.rows is not None
        return self.rows.at(self.order[row], token_id, count)

    def of_prompt(self, row: int) -> list[tuple[int, TokenScores]]:
        return self.prompts.get(row, [])


class ScoredToken(NamedTuple):
    """A token of a prompt that a prefill has to score."""

    row: int  # in the batch
    index: int  # of the token before it, among the prefill's tokens of its shard
    position: int
    token_id: int
    count: int  # likeliest tokens that are wanted beside it


class PromptScores(NamedTuple):
    """Scores of tokens of prompts, on their way to the host."""

    shards: list[list[ScoredToken]]
    calls: list[Scores]  # each of NUM_SCORED tokens of every shard

    def by_row(self) -> dict[int, list[tuple[int, TokenScores]]]:
        """Wait for them: for each row of the batch, the position and scores of its tokens."""
        calls = [ScoreLists.of(call) for call in self.calls]
        found: dict[int, list[tuple[int, TokenScores]]] = {}
        for number, shard in enumerate(self.shards):
            for i, token in enumerate(shard):
                place = number * NUM_SCORED + i % NUM_SCORED
                scores = calls[i // NUM_SCORED].at(place, token.token_id, token.count)
                found.setdefault(token.row, []).append((token.position, scores))
        return found


class ModelRunner:
    """Owns what is on the devices: the weights, and the state that steps update in place.

    `dispatch` is `prepare_inputs`, then `run`, then `sample` or `sample_all` if the batch asks for
    it, then `score_prompts`; or `run_steps` for several decode steps.
    """

    def __init__(self, config: EngineConfig):
        check_same_options(config)
        self.config = config
        self.sharding = make_sharding(config.mesh_shape, config.sharding_rules)
        self.programs = Programs(config, self.sharding)
        self.packer = Packer(
            config.max_num_seqs, self.programs.table_width, config.kvcache_block_size
        )
        with memory.memory_errors(self.describe_memory):
            self.weights = self._load_weights()
            self.num_blocks = config.num_kvcache_blocks or self._num_cache_blocks()
            self.state = self.mailboxes = None
            self.renew_state()
            self.programs.compile(self.weights, self.num_blocks)
            if self.programs.platform == "gpu" and not config.enforce_eager:
                self.warm_up()

    def dispatch(self, batch: Batch) -> TokenFuture | Undrawn:
        """Start a step on the devices and return at once; its tokens come with the future.

        Where what may be drawn depends on a token that the host has not read, only the part of the
        step up to its hidden states starts, which needs the token itself, but no mask.
        """
        inputs = self.prepare_inputs(batch)
        if batch.num_steps > 1:
            return TokenFuture(self.run_steps(inputs), inputs.order)
        undrawn = Undrawn(batch, inputs, self.run(inputs))
        rows = zip(batch.seqs, batch.yields_token, strict=True)
        if any(seq.matcher and yields and seq.in_flight > 1 for seq, yields in rows):
            return undrawn
        return self.draw(undrawn)

    def draw(self, undrawn: Undrawn) -> TokenFuture:
        """Draw the tokens of the last step, if its own drawing is not all that its rows ask for."""
        batch, inputs, tokens = undrawn
        order, scores, prompts = inputs.order, None, None
        drawn = [s for s, yields in zip(batch.seqs, batch.yields_token, strict=True) if yields]
        if any(seq.needs_sample_all for seq in drawn):
            self.put_options(batch)
            self.put_masks(batch)
            tokens, scores, order = self.sample_all(inputs)
            if all(seq.params.logprobs is None for seq in drawn):
                scores = None
        elif any(seq.params.filters for seq in drawn):
            tokens = self.sample(inputs)
        if batch.is_prefill and any(seq.wants_prompt_scores for seq in batch.seqs):
            prompts = self.score_prompts(batch)
        return TokenFuture(tokens, order, scores, prompts)

    def prepare_inputs(self, batch: Batch) -> PreparedBatch:
        """Pack a batch for the smallest bucket that holds it."""
        shards = [batch.rows_of(shard) for shard in range(self.programs.batch_shards)]
        num_rows = max(map(len, shards))
        if batch.is_prefill:
            num_tokens = max(sum(batch.lengths[i] for i in shard) for shard in shards)
            programs = self.programs
            buckets = programs.mixed_buckets if batch.num_decodes else programs.prefill_buckets
        else:
            num_tokens, buckets = 0, self.programs.decode_buckets
        bucket = next(b for b in buckets if b.num_tokens >= num_tokens and b.num_rows >= num_rows)
        return self.packer.prepare(batch, bucket, shards)

    def run(self, inputs: PreparedBatch) -> Int32[Array, " B"]:
        """Start the step; returns the tokens that it samples."""
        step, packed = self.programs.steps[inputs.bucket], self._place(inputs.packed)
        self.state, tokens = step(self.weights, self.state, packed)
        return tokens

    def run_steps(self, inputs: PreparedBatch) -> Int32[Array, "steps B"]:
        """Start several decode steps; returns the tokens of each."""
        steps, packed = self.programs.decode_steps[inputs.bucket], self._place(inputs.packed)
        self.state, tokens = steps(self.weights, self.state, packed)
        return tokens

    def sample(self, inputs: PreparedBatch) -> Int32[Array, " B"]:
        """Draw the tokens of the last step again, with top-k, top-p and min-p."""
        sample, slots = self.programs.samples[inputs.bucket.num_rows], self._place(inputs.slots)
        self.state, tokens = sample(self.weights, self.state, slots)
        return tokens

    def sample_all(self, inputs: PreparedBatch) -> tuple[Int32[Array, " B"], Scores, list[int]]:
        """Draw the tokens of the last step again, with all options.

        Returns:
            The tokens, their scores, and the place of each of the batch's rows among them: the
            program may have more rows than the step.
        """
        num_rows, shards = inputs.bucket.num_rows, self.programs.batch_shards
        size = self._sample_all_size(num_rows)
        slots = np.full((shards, size), self.packer.padding_slot, np.int32)
        slots[:, :num_rows] = inputs.slots.reshape(shards, num_rows)
        sample = self.programs.samples_all[size]
        self.state, tokens, scores = sample(self.weights, self.state, self._place(slots.ravel()))
        order = [place // num_rows * size + place % num_rows for place in inputs.order]
        return tokens, scores, order

    def put_options(self, batch: Batch) -> None:
        """Have the devices know the options of all rows that have long ones."""
        shards: list[list[Sequence]] = [[] for _ in range(self.programs.batch_shards)]
        for seq in batch.seqs:
            if seq.has_options and self.slot_options.get(seq.slot) != seq.seq_id:
                self.slot_options[seq.slot] = seq.seq_id
                shards[seq.shard].append(seq)
        for start in range(0, max(map(len, shards)), NUM_OPTIONS):
            self._put_options([seqs[start : start + NUM_OPTIONS] for seqs in shards])

    def _put_options(self, shards: list[list[Sequence]]) -> None:
        packed = self.packer.options(shards, self.programs.num_words)
        assert self.programs.put_options
        self.state = self.programs.put_options(self.state, self._place(packed))

    def put_masks(self, batch: Batch) -> None:
        """Have the devices know which tokens may come next, in rows whose outputs have a form."""
        shards: list[list[Sequence]] = [[] for _ in range(self.programs.batch_shards)]
        for seq, yields in zip(batch.seqs, batch.yields_token, strict=True):
            if seq.matcher and yields and not seq.is_finished:
                shards[seq.shard].append(seq)
        if most := max(map(len, shards)):
            self._put_masks(shards, self._sample_all_size(most))

    def _put_masks(self, shards: list[list[Sequence]], num_rows: int) -> None:
        packed = self.packer.masks(shards, num_rows, self.programs.num_words)
        self.state = self.programs.put_masks[num_rows](self.state, self._place(packed))

    def _sample_all_size(self, num_rows: int) -> int:
        """The fewest rows that `sample_all` and `put_masks` are compiled for and that suffice."""
        return min(size for size in self.programs.samples_all if size >= num_rows)

    def score_prompts(self, batch: Batch) -> PromptScores:
        """Score the prompts' tokens that follow those of the last prefill, where wanted."""
        shards: list[list[ScoredToken]] = []
        for shard in range(self.programs.batch_shards):
            wanted, first = [], 0
            for row in batch.rows_of(shard):
                seq, start, length = batch.seqs[row], batch.starts[row], batch.lengths[row]
                count = seq.params.prompt_logprobs
                if seq.wants_prompt_scores and count is not None:
                    end = min(start + length, seq.num_prompt_tokens - 1)
                    wanted += [
                        ScoredToken(row, first + i - start, i + 1, seq.token_ids[i + 1], count)
                        for i in range(start, end)
                    ]
                first += length
            shards.append(wanted)
        requests = [[(token.index, token.token_id) for token in wanted] for wanted in shards]
        calls = [self._score_prompt(packed) for packed in self.packer.score_requests(requests)]
        return PromptScores(shards, calls)

    def _score_prompt(self, packed: Int32[np.ndarray, " n"]) -> Scores:
        assert self.programs.score_prompt
        score = self.programs.score_prompt
        self.state, scores = score(self.weights, self.state, self._place(packed))
        return scores

    def logits(self, inputs: PreparedBatch) -> Float[np.ndarray, "B V"]:
        """The float32 logits of the last step's rows; to look into numerics, not to serve."""
        slots = self._place(inputs.slots)
        logits = jax.jit(self.programs.functions.logits)(self.weights, self.state, slots)
        return np.asarray(logits)[:, : self.config.model_config.vocab_size]

    def warm_up(self) -> None:
        """Run each program on nothing but padding, so that no request waits for its first runs.

        Kernels are loaded at a program's first run, and its CUDA graph is made at the second.
        """
        smallest(0)  # several processes begin together, so that none waits for another's compiler
        nobody: list[list[Sequence]] = [[] for _ in range(self.programs.batch_shards)]
        for bucket in 2 * list(self.programs.steps):
            inputs = self.packer.padding(bucket, self.programs.batch_shards)

            def run(inputs=inputs):
                with default_settings():  # it runs in a thread of its own
                    if inputs.bucket in self.programs.decode_steps:
                        self.run_steps(inputs)
                    self.run(inputs)
                    self._put_options(nobody)
                    self._put_masks(nobody, self._sample_all_size(inputs.bucket.num_rows))
                    self.sample_all(inputs)
                    for packed in self.packer.score_requests([[(0, 0)] for _ in nobody]):
                        self._score_prompt(packed)
                    self.sample(inputs).block_until_ready()

            memory.finish_in_time(
                run, f"the first run of the step of {bucket}", self.describe_memory
            )

    def renew_state(self) -> None:
        """Make the state, with an empty cache; the one before is lost."""
        _delete((self.state, self.mailboxes))
        collectives = None
        if self.programs.uses_collectives:
            collectives, self.mailboxes = Collectives.make(self.sharding)
        self.state = self.programs.make_state(self.num_blocks, collectives)
        self.slot_options: dict[int, int] = {}  # slot -> the sequence whose options it has

    def shut_down(self) -> None:
        """Give all device memory back."""
        _delete((self.weights, self.state, self.mailboxes))
        self.weights, self.mailboxes = [], None
        programs = self.programs
        programs.steps, programs.decode_steps = {}, {}
        programs.samples, programs.samples_all = {}, {}
        programs.put_masks, programs.score_prompt, programs.put_options = {}, None, None

    def describe_memory(self) -> str:
        """The devices' memory in words."""
        return memory.describe(*self._memory())

    def _memory(self) -> tuple[list[memory.Pool], list[cuda_driver.GpuMemory]]:
        """What JAX and the driver tell of this process's devices; see `memory.describe`."""
        devices = self.sharding.mesh.local_devices
        gpus = cuda_driver.memory() if self.programs.platform == "gpu" else []
        return (
            [device.memory_stats() for device in devices],
            [gpus[device.local_hardware_id] for device in devices if gpus],
        )

    def _load_weights(self) -> list:
        """The flat list of weights that the programs take."""
        config, model_config = self.config, self.programs.model_config
        if config.load_format == "dummy":
            weights = random_weights(model_config, self.sharding, config.seed)
        else:
            weights = load_weights(model_config, self.sharding, Path(config.model))
        if config.kv_cache_dtype == "fp8":
            layout = jax.tree.map(lambda w: w.sharding, weights)
            balance = jax.jit(balance_keys_and_values, donate_argnums=0, out_shardings=layout)
            weights: nnx.State = balance(weights)
        if self.programs.platform == "cpu" and not config.enforce_eager:
            return layers_apart(weights)
        return jax.tree.leaves(weights)

    def _num_cache_blocks(self) -> int:
        """How many blocks of KV cache fit for each shard of the batch; ValueError if none."""
        c, config = self.programs.model_config, self.config
        heads = c.num_kv_heads // self.sharding.size("kv_heads")
        token_bytes = 2 * c.num_layers * heads * c.head_dim * self.programs.cache_dtype.itemsize
        block_bytes = (token_bytes + 4) * config.kvcache_block_size  # with the token's id
        if self.programs.platform == "cpu":
            budget = memory.cpu_budget(host.memory_bytes())
            most = config.max_num_seqs * self.programs.table_width
        else:
            sizes = memory.sizes(*self._memory())
            step = self.programs.step_bytes(self.weights) + self.programs.state_bytes
            budget = memory.gpu_budget(sizes, step, config.gpu_memory_utilization)
            most = None
        blocks = memory.num_cache_blocks(budget, block_bytes, most)
        blocks = smallest(self.programs.addressable_blocks(blocks))  # of the processes'
        log.info(
            "KV cache: %s / %.2f MiB a block: %d blocks of %d tokens",
            budget.account, block_bytes / memory.MIB, blocks, config.kvcache_block_size,
        )  # fmt: skip
        return blocks

    def _place(self, x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """An input in the form that programs take: with several processes, on the devices."""
        if jax.process_count() == 1 or isinstance(x, jax.Array):
            return x
        return place(x, self.programs.rows_sharding)


def _delete(arrays: Any) -> None:
    """Free a tree of arrays, of which a step may have taken some."""
    for array in jax.tree.leaves(arrays):
        if not array.is_deleted():
            array.delete()
