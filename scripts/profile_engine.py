#!/usr/bin/env python3
"""Where a step's time goes: kernels by category beside their limits, and how long the device idles.

    nanovllm-jax profile                                    # the demo model, in seconds
    nanovllm-jax profile --random-weights 0.6B --out DIR    # batch 1 to 256, and a prefill
    nanovllm-jax profile MODEL_DIR --batch 16 --tensor-parallel-size 2 --out DIR

Three measurements of a step: the engine's own loop without the profiler, the compiled step called
back to back without the engine, and the kernels in a trace of the loop. With --out, DIR gets for
each step the trace (for XProf and Perfetto), the compiled program, and the tables as profile.json.
"""

import argparse
import collections
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
from kernel_trace import CATEGORIES, busy_times, category, origins
from measure_steps import (
    SPARE_TOKENS,
    WARM_STEPS,
    Measured,
    measure_decode,
    measure_prefill,
    runner_of,
)
from step_costs import Work, step_costs

from nanovllm_jax import LLM
from nanovllm_jax.__main__ import (
    DEMO_MODEL,
    Parser,
    UsageError,
    add_engine_options,
    engine_options,
    usage_error,
)
from nanovllm_jax.config import EngineConfig


class Workload(NamedTuple):
    """What is profiled, where the user does not say."""

    batch: list[int]
    context: int
    prefill: list[int]  # prompts, and the tokens of each
    max_model_len: int | None = None


FULL = Workload([1, 16, 64, 256], 384, [16, 1024])
DEMO = Workload([4], 64, [2, 128], max_model_len=256)


class Peak(NamedTuple):
    """A device's rates per second; None where unknown."""

    bandwidth: float | None  # bytes
    flops: float | None


def tabulate(
    measured: Measured, hlo: str, costs: dict[str, Work], peak: Peak, layers: int
) -> dict[str, Any]:
    """The times of a step in us, its kernels, and its categories with their work and limits.

    A category's `us_layer` counts the kernels that run in every layer, over the layers.
    """
    origin, steps = origins(hlo), measured.steps
    times, gaps = busy_times(measured.events)
    counts = collections.Counter(name for start, end, name in measured.events if end > start)
    kernels = [
        {
            "name": name,
            "origin": origin.get(name, ""),
            "category": category(name, origin.get(name, "")),
            "calls": counts[name] / steps,
            "us": time / steps / 1e3,
        }
        for name, time in times.most_common()
        if time
    ]
    categories = {}
    for name in CATEGORIES:
        mine = [k for k in kernels if k["category"] == name]
        if not mine and name not in costs:
            continue
        inside = [k for k in mine if "run_layer" in k["origin"] or k["calls"] >= layers - 0.5]
        us, work = sum(k["us"] for k in mine), costs.get(name)
        limit = work.seconds(*peak) if work and name != "communication" else None
        categories[name] = {
            "calls": sum(k["calls"] for k in mine),
            "us": us,
            "us_layer": sum(k["us"] for k in inside) / layers,
            "bytes": work.bytes if work else None,
            "flops": work.flops if work else None,
            "limit_us": None if limit is None else limit * 1e6,
            "share_of_limit": limit * 1e6 / us if limit is not None and us else None,
        }
    between = gaps[measured.last] if measured.last else 0
    busy = sum(times.values()) / steps / 1e3
    return {
        "rows": len(measured.batch.seqs),
        "tokens": measured.batch.num_tokens,
        "context_tokens": sum(measured.batch.starts) + measured.batch.num_tokens,
        "bucket": measured.bucket._asdict(),
        "loop_us": measured.loop * 1e6,
        "alone_us": measured.alone * 1e6,
        "busy_us": busy,
        "traced_steps": steps,
        "gaps_within_us": (sum(gaps.values()) - between) / steps / 1e3,
        "gaps_between_us": between / steps / 1e3,
        "categories": categories,
        "kernels": kernels,
    }


