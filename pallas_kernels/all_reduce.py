"""Small sums and maxima over the GPUs of one process, in one kernel that writes to peers' memory.

In this "one-shot" all-reduce every GPU sends its part to all others and combines what arrives: it
takes one crossing of the link. Beside its operands it needs a *mailbox* on each GPU, whose address
the others know:

    addresses [peers]                      the peers' mailboxes, 8 bytes each
    calls     [slots]                      how often each slot has been used
    data      [2, peers, slots, block]     this call's words and the last one's: a fast GPU may be
                                           one call ahead of a slow one, never two

A program sends its block of words to the same program on every GPU, each word beside the number of
the call, and reads its mailbox until it finds that number beside every word. (NCCL calls this
protocol LL.) A pair of words arrives as one, so there is nothing else to wait for. A program uses
one slot of the mailbox, or two next to each other if its block is that large. A peer whose words
do not come within `_LIMIT_SECONDS` has failed: the program traps, and the GPU reports an error
instead of spinning for ever.

Mailboxes are reached by address, in inline PTX. XLA knows nothing of them; to XLA, and to its
command buffers, the kernel is like any other.
"""

import functools
import math
from collections.abc import Callable
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

# Words of 4 bytes in a slot, and so per program at most; a thread loads four at a time. On two
# H200s the small sums of decoding took 5.1 us (2 KiB) and 8.5 us (160 KiB) with 2,048, and 9.0 and
# 9.8 us with 512. From 640 KiB on, 512 was faster: 10.0 against 11.1 us.
_MAX_BLOCK = 2048
# Words per program, at least: those of a warp.
_MIN_BLOCK = 128
# Words in a row that one program takes whole, in order to norm it: those of 1,024 threads.
_MAX_ROW = 2 * _MAX_BLOCK
# Seconds that a program waits for its peers. They start together but for what delays a healthy GPU:
# another queue, a module's first load.
_LIMIT_SECONDS = 20
# Rounds of waiting between two looks at the clock: some milliseconds. A healthy peer needs a few.
_ROUNDS_PER_LOOK = 4096


class Layout(NamedTuple):
    """The byte offsets of a mailbox's parts."""

    peers: int
    max_words: int

    @property
    def slots(self) -> int:
        return self.max_words // _MAX_BLOCK

    @property
    def calls(self) -> int:
        return 8 * self.peers

    @property
    def data(self) -> int:
        end = self.calls + 4 * self.slots
        return end + -end % 128

    @property
    def size(self) -> int:
        return self.data + 2 * self.peers * self.part

    @property
    def part(self) -> int:
        """The bytes of one peer's data, together with the numbers of the calls."""
        return 8 * _MAX_BLOCK * self.slots


class Mailboxes(NamedTuple):
    """The mailboxes of a mesh; the memory must outlive every program that uses the addresses."""

    memory: Int32[Array, "devices words"]
    addresses: Int32[Array, "devices 2"]  # low and high word of each GPU's own mailbox


def supports_one_shot(shape: tuple[int, ...], dtype: DTypeLike, max_words: int) -> bool:
    """Whether `one_shot_all_reduce` takes an array of this shape."""
    words = math.prod(shape) // 2
    divided = words % _MIN_BLOCK == 0 and words // _block(words) <= max_words // _MAX_BLOCK
    return jnp.dtype(dtype) == jnp.bfloat16 and divided


def _block(words: int) -> int:
    return math.gcd(words, _MAX_BLOCK)


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
) -> Float[Array, "M D"]:
    """Return residual + the sum of `x` over mesh axis `axis`; for use under `jax.shard_map`.

    The sum is computed in float32, in the order of the devices: every GPU gets the same bits.

    Args:
        x: this GPU's part, in bfloat16.
        residual: the same array on every GPU of the axis.
        address: this GPU's shard of `Mailboxes.addresses`.
        max_words: as given to `make_mailboxes`.

    Raises:
        ValueError: `supports_one_shot` denies these shapes or this dtype.
    """
    if not supports_one_shot(x.shape, x.dtype, max_words) or residual.shape != x.shape:
        raise ValueError(
            f"one_shot_all_reduce takes up to {2 * max_words} numbers in bfloat16, a multiple of "
            f"{2 * _MIN_BLOCK}, not {x.dtype}{x.shape} and a residual of {residual.shape}"
        )
    out = _exchange(_SUM, _as_words(x), _as_words(residual), address, axis, max_words)
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
    return _exchange_padded(_MAX, keys, address, axis, max_words)


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
    out = _exchange_padded(_ADD, words, address, axis, max_words)
    return lax.bitcast_convert_type(out, jnp.float32)


