#!/usr/bin/env python3
"""What a sharding costs: layouts, bytes a device, collectives, predicted and measured times.

    nanovllm-jax sharding --random-weights 32B --mesh data=2,tensor=4
    nanovllm-jax sharding --model DIR --mesh tensor=2 --rules rules.json --batch 16 64

No weights are read or made, unless steps are timed. Where there are fewer GPUs than the mesh needs,
the steps are compiled for fake CPU devices, or with `--target h100` for H100s that are not there.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import bench
import jax
import numpy as np
from flax import nnx
from hlo_collectives import Collective, collectives
from sharding_picture import draw, size_text

from nanovllm_jax.__main__ import UsageError
from nanovllm_jax.config import EngineConfig, read_json
from nanovllm_jax.engine.inputs import Column
from nanovllm_jax.engine.model_runner import prefill_buckets
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.layers.attention import KVCache
from nanovllm_jax.sharding import MESH_AXES, Rule, make_sharding
from nanovllm_jax.weights import random_weights

MAX_DEVICES = 64
GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """What a device reaches, in units a second; `link` is NVLink 4's rate, the rest measured."""

    name: str
    memory: float  # bytes read
    flops: float  # of bfloat16 products
    link: float  # bytes sent, while as many are received
    latency: float  # seconds that a collective of XLA's takes however small it is
    one_shot_latency: float  # the same of the engine's all-reduce (two H200s: 2.4 to 5.5 us)

    def seconds(self, collective: Collective) -> float:
        """What one of these should take."""
        return collective.seconds(self.link, self.latency, self.one_shot_latency)


HARDWARE = {
    name: Hardware(name, rate * bench.TB, 790e12, 450 * GB, 25e-6, 6e-6)
    for name, rate in bench.BANDWIDTH.items()
}


