"""Runs batches on the devices: bucketed compiled steps, the donated cache, futures of tokens."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.inputs import RowTable
from nanovllm_jax.engine.multihost import check_same_options, smallest
from nanovllm_jax.engine.program_cache import ProgramCache
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.engine.step import LayerWeights
from nanovllm_jax.sharding import make_sharding, place
from nanovllm_jax.weights import load_weights, random_weights

PROBE_BLOCKS = 8  # cache size with which a program's temporary memory is found out
GPU_MARGIN_BYTES = 512 << 20  # for what the compiler's account leaves out, cuBLAS workspaces say
CPU_CACHE_SHARE = 1 / 32  # of the machine's memory


class Bucket(NamedTuple):
    """A shape that steps are padded to: of tokens (prefill), or of rows (decode, tokens = 0).

    Of each shard, where the batch is sharded.
    """

    num_tokens: int
    num_rows: int


def decode_buckets(max_num_seqs: int) -> list[Bucket]:
    """Batch sizes: powers of two, from 64 on also the steps half-way between, up to any maximum."""
    exponents = max_num_seqs.bit_length()
    sizes = {1 << k for k in range(exponents)} | {3 << k for k in range(5, exponents)}
    sizes = sorted(size for size in sizes if size < max_num_seqs)
    return [Bucket(0, size) for size in [*sizes, max_num_seqs]]


def prefill_buckets(max_num_batched_tokens: int, max_num_seqs: int) -> list[Bucket]:
    """Token counts: powers of two from 64 up to any maximum, with room for a row in 8 tokens.

    So a batch of short rests behind cached prefixes needs no long bucket, and the logits of the
    rows stay a small part of the step.
    """
    sizes = {1 << k for k in range(6, max_num_batched_tokens.bit_length())}
    sizes = sorted(size for size in sizes if size < max_num_batched_tokens)
    return [
        Bucket(size, max(8, min(max_num_seqs, size // 8)))
        for size in [*sizes, max_num_batched_tokens]
    ]


class TokenFuture:
    """A step's sampled tokens on their way to the host."""

    def __init__(self, tokens: jax.Array, rows: list[int]):
        self._tokens, self._rows = tokens, rows  # of the device's rows, those of the batch
        tokens.copy_to_host_async()

    def result(self) -> list[int]:
        """Wait for the tokens, one for each row of the batch."""
        return np.asarray(self._tokens)[self._rows].tolist()


