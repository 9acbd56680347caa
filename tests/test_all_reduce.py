"""The engine's all-reduce as far as a CPU goes: mailboxes, sizes, lowering, and its PTX simulated.

(tests/gpu runs it.)
"""

import functools
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import h100_mesh, kernels_in, lower_for_h100
from jax.sharding import PartitionSpec
from ptx_machine import Machine

from pallas_kernels import (
    _exchange,
    all_reduce,
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_all_reduce_norm,
    one_shot_max,
    one_shot_sum,
    supports_one_shot,
    supports_one_shot_norm,
)
from pallas_kernels._exchange import ADD, MAX, MAX_BLOCK, SUM, Layout, exchange
from pallas_kernels.all_reduce import _block, _crossings

MOST = 1 << 14  # words


@pytest.mark.parametrize(("shape", "axes"), [((1, 4), ("data", "tensor")), ((2, 4), ("a", "b"))])
@pytest.mark.parametrize("along", [0, 1])
def test_mailboxes_know_their_peers(shape, axes, along):
    """Each device's table has the mailboxes of its own row (or column) of the mesh, in order."""
    if shape[along] == 1:
        shape = shape[::-1]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, axes)
    boxes = make_mailboxes(mesh, axes[along], MOST)
    shards = {shard.device: shard.data for shard in boxes.memory.addressable_shards}
    address = {device: data.unsafe_buffer_pointer() for device, data in shards.items()}
    own = {s.device: np.asarray(s.data) for s in boxes.addresses.addressable_shards}
    peers = shape[along]
    for index, device in np.ndenumerate(devices):
        table = np.asarray(shards[device])[0, : 2 * peers].view("<u8")
        group = np.moveaxis(devices, along, -1)[index[1 - along]]
        assert table.tolist() == [address[peer] for peer in group]
        assert own[device].view("<u8").item() == address[device]
        assert shards[device].nbytes == Layout(peers, MOST).size
        assert not np.asarray(shards[device])[0, 2 * peers :].any()


def test_the_parts_of_a_mailbox_do_not_overlap():
    layout = Layout(peers=8, max_words=MOST)
    assert layout.calls >= 8 * layout.peers
    assert layout.data >= layout.calls + 4 * layout.slots and layout.data % 128 == 0
    assert layout.size == layout.data + 2 * layout.peers * layout.part


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((1, 1024), "bfloat16", True),
        ((1, 256), "bfloat16", True),
        ((1, 128), "bfloat16", False),  # less than a program's smallest block
        ((3, 100), "bfloat16", False),
        ((1, 1024), "float32", False),
        ((8, 4096), "bfloat16", True),
        ((9, 4096), "bfloat16", False),  # more words than the mailboxes have
        ((7, 1280), "bfloat16", False),  # few enough, but in 35 blocks of 128, for 8 programs
    ],
)
def test_what_fits(shape, dtype, fits):
    assert supports_one_shot(shape, jnp.dtype(dtype), MOST) == fits


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((8, 1024), "bfloat16", True),
        ((9, 1024), "bfloat16", False),  # a program takes a row, and there are 8 slots
        ((8, 2560), "bfloat16", True),
        ((4, 5120), "bfloat16", True),
        ((5, 5120), "bfloat16", False),  # such a row takes two slots
        ((1, 8192), "bfloat16", True),
        ((1, 8448), "bfloat16", False),  # more than the threads of a program
        ((2, 128), "bfloat16", False),
        ((2, 1024), "float32", False),
        ((2, 4, 256), "bfloat16", False),
    ],
)
def test_what_fits_with_a_norm(shape, dtype, fits):
    assert supports_one_shot_norm(shape, jnp.dtype(dtype), MOST) == fits


def lowered(function, *shapes, gpus=2):
    """The text of a function of several devices' parts, lowered for GPUs."""
    mesh = h100_mesh(tensor=gpus)
    specs = (PartitionSpec(),) * (len(shapes) - 1) + (PartitionSpec("tensor"),)
    run = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return lower_for_h100(jax.jit(run), *shapes, mesh=mesh)


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


ADDRESSES = shape(2, 2, dtype=jnp.int32)


def test_they_lower_for_a_gpu():
    add = functools.partial(one_shot_all_reduce, axis="tensor", max_words=MOST)
    largest = functools.partial(one_shot_max, axis="tensor", max_words=MOST)
    for rows in (1, 4):
        text = lowered(add, shape(rows, 1024), shape(rows, 1024), ADDRESSES)
        assert kernels_in(text) == ["one_shot_all_reduce"] and 'all_reduce"(' not in text
    text = lowered(largest, shape(3, 2, dtype=jnp.int32), ADDRESSES)
    assert kernels_in(text) == ["one_shot_all_reduce"]
    total = functools.partial(one_shot_sum, axis="tensor", max_words=MOST)
    for rows in (1, 3, 256):
        text = lowered(total, shape(rows, 15, dtype=jnp.float32), ADDRESSES)
        assert kernels_in(text) == ["one_shot_all_reduce"] and 'all_reduce"(' not in text


