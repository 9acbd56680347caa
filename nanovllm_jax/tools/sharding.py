"""The command `nanovllm-jax sharding`: layouts, bytes a device, collectives and predicted times.

    nanovllm-jax sharding --random-weights 32B --mesh data=2,tensor=4
    nanovllm-jax sharding --model DIR --mesh tensor=2 --rules rules.json --batch 16 64

No weights are read or made. If there are fewer GPUs than the mesh needs, the steps are compiled for
fake CPU devices, or with `--target h100` for H100s that are not there.
"""

import argparse
import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.buckets import Bucket, prefill_buckets
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.files import read_json
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.sharding import Rule, make_sharding
from nanovllm_jax.tools import roofline
from nanovllm_jax.tools.hlo import Collective, collectives
from nanovllm_jax.tools.options import Parser, UsageError, check_positive, refusals
from nanovllm_jax.tools.roofline import HARDWARE, CostModel, Hardware, find_hardware
from nanovllm_jax.tools.shapes import SHAPES, model_directory

MAX_DEVICES = 64


def layouts(programs: Programs, num_blocks: int) -> list[dict[str, Any]]:
    """Return how the parameters and the KV cache are cut over the mesh.

    Each row has an array's name, logical axes, shape and dtype; `spec`, the mesh axes that each
    dimension is cut over; the bytes of the whole array and those of one device; and `copies`, the
    devices that hold each part.
    """
    arrays = list(roofline.named_parameters(programs.weights))
    cache = programs.abstract_state(num_blocks).cache
    arrays += [(f"cache.{name}", KVCache.AXES, x) for name, x in cache._asdict().items()]
    rows = []
    for name, axes, array in arrays:
        mesh, spec = array.sharding.mesh, array.sharding.spec
        spec = [*map(_names, spec), *[[] for _ in array.shape[len(spec) :]]]
        parts = math.prod(mesh.shape[axis] for names in spec for axis in names)
        size = math.prod(array.shape) * array.dtype.itemsize
        rows.append({
            "name": name, "axes": axes, "shape": array.shape, "dtype": array.dtype.name,
            "spec": spec, "bytes": size, "bytes_per_device": size // parts,
            "copies": mesh.size // parts,
        })  # fmt: skip
    return rows


class Step(NamedTuple):
    """A batch that one step computes; the numbers are those of one shard of the batch."""

    name: str
    bucket: Bucket
    starts: tuple[int, ...]  # first position of each sequence in this step
    lengths: tuple[int, ...]  # tokens of each sequence in this step


