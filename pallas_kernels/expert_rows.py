"""The gated MLPs of experts for a few tokens, which hardly ever share one: a row at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import load_tile, use_interpreter
from pallas_kernels.fused_linear import chunk_of, row_products

# Rows of a weight that a program multiplies.
_BLOCK = 4


def supports_expert_rows(
    num_pairs: int, num_experts: int, hidden: int, width: int, dtype: DTypeLike
) -> bool:
    """Whether `expert_rows` takes so many pairs of a token and its choice, in 16 bits.

    With up to a quarter as many pairs as experts, few pairs share one, and grouping them would take
    as long as the products.
    """
    two_bytes = jnp.dtype(dtype).itemsize == 2
    fits = all(chunk_of(n) and n % _BLOCK == 0 for n in (hidden, width))
    return two_bytes and fits and 4 * num_pairs <= num_experts


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def expert_rows(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    choices: Int32[Array, "T A"],
    weights: Float[Array, "T A"],
    layer: Int32[Array, ""],
    norm: Float[Array, "L D"] | None = None,
    residual: Float[Array, "T D"] | None = None,
    *,
    eps: float = 0.0,
    interpret: bool | None = None,
) -> Float[Array, "T D"]:
    """Return residual + the weighted sum of the MLPs of the experts that rms_norm(x) chose.

    Two Triton kernels do it: gate and up of every pair of a token and its choice; then down, which
    adds up the choices of a token. Like `fused_linear`, they read each pair's weights once, and
    leave the tensor cores alone.

    Args:
        gate_up, down: the weights of all layers and experts, so that no slice must be copied.
        choices: the experts of each token. A number outside 0 to E-1 stands for an expert of
            another device and adds nothing.
        weights: the factors of the chosen experts' outputs.
        layer: the layer whose weights are used.
        norm: the weights of an RMSNorm of the input, with `eps`, also of all layers; None: no norm.
        residual: added to the result, unless it is None. Everything is added up in float32 and
            rounded once.
        interpret: run the kernels in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: the shapes do not fit each other or the kernels (`supports_expert_rows`).
    """
    (num_tokens, width), num_choices = x.shape, choices.shape[1]
    _, num_experts, _, hidden, _ = gate_up.shape
    same = (
        gate_up.shape[2:] == (2, hidden, width)
        and down.shape[1:] == (num_experts, width, hidden)
        and choices.shape == weights.shape == (num_tokens, num_choices)
    )
    if not same or not supports_expert_rows(choices.size, num_experts, hidden, width, x.dtype):
        raise ValueError(
            f"expert_rows takes 16-bit rows whose pairs are at most a quarter of the experts, and "
            f"sizes in multiples of 128, not {x.dtype}{x.shape} with choices {choices.shape}, "
            f"weights {weights.shape}, gate_up {gate_up.shape} and down {down.shape}"
        )
    call = functools.partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=use_interpreter(interpret),
    )
    chosen, at = choices.reshape(-1), jnp.reshape(layer, 1)
    optional = [] if norm is None else [norm]
    gated = call(
        functools.partial(_gate_up_kernel, num_experts=num_experts, eps=eps),
        grid=(hidden // _BLOCK, choices.size),
        out_shape=jax.ShapeDtypeStruct((choices.size, hidden), x.dtype),
        name="expert_rows_gate_up",
    )(x, gate_up.reshape(-1, width), chosen, at, *optional)
    optional = [] if residual is None else [residual]
    return call(
        functools.partial(_down_kernel, num_experts=num_experts, num_choices=num_choices),
        grid=(width // _BLOCK, num_tokens),
        out_shape=jax.ShapeDtypeStruct((num_tokens, width), x.dtype),
        name="expert_rows_down",
    )(gated, down.reshape(-1, hidden), chosen, weights.reshape(-1), at, *optional)


def _gate_up_kernel(
    x_ref, w_ref, choices_ref, layer_ref, *refs, num_experts: int, eps: float
):  # fmt: skip
    """Run one program per `_BLOCK` hidden units of a pair; pairs elsewhere are not written."""
    *norm_ref, out_ref = refs
    num_pairs, hidden = out_ref.shape
    tile, pair, layer = pl.program_id(0), pl.program_id(1), layer_ref[0]
    expert = choices_ref[pair]

    @pl.when((expert >= 0) & (expert < num_experts))
    def _():
        n = tile * _BLOCK + jnp.arange(_BLOCK)
        gate_rows = (layer * num_experts + expert) * (2 * hidden) + n
        token = lax.div(pair, jnp.int32(num_pairs // x_ref.shape[0]))
        norm = (norm_ref[0], layer, eps) if norm_ref else None
        gate, up = row_products(x_ref, token, w_ref, [gate_rows, gate_rows + hidden], norm)
        gated = gate / (1 + jnp.exp(-gate)) * up
        plgpu.store(out_ref.at[pair, n], gated.astype(out_ref.dtype))


def _down_kernel(
    gated_ref, w_ref, choices_ref, weights_ref, layer_ref, *refs, num_experts: int, num_choices: int
):
    """Run one program per `_BLOCK` outputs of a token. What is elsewhere is read as zeros."""
    *residual_ref, out_ref = refs
    width, hidden = out_ref.shape[1], gated_ref.shape[1]
    token, one = pl.program_id(1), jnp.arange(1)
    n = pl.program_id(0) * _BLOCK + jnp.arange(_BLOCK)
    chunk = chunk_of(hidden)
    total = jnp.zeros((_BLOCK, chunk), jnp.float32)
    for a in range(num_choices):  # unrolled, like the chunks: all loads are under way at once
        pair = token * num_choices + a
        expert, weight = choices_ref[pair], weights_ref[pair].astype(jnp.float32)
        here = (expert >= 0) & (expert < num_experts)
        w_rows = (layer_ref[0] * num_experts + jnp.where(here, expert, 0)) * width + n
        for start in range(0, hidden, chunk):
            cols = start + jnp.arange(chunk)
            w = load_tile(w_ref, w_rows, cols, jnp.broadcast_to(here, n.shape))
            x = load_tile(gated_ref, pair + one, cols, jnp.broadcast_to(here, one.shape))
            total += w.astype(jnp.float32) * (x.astype(jnp.float32) * weight)
    out = total.sum(axis=1)
    if residual_ref:
        out += plgpu.load(residual_ref[0].at[token, n]).astype(jnp.float32)
    plgpu.store(out_ref.at[token, n], out.astype(out_ref.dtype))