@dataclass(frozen=True)
class Layout:
    """How one array is cut over the mesh."""

    name: str
    axes: tuple[str, ...]  # logical
    shape: tuple[int, ...]
    dtype: str
    sharding: jax.sharding.NamedSharding
    bytes_per_device: int

    @classmethod
    def of(cls, name: str, axes: tuple[str, ...], array: Any) -> "Layout":
        """The layout of an array that is given by shape, type and sharding."""
        size = int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
        return cls(name, axes, array.shape, array.dtype.name, array.sharding, size)

    @property
    def num_bytes(self) -> int:
        """Of the whole array, once."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def copies(self) -> int:
        """How many devices hold each part."""
        return self.bytes_per_device * self.sharding.mesh.size // self.num_bytes

    @property
    def mesh_axes(self) -> set[str]:
        """The mesh axes that the array is cut along."""
        return {a for part in self.sharding.spec if part for a in _names(part)}


def layouts(programs: Programs, num_blocks: int) -> list[Layout]:
    """The parameters and the KV cache."""
    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    found = []
    for path, param in jax.tree.leaves_with_path(programs.weights, is_leaf=is_param):
        name = ".".join(str(key.key) for key in path)
        axes = param.get_metadata()["axes"]
        stacked = ("layers",) if name.startswith("layers.") else ()
        found.append(Layout.of(name, (*stacked, *axes), param.get_value()))
    cache = programs.abstract_state(num_blocks).cache
    return found + [
        Layout.of(f"cache.{name}", KVCache.AXES, x)
        for name, x in zip(KVCache._fields, cache, strict=True)
    ]


@dataclass(frozen=True)
class Step:
    """A batch that one step computes; the numbers are those of one shard of the batch."""

    name: str
    num_tokens: int  # that are computed; a decode step computes one a row
    num_rows: int
    lengths: tuple[int, ...]  # tokens of each sequence in this step
    context: int  # tokens of each sequence, those of this step included

    @property
    def is_prefill(self) -> bool:
        """Whether prompts are computed."""
        return self.num_tokens > 0


def plan(programs: Programs, args: argparse.Namespace) -> list[Step]:
    """The prefill step and the decode steps that the command line asks for."""
    shards = programs.batch_shards
    tokens = -(-args.prefill // shards)
    bucket = prefill_buckets(max(1, tokens), -(-max(args.batch) // shards))[-1]
    full, rest = divmod(tokens, args.context)
    lengths = (args.context,) * full + (rest,) * bool(rest)
    if len(lengths) > bucket.num_rows:
        raise UsageError(
            f"--prefill {args.prefill}: {len(lengths)} sequences of --context {args.context} do "
            f"not fit into the step's {bucket.num_rows} rows; raise --context or --batch"
        )
    steps = []
    if tokens:
        name = f"prefill of {args.prefill} tokens"
        steps.append(Step(name, tokens, bucket.num_rows, lengths, args.context))
    for batch in args.batch:
        rows = -(-batch // shards)
        steps.append(Step(f"decode of batch {batch}", 0, rows, (1,) * rows, args.context))
    return steps


def predict(
    programs: Programs, arrays: Sequence[Layout], step: Step, hardware: Hardware,
    found: Sequence[Collective],
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step on each device: the slower of memory and products, then collectives.

    Memory: every weight once (of an embedding that is no head only a few rows), every sequence's
    keys and values once. Overlap and launches are left out, so this is a limit, apart from the
    latency of collectives, which is measured.
    """
    model, sharding = programs.model_config, programs.sharding
    tokens = sum(step.lengths)
    weights = read = flops = 0.0
    for array in arrays:
        if array.name.startswith("cache.") or (
            array.name.startswith("embed_tokens") and not model.tie_word_embeddings
        ):
            continue
        weights += array.bytes_per_device
        if "norm" in array.name:
            continue
        head = not array.name.startswith("layers.")
        uses = (step.num_rows if head else tokens) * programs.batch_shards
        # Devices share a product where they hold other weights or other tokens.
        axes = array.mesh_axes | {*sharding.mesh_axes("batch")}
        share = np.prod([sharding.mesh.shape[a] for a in axes])
        flops += 2 * np.prod(array.shape) * uses / share
    heads = sharding.size("heads")
    kv_bytes = 2 * model.num_kv_heads * model.head_dim * programs.cache_dtype.itemsize
    per_token = model.num_layers * kv_bytes / heads
    if step.is_prefill:
        read = tokens * per_token
        pairs = sum(n * (n + 1) / 2 for n in step.lengths)
    else:
        read = step.num_rows * step.context * per_token
        pairs = step.num_rows * step.context
    flops += 4 * pairs * model.num_heads * model.head_dim * model.num_layers / heads
    memory, compute = (weights + read) / hardware.memory, flops / hardware.flops
    talk = sum(c.count * hardware.seconds(c) for c in found)
    return {
        "memory_s": memory,
        "compute_s": compute,
        "collectives_s": talk,
        "total_s": max(memory, compute) + talk,
    }


def example_input(programs: Programs, step: Step) -> np.ndarray:
    """An input of the step: sequences of token 0 that fill the cache's first pages."""
    width = programs.table_width
    rows = np.zeros((step.num_rows, len(Column) + width), np.int32)
    rows[:, Column.SLOT] = programs.config.max_num_seqs  # padding, which has a slot of its own
    used = len(step.lengths)
    rows[:used, Column.SLOT] = np.arange(used) % programs.config.max_num_seqs
    rows[:used, Column.LENGTH] = step.lengths
    rows[:used, Column.START] = 0 if step.is_prefill else step.context - 1
    rows[:used, len(Column) :] = np.arange(used * width).reshape(used, width)
    one = np.concatenate([np.zeros(step.num_tokens, np.int32), rows.ravel()])
    return np.tile(one, programs.batch_shards)