@pytest.mark.parametrize("width", [256, 1024, 2560, 4096, 5120])
def test_the_one_with_a_norm_lowers_for_a_gpu(width):
    layers, layer = shape(3, width), shape(dtype=jnp.int32)
    add = functools.partial(one_shot_all_reduce_norm, axis="tensor", max_words=MOST, eps=1e-6)
    text = lowered(add, shape(4, width), shape(4, width), layers, layer, ADDRESSES)
    assert kernels_in(text) == ["one_shot_all_reduce_norm"] and 'all_reduce"(' not in text
    with pytest.raises(ValueError, match="rows of up to 8192 numbers in bfloat16, a multiple"):
        lowered(add, shape(9, width), shape(9, width), layers, layer, ADDRESSES)


@pytest.mark.parametrize(
    ("gpus", "rows", "name"), [(2, 256, "one"), (4, 15, "one"), (4, 16, "two")]
)
def test_large_sums_over_four_gpus_cross_the_link_twice(gpus, rows, name):
    x, weight, layer = shape(rows, 4096), shape(3, 4096), shape(dtype=jnp.int32)
    addresses, options = shape(gpus, 2, dtype=jnp.int32), {"axis": "tensor", "max_words": 1 << 20}
    add = functools.partial(one_shot_all_reduce, **options)
    text = lowered(add, x, x, addresses, gpus=gpus)
    assert kernels_in(text) == [f"{name}_shot_all_reduce"]
    add = functools.partial(one_shot_all_reduce_norm, **options, eps=1e-6)
    text = lowered(add, x, x, weight, layer, addresses, gpus=gpus)
    assert kernels_in(text) == [f"{name}_shot_all_reduce_norm"]


def test_too_much_is_refused():
    add = functools.partial(one_shot_all_reduce, axis="tensor", max_words=MOST)
    largest = functools.partial(one_shot_max, axis="tensor", max_words=MOST)
    with pytest.raises(ValueError, match="up to 32768 numbers in bfloat16, a multiple of 256"):
        lowered(add, shape(9, 4096), shape(9, 4096), ADDRESSES)
    with pytest.raises(ValueError, match=r"a residual of \(1, 1024\)"):
        lowered(add, shape(2, 1024), shape(1, 1024), ADDRESSES)
    with pytest.raises(ValueError, match="up to 8192 keys, not 9000"):
        lowered(largest, shape(9000, 2, dtype=jnp.int32), ADDRESSES)
    total = functools.partial(one_shot_sum, axis="tensor", max_words=MOST)
    with pytest.raises(ValueError, match="up to 16384 numbers in float32"):
        lowered(total, shape(4097, 4, dtype=jnp.float32), ADDRESSES)
    with pytest.raises(ValueError, match="in float32, not bfloat16"):
        lowered(total, shape(4, 4), ADDRESSES)


