"""Read the collectives of a compiled program from its HLO text, and predict what they cost.

XLA decides while it compiles which collectives a sharding needs, so the text of the compiled
program is the only place that has all of them: kind, bytes, and which devices talk to each other.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from nanovllm_jax.tools.roofline import Hardware

# The engine's own kernels that talk to other devices, by their name in the text: kind and mesh
# axis. To XLA they are calls like any other, so the text says neither.
ONE_SHOT = "one-shot all-reduce"
KERNELS = {"one_shot_all_reduce": (ONE_SHOT, "tensor")}

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
         "collective-broadcast", "ragged-all-to-all")  # fmt: skip


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
        each device sends all of it to all others.
        """
        share, latency = (self.group_size - 1) / self.group_size, hardware.latency
        if self.kind == ONE_SHOT:
            share, latency = self.group_size - 1, hardware.one_shot_latency
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
    computations, entry = _computations(hlo)
    merged: dict[Collective, int] = {}
    for one, times in _walk(computations, entry, mesh_shape, 1, ""):
        merged[one] = merged.get(one, 0) + times
    return [replace(one, count=count) for one, count in merged.items()]


class _Instruction(NamedTuple):
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return the instructions of each computation, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if current is None:
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*)?.*\{$", line):
                current = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif head := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line):
            rest = line[head.end() :]
            end = _closing(rest) if rest.startswith("(") else rest.find(" ")
            if call := re.match(r"\s*([a-z][a-z0-9\-]*)\(", rest[end:]):
                current.append(_Instruction(rest[:end], call[1], rest[end + call.end() :]))
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return found, entry


def _closing(text: str) -> int:
    """Return where the parenthesis that `text` starts with has been closed."""
    depth = 0
    for i, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _walk(
    computations: Mapping[str, list[_Instruction]], name: str, mesh_shape: Mapping[str, int],
    times: int, note: str,
) -> Iterator[tuple[Collective, int]]:  # fmt: skip
    """Yield each collective of a computation and of those it calls, with how often it runs."""
    for i in computations.get(name, []):
        if (one := _collective(i, mesh_shape)) and one.group_size > 1:
            yield replace(one, note=note), times
        for callee, trips, why in _calls(i):
            yield from _walk(computations, callee, mesh_shape, times * trips, why or note)


def _calls(i: _Instruction) -> Iterator[tuple[str, int, str]]:
    """Yield what an instruction runs: (computation, how often, why that is not exact)."""

    def named(*attributes: str) -> Iterator[str]:
        for attribute in attributes:
            for value in re.findall(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", i.rest):
                yield from re.findall(r"[\w.\-]+", value)

    if i.opcode in ("fusion", "fusion-start", "call", "async-start", "custom-call"):
        yield from ((name, 1, "") for name in named("calls", "to_apply", "called_computations"))
    elif i.opcode == "while":
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest)
        why = "" if trips else "in a loop of unknown length, counted once"
        yield from ((name, int(trips[1]) if trips else 1, why)
                    for name in named("condition", "body"))  # fmt: skip
    elif i.opcode == "conditional":
        branches = named("branch_computations", "true_computation", "false_computation")
        yield from ((name, 1, "in one branch of a condition") for name in branches)


def _collective(i: _Instruction, mesh_shape: Mapping[str, int]) -> Collective | None:
    """Return the collective that an instruction or a kernel of the engine is, if it is one."""
    op_name = re.search(r'op_name="([^"]*)"', i.rest)
    origin = op_name[1] if op_name else ""
    if i.opcode == "custom-call":
        name = next((name for name in KERNELS if f"/{name}/" in f"/{origin}/"), None)
        if name is None:
            return None
        kind, axis = KERNELS[name]  # sums of bfloat16, maxima of 64-bit keys: it takes words
        size = _num_bytes(i.result)
        return Collective(kind, "words", size, (axis,), mesh_shape[axis], origin)
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    result = i.result
    if kind != i.opcode and (kind != "all-reduce" or result.startswith("((")):
        # An asynchronous one has the type (operands, results, ...).
        result = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", result[1:-1])[1]
    axes, group_size = _devices(i.rest, mesh_shape)
    size = _num_bytes(result) * (group_size if kind == "reduce-scatter" else 1)
    dtype = "+".join(dict.fromkeys(re.findall(r"(\w+)\[", result)))
    # XLA's CPU backend sums 16-bit floats in 32 bits; another one moves 16.
    if dtype == "f32" and re.search(r"to_apply=%?[\w.\-]*_promoted\b", i.rest):
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
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        ends = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int).reshape(-1, 2)
        source, target = (np.array(np.unravel_index(ends[:, k], shape)) for k in (0, 1))
        moved = (source != target).any(axis=1)
        axes = tuple(axis for axis, moves in zip(mesh_shape, moved, strict=True) if moves)
        return axes, math.prod(mesh_shape[axis] for axis in axes)
    groups = _replica_groups(text, math.prod(shape))
    found = {frozenset(group) for group in groups}
    ids = np.arange(math.prod(shape)).reshape(shape)
    names = [axis for axis, size in mesh_shape.items() if size > 1]
    for axes in (axes for n in range(len(names) + 1) for axes in combinations(names, n)):
        if found == {frozenset(g) for g in _along(ids, [*mesh_shape], axes).tolist()}:
            return axes, len(groups[0])
    return None, max(map(len, groups))


def _along(ids: np.ndarray, names: list[str], axes: Iterable[str]) -> np.ndarray:
    """Group the devices of a mesh: those that differ along `axes` only, one group a row."""
    inner = [names.index(axis) for axis in axes]
    outer = [k for k in range(len(names)) if k not in inner]
    size = math.prod(ids.shape[k] for k in inner)
    return ids.transpose(outer + inner).reshape(-1, size)


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
        cut = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2] or ",".join(map(str, cut.values())), mesh[3])
        axes = re.findall(r"'([^']+)'(?:|:\((\d+)\)(\d+))(?:,|$)", mesh[4])
        for name, major, size in axes:
            if size:
                rest = cut[name] // int(major) // int(size)
                parts = {f"{name}:major": int(major), name: int(size), f"{name}:rest": rest}
                items = ((parts if a == name else {a: n}) for a, n in cut.items())
                cut = {a: n for item in items for a, n in item.items()}
        ids = ids.reshape(tuple(cut.values()))
        return _along(ids, [*cut], [name for name, _, _ in axes]).tolist()
    raise ValueError(f"groups of devices in an unknown form: {value[:120]!r}")


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))
