"""The one place that knows how the supported releases of JAX (0.10.2 to 0.12) differ."""

import jax
from jax.experimental.pallas import mosaic_gpu as mgpu


def store_unoptimized(ref, value: jax.Array) -> None:
    """Write registers to a plain row-major reference in shared memory, bank conflicts or not.

    jax 0.12 refuses `ref[...] = value` wherever it finds no order without conflicts; older releases
    do not, and have no `store`.
    """
    store = getattr(mgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def mosaic_interpreter(interpret: bool):
    """The value of `interpret` that runs `mgpu.kernel` in Mosaic's interpreter, or on a GPU.

    Raises:
        ValueError: `interpret` is asked for, and this jax has no such interpreter.
    """
    if not interpret:
        return None
    params = getattr(mgpu, "InterpretGPUParams", None)
    if params is None:
        raise ValueError(f"Mosaic's interpreter needs jax 0.11 or newer; this is {jax.__version__}")
    return params()
