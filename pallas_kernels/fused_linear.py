"""A linear layer of few rows, with the norm before it and the residual or gate after it inside."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import load_tile, next_power_of_2, start_next_kernel, use_interpreter

MAX_ROWS = 64
_BLOCK_K = 128


def fits_fused_linear(num_rows: int, num_out: int, width: int, dtype) -> bool:
    """Whether `fused_linear` takes such a layer, and is faster with it than separate kernels."""
    sixteen_bit = jnp.dtype(dtype).itemsize == 2
    return num_rows <= MAX_ROWS and sixteen_bit and num_out % 32 == 0 and width % _BLOCK_K == 0


TILES = {}


def _tiles(num_rows: int, num_out: int, width: int) -> dict[str, int]:
    for key in ((num_out, width), "all"):
        if key in TILES:
            return TILES[key]
    return {"block_n": 32 if num_out >= 4096 else 16, "block_k": 128, "warps": 4, "stages": 4}


@functools.partial(jax.jit, static_argnames=("eps", "gated", "interpret"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "L N K"],
    layer: Int32[Array, ""],
    norm: Float[Array, "L K"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    gated: bool = False,
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    num_rows, width = x.shape
    num_out = weight.shape[1] // (2 if gated else 1)
    t = _tiles(num_rows, num_out, width)
    kernel = functools.partial(
        _kernel, block_m=max(16, next_power_of_2(num_rows)), block_n=t["block_n"],
        block_k=t["block_k"], eps=eps, normed=norm is not None, residual=residual is not None,
        gated=gated,
    )  # fmt: skip
    operands = [x, weight.reshape(-1, width), jnp.reshape(layer, 1)]
    operands += [a for a in (norm, residual) if a is not None]
    return pl.pallas_call(
        kernel,
        grid=(num_out // t["block_n"],),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=t["warps"], num_stages=t["stages"]),
        interpret=use_interpreter(interpret),
        name="fused_linear",
    )(*operands)


def _kernel(
    x_ref, w_ref, layer_ref, *refs, block_m: int, block_n: int, block_k: int, eps: float,
    normed: bool, residual: bool, gated: bool,
):  # fmt: skip
    *inputs, out_ref = refs
    layer = layer_ref[0]
    (num_rows, width), num_out = x_ref.shape, out_ref.shape[1]
    m = jnp.arange(block_m)
    m_mask = None if block_m == num_rows else m < num_rows
    n = pl.program_id(0) * block_n + start_next_kernel(jnp.arange(block_n))
    w_rows = layer * (num_out * (1 + gated)) + n

    def step(i, state):
        accs, squares = state
        cols = i * block_k + jnp.arange(block_k)
        a = load_tile(x_ref, m, cols, m_mask)
        if normed:
            a32 = a.astype(jnp.float32)
            squares = squares + a32 * a32
            w_norm = load_tile(inputs[0], layer + jnp.arange(1), cols)
            a = (a32 * w_norm.astype(jnp.float32)).astype(a.dtype)
        products = (_dot(a, load_tile(w_ref, w_rows + j * num_out, cols)) for j in range(len(accs)))
        return [acc + product for acc, product in zip(accs, products, strict=True)], squares

    accs = [jnp.zeros((block_m, block_n), jnp.float32)] * (1 + gated)
    squares = jnp.zeros((block_m, block_k if normed else 1), jnp.float32)
    accs, squares = lax.fori_loop(0, width // block_k, step, (accs, squares))
    if normed:
        inv_rms = lax.rsqrt(squares.sum(axis=1, keepdims=True) / width + eps)
        accs = [acc * inv_rms for acc in accs]
    rounded = [acc.astype(out_ref.dtype).astype(jnp.float32) for acc in accs]
    out = rounded[0]
    if gated:
        out = out / (1 + jnp.exp(-out)) * rounded[1]
    if residual:
        out = out + load_tile(inputs[-1], m, n, m_mask).astype(jnp.float32)
    mask = None if m_mask is None else jnp.broadcast_to(m_mask[:, None], out.shape)
    plgpu.store(out_ref.at[m[:, None], n[None, :]], out.astype(out_ref.dtype), mask=mask)


def _dot(a, b):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
