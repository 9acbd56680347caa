"""One product computes gate and up of a gated MLP, and writes silu(gate) * up and nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels._common import LOG2_E, mosaic_problem
from pallas_kernels.mosaic_product import (
    BAND,
    DEPTH,
    LEAD,
    STAGES,
    TILE_COLUMNS,
    TILE_ROWS,
    Plan,
    Settings,
    Tile,
    persistent_product,
)

# Programs of a cluster, which share the weight's copies. By itself, a program at the tensor cores'
# full rate would read 48 bytes per clock from the second-level cache; two read 32 each.
CLUSTER = 2
# Rows from which the kernel is taken. With fewer, a launch for Qwen3-0.6B would have hardly more
# tiles than programs, and nothing would hide their first copies and last gates.
FEWEST_ROWS = 1024
# Rows of x at whose multiples it may end: those of a TMA copy's tile.
ALIGNMENT = 8


def supports_gated_linear(
    num_rows: int, num_out: int, width: int, dtype: DTypeLike, device: Any
) -> bool:
    """Whether `gated_linear` takes such a layer, which has rows enough, on this device."""
    if not _fits(num_rows, num_out, width, dtype) or num_rows < FEWEST_ROWS:
        return False
    return device.platform == "gpu" and mosaic_problem(device) is None


def _fits(num_rows: int, num_out: int, width: int, dtype: DTypeLike) -> bool:
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and num_rows >= TILE_ROWS
        and width >= STAGES * DEPTH
        and num_rows % ALIGNMENT == num_out % TILE_COLUMNS == width % DEPTH == 0
    )


@functools.partial(jax.jit, static_argnames=("stages", "lead", "cluster", "band", "interpret"))
def gated_linear(
    x: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L 2 F D"],
    layer: Int32[Array, ""],
    *,
    stages: int = STAGES,
    lead: int = LEAD,
    cluster: int = CLUSTER,
    band: int = BAND,
    interpret: bool = False,
) -> BFloat16[Array, "T F"]:
    """Return silu(x @ weight[layer, 0].T) * (x @ weight[layer, 1].T) in one kernel on Hopper.

    XLA writes both products to memory and reads them back for the gate (SwiGLU, arXiv:2002.05202).
    Here they stay in registers: float32 until the result is rounded.

    Args:
        weight: gate and up of all layers, so that no slice must be copied for the kernel.
        layer: the layer whose weights are used.
        stages: steps of a tile's product that shared memory holds: 2 to D / 64.
        lead: steps of a tile that the first warpgroup has done before the second begins, fewer than
            `stages`; with 0, they do not wait for each other.
        cluster: programs that share the weight's copies.
        band: tiles of a cluster that a band has one below the other.
        interpret: run in Mosaic's interpreter, which needs jax 0.11.

    Raises:
        ValueError: the shapes do not fit each other or the kernel, the settings do not fit each
            other, or `interpret` is set with an older jax.
    """
    (num_rows, width), num_out = x.shape, weight.shape[2]
    same = weight.dtype == x.dtype and weight.shape[1::2] == (2, width)
    if not same or not _fits(num_rows, num_out, width, x.dtype):
        raise ValueError(
            f"gated_linear takes bfloat16: at least {TILE_ROWS} rows in multiples of {ALIGNMENT}, "
            f"at least {STAGES * DEPTH} inputs in multiples of {DEPTH} and outputs in multiples of "
            f"{TILE_COLUMNS}, not {x.dtype}{x.shape} with {weight.dtype}{weight.shape}"
        )
    settings = Settings(stages, lead, cluster, band)
    settings.check(width)
    row_tiles = pl.cdiv(num_rows, cluster * TILE_ROWS)

    def tile(layer, _, column_tile):
        column = column_tile * TILE_COLUMNS
        gate = layer[0] * (2 * num_out) + column
        return Tile((gate, gate + num_out), column)

    return persistent_product(
        x, weight.reshape(-1, width), jnp.reshape(layer, 1),
        Plan(lambda _: row_tiles, num_out // TILE_COLUMNS, tile, gate_and_up),
        settings, most_row_tiles=row_tiles, out_shape=(num_rows, num_out), interpret=interpret,
        name="gated_linear",
    )  # fmt: skip


def gate_and_up(products):
    """silu(gate) * up of a tile's two halves, inside the kernel."""
    gate, up = products[:, :TILE_COLUMNS], products[:, TILE_COLUMNS:]
    # The approximate reciprocal root is right to about 22 bits, and its square far quicker than an
    # exact division. Where the exponential overflows, it is zero.
    root = lax.rsqrt(1 + jnp.exp2(gate * -LOG2_E))
    return [gate * up * (root * root)]
