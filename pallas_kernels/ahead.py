"""What a small kernel of a decode step does for the kernels after it: they start early, and their
weights are already on the way from memory to the second-level cache.

A step of a few tokens is a chain of some 170 kernels of 2 to 6 us. At each start and end the memory
idles, because a kernel may read nothing before its predecessor has ended. Two instructions help:

`griddepcontrol.launch_dependents` allows the next kernel's programs to be placed on the
multiprocessors while this kernel still runs. XLA joins its own kernels and Pallas-Triton's by
programmatic edges (its flag `xla_gpu_enable_pdl`, on by default) and has every such kernel begin
with `griddepcontrol.wait`, which returns when all kernels before it have ended and their writes
can be seen. So an early start is safe wherever in a kernel it is allowed; and nothing but the start
is early, since the wait comes before anything that the kernel does.

`cp.async.bulk.prefetch.L2` asks for weights that a later kernel will read. It changes no result and
waits for nothing.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels._compat import run_asm

# A prefetch is cut into parts of a multiple of so many bytes, the lines of the cache.
_LINE = 128


class Ahead(NamedTuple):
    """Weights that a kernel fetches ahead of a later one's use: those of one layer of a stack."""

    weight: Float[Array, "L N K"]
    layer: Int32[Array, ""]


class Chain(NamedTuple):
    """How the kernels of a step help each other."""

    early: bool = False  # the next kernel's programs may be placed from the start on
    late: bool = False  # weights are fetched at a program's end, not at its start


def operands(ahead: tuple[Ahead, ...]) -> list[jax.Array]:
    """The operands that a kernel takes for `fetch`: a matrix and a layer for each."""
    flat = []
    for weight, layer in ahead:
        flat += [weight.reshape(len(weight), -1), lax.reshape(layer, (1,))]
    return flat


def begin(chain: Chain, ref, refs, axes: int = 1) -> None:
    """What a kernel does first; see `start_next` and `fetch`."""
    if chain.early:
        start_next(ref)
    if not chain.late:
        fetch(refs, axes)


def end(chain: Chain, refs, axes: int = 1) -> None:
    """What a kernel does last."""
    if chain.late:
        fetch(refs, axes)


def start_next(ref) -> None:
    """Allow the next kernel's programs to be placed; `ref` is any operand of this kernel."""
    run_asm("griddepcontrol.launch_dependents;", ref)


def fetch(refs, axes: int = 1) -> None:
    """Have the programs of a kernel fetch an equal part each of every matrix.

    Args:
        refs: those of `operands`.
        axes: of the kernel's grid.
    """
    part, parts = pl.program_id(0), pl.num_programs(0)
    for axis in range(1, axes):
        part = part * pl.num_programs(axis) + pl.program_id(axis)
        parts *= pl.num_programs(axis)
    for weight, layer in zip(refs[::2], refs[1::2], strict=True):
        total = weight.shape[1] * weight.dtype.itemsize
        size = -(-total // (parts * _LINE)) * _LINE
        run_asm(_FETCH.format(total=total, size=size), weight, layer[0], part)


# One thread asks for all of a program's part.
_FETCH = """
    .reg .pred mine, last;
    .reg .b32 t, first, n;
    .reg .b64 a, o;
    mov.u32 t, %tid.x;
    mul.lo.u32 first, $3, {size};
    setp.eq.u32 mine, t, 0;
    setp.lt.and.u32 mine, first, {total}, mine;
    sub.u32 n, {total}, first;
    min.u32 n, n, {size};
    mul.wide.u32 o, $2, {total};
    add.u64 a, $1, o;
    cvt.u64.u32 o, first;
    add.u64 a, a, o;
    @mine cp.async.bulk.prefetch.L2.global [a], n;
"""
