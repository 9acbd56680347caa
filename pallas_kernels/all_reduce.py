"""Small sums and maxima over the GPUs of one process, in one kernel that writes to peers' memory.

In a "one-shot" all-reduce every GPU sends its part to all others and combines what arrives: it
takes one crossing of the link. Large sums over more than two GPUs are faster in two crossings, in
which each GPU combines its share and sends that to all; the results are the same bits. Beside its
operands the kernel needs a *mailbox* on each GPU, whose address the others know. `_exchange.py` has
the mailboxes' layout and what a program does with them.

Mailboxes are reached by address, in inline PTX. XLA knows nothing of them; to XLA, and to its
command buffers, the kernel is like any other. A peer whose words do not come within 20 seconds has
failed: the program traps, and the GPU reports an error instead of spinning for ever.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels._exchange import ADD, MAX, MAX_BLOCK, SUM, WARP_WORDS, Combine, Layout, exchange

# Words in a row that one program takes whole, in order to norm it: those of 1,024 threads.
_MAX_ROW = 2 * MAX_BLOCK
# Bytes that a second crossing must save each GPU to be worth its latency. On four H100s the
# smallest sums took up to 1.4 us more in two crossings, and each KiB that a GPU sent in one took 10
# to 20 ns. Of sums over four GPUs it means those from 128 KiB on.
_WORTH_A_CROSSING = 192 * 1024
_NAMES = {1: "one_shot_all_reduce", 2: "two_shot_all_reduce"}  # of the kernels, by crossings


class Mailboxes(NamedTuple):
    """The mailboxes of a mesh; the memory must outlive every program that uses the addresses."""

    memory: Int32[Array, "devices words"]
    addresses: Int32[Array, "devices 2"]  # low and high word of each GPU's own mailbox


def supports_one_shot(shape: tuple[int, ...], dtype: DTypeLike, max_words: int) -> bool:
    """Whether `one_shot_all_reduce` takes an array of this shape."""
    words = math.prod(shape) // 2
    divided = words % WARP_WORDS == 0 and words // _block(words) <= max_words // MAX_BLOCK
    return jnp.dtype(dtype) == jnp.bfloat16 and divided


def _crossings(peers: int, num_bytes: int) -> int:
    """How often an array of so many bytes should cross the link: once or twice.

    A GPU sends n - 1 copies of it in one crossing, and 2 (n - 1) / n in two: with two GPUs as many.
    """
    saved = num_bytes * (peers - 1) * (peers - 2) // peers
    return 2 if saved >= _WORTH_A_CROSSING else 1


def _block(words: int) -> int:
    return math.gcd(words, MAX_BLOCK)


def make_mailboxes(mesh: Mesh, axis: str, max_words: int) -> Mailboxes:
    """Make the mailboxes of a mesh, for up to `max_words` words of 4 bytes combined over `axis`.

    The mesh must lie within one process, and its GPUs must reach each other's memory (NVLink, or
    PCIe peer access; JAX enables it if it exists).
    """
    layout = Layout(mesh.shape[axis], max_words)
    everyone = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    memory = jnp.zeros((mesh.size, layout.size // 4), jnp.int32, device=everyone)
    own = {s.device: s.data.unsafe_buffer_pointer() for s in memory.addressable_shards}
    at = mesh.axis_names.index(axis)
    by_device = np.array([own[device] for device in mesh.devices.flat], np.uint64)
    grid = np.moveaxis(by_device.reshape(mesh.devices.shape), at, -1)  # [..., peers]
    tables = np.broadcast_to(grid[..., None, :], (*grid.shape, layout.peers))
    tables = np.moveaxis(tables, -2, at).reshape(mesh.size, layout.peers)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everyone)
    def write(memory, tables):
        return memory.at[:, : layout.calls // 4].set(tables)

    memory = write(memory, jax.device_put(_words_of(tables), everyone))
    moved = [s.data.unsafe_buffer_pointer() != own[s.device] for s in memory.addressable_shards]
    assert not any(moved), "the mailboxes were copied while their addresses were written"
    return Mailboxes(memory, jax.device_put(_words_of(by_device[:, None]), everyone))


def _words_of(addresses: np.ndarray) -> np.ndarray:
    """View 64-bit addresses [N, n] as int32 [N, 2n], the low words first."""
    return np.ascontiguousarray(addresses, "<u8").view("<i4")


def one_shot_all_reduce(
    x: Float[Array, "M D"],
    residual: Float[Array, "M D"],
    address: Int32[Array, "1 2"],
    axis: str,
    max_words: int,
    *,
    crossings: int | None = None,
) -> Float[Array, "M D"]:
    """Return residual + the sum of `x` over mesh axis `axis`; for use under `jax.shard_map`.

    The sum is computed in float32, in the order of the devices: every GPU gets the same bits.

    Args:
        x: this GPU's part, in bfloat16.
        residual: the same array on every GPU of the axis.
        address: this GPU's shard of `Mailboxes.addresses`.
        max_words: as given to `make_mailboxes`.
        crossings: of the link, 1 or 2; None: the faster for this size and number of GPUs.

    Raises:
        ValueError: `supports_one_shot` denies these shapes or this dtype.
    """
    if not supports_one_shot(x.shape, x.dtype, max_words) or residual.shape != x.shape:
        raise ValueError(
            f"one_shot_all_reduce takes up to {2 * max_words} numbers in bfloat16, a multiple of "
            f"{2 * WARP_WORDS}, not {x.dtype}{x.shape} and a residual of {residual.shape}"
        )
    out = _exchange(SUM, _as_words(x), _as_words(residual), address, axis, max_words, crossings)
    return _as_bfloat16(out, x.shape)


def one_shot_max(
    keys: Int32[Array, "B 2"], address: Int32[Array, "1 2"], axis: str, max_words: int
) -> Int32[Array, "B 2"]:
    """Return the largest of each key over mesh axis `axis`, as unsigned 64-bit [low, high].

    Raises:
        ValueError: there are more keys than fit into the mailboxes.
    """
    if keys.size > max_words:
        raise ValueError(f"one_shot_max takes up to {max_words // 2} keys, not {len(keys)}")
    return _exchange_padded(MAX, keys, address, axis, max_words)


def one_shot_sum(
    x: Float[Array, "..."], address: Int32[Array, "1 2"], axis: str, max_words: int
) -> Float[Array, "..."]:
    """Return the float32 sum of `x` over mesh axis `axis`, added up in the order of the devices.

    Raises:
        ValueError: there are more numbers than fit into the mailboxes, or they are not float32.
    """
    if x.size > max_words or x.dtype != jnp.float32:
        raise ValueError(
            f"one_shot_sum takes up to {max_words} numbers in float32, not {x.dtype}{x.shape}"
        )
    words = lax.bitcast_convert_type(x, jnp.int32)
    out = _exchange_padded(ADD, words, address, axis, max_words)
    return lax.bitcast_convert_type(out, jnp.float32)


def _exchange_padded(combine: Combine, x, address, axis: str, max_words: int):
    """Combine an array of words of any shape, padded to as few programs as possible."""
    padded = max(WARP_WORDS, pl.next_power_of_2(x.size))
    if x.size > MAX_BLOCK:
        padded = pl.cdiv(x.size, MAX_BLOCK) * MAX_BLOCK
    words = jnp.pad(x.reshape(-1), (0, padded - x.size))
    out = _exchange(combine, words, words, address, axis, max_words)
    return out[: x.size].reshape(x.shape)


def supports_one_shot_norm(shape: tuple[int, ...], dtype: DTypeLike, max_words: int) -> bool:
    """Whether `one_shot_all_reduce_norm` takes an array of this shape: a program takes a row."""
    if len(shape) != 2 or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    rows, words = shape[0], shape[1] // 2
    slots = rows * pl.cdiv(words, MAX_BLOCK)
    return (
        words <= _MAX_ROW and shape[1] % (2 * WARP_WORDS) == 0 and slots <= max_words // MAX_BLOCK
    )


def one_shot_all_reduce_norm(
    x: Float[Array, "M D"],
    residual: Float[Array, "M D"],
    weight: Float[Array, "L D"],
    layer: Int32[Array, ""],
    address: Int32[Array, "1 2"],
    axis: str,
    max_words: int,
    *,
    eps: float,
    crossings: int | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """Return what `one_shot_all_reduce` does, and the RMSNorm of that, in one kernel.

    Args:
        weight: the norm's weights of all layers, so that no slice must be copied for the kernel.
        layer: the layer whose weights are used; one past the last is taken for the last.

    Raises:
        ValueError: `supports_one_shot_norm` denies these shapes or this dtype.
    """
    if not supports_one_shot_norm(x.shape, x.dtype, max_words) or residual.shape != x.shape:
        raise ValueError(
            f"one_shot_all_reduce_norm takes rows of up to {2 * _MAX_ROW} numbers in bfloat16, a "
            f"multiple of {2 * WARP_WORDS}, not {x.dtype}{x.shape} and a residual of "
            f"{residual.shape}"
        )
    rows, words = x.shape[0], x.shape[1] // 2
    block = pl.next_power_of_2(words)
    peers = lax.axis_size(axis)
    crossings = crossings or _crossings(peers, 2 * x.size)
    code = exchange(Layout(peers, max_words), SUM, block, crossings=crossings)
    out, normed = pl.pallas_call(
        functools.partial(_norm_kernel, words=words, block=block, code=code, eps=eps),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows * words,), jnp.int32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=block // 4 // 32, num_stages=1),
        name=f"{_NAMES[crossings]}_norm",
    )(
        _as_words(x), _as_words(residual), _as_words(weight), jnp.reshape(layer, 1),
        address.reshape(2), lax.axis_index(axis).reshape(1),
    )  # fmt: skip
    return _as_bfloat16(out, x.shape), _as_bfloat16(normed, x.shape)


def _as_words(x: Float[Array, "..."]) -> Int32[Array, " n"]:
    """View bfloat16 as words of 4 bytes, the number at the even index in the lower half."""
    return lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)


def _as_bfloat16(words: Int32[Array, " n"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(words, jnp.bfloat16).reshape(shape)


def _exchange(combine: Combine, x, residual, address, axis: str, max_words: int, crossings=None):
    """Combine the words of `x` over an axis, and with `residual` if `combine` uses it."""
    block = _block(x.size)
    peers = lax.axis_size(axis)
    crossings = crossings or _crossings(peers, 4 * x.size)
    code = exchange(Layout(peers, max_words), combine, block, crossings=crossings)
    return pl.pallas_call(
        functools.partial(_kernel, block=block, code=code),
        grid=(x.size // block,),
        out_shape=jax.ShapeDtypeStruct((x.size,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=block // 4 // 32, num_stages=1),
        name=_NAMES[crossings],
    )(x, residual, address.reshape(2), lax.axis_index(axis).reshape(1))


def _kernel(x_ref, residual_ref, address_ref, me_ref, out_ref, *, block: int, code: str):
    """Run one program per `block` words."""
    own = pl.program_id(0) * block + jnp.arange(block)
    x, residual = plgpu.load(x_ref.at[own]), plgpu.load(residual_ref.at[own])
    plgpu.store(out_ref.at[own], _run(code, x, residual, address_ref, me_ref, block, block))


def _norm_kernel(
    x_ref, residual_ref, weight_ref, layer_ref, address_ref, me_ref, out_ref, normed_ref, *,
    words: int, block: int, code: str, eps: float,
):  # fmt: skip
    """Run one program per row of `words` words, of which it computes the norm as well."""
    column = jnp.arange(block)
    here = column < words
    own = pl.program_id(0) * words + column
    layer = jnp.minimum(layer_ref[0], weight_ref.shape[0] // words - 1)
    weight = plgpu.load(weight_ref.at[layer * words + column], mask=here, other=0)
    x, residual = (plgpu.load(ref.at[own], mask=here, other=0) for ref in (x_ref, residual_ref))
    out = _run(code, x, residual, address_ref, me_ref, words, block)
    plgpu.store(out_ref.at[own], out, mask=here)
    # As in layers/norm.py: the mean in float32, x and the result rounded to bfloat16.
    low, high = _unpack(out)
    scale = lax.rsqrt((low * low + high * high).sum() * (0.5 / words) + eps)
    low_weight, high_weight = _unpack(weight)
    normed = _pack(_rounded(low * scale) * low_weight, _rounded(high * scale) * high_weight)
    plgpu.store(normed_ref.at[own], normed, mask=here)


def _unpack(words: Int32[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The float32 values of the bfloat16 in the lower and the upper halves of words."""
    low, high = (lax.bitcast_convert_type(w, jnp.float32) for w in (words << 16, words & -65536))
    return low, high


