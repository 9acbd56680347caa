"""The one place that knows how the supported releases of JAX (0.10.2 to 0.12) differ."""

import jax
import jax.numpy as jnp
from jax._src import core, state  # Pallas-Triton has no public assembly with effects or addresses
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as triton
from jax._src.pallas.triton import lowering
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


_asm = core.Primitive("assembly_with_effects")


def run_asm(code: str, ref, *scalars) -> None:
    """Run PTX in each thread of a Triton kernel, in its place among the kernel's loads and stores.

    Args:
        code: it finds the address of `ref` in $1, the scalars from $2 on. ($0 is taken.)
        scalars: int32.

    `plgpu.elementwise_inline_asm` would drop or move such code, for it counts as pure.
    """
    _asm.bind(ref, *(jnp.asarray(s, jnp.int32) for s in scalars), code=code)


@_asm.def_effectful_abstract_eval
def _(ref, *scalars, code):
    return core.ShapedArray((), jnp.int32), {state.WriteEffect(0)}  # else it would be dropped


@lowering.register_lowering(_asm)
def _(ctx, *args, code):
    return triton.elementwise_inline_asm(
        [ir.IntegerType.get_signless(32)],
        "{ " + code + " mov.b32 $0, 0; }",
        constraints=",".join(["=r", "l", *["r"] * (len(args) - 1)]),
        pure=False,
        packed_element=1,
        args=args,
    )
