"""Programs: the compiled steps of one model on one mesh, one for each bucket."""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from nanovllm_jax.checks import check_values
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver, host, memory
from nanovllm_jax.engine.buckets import Bucket, decode_buckets, mixed_buckets, prefill_buckets
from nanovllm_jax.engine.edits import MOST_EDITS
from nanovllm_jax.engine.inputs import NUM_OPTIONS, NUM_SCORED
from nanovllm_jax.engine.packed import Change, Column, option_width
from nanovllm_jax.engine.program_cache import ProgramCache
from nanovllm_jax.engine.step import ROWS_AT_ONCE, DeviceState, StepFunctions
from nanovllm_jax.layers.collectives import AXIS, Collectives
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.scores import Scores
from nanovllm_jax.models import Decoder
from nanovllm_jax.sharding import Sharding, place
from nanovllm_jax.weights import Weight, abstract_weights
from pallas_kernels import (
    addressable_pages,
    mosaic_problem,
    most_tokens,
    supports_mosaic_prefill,
)

log = logging.getLogger("nanovllm_jax")

PROBE_BLOCKS = 8  # Blocks of the small cache used to probe a step's temporary memory.
MOST_POSITIONS = 1 << 24  # Positions that float32, in which RoPE computes, tells apart.


class Spec(NamedTuple):
    """A program to compile: a function, the shapes of its arguments, the layout of its results."""

    name: str
    run: Callable
    args: tuple
    donate: int  # index of the state, the argument that is updated in place
    out_shardings: Any  # has the structure of the results

    def trace(self) -> jax.stages.Traced:
        """Trace the function; no array is made."""
        jitted = jax.jit(self.run, donate_argnums=self.donate, out_shardings=self.out_shardings)
        return jitted.trace(*self.args)


