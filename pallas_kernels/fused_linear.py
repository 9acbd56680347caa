"""A linear layer for one row in one kernel, with the norm before it and what follows it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import ahead as chaining
from pallas_kernels._common import load_tile, use_interpreter
from pallas_kernels.ahead import Ahead, Chain

# Columns that a program reads at a time: the largest of these numbers that divides the width.
_CHUNKS = (2048, 1024, 512, 256, 128)
# Rows of the weight that a program multiplies, at most.
_MAX_BLOCK = 4
# Rows of x, at most: more would be bound by arithmetic, which tensor cores do faster.
MOST_ROWS = 8
# Columns that a program with several rows of x reads at a time.
_FEW_COLUMNS = 1024


def supports_fused_linear(
    num_rows: int, num_out: int, width: int, dtype: DTypeLike, most_rows: int = 1
) -> bool:
    """Whether `fused_linear` takes such a layer: few rows of 16-bit numbers, of an even shape."""
    two_bytes = jnp.dtype(dtype).itemsize == 2
    return num_rows <= most_rows and two_bytes and num_out % _MAX_BLOCK == 0 and chunk_of(width) > 0


def chunk_of(width: int) -> int:
    """The columns of a row of this width that a program reads at a time; 0 if none divides it."""
    return next((c for c in _CHUNKS if width % c == 0), 0)


@functools.partial(jax.jit, static_argnames=("eps", "gated", "dtype", "chain", "interpret"))
def fused_linear(
    x: Float[Array, "B K"],
    weight: Float[Array, "L N K"],
    layer: Int32[Array, ""],
    norm: Float[Array, "L K"] | None = None,
    residual: Float[Array, "B N"] | None = None,
    ahead: tuple[Ahead, ...] = (),
    *,
    eps: float = 0.0,
    gated: bool = False,
    dtype: DTypeLike | None = None,
    chain: Chain = Chain(),  # noqa: B008
    interpret: bool | None = None,
) -> Float[Array, "B N"]:
    """Return residual + rms_norm(x) @ weight[layer].T in one Triton kernel.

    One row leaves no work for tensor cores: reading the weights and starting kernels take all the
    time, and this starts one kernel in place of up to four.

    Args:
        weight: the weights of all layers, so that no slice must be copied for the kernel.
        layer: the layer whose weights are used.
        norm: the weights of an RMSNorm of the input, with `eps`, also of all layers; None: no norm.
        residual: added to the result, unless it is None. With `gated` it is [1, N/2].
        ahead, chain: weights that are fetched for later kernels, and how; see `ahead.py`.
        gated: return silu(first half of the N outputs) * second half (SwiGLU, arXiv:2002.05202).
        dtype: the result's dtype; x's if None. Everything before it is computed in float32.
        interpret: run the kernel in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: the shapes do not fit each other or the kernel (`supports_fused_linear`).
    """
    num_rows, width = x.shape
    num_out = weight.shape[1] // (1 + gated)
    if not supports_fused_linear(num_rows, num_out, width, x.dtype, MOST_ROWS) or weight.shape[2] != width:
        raise ValueError(
            f"fused_linear takes one row of 16 bits, outputs in multiples of {_MAX_BLOCK} and "
            f"inputs in multiples of {_CHUNKS[-1]}, not {x.dtype}{x.shape} with {weight.shape}"
        )
    # Few outputs are spread over more programs. Measured on an H100 at the shapes of 0.6B and 8B.
    block, num_warps = (_MAX_BLOCK if num_out >= 2048 else 2), 4
    if num_rows > 1:
        block = block if num_rows == 2 and not gated else 2
        num_warps = 4 if width > _FEW_COLUMNS else 2  # fewer warps add up fewer lanes' sums
    kernel = functools.partial(
        _kernel, block=block, eps=eps, normed=norm is not None, residual=residual is not None,
        gated=gated, chain=None if use_interpreter(interpret) else chain,
        num_ahead=0 if use_interpreter(interpret) else 2 * len(ahead),
    )  # fmt: skip
    optional = [a for a in (norm, residual) if a is not None]
    interpret = use_interpreter(interpret)
    help_next = [] if interpret else chaining.operands(ahead)
    return pl.pallas_call(
        kernel,
        grid=(num_out // block,),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), dtype or x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="fused_linear",
    )(x, weight.reshape(-1, width), jnp.reshape(layer, 1), *optional, *help_next)


def _kernel(
    x_ref, w_ref, layer_ref, *refs, block: int, eps: float,
    normed: bool, residual: bool, gated: bool, chain: Chain | None, num_ahead: int,
):  # fmt: skip
    """Run one program per `block` outputs; with a gate, it computes both halves of them."""
    *inputs, out_ref = refs
    inputs, help_next = inputs[: len(inputs) - num_ahead], inputs[len(inputs) - num_ahead :]
    if chain is not None:
        chaining.begin(chain, x_ref, help_next)
    layer, num_out = layer_ref[0], out_ref.shape[1]
    n = pl.program_id(0) * block + jnp.arange(block)
    w_rows = layer * (num_out * (1 + gated)) + n
    halves = [w_rows + half * num_out for half in range(1 + gated)]
    rows = range(x_ref.shape[0])
    norm = (inputs[0], layer, eps) if normed else None
    for row, outs in zip(rows, rows_products(x_ref, rows, w_ref, halves, norm), strict=True):
        out = outs[0]
        if gated:
            out = out / (1 + jnp.exp(-out)) * outs[1]
        if residual:
            out += plgpu.load(inputs[-1].at[row, n]).astype(jnp.float32)
        plgpu.store(out_ref.at[row, n], out.astype(out_ref.dtype))
    if chain is not None:
        chaining.end(chain, help_next)


def row_products(x_ref, row, w_ref, blocks, norm):
    """Multiply a row of x, in a kernel, by several blocks of rows of w: a float32 sum for each row.

    Args:
        blocks: the numbers of the rows of w, [block] each.
        norm: the weights [L, K] of an RMSNorm of the row, the layer, and its eps; None: no norm.
            Its factor is the same for the whole row: it is summed up on the way and applied last.
    """
    return rows_products(x_ref, [row], w_ref, blocks, norm)[0]


def rows_products(x_ref, rows, w_ref, blocks, norm):
    """What `row_products` returns for each of several rows of x; w is loaded once."""
    width, one = x_ref.shape[1], jnp.arange(1)
    chunk = chunk_of(width) if len(rows) == 1 else min(chunk_of(width), _FEW_COLUMNS)
    # Sums per column chunk, added up over the columns only at the end. The loop is unrolled: its
    # loads do not depend on one another and are all under way at once.
    sums = [[jnp.zeros((len(b), chunk), jnp.float32) for b in blocks] for _ in rows]
    squares = [jnp.zeros((1, chunk), jnp.float32) for _ in rows]
    for start in range(0, width, chunk):
        cols = start + jnp.arange(chunk)
        w = [load_tile(w_ref, b, cols) for b in blocks]
        if norm is not None:
            scale = load_tile(norm[0], norm[1] + one, cols).astype(jnp.float32)
        for i, row in enumerate(rows):
            x = load_tile(x_ref, row + one, cols).astype(jnp.float32)
            if norm is not None:
                squares[i] += x * x
                x *= scale
            sums[i] = [s + tile.astype(jnp.float32) * x for s, tile in zip(sums[i], w, strict=True)]
    outs = [[s.sum(axis=1) for s in row] for row in sums]
    if norm is None:
        return outs
    inv_rms = [lax.rsqrt(s.sum() / width + norm[2]) for s in squares]
    return [[out * inv for out in row] for row, inv in zip(outs, inv_rms, strict=True)]
