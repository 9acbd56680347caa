"""Kernels from a trace of JAX's profiler: their times, their categories, and the gaps between them.

A GPU's trace has its kernels, by stream. A CPU's has the operations of the compiled program, by
thread; they are taken for kernels here. Of several devices only the first is looked at.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

Event = tuple[int, int, str]  # start, end in ns; the kernel's name

# Of a kernel's name, or of the operation that XLA made it from; the first match counts.
CATEGORIES = {
    "communication": r"(?i)nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective"
    r"|multi_gpu_barrier|psum",
    "attention": r"paged_decode|paged_prefill|mosaic_decode|mosaic_prefill|combine",
    "KV write": r"norm_rope_write",
    "products": r"nvjet|gemm|gemv|cublas|cutlass|splitK|fused_linear|dot_general",
    "sampling": r"_draw|argmax|sample",
    "norms, activations, inputs": r".",
}


def category(name: str, origin: str) -> str:
    """The first category that the kernel's name or origin matches."""
    return next(c for c, pattern in CATEGORIES.items() if re.search(pattern, f"{name} {origin}"))


def origins(hlo: str) -> dict[str, str]:
    """The operation of the model that each of XLA's own kernels was made from, by kernel.

    An operation that does not tell is named after what calls its computation (a loop, say), and
    after the product that it is or contains.
    """
    inside, own, caller, with_product = {}, {}, {}, set()
    computation = ""
    for line in hlo.splitlines():  # computations come before what calls them
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
            name, text = found[1], found[2]
            callees = re.findall(r"(?:calls|body|condition)=%([\w.\-]+)", text)
            caller |= dict.fromkeys(callees, name)
            is_product = " dot(" in text or not with_product.isdisjoint(callees)
            if is_product:
                with_product.add(computation)
            said = re.search(r'op_name="([^"]*)"', text)
            inside[name] = computation
            own[name] = said[1] if said else "dot_general" * is_product

    def origin(name: str) -> str:
        if own[name].startswith("jit(") or inside[name] not in caller:
            return own[name]
        return f"{origin(caller[inside[name]])} {own[name]}".rstrip()

    return {_kernel_name(name): origin(name) for name in own}


def read_events(folder: Path, module: str) -> list[Event]:
    """The kernels of the trace in `folder`, by start.

    Args:
        module: the name of the compiled program, by which a CPU's trace is searched.
    """
    [file] = folder.glob("**/*.xplane.pb")
    events = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            if "GPU:0" in plane.name and line.name.startswith("Stream"):
                events += _kernels(line)
            elif plane.name == "/host:CPU":
                events += _operations(line, module)
    return sorted(events)


def _kernels(line) -> list[Event]:
    return [
        (int(e.start_ns), int(e.start_ns + e.duration_ns), e.name)
        for e in line.events
        if "Memcpy" not in e.name and "Memset" not in e.name
    ]


def _operations(line, module: str) -> list[Event]:
    """A CPU thread's operations; a loop, which contains others, is left to those."""
    events = []
    for e in line.events:
        stats = dict(e.stats)
        if stats.get("hlo_module") == module and not stats.get("device_ordinal"):
            end = int(e.start_ns + e.duration_ns)
            events.append((int(e.start_ns), end, _kernel_name(e.name)))
    events.sort(key=lambda e: (e[0], -e[1]))
    following = [*events[1:], (float("inf"),)]
    return [e for e, after in zip(events, following, strict=False) if after[0] >= e[1]]


def _kernel_name(operation: str) -> str:
    """As XLA names the kernel of an operation."""
    return operation.replace(".", "_").replace("-", "_")


def busy_times(events: Iterable[Event]) -> tuple[collections.Counter, collections.Counter]:
    """Times of each kernel, and of the gaps after each, by name, in ns.

    A kernel that is launched before its predecessor has ended waits inside: each is therefore
    counted from the end of those before it.
    """
    times, gaps = collections.Counter(), collections.Counter()
    covered, last = None, ""
    for start, end, name in events:
        if covered is not None and start > covered:
            gaps[last] += start - covered
        begin = start if covered is None else max(start, covered)
        if covered is None or end > covered:
            times[name] += end - begin
            covered, last = end, name
    return times, gaps


def whole_steps(events: Sequence[Event], steps: int) -> tuple[list[Event], int, str]:
    """Cut the trace of a loop down to whole steps.

    A trace begins and ends in the midst of a step. The cuts are made at the end of a kernel that
    runs once a step: of those the one that the longest gaps follow, the last of a step.

    Args:
        events: by start.
        steps: how many were traced, give or take one.

    Returns:
        The events, of which the first has length 0 and marks the beginning; how many steps they
        are; the name of a step's last kernel. The events as they are, `steps` and "" where no
        kernel runs once a step.
    """
    counts = collections.Counter(name for _, _, name in events)
    once = [name for name, count in counts.items() if abs(count - steps) <= 1 < count]
    if not once:
        return list(events), steps, ""
    _, gaps = busy_times(events)
    last = max(once, key=lambda name: gaps[name])
    ends = [i for i, event in enumerate(events) if event[2] == last]
    first, begin = ends[0], events[ends[0]][1]
    return [(begin, begin, last), *events[first + 1 : ends[-1] + 1]], len(ends) - 1, last