class Programs:
    """Owns the buckets, and lowers and compiles the engine's steps; allocates nothing.

    `steps` (by bucket), `decode_steps` (by decode bucket; empty if a call takes one step only),
    `samples` (by rows of a shard), `samples_all` and `put_masks` (by fewer of these),
    `score_prompt` and `put_options` are there once `compile` has run. They are called as methods
    of `StepFunctions` are.
    """

    def __init__(self, config: EngineConfig, sharding: Sharding):
        self.config, self.sharding = config, sharding
        self.batch_shards = sharding.size("batch")
        self.platform = sharding.mesh.devices.flat[0].platform
        self.model_config = config.model_config.sharded(sharding.size)
        self._check_sizes()
        self.table_width = -(-config.max_model_len // config.kvcache_block_size)
        num_seqs = -(-config.max_num_seqs // self.batch_shards)
        num_tokens = -(-config.max_num_batched_tokens // self.batch_shards)
        self.decode_buckets = decode_buckets(num_seqs)
        self.prefill_buckets = prefill_buckets(num_tokens, num_seqs)
        self.mixed_buckets: list[Bucket] = []
        if config.enable_mixed_chunk:
            size = config.chunked_prefill_size
            chunk = None if size is None else -(-size // self.batch_shards)
            self.mixed_buckets = mixed_buckets(chunk, num_tokens, num_seqs)
        largest = self.decode_buckets[-1], self.prefill_buckets[-1]
        self.most_rows = max(sample_all_sizes([bucket.num_rows for bucket in largest]))
        self.weights = abstract_weights(self.model_config, sharding)
        model = nnx.eval_shape(lambda: Decoder(self.model_config, rngs=nnx.Rngs(0)))
        self.functions = StepFunctions(
            nnx.graphdef(model),
            jax.tree.structure(self.weights),
            sharding,
            *self._attention_kernels(),
            # Users who name the attention kernels get those. Under MPS, kernels of others may
            # keep some blocks off the GPU, but the one kernel needs all of them at the same time.
            config.attention_backend == "auto" and not cuda_driver.shared_by_mps(),
            config.kvcache_block_size,
            config.model_config.vocab_size,
        )
        self.program_cache: ProgramCache | None = None
        self.steps: dict[Bucket, Callable] = {}
        self.decode_steps: dict[Bucket, Callable] = {}
        self.samples: dict[int, Callable] = {}
        self.samples_all: dict[int, Callable] = {}
        self.score_prompt: Callable | None = None
        self.put_options: Callable | None = None
        self.put_masks: dict[int, Callable] = {}

    def chunk(self, num_tokens: int) -> Bucket:
        """The room of a prefill that takes at most this many tokens, in each shard."""
        num_tokens = -(-num_tokens // self.batch_shards)
        bucket = next(b for b in self.prefill_buckets if b.num_tokens >= num_tokens)
        return bucket._replace(num_tokens=num_tokens)

    def mixed_rooms(self, num_tokens: int | None) -> list[Bucket]:
        """The room of mixed batches, in each shard: `Scheduler` takes the first that will do.

        It is of this many tokens, and of more only if decode rows would take more than half of it.

        Args:
            num_tokens: of all shards; None: the most.
        """
        if num_tokens is None:
            return self.mixed_buckets[-1:]
        num_tokens = -(-num_tokens // self.batch_shards)
        buckets = [b for b in self.mixed_buckets if b.num_tokens >= num_tokens]
        num_rows = [min(b.num_rows, num_tokens // 2) for b in buckets[:1]]
        return [Bucket(num_tokens, n, is_mixed=True) for n in num_rows] + buckets

    # --- what the programs work on ---

    def addressable_blocks(self, num_blocks: int) -> int:
        """The most blocks of a shard, and no more than `num_blocks`, that kernels can address."""
        c = self.model_config
        heads = c.num_kv_heads // self.sharding.size("kv_heads")
        shape = (c.num_layers, num_blocks, self.config.kvcache_block_size, heads, c.head_dim)
        return addressable_pages(shape, self.cache_dtype)

    def _check_sizes(self) -> None:
        """Raise ValueError if an option asks for more than kernels address with 32-bit numbers."""
        config, c, ways = self.config, self.model_config, self.sharding.size("kv_heads")
        blocks, cache = config.num_kvcache_blocks, f"this model's {self.cache_dtype} cache"
        addressable = blocks and self.addressable_blocks(blocks)
        tokens = self.batch_shards * most_tokens(c.num_heads // ways, c.num_kv_heads // ways)
        requirements = {
            "kvcache_block_size": (
                self.addressable_blocks(1) == 1,
                f"smaller: kernels cannot address one such block of {cache}",
            ),
            "num_kvcache_blocks": (
                addressable == blocks,
                f"at most {addressable}: kernels cannot address more blocks of {cache}",
            ),
        }
        for name, most in (
            ("max_num_batched_tokens", tokens),
            ("max_num_seqs", tokens),
            ("max_model_len", MOST_POSITIONS),
        ):
            words = f"at most {most}, which is what kernels address with this model"
            requirements[name] = (getattr(config, name) <= most, words)
        check_values(config, requirements)

    @property
    def cache_dtype(self) -> jnp.dtype:
        fp8 = self.config.kv_cache_dtype == "fp8"
        return jnp.dtype(jnp.float8_e4m3fn if fp8 else self.model_config.dtype)

    @property
    def row_width(self) -> int:
        """Integers in the row of a slot."""
        return len(Column) + self.table_width

    @property
    def num_words(self) -> int:
        """Words of 32 bits that have one for each token of the vocabulary."""
        return -(-self.model_config.vocab_size // 32)

    @property
    def rows_sharding(self) -> jax.sharding.NamedSharding:
        """The layout of tables and packed arrays."""
        return self.sharding.named("batch")

    @property
    def uses_collectives(self) -> bool:
        """Whether GPUs of one process that share a layer sum through peer memory."""
        kernels = self.platform == "gpu" and self.functions.decode != "xla"
        return kernels and jax.process_count() == 1 and self.sharding.mesh.shape[AXIS] > 1

    def make_state(
        self, num_blocks: int, collectives: Collectives | None, make: Callable = jnp.zeros
    ) -> DeviceState:
        """The cache and the tables, zeroed on the devices (or other arrays, by `make`)."""
        c, config = self.model_config, self.config
        shards, size = self.batch_shards, config.kvcache_block_size
        shape = (c.num_layers, shards * num_blocks, size, c.num_kv_heads, c.head_dim)
        layout = self.sharding.named(*KVCache.AXES)
        k, v = (make(shape, self.cache_dtype, device=layout) for _ in range(2))
        tables = {"dtype": jnp.int32, "device": self.rows_sharding}
        rows = make((shards * (config.max_num_seqs + 1), self.row_width), **tables)
        token_ids = make((shards * (num_blocks + 1), size), **tables)
        # With a row to spare: XLA's compiler crashes (jaxlib 0.11.2, two GPUs) where a step would
        # write all of a donated array.
        hidden = make(
            (shards * (self.most_rows + 1), c.hidden_size),
            jnp.dtype(c.dtype),
            device=self.sharding.named("batch", "activation_embed"),
        )
        prompt = make(
            (shards * (self.prefill_buckets[-1].num_tokens + 1), c.hidden_size),
            jnp.dtype(c.dtype),
            device=self.sharding.named("batch", "activation_embed"),
        )
        num_slots = shards * (config.max_num_seqs + 1)
        edits = make((num_slots, 4 * MOST_EDITS), **tables)
        allowed = make((num_slots, self.num_words), **tables)
        return DeviceState(
            KVCache(k, v), collectives, rows, token_ids, hidden, prompt, edits, allowed
        )

    @property
    def state_bytes(self) -> int:
        """Memory of a device that the state takes beside the blocks of the cache."""
        arrays = jax.tree.leaves(self.abstract_state(0))
        shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in arrays]
        return sum(math.prod(shape) * size for shape, size in shapes)

    def abstract_state(self, num_blocks: int) -> DeviceState:
        """The state as shapes and layouts."""

        def shape_of(shape, dtype, device):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

        collectives = Collectives.abstract(self.sharding) if self.uses_collectives else None
        return self.make_state(num_blocks, collectives, shape_of)

    # --- lowering and compiling ---

    def step_spec(
        self, bucket: Bucket, num_blocks: int, weights: list[Weight] | None = None
    ) -> Spec:
        """The step of a bucket.

        Args:
            weights: as they lie on the devices; default: as `self.weights` says.
        """
        state = self.abstract_state(num_blocks)
        kind = "mixed" if bucket.is_mixed else "step"
        return Spec(
            f"{kind}-{bucket.num_tokens}-{bucket.num_rows}-{num_blocks}",
            functools.partial(self.functions.run, bucket=bucket),
            (self._shapes(weights), state, self._packed(bucket)),
            1,
            (_layout(state), self.sharding.named()),
        )

    def decode_steps_spec(
        self, bucket: Bucket, num_blocks: int, weights: list[Weight] | None = None
    ) -> Spec:
        """The program that takes several decode steps; see `step_spec`."""
        state, num_steps = self.abstract_state(num_blocks), self.config.num_scheduler_steps
        return Spec(
            f"decode-{num_steps}-{bucket.num_rows}-{num_blocks}",
            functools.partial(self.functions.decode_steps, bucket=bucket, num_steps=num_steps),
            (self._shapes(weights), state, self._packed(bucket)),
            1,
            (_layout(state), self.sharding.named()),
        )

    def sample_spec(
        self, num_rows: int, num_blocks: int, weights: list[Weight] | None = None
    ) -> Spec:
        """The program that draws the last step's tokens again; see `step_spec`."""
        state, rows = self.abstract_state(num_blocks), self.batch_shards * num_rows
        return Spec(
            f"sample-{num_rows}-{num_blocks}",
            self.functions.sample,
            (self._shapes(weights), state, self._integers(rows)),
            1,
            (_layout(state), self.sharding.named()),
        )

    def sample_all_spec(
        self, num_rows: int, num_blocks: int, weights: list[Weight] | None = None
    ) -> Spec:
        """The program that draws them again with all options, and scores them; see `step_spec`."""
        state, rows = self.abstract_state(num_blocks), self.batch_shards * num_rows
        return Spec(
            f"sample-all-{num_rows}-{num_blocks}",
            self.functions.sample_all,
            (self._shapes(weights), state, self._integers(rows)),
            1,
            (_layout(state), self.sharding.named(), self._scores_layout),
        )

    def score_prompt_spec(self, num_blocks: int, weights: list[Weight] | None = None) -> Spec:
        """The program that scores tokens of prompts; see `step_spec`."""
        state, size = self.abstract_state(num_blocks), self.batch_shards * 2 * NUM_SCORED
        return Spec(
            f"score-prompt-{num_blocks}",
            self.functions.score_prompt,
            (self._shapes(weights), state, self._integers(size)),
            1,
            (_layout(state), self._scores_layout),
        )

    @property
    def _scores_layout(self) -> Scores:
        """Every device has all the scores."""
        return Scores._make([self.sharding.named()] * len(Scores._fields))

    def put_options_spec(self, num_blocks: int) -> Spec:
        """The program that writes the options of slots."""
        size = NUM_OPTIONS * option_width(self.num_words)
        return self._put_spec("put-options", self.functions.put_options, size, num_blocks)

    def put_masks_spec(self, num_rows: int, num_blocks: int) -> Spec:
        """The program that writes the allowed tokens of slots."""
        size = num_rows * (1 + self.num_words)
        return self._put_spec(f"put-masks-{num_rows}", self.functions.put_masks, size, num_blocks)

    def _put_spec(self, name: str, run: Callable, size: int, num_blocks: int) -> Spec:
        state, packed = self.abstract_state(num_blocks), self._integers(self.batch_shards * size)
        return Spec(f"{name}-{num_blocks}", run, (state, packed), 0, _layout(state))

    def lower_step(self, bucket: Bucket, num_blocks: int) -> jax.stages.Lowered:
        """Lower the step of a bucket."""
        return self.step_spec(bucket, num_blocks).trace().lower()

    def compile(self, weights: list[Weight], num_blocks: int) -> None:
        """Make the programs of all buckets, the largest first.

        A row of a decode step writes to a block of its own, so no step has more rows than blocks.
        """
        largest = self.decode_buckets[-1]
        largest = next((b for b in self.decode_buckets if b.num_rows >= num_blocks), largest)
        self.decode_buckets = [b for b in self.decode_buckets if b <= largest]
        families = self.prefill_buckets, self.mixed_buckets, self.decode_buckets
        buckets = sorted(itertools.chain(*families), reverse=True)
        row_counts = sorted({bucket.num_rows for bucket in buckets}, reverse=True)
        if self.config.enforce_eager:
            self.steps = {bucket: self._eager_step(bucket) for bucket in buckets}
            self.samples = dict.fromkeys(row_counts, self.functions.sample)
            sizes = sample_all_sizes(row_counts)
            self.samples_all = dict.fromkeys(sizes, self.functions.sample_all)
            self.put_masks = dict.fromkeys(sizes, self.functions.put_masks)
            self.score_prompt = self.functions.score_prompt
            self.put_options = self.functions.put_options
            return
        loops = self.decode_buckets if self.config.num_scheduler_steps > 1 else []
        specs = [self.step_spec(bucket, num_blocks, weights) for bucket in buckets]
        specs += [self.decode_steps_spec(bucket, num_blocks, weights) for bucket in loops]
        specs += [self.sample_spec(n, num_blocks, weights) for n in row_counts]
        sizes = sample_all_sizes(row_counts)
        specs += [self.sample_all_spec(n, num_blocks, weights) for n in sizes]
        specs += [self.put_masks_spec(n, num_blocks) for n in sizes]
        specs += [self.score_prompt_spec(num_blocks, weights), self.put_options_spec(num_blocks)]
        programs = iter(self._compile(specs, weights))
        self.steps = {bucket: next(programs) for bucket in buckets}
        self.decode_steps = {bucket: next(programs) for bucket in loops}
        self.samples = {num_rows: next(programs) for num_rows in row_counts}
        self.samples_all = {num_rows: next(programs) for num_rows in sizes}
        self.put_masks = {num_rows: next(programs) for num_rows in sizes}
        self.score_prompt, self.put_options = programs

    def step_bytes(self, weights: list[Weight]) -> int:
        """Memory that the largest steps take beside weights and cache: temporaries and outputs."""
        families = self.prefill_buckets, self.mixed_buckets, self.decode_buckets
        buckets = [bucket for family in families for bucket in family[-1:]]
        specs = [self.step_spec(bucket, PROBE_BLOCKS, weights) for bucket in buckets]
        samples = self.sample_spec, self.sample_all_spec
        specs += [spec(self.most_rows, PROBE_BLOCKS, weights) for spec in samples]
        largest = 0
        for step in self._compile(specs, weights):
            m = step.memory_analysis()
            assert m is not None
            outputs = m.output_size_in_bytes - m.alias_size_in_bytes
            largest = max(largest, m.temp_size_in_bytes + 2 * outputs)  # two steps are under way
        return largest

    @property
    def compiler_options(self) -> dict[str, bool | str]:
        """Matrix products by cuBLAS with its own choice of algorithm, and no rematerialization.

        XLA's Triton products, tuned over dozens of candidates each, made these steps 7% slower and
        took ten times as long to compile. Rematerialization is off because XLA counts the donated
        cache twice, finds the memory full, and would compute things again to save some.
        """
        if self.platform != "gpu":
            return {}
        return {
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_autotune_level": "0",
            "xla_disable_hlo_passes": "rematerialization",
        }

    def _compile(self, specs: list[Spec], weights: list[Weight]) -> list[jax.stages.Compiled]:
        """Load programs from the cache or compile them, side by side.

        Only the lowering is done one after the other. Traced side by side, functions that programs
        share would carry the source lines of whichever came first, and JAX's cache of compiled
        programs, whose keys these lines are part of, would miss at the next start.
        """
        self.program_cache = self.program_cache or self._program_cache(weights)
        cache, options = self.program_cache, self.compiler_options
        with (
            ThreadPoolExecutor(host.num_cpus()) as pool,
            tqdm(
                total=len(specs), desc="Compiling", dynamic_ncols=True,
                disable=None if log.isEnabledFor(logging.INFO) else True,  # None: no terminal
            ) as bar,
        ):  # fmt: skip

            def load(spec: Spec) -> jax.stages.Compiled | None:
                program = cache.load(spec.name, spec.args, spec.out_shardings) if cache else None
                bar.update(program is not None)
                return program

            def compile_one(spec: Spec, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
                program = (
                    cache.compile(spec.name, lowered, options)
                    if cache
                    else lowered.compile(options)
                )
                if self.platform == "cpu":
                    memory.return_freed()
                bar.update()
                return program

            loaded = list(pool.map(load, specs))
            jobs = {
                spec.name: pool.submit(compile_one, spec, spec.trace().lower())
                for spec, program in zip(specs, loaded, strict=True)
                if program is None
            }
            return [
                program or jobs[spec.name].result()
                for spec, program in zip(specs, loaded, strict=True)
            ]

    def _program_cache(self, weights: list[Weight]) -> ProgramCache | None:
        """The cache of programs beside JAX's.

        There is none without JAX's or where that is not made of files, on a CPU, whose programs fit
        only its model, and for several processes, which has not been tried.
        """
        folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if folder is None or "://" in folder or self.platform != "gpu" or jax.process_count() > 1:
            return None
        f, config = self.functions, self.config
        key_parts = (
            *(self.model_config, f.prefill, f.decode, f.one_kernel, f.block_size, f.vocab_size),
            *(self.cache_dtype, config.max_num_seqs, self.row_width, MOST_EDITS),
            *(self.sharding.mesh.shape_tuple, sorted(self.sharding.rules.items(), key=str)),
            [(w.shape, w.dtype, w.sharding.spec) for w in jax.tree.leaves(weights)],
            self.compiler_options,
        )
        devices = list(self.sharding.mesh.devices.flat)
        return ProgramCache(Path(folder) / "programs", devices, key_parts)

    def _eager_step(self, bucket: Bucket) -> Callable:
        """A step that runs operation by operation, with the shapes of the compiled one."""

        def run(weights, state, packed):
            packed = place(packed, self.rows_sharding)
            return self.functions.run(weights, state, packed, bucket=bucket)

        return run

    def _shapes(self, weights: list[Weight] | None) -> list:
        """The flat list of weights that a program takes, as shapes and layouts."""
        return jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding),
            jax.tree.leaves(self.weights) if weights is None else weights,
        )

    def _packed(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        size = bucket.num_rows * (len(Change) if bucket.is_decode else self.row_width)
        return self._integers(self.batch_shards * (bucket.num_tokens + size))

    def _integers(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows_sharding)

    def _attention_kernels(self) -> tuple[str, str]:
        """The kernels of prefill and of decode: as told, or those that measured best."""
        backend, c = self.config.attention_backend, self.model_config
        if self.platform != "gpu":
            return ("xla", "xla") if backend == "auto" else (backend, backend)
        problem = mosaic_problem(self.sharding.mesh.devices.flat[0])
        if backend == "mosaic" and problem:
            raise ValueError(f"attention_backend: {problem}")
        if backend != "auto":
            return backend, "triton" if backend == "mosaic" else backend
        fits = supports_mosaic_prefill(c.dtype, self.cache_dtype, c.head_dim)
        return "mosaic" if fits and not problem else "triton", "triton"


def _layout(state: DeviceState) -> DeviceState:
    return jax.tree.map(lambda x: x.sharding, state)


def sample_all_sizes(row_counts: list[int]) -> list[int]:
    """The rows that `sample_all` is compiled for, given those of steps, the most first.

    They are fewer, each at most half of the one before and down to 8, for a quicker start; and
    multiples of what the program works on at once.
    """
    sizes: list[int] = []
    for count in sorted(row_counts, reverse=True):
        size = count if count <= ROWS_AT_ONCE else -(-count // ROWS_AT_ONCE) * ROWS_AT_ONCE
        if not sizes or 8 <= size <= sizes[-1] // 2:
            sizes.append(size)
    return sizes
