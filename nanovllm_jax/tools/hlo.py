"""Read the collectives of a compiled program from its HLO text, and predict what they cost.

XLA decides while it compiles which collectives a sharding needs, so the text of the compiled
program is the only place that has all of them: kind, bytes, and which devices talk to each other.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanovllm_jax.tools.roofline import Hardware

# The engine's own kernels that talk to other devices, by their name in the text: kind and mesh
# axis. To XLA they are calls like any other, so the text says neither.
ONE_SHOT, TWO_SHOT = "one-shot all-reduce", "two-shot all-reduce"
KERNELS = {
    f"{name}{norm}": (kind, "tensor")
    for name, kind in (("one_shot_all_reduce", ONE_SHOT), ("two_shot_all_reduce", TWO_SHOT))
    for norm in ("", "_norm")
}

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
         "collective-broadcast", "ragged-all-to-all")  # fmt: skip

# Attributes that name the computations which an instruction runs, by its opcode.
CALLS = {
    **dict.fromkeys(("fusion", "fusion-start", "call", "async-start", "custom-call"),
                    "calls|to_apply|called_computations"),
    "while": "condition|body",
    "conditional": "branch_computations|true_computation|false_computation",
}  # fmt: skip
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
# An instruction: the type of its result, its opcode, and its operands and attributes.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z\d\-]*)\((.*)")


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a program; `count` of them run in one execution of it.

    `num_bytes` is the size of one device's larger buffer: what an all-reduce sums, what an
    all-gather makes, what a reduce-scatter takes, what any other sends.
    """

    kind: str
    dtype: str
    num_bytes: int
    axes: tuple[str, ...] | None  # mesh axes; None: its groups are no product of mesh axes
    group_size: int  # devices that take part in one
    origin: str = ""  # the operation of the model that it was made from
    count: int = 1
    note: str = ""  # why `count` is not exact

    def seconds(self, hardware: Hardware) -> float:
        """Return the time of one, by a ring (a switch makes every pair of devices neighbours).

        Each device sends (n-1)/n of the array for an all-gather, a reduce-scatter or an
        all-to-all, twice that for an all-reduce, which is one after the other: "How to Scale Your
        Model", https://jax-ml.github.io/scaling-book/sharding. In the engine's one-shot all-reduce
        each device sends all of it to all others; its two-shot one is two crossings of the link.
        """
        share, latency = (self.group_size - 1) / self.group_size, hardware.latency
        if self.kind == ONE_SHOT:
            share, latency = self.group_size - 1, hardware.one_shot_latency
        elif self.kind == TWO_SHOT:
            share, latency = 2 * share, 2 * hardware.one_shot_latency
        elif self.kind == "all-reduce":
            share *= 2
        elif self.kind in ("collective-permute", "collective-broadcast"):
            share = 1.0
        return latency + share * self.num_bytes / hardware.link


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return the collectives that one execution of a program runs, equal ones as one entry.

    Args:
        hlo: `Compiled.as_text()`.
        mesh_shape: axis -> size, in the mesh's order; a device's number in the text is its place
            in the mesh, row by row.

    Raises:
        ValueError: the text is of no program, or names groups of devices in an unknown form.
    """
    counts: dict[str, Counter[Collective]] = {}  # by computation, with those that it calls
    entry, current = None, Counter()
    for line in hlo.splitlines():  # computations come before what calls them
        if head := COMPUTATION.match(line):
            current = counts[head[2]] = Counter()
            entry = current if head[1] else entry
        elif instruction := INSTRUCTION.match(line):
            result, opcode, rest = instruction.groups()
            one = _collective(result, opcode, rest, mesh_shape)
            if one and one.group_size > 1:
                current[one] += 1
            if opcode in CALLS:
                callees, trips, note = _calls(opcode, rest)
                for inner, count in (item for c in callees for item in counts.get(c, {}).items()):
                    current[replace(inner, note=inner.note or note)] += count * trips
    if entry is None:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return [replace(one, count=count) for one, count in entry.items()]


def _calls(opcode: str, rest: str) -> tuple[list[str], int, str]:
    """Return the computations that an instruction runs, how often, and why that is not exact."""
    values = re.findall(rf"\b(?:{CALLS[opcode]})=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    note = "in one branch of a condition" if opcode == "conditional" else ""
    if opcode == "while" and not trips:
        note = "in a loop of unknown length, counted once"
    return re.findall(r"[\w.\-]+", " ".join(values)), int(trips[1]) if trips else 1, note


def _collective(
    result: str, opcode: str, rest: str, mesh_shape: Mapping[str, int]
) -> Collective | None:
    """Return the collective that an instruction or a kernel of the engine is, if it is one."""
    op_name = re.search(r'op_name="([^"]*)"', rest)
    origin = op_name[1] if op_name else ""
    if opcode == "custom-call":
        for name, (kind, axis) in KERNELS.items():
            if f"/{name}/" in f"/{origin}/":
                # Words, of bfloat16 sums for one. A norm is a second result, which is not sent.
                size = _num_bytes(result.split("}")[0])
                return Collective(kind, "words", size, (axis,), mesh_shape[axis], origin)
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind != opcode and (kind != "all-reduce" or result.startswith("((")):
        # An asynchronous one has the type (operands, results, ...).
        result = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", result[1:-1])[1]
    axes, group_size = _devices(rest, mesh_shape)
    size = _num_bytes(result) * (group_size if kind == "reduce-scatter" else 1)
    dtype = "+".join(dict.fromkeys(re.findall(r"(\w+)\[", result)))
    # XLA's CPU backend sums 16-bit floats in 32 bits; another one moves 16.
    if dtype == "f32" and re.search(r"to_apply=%?[\w.\-]*_promoted\b", rest):
        size, dtype = size // 2, "bf16"
    return Collective(kind, dtype, size, axes, group_size, origin)


def _num_bytes(result: str) -> int:
    """Count the bytes of all arrays in a type."""
    bits = 0
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        digits = re.search(r"\d+", dtype)  # the width is the first number in a type's name
        width = int(digits[0]) if digits else 8 * (dtype == "pred")
        bits += math.prod(_numbers(shape)) * width
    return bits // 8


# --- Which devices ---


def _devices(text: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...] | None, int]:
    """Return the mesh axes that a collective runs along, and how many devices take part in one."""
    shape = tuple(mesh_shape.values())

    def axes_within(group: Sequence[int]) -> tuple[str, ...]:
        places = zip(mesh_shape, np.unravel_index(group, shape), strict=True)
        return tuple(axis for axis, place in places if np.ptp(place))

    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        moves = [axes_within(_numbers(pair)) for pair in re.findall(r"\d+,\d+", pairs[1])]
        axes = tuple(axis for axis in mesh_shape if any(axis in move for move in moves))
        return axes, math.prod(mesh_shape[axis] for axis in axes)
    groups = _replica_groups(text, math.prod(shape))
    axes, *others = {axes_within(group) for group in groups}
    size = math.prod(mesh_shape[axis] for axis in axes)
    is_whole = {len(group) for group in groups} == {size}  # each has all devices along its axes
    if is_whole and not others and len(groups) * size == math.prod(shape):
        return axes, size
    return None, max(map(len, groups))


def _replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """Read the groups of `replica_groups=`, in any of XLA's three spellings.

    {{0,1},{2,3}}                                     a list; {} is one group of all devices
    [2,4]<=[4,2]T(1,0)                                0, 1, 2, ... reshaped, transposed, reshaped
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'} such numbers, along named axes; 'a':(m)k is
                                                      the middle of an axis cut into (m, k, rest)
    """
    iota, value = r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", value):
        groups = [[*_numbers(group)] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(num_devices))]
    if shaped := re.match(rf"\[([\d,]+)\]<={iota}", value):
        return _iota(shaped[2], shaped[3]).reshape(_numbers(shaped[1])).tolist()
    if mesh := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", value):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']+)'(?:|:\((\d+)\)(\d+))(?:,|$)", mesh[4])
        cuts = {name: (int(major or 1), int(k or sizes[name])) for name, major, k in named}
        shape = []  # every axis in three parts, of which the middle one is within a group
        for name, size in sizes.items():
            major, middle = cuts.get(name, (1, 1))
            shape += [major, middle, size // (major * middle)]
        ids = _iota(mesh[2] or ",".join(map(str, sizes.values())), mesh[3]).reshape(shape)
        ids = np.moveaxis(ids, range(1, ids.ndim, 3), range(-len(sizes), 0))
        if len(cuts) == len(named):  # else several parts of one axis
            return ids.reshape(-1, math.prod(shape[1::3])).tolist()
    raise ValueError(f"groups of devices in an unknown form: {value[:120]!r}")


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))
