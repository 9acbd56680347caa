#!/usr/bin/env python3
"""Where a decode step's time goes on a GPU: kernels by category, and how long the device idles.

    python scripts/profile_decode.py --random-weights 0.6B --batch 1 16 64 256 --context 384

Runs the engine's own loop, traces some of its steps with JAX's profiler, and sums the kernels. A
kernel that is launched before its predecessor has ended waits inside: the time of each kernel is
therefore counted from the end of the one before it.
"""

import argparse
import collections
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import bench
import jax

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.__main__ import add_engine_options, engine_options

# Of a kernel's name, or of the operation that XLA made it from; the first match counts.
CATEGORIES = {
    "attention": r"paged_decode|paged_prefill|mosaic_decode|mosaic_prefill|combine",
    "KV write": r"norm_rope_write",
    "products": r"nvjet|gemm|gemv|cublas|cutlass|splitK|fused_linear|dot_general",
    "sampling": r"_draw|argmax|sample",
    "norms, activations, inputs": r".",
}


def kernel_events(trace: Path) -> list[tuple[int, int, str]]:
    """(start, end, name) of every kernel on the first GPU, in ns, by start."""
    [file] = trace.glob("**/*.xplane.pb")
    planes = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU:0" in p.name]
    return sorted(
        (int(e.start_ns), int(e.start_ns + e.duration_ns), e.name)
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for e in line.events
        if "Memcpy" not in e.name and "Memset" not in e.name
    )


def origins(program: jax.stages.Compiled) -> dict[str, str]:
    """The operation of the model that each of XLA's own kernels was made from."""
    found = re.findall(r"%([\w.\-]+) = .*op_name=\"([^\"]*)\"", program.as_text() or "")
    return {name.replace(".", "_").replace("-", "_"): origin for name, origin in found}


def category(name: str, origin: str) -> str:
    """The first category that the kernel's name or origin matches."""
    return next(c for c, pattern in CATEGORIES.items() if re.search(pattern, f"{name} {origin}"))


def busy_times(events: Iterable[tuple[int, int, str]]) -> tuple[collections.Counter, int, int]:
    """Time of each kernel name that no earlier kernel covers, its sum, and the idle time, in ns."""
    times, idle, covered = collections.Counter(), 0, None
    for start, end, name in events:
        if covered is not None:
            idle += max(0, start - covered)
            start = max(start, covered)
        if end > start:
            times[name] += end - start
        covered = end if covered is None else max(covered, end)
    return times, sum(times.values()), idle


def profile(llm: LLM, batch: int, context: int, steps: int, top: int) -> None:
    """Trace `steps` decode steps of `batch` sequences and print where their time went."""
    params = SamplingParams(temperature=0.6, max_tokens=2 * steps + 40, ignore_eos=True)
    for i in range(batch):
        llm.add_request([(7 * i + j) % 10_000 for j in range(context)], params)
    while llm.scheduler.waiting or llm.step()[1] > 0:
        llm.step()
    for _ in range(10):
        llm.step()
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = options.python_tracer_level = 0  # they slow the host down
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                llm.step()
        events = kernel_events(Path(folder))
    while not llm.is_finished():
        llm.step()
    if not events:
        print("the trace has no GPU kernels")
        return
    runner = llm._live_runner()
    bucket = next(b for b in runner.decode_buckets if b.num_rows >= batch)
    program = runner.steps[bucket]
    assert isinstance(program, jax.stages.Compiled)  # and not eager
    origin = origins(program)
    times, busy, idle = busy_times(events)
    counts = collections.Counter(name for _, _, name in events)
    shares = collections.Counter()
    for name, time in times.items():
        shares[category(name, origin.get(name, ""))] += time
    total = busy + idle
    ran = steps * total / (events[-1][1] - events[0][0])  # steps that the trace has seen
    print(f"batch {batch}, context {context}: {total / ran / 1e3:,.0f} us a step")
    for name in CATEGORIES:
        print(f"  {name:28} {shares[name] / ran / 1e3:8.1f} us {shares[name] / total:6.1%}")
    print(f"  {'gaps (device idle)':28} {idle / ran / 1e3:8.1f} us {idle / total:6.1%}")
    for name, time in times.most_common(top):
        per_step = counts[name] / ran
        each = time / counts[name] / 1e3
        print(f"    {per_step:5.1f} x {each:7.2f} us  {name[:48]:48} {origin.get(name, '')[-40:]}")


def main() -> int:
    """Profile the batches of the command line."""
    parser = argparse.ArgumentParser(description="Profile decode steps on a GPU.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="model directory")
    add("--random-weights", choices=bench.QWEN3, metavar="SIZE", help="instead: a shape")
    add("--batch", type=int, nargs="+", default=[1, 16, 64, 256], help="sequences")
    add("--context", type=int, default=384, help="prompt tokens of each (default: 384)")
    add("--steps", type=int, default=20, help="steps that are traced (default: 20)")
    add("--top", type=int, default=8, help="kernels to list (default: 8)")
    add_engine_options(parser)
    args = parser.parse_args()
    if (args.model is None) == (args.random_weights is None):
        parser.error("give either MODEL_DIR or --random-weights SIZE")
    options = engine_options(args)
    if args.random_weights:
        options["load_format"] = "dummy"
    with bench.model_directory(args) as path, LLM(str(path), **options) as llm:
        for batch in args.batch:
            profile(llm, batch, args.context, args.steps, args.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