class ModelRunner:
    """Owns what is on the devices: weights, KV cache, last tokens, compiled programs."""

    def __init__(self, config: EngineConfig):
        _claim_gpu_memory()
        _use_compilation_cache()
        check_same_options(config)
        self.config = config
        self.sharding = make_sharding(config.mesh_shape or {}, config.sharding_rules)
        self.programs = Programs(config, self.sharding)
        self.batch_shards, self.platform = self.programs.batch_shards, self.programs.platform
        self.model_config, model = self.programs.model_config, self.programs.model

        if config.load_format == "dummy":
            weights = random_weights(model, self.model_config, self.sharding, config.seed)
        else:
            weights = load_weights(model, self.model_config, self.sharding, Path(config.model))
        if config.kv_cache_dtype == "fp8":
            layout = jax.tree.map(lambda w: w.sharding, weights)
            scale = jax.jit(model.scale_for_8_bits, donate_argnums=0, out_shardings=layout)
            weights = scale(weights)
        self.weights = jax.tree.leaves(weights)
        if self.platform == "cpu" and not config.enforce_eager:
            self._unstack_weights(weights)

        self.table = RowTable(config.max_num_seqs, self.programs.table_width)
        num_seqs = -(-config.max_num_seqs // self.batch_shards)
        num_tokens = -(-config.max_num_batched_tokens // self.batch_shards)
        self.decode_buckets = decode_buckets(num_seqs)
        self.prefill_buckets = prefill_buckets(num_tokens, num_seqs)
        self.program_cache = self._program_cache()
        self.mailboxes = self.programs.make_mailboxes()
        self.num_blocks = config.num_kvcache_blocks or self._size_cache()
        addresses = self.mailboxes.addresses if self.mailboxes else None
        self.state = self.programs.make_state(self.num_blocks)._replace(mailbox=addresses)
        self.steps: dict[Bucket, Callable] = {}
        self.redraws: dict[int, Callable] = {}
        if config.enforce_eager:
            self._use_eager_steps()
        else:
            self._compile_all(self.num_blocks)
            if self.platform == "gpu":
                self._warm_up()

    def dispatch(self, batch: Batch) -> TokenFuture:
        """Start a step on the devices and return at once; its tokens come with the future."""
        shards = [batch.rows_of(shard) for shard in range(self.batch_shards)]
        num_rows = max(map(len, shards))
        num_tokens = max(sum(batch.lengths[i] for i in shard) for shard in shards)
        buckets = self.prefill_buckets if batch.is_prefill else self.decode_buckets
        bucket = next(
            b
            for b in buckets
            if b.num_rows >= num_rows and (b.num_tokens >= num_tokens or not batch.is_prefill)
        )
        filters = any(seq.params.filters for seq in batch.seqs)
        tokens = self._run(bucket, [self._pack(batch, shard, bucket) for shard in shards], filters)
        position = {
            i: s * bucket.num_rows + k
            for s, shard in enumerate(shards)
            for k, i in enumerate(shard)
        }
        return TokenFuture(tokens, [position[i] for i in range(len(batch.seqs))])

    def _run(
        self, bucket: Bucket, parts: list[tuple[np.ndarray, np.ndarray]], filters: bool
    ) -> jax.Array:
        """Start the step of a bucket on the shards' rows and inputs; returns its tokens."""
        rows, packed = (np.concatenate(part) for part in zip(*parts, strict=True))
        packed = self._input(packed)
        self.state, tokens, logits = self.steps[bucket](self.weights, self.state, packed)
        if filters:
            rows = self._input(rows)
            self.state, tokens = self.redraws[bucket.num_rows](self.state, logits, rows)
        return tokens

    def _warm_up(self) -> None:
        """Run each program on nothing but padding, so that no request waits for its first runs.

        Kernels are loaded at a program's first run, and its CUDA graph is made at the second.
        """
        for bucket in 2 * list(self.steps):
            rows = self.table.gather([], [], [], bucket.num_rows)
            token_ids = np.zeros(bucket.num_tokens, np.int32)
            part = rows, np.concatenate([token_ids, rows.ravel()])
            tokens = self._run(bucket, [part] * self.batch_shards, filters=True)
            tokens.block_until_ready()  # there is memory for two steps' results, not for all

    def _input(self, x: np.ndarray) -> np.ndarray | jax.Array:
        """A step's input in the form that programs take: with several processes, on the devices."""
        return place(x, self.programs.rows_sharding) if jax.process_count() > 1 else x

    def shut_down(self) -> None:
        """Give all device memory back."""
        for array in jax.tree.leaves((self.weights, self.state, self.mailboxes)):
            if not array.is_deleted():
                array.delete()
        self.weights, self.steps, self.redraws, self.mailboxes = [], {}, {}, None

    def _pack(
        self, batch: Batch, shard: list[int], bucket: Bucket
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one shard of the batch, and its part of the one array that the step takes."""
        block_size = self.config.kvcache_block_size
        seqs = [batch.seqs[i] for i in shard]
        starts, lengths = [batch.starts[i] for i in shard], [batch.lengths[i] for i in shard]
        for seq, start in zip(seqs, starts, strict=True):
            if batch.is_prefill:
                self.table.fill(seq)
            elif start % block_size == 0:
                self.table.add_block(seq)
        slots = [seq.slot for seq in seqs]
        rows = self.table.gather(slots, starts, lengths, bucket.num_rows)
        token_ids = np.zeros(bucket.num_tokens, np.int32)
        if batch.is_prefill:
            end = 0
            for seq, start, length in zip(seqs, starts, lengths, strict=True):
                token_ids[end : end + length] = seq.token_ids[start : start + length]
                end += length
        return rows, np.concatenate([token_ids, rows.ravel()])

    def _unstack_weights(self, weights: nnx.State) -> None:
        """Keep the weights of the layers apart: see `LayerWeights`.

        (On a GPU products read their slices of the stack in place.)
        """
        variables = jax.tree.leaves_with_path(weights, is_leaf=lambda x: isinstance(x, nnx.Param))
        for i, (path, param) in enumerate(variables):
            if path[0].key == "layers":
                weight = param.get_value()
                self.weights[i] = LayerWeights.from_stacked(weight, param.get_metadata()["axes"])
                weight.delete()

    # --- memory ---

    def _size_cache(self) -> int:
        """How many blocks of KV cache fit for each shard of the batch; prints the arithmetic.

        Raises:
            ValueError: not even one does.
        """
        c, config = self.model_config, self.config
        heads = c.num_kv_heads // self.sharding.size("kv_heads")
        token_bytes = 2 * c.num_layers * heads * c.head_dim * self.programs.cache_dtype.itemsize
        block_bytes = token_bytes * config.kvcache_block_size
        mib = 1 << 20
        if self.platform == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            budget = int(memory * CPU_CACHE_SHARE)
            account = f"{CPU_CACHE_SHARE:.1%} of {memory // mib} MiB memory"
        else:
            stats = [device.memory_stats() for device in self.sharding.mesh.local_devices]
            limit = min(s["bytes_limit"] for s in stats)
            in_use = max(s["bytes_in_use"] for s in stats)
            step = self._step_bytes()
            usable = int(limit * config.gpu_memory_utilization)
            budget = usable - in_use - step - GPU_MARGIN_BYTES
            account = (
                f"{limit // mib} MiB x {config.gpu_memory_utilization} - weights and other arrays "
                f"{in_use // mib} - largest step {step // mib} - margin {GPU_MARGIN_BYTES // mib}"
            )
        blocks = max(0, budget) // block_bytes
        if self.platform == "cpu":
            blocks = min(blocks, config.max_num_seqs * self.programs.table_width)
        blocks = smallest(blocks)  # over the processes
        # Rounded down to five binary digits, so that the programs' shapes, and with them the
        # compilation cache's entries, do not change with every few megabytes.
        blocks -= blocks % (1 << max(0, blocks.bit_length() - 5))
        account = (
            f"KV cache: {account} = {budget // mib} MiB / {block_bytes / mib:.2f} MiB a block: "
            f"{blocks} blocks of {config.kvcache_block_size} tokens"
        )
        if blocks < 1:
            raise ValueError(
                f"no memory for the KV cache. {account}. Raise gpu_memory_utilization, lower "
                f"max_num_batched_tokens or max_num_seqs, or set num_kvcache_blocks"
            )
        print(account, flush=True)
        return blocks

    def _step_bytes(self) -> int:
        """Memory that the largest steps take beside weights and cache: temporaries and outputs."""
        buckets = [self.prefill_buckets[-1], self.decode_buckets[-1]]
        total = 0
        for step in self._compile_steps(buckets, PROBE_BLOCKS).values():
            m = step.memory_analysis()
            assert m is not None
            outputs = m.output_size_in_bytes - m.alias_size_in_bytes
            total = max(total, m.temp_size_in_bytes + 2 * outputs)  # two steps are under way
        return total

    # --- programs ---

    def _compile_all(self, num_blocks: int) -> None:
        """Compile the programs of all buckets, largest first."""
        buckets = sorted([*self.prefill_buckets, *self.decode_buckets], reverse=True)
        self.steps = self._compile_steps(buckets, num_blocks)
        state = self.programs.abstract_state(num_blocks)
        rows = sorted({bucket.num_rows for bucket in buckets}, reverse=True)
        redraws = self._compile(
            {f"redraw-{n}-{num_blocks}":
             functools.partial(self.programs.lower_redraw, n, num_blocks) for n in rows},
            (state, 0, 0), (state, 0),
        )  # fmt: skip
        self.redraws = dict(zip(rows, redraws, strict=True))

    def _compile_steps(self, buckets: list[Bucket], num_blocks: int) -> dict[Bucket, Callable]:
        state = self.programs.abstract_state(num_blocks)
        steps = self._compile(
            {f"step-{b.num_tokens}-{b.num_rows}-{num_blocks}":
             functools.partial(self.programs.lower_step, self.weights, *b, num_blocks)
             for b in buckets},
            (self.weights, state, 0), (state, 0, 0),
        )  # fmt: skip
        return dict(zip(buckets, steps, strict=True))

    def _compile(
        self, lower: dict[str, Callable[[], jax.stages.Lowered]], args: tuple, outputs: tuple
    ) -> list[jax.stages.Compiled]:
        """Programs by name, loaded from the cache or compiled, side by side.

        Only the lowering is done one after the other. Traced side by side, functions that programs
        share would carry the source lines of whichever came first, and JAX's cache of compiled
        programs, whose keys these lines are part of, would miss at the next start.
        """
        cache = self.program_cache
        with (
            ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool,
            tqdm(total=len(lower), desc="Compiling", dynamic_ncols=True) as bar,
        ):

            def load(name: str) -> jax.stages.Compiled | None:
                program = cache.load(name, args, outputs) if cache else None
                bar.update(program is not None)
                return program

            def compile_one(name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
                options = self.programs.compiler_options
                program = (
                    cache.compile(name, lowered, options) if cache else lowered.compile(options)
                )
                bar.update()
                return program

            programs = dict(zip(lower, pool.map(load, lower), strict=True))
            jobs = {
                name: pool.submit(compile_one, name, lower[name]())
                for name, program in programs.items()
                if program is None
            }
            return [programs[name] or jobs[name].result() for name in lower]

    def _program_cache(self) -> ProgramCache | None:
        """Beside JAX's cache; none without one, on a CPU, whose programs fit only its model, and
        for several processes, where it has not been tried.
        """
        folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if folder is None or self.platform != "gpu" or jax.process_count() > 1:
            return None
        made, program, config = self.programs, self.programs.step, self.config
        made_from = (
            *(self.model_config, program.prefill, program.decode, program.block_size),
            *(program.vocab_size, made.cache_dtype, config.max_num_seqs, made.table_width),
            *(self.sharding.mesh.shape_tuple, sorted(self.sharding.rules.items(), key=str)),
            *([(w.shape, w.dtype, w.sharding.spec) for w in self.weights],),
            self.programs.compiler_options,
        )
        devices = list(self.sharding.mesh.devices.flat)
        return ProgramCache(Path(folder) / "programs", devices, made_from)

    def _use_eager_steps(self) -> None:
        """Steps that run operation by operation, with the same shapes."""
        for bucket in [*self.prefill_buckets, *self.decode_buckets]:
            run = functools.partial(self.programs.step.run, **bucket._asdict())
            self.steps[bucket] = lambda weights, state, packed, run=run: run(
                weights, state, place(packed, self.programs.rows_sharding)
            )
            self.redraws[bucket.num_rows] = self.programs.step.redraw


def _claim_gpu_memory() -> None:
    """Let JAX's pool take 95% of each GPU, unless the user has chosen a share.

    The default is 75%. No effect once a JAX program has touched the GPU.
    """
    names = (
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    )  # JAX refuses both at once
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "0.95"


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place or none."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "nanovllm_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