def show(name: str, table: dict[str, Any], layers: int, top: int) -> None:
    """Print a table of `tabulate`."""
    context = table["context_tokens"] / table["rows"]
    print(f"\n{name}: {table['rows']} rows, {table['tokens']} tokens, context {context:,.0f}")

    busy = table["busy_us"]
    for text, us in (
        ("engine's loop, without the profiler", table["loop_us"]),
        ("compiled step alone, back to back", table["alone_us"]),
    ):
        idle = f", device idle {max(0, 1 - busy / us):.1%}" if busy else ""
        print(f"  {text:40} {us:10,.1f} us{idle}")
    if not busy:
        print("  the trace has no kernels of the step: there is nothing to list")
        return
    slower = busy > min(table["loop_us"], table["alone_us"])
    note = ", slowed down by the profiler" if slower else ""
    print(f"  {'kernels, in the trace':40} {busy:10,.1f} us{note}")

    rows = table["categories"]
    known = any(row["limit_us"] is not None for row in rows.values())
    print(f"\n  {'a step':28} {'calls':>6} {'us':>10} {'us/layer':>9} {'MB':>9} {'GFLOP':>9}"
          + known * f" {'limit us':>9} {'share':>6}")  # fmt: skip
    for label, row in rows.items():
        print(f"  {label:28} {_cells(row, known)}")
    keys = ("calls", "us", "us_layer", "bytes", "flops", "limit_us")
    whole: dict[str, Any] = {key: sum(row[key] or 0 for row in rows.values()) for key in keys}
    bounded = [row for label, row in rows.items() if row["bytes"] and label != "communication"]
    if any(row["limit_us"] is None for row in bounded):
        whole["limit_us"] = None
    whole["share_of_limit"] = whole["limit_us"] and whole["limit_us"] / whole["us"]
    print(f"  {'kernels in all':28} {_cells(whole, known)}")
    within, between = table["gaps_within_us"], table["gaps_between_us"]
    print(f"  {'gaps within a step':28} {'':6} {within:10,.1f} {within / layers:9,.2f}")
    if table["bucket"]["num_tokens"] == 0:
        print(f"  {'gaps between steps (traced)':28} {'':6} {between:10,.1f}")
    for kernel in table["kernels"][:top]:
        each = kernel["us"] / kernel["calls"]
        print(f"    {kernel['calls']:6.1f} x {each:9.2f} us  {kernel['name'][:44]:44} "
              f"{kernel['origin'][-40:]}".rstrip())  # fmt: skip


