"""The products of experts for many rows, which are sorted by expert, on Hopper's tensor cores."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels.gated_linear import gate_and_up
from pallas_kernels.mosaic_product import (
    DEPTH,
    STAGES,
    TILE_COLUMNS,
    Plan,
    Settings,
    Tile,
    persistent_product,
)

# Two programs of a cluster would need blocks of 256 rows, of which more would be padding than the
# weight's second copy costs.
SETTINGS = Settings(cluster=1)


def supports_mosaic_experts(width: int, hidden: int, dtype: DTypeLike) -> bool:
    """Whether the kernels take experts of these sizes: multiples of 256, and bfloat16."""
    least = STAGES * DEPTH
    sizes = min(width, hidden) >= least and width % (2 * TILE_COLUMNS) == hidden % TILE_COLUMNS == 0
    return sizes and jnp.dtype(dtype) == jnp.bfloat16


def gated_blocks(
    x: BFloat16[Array, "blocks*128 D"],
    gate_up: BFloat16[Array, "L E 2 F D"],
    layer: Int32[Array, ""],
    experts: Int32[Array, " blocks"],
    used: Int32[Array, ""],
    *,
    interpret: bool,
) -> BFloat16[Array, "blocks*128 F"]:
    """Return silu(gate(x)) * up(x) of each block's 128 rows.

    Args:
        experts: of the blocks.
        used: the blocks that count, which come first. The places of others are not written.
    """
    _, num_experts, _, hidden, width = gate_up.shape

    def tile(table, block, column_tile):
        column = column_tile * TILE_COLUMNS
        gate = (table[0] * num_experts + table[2 + block]) * (2 * hidden) + column
        return Tile((gate, gate + hidden), column)

    plan = Plan(lambda table: table[1], hidden // TILE_COLUMNS, tile, gate_and_up)
    return persistent_product(
        x, gate_up.reshape(-1, width), _table(layer, experts, used), plan, SETTINGS,
        most_row_tiles=len(experts), out_shape=(len(x), hidden), interpret=interpret,
        name="expert_gate_up",
    )  # fmt: skip


def down_blocks(
    gated: BFloat16[Array, "blocks*128 F"],
    down: BFloat16[Array, "L E D F"],
    layer: Int32[Array, ""],
    experts: Int32[Array, " blocks"],
    used: Int32[Array, ""],
    *,
    interpret: bool,
) -> BFloat16[Array, "blocks*128 D"]:
    """Return down(gated) of each block, in the same places as what `gated_blocks` returned."""
    _, num_experts, width, hidden = down.shape

    def tile(table, block, column_tile):
        column = column_tile * (2 * TILE_COLUMNS)
        first = (table[0] * num_experts + table[2 + block]) * width + column
        return Tile((first, first + TILE_COLUMNS), column)

    def both_halves(products):
        return [products[:, :TILE_COLUMNS], products[:, TILE_COLUMNS:]]

    plan = Plan(lambda table: table[1], width // (2 * TILE_COLUMNS), tile, both_halves)
    return persistent_product(
        gated, down.reshape(-1, hidden), _table(layer, experts, used), plan, SETTINGS,
        most_row_tiles=len(experts), out_shape=(len(gated), width), interpret=interpret,
        name="expert_down",
    )  # fmt: skip


def _table(layer, experts, used) -> Int32[Array, " n"]:
    """The layer, the number of blocks, and the expert of each."""
    return jnp.concatenate([jnp.stack([layer, used]).astype(jnp.int32), experts])
