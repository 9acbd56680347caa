"""Shields the engine's programs from the JAX settings that the user's program has made."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Give this thread JAX's defaults for every setting that changes tracing, placing or types.

    A program may have turned on 64-bit types, strict promotion, a NaN check, a transfer guard or
    another default device, for its own arrays. The engine's programs are written for the defaults.
    Settings of a context manager (and an active mesh) belong to the thread that entered it; those
    of `jax.config.update` to all threads, unless a thread has its own, as this one has inside.
    Settings that only say how to compile, such as XLA's optimization level, stay the user's.
    """
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_matmul_precision(None),
            jax.default_device(None),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
            jax.legacy_prng_key("allow"),
            jax.enable_custom_prng(False),
            jax.debug_key_reuse(False),
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.check_tracer_leaks(False),
            jax.enable_checks(False),
            jax.disable_jit(False),
            jax.no_tracing(False),
            jax.no_execution(False),
            jax.transfer_guard("allow"),
            jax.array_garbage_collection_guard("allow"),
        ):
            stack.enter_context(setting)
        yield
