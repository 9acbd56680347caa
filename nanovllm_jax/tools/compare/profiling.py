"""Find out where the time of a run goes: kernels and operators by category, as fields of a Profile.

On a GPU the time of each kernel counts from the end of the kernels before it, and what no kernel
covers is idle. On a CPU there is no idle time, and operators count without what they call.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from nanovllm_jax.tools import trace


def jax_profile(run: Callable[[], Any], program: Any) -> dict[str, Any]:
    """Profile `run`. `program` is the compiled step: it says what XLA's kernels were made from."""
    with tempfile.TemporaryDirectory() as folder:
        with trace.tracing(Path(folder)):
            run()
        times, gaps = trace.busy_times(trace.read_events(Path(folder)))
    on_gpu = jax.default_backend() == "gpu"
    unit = "kernels" if on_gpu else "operators, overlapping threads counted once"
    origins = trace.origins(program.as_text() or "")
    return _summary(times, gaps.total() * 1e-9 if on_gpu else None, unit, 1e-9, origins)


def torch_profile(run: Callable[[], Any], batch: int) -> dict[str, Any]:
    """Profile `run` in this process alone, whatever the batch."""
    import torch.profiler

    on_gpu = torch.cuda.is_available()
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        operators = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
        return _summary(operators, None, "operators, calling thread", 1e-6, {})
    events = [e for e in profiler.events() or [] if "CUDA" in str(e.device_type)]
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    times, gaps = trace.busy_times(kernels)
    return _summary(times, gaps.total() * 1e-6, "kernels", 1e-6, {})


def _summary(
    times: Mapping[str, float], idle: float | None, unit: str, scale: float, origins: dict[str, str]
) -> dict[str, Any]:
    """Sum times by category; `scale` is their unit in seconds, in which `idle` is."""
    if not times:
        raise RuntimeError("the profiler saw nothing of this process")
    slowest = sorted(times.items(), key=lambda item: -item[1])
    top = [(name, trace.category(name, origins.get(name, "")), t * scale) for name, t in slowest]
    seconds = {kind: sum(s for _, k, s in top if k == kind) for kind in trace.CATEGORIES}
    top = [(name[:80], kind, s) for name, kind, s in top[:12]]
    return {"seconds": seconds, "idle": idle, "unit": unit, "top": top}
