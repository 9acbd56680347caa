"""Rows sorted by their expert and cut into blocks of one expert."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from pallas_kernels._common import cdiv, next_power_of_2

# Comparisons of a row with an expert that one program of the kernel makes at most: 4,096 for each
# of its threads. Beyond, sorting is less work, and some launches more do not count.
_MOST_COMPARED = 2**19


def schedule(
    experts: Int32[Array, " R"], num_experts: int, block_rows: int
) -> tuple[Int32[Array, " R"], Int32[Array, "blocks 3"], Int32[Array, ""]]:
    """Sort the rows by expert, and cut them into blocks of one expert.

    Args:
        experts: each row's expert. A number outside 0 to E-1 is none: the row is in no block.

    Returns:
        The rows in the order of their experts; of each block its expert, the place of its first row
        in that order, and its number of rows; and the number of blocks that have any: they are the
        first ones.
    """
    num_rows = experts.size
    experts = jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    # The key holds the row itself: an unstable sort of one array is enough.
    keys = jnp.sort(experts * num_rows + jnp.arange(num_rows, dtype=jnp.int32))
    order = lax.rem(keys, jnp.int32(num_rows))
    before = experts[None, :] < jnp.arange(num_experts + 1, dtype=jnp.int32)[:, None]
    firsts = before.sum(axis=1, dtype=jnp.int32)  # [E+1]
    counts = firsts[1:] - firsts[:-1]
    ends = jnp.cumsum(cdiv(counts, block_rows), dtype=jnp.int32)  # in blocks

    num_blocks = _most_blocks(num_rows, num_experts, block_rows)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = (ends[None, :] <= block[:, None]).sum(axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)  # blocks past the end find no rows left there
    offset = (block - jnp.append(0, ends)[expert]) * block_rows
    rows = jnp.clip(counts[expert] - offset, 0, block_rows)
    return order, jnp.stack([expert, firsts[expert] + offset, rows], axis=1), ends[-1]


def _most_blocks(num_rows: int, num_experts: int, block_rows: int) -> int:
    return num_rows // block_rows + min(num_experts, num_rows)


def supports_schedule_triton(num_rows: int, num_experts: int) -> bool:
    """Whether `schedule_triton` is the faster one."""
    return num_rows * num_experts <= _MOST_COMPARED


def places(
    experts: Int32[Array, " R"], order: Int32[Array, " R"], num_experts: int, block_rows: int
) -> Int32[Array, " R"]:
    """Where each row lies if every block of `schedule` takes `block_rows` places.

    A row that is in no block gets any place.
    """
    each = jnp.arange(num_experts, dtype=jnp.int32)
    counts = (experts[None, :] == each[:, None]).sum(axis=1, dtype=jnp.int32)
    firsts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    blocks = cdiv(counts, block_rows)
    padding = (jnp.cumsum(blocks, dtype=jnp.int32) - blocks) * block_rows - firsts
    at = (
        jnp.arange(experts.size, dtype=jnp.int32)
        + padding[jnp.clip(experts[order], 0, num_experts - 1)]
    )
    return jnp.zeros_like(order).at[order].set(at, unique_indices=True)


def schedule_triton(
    experts: Int32[Array, " R"], num_experts: int, block_rows: int, *, interpret: bool
) -> tuple[Int32[Array, " R+1"], Int32[Array, "blocks 3"]]:
    """Return the first two results of `schedule` by one kernel, where XLA starts six.

    The order leaves out the rows that are in no block. Its last place is for what is masked: the
    interpreter writes that, too.
    """
    num_blocks = _most_blocks(experts.size, num_experts, block_rows)
    return pl.pallas_call(
        functools.partial(_kernel, num_experts=num_experts, block_rows=block_rows),
        grid=(num_experts + 1,),
        out_shape=(
            jax.ShapeDtypeStruct((experts.size + 1,), jnp.int32),
            jax.ShapeDtypeStruct((num_blocks, 3), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="expert_schedule",
    )(experts)


def _kernel(experts_ref, order_ref, blocks_ref, *, num_experts: int, block_rows: int):
    """Run one program per expert, which counts all rows and places its own; the last ends blocks.

    A row comes after those of experts before its own, and after those of its own before it.
    """
    num_rows, num_blocks = experts_ref.shape[0], blocks_ref.shape[0]
    own, expert = pl.program_id(0), jnp.arange(next_power_of_2(num_experts))

    def rows_and_experts(i, size):
        row = i * size + jnp.arange(size)
        found = plgpu.load(experts_ref.at[row], mask=row < num_rows, other=num_experts)
        return row, jnp.where(row < num_rows, found, -1)

    def count(i, counts):
        _, found = rows_and_experts(i, 64)
        return counts + (expert[:, None] == found[None, :]).astype(jnp.int32).sum(axis=1)

    counts = lax.fori_loop(0, cdiv(num_rows, 64), count, jnp.zeros(expert.shape, jnp.int32))
    before = expert < jnp.minimum(own, num_experts)
    first = jnp.where(before, counts, 0).sum()
    first_block = jnp.where(before, cdiv(counts, block_rows), 0).sum()
    rows = jnp.where((expert == own) & (own < num_experts), counts, 0).sum()

    def place(i, placed):
        row, found = rows_and_experts(i, 1024)
        mine = (found == own) & (own < num_experts)
        rank = placed + lax.cumsum(mine.astype(jnp.int32)) - 1
        plgpu.store(order_ref.at[jnp.where(mine, first + rank, num_rows)], row, mask=mine)
        return placed + mine.astype(jnp.int32).sum()

    lax.fori_loop(0, cdiv(num_rows, 1024), place, jnp.int32(0))
    block = jnp.arange(next_power_of_2(num_blocks))
    last = jnp.where(own < num_experts, cdiv(rows, block_rows), num_blocks - first_block)
    of_block = (
        jnp.broadcast_to(jnp.minimum(own, num_experts - 1), block.shape),
        first + block * block_rows,
        jnp.clip(rows - block * block_rows, 0, block_rows),
    )
    for i, value in enumerate(of_block):
        plgpu.store(blocks_ref.at[first_block + block, i], value, mask=block < last)