def _exchange_padded(combine: "Combine", x, address, axis: str, max_words: int):
    """Combine an array of words of any shape, padded to as few programs as possible."""
    padded = max(_MIN_BLOCK, pl.next_power_of_2(x.size))
    if x.size > _MAX_BLOCK:
        padded = pl.cdiv(x.size, _MAX_BLOCK) * _MAX_BLOCK
    words = jnp.pad(x.reshape(-1), (0, padded - x.size))
    out = _exchange(combine, words, words, address, axis, max_words)
    return out[: x.size].reshape(x.shape)


def supports_one_shot_norm(shape: tuple[int, ...], dtype: DTypeLike, max_words: int) -> bool:
    """Whether `one_shot_all_reduce_norm` takes an array of this shape: a program takes a row."""
    if len(shape) != 2 or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    rows, words = shape[0], shape[1] // 2
    slots = rows * pl.cdiv(words, _MAX_BLOCK)
    return (
        words <= _MAX_ROW and shape[1] % (2 * _MIN_BLOCK) == 0 and slots <= max_words // _MAX_BLOCK
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
            f"multiple of {2 * _MIN_BLOCK}, not {x.dtype}{x.shape} and a residual of "
            f"{residual.shape}"
        )
    rows, words = x.shape[0], x.shape[1] // 2
    block = pl.next_power_of_2(words)
    code = _ptx(Layout(lax.axis_size(axis), max_words), _SUM, block)
    out, normed = pl.pallas_call(
        functools.partial(_norm_kernel, words=words, block=block, code=code, eps=eps),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows * words,), jnp.int32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=block // 4 // 32, num_stages=1),
        name="one_shot_all_reduce_norm",
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