@pytest.mark.parametrize("words", [1, 45, 128, 1100, 2048, 2049, 7680, MOST])
def test_an_array_of_any_size_gets_programs_of_its_own(words, monkeypatch):
    """1,100 words, 1,152 with padding, were once cut into nine programs for mailboxes of eight."""
    cut = []
    monkeypatch.setattr(
        all_reduce, "_exchange", lambda _, x, *rest: cut.append(x.size // _block(x.size)) or x
    )
    x = jnp.arange(words, dtype=jnp.int32)
    got = all_reduce._exchange_padded(MAX, x, None, "tensor", MOST)
    np.testing.assert_array_equal(got, x)
    assert cut == [-(-words // MAX_BLOCK)] and cut[0] <= Layout(2, MOST).slots


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is part of the CUDA toolkit")
@pytest.mark.parametrize("peers", [2, 3, 8])
@pytest.mark.parametrize("combine", [SUM, ADD, MAX], ids=["sum", "float32", "max"])
@pytest.mark.parametrize("block", [128, 2048, 4096])
@pytest.mark.parametrize("crossings", [1, 2])
def test_the_snippet_assembles(combine, peers, block, crossings, tmp_path):
    """XLA hands the snippet to ptxas only when it compiles for a GPU."""
    snippet = exchange(Layout(peers, MOST), combine, block, crossings=crossings)
    snippet = re.sub(r"\$(\d+)", r"%r\1", snippet)
    (tmp_path / "kernel.ptx").write_text(
        f"""
        .version 8.0
        .target sm_90
        .address_size 64
        .visible .entry kernel() {{ .reg .b32 %r<32>; {snippet} ret; }}
    """,
        "utf-8",
    )
    subprocess.run(
        ["ptxas", "-arch=sm_90", "-o", "kernel.cubin", "kernel.ptx"], cwd=tmp_path, check=True
    )


@pytest.mark.parametrize(
    ("peers", "kib", "crossings"),
    [(2, 2048, 1), (3, 256, 1), (3, 512, 2), (4, 64, 1), (4, 128, 2), (8, 32, 1), (8, 64, 2)],
)
def test_a_second_crossing_must_be_worth_it(peers, kib, crossings):
    assert _crossings(peers, kib * 1024) == crossings


# --- The exchange as PTX, on a machine that is simulated ---

SLOT, WARP = 32, 8  # words of a slot and of a warp, fewer than they are, for speed's sake


class Call:
    """One call of the kernel by all GPUs: each program takes `words` of the slots of `block`."""

    def __init__(self, rng, peers, programs, words, block, combine, crossings):
        self.words, self.block, self.combine, self.crossings = words, block, combine, crossings
        shape = (programs, words, 2)
        self.x = rng.standard_normal((peers, *shape)).astype(jnp.bfloat16)
        self.residual = rng.standard_normal(shape).astype(jnp.bfloat16)
        if combine is MAX:
            self.x = rng.integers(0, 2**16, self.x.shape, np.uint16)
        self.threads = []

    def programs(self, machine, gpu):
        """The registers of every thread, as `all_reduce._run` hands them to the snippet."""
        slots = -(-self.block // SLOT)
        x, residual = (a.view(np.uint32)[..., 0] for a in (self.x[gpu], self.residual))
        mine = []
        for program in range(len(x)):
            for column in range(0, self.block, 4):
                slot = program * slots + column // SLOT
                here = column < self.words
                four = slice(column, column + 4) if here else slice(4)
                values = [
                    *(0, 0, 0, 0, *x[program, four].tolist(), *residual[program, four].tolist()),
                    slot * 8 * SLOT + 4 * (column % SLOT),
                    machine.address(gpu) & 0xFFFFFFFF,
                    machine.address(gpu) >> 32,
                    gpu,
                    slot if here else 0xFFFFFFFF,
                ]
                names = [f"${i}" for i in (*range(12), *range(12, 32, 4))]
                mine.append(dict(zip(names, values, strict=True)))
                self.threads.append((gpu, program, column, mine[-1]))
        size = self.block // 4
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def want(self):
        if self.combine is MAX:
            keys = self.x.reshape(len(self.x), -1).view(np.uint64)
            return keys.max(0).view(np.uint32)
        total = functools.reduce(np.add, self.x.astype(np.float32))
        return (total + self.residual.astype(np.float32)).astype(jnp.bfloat16).view(np.uint32)

    def check(self):
        want = self.want().reshape(len(self.residual), -1)
        for gpu, program, column, thread in self.threads:
            expected = want[program, column : column + 4] if column < self.words else [0] * 4
            got = [thread[f"${i}"] for i in range(4)]
            assert got == list(expected), (gpu, program, column)


def play(monkeypatch, seed, peers, crossings):
    """Run a few calls of changing shapes one after the other, and compare every word."""
    monkeypatch.setattr(_exchange, "MAX_BLOCK", SLOT)
    monkeypatch.setattr(_exchange, "WARP_WORDS", WARP)
    rng, layout = np.random.default_rng(seed), Layout(peers, 4 * SLOT)
    machine = Machine(peers, layout.size + -layout.size % 128, seed)
    for gpu in range(peers):
        table = np.array([machine.address(peer) for peer in range(peers)], np.uint64)
        machine.words(machine.address(gpu), 2 * peers)[:] = table.view(np.uint32)
    # Programs, the words of each, and the block that they are padded to.
    shapes = [(4, 8, 8), (2, 32, 32), (2, 40, 64), (1, 8, 8), (3, 16, 16)]
    calls = []
    for either in crossings:
        shape, combine = shapes[rng.integers(len(shapes))], [SUM, SUM, MAX][rng.integers(3)]
        calls.append(Call(rng, peers, *shape, combine, either))

    def snippet_of(number):
        call = calls[number]
        return exchange(layout, call.combine, call.block, crossings=call.crossings)

    queues = [[call.programs(machine, gpu) for call in calls] for gpu in range(peers)]
    machine.run(queues, snippet_of)
    for call in calls:
        call.check()


@pytest.mark.parametrize("peers", [2, 3, 4])
@pytest.mark.parametrize("crossings", ["1111", "2222", "121221"])
def test_the_snippet_on_a_simulated_machine(peers, crossings, monkeypatch):
    """Whatever thread goes on and whenever stores arrive, every GPU gets the same, right bits."""
    for seed in range(4):
        play(monkeypatch, seed, peers, [int(digit) for digit in crossings])
