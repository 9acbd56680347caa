"""Settings of JAX that must be made before it touches a device, unless the user has made them."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge  # jax has no public way to ask whether it has started

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver, host
from nanovllm_jax.engine.buckets import decode_buckets, mixed_buckets, prefill_buckets
from nanovllm_jax.engine.cache_folder import (
    check_writable,
    default_folder,
    private_folder,
    remove_damaged,
)
from nanovllm_jax.engine.memory import pool_share

log = logging.getLogger("nanovllm_jax")

# JAX refuses both at once.
MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
CHOOSE = "choose a folder of your own with the environment variable JAX_COMPILATION_CACHE_DIR"


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
    """Set JAX's memory pool on GPUs, its threads, and the place of its compilation cache.

    JAX's default for the pool is 75% of a GPU. The first two have no effect once a program of this
    process has used a device.
    """
    totals = cuda_driver.total_memory()[: config.num_devices]
    if totals and not any(name in os.environ for name in MEMORY_FRACTION):
        decode = decode_buckets(config.max_num_seqs)
        prefill = prefill_buckets(config.max_num_batched_tokens, config.max_num_seqs)
        if config.enable_mixed_chunk:
            prefill += mixed_buckets(
                config.chunked_prefill_size, config.max_num_batched_tokens, config.max_num_seqs
            )
        samples = {bucket.num_rows for bucket in [*decode, *prefill]}
        # Decoding has two programs for each size: for one step in a call, and for several.
        # Sampling has two for most: with filters alone, and with all that a request can ask for.
        num_programs = 2 * len(decode) + len(prefill) + 2 * len(samples)
        share = pool_share(min(totals), config.num_devices, num_programs)
        os.environ[MEMORY_FRACTION[0]] = f"{share:.3f}"
    if (cpus := host.num_cpus()) < (os.cpu_count() or 1):
        # XLA takes as many threads as the affinity allows: it does not know of quotas.
        os.environ.setdefault("NPROC", str(cpus))
    _configure_cache()


def _configure_cache() -> None:
    """Have JAX keep compiled programs in a folder, unless that cannot be done.

    It is the user's choice, or the default if only this user can write to it. What is wrong with it
    is told in one warning.
    """
    jax_config: Any = jax.config
    if not jax_config.jax_enable_compilation_cache:
        return
    chosen = jax_config.jax_compilation_cache_dir
    if chosen and "://" in chosen:
        return
    try:
        folder = Path(chosen) if chosen else private_folder(default_folder())
    except (OSError, RuntimeError) as error:
        log.warning("compiled programs are not kept between starts: %s; %s", error, CHOOSE)
        return
    if not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if damaged := remove_damaged(folder):
            log.warning(
                "%d damaged programs in %s were removed; they are compiled anew", damaged, folder
            )
        check_writable(folder)
    except OSError as error:
        # JAX would warn of every program. It still reads those that are there.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
        log.warning("compiled programs are not kept in %s: %s; %s", folder, error, CHOOSE)