def _exchange(combine: "Combine", x, residual, address, axis: str, max_words: int):
    """Combine the words of `x` over an axis, and with `residual` if `combine` uses it."""
    block = _block(x.size)
    code = _ptx(Layout(lax.axis_size(axis), max_words), combine, block)
    return pl.pallas_call(
        functools.partial(_kernel, block=block, code=code),
        grid=(x.size // block,),
        out_shape=jax.ShapeDtypeStruct((x.size,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=block // 4 // 32, num_stages=1),
        name="one_shot_all_reduce",
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
    slots = pl.cdiv(block, _MAX_BLOCK)
    slot = pl.program_id(0) * slots + column // _MAX_BLOCK

    def spread(scalar):
        return jnp.full((block,), scalar, jnp.int32)

    args = [
        x,
        residual,
        slot * (8 * _MAX_BLOCK) + 4 * (column % _MAX_BLOCK),
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


class Combine(NamedTuple):
    """The PTX that turns four words of every peer into four words of the result."""

    start: str
    add: Callable[[list[str]], str]  # four words of a peer
    finish: Callable[[list[str], list[str]], str]  # (residual, result)


def _add_pairs(words: list[str]) -> str:
    """Add pairs of bfloat16 to eight sums. A bfloat16 is the upper half of a float32."""
    return "".join(
        f"shl.b32 v, {word}, 16; mov.b32 f, v; add.f32 s{2 * i}, s{2 * i}, f;"
        f"and.b32 v, {word}, 0xffff0000; mov.b32 f, v; add.f32 s{2 * i + 1}, s{2 * i + 1}, f;"
        for i, word in enumerate(words)
    )


def _round_pairs(residual: list[str], out: list[str]) -> str:
    rounded = (f"cvt.rn.bf16x2.f32 {out[i]}, s{2 * i + 1}, s{2 * i};" for i in range(4))
    return _add_pairs(residual) + "".join(rounded)


def _add_floats(words: list[str]) -> str:
    return "".join(f"mov.b32 f, {word}; add.f32 s{i}, s{i}, f;" for i, word in enumerate(words))


def _max_keys(words: list[str]) -> str:
    pairs = ((0, words[0], words[1]), (1, words[2], words[3]))
    return "".join(f"mov.b64 k, {{{lo}, {hi}}}; max.u64 m{i}, m{i}, k;" for i, lo, hi in pairs)


_SUM = Combine("".join(f"mov.f32 s{i}, 0f00000000;" for i in range(8)), _add_pairs, _round_pairs)
_ADD = Combine(
    "".join(f"mov.f32 s{i}, 0f00000000;" for i in range(4)),
    _add_floats,
    lambda _, out: "".join(f"mov.b32 {out[i]}, s{i};" for i in range(4)),
)
_MAX = Combine(
    "mov.u64 m0, 0; mov.u64 m1, 0;",
    _max_keys,
    lambda _, out: "".join(f"mov.b64 {{{out[2 * i]}, {out[2 * i + 1]}}}, m{i};" for i in range(2)),
)


def _ptx(layout: Layout, combine: Combine, block: int) -> str:
    """Write the exchange as one snippet, because Pallas keeps no order among several.

    Operands: four words each of the result, x and residual; then the byte at which a thread's data
    begins, the mailbox's address low and high, this GPU's number, and the thread's slot, each given
    four times, of which the first counts. A slot below 0 means that these words do not exist.
    """
    peers, part, half = layout.peers, layout.part, 4 * min(block, _MAX_BLOCK)
    out, x, residual = (["$" + str(first + i) for i in range(4)] for first in (0, 4, 8))
    offset, low, high, me, slot = (f"${12 + 4 * i}" for i in range(5))
    second = layout.data + half  # the second two words of a slot's threads follow the first two
    send = "".join(
        f"ld.global.b64 peer, [mine+{8 * p}]; add.u64 a, peer, to;"
        f"st.volatile.global.v4.b32 [a+{layout.data}], {{{x[0]}, call, {x[1]}, call}};"
        f"st.volatile.global.v4.b32 [a+{second}], {{{x[2]}, call, {x[3]}, call}};"
        for p in range(peers)
    )
    receive = "".join(
        f"AGAIN{p}:"
        f"ld.volatile.global.v4.b32 {{w0, c0, w1, c1}}, [from+{layout.data + p * part}];"
        f"ld.volatile.global.v4.b32 {{w2, c2, w3, c3}}, [from+{second + p * part}];"
        "setp.ne.b32 missing, c0, call;"
        + "".join(f"setp.ne.or.b32 missing, c{i}, call, missing;" for i in (1, 2, 3))
        + f"@!missing bra ARRIVED{p};"
        + f"add.u32 rounds, rounds, 1; and.b32 v, rounds, {_ROUNDS_PER_LOOK - 1};"
        + f"setp.ne.b32 missing, v, 0; @missing bra AGAIN{p};"
        + "mov.u64 now, %globaltimer; setp.eq.u64 first, deadline, 0;"
        + f"@first add.u64 deadline, now, {_LIMIT_SECONDS * 10**9};"
        + f"setp.gt.u64 late, now, deadline; @late trap; bra AGAIN{p};"
        + f"ARRIVED{p}:"
        + combine.add(["w0", "w1", "w2", "w3"])
        for p in range(peers)
    )
    return f"""{{
        .reg .pred missing, first, late, idle;
        .reg .b64 mine, peer, a, to, from, o, k, m0, m1, now, deadline;
        .reg .b32 call, v, rounds, w0, w1, w2, w3, c0, c1, c2, c3;
        .reg .f32 s0, s1, s2, s3, s4, s5, s6, s7, f;
        setp.lt.s32 idle, {slot}, 0;
        @idle bra SENT;
        mov.b64 mine, {{{low}, {high}}};
        mul.wide.u32 o, {slot}, 4;
        add.u64 a, mine, o;
        ld.volatile.global.b32 call, [a+{layout.calls}];
        add.s32 call, call, 1;
        and.b32 v, call, 1;
        mul.wide.u32 from, v, {peers * part};
        cvt.u64.u32 o, {offset};
        add.u64 from, from, o;
        mul.wide.u32 to, {me}, {part};
        add.u64 to, to, from;
        add.u64 from, from, mine;
        {send}
        SENT:
        bar.sync 0;
        @idle bra IDLE;
        and.b32 v, {offset}, {8 * _MAX_BLOCK - 1};
        setp.eq.u32 first, v, 0;
        mul.wide.u32 o, {slot}, 4;
        add.u64 a, mine, o;
        @first st.volatile.global.b32 [a+{layout.calls}], call;
        mov.u32 rounds, 0;
        mov.u64 deadline, 0;
        {combine.start}
        {receive}
        {combine.finish(residual, out)}
        bra DONE;
        IDLE:
        {"".join(f"mov.b32 {word}, 0;" for word in out)}
        DONE:
    }}"""
