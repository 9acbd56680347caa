"""Where the time of a run goes: kernels and operators by category, from the framework's profiler.

Both functions return {"seconds": {category: s}, "idle": s or None, "unit": what was summed,
"top": [[name, category, s], ...]}: on a GPU the time of kernels that no earlier kernel covers, and
between first and last kernel the rest as idle; on a CPU the time of operators without what they
call, in which XLA counts every thread and PyTorch the calling one.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Of a kernel's or operator's name and of what it was compiled from; the first match counts.
CATEGORIES = {
    "copies between host and device": r"memcpy|memset",
    "KV write": r"reshape_and_cache|norm_rope_write|write_kv|\bcat\b|CatArray|index_copy|index_put",
    "attention": r"flash|fmha|attention|attn|sdpa|paged_|mosaic_(decode|prefill)|combine",
    "sampling": r"sampl|multinomial|arg_?max|_draw|softmax|topk|gumbel|exponential|distribution",
    "matrix products": r"gemm|gemv|nvjet|cublas|cutlass|split_?k|\b(add|b)?mm\b|matmul|linear|dot",
    "norms, activations, the rest": r"",
}

Event = tuple[float, float, str]  # start, end (any unit of time), name
Times = dict[str, float]  # by name


def category(name: str) -> str:
    """The first category that a name matches."""
    return next(c for c, words in CATEGORIES.items() if re.search(words, name, re.IGNORECASE))


def uncovered(events: Iterable[Event]) -> tuple[Times, float]:
    """Time of each name that no earlier event covers, and the time that none covers."""
    times, idle, covered = defaultdict(float), 0.0, None
    for start, end, name in sorted(events):
        if covered is not None:
            idle += max(0.0, start - covered)
            start = max(start, covered)
        if end > start:
            times[name] += end - start
        covered = end if covered is None else max(covered, end)
    return times, idle


def self_times(events: Iterable[Event]) -> Times:
    """Time of each name less what is nested in it; the events are one thread's."""
    times, open_events = defaultdict(float), []
    for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            times[open_events[-1][1]] -= end - start
        times[name] += end - start
        open_events.append((end, name))
    return times


def jax_profile(run: Callable[[], Any], program: Any) -> dict[str, Any]:
    """Profile `run`. `program` is the compiled step: it says what XLA's kernels were made from."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu:
            options.host_tracer_level = 0  # it slows the host down
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        [file] = Path(folder).glob("**/*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    made_from = _origins(program)

    def events(line: Any) -> list[Event]:
        return [(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in line.events]

    if on_gpu:
        lines = [x for p in planes if "GPU:0" in p.name for x in p.lines if "Stream" in x.name]
        times, idle = uncovered(event for line in lines for event in events(line))
        return _summary(times, idle, "kernels", made_from, 1e-9)
    total = defaultdict(float)
    for line in (x for p in planes if "CPU" in p.name for x in p.lines if "tf_XLA" in x.name):
        for name, time in self_times(events(line)).items():
            if "::" not in name:  # the runtime's own: threads that wait for others
                total[name] += time
    return _summary(total, None, "operators, all threads", made_from, 1e-9)


def torch_profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Profile `run`, of this process alone."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        times = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
        return _summary(times, None, "operators, calling thread", {}, 1e-6)
    kernels = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events() or []
        if "CUDA" in str(e.device_type)
    ]
    return _summary(*uncovered(kernels), "kernels", {}, 1e-6)


def _origins(program: Any) -> dict[str, str]:
    """The operation of the model that each of XLA's own kernels was made from, by its name."""
    lines = re.findall(r"%([\w.\-]+) = .*op_name=\"([^\"]*)\"", program.as_text() or "")
    return {_plain(name): origin for name, origin in lines}


def _plain(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


def _summary(
    times: Times, idle: float | None, unit: str, made_from: dict[str, str], scale: float
) -> dict[str, Any]:
    if not times:
        raise RuntimeError("the profiler saw nothing of this process")
    seconds, named = dict.fromkeys(CATEGORIES, 0.0), []
    for name, time in sorted(times.items(), key=lambda item: -item[1]):
        kind = category(f"{name} {made_from.get(_plain(name), '')}")
        seconds[kind] += time * scale
        named.append([name[:80], kind, time * scale])
    idle = None if idle is None else idle * scale
    return {"seconds": seconds, "idle": idle, "unit": unit, "top": named[:12]}
