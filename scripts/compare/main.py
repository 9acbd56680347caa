"""The command line of `nanovllm-jax compare`: engines in turn, one process each, then the report.

nanovllm-jax compare                          # the demo model, a report in compare.html
nanovllm-jax compare --random-weights 0.6B --output h100
nanovllm-jax compare --random-weights 0.6B --output h100 --add --engines vllm
nanovllm-jax compare --from h100.jsonl        # the report again
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import bench

from compare import machine, random_model, report, workloads
from compare.adapters import ENGINES
from nanovllm_jax.__main__ import DEMO_MODEL, UsageError
from nanovllm_jax.config import ModelConfig

SCRIPTS = Path(__file__).parents[1]
LIMIT_S = {"cpu": 50.0, "gpu": 600.0}  # of each engine, over all rounds
GRACE_S = 2.0  # beyond the limit, before a worker is killed
VARIES = ("date", "engines", "rounds", "runs", "load at the start")  # between calls of one report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (nanovllm-jax compare --help lists what there is)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises UsageError."""
    parser = _Parser(
        prog="nanovllm-jax compare",
        description="The same work for every engine that is installed, and one report.",
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model directory (default: the demo model)")
    add("--random-weights", metavar="SIZE", help=f"instead: {', '.join(bench.QWEN3)}")
    add(
        "--weights-folder",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "nanovllm_jax-compare",
        help="where random weights are written, once (default: in the system's temporary folder)",
    )
    add("--engines", metavar="NAME[,NAME...]", default=",".join(ENGINES), help="default: all")
    add(
        "--workloads",
        metavar="NAME[,NAME...]",
        default=",".join(workloads.NAMES),
        help=f"default: {','.join(workloads.NAMES)}",
    )
    add("--scale", choices=workloads.SCALES, help="lengths (default: by the device)")
    add("--rounds", type=int, default=2, help="processes of each engine, in alternating order")
    add("--runs", type=int, default=2, help="timed runs of each workload and process")
    add(
        "--limit",
        action="append",
        default=[],
        metavar="[ENGINE=]SECONDS",
        help="time for one engine over all rounds (default: 50 on a CPU, 600 on a GPU)",
    )
    add("--rate", type=float, metavar="R", help="requests a second of the stream")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add(
        "--python-path",
        action="append",
        default=[],
        metavar="ENGINE=DIR",
        help="put DIR before PYTHONPATH for that engine alone",
    )
    add("--bandwidth", type=float, metavar="TB/S", help="the memory's, where it is not known here")
    add("--peak", type=float, metavar="TFLOP/S", help="of products, where it is not known here")
    add(
        "--output",
        type=Path,
        default=Path("compare"),
        metavar="NAME",
        help="NAME.jsonl and NAME.html are written (default: compare)",
    )
    add("--add", action="store_true",
        help="keep the results of NAME.jsonl, of the same work on a machine of the same "
        "description, and add the engines named by --engines")  # fmt: skip
    add("--from", dest="source", type=Path, metavar="FILE.jsonl",
        help="run nothing, make FILE.html of results")  # fmt: skip
    args = parser.parse_args(argv)
    args.engines = _names("--engines", args.engines, tuple(ENGINES))
    args.workloads = _names("--workloads", args.workloads, workloads.NAMES)
    args.limit = dict(_limit(text) for text in args.limit)
    args.python_path = dict(_python_path(text) for text in args.python_path)
    if args.model and args.random_weights:
        raise UsageError("give either --model or --random-weights, not both")
    if args.random_weights and args.random_weights not in bench.QWEN3:
        raise UsageError(
            f"--random-weights {args.random_weights} is no published size: "
            f"choose from {', '.join(bench.QWEN3)}"
        )
    for name in ("rounds", "runs"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    for name in ("rate", "bandwidth", "peak"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UsageError(f"--{name} {getattr(args, name)} must be positive")
    if args.temperature < 0:
        raise UsageError(f"--temperature {args.temperature} must not be negative")
    return args


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UsageError(f"{option} {name} is not known: choose from {', '.join(known)}")
    if not names:
        raise UsageError(f"{option} is empty: choose from {', '.join(known)}")
    return [name for name in known if name in names]


def _limit(text: str) -> tuple[str, float]:
    engine, _, seconds = text.rpartition("=")
    try:
        value = float(seconds)
    except ValueError:
        value = 0.0
    if not value > 0 or (engine and engine not in ENGINES):
        raise UsageError(f"--limit {text} is not SECONDS or ENGINE=SECONDS of {', '.join(ENGINES)}")
    return engine, value


def _python_path(text: str) -> tuple[str, str]:
    engine, _, folder = text.partition("=")
    if engine not in ENGINES or not Path(folder).is_dir():
        raise UsageError(f"--python-path {text} is not ENGINE=DIR of {', '.join(ENGINES)}")
    return engine, str(Path(folder).resolve())


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first engine starts."""

    model: Path
    device: str  # "gpu" or "cpu"
    config: ModelConfig
    scale: workloads.Scale
    cases: list[dict[str, Any]]  # what workers get: warm-up and timed workload
    check: workloads.Wave  # to compare the engines' greedy tokens
    header: list[dict[str, Any]]  # the first lines of the results


def plan(args: argparse.Namespace) -> Plan:
    """Choose model, scale and workloads; raises UsageError for a model that is none."""
    gpu = machine.gpu_name()
    device = "gpu" if gpu else "cpu"
    if args.random_weights:
        print(f"random weights of Qwen3-{args.random_weights} in {args.weights_folder}")
        model = random_model.published(args.weights_folder, args.random_weights)
        title = f"Qwen3-{args.random_weights}, random weights"
    else:
        model = (args.model or DEMO_MODEL).resolve()
        title = str(args.model.resolve().name) if args.model else "the demo model"
    if not (model / "config.json").is_file():
        raise UsageError(f"{model} is no model directory: it has no config.json")
    try:
        config = ModelConfig.from_directory(model)
    except ValueError as error:
        raise UsageError(f"{model}: {error}") from error
    config = replace(config, dtype=config.dtype if gpu else "float32")
    scale = workloads.SCALES[args.scale or device]
    if args.rate:
        scale = replace(scale, rate=args.rate)
    if scale.max_model_len > config.max_position_embeddings:
        raise UsageError(
            f"--scale {args.scale or device} needs {scale.max_model_len} positions and {model} has "
            f"{config.max_position_embeddings}: choose --scale cpu or another model"
        )
    cases, described = [], []
    for name in args.workloads:
        timed = workloads.make(name, scale, 0, config.vocab_size)
        warm_up = workloads.make(name, scale, 12345, config.vocab_size)
        profile = name == ("batch16" if "batch16" in args.workloads else args.workloads[0])
        cases.append({"timed": asdict(timed), "warm_up": asdict(warm_up), "profile": profile})
        shared = scale.prefix[1] if name == "prefix" else 0
        need = workloads.Need.of(timed.work, config, shared)
        described.append(
            {
                "kind": "workload",
                "name": name,
                "title": timed.title,
                "requests": len(timed.work.prompts),
                "longest_output": max(timed.work.outputs),
                "prompt_tokens": timed.work.prompt_tokens,
                "output_tokens": timed.work.output_tokens,
                "rate": timed.rate,
                "bytes": need.bytes,
                "operations": need.operations,
            }
        )
    # Of a CPU neither is known: a small model's weights stay in its caches, for one thing.
    bandwidth = args.bandwidth or known(bench.BANDWIDTH, gpu)
    peak = args.peak or known(machine.PEAK, gpu)
    settings = {
        "kind": "settings",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": title,
        "parameters": parameters(config),
        "dtype": config.dtype,
        "device": device,
        "engines": args.engines,
        "rounds": args.rounds,
        "runs": args.runs,
        "temperature": args.temperature,
        "bandwidth_tb_s": bandwidth,
        "peak_tflop_s": peak,
        "scale": asdict(scale),
    }
    header = [settings, {"kind": "machine", **machine.describe()}, *described]
    [check] = workloads.make("batch16", scale, 7, config.vocab_size).main
    return Plan(model, device, config, scale, cases, check, header)


def known(table: Mapping[str, float], gpu: str | None) -> float | None:
    """The value of the first name that the GPU's contains."""
    return next((value for name, value in table.items() if name in (gpu or "")), None)


def parameters(model: ModelConfig) -> int:
    """How many weights the model has."""
    size = 4 if model.dtype == "float32" else 2
    read = bench.Traffic.of(model, "auto").weights_per_step // size  # every one but an embedding
    return read + (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)


def order(engines: Sequence[str], round_number: int) -> list[str]:
    """The engines of one round: forward in even rounds, backward in odd ones."""
    return list(engines) if round_number % 2 == 0 else list(engines)[::-1]


def run_all(args: argparse.Namespace, plan: Plan, results: Path) -> None:
    """Run every engine in every round, each within its time limit; `results` grows line by line."""
    default = args.limit.get("", LIMIT_S[plan.device])
    left = {name: args.limit.get(name, default) for name in args.engines}
    done = set()  # absent, or out of time
    with tempfile.TemporaryDirectory(prefix="nanovllm_jax-compare-") as folder:
        for number in range(args.rounds):
            for name in order(args.engines, number):
                if name in done:
                    continue
                print(f"round {number + 1}, {name} ({left[name]:.0f} s of its limit left)")
                before = len(results.read_text().splitlines())
                start = time.perf_counter()
                _run_worker(args, plan, name, number, left[name], results, Path(folder))
                left[name] -= time.perf_counter() - start
                new = report.read(results)[before:]
                if any(r["kind"] == "absent" for r in new) or left[name] < GRACE_S:
                    done.add(name)


def _run_worker(
    args: argparse.Namespace, plan: Plan, name: str, number: int, seconds: float,
    results: Path, folder: Path,
) -> None:  # fmt: skip
    log = results.with_suffix(f".{name}.log")
    job = {
        "engine": name,
        "round": number,
        "model": str(plan.model),
        "limits": {
            "device": "cuda" if plan.device == "gpu" else "cpu",
            "dtype": plan.config.dtype,
            "max_model_len": plan.scale.max_model_len,
            "max_num_seqs": plan.scale.max_num_seqs,
            "max_num_batched_tokens": plan.scale.max_num_batched_tokens,
        },
        "vocab_size": plan.config.vocab_size,
        "temperature": args.temperature,
        "runs": args.runs,
        "seconds": seconds,
        "check": plan.check,
        "workloads": [case | {"profile": case["profile"] and number == 0} for case in plan.cases],
        "results": str(results.resolve()),
        "log": str(log.resolve()),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    paths = [args.python_path.get(name), str(SCRIPTS), str(SCRIPTS.parent)]
    paths.append(os.environ.get("PYTHONPATH"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    # A cache of this comparison alone: a process that is ended may leave a damaged file in it.
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    if plan.device == "cpu":
        cores = str(len(os.sched_getaffinity(0)))  # PyTorch may take fewer than JAX
        env = (
            {"OMP_NUM_THREADS": cores} | env | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        )
    command = [sys.executable, "-m", "compare.worker", str(path)]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    reason = None
    try:
        code = process.wait(seconds + GRACE_S)
        if code:
            reason = f"the process ended with {code}; see {log.name}"
    except subprocess.TimeoutExpired:
        reason = f"stopped after its time limit, {seconds:.0f} s in this round"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if reason:
        print(f"  failure: {reason}")
        record = {"kind": "failure", "engine": name, "round": number, "workload": None}
        with results.open("a") as file:
            file.write(json.dumps(record | {"reason": reason}) + "\n")


def _check_added(results: Path, chosen: Plan, engines: Sequence[str]) -> None:
    """Raise UsageError unless `results` are of the plan's work and machine, without `engines`."""
    if not results.is_file():
        raise UsageError(f"--add: {results} is not there: leave --add out for a new report")
    old = report.read(results)
    if again := {r["engine"] for r in old if r["kind"] == "run"} & set(engines):
        raise UsageError(f"--add: {results} has results of {', '.join(sorted(again))} already")
    there = [_without_varying(record) for record in old]
    for record in map(_without_varying, chosen.header):
        if record not in there:
            what = record.get("name", record["kind"])
            raise UsageError(
                f"--add: the {what} of {results} differs from this call's: give the same model "
                "and options on such a machine"
            )


def _without_varying(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in VARIES}
    return json.loads(json.dumps(kept))  # as it is read: lists for tuples


def compare(argv: Sequence[str]) -> Path:
    """Run what the command line asks for and return the report's path; raises UsageError."""
    args = parse(argv)
    if args.source:
        if not args.source.is_file():
            raise UsageError(f"--from {args.source} is not there: give a file of results")
        return report.write(args.source, args.source.with_suffix(".html"))
    results = args.output.with_name(args.output.name + ".jsonl")
    page = args.output.with_name(args.output.name + ".html")
    report.check()  # before the work, not after it
    chosen = plan(args)
    if args.add:
        _check_added(results, chosen, args.engines)
        header = [chosen.header[0] | {"kind": "added"}]
    else:
        header = chosen.header
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a" if args.add else "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in header)
    start = time.perf_counter()
    try:
        run_all(args, chosen, results)
    finally:  # interrupted or not: what there is
        report.write(results, page)
        print(f"{page} and {results} written after {time.perf_counter() - start:.0f} s")
    return page


def main(argv: Sequence[str]) -> int:
    """Compare, print where the report is, and return 0; 2 after bad usage."""
    try:
        compare(argv)
    except UsageError as error:
        print(f"nanovllm-jax compare: error: {error}", file=sys.stderr)
        return 2
    return 0
