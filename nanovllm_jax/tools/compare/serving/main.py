"""The command `nanovllm-jax compare serving`: servers in turn, rate after rate, then the report."""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tools import shapes
from nanovllm_jax.tools.compare import machine, plots, random_model, results
from nanovllm_jax.tools.compare.serving import records, report
from nanovllm_jax.tools.compare.serving.figures import Slo
from nanovllm_jax.tools.compare.serving.load import SCALES
from nanovllm_jax.tools.compare.serving.records import (
    Point,
    SweepSettings,
)
from nanovllm_jax.tools.compare.serving.servers import KNOWN, Server
from nanovllm_jax.tools.compare.serving.sweep import Sweeper
from nanovllm_jax.tools.options import DEMO_MODEL, Parser, UsageError, check_positive, refusals

SEED = 0  # of the measured loads


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises UsageError."""
    parser = Parser(
        "nanovllm-jax compare serving", description="Measure servers under the same load."
    )
    add = parser.add_argument
    folder = Path(tempfile.gettempdir()) / "nanovllm_jax-compare"
    # fmt: off
    model = parser.add_mutually_exclusive_group().add_argument
    model("--model", type=Path, metavar="DIR", default=None,
        help="model directory (default: the demo model)")
    model("--random-weights", choices=shapes.SHAPES, metavar="SIZE",
        help=f"serve dummy weights (--load-format dummy): {', '.join(shapes.SHAPES)}")
    add("--weights-folder", type=Path, metavar="DIR", default=folder,
        help="where its config.json and tokenizer are written (default: a temporary folder)")
    add("--engines", metavar="NAME[,NAME...]",
        help=f"{', '.join(KNOWN)} (default: those that are installed, unless --server or --url)")
    add("--server", type=_named, action="append", default=[], metavar="NAME=COMMAND",
        help="a server of your own; {python} {model} {port} {load_format} {max_model_len} "
        "{max_num_seqs} are filled in")
    add("--url", type=_named, action="append", default=[], metavar="NAME=URL",
        help="a server that runs already")
    add("--python-path", type=_named, action="append", default=[], metavar="NAME=DIR",
        help="put DIR before PYTHONPATH for that server alone")
    add("--api-key", metavar="KEY", help="what the servers want to be sent")
    add("--rates", type=_numbers, metavar="R[,R...]",
        help="requests a second; a server that is saturated at two in a row gets no higher one "
        "(default: by the device)")
    add("--seconds", type=float, default=20.0, help="time of arrivals at a rate (default: 20)")
    add("--drain", type=float, default=10.0, metavar="SECONDS",
        help="time after it in which what is under way may finish (default: 10)")
    add("--prompt-tokens", type=_range, metavar="LOW:HIGH", help="uniform (default: by the device)")
    add("--output-tokens", type=_range, metavar="LOW:HIGH", help="the same of the output")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--slo", type=_slo, default=Slo(ttft=200.0, itl=50.0), metavar="LIMITS",
        help="of goodput, on ttft, tpot, itl, e2e (default: ttft=200ms,itl=50ms)")
    add("--min-share", type=float, default=0.9, metavar="X",
        help="a server is saturated if it completes a smaller share of what arrives (0.9)")
    add("--max-ttft", type=float, default=10.0, metavar="SECONDS",
        help="or if its p99 time to the first token is longer (10)")
    add("--clients", type=int, metavar="N", help="client processes (default: by the cores)")
    add("--start-limit", type=float, default=900.0, metavar="SECONDS",
        help="time for a server's start (default: 900)")
    add("--output", type=Path, default=Path("serving"), metavar="NAME",
        help="NAME.jsonl, NAME.md and NAME.png are written (default: serving)")
    add("--add", action="store_true", help="keep the results of NAME.jsonl, of the same options "
        "on a machine of the same description, and add servers of other names")
    add("--from", dest="source", type=Path, metavar="FILE.jsonl",
        help="only make FILE.md and FILE.png of it, with the limits of --slo")
    # fmt: on
    args = parser.parse_args(argv)
    args.python_path = {name: str(Path(path).resolve()) for name, path in args.python_path}
    args.servers = _servers(args)
    if args.source and not args.source.is_file():
        raise UsageError(f"--from {args.source} is not there: give a file of results")
    check_positive(args, "rates", "seconds", "drain", "min_share", "max_ttft", "clients",
                   "start_limit", "prompt_tokens")  # fmt: skip
    check_positive(args, "output_tokens", at_least=2)
    check_positive(args, "temperature", at_least=0)
    return args


def _servers(args: argparse.Namespace) -> list[Server]:
    """The servers that the options name, in their order.

    Raises:
        UsageError: a name is not known, or given twice.
    """
    others = [Server(name, command=command) for name, command in args.server]
    others += [Server(name, url=url) for name, url in args.url]
    # Dummy weights are made up by the server itself: one that needs a checkpoint has to be named.
    can_serve = [n for n in KNOWN if not args.random_weights or KNOWN[n].makes_weights]
    default = [] if others else can_serve
    names = default if args.engines is None else args.engines.split(",")
    if wrong := [name for name in names if name not in KNOWN]:
        raise UsageError(f"--engines {wrong[0]!r} is not known: choose from {', '.join(KNOWN)}")
    found = [*(KNOWN[name].server for name in names), *others]
    names = [server.name for server in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two servers have the name {twice[0]!r}: give them different ones")
    for name, folder in args.python_path.items():
        if name not in (*names, *KNOWN):
            raise UsageError(f"--python-path: there is no server {name!r}")
        if not Path(folder).is_dir():
            raise UsageError(f"--python-path {name}={folder}: there is no such folder")
    return found


def _named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", name) or not value.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=...")
    return name, value


def _numbers(text: str) -> list[float]:
    try:
        numbers = sorted({float(word) for word in text.split(",")})
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers")
    return numbers


def _range(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)(?::(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH, nor one number")
    low, high = int(found[1]), int(found[2] or found[1])
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} has its larger number first")
    return low, high


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prepare(args: argparse.Namespace) -> tuple[SweepSettings, results.Machine, Path]:
    """Choose the model and the sizes; return them, the machine, and the model's directory."""
    here = machine.describe()
    device = "gpu" if here.gpu else "cpu"
    if size := args.random_weights:
        title = f"{shapes.full_name(size)}, dummy weights"
        model = args.weights_folder / f"{shapes.full_name(size)}-dummy"
        random_model.write_without_weights(model, shapes.SHAPES[size])
    else:
        model = (args.model or DEMO_MODEL).resolve()
        title = model.name if args.model else "the demo model"
    with refusals(ValueError, OSError):
        config = ModelConfig.from_directory(model)
    scale = SCALES[device]
    prompt, output = args.prompt_tokens or scale.prompt, args.output_tokens or scale.output
    longest = prompt[1] + output[1]
    if longest > min(scale.max_model_len, config.longest_context):
        raise UsageError(
            f"prompt and output have up to {longest} tokens, and the servers are started with "
            f"{min(scale.max_model_len, config.longest_context)}: give --prompt-tokens and "
            "--output-tokens that fit"
        )
    cores = len(os.sched_getaffinity(0))
    settings = SweepSettings(
        date=datetime.now(UTC).isoformat(timespec="seconds"), model=title, device=device,
        vocab_size=config.vocab_size, rates=[*map(float, args.rates or scale.rates)],
        seconds=args.seconds, drain_s=args.drain,
        prompt_tokens=list(prompt), output_tokens=list(output),
        temperature=args.temperature, seed=SEED, min_share=args.min_share,
        max_ttft_s=args.max_ttft, clients=args.clients or max(1, min(4, cores // 4)),
        max_model_len=min(scale.max_model_len, config.longest_context),
        max_num_seqs=scale.max_num_seqs,
    )  # fmt: skip
    return settings, here, model


def check_added(file: Path, header: list[Any], names: Sequence[str]) -> None:
    """Raise UsageError unless results are of the same options and machine, without these names."""
    if not file.is_file():
        raise UsageError(f"--add: {file} is not there: leave --add out for a new report")
    old = results.read(file, records.KINDS)
    if again := {r.server for r in old if isinstance(r, Point)} & {*names}:
        raise UsageError(f"--add: {file} has results of {', '.join(sorted(again))} already")

    def comparable(record: Any) -> str:
        varies = ("date", "load_at_the_start")
        return json.dumps({name: x for name, x in asdict(record).items() if name not in varies})

    there = {comparable(record) for record in old}
    if other := next((record for record in header if comparable(record) not in there), None):
        what = "machine" if isinstance(other, results.Machine) else "options"
        raise UsageError(f"--add: the {what} of {file} differ: give the same model and options")


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for and write the report; raises UsageError.

    Returns:
        0, or 1 if a server failed; the report has the figures of the others.
    """
    args = parse(argv)
    if args.source:
        report.write(report.read(args.source), args.slo, args.source.with_suffix(""))
        return 0
    plots.pyplot()  # if it is missing, that is said before the work, not after it
    if importlib.util.find_spec("aiohttp") is None:
        raise UsageError('the client needs aiohttp: pip install "nanovllm-jax[compare]"')
    settings, here, model = prepare(args)
    file = Path(f"{args.output}.jsonl")
    if args.add:
        check_added(file, [settings, here], [server.name for server in args.servers])
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        results.append(file, settings, here, kinds=records.KINDS)
    start, sweeper = time.perf_counter(), Sweeper(args, settings, model, file)
    try:
        for server in args.servers:
            sweeper.measure(server)
    finally:  # interrupted or not: what there is
        found = report.read(file)
        written = report.write(found, args.slo, args.output) if any(found.points.values()) else []
        names = " and ".join(str(path) for path in [file, *written])
        print(f"{names} written after {time.perf_counter() - start:.0f} s")
    failed = [f for f in found.failures if f.server in {s.name for s in args.servers}]
    for failure in failed:
        print(f"{failure.server} failed: {failure.reason}", file=sys.stderr)
    return int(bool(failed))
