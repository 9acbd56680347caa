"""Runs batches on the devices: owns weights, KV cache and dispatch."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver, host, memory
from nanovllm_jax.engine.ambient import default_settings
from nanovllm_jax.engine.inputs import Packer, PreparedBatch
from nanovllm_jax.engine.multihost import check_same_options, smallest
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.layers.collectives import Collectives
from nanovllm_jax.layers.kv_cache import balance_keys_and_values
from nanovllm_jax.sharding import make_sharding, place
from nanovllm_jax.weights import layers_apart, load_weights, random_weights

log = logging.getLogger("nanovllm_jax")


class TokenFuture:
    """The tokens that a call samples, on their way to the host."""

    def __init__(self, tokens: jax.Array, order: list[int]):
        self._tokens, self._order = tokens, order
        tokens.copy_to_host_async()

    def result(self) -> list[list[int]]:
        """Wait for the tokens: for each step, one for each row of the batch."""
        return np.atleast_2d(np.asarray(self._tokens))[:, self._order].tolist()


class ModelRunner:
    """Owns what is on the devices: the weights, and the state that steps update in place.

    `dispatch` is `prepare_inputs`, then `run`, then `sample` if the batch asks for it; or
    `run_steps` for several decode steps.
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

    def dispatch(self, batch: Batch) -> TokenFuture:
        """Start a step on the devices and return at once; its tokens come with the future."""
        inputs = self.prepare_inputs(batch)
        if batch.num_steps > 1:
            return TokenFuture(self.run_steps(inputs), inputs.order)
        tokens = self.run(inputs)
        if any(seq.params.filters for seq in batch.seqs):
            tokens = self.sample(inputs)
        return TokenFuture(tokens, inputs.order)

    def prepare_inputs(self, batch: Batch) -> PreparedBatch:
        """Pack a batch for the smallest bucket that holds it."""
        shards = [batch.rows_of(shard) for shard in range(self.programs.batch_shards)]
        num_rows = max(map(len, shards))
        if batch.is_prefill:
            num_tokens = max(sum(batch.lengths[i] for i in shard) for shard in shards)
            buckets = self.programs.prefill_buckets
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
        for bucket in 2 * list(self.programs.steps):
            inputs = self.packer.padding(bucket, self.programs.batch_shards)

            def run(inputs=inputs):
                with default_settings():  # it runs in a thread of its own
                    if inputs.bucket in self.programs.decode_steps:
                        self.run_steps(inputs)
                    self.run(inputs)
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

    def shut_down(self) -> None:
        """Give all device memory back."""
        _delete((self.weights, self.state, self.mailboxes))
        self.weights, self.mailboxes = [], None
        self.programs.steps, self.programs.decode_steps, self.programs.samples = {}, {}, {}

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
            step = self.programs.step_bytes(self.weights)
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
