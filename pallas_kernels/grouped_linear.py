"""The gated MLPs of experts, of which each token uses a few: rows are grouped by their expert.

The rows are the pairs of a token and one of its choices. Sorted by expert, they are cut into blocks
that have one expert each, so that a block is a plain product and an expert that nobody chose is
never read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import (
    Implementation,
    cdiv,
    check_implementation,
    load_tile,
    next_power_of_2,
    use_interpreter,
)
from pallas_kernels.expert_schedule import (
    places,
    schedule,
    schedule_triton,
    supports_schedule_triton,
)
from pallas_kernels.mosaic_experts import down_blocks, gated_blocks, supports_mosaic_experts
from pallas_kernels.mosaic_product import TILE_ROWS


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def expert_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    choices: Int32[Array, "T A"],
    weights: Float[Array, "T A"],
    layer: Int32[Array, ""],
    *,
    implementation: Implementation,
    interpret: bool | None = None,
) -> Float[Array, "T D"]:
    """Return the weighted sum of down(silu(gate(x)) * up(x)) over the experts that x chose.

    Args:
        gate_up, down: the weights of all layers and experts, so that no slice must be copied.
        choices: the A experts of each token. A number outside 0 to E-1 stands for an expert of
            another device and adds nothing.
        weights: the factors of the chosen experts' outputs. The sum is taken in float32 in the
            order of the choices, and rounded once.
        layer: the layer whose weights are used.
        implementation: "mosaic" is the Triton kernels for rows that are few or of odd sizes.
        interpret: run the kernels in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: the shapes do not fit each other, or the implementation is unknown.

    The experts' products follow the idea of MegaBlocks (Gale et al., 2022, arXiv:2211.15841): no
    token is dropped, and no expert's rows are filled up to a capacity.
    """
    check_implementation(implementation)
    num_tokens, width = x.shape
    _, num_experts, _, hidden, _ = gate_up.shape
    fits = gate_up.shape[2:] == (2, hidden, width) and down.shape[1:] == (
        *(num_experts, width, hidden),
    )
    if not fits or choices.shape != weights.shape or len(choices) != num_tokens:
        raise ValueError(
            f"expert_mlp takes x [T, D], gate_up [L, E, 2, F, D], down [L, E, D, F], and choices "
            f"and weights [T, A], not {x.shape}, {gate_up.shape}, {down.shape}, {choices.shape} "
            f"and {weights.shape}"
        )
    here = (choices >= 0) & (choices < num_experts)
    experts = choices.reshape(-1)
    if implementation == "xla":
        outputs = _expert_mlp_xla(x, gate_up[layer], down[layer], experts)
    else:
        interpret = use_interpreter(interpret)
        many = _block_rows(experts.size, num_experts, 16, TILE_ROWS) == TILE_ROWS
        fits = many and supports_mosaic_experts(width, hidden, x.dtype)
        kernels = implementation == "mosaic" and fits
        run = _expert_mlp_mosaic if kernels else _expert_mlp_triton
        outputs = run(x, gate_up, down, experts, layer, interpret=interpret)
    # Rows of experts elsewhere were never written: they may be NaN, which no factor undoes.
    outputs = jnp.where(here[:, :, None], outputs.reshape(*choices.shape, width), 0)
    terms = outputs.astype(jnp.float32) * weights.astype(jnp.float32)[:, :, None]
    terms = [terms[:, a] for a in range(choices.shape[1])]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _block_rows(num_rows: int, num_experts: int, least: int, most: int) -> int:
    """Return the rows of a block: twice an expert's average, so that most experts need one block.

    Up to some hundred rows an expert, reading its weights takes longer than multiplying by them,
    and the padding of a block costs nothing.
    """
    return max(least, min(most, next_power_of_2(max(1, 2 * num_rows // num_experts))))


# --- XLA -------------------------------------------------------------------------------------


def _expert_mlp_xla(x, gate_up, down, experts) -> Float[Array, "R D"]:
    """Block after block; a CPU copies the weights of the block's expert, and of no other."""
    (num_tokens, width), num_rows = x.shape, experts.size
    num_experts, _, hidden, _ = gate_up.shape
    block_rows = _block_rows(num_rows, num_experts, 1, 128)
    order, blocks, used = schedule(experts, num_experts, block_rows)
    order = jnp.pad(order, (0, block_rows))  # a block always reads block_rows of them

    def block_step(b, outputs):
        expert, first, rows = blocks[b]
        row = lax.dynamic_slice_in_dim(order, first, block_rows)
        token = row // (num_rows // num_tokens)
        # As matrices: XLA transposes a weight of three axes for a product.
        gate_and_up = _dot(x[token], gate_up[expert].reshape(-1, width))
        gated = jax.nn.silu(gate_and_up[:, :hidden]) * gate_and_up[:, hidden:]
        output = _dot(gated.astype(x.dtype), down[expert]).astype(x.dtype)
        row = jnp.where(jnp.arange(block_rows) < rows, row, num_rows)
        return outputs.at[row].set(output, mode="drop")

    return lax.fori_loop(0, used, block_step, jnp.zeros((num_rows, width), x.dtype))


