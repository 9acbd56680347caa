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
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tools import options, trace
from nanovllm_jax.tools.bench import fixed_workload
from nanovllm_jax.tools.options import UsageError
from nanovllm_jax.tools.roofline import TB, CostModel, Work, find_hardware
from nanovllm_jax.tools.shapes import QWEN3, model_directory

WARM_STEPS = 10  # decode steps before the first that counts
SPARE_TOKENS = 16  # tokens that a sequence may have decoded before all of them do
PREFILL_RUNS = 6

# What is profiled unless the user says otherwise; --prefill has prompts and the tokens of each.
FULL = {"batch": [1, 16, 64, 256], "context": 384, "prefill": [16, 1024]}
DEMO = {"batch": [4], "context": 64, "prefill": [2, 128], "max_model_len": 256}


class Case(NamedTuple):
    """A step to profile: `prompts` sequences of `length` tokens are prefilled, or decode on."""

    is_prefill: bool
    prompts: int
    length: int
    output: int  # tokens that each may decode

    @property
    def name(self) -> str:
        prefill = f"prefill-{self.prompts}x{self.length}"
        return prefill if self.is_prefill else f"decode-{self.prompts}"


Rates = tuple[float | None, float | None]  # bytes and operations per second, if known


def measure(
    llm: LLM, case: Case, args: argparse.Namespace, costs: CostModel, rates: Rates, folder: Path
) -> tuple[dict[str, Any], str]:
    """Time and trace one step; the trace goes into `folder`.

    Returns:
        The step's times, kernels and categories, and its compiled program.

    Raises:
        UsageError: the sequences do not fit into the cache together, or nothing was traced.
    """
    runner = llm.runner
    assert runner
    blocks = runner.num_blocks * runner.programs.batch_shards
    needed = case.prompts * -(-(case.length + case.output) // llm.config.kvcache_block_size)
    if needed > blocks:
        raise UsageError(
            f"{case.name} needs {needed} blocks of KV cache, there are {blocks}: ask for less, or "
            "raise --num-kvcache-blocks or --gpu-memory-utilization"
        )
    calls = PREFILL_RUNS if case.is_prefill else args.timed_steps
    loop, behind, ids = _run_loop(llm, case, calls, args.steps, folder)
    batch = llm.scheduler.schedule()  # one more step, which the engine will not run
    if batch is None or len(batch.seqs) < case.prompts:
        found = len(batch.seqs) if batch else 0
        raise UsageError(f"{case.name}: one step takes only {found} of {case.prompts} sequences")
    # Back to the middle of the traced steps, whose keys and values are in the cache already.
    batch = replace(batch, starts=[start - behind for start in batch.starts])
    bucket, alone = time_alone(runner, batch, calls)
    llm.abort_request(ids)
    while not llm.is_finished():
        llm.step()

    hlo = runner.programs.steps[bucket].as_text() or ""
    events = trace.read_events(folder, trace.module_name(hlo))
    events = [event for event in events if trace.category(event[2]) != "copies"]
    if not events:
        raise UsageError("the trace has no kernels of the step: may this user profile the device?")
    steps, last = 1, ""
    if not case.is_prefill:
        events, steps, last = trace.whole_steps(events, args.steps)
    table = {
        "rows": len(batch.seqs), "tokens": batch.num_tokens,
        "context_tokens": sum(batch.starts) + batch.num_tokens, "bucket": bucket._asdict(),
        "loop_us": loop * 1e6, "alone_us": alone * 1e6, "traced_steps": steps,
    }  # fmt: skip
    work = costs.categories(batch.starts, batch.lengths)
    layers = costs.config.num_layers
    return table | tabulate(events, steps, last, trace.origins(hlo), work, rates, layers), hlo


def _run_loop(
    llm: LLM, case: Case, timed: int, traced: int, folder: Path
) -> tuple[float, int, list]:
    """Run the engine's loop, with half of the timed steps before the traced ones, half behind.

    Both see the same contexts on average. One batch of a prefill is traced, whatever `traced` says.

    Returns:
        Seconds of a timed step; the steps since the middle of the traced ones; the ids of requests
        that are ready for one more step.
    """
    work = fixed_workload(random.Random(0), case.prompts, case.length, 1, llm.vocab_size)
    params = SamplingParams(temperature=0.6, max_tokens=case.output, ignore_eos=True)

    def add() -> list:
        llm.reset_prefix_cache()
        return [llm.add_request(prompt, params) for prompt in work.prompts]

    def run(count: int) -> float:
        """Decode `count` steps, or prefill as many batches; return the seconds."""
        began = time.perf_counter()
        for _ in range(count):
            if not case.is_prefill:
                llm.step()
                continue
            add()
            while not llm.is_finished():
                llm.step()
        return time.perf_counter() - began

    ids, tokens = [] if case.is_prefill else add(), 0
    while ids and tokens < case.prompts * case.length:
        tokens += max(0, llm.step()[1])
    run(1 if case.is_prefill else WARM_STEPS)
    after = timed - timed // 2
    seconds = run(timed - after)
    with trace.tracing(folder, perfetto=True):
        run(1 if case.is_prefill else traced)
    seconds += run(after)
    if case.is_prefill:
        return seconds / timed, 0, add()
    return seconds / timed, after + traced // 2, ids


def time_alone(runner: ModelRunner, batch: Batch, calls: int) -> tuple[Any, float]:
    """Return the bucket of a batch, and the seconds of one of `calls` calls of its step in a row.

    They have the same input: the same positions of the cache are read and written every time.
    """
    inputs = runner.prepare_inputs(batch)
    packed = jax.device_put(inputs.packed, runner.programs.sharding.named("batch"))
    inputs = inputs._replace(packed=packed)
    _, before = runner.run(inputs)
    before.block_until_ready()
    began = time.perf_counter()
    for _ in range(calls):
        _, after = runner.run(inputs)
        before.block_until_ready()  # two steps are under way: the engine has memory for no more
        before = after
    before.block_until_ready()
    return inputs.bucket, (time.perf_counter() - began) / calls


def tabulate(
    events: Sequence[trace.Event], steps: int, last: str, origins: dict[str, str],
    costs: dict[str, Work], rates: Rates, layers: int,
) -> dict[str, Any]:  # fmt: skip
    """Return a step's kernels, and its categories with their work and limits; times in us.

    Args:
        steps: how many steps the events are.
        last: the kernel that ends a step, or "".
        origins: the model's operation that a kernel was made from.
        costs: the work of the step by category.
    """
    times, gaps = trace.busy_times(events)
    calls = collections.Counter(name for start, end, name in events if end > start)
    kernels, categories, per_step = [], {}, steps * 1e3  # of ns
    for name, ns in times.most_common():
        origin = origins.get(name, "")
        kernels.append({"name": name, "origin": origin, "category": trace.category(name, origin),
                        "calls": calls[name] / steps, "us": ns / per_step})  # fmt: skip
    limits = {n: w.seconds(*rates) for n, w in costs.items() if n != "communication"}
    for name in trace.CATEGORIES:
        mine = [k for k in kernels if k["category"] == name]
        if mine or name in costs:
            categories[name] = _sum_up(mine, costs.get(name), limits.get(name), layers)
    whole = Work(sum(w.bytes for w in costs.values()), sum(w.flops for w in costs.values()))
    limit = None if None in limits.values() else sum(filter(None, limits.values()))
    between = gaps[last] if last else 0
    return {
        "busy_us": sum(times.values()) / per_step,
        "gaps_within_us": (sum(gaps.values()) - between) / per_step,
        "gaps_between_us": between / per_step,
        "categories": categories,
        "total": _sum_up(kernels, whole, limit, layers),
        "kernels": kernels,
    }


def _sum_up(
    kernels: list[dict[str, Any]], work: Work | None, limit: float | None, layers: int
) -> dict[str, Any]:
    """Sum up kernels; `us_layer` has those that run in every layer, divided by the layers."""
    in_layers = [k for k in kernels if "run_layer" in k["origin"] or k["calls"] >= layers - 0.5]
    us = sum(k["us"] for k in kernels)
    return {
        "calls": sum(k["calls"] for k in kernels),
        "us": us,
        "us_layer": sum(k["us"] for k in in_layers) / layers,
        "bytes": work and work.bytes,
        "flops": work and work.flops,
        "limit_us": limit and limit * 1e6,
        "share_of_limit": limit and limit * 1e6 / us if us else None,
    }


def show(name: str, table: dict[str, Any], layers: int, top: int) -> None:
    """Print a table of `tabulate`."""
    context = table["context_tokens"] / table["rows"]
    print(f"\n{name}: {table['rows']} rows, {table['tokens']} tokens, context {context:,.0f}")
    busy, loop, alone = table["busy_us"], table["loop_us"], table["alone_us"]
    for text, us in (
        ("engine's loop, without the profiler", loop),
        ("compiled step alone, back to back", alone),
    ):
        print(f"  {text:40} {us:10,.1f} us, device idle {max(0, 1 - busy / us):.1%}")
    note = ", slowed down by the profiler" if busy > min(loop, alone) else ""
    print(f"  {'kernels, in the trace':40} {busy:10,.1f} us{note}\n")

    print(f"  {'a step':28} {'calls':>6} {'us':>10} {'us/layer':>9} {'MB':>9} {'GFLOP':>9} "
          f"{'limit us':>9} {'share':>6}")  # fmt: skip
    columns = (("calls", 6, ",.0f", 1), ("us", 10, ",.1f", 1), ("us_layer", 9, ",.2f", 1),
               ("bytes", 9, ",.2f", 1e6), ("flops", 9, ",.3f", 1e9),
               ("limit_us", 9, ",.1f", 1), ("share_of_limit", 6, ".0%", 1))  # fmt: skip
    for label, row in {**table["categories"], "kernels in all": table["total"]}.items():
        cells = (
            f"{'-' if row[key] is None else format(row[key] / unit, spec):>{width}}"
            for key, width, spec, unit in columns
        )
        print(f"  {label:28} {' '.join(cells)}")
    within, between = table["gaps_within_us"], table["gaps_between_us"]
    print(f"  {'gaps within a step':28} {'':6} {within:10,.1f} {within / layers:9,.2f}")
    print(f"  {'gaps between steps (traced)':28} {'':6} {between:10,.1f}")
    for kernel in table["kernels"][:top]:
        each = kernel["us"] / kernel["calls"]
        print(f"    {kernel['calls']:6.1f} x {each:9.2f} us  {kernel['name'][:44]:44} "
              f"{kernel['origin'][-40:]}".rstrip())  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `args.cases` has the steps that it asks for."""
    parser = options.Parser(prog="nanovllm-jax profile", description="Where a step's time goes.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="default: the demo model")
    add("--random-weights", choices=QWEN3, metavar="SIZE", help=f"instead: {', '.join(QWEN3)}")
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
    options.add_engine_options(parser)
    args = parser.parse_args(argv)
    if args.model and args.random_weights:
        raise UsageError(f"{args.model} and --random-weights are two models: give one")
    if args.enforce_eager:
        raise UsageError("--enforce-eager leaves no compiled step to profile: leave it out")
    is_demo = not (args.model or args.random_weights)
    for name, value in (DEMO | {"model": options.DEMO_MODEL} if is_demo else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    options.check_positive(args, "batch", "context", "prefill", "bandwidth", "flops")
    options.check_positive(args, "top", at_least=0)
    options.check_positive(args, "steps", "timed_steps", at_least=2)
    if args.out:
        with options.refusals(OSError):
            args.out.mkdir(parents=True, exist_ok=True)
    output = WARM_STEPS + args.timed_steps + args.steps + SPARE_TOKENS
    args.cases = [Case(False, batch, args.context, output) for batch in args.batch]
    args.cases.append(Case(True, *args.prefill, output=1))
    return args


def options_for(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """Return the engine's options: the user's, and for the others room for the steps.

    Raises:
        UsageError: the steps do not fit into what the user gave; the message has the option.
    """
    prefill = args.cases[-1]
    needs = {
        "max_num_seqs": max(case.prompts for case in args.cases),
        "max_model_len": max(case.length + case.output for case in args.cases),
        "max_num_batched_tokens": prefill.prompts * prefill.length,
    }
    longest = options.engine_options(args).get("max_model_len", 4096)
    longest = min(longest, model.max_position_embeddings)
    given = {
        "max_num_seqs": needs["max_num_seqs"],
        "max_num_batched_tokens": max(needs["max_num_batched_tokens"], longest),
        **options.engine_options(args),
        "max_model_len": longest,
    }
    for name, needed in needs.items():
        if needed > given[name]:
            raise UsageError(
                f"the steps need {name} of {needed}, it is {given[name]}: raise it "
                f"({options.flag(name)}), or lower --batch, --context, --prefill or --timed-steps"
            )
    return given | ({"load_format": "dummy"} if args.random_weights else {})


def main(argv: Sequence[str]) -> int:
    """Profile what the command line asks for, print it, and return 0.

    Raises:
        UsageError: it cannot be done; the message is one line.
    """
    args = parse(argv)
    with model_directory(args) as path:
        with options.refusals(*options.ENGINE_ERRORS):
            llm = LLM(str(path), **options_for(args, ModelConfig.from_directory(path)))
        with llm:
            report = profile(llm, args, args.random_weights or path.resolve().name)
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{args.out}: profile.json, and for each step hlo.txt, perfetto.json.gz and the "
              "profile that XProf opens")  # fmt: skip
    return 0


def profile(llm: LLM, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure and show all steps; return what profile.json has."""
    assert llm.runner
    p = llm.runner.programs
    model, mesh, itemsize = p.model_config, p.sharding.mesh, p.cache_dtype.itemsize
    costs = CostModel(model, p.weights, kv_itemsize=itemsize, sharding=p.sharding)
    kind = mesh.devices.flat[0].device_kind
    hardware = find_hardware(kind)
    memory = args.bandwidth * TB if args.bandwidth else hardware and hardware.memory
    flops = args.flops and args.flops * TB
    if hardware and model.dtype == "bfloat16":
        flops = flops or hardware.flops  # which was measured in 16 bits
    print(f"{name} on {mesh.size} x {kind}, {model.dtype}, jax {jax.__version__}")
    for option, rate, unit in (("bandwidth", memory, "TB/s"), ("flops", flops, "TFLOP/s")):
        text = f"{rate / TB:g} {unit}" if rate else f"unknown, so no share of it (give --{option})"
        print(f"{option} of {kind} in {model.dtype}: {text}")
    steps = {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "trace"
            table, hlo = measure(llm, case, args, costs, (memory, flops), found)
            if args.out:
                _keep(found, hlo, args.out / case.name)
        show(case.name, table, model.num_layers, args.top)
        steps[case.name] = table
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name, "dtype": model.dtype, "kv_cache_dtype": str(p.cache_dtype),
        "device": kind, "devices": mesh.size, "jax": jax.__version__,
        "bandwidth": memory, "flops": flops, "steps": steps,
    }  # fmt: skip


def _keep(found: Path, hlo: str, folder: Path) -> None:
    """Move a step's trace, and write its program, into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(found, folder)
    [perfetto] = folder.glob("**/perfetto_trace.json.gz")
    perfetto.replace(folder / "perfetto.json.gz")
    (folder / "hlo.txt").write_text(hlo)