def _cells(row: dict[str, Any], known: bool) -> str:
    def cell(key: str, width: int, spec: str, scale: float = 1) -> str:
        value = row[key]
        return f"{'-' if value is None else format(value / scale, spec):>{width}}"

    cells = [cell("calls", 6, ",.0f"), cell("us", 10, ",.1f"), cell("us_layer", 9, ",.2f")]
    cells += [cell("bytes", 9, ",.2f", 1e6), cell("flops", 9, ",.3f", 1e9)]
    if known:
        cells += [cell("limit_us", 9, ",.1f"), cell("share_of_limit", 6, ".0%")]
    return " ".join(cells)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog="nanovllm-jax profile", description="Where a step's time goes.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="default: the demo model")
    add("--random-weights", choices=bench.QWEN3, metavar="SIZE",
        help=f"instead: {', '.join(bench.QWEN3)}")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="write traces, programs and tables into DIR")
    add("--batch", type=int, nargs="*", metavar="N", help="sequences of the decode steps")
    add("--context", type=int, metavar="N", help="prompt tokens of each")
    add("--prefill", type=int, nargs=2, metavar=("PROMPTS", "TOKENS"),
        help="prompts of one prefill step, and the tokens of each")  # fmt: skip
    add("--steps", type=int, default=20, help="decode steps that are traced (default: 20)")
    add("--timed-steps", type=int, default=50, help="and those that are timed (default: 50)")
    add("--top", type=int, default=8, help="kernels to list (default: 8)")
    add("--bandwidth", type=float, metavar="TB/S", help="memory bandwidth of a device")
    add("--flops", type=float, metavar="TFLOP/S", help="matrix products' rate of a device")
    add_engine_options(parser)
    args = parser.parse_args(argv)
    if args.model and args.random_weights:
        raise UsageError(
            f"{args.model} and --random-weights {args.random_weights} are two models: give one"
        )
    args.default = FULL if args.model or args.random_weights else DEMO
    if args.default is DEMO:
        args.model = DEMO_MODEL
    for name in ("batch", "context", "prefill"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.default, name))
    if args.enforce_eager:
        raise UsageError("--enforce-eager leaves no compiled step to profile: leave it out")
    positive: dict[str, float | None] = {
        "--batch": min(args.batch, default=1), "--context": args.context,
        "--prefill": min(args.prefill), "--top": args.top + 1,
        "--bandwidth": args.bandwidth, "--flops": args.flops,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be positive, got {value}")
    for name, value in {"--steps": args.steps, "--timed-steps": args.timed_steps}.items():
        if value < 2:
            raise UsageError(f"{name} must be at least 2, got {value}")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {args.out} cannot be made a directory: {error}") from error
    return args


def options_for(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's options: the user's, and room for the workload where they say nothing."""
    prompts, length = args.prefill
    options = engine_options(args)
    options = {"max_num_seqs": max(prompts, *args.batch, 1)} | options
    if args.default.max_model_len:
        longest = max(args.context + _decode_tokens(args), length + 1, args.default.max_model_len)
        options = {"max_model_len": longest} | options
    if args.random_weights:
        options["load_format"] = "dummy"
    return options


def check_fit(args: argparse.Namespace, config: EngineConfig) -> None:
    """Refuse a workload that the engine's limits do not hold, with the option to change."""
    prompts, length = args.prefill
    longest, tokens = args.context + _decode_tokens(args), prompts * length
    limits = [
        (f"--batch {max(args.batch, default=0)}", max(args.batch, default=0), "max_num_seqs"),
        (f"--prefill {prompts} {length}", prompts, "max_num_seqs"),
        (f"--prefill {prompts} {length}", tokens, "max_num_batched_tokens"),
        (f"--prefill {prompts} {length}", length + 1, "max_model_len"),
    ]
    if args.batch:
        text = f"--context {args.context} and {_decode_tokens(args)} decoded tokens"
        limits.append((text, longest, "max_model_len"))
    for what, needed, name in limits:
        if needed > (limit := getattr(config, name)):
            raise UsageError(f"{what} needs {name} of {needed}, it is {limit}: lower the one or "
                             f"raise the other (--{name.replace('_', '-')})")  # fmt: skip


def check_blocks(args: argparse.Namespace, llm: LLM) -> None:
    """Refuse a workload whose sequences do not lie in the KV cache at the same time."""
    pool = sum(len(pool.blocks) for pool in llm.pools)
    needs = [(f"--batch {b}", b, args.context + _decode_tokens(args)) for b in args.batch]
    needs.append(("--prefill", args.prefill[0], args.prefill[1] + 1))
    for what, count, tokens in needs:
        if (blocks := count * llm.pools[0].blocks_for(tokens)) > pool:
            raise UsageError(
                f"{what}: {count} sequences of {tokens} tokens need {blocks} blocks of KV cache, "
                f"there are {pool}: lower it, or raise --num-kvcache-blocks or "
                "--gpu-memory-utilization"
            )


def _decode_tokens(args: argparse.Namespace) -> int:
    return WARM_STEPS + args.timed_steps + args.steps + SPARE_TOKENS


def load(args: argparse.Namespace, path: Path) -> LLM:
    """The engine, or UsageError."""
    options = options_for(args)
    try:
        config = EngineConfig.from_kwargs(
            str(path), **{"max_num_batched_tokens": 1 << 30} | options
        )
        room = max(config.max_model_len, args.prefill[0] * args.prefill[1])
        options = {"max_num_batched_tokens": room} | options
        check_fit(args, EngineConfig.from_kwargs(str(path), **options))
        return LLM(str(path), **options)
    except (AssertionError, TypeError, ValueError, OSError) as error:
        raise usage_error(error) from error


def keep(trace: Path, hlo: str, out: Path, name: str) -> dict[str, str]:
    """Move a step's trace and program into `out`; returns where they are, relative to it."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(trace, folder)
    [perfetto] = folder.glob("**/perfetto_trace.json.gz")
    perfetto.replace(folder / "perfetto.json.gz")
    (folder / "hlo.txt").write_text(hlo)
    return {"xprof": name, "perfetto": f"{name}/perfetto.json.gz", "hlo": f"{name}/hlo.txt"}


def main(argv: Sequence[str]) -> int:
    """Profile what the command line asks for, print it, and return 0.

    Raises:
        UsageError: it cannot be done; the text says why.
    """
    args = parse(argv)
    with bench.model_directory(args) as path, load(args, path) as llm:
        check_blocks(args, llm)
        runner = runner_of(llm)
        model, devices = runner.model_config, runner.sharding.size("heads")
        kind = runner.sharding.mesh.devices.flat[0].device_kind
        bandwidth = args.bandwidth or bench.rate_of(bench.BANDWIDTH, kind)
        # The products' known rates are those of 16 bits.
        flops = args.flops or (model.dtype == "bfloat16" and bench.rate_of(bench.FLOPS, kind))
        peak = Peak(bandwidth and bandwidth * 1e12, flops * 1e12 if flops else None)
        name = args.random_weights or path.resolve().name
        print(f"{name} on {devices} x {kind}, {model.dtype}, jax {jax.__version__}")
        for rate, unit, option in (
            (bandwidth, "TB/s", "--bandwidth"),
            (flops, "TFLOP/s", "--flops"),
        ):
            said = f"{rate:g} {unit}" if rate else f"unknown, so no share of it ({option} tells it)"
            print(f"{option[2:]} of {kind} in {model.dtype}: {said}")
        report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": name, "dtype": model.dtype, "kv_cache_dtype": str(runner.programs.cache_dtype),
            "device": kind, "devices": devices, "jax": jax.__version__,
            "bandwidth": peak.bandwidth, "flops": peak.flops, "steps": {},
        }  # fmt: skip
        prompts, length = args.prefill
        todo: dict[str, Callable[[Path], Measured]] = {
            f"decode-{n}": lambda folder, n=n: measure_decode(
                llm, n, args.context, args.steps, args.timed_steps, folder
            )
            for n in args.batch
        }
        todo[f"prefill-{prompts}x{length}"] = lambda folder: measure_prefill(
            llm, prompts, length, folder
        )
        for step, measure in todo.items():
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace"
                measured = measure(trace)
                hlo = runner.steps[measured.bucket].as_text() or ""
                batch = measured.batch
                costs = step_costs(
                    model,
                    batch.starts,
                    batch.lengths,
                    devices,
                    runner.programs.cache_dtype.itemsize,
                )
                table = tabulate(measured, hlo, costs, peak, model.num_layers)
                if args.out:
                    table["files"] = keep(trace, hlo, args.out, step)
            show(step, table, model.num_layers, args.top)
            report["steps"][step] = table
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{args.out}: profile.json, and for each step hlo.txt, perfetto.json.gz and the "
              "profile that XProf opens")  # fmt: skip
    return 0


if __name__ == "__main__":
    from nanovllm_jax.__main__ import main as command_line

    sys.exit(command_line(["profile", *sys.argv[1:]]))