def _dot(a, b):
    """Multiply a [M, K] by b [N, K]. HIGHEST: float32 is never TF32; bfloat16 stays as it is."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


# --- Mosaic ----------------------------------------------------------------------------------


def _expert_mlp_mosaic(x, gate_up, down, experts, layer, *, interpret) -> Float[Array, "R D"]:
    """Two kernels over blocks of 128 rows, between a gather and a gather back to the rows' order.

    TMA copies need rows that lie next to each other, and cannot leave out a block's last ones.
    """
    num_tokens, num_experts = len(x), gate_up.shape[1]
    order, blocks, used = schedule(experts, num_experts, TILE_ROWS)
    # Behind a block's last row follow others, whose outputs nobody reads.
    rows = order.at[blocks[:, 1:2] + jnp.arange(TILE_ROWS)].get(mode="clip").reshape(-1)
    of_blocks = x[lax.div(rows, jnp.int32(experts.size // num_tokens))]
    gated = gated_blocks(of_blocks, gate_up, layer, blocks[:, 0], used, interpret=interpret)
    outputs = down_blocks(gated, down, layer, blocks[:, 0], used, interpret=interpret)
    return outputs[places(experts, order, num_experts, TILE_ROWS)]


# --- Triton ----------------------------------------------------------------------------------


def _expert_mlp_triton(x, gate_up, down, experts, layer, *, interpret) -> Float[Array, "R D"]:
    """Two kernels: gate, up and the gating between them; down. Only rows of a block are written."""
    (num_tokens, width), num_rows = x.shape, experts.size
    _, num_experts, _, hidden, _ = gate_up.shape
    # float32 products run on the plain units and need many registers: smaller tiles.
    half = x.dtype.itemsize == 2
    block_rows = _block_rows(num_rows, num_experts, 16, 128 if half else 16)
    if supports_schedule_triton(num_rows, num_experts):
        order, blocks = schedule_triton(experts, num_experts, block_rows, interpret=interpret)
    else:
        order, blocks, _ = schedule(experts, num_experts, block_rows)
    # Columns read at a time and outputs of a program. Few rows are bound by the bytes of weights:
    # many small programs read them in parallel. Many rows are bound by products: large tiles.
    many = block_rows >= 64
    chunk, block_n = (64 if many else 128, 128 if many else 64) if half else (32, 32)
    largest = block_rows == 128  # 3 stages of it are 96 KiB: two programs fit a multiprocessor
    params = plgpu.CompilerParams(
        num_warps=8 if largest else 4, num_stages=(3 if largest else 4) if half else 2
    )

    def call(kernel, rows_in, matrix, num_out, block_n, name):
        block_n = min(block_n, max(16, next_power_of_2(num_out)))
        sizes = dict(block_rows=block_rows, block_n=block_n, chunk=chunk, num_experts=num_experts)
        return pl.pallas_call(
            functools.partial(kernel, **sizes),
            grid=(cdiv(num_out, block_n), len(blocks)),
            out_shape=jax.ShapeDtypeStruct((num_rows, num_out), x.dtype),
            compiler_params=params,
            interpret=interpret,
            name=name,
        )(rows_in, matrix, order, blocks, jnp.reshape(layer, 1))

    gate_up_kernel = functools.partial(_gate_up_kernel, choices=num_rows // num_tokens)
    matrix = gate_up.reshape(-1, width)
    gated = call(gate_up_kernel, x, matrix, hidden, block_n // 2, "expert_gate_up")
    return call(_down_kernel, gated, down.reshape(-1, hidden), width, block_n, "expert_down")


def _gate_up_kernel(
    x_ref, w_ref, order_ref, blocks_ref, layer_ref, out_ref, *,
    choices: int, block_rows: int, block_n: int, chunk: int, num_experts: int,
):  # fmt: skip
    """Run one program per block and `block_n` hidden units; outputs lie in the experts' order."""
    expert, first, rows = (blocks_ref[pl.program_id(1), i] for i in range(3))
    hidden = out_ref.shape[1]
    tile = pl.program_id(0)

    @pl.when(rows > 0)
    def _():
        m = jnp.arange(block_rows)
        row = plgpu.load(order_ref.at[first + m], mask=m < rows, other=0)
        token = lax.div(row, jnp.int32(choices))
        # Gate and up take turns in one product: a wide one is faster, and each pair of outputs lies
        # in the registers of one thread.
        n = jnp.arange(2 * block_n)
        pair, which = lax.div(n, jnp.int32(2)), lax.rem(n, jnp.int32(2))
        hidden_unit = _within(tile * block_n + pair, hidden)
        w_rows = (layer_ref[0] * num_experts + expert) * (2 * hidden) + which * hidden + hidden_unit
        pairs = _product(x_ref, token, w_ref, w_rows, chunk).reshape(block_rows, block_n, 2)
        is_gate = lax.broadcasted_iota(jnp.int32, pairs.shape, 2) == 0
        gate, up = (jnp.where(taken, pairs, 0).sum(axis=2) for taken in (is_gate, ~is_gate))
        gated = gate / (1 + jnp.exp(-gate)) * up
        _store(out_ref, first + m, tile * block_n + jnp.arange(block_n), gated, m < rows)


