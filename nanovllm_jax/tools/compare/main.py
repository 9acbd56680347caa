"""The command `nanovllm-jax compare`: engines in turn, one process each, then the report."""

import argparse
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax

from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.tools import roofline, shapes
from nanovllm_jax.tools.compare import machine, plots, random_model, report, results, workloads
from nanovllm_jax.tools.compare.adapters import ENGINES, Limits
from nanovllm_jax.tools.compare.job import Job
from nanovllm_jax.tools.compare.results import Added, Failure, Results, Run, Settings, Task
from nanovllm_jax.tools.options import DEMO_MODEL, Parser, UsageError, check_positive, refusals

# Seconds for each engine, over all rounds, once it has started. An engine begins no workload that
# would not fit, but completes what it has begun, so that each has figures on a slow machine, too.
LIMIT_S = {"cpu": 50.0, "cuda": 600.0}
HANG_S = 900.0  # seconds after which an engine that does not start or end is killed
POLL_S = 0.1  # seconds between two looks at whether an engine has started
GRACE_S = 2.0  # seconds beyond a limit that the user has set before a worker is killed


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises UsageError."""
    parser = Parser(
        "nanovllm-jax compare",
        description="Run the same work on several engines. `compare serving` measures servers.",
    )
    add, names = parser.add_argument, ",".join(workloads.NAMES)
    folder = Path(tempfile.gettempdir()) / "nanovllm_jax-compare"
    # fmt: off
    model = parser.add_mutually_exclusive_group().add_argument
    model("--model", type=Path, metavar="DIR", help="model directory (default: the demo model)")
    model("--random-weights", choices=shapes.SHAPES, metavar="SIZE", help=", ".join(shapes.SHAPES))
    add("--weights-folder", type=Path, metavar="DIR", default=folder,
        help="where random weights are written, once (default: a temporary folder)")
    add("--engines", metavar="NAME[,NAME...]", default=",".join(ENGINES), help="default: all")
    add("--workloads", metavar="NAME[,NAME...]", default=names, help=f"default: {names}")
    add("--scale", choices=workloads.SCALES, help="lengths (default: by the device)")
    add("--rounds", type=int, default=2, help="processes of each engine, in alternating order")
    add("--runs", type=int, default=2, help="timed runs of each workload and process")
    add("--limit", type=_limit, action="append", default=[], metavar="[ENGINE=]SECONDS",
        help="time for one engine over all rounds, starts not counted (default: 50 on a CPU, "
        "600 on a GPU)")
    add("--rate", type=float, metavar="R", help="requests a second of the stream")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--python-path", type=_python_path, action="append", default=[], metavar="ENGINE=DIR",
        help="put DIR before PYTHONPATH for that engine alone")
    add("--bandwidth", type=float, metavar="TB/S", help="memory bandwidth of an unknown GPU")
    add("--peak", type=float, metavar="TFLOP/S", help="rate of products of an unknown GPU")
    add("--output", type=Path, default=Path("compare"), metavar="NAME",
        help="NAME.jsonl and NAME.html are written (default: compare)")
    add("--add", action="store_true", help="keep the results of NAME.jsonl, of the same work on "
        "a machine of the same description, and add the engines named by --engines")
    add("--from", dest="source", type=Path, metavar="FILE.jsonl", help="only make FILE.html of it")
    add("--picture", type=Path, metavar="FILE.png", help="with --from: only plot the throughput")
    # fmt: on
    args = parser.parse_args(argv)
    args.engines = _names("--engines", args.engines, tuple(ENGINES))
    args.workloads = _names("--workloads", args.workloads, workloads.NAMES)
    args.limit, args.python_path = dict(args.limit), dict(args.python_path)
    if args.picture and not args.source:
        raise UsageError("--picture is drawn of results: name them with --from FILE.jsonl")
    if args.source and not args.source.is_file():
        raise UsageError(f"--from {args.source} is not there: give a file of results")
    check_positive(args, "rounds", "runs", "rate", "bandwidth", "peak")
    check_positive(args, "temperature", at_least=0)
    return args


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Read a list of names into the order of those that are known."""
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise UsageError(f"{option} {wrong[0]!r} is not known: choose from {', '.join(known)}")
    return [name for name in known if name in names]


def _limit(text: str) -> tuple[str, float]:
    engine, _, seconds = text.rpartition("=")
    if engine not in ("", *ENGINES) or not re.fullmatch(r"\d*\.?\d+", seconds):
        raise argparse.ArgumentTypeError(f"{text} is not [ENGINE=]SECONDS of {', '.join(ENGINES)}")
    return engine, float(seconds)


