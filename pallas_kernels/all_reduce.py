"""A small sum over the GPUs of one process, in one kernel that writes into its peers' memory.

The "one-shot" all-reduce: every GPU sends its part to all others and adds up what arrives, so that
a sum takes one crossing of the link. Beside its operands it needs a *mailbox* on each GPU, whose
address the others know:

    addresses [peers]                            of their mailboxes, 8 bytes each
    calls     [programs]                         how often each program has run
    arrived   [peers, programs]                  the number of the last call that a peer has sent
    data      [2, peers, elements]               of this call and the one before: a fast GPU may be
                                                 one call ahead of a slow one, never two

A program sends its block of elements to the same program on every GPU, then the number of the call,
and waits for that number from all of them. Mailboxes are reached by address, in inline PTX: XLA
knows nothing of them, and the kernel is to XLA, and to its command buffers, like any other.
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

_BLOCKS = (1024, 512, 256)  # elements of a program: 16 bytes, one load, for each thread
_THREAD = 8  # elements


class Layout(NamedTuple):
    """Where the parts of a mailbox begin, in bytes."""

    peers: int
    max_elements: int

    @property
    def programs(self) -> int:
        return self.max_elements // _BLOCKS[-1]

    @property
    def calls(self) -> int:
        return 8 * self.peers

    @property
    def arrived(self) -> int:
        return self.calls + 4 * self.programs

    @property
    def data(self) -> int:
        end = self.arrived + 4 * self.peers * self.programs
        return end + -end % 128

    @property
    def size(self) -> int:
        return self.data + 2 * self.peers * 2 * self.max_elements


class Mailboxes(NamedTuple):
    """The mailboxes of a mesh; the memory must outlive every program that uses the addresses."""

    memory: Int32[Array, "devices words"]
    addresses: Int32[Array, "devices 2"]  # low and high word of each GPU's own


def fits_one_shot(shape: tuple[int, ...], dtype: DTypeLike, max_elements: int) -> bool:
    """Whether `one_shot_all_reduce` takes an array of this shape."""
    size = math.prod(shape)
    return jnp.dtype(dtype) == jnp.bfloat16 and size <= max_elements and size % _BLOCKS[-1] == 0


def make_mailboxes(mesh: Mesh, axis: str, max_elements: int) -> Mailboxes:
    """Mailboxes on every GPU of a mesh, for sums over `axis` of up to so many elements.

    The mesh must lie within one process, and its GPUs must reach each other's memory (NVLink, or
    PCIe peer access; JAX enables it where it exists).
    """
    layout = Layout(mesh.shape[axis], max_elements)
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
    """64-bit addresses [N, n] as int32 [N, 2n], the low words first."""
    return np.ascontiguousarray(addresses, "<u8").view("<i4")


def one_shot_all_reduce(
    x: Float[Array, "M D"],
    residual: Float[Array, "M D"],
    address: Int32[Array, "1 2"],
    axis: str,
    max_elements: int,
) -> Float[Array, "M D"]:
    """Return residual + the sum of `x` over mesh axis `axis`; for use under `jax.shard_map`.

    The sum is computed in float32, in the order of the devices: every GPU gets the same bits.

    Args:
        x: this GPU's part, in bfloat16.
        residual: the same on every GPU of the axis.
        address: of this GPU's mailbox: its shard of `Mailboxes.addresses`.
        max_elements: as given to `make_mailboxes`.

    Raises:
        ValueError: see `fits_one_shot`.
    """
    if not fits_one_shot(x.shape, x.dtype, max_elements) or residual.shape != x.shape:
        raise ValueError(
            f"one_shot_all_reduce takes up to {max_elements} elements of bfloat16, a multiple of "
            f"{_BLOCKS[-1]}, not {x.dtype}{x.shape} and a residual of {residual.shape}"
        )
    block = next(b for b in _BLOCKS if x.size % b == 0)
    code = _ptx(Layout(lax.axis_size(axis), max_elements))
    out = pl.pallas_call(
        functools.partial(_kernel, block=block, code=code),
        grid=(x.size // block,),
        out_shape=jax.ShapeDtypeStruct((x.size // 2,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=block // _THREAD // 32, num_stages=1),
        name="one_shot_all_reduce",
    )(_pairs(x), _pairs(residual), address.reshape(2), lax.axis_index(axis).reshape(1))
    return lax.bitcast_convert_type(out, jnp.bfloat16).reshape(x.shape)


def _pairs(x: Array) -> Int32[Array, " words"]:
    """Pairs of bfloat16 as words."""
    return lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)


def _kernel(x_ref, residual_ref, address_ref, me_ref, out_ref, *, block: int, code: str):
    """One program for `block` elements. Each thread runs the snippet once, with four words."""
    words = block // 2
    mine = pl.program_id(0) * words + jnp.arange(words)

    def spread(scalar):
        return jnp.full((words,), scalar, jnp.int32)

    args = [
        plgpu.load(x_ref.at[mine]),
        plgpu.load(residual_ref.at[mine]),
        mine * 4,
        spread(address_ref[0]),
        spread(address_ref[1]),
        spread(me_ref[0]),
        spread(pl.program_id(0)),
    ]
    per_thread = _THREAD // 2
    (out,) = plgpu.elementwise_inline_asm(
        code,
        args=args,
        constraints=",".join(["=r"] * per_thread + ["r"] * per_thread * len(args)),
        pack=per_thread,
        result_shape_dtypes=[jax.ShapeDtypeStruct((words,), jnp.int32)],
    )
    plgpu.store(out_ref.at[mine], out)


def _ptx(layout: Layout) -> str:
    """The exchange, as one snippet: Pallas takes snippets for pure, and keeps no order of several.

    Operands: four words each of the result, x and residual, then (four times the same, but for the
    first) a word's offset in bytes, the mailbox's address low and high, this GPU's number, the
    program's. The first threads of a program, one for each peer, exchange the calls' numbers.
    """
    peers, programs = layout.peers, layout.programs
    out, x, residual = (["$" + str(first + i) for i in range(4)] for first in (0, 4, 8))
    offset, low, high, me, program = (f"${12 + 4 * i}" for i in range(5))
    part = 2 * layout.max_elements  # bytes of a peer's data
    send = "".join(
        f"ld.global.b64 peer, [mine+{8 * p}]; add.u64 a, peer, to;"
        f"st.global.v4.b32 [a+{layout.data}], {{{', '.join(x)}}};"
        for p in range(peers)
    )
    add_up = "".join(
        f"ld.relaxed.sys.global.v4.b32 {{w0, w1, w2, w3}}, [from+{layout.data + p * part}];"
        + _add_words(["w0", "w1", "w2", "w3"])
        for p in range(peers)
    )
    results = "".join(f"cvt.rn.bf16x2.f32 {out[i]}, s{2 * i + 1}, s{2 * i};" for i in range(4))
    return f"""{{
        .reg .pred ready, flags;
        .reg .b64 mine, peer, a, to, from, o;
        .reg .b32 call, tid, slot, seen, v, w0, w1, w2, w3;
        .reg .f32 s0, s1, s2, s3, s4, s5, s6, s7, f;
        mov.b64 mine, {{{low}, {high}}};
        mov.u32 tid, %tid.x;
        setp.lt.u32 flags, tid, {peers};
        mul.wide.u32 o, {program}, 4;
        add.u64 a, mine, o;
        ld.relaxed.sys.global.b32 call, [a+{layout.calls}];
        add.s32 call, call, 1;
        and.b32 v, call, 1;
        mul.wide.u32 from, v, {peers * part};
        cvt.u64.u32 o, {offset};
        add.u64 from, from, o;
        mul.wide.u32 to, {me}, {part};
        add.u64 to, to, from;
        add.u64 from, from, mine;
        {send}
        bar.sync 0;
        @!flags bra DONE;
        mul.wide.u32 o, tid, 8;
        add.u64 a, mine, o;
        ld.global.b64 peer, [a];
        mad.lo.u32 slot, {me}, {programs}, {program};
        mul.wide.u32 o, slot, 4;
        add.u64 a, peer, o;
        fence.acq_rel.sys;
        st.relaxed.sys.global.b32 [a+{layout.arrived}], call;
        mad.lo.u32 slot, tid, {programs}, {program};
        mul.wide.u32 o, slot, 4;
        add.u64 a, mine, o;
        AGAIN:
        ld.acquire.sys.global.b32 seen, [a+{layout.arrived}];
        sub.s32 v, seen, call;
        setp.lt.s32 ready, v, 0;
        @ready bra AGAIN;
        DONE:
        bar.sync 0;
        mul.wide.u32 o, {program}, 4;
        add.u64 a, mine, o;
        st.global.b32 [a+{layout.calls}], call;
        {"".join(f"mov.f32 s{i}, 0f00000000;" for i in range(8))}
        {add_up}
        {_add_words(residual)}
        {results}
    }}"""


def _add_words(words: list[str]) -> str:
    """Add pairs of bfloat16 to the eight sums; a bfloat16 is the upper half of a float32."""
    return "".join(
        f"shl.b32 v, {word}, 16; mov.b32 f, v; add.f32 s{2 * i}, s{2 * i}, f;"
        f"and.b32 v, {word}, 0xffff0000; mov.b32 f, v; add.f32 s{2 * i + 1}, s{2 * i + 1}, f;"
        for i, word in enumerate(words)
    )
