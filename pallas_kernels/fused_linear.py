"""A linear layer of one row, with the norm before it and the residual or gate after it inside."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import load_tile, use_interpreter

TILES = {}


def fits_fused_linear(num_rows: int, num_out: int, width: int, dtype) -> bool:
    """Whether `fused_linear` takes such a layer, and is faster with it than separate kernels."""
    sixteen_bit = jnp.dtype(dtype).itemsize == 2
    return num_rows == 1 and sixteen_bit and num_out % 8 == 0 and width % 128 == 0


def _tiles(num_out: int, width: int, gated: bool) -> dict[str, int]:
    t = {"rows": 8 if num_out >= 4096 else 4, "warps": 4, "chunk": 1024}
    for key in ("all", (num_out, width)):
        t = t | TILES.get(key, {})
    return t


@functools.partial(jax.jit, static_argnames=("eps", "gated", "dtype", "interpret"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "L N K"],
    layer: Int32[Array, ""],
    norm: Float[Array, "L K"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    gated: bool = False,
    dtype=None,
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    width = x.shape[1]
    num_out = weight.shape[1] // (2 if gated else 1)
    t = _tiles(num_out, width, gated)
    chunk = t["chunk"]
    while width % chunk:
        chunk //= 2
    kernel = functools.partial(
        _kernel, block_n=t["rows"], chunk=chunk, eps=eps, normed=norm is not None,
        residual=residual is not None, gated=gated,
    )  # fmt: skip
    operands = [x, weight.reshape(-1, width), jnp.reshape(layer, 1)]
    operands += [a for a in (norm, residual) if a is not None]
    return pl.pallas_call(
        kernel,
        grid=(num_out // t["rows"],),
        out_shape=jax.ShapeDtypeStruct((1, num_out), dtype or x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=t["warps"], num_stages=1),
        interpret=use_interpreter(interpret),
        name="fused_linear",
    )(*operands)


def _kernel(
    x_ref, w_ref, layer_ref, *refs, block_n: int, chunk: int, eps: float,
    normed: bool, residual: bool, gated: bool,
):  # fmt: skip
    *inputs, out_ref = refs
    layer = layer_ref[0]
    width, num_out = x_ref.shape[1], out_ref.shape[1]
    one = jnp.arange(1)
    n = pl.program_id(0) * block_n + jnp.arange(block_n)
    w_rows = layer * (num_out * (1 + gated)) + n

    sums = [jnp.zeros((block_n, chunk), jnp.float32)] * (1 + gated)
    squares = jnp.zeros((1, chunk), jnp.float32)
    for start in range(0, width, chunk):
        cols = start + jnp.arange(chunk)
        w = [load_tile(w_ref, w_rows + j * num_out, cols) for j in range(1 + gated)]
        x = load_tile(x_ref, one, cols).astype(jnp.float32)
        if normed:
            squares += x * x
            x *= load_tile(inputs[0], layer + one, cols).astype(jnp.float32)
        sums = [s + tile.astype(jnp.float32) * x for s, tile in zip(sums, w, strict=True)]
    outs = [s.sum(axis=1) for s in sums]
    if normed:
        inv_rms = lax.rsqrt(squares.sum() / width + eps)
        outs = [out * inv_rms for out in outs]
    out = outs[0]
    if gated:
        out = out / (1 + jnp.exp(-out)) * outs[1]
    if residual:
        out += plgpu.load(inputs[-1].at[0, n]).astype(jnp.float32)
    plgpu.store(out_ref.at[0, n], out.astype(out_ref.dtype))