def _python_path(text: str) -> tuple[str, str]:
    engine, _, folder = text.partition("=")
    if engine not in ENGINES or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not ENGINE=DIR of {', '.join(ENGINES)}")
    return engine, str(Path(folder).resolve())


def prepare(args: argparse.Namespace, file: Path) -> tuple[list[results.Record], Job]:
    """Choose model, scale and workloads: the first lines of the results, and every job's part."""
    here = machine.describe()
    device = "gpu" if here.gpu else "cpu"
    title, model = _model(args)
    with refusals(ValueError, OSError):
        config = ModelConfig.from_directory(model)
    config = config if here.gpu else replace(config, dtype="float32")
    scale = workloads.SCALES[args.scale or device]
    scale = replace(scale, rate=args.rate or scale.rate)
    if (most := config.longest_context) < scale.max_model_len:
        needed = f"--scale {args.scale or device} needs {scale.max_model_len} positions"
        raise UsageError(f"{needed} and {model} has {most}: choose --scale cpu or another model")
    sizes = {name: n for name, n in asdict(scale).items() if name.startswith("max_")}
    weights = parameters(config)
    costs = roofline.CostModel(config, weights)
    make = partial(workloads.make, scale=scale, vocab_size=config.vocab_size)
    timed = {name: make(name, seed=workloads.SEED) for name in args.workloads}
    # A CPU's limits are unknown: for one thing, a small model's weights stay in its caches.
    rates = roofline.find_hardware(here.gpu or "")
    settings = Settings(
        date=datetime.now(UTC).isoformat(timespec="seconds"), model=title,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(weights)), dtype=config.dtype,
        device=device, engines=args.engines, rounds=args.rounds, runs=args.runs,
        temperature=args.temperature, scale=asdict(scale),
        bandwidth_tb_s=args.bandwidth or (rates and rates.memory / 1e12),
        peak_tflop_s=args.peak or (rates and rates.flops / 1e12),
    )  # fmt: skip
    job = Job(
        model=str(model), limits=Limits("cuda" if here.gpu else "cpu", config.dtype, sizes),
        vocab_size=config.vocab_size, temperature=args.temperature, runs=args.runs,
        check=make("batch16", seed=workloads.CHECK_SEED).main[0],
        cases=[(work, make(name, seed=workloads.WARM_UP_SEED)) for name, work in timed.items()],
        profiled=timed.get("batch16", timed[args.workloads[0]]), results=file.resolve(),
    )  # fmt: skip
    return [settings, here, *(workloads.describe(w, scale, costs) for w in timed.values())], job


def _model(args: argparse.Namespace) -> tuple[str, Path]:
    """Return the model's title and directory; random weights are written if they are not there."""
    if size := args.random_weights:
        name = shapes.full_name(size)
        title, model = f"{name}, random weights", args.weights_folder / f"{name}-random"
        print(f"{title}, in {model}")
        return title, random_model.write(model, shapes.SHAPES[size])
    model = (args.model or DEMO_MODEL).resolve()
    return model.name if args.model else "the demo model", model


def run_all(args: argparse.Namespace, shared: Job) -> None:
    """Run every engine in every round, within its time limit; the results grow as they come."""
    default = LIMIT_S[shared.limits.device]
    given = {name: args.limit.get(name, args.limit.get("")) for name in args.engines}
    left = {name: default if limit is None else limit for name, limit in given.items()}
    with tempfile.TemporaryDirectory(prefix="nanovllm_jax-compare-") as folder:
        for number in range(args.rounds):
            for name in list(left) if number % 2 == 0 else list(left)[::-1]:
                print(f"round {number + 1}, {name} ({left[name]:.0f} s of its limit left)")
                job = replace(
                    shared, engine=name, round=number, seconds=left[name], started=time.time()
                )
                grace = GRACE_S if given[name] else HANG_S
                run_worker(job, Path(folder), args.python_path.get(name), grace)
                found = Results(results.read(job.results))
                start_s = sum(s.start_s for s in found.starts[name] if s.round == number)
                left[name] -= time.time() - job.started - start_s
                ended = any(p.engine == name and p.workload is None for p in found.problems)
                if name in found.absent or ended or left[name] < GRACE_S:
                    del left[name]