def make_steps(programs: Programs, args: argparse.Namespace) -> list[Step]:
    """Return the prefill step and the decode steps that the command line asks for."""
    shards, steps = programs.batch_shards, []
    if tokens := -(-args.prefill // shards):
        num_rows = prefill_buckets(tokens, -(-max(args.batch) // shards))[-1].num_rows
        full, rest = divmod(tokens, args.context)
        lengths = (args.context,) * full + (rest,) * bool(rest)
        if len(lengths) > num_rows:
            raise UsageError(
                f"--prefill {args.prefill}: {len(lengths)} sequences of --context {args.context} "
                f"do not fit into the step's {num_rows} rows; raise --context or --batch"
            )
        name = f"prefill of {args.prefill} tokens"
        steps.append(Step(name, Bucket(tokens, num_rows), (0,) * len(lengths), lengths))
    for batch, rows in ((batch, -(-batch // shards)) for batch in args.batch):
        starts = (args.context - 1,) * rows
        steps.append(Step(f"decode of batch {batch}", Bucket(0, rows), starts, (1,) * rows))
    return steps


def predict(costs: CostModel, step: Step, hardware: Hardware, talk: float) -> dict[str, float]:
    """Predict the seconds of a step: the slower of memory and products, then collectives (`talk`).

    Overlap and launches are left out, so this is a limit, apart from the latency of collectives,
    which is measured.
    """
    tokens, rows = sum(step.lengths), step.bucket.num_rows
    context, pairs = roofline.attended(step.starts, step.lengths)
    least = costs.least(steps=1, tokens=tokens, rows=rows, context=context, pairs=pairs)
    memory, compute = least.bytes / hardware.memory, least.flops / hardware.flops
    return {"memory_s": memory, "compute_s": compute, "collectives_s": talk,
            "total_s": max(memory, compute) + talk}  # fmt: skip


# --- The command ---


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line and check what needs no device."""
    # fmt: off
    parser = Parser(prog="nanovllm-jax sharding", description="Report what a sharding costs, "
                    "without weights and without the devices.")
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model directory; only config.json is read")
    add("--random-weights", choices=SHAPES, metavar="SIZE", help=f"instead: {', '.join(SHAPES)}")
    add("--mesh", type=_mesh, required=True, metavar="AXIS=N,...", help="as in data=2,tensor=4")
    add("--rules", type=_rules, default={}, metavar="FILE",
        help="JSON: logical axis -> mesh axis, list or null")
    add("--batch", type=int, nargs="+", default=[16], help="decode batches (default: 16)")
    add("--context", type=int, default=1024, help="tokens of each sequence (default: 1024)")
    add("--prefill", type=int, default=2048, help="tokens of the prefill step, 0: none (2048)")
    add("--dtype", help="float32 or bfloat16, instead of config.json's")
    add("--kv-cache-dtype", default="auto", help="auto, or fp8")
    add("--target", choices=("auto", "cpu", "h100"), default="auto",
        help="compile for the devices that there are, else fake CPUs (auto); or for H100s that "
        "are not there, which needs the CUDA wheels")
    add("--hardware", choices=HARDWARE, help="predict for (default: the GPU, else H100)")
    add("--out", type=Path, metavar="FILE", help="write the report to FILE as JSON, too")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.model is None) == (args.random_weights is None):
        parser.error("give either --model DIR or --random-weights SIZE")
    check_positive(args, "batch", "context")
    check_positive(args, "prefill", at_least=0)
    return args


def _mesh(text: str) -> dict[str, int]:
    """Read `data=2,tensor=4`; EngineConfig checks axes and sizes."""
    try:
        pairs = [(axis, int(size)) for axis, size in (p.split("=") for p in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not as in data=2,tensor=4") from None
    if len(mesh := dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names an axis twice")
    if (count := math.prod(mesh.values())) > MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"{text} is {count} devices; at most {MAX_DEVICES}")
    return mesh


def _rules(file: str) -> dict[str, Rule]:
    """Read a file of rules; `merge_rules` checks their names."""
    with refusals(OSError, ValueError):
        rules = read_json(Path(file))
    for axis, rule in rules.items():
        names = rule if isinstance(rule, list) else [rule or ""]
        if not all(isinstance(name, str) for name in names):
            message = f"--rules: {axis!r} is {rule!r}; give a mesh axis, a list of them, or null"
            raise UsageError(message)
    return rules


def find_devices(target: str, count: int) -> list:
    """Return `count` devices: those that there are, else fake CPUs, or H100s to compile for."""
    if target == "h100":
        from nanovllm_jax.tools.h100_target import h100s

        try:
            return h100s(count)
        except RuntimeError as error:
            raise UsageError(
                f"--target h100 needs JAX's CUDA wheels ({' '.join(str(error).split())[:80]}): "
                'pip install "nanovllm-jax[cuda13]", or leave --target out for fake CPUs'
            ) from error
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX may have its devices already
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if target == "cpu" or len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(
            f"--mesh needs {count} devices, and JAX was started with {len(devices)}: raise "
            "--xla_force_host_platform_device_count in XLA_FLAGS, or take it out"
        )
    return devices[:count]


def make_config(args: argparse.Namespace) -> EngineConfig:
    """Check the options and return the engine's; raises UsageError."""
    longest = args.context + 1
    with model_directory(args) as path, refusals(AssertionError, TypeError, ValueError):
        config = EngineConfig.resolve(
            path, "gpu", mesh_shape=args.mesh, sharding_rules=args.rules,
            max_model_len=longest, max_num_seqs=max(args.batch),
            max_num_batched_tokens=max(args.prefill, longest),
            dtype=args.dtype, kv_cache_dtype=args.kv_cache_dtype,
        )  # fmt: skip
    if config.max_model_len < longest:
        most = config.max_model_len - 1
        raise UsageError(f"--context {args.context} is too long for this model; at most {most}")
    return config


def main(argv: Sequence[str]) -> int:
    """Report on the sharding that the command line describes, and return 0; raises UsageError."""
    args = parse(argv)
    config = make_config(args)
    devices = find_devices(args.target, math.prod(args.mesh.values()))
    kind = devices[0].device_kind
    hardware = HARDWARE.get(args.hardware) or find_hardware(kind) or HARDWARE["H100"]
    with refusals(ValueError):  # rules that the model or one another contradict
        sharding = make_sharding(config.mesh_shape, config.sharding_rules, devices)
        programs = Programs(config, sharding)
        steps = make_steps(programs, args)
        num_blocks = max(len(step.lengths) for step in steps) * programs.table_width
        arrays = layouts(programs, num_blocks)
        lowered = [programs.lower_step(step.bucket, num_blocks) for step in steps]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda x: x.compile(programs.compiler_options), lowered))
    report: dict[str, Any] = {
        "model": args.random_weights or str(args.model), "dtype": programs.model_config.dtype,
        "mesh": dict(sharding.mesh.shape),
        "rules": {axis: _names(rule) for axis, rule in sharding.rules.items()},
        "devices": kind, "jax": jax.__version__, "hardware": asdict(hardware),
        "arrays": arrays, "steps": [],
    }  # fmt: skip
    print_layouts(report)
    costs = CostModel.of(programs, sharding)
    for step, program in zip(steps, compiled, strict=True):
        found = collectives(program.as_text() or "", sharding.mesh.shape)
        talk = sum(c.count * c.seconds(hardware) for c in found)
        predicted = predict(costs, step, hardware, talk)
        print_step(step.name, found, predicted, hardware)
        report["steps"].append(
            {"step": step.name, "collectives": [*map(asdict, found)], "predicted": predicted}
        )
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), "utf-8")
    return 0


def print_layouts(report: Mapping[str, Any]) -> None:
    """Print what each device holds, with axes as in `[vocab 151936 / tensor, embed 1024]`."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    print(f"{report['model']}, {report['dtype']}, mesh {mesh}, compiled for {report['devices']}")
    rules = (f"{axis} -> {'+'.join(names) or '-'}" for axis, names in report["rules"].items())
    print(f"rules: {', '.join(rules)}\n")
    width = max(len(array["name"]) for array in report["arrays"])
    print(f"{'array':{width}}  {'a device':>10}  copies  layout")
    held, whole = Counter(), Counter()
    for a in report["arrays"]:
        dimensions = zip(a["axes"], a["shape"], a["spec"], strict=True)
        cut = ", ".join(f"{x} {n}" + f" / {'+'.join(s)}" * bool(s) for x, n, s in dimensions)
        print(f"{a['name']:{width}}  {_size(a['bytes_per_device']):>10}  {a['copies']:6}  [{cut}]")
        part = "cache" if a["name"].startswith("cache.") else "weights"
        held[part] += a["bytes_per_device"]
        whole[part] += a["bytes"]
    for part in held:
        print(f"{part}: {_size(held[part])} a device, {_size(whole[part])} in all without copies")


def print_step(
    name: str, found: Sequence[Collective], predicted: Mapping[str, float], hardware: Hardware
) -> None:
    """Print a step's collectives and times."""
    print(f"\n{name}")
    print(f"  {'count':>5}  {'collective':18} {'bytes':>10}  {'over':12} {'us each':>8}  made from")
    for c in found:
        axes = "no mesh axis" if c.axes is None else "+".join(c.axes)
        origin, note = c.origin.removeprefix("jit(run)/"), f"  ({c.note})" * bool(c.note)
        print(f"  {c.count:5}  {c.kind:18} {_size(c.num_bytes):>10}  {axes:12} "
              f"{c.seconds(hardware) * 1e6:8.1f}  {origin} {c.dtype}{note}")  # fmt: skip
    if not found:
        print("      0  collectives")
    memory, compute, talk, total = (seconds * 1e3 for seconds in predicted.values())
    print(f"  predicted on {hardware.name}s: {total:.3f} ms = max(memory {memory:.3f}, products "
          f"{compute:.3f}) + collectives {talk:.3f}")  # fmt: skip


def _names(rule: Any) -> list[str]:
    """Return the mesh axes of a rule, or of a part of a PartitionSpec, as a list."""
    return [rule] if isinstance(rule, str) else list(rule or ())


def _size(num_bytes: float) -> str:
    """Show bytes in the largest unit that leaves at least 1."""
    power = min(3, int(math.log2(max(1, num_bytes)) / 10))
    return f"{num_bytes / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
