"""Traces of JAX's profiler: their kernels, the kernels' categories, and the gaps between them.

A GPU's trace has its kernels, by stream. A CPU's has the operations of compiled programs, by
thread, which are taken for kernels here. With several devices only the first is looked at.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax

Event = tuple[int, int, str]  # start and end in ns, the kernel's name

# The category of a kernel, by its name or that of the operation it was compiled from; the first
# match counts. They cover the kernels of the other engines that `compare` runs, too.
CATEGORIES = {
    "copies": r"memcpy|memset",
    "communication": r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective"
    r"|multi_gpu_barrier|psum",
    "KV write": r"norm_rope_write|reshape_and_cache|write_kv|\bcat\b|CatArray|index_(copy|put)",
    "all layers at once": r"^decode_layers",
    "attention": r"paged_|mosaic_(de|pre)|flash|fmha|attention|attn|sdpa|combine",
    "products": r"nvjet|gemm|gemv|cublas|cutlass|split_?k|linear|dot_general|matmul|\b(add|b)?mm\b"
    r"|expert|router|\bmoe|_moe",  # with the choice of experts, and the sum of what they give
    "sampling": r"(^|_)draw|sampl|arg_?max|multinomial|softmax|topk|gumbel|exponential"
    r"|distribution",
    "norms, activations, inputs": r"",
}


def category(name: str, origin: str = "") -> str:
    """Return the first category that matches a kernel's name or origin."""
    text = f"{name} {origin}"
    return next(c for c, words in CATEGORIES.items() if re.search(words, text, re.IGNORECASE))


@contextlib.contextmanager
def tracing(folder: Path, *, perfetto: bool = False) -> Iterator[None]:
    """Trace what runs inside into `folder`, for `read_events` and XProf, or Perfetto as well."""
    options = jax.profiler.ProfileOptions()
    # A CPU's operations are events of the host; on a GPU those only slow the host down.
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 0
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=perfetto, profiler_options=options):
        yield


def read_events(folder: Path, module: str | None = None) -> list[Event]:
    """Return the kernels of the trace in `folder`, by start.

    Args:
        module: the compiled program whose operations count on a CPU; default: every program.
    """
    [file] = folder.glob("**/*.xplane.pb")
    events: list[Event] = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            if "GPU:0" in plane.name and line.name.startswith("Stream"):
                events += [(*_span(e), e.name) for e in line.events]
            elif plane.name == "/host:CPU":
                events += _operations(line, module)
    return sorted(events)


def _operations(line, module: str | None) -> list[Event]:
    """Return a CPU thread's operations; a loop is left to the operations that it contains."""
    events = []
    for e in line.events:
        stats = dict(e.stats)
        ours = stats.get("hlo_module") == module if module else "hlo_module" in stats
        if ours and not stats.get("device_ordinal"):
            events.append((*_span(e), _kernel_name(e.name)))
    events.sort(key=lambda e: (e[0], -e[1]))
    following = [*events[1:], (float("inf"),)]
    return [e for e, after in zip(events, following, strict=False) if after[0] >= e[1]]


def _span(event) -> tuple[int, int]:
    return int(event.start_ns), int(event.start_ns + event.duration_ns)


def module_name(hlo: str) -> str:
    """Return the name of a compiled program, as traces have it."""
    return re.split(r"[ ,]", hlo, maxsplit=2)[1]


def origins(hlo: str) -> dict[str, str]:
    """Return the model's operation that each of XLA's own kernels was made from, by kernel.

    An operation without a name of its own takes that of the loop or call around it, and
    `dot_general` if it is a product or contains one.
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
            op_name = re.search(r'op_name="([^"]*)"', text)
            inside[name] = computation
            own[name] = op_name[1] if op_name else "dot_general" * is_product

    def origin(name: str) -> str:
        if own[name].startswith("jit(") or inside[name] not in caller:
            return own[name]
        return f"{origin(caller[inside[name]])} {own[name]}".rstrip()

    return {_kernel_name(name): origin(name) for name in own}


def _kernel_name(operation: str) -> str:
    """Return XLA's name for the kernel of an operation."""
    return operation.replace(".", "_").replace("-", "_")


def busy_times(events: Iterable[Event]) -> tuple[Counter[str], Counter[str]]:
    """Return the time of each kernel, and of the gaps after each, by name.

    A kernel that is launched before its predecessor has ended waits inside; each is therefore
    counted from the end of those before it. The events come by start.
    """
    times, gaps = Counter(), Counter()
    covered, last = None, ""
    for start, end, name in events:
        if covered is not None and start > covered:
            gaps[last] += start - covered
        if covered is None or end > covered:
            times[name] += end - (start if covered is None else max(start, covered))
            covered, last = end, name
    return times, gaps


def whole_steps(events: Sequence[Event], steps: int) -> tuple[list[Event], int, str]:
    """Cut the trace of a loop down to whole steps, since it begins and ends inside of one.

    The cuts are made at the end of a step's last kernel: of the kernels that run once a step the
    one that is followed by the longest gaps.

    Args:
        events: by start.
        steps: how many were traced, give or take one.

    Returns:
        The events, the first of which has length 0 and marks the beginning; how many steps they
        are; the name of a step's last kernel. If no kernel runs once a step: what came in, and "".
    """
    counts = Counter(name for _, _, name in events)
    once = [name for name, count in counts.items() if abs(count - steps) <= 1 < count]
    if not once:
        return list(events), steps, ""
    _, gaps = busy_times(events)
    last = max(once, key=lambda name: gaps[name])
    ends = [i for i, event in enumerate(events) if event[2] == last]
    first, begin = ends[0], events[ends[0]][1]
    return [(begin, begin, last), *events[first + 1 : ends[-1] + 1]], len(ends) - 1, last