def run_worker(job: Job, folder: Path, python_path: str | None, grace: float) -> None:
    """Run one engine in a process of its own, killed `grace` seconds after its time limit.

    The limit begins when the engine has started.
    """
    (path := folder / "job.pickle").write_bytes(pickle.dumps(job))
    # The cache is this comparison's alone: a process that is killed may leave a damaged file in it.
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **os.environ}
    if python_path:
        env["PYTHONPATH"] = os.pathsep.join([python_path, *filter(None, [env.get("PYTHONPATH")])])
    if job.limits.device == "cpu":
        cores = str(len(os.sched_getaffinity(0)))  # PyTorch may take fewer than JAX
        env = {"OMP_NUM_THREADS": cores, **env, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nanovllm_jax.tools.compare.worker", str(path)]
    # The worker ends when its standard input does, in whichever way this process has ended.
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
    has_begun = False
    try:
        await_start(process, job)
        has_begun = True
        code = process.wait(job.seconds + grace)
        reason = f"the process ended with {code}; see {job.log.name}" if code else ""
    except subprocess.TimeoutExpired:
        limit = f"its time limit, {job.seconds:.0f} s in this round"
        late = f" by {grace:.0f} s" if grace > GRACE_S else ""
        reason = f"stopped after {limit}{late}"
        if not has_begun:
            reason = f"stopped because it had not started after {HANG_S:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if reason:
        print(f"  failure: {reason}")
        results.append(job.results, Failure(job.engine, job.round, None, reason))


def await_start(process: subprocess.Popen, job: Job) -> None:
    """Wait until an engine has started, or its process has ended.

    Raises:
        subprocess.TimeoutExpired: it has done neither within HANG_S.
    """
    while process.poll() is None and not has_started(job):
        if time.time() - job.started > HANG_S:
            raise subprocess.TimeoutExpired(process.args, HANG_S)
        time.sleep(POLL_S)


def has_started(job: Job) -> bool:
    """Whether an engine's process has reported its start; it may be writing its next lines."""
    started = {"kind": "engine", "engine": job.engine, "round": job.round}
    lines = job.results.read_text("utf-8").split("\n")[:-1]
    return any(started.items() <= json.loads(line).items() for line in lines)


def check_added(file: Path, header: list[results.Record], engines: Sequence[str]) -> None:
    """Raise UsageError unless results are of the same work and machine, without these engines."""
    if not file.is_file():
        raise UsageError(f"--add: {file} is not there: leave --add out for a new report")
    old = results.read(file)
    if again := {r.engine for r in old if isinstance(r, Run)} & {*engines}:
        raise UsageError(f"--add: {file} has results of {', '.join(sorted(again))} already")

    def comparable(record: results.Record) -> str:
        varies = ("date", "engines", "rounds", "runs", "load_at_the_start")
        return json.dumps({name: x for name, x in asdict(record).items() if name not in varies})

    there = {comparable(record) for record in old}  # as in a file, where tuples are lists
    if other := next((record for record in header if comparable(record) not in there), None):
        what = other.name if isinstance(other, Task) else type(other).__name__.lower()
        raise UsageError(f"--add: the {what} of {file} differs: give the same model and options")


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for and write the report; raises UsageError.

    Returns:
        0, or 1 if an engine or a workload failed; the report has the figures of the others.
    """
    if argv[:1] == ["serving"]:
        from nanovllm_jax.tools.compare.serving.main import main as serving

        return serving(argv[1:])
    args = parse(argv)
    if args.source:
        found = Results(results.read(args.source))
        if args.picture:
            plots.write_picture(found, args.picture)
        else:
            args.source.with_suffix(".html").write_text(report.render(found), "utf-8")
        return 0
    plots.pyplot()  # if it is missing, that is said before the work, not after it
    file, page = (Path(f"{args.output}.{suffix}") for suffix in ("jsonl", "html"))
    header, job = prepare(args, file)
    if args.add:
        check_added(file, header, args.engines)
        results.append(file, Added(**vars(header[0])))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        results.append(file, *header)
    start = time.perf_counter()
    try:
        run_all(args, job)
    finally:  # interrupted or not: what there is
        page.write_text(report.render(Results(results.read(file))), "utf-8")
        print(f"{page} and {file} written after {time.perf_counter() - start:.0f} s")
    failures = [r for r in results.read(file) if type(r) is Failure and r.engine in args.engines]
    for failure in failures:
        what = f" ({failure.workload})" if failure.workload else ""
        print(f"{failure.engine}{what} failed: {failure.reason}", file=sys.stderr)
    return int(bool(failures))
