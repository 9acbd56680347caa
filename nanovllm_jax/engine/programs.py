"""The steps of one model on one mesh, lowered from shapes and layouts: no array is made for it."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.inputs import Column
from nanovllm_jax.engine.step import DeviceState, StepProgram
from nanovllm_jax.layers.attention import KVCache
from nanovllm_jax.layers.linear import MAX_ONE_SHOT_WORDS
from nanovllm_jax.models import model_class
from nanovllm_jax.sharding import Sharding
from nanovllm_jax.weights import abstract_weights
from pallas_kernels import Mailboxes, make_mailboxes


class Programs:
    """What the compiled programs of an engine are made from; `weights` are shapes."""

    def __init__(self, config: EngineConfig, sharding: Sharding):
        self.config, self.sharding = config, sharding
        self.batch_shards = sharding.size("batch")
        self.platform = sharding.mesh.devices.flat[0].platform
        self.model_config = config.model_config.over(sharding.size)
        if self.platform == "cpu" and config.dtype is None:
            # XLA's CPU backend converts bfloat16 caches and operands at every use: 7 times slower.
            self.model_config = replace(self.model_config, dtype="float32")
        self.table_width = -(-config.max_model_len // config.kvcache_block_size)
        self.model = model_class(self.model_config.architecture)
        self.weights = abstract_weights(self.model, self.model_config, sharding)
        make = functools.partial(self.model, self.model_config, constrain=sharding.constrain)
        graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        self.step = StepProgram(
            graph,
            jax.tree.structure(self.weights),
            sharding,
            *self._attention_backends(),
            config.kvcache_block_size,
            vocab_size=config.model_config.vocab_size,
        )

    @property
    def cache_dtype(self) -> jnp.dtype:
        fp8 = self.config.kv_cache_dtype == "fp8"
        return jnp.dtype(jnp.float8_e4m3fn if fp8 else self.model_config.dtype)

    def make_state(self, num_blocks: int, make=jnp.zeros) -> DeviceState:
        """The cache and the last tokens, zeroed on the devices (or other arrays by `make`)."""
        c = self.model_config
        shape = (c.num_layers, self.batch_shards * num_blocks, self.config.kvcache_block_size)
        shape += (c.num_kv_heads, c.head_dim)
        sharding = self.sharding.named(*KVCache.AXES)
        k, v = (make(shape, self.cache_dtype, device=sharding) for _ in range(2))
        slots = (self.batch_shards * (self.config.max_num_seqs + 1),)
        last_tokens = make(slots, jnp.int32, device=self.rows_sharding)
        return DeviceState(KVCache(k, v), None, last_tokens)

    def make_mailboxes(self) -> Mailboxes | None:
        """For sums over the GPUs of one process that share a layer; else the sums are XLA's."""
        if not self.uses_mailboxes:
            return None
        return make_mailboxes(self.sharding.mesh, "tensor", MAX_ONE_SHOT_WORDS)

    @property
    def uses_mailboxes(self) -> bool:
        kernels = self.platform == "gpu" and self.step.decode != "xla"
        return kernels and jax.process_count() == 1 and self.sharding.mesh.shape["tensor"] > 1

    def abstract_state(self, num_blocks: int) -> DeviceState:
        """The state as shapes and layouts."""

        def abstract(shape, dtype, device):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

        state = self.make_state(num_blocks, abstract)
        if not self.uses_mailboxes:
            return state
        mesh = self.sharding.mesh
        layout = NamedSharding(mesh, self.sharding.by_device)
        return state._replace(mailbox=abstract((mesh.size, 2), jnp.int32, layout))

    def lower_step(
        self, weights: list, num_tokens: int, num_rows: int, num_blocks: int
    ) -> jax.stages.Lowered:
        """The step of a bucket, whose size is that of one shard of the batch.

        `weights` is the flat list that the program will take, of arrays or of their shapes.
        """
        weights = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), weights
        )
        row = len(Column) + self.table_width
        packed = self._integers(self.batch_shards * (num_tokens + num_rows * row))
        state = self.abstract_state(num_blocks)
        layout = jax.tree.map(lambda x: x.sharding, state)
        run = functools.partial(self.step.run, num_tokens=num_tokens, num_rows=num_rows)
        out = (layout, self.sharding.replicated, self.logits_sharding)
        return jax.jit(run, donate_argnums=1, out_shardings=out).lower(weights, state, packed)

    def lower_redraw(self, num_rows: int, num_blocks: int) -> jax.stages.Lowered:
        """The program that draws tokens again from a step's logits, with filters."""
        num_rows *= self.batch_shards
        logits = jax.ShapeDtypeStruct(
            (num_rows, self.model_config.vocab_size), jnp.float32, sharding=self.logits_sharding
        )
        state = self.abstract_state(num_blocks)
        out = (jax.tree.map(lambda x: x.sharding, state), self.sharding.replicated)
        return jax.jit(self.step.redraw, donate_argnums=0, out_shardings=out).lower(
            state, logits, self._integers(num_rows, len(Column) + self.table_width)
        )

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

    @property
    def logits_sharding(self) -> jax.sharding.NamedSharding:
        return self.sharding.named("batch", "vocab")

    @property
    def rows_sharding(self) -> jax.sharding.NamedSharding:
        return self.sharding.named("batch")

    def _integers(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows_sharding)

    def _attention_backends(self) -> tuple[str, str]:
        """The kernels of prefill and of decode: as told, or those that measured best."""
        backend, c = self.config.attention_backend, self.model_config
        if self.platform != "gpu":
            return ("xla", "xla") if backend == "auto" else (backend, backend)
        device = self.sharding.mesh.devices.flat[0]
        version = re.search(r"cuda (\d+)", device.client.platform_version)
        wrong_masks = version is not None and 12080 <= int(version[1]) < 12091
        if backend == "mosaic" and wrong_masks:
            raise ValueError(
                "attention_backend='mosaic' needs another CUDA than 12.8.0 to 12.9.0, whose "
                'compiler gets causal masks wrong: install "jax[cuda13]", or use "triton"'
            )
        if backend != "auto":
            return backend, backend
        hopper = float(device.compute_capability) == 9.0 and not wrong_masks
        fits = c.dtype == self.cache_dtype == "bfloat16" and c.head_dim in (64, 128)
        return "mosaic" if hopper and fits else "triton", "triton"