def measure(
    program: jax.stages.Compiled, weights: list, state: Any, packed: np.ndarray, rounds: int = 5
) -> tuple[float, Any]:
    """Median seconds of a step among steps that are dispatched one after the other; the state."""

    def run(state, steps: int) -> tuple[float, Any]:
        began = time.perf_counter()
        for _ in range(steps):
            state, *_ = program(weights, state, packed)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / steps, state

    _, state = run(state, 2)
    once, state = run(state, 1)
    steps = min(50, max(1, int(0.2 / once)))
    times = []
    for _ in range(rounds):
        seconds, state = run(state, steps)
        times.append(seconds)
    return statistics.median(times), state


# --- The command ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists what there is)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and check what needs no device."""
    parser = _Parser(
        prog="nanovllm-jax sharding",
        description="Report what a sharding costs, without weights and without the devices.",
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model directory; only config.json is read")
    add("--random-weights", choices=bench.QWEN3, metavar="SIZE", help="instead: a Qwen3 shape")
    add("--mesh", type=_mesh, required=True, metavar="AXIS=N,...", help="as in data=2,tensor=4")
    add("--rules", type=Path, metavar="FILE", help="JSON: logical axis -> mesh axis, list or null")
    add("--batch", type=int, nargs="+", default=[16], help="decode batches (default: 16)")
    add("--context", type=int, default=1024, help="tokens of each sequence (default: 1024)")
    add("--prefill", type=int, default=2048, help="tokens of the prefill step, 0: none (2048)")
    add("--dtype", help="float32 or bfloat16, instead of config.json's")
    add("--kv-cache-dtype", default="auto", help="auto, or fp8")
    add("--target", choices=("auto", "cpu", "h100"), default="auto",
        help="compile for the devices that there are, else fake CPUs (auto); or for H100s that "
        "are not there, which needs the CUDA wheels")  # fmt: skip
    add("--measure", action=argparse.BooleanOptionalAction,
        help="time the steps, with random weights (default: on GPUs)")  # fmt: skip
    add("--hardware", choices=HARDWARE, help="predict for (default: the GPU, else H100)")
    add("--memory-tb-s", type=float, metavar="TB/S", help="memory bandwidth to predict with")
    add("--link-gb-s", type=float, metavar="GB/S", help="of a device's links, each way (450)")
    add("--latency-us", type=float, metavar="US", help="of XLA's collectives, however small (25)")
    add("--one-shot-us", type=float, metavar="US", help="of the engine's own all-reduce (6)")
    add("--out", type=Path, default=Path("sharding_report"), metavar="DIR",
        help="where sharding.json and sharding.png go (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if (args.model is None) == (args.random_weights is None):
        parser.error("give either --model DIR or --random-weights SIZE")
    names = ("batch", "context", "memory_tb_s", "link_gb_s", "latency_us", "one_shot_us")
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value <= 0:
                parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.prefill < 0:
        parser.error(f"--prefill must not be negative, got {args.prefill}")
    args.rules = _rules(args.rules) if args.rules else {}
    return args


def _mesh(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as a dict."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or axis in mesh:
            raise argparse.ArgumentTypeError(
                f"{part!r} names no mesh axis, or one twice; the axes are {', '.join(MESH_AXES)}, "
                "as in data=2,tensor=4"
            )
        if not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r}: the size must be a positive integer")
        mesh[axis] = int(size)
    if (count := int(np.prod([*mesh.values()]))) > MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"{text} is {count} devices; at most {MAX_DEVICES}")
    return mesh


def _rules(file: Path) -> dict[str, Rule]:
    try:
        rules = read_json(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--rules: {error}") from error
    if not isinstance(rules, dict):
        raise UsageError(f"--rules: {file} holds no JSON object {{logical axis: mesh axis}}")
    for axis, rule in rules.items():
        names = rule if isinstance(rule, list) else [rule]
        if rule is not None and not all(isinstance(name, str) for name in names):
            raise UsageError(
                f"--rules: {axis!r} is {rule!r}; give a mesh axis, a list of them, or null"
            )
    return rules


def find_devices(target: str, count: int) -> list:
    """`count` devices: those that there are, else fake CPUs, or H100s to compile for."""
    if target == "h100":
        from h100_target import h100s

        try:
            return h100s(count)
        except RuntimeError as error:
            raise UsageError(
                f"--target h100 needs JAX's CUDA wheels ({_line(error)[:80]}): "
                'pip install "nanovllm_jax[cuda13]", or leave --target out for fake CPUs'
            ) from error
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # where JAX has its devices already
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


def find_hardware(args: argparse.Namespace, kind: str) -> Hardware:
    """What to predict for: as told, else the device, else an H100."""
    name = args.hardware or next((name for name in HARDWARE if name in kind), "H100")
    changes = {"memory": (args.memory_tb_s, bench.TB), "link": (args.link_gb_s, GB)}
    changes |= {"latency": (args.latency_us, 1e-6), "one_shot_latency": (args.one_shot_us, 1e-6)}
    given = {field: value * unit for field, (value, unit) in changes.items() if value is not None}
    return replace(HARDWARE[name], **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Report on the sharding that the command line describes; see the module."""
    args = parse(argv)
    devices = find_devices(args.target, int(np.prod([*args.mesh.values()])))
    kind = devices[0].device_kind
    timed = args.measure
    if timed is None:
        timed = devices[0].platform == "gpu" and args.target != "h100"
    if timed and args.target == "h100":
        raise UsageError("--measure needs the devices, and --target h100 compiles without them")
    longest = args.context + 1
    dtype = {"dtype": args.dtype} if args.dtype else {}
    with bench.model_directory(args) as path:
        try:
            config = EngineConfig.from_kwargs(
                str(path), mesh_shape=args.mesh, sharding_rules=args.rules, max_model_len=longest,
                max_num_seqs=max(args.batch), kv_cache_dtype=args.kv_cache_dtype,
                max_num_batched_tokens=max(args.prefill, longest), **dtype,
            )  # fmt: skip
            if config.dtype is None:  # the model's own on a CPU too: the report is for GPUs
                config = replace(config, dtype=config.model_config.dtype)
            sharding = make_sharding(args.mesh, config.sharding_rules, devices)
            programs = Programs(config, sharding)
            steps = plan(programs, args)
            num_blocks = max(len(step.lengths) for step in steps) * programs.table_width
            arrays = layouts(programs, num_blocks)
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(_line(error)) from error
    if config.max_model_len < longest:
        raise UsageError(
            f"--context {args.context} is too long for this model; at most "
            f"{config.max_model_len - 1}"
        )
    hardware = find_hardware(args, kind)
    report: dict[str, Any] = {
        "model": args.random_weights or str(args.model),
        "dtype": programs.model_config.dtype,
        "mesh": dict(sharding.mesh.shape),
        "rules": {a: list(r) if isinstance(r, tuple) else r for a, r in sharding.rules.items()},
        "devices": kind,
        "jax": jax.__version__,
        "hardware": asdict(hardware),
        "arrays": [_array_json(a) for a in arrays],
        "steps": [],
    }
    print_layouts(report, arrays)

    weights = jax.tree.leaves(programs.weights)
    if timed:
        made = random_weights(programs.model, programs.model_config, sharding, seed=0)
        weights, state = jax.tree.leaves(made), programs.make_state(num_blocks)
        if mailboxes := programs.make_mailboxes():  # which must live as long as the steps run
            state = state._replace(mailbox=mailboxes.addresses)
    try:
        lowered = [
            programs.lower_step(weights, step.num_tokens, step.num_rows, num_blocks)
            for step in steps
        ]
    except ValueError as error:  # rules that do not go together
        raise UsageError(_line(error)) from error
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda x: x.compile(programs.compiler_options), lowered))
    for step, program in zip(steps, compiled, strict=True):
        found = collectives(program.as_text() or "", sharding.mesh.shape)
        result = {
            "step": step.name,
            "collectives": [asdict(c) for c in found],
            "predicted": predict(programs, arrays, step, hardware, found),
        }
        if timed:
            packed = jax.device_put(example_input(programs, step), programs.rows_sharding)
            result["measured_s"], state = measure(program, weights, state, packed)
        report["steps"].append(result)
        print_step(result, found, hardware)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sharding.json").write_text(json.dumps(report, indent=1))
    try:
        draw(report, arrays, args.out / "sharding.png")
    except ImportError:
        print('no picture: it needs matplotlib (pip install "nanovllm_jax[compare]")')
    print(f"written to {args.out}")
    return 0


def print_layouts(report: Mapping[str, Any], arrays: Sequence[Layout]) -> None:
    """What each device holds."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    print(f"{report['model']}, {report['dtype']}, mesh {mesh}, compiled for {report['devices']}")
    rules = (f"{a} -> {'+'.join(_names(r)) if r else '-'}" for a, r in report["rules"].items())
    print("rules: " + ", ".join(rules) + "\n")
    width = max(len(array.name) for array in arrays)
    print(f"{'array':{width}}  {'a device':>10}  copies  layout")
    for a in arrays:
        print(f"{a.name:{width}}  {size_text(a.bytes_per_device):>10}  {a.copies:6}  {_cut(a)}")
    weights = [a for a in arrays if not a.name.startswith("cache.")]
    cache = [a for a in arrays if a.name.startswith("cache.")]
    for name, part in (("weights", weights), ("cache", cache)):
        one, whole = (sum(getattr(a, f) for a in part) for f in ("bytes_per_device", "num_bytes"))
        print(f"{name}: {size_text(one)} a device, {size_text(whole)} in all without copies")


def print_step(result: Mapping[str, Any], found: Sequence[Collective], hardware: Hardware) -> None:
    """A step's collectives and times."""
    print(f"\n{result['step']}")
    print(f"  {'count':>5}  {'collective':18} {'bytes':>10}  {'over':12} {'us each':>8}  made from")
    for c in found:
        axes = "no mesh axis" if c.axes is None else "+".join(c.axes)
        each = hardware.seconds(c) * 1e6
        origin = f"{c.origin.removeprefix('jit(run)/')} {c.dtype}"
        note = f"  ({c.note})" if c.note else ""
        print(f"  {c.count:5}  {c.kind:18} {size_text(c.num_bytes):>10}  {axes:12} {each:8.1f}  "
              f"{origin}{note}")  # fmt: skip
    if not found:
        print("      0  collectives")
    p = {name: value * 1e3 for name, value in result["predicted"].items()}
    print(
        f"  predicted on {hardware.name}s: {p['total_s']:.3f} ms = "
        f"max(memory {p['memory_s']:.3f}, products {p['compute_s']:.3f}) + "
        f"collectives {p['collectives_s']:.3f}"
    )
    if "measured_s" in result:
        print(f"  measured: {result['measured_s'] * 1e3:.3f} ms")


def _cut(array: Layout) -> str:
    """`[vocab 151936 / tensor, embed 1024]`."""
    spec = [*array.sharding.spec, *[None] * (len(array.shape) - len(array.sharding.spec))]
    parts = (
        f"{axis} {n}" + (f" / {'+'.join(_names(part))}" if part else "")
        for axis, n, part in zip(array.axes, array.shape, spec, strict=True)
    )
    return f"[{', '.join(parts)}]"


def _array_json(array: Layout) -> dict[str, Any]:
    return {
        "name": array.name,
        "axes": array.axes,
        "shape": array.shape,
        "dtype": array.dtype,
        "spec": [list(_names(p)) if p else None for p in array.sharding.spec],
        "bytes": array.num_bytes,
        "bytes_per_device": array.bytes_per_device,
        "copies": array.copies,
    }


def _names(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(f"sharding_report: error: {error}")