def _down_kernel(
    x_ref, w_ref, order_ref, blocks_ref, layer_ref, out_ref, *,
    block_rows: int, block_n: int, chunk: int, num_experts: int,
):  # fmt: skip
    """Run one program per block and `block_n` outputs, which go to their rows in token order."""
    expert, first, rows = (blocks_ref[pl.program_id(1), i] for i in range(3))
    num_rows, width = out_ref.shape
    out = pl.program_id(0) * block_n + jnp.arange(block_n)

    @pl.when(rows > 0)
    def _():
        m = jnp.arange(block_rows)
        w_rows = (layer_ref[0] * num_experts + expert) * width + _within(out, width)
        # The rows after the block's own may be unwritten: its last one is repeated instead.
        outputs = _product(x_ref, first + jnp.minimum(m, rows - 1), w_ref, w_rows, chunk)
        row = plgpu.load(order_ref.at[first + m], mask=m < rows, other=num_rows)
        _store(out_ref, row, out, outputs, m < rows)


def _product(x_ref, x_rows, w_ref, w_rows, chunk: int):
    """Multiply rows of x by rows of w, in float32.

    A row that is not wanted may hold anything: it reaches no other row or column of the result.
    """
    width = x_ref.shape[1]

    def step(i, total):
        cols = i * chunk + jnp.arange(chunk)
        mask = cols < width if width % chunk else None
        x, w = (
            load_tile(x_ref, x_rows, cols, None, mask),
            load_tile(w_ref, w_rows, cols, None, mask),
        )
        return total + _dot(x, w)

    total = jnp.zeros((x_rows.shape[0], w_rows.shape[0]), jnp.float32)
    return lax.fori_loop(0, cdiv(width, chunk), step, total)


def _within(numbers, count: int):
    """Repeat the last of `count` outputs in a tile that goes beyond it."""
    return jnp.minimum(numbers, count - 1)


def _store(ref, rows, cols, tile, row_mask):
    """Write the tile's rows that are not masked, and its columns that exist."""
    mask = row_mask[:, None] & (cols < ref.shape[1])[None, :]
    plgpu.store(ref.at[rows[:, None], cols[None, :]], tile.astype(ref.dtype), mask=mask)