def _pack(low: Float[Array, " n"], high: Float[Array, " n"]) -> Int32[Array, " n"]:
    """Round float32 to bfloat16 and store them in the lower and the upper halves of words."""
    lower, upper = (lax.bitcast_convert_type(_rounded(x), jnp.int32) for x in (low, high))
    return lower >> 16 & 0xFFFF | upper


def _rounded(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _run(code: str, x, residual, address_ref, me_ref, words: int, block: int):
    """Run the snippet in every thread once, on four of `block` words, of which `words` exist."""
    column = jnp.arange(block)
    slots = pl.cdiv(block, MAX_BLOCK)
    slot = pl.program_id(0) * slots + column // MAX_BLOCK

    def spread(scalar):
        return jnp.full((block,), scalar, jnp.int32)

    args = [
        x,
        residual,
        slot * (8 * MAX_BLOCK) + 4 * (column % MAX_BLOCK),
        spread(address_ref[0]),
        spread(address_ref[1]),
        spread(me_ref[0]),
        jnp.where(column < words, slot, -1),
    ]
    (out,) = plgpu.elementwise_inline_asm(
        code,
        args=args,
        constraints=",".join(["=r"] * 4 + ["r"] * 4 * len(args)),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct((block,), jnp.int32)],
    )
    return out
