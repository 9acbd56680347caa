"""The collectives of a compiled program, read from its HLO text, and what they should cost.

XLA decides while it compiles which collectives a sharding needs, so the text of the compiled
program is the only place that has all of them: kind, bytes, and which devices talk to each other.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

# The engine's own kernels that talk to other devices, by their name in the text. To XLA they are
# calls like any other, so what they do and along which mesh axis is said here.
ONE_SHOT = "one-shot all-reduce"
KERNELS = {"one_shot_all_reduce": (ONE_SHOT, "tensor")}

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
         "collective-broadcast", "ragged-all-to-all")  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a program; `count` of them run in one execution of it.

    `num_bytes` is the size of one device's larger buffer: of what an all-reduce sums, of what an
    all-gather makes, of what a reduce-scatter takes; of what any other sends.
    """

    kind: str
    dtype: str
    num_bytes: int
    axes: tuple[str, ...] | None  # of the mesh; None: its groups are no product of mesh axes
    group_size: int  # devices that take part in one
    origin: str = ""  # the operation of the model that it was made from
    count: int = 1
    note: str = ""  # why `count` is not exact

    def seconds(self, link: float, latency: float, one_shot_latency: float) -> float:
        """Time of one, by a ring (a switch makes every pair of devices neighbours).

        Each device sends (n-1)/n of the array for an all-gather, a reduce-scatter or an
        all-to-all, twice that for an all-reduce, which is one after the other: "How to Scale Your
        Model", https://jax-ml.github.io/scaling-book/sharding. In the engine's one-shot all-reduce
        each sends all of it to all others.

        Args:
            link: bytes a second that a device sends while it receives as many.
            latency: seconds that one of XLA's takes however small it is.
            one_shot_latency: the same of the engine's kernel.
        """
        if self.kind == ONE_SHOT:
            return one_shot_latency + (self.group_size - 1) * self.num_bytes / link
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            share *= 2
        elif self.kind in ("collective-permute", "collective-broadcast"):
            share = 1.0
        return latency + share * self.num_bytes / link


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives that one execution of a compiled program runs, equal ones as one entry.

    Args:
        hlo: `Compiled.as_text()`.
        mesh_shape: axis -> size, in the mesh's order; a device's number in the text is its place
            in the mesh, row by row.

    Raises:
        ValueError: the text names groups of devices in a form that is not known here.
    """
    computations, entry = _computations(hlo)
    merged: dict[Collective, int] = {}
    for one, times in _walk(computations, entry, mesh_shape, 1, ""):
        merged[one] = merged.get(one, 0) + times
    return [replace(one, count=count) for one, count in merged.items()]


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if current is None:
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*)?.*\{$", line):
                current = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current.append(instruction)
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return found, entry


def _instruction(line: str) -> _Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    call = re.match(r"\s*([a-z][a-z0-9\-]*)\(", rest[end:])
    return call and _Instruction(head[1], rest[:end], call[1], rest[end + call.end() - 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with has been closed."""
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
    """Each collective of a computation and of those that it calls, with how often it runs."""
    body = computations.get(name, [])
    # An asynchronous collective is two instructions; the second has the plain result's type.
    done = {
        operands[-1]: i.result
        for i in body
        if i.opcode.endswith("-done") and (operands := _operands(i))
    }
    for i in body:
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            result = done.get(i.name) or _start_result(i, kind)
            one = _collective(i, kind, result, mesh_shape)
            if one.group_size > 1:
                yield replace(one, note=note), times
        elif i.opcode == "custom-call" and (kernel := _kernel(i, mesh_shape)):
            yield replace(kernel, note=note), times
        for callee, trips, why in _calls(i):
            yield from _walk(computations, callee, mesh_shape, times * trips, why or note)


