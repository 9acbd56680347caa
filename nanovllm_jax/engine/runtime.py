"""Settings of JAX that must be made before it touches a device, unless the user has made them."""

import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # jax has no public way to ask whether it has started

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver
from nanovllm_jax.engine.buckets import decode_buckets, prefill_buckets
from nanovllm_jax.engine.memory import pool_share

# JAX refuses both at once.
MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def _after_fork_in_child() -> None:
    global _parent
    if xla_bridge.backends_are_initialized():
        _parent = os.getppid()


_parent: int | None = None  # The process that this one was forked from, if JAX had started there.
os.register_at_fork(after_in_child=_after_fork_in_child)


def check_not_forked() -> None:
    """Raise RuntimeError if JAX cannot work here, since this is a fork of a process that uses it.

    JAX's threads exist in the parent alone, so that the first use of a device would wait for ever.
    """
    if _parent is not None:
        raise RuntimeError(
            f"process {os.getpid()} is a fork of process {_parent}, which uses JAX already: JAX "
            f'does not work here. Start processes with the method "spawn", for example '
            f'multiprocessing.get_context("spawn")'
        )


def configure_runtime(config: EngineConfig) -> None:
    """Set the size of JAX's memory pool on GPUs, and the place of its compilation cache.

    JAX's default for the pool is 75% of a GPU. The setting has no effect once a program of this
    process has used a GPU.
    """
    totals = cuda_driver.total_memory()[: config.num_devices]
    if totals and not any(name in os.environ for name in MEMORY_FRACTION):
        buckets = [
            *decode_buckets(config.max_num_seqs),
            *prefill_buckets(config.max_num_batched_tokens, config.max_num_seqs),
        ]
        num_programs = len(buckets) + len({bucket.num_rows for bucket in buckets})
        share = pool_share(min(totals), config.num_devices, num_programs)
        os.environ[MEMORY_FRACTION[0]] = f"{share:.3f}"
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "nanovllm_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