def _operands(i: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", i.rest[: _closing(i.rest)])


def _start_result(i: _Instruction, kind: str) -> str:
    """The result's type, of an instruction that has no -done beside it."""
    if i.opcode == kind or (kind == "all-reduce" and not i.result.startswith("((")):
        return i.result
    parts = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", i.result[1:-1])  # (operands, results, ...)
    return parts[1]


def _calls(i: _Instruction) -> Iterator[tuple[str, int, str]]:
    """(computation, how often, why that is not exact) of what an instruction runs."""

    def named(*attributes: str) -> list[str]:
        names = []
        for attribute in attributes:
            for value in re.findall(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", i.rest):
                names += re.findall(r"[\w.\-]+", value)
        return names

    if i.opcode in ("fusion", "fusion-start", "call", "async-start", "custom-call"):
        yield from ((name, 1, "") for name in named("calls", "to_apply", "called_computations"))
    elif i.opcode == "while":
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest)
        why = "" if trips else "in a loop of unknown length, counted once"
        for name in named("condition", "body"):
            yield name, int(trips[1]) if trips else 1, why
    elif i.opcode == "conditional":
        for name in named("branch_computations", "true_computation", "false_computation"):
            yield name, 1, "in one branch of a condition"


def _collective(
    i: _Instruction, kind: str, result: str, mesh_shape: Mapping[str, int]
) -> Collective:
    axes, size = _devices(i.rest, mesh_shape)
    num_bytes = _num_bytes(result)
    dtype = "+".join(dict.fromkeys(re.findall(r"(\w+)\[", result)))
    if kind == "reduce-scatter":
        num_bytes *= size
    # XLA's CPU backend sums 16-bit floats in 32 bits; another one moves 16.
    if dtype == "f32" and re.search(r"to_apply=%?[\w.\-]*_promoted\b", i.rest):
        num_bytes, dtype = num_bytes // 2, "bf16"
    return Collective(kind, dtype, num_bytes, axes, size, _origin(i.rest))


def _kernel(i: _Instruction, mesh_shape: Mapping[str, int]) -> Collective | None:
    """The collective that a kernel of the engine is, if it is one."""
    origin = _origin(i.rest)
    name = next((name for name in KERNELS if f"/{name}/" in f"/{origin}/"), None)
    if name is None:
        return None
    kind, axis = KERNELS[name]
    # Whatever it combines, sums of bfloat16 or maxima of 64-bit keys, it takes as words.
    return Collective(kind, "words", _num_bytes(i.result), (axis,), mesh_shape[axis], origin)


def _origin(text: str) -> str:
    found = re.search(r'op_name="([^"]*)"', text)
    return found[1] if found else ""


def _num_bytes(result: str) -> int:
    """Of all arrays in a type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    bits = (math.prod(map(int, filter(None, dims.split(",")))) * _bits(t) for t, dims in arrays)
    return sum(bits) // 8


def _bits(dtype: str) -> int:
    """Bits of an element: 8 of pred, none of a token, else the first number in the name."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


# --- Which devices ---


def _devices(text: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...] | None, int]:
    """The mesh axes that a collective runs along, and how many devices take part in one."""
    shape = tuple(mesh_shape.values())
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        ends = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int).reshape(-1, 2)
        source, target = (np.array(np.unravel_index(ends[:, k], shape)) for k in (0, 1))
        moved = (source != target).any(axis=1)
        axes = tuple(axis for axis, moves in zip(mesh_shape, moved, strict=True) if moves)
        return axes, math.prod(mesh_shape[axis] for axis in axes)
    groups = _replica_groups(text, math.prod(shape))
    found = {frozenset(group) for group in groups}
    return _axes_of(found, mesh_shape), max(map(len, groups))


def _axes_of(groups: set[frozenset[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
    """The axes whose devices form exactly these groups."""
    ids = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    names = [axis for axis, size in mesh_shape.items() if size > 1]
    for count in range(len(names) + 1):
        for axes in combinations(names, count):
            if groups == {frozenset(g) for g in _along(ids, [*mesh_shape], axes).tolist()}:
                return axes
    return None


def _along(ids: np.ndarray, names: list[str], axes: Iterable[str]) -> np.ndarray:
    """The devices of a mesh in groups that differ along `axes` only, one group a row."""
    inner = [names.index(axis) for axis in axes]
    outer = [k for k in range(len(names)) if k not in inner]
    size = math.prod(ids.shape[k] for k in inner)
    return ids.transpose(outer + inner).reshape(-1, size)


def _replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """The groups of `replica_groups=`, in any of XLA's three spellings.

    {{0,1},{2,3}}                                     a list; {} is one group of all devices
    [2,4]<=[4,2]T(1,0)                                0, 1, 2, ... reshaped, transposed, reshaped
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'} such numbers, along named axes
    """
    iota, value = r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", value):
        groups = [[*map(int, g.split(","))] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(num_devices))]
    if shaped := re.match(rf"\[([\d,]+)\]<={iota}", value):
        return _iota(shaped[2], shaped[3]).reshape(_numbers(shaped[1])).tolist()
    if mesh := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", value):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        dims = mesh[2] or ",".join(map(str, sizes.values()))
        axes = re.findall(r"'([^']+)'(?:|:\((\d+)\)(\d+))(?:,|$)", mesh[4])
        return _mesh_groups(_iota(dims, mesh[3]), sizes, axes)
    raise ValueError(f"groups of devices in an unknown form: {value[:120]!r}")


def _mesh_groups(
    ids: np.ndarray, sizes: dict[str, int], axes: list[tuple[str, str, str]]
) -> list[list[int]]:
    """Groups along `axes`: (name, "", ""), or (name, m, k) for 'name':(m)k, a part of an axis.

    Such a part is the middle one of an axis that is cut into sizes (m, k, the rest).
    """
    part = {name: (int(major), int(size)) for name, major, size in axes if size}
    cut: dict[str, int] = {}
    for name, size in sizes.items():
        if name in part:
            major, minor = part[name]
            cut |= {f"{name}:major": major, name: minor, f"{name}:rest": size // major // minor}
        else:
            cut[name] = size
    ids = ids.reshape(tuple(cut.values()))
    return _along(ids, [*cut], [name for name, _, _ in axes]).tolist()


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
