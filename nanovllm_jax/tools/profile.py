"""Where a step's time goes: kernels by category beside their limits, and how long the device idles.

    nanovllm-jax profile                                    # the demo model, in seconds
    nanovllm-jax profile --random-weights 0.6B --out DIR    # batch 1 to 256, and a prefill
    nanovllm-jax profile MODEL_DIR --batch 16 --tensor-parallel-size 2 --out DIR

Three measurements of a step: the engine's own loop without the profiler, the compiled step called
back to back without the engine, and the kernels in a trace of the loop. With --out, DIR gets for
each step the trace (for XProf and Perfetto), the compiled program, and the tables as profile.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.inputs import PreparedBatch
from nanovllm_jax.engine.model_runner import TokenFuture
from nanovllm_jax.engine.scheduler import Batch
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tools import options, trace
from nanovllm_jax.tools.bench import describe, fixed_workload
from nanovllm_jax.tools.options import UsageError
from nanovllm_jax.tools.roofline import TB, CostModel, Work, find_hardware
from nanovllm_jax.tools.shapes import SHAPES, model_directory

if TYPE_CHECKING:
    from nanovllm_jax import LLM

WARM_STEPS = 10  # decode steps before the first that counts
SPARE_TOKENS = 16  # tokens that a sequence may have decoded before all of them do
PREFILL_RUNS = 6

# What is profiled unless the user says otherwise; --prefill has prompts and the tokens of each.
FULL = {"batch": [1, 16, 64, 256], "context": 384, "prefill": [16, 1024]}
DEMO = {"batch": [4], "context": 64, "prefill": [2, 128], "max_model_len": 256}


class Case(NamedTuple):
    """A step to profile: `prompts` sequences of `length` tokens are prefilled, or decode on."""

    name: str
    is_prefill: bool
    prompts: int
    length: int
    output: int  # tokens that each may decode


def measure(
    llm: LLM, case: Case, args: argparse.Namespace, costs: CostModel, rates: Sequence, folder: Path
) -> tuple[dict[str, Any], str]:
    """Time a step and trace it into `folder`; return its table and its compiled program.

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
    timed, traced = (PREFILL_RUNS, 1) if case.is_prefill else (args.timed_steps, args.steps)
    loop, alone, inputs, batch = time_steps(llm, case, timed, traced, folder)
    assert len(batch.seqs) == case.prompts
    bucket = inputs.bucket
    hlo = runner.programs.steps[bucket].as_text() or ""
    events = trace.read_events(folder, trace.module_name(hlo))
    events = [event for event in events if trace.category(event[2]) != "copies"]
    if not events:
        raise UsageError("the trace has no kernels of the step: may this user profile the device?")
    last = ""
    if not case.is_prefill:
        events, traced, last = trace.whole_steps(events, traced)
    table = {
        "rows": len(batch.seqs), "tokens": batch.num_tokens,
        "context_tokens": sum(batch.starts) + batch.num_tokens, "bucket": bucket._asdict(),
        "loop_us": loop * 1e6, "alone_us": alone * 1e6, "traced_steps": traced,
    }  # fmt: skip
    work, layers = costs.categories(batch.starts, batch.lengths), costs.config.num_layers
    return table | tabulate(events, traced, last, trace.origins(hlo), work, rates, layers), hlo


def time_steps(
    llm: LLM, case: Case, timed: int, traced: int, folder: Path
) -> tuple[float, float, PreparedBatch, Batch]:
    """Run the engine's loop, a traced part in the middle, and the compiled step without the loop.

    Half of the loop's timed steps are ahead of the others and half behind, so that all see the same
    contexts on average. Outside the timed loop a call takes one step.

    Returns:
        The seconds of a step in the loop and alone, and one of the steps that ran alone.
    """
    work = fixed_workload(random.Random(0), case.prompts, case.length, 1, llm.vocab_size)
    params = SamplingParams(temperature=0.6, max_tokens=case.output, ignore_eos=True)
    pace = llm._core.pace
    most = pace.most

    def add() -> None:
        llm.reset_prefix_cache()
        for prompt in work.prompts:
            llm.add_request(prompt, params)

    def run(count: int, steps_in_a_call: int = 1) -> float:
        """Decode `count` steps, or prefill as many batches; return the seconds."""
        pace.most = steps_in_a_call
        began = time.perf_counter()
        for _ in range(count):
            if case.is_prefill:
                add()
                while not llm.is_finished():
                    llm.step()
            else:
                llm.step()
        return time.perf_counter() - began

    add()
    tokens = 0
    while tokens < case.prompts * case.length:
        tokens += max(0, llm.step()[1])
    if case.is_prefill:
        llm.step()
        assert llm.is_finished()
    run(1 if case.is_prefill else WARM_STEPS, most)
    seconds = run(timed // 2, most)
    drain = 0 if case.is_prefill else 2 * most  # ends two calls of several steps
    run(drain)
    with trace.tracing(folder, perfetto=True):
        run(traced)
    if case.is_prefill:
        add()
    alone, inputs, batch = time_alone(llm, timed, case.is_prefill)
    run(0 if case.is_prefill else timed)  # reads what has been drawn alone
    run(drain)
    seconds += run(timed - timed // 2, most)
    for _ in range(case.output):
        llm.step()
    assert llm.is_finished()
    return seconds / timed, alone, inputs, batch


def time_alone(llm: LLM, calls: int, is_prefill: bool) -> tuple[float, PreparedBatch, Batch]:
    """Time the engine's next steps back to back, without its loop.

    Their inputs are made before. The engine then reads what decode steps have drawn, as if it had
    run them; a prefill is repeated, with the same positions of the cache.

    Returns:
        The seconds of a step, and the middle one.
    """
    core, runner = llm._core, llm.runner
    assert runner
    batches = [llm.scheduler.schedule() for _ in range(1 if is_prefill else calls)]
    work = []
    for batch in batches:
        assert batch
        inputs = runner.prepare_inputs(batch)
        packed = jax.device_put(inputs.packed, runner.programs.sharding.named("batch"))
        work.append((batch, inputs._replace(packed=packed)))
    if is_prefill:
        work *= calls
        runner.run(work[0][1]).block_until_ready()
    before = None
    began = time.perf_counter()
    for batch, inputs in work:
        after = runner.run(inputs)
        if before is not None:
            before.block_until_ready()  # the engine has memory for two steps under way
        before = after
        if not is_prefill:
            core.in_flight.append((batch, TokenFuture(after, inputs.order)))
    assert before is not None
    before.block_until_ready()
    seconds = time.perf_counter() - began
    if is_prefill:
        core.in_flight.append((batch, TokenFuture(before, inputs.order)))
    batch, inputs = work[len(work) // 2]
    return seconds / len(work), inputs, batch


def tabulate(
    events: Sequence[trace.Event], steps: int, last: str, origins: dict[str, str],
    costs: dict[str, Work], rates: Sequence[float | None], layers: int,
) -> dict[str, Any]:  # fmt: skip
    """Return a step's kernels, and its categories with their work and limits; times in us.

    `us_layer` has the kernels that run in every layer, divided by the layers.

    Args:
        steps: how many steps the events are.
        last: the kernel that ends a step, or "".
        origins: the model's operation that a kernel was made from.
        costs: the work of the step by category.
        rates: bytes and operations per second, if known.
    """
    times, gaps = trace.busy_times(events)
    counts = collections.Counter(name for start, end, name in events if end > start)
    per_step = steps * 1e3  # of ns
    kernels = [
        {"name": name, "origin": origins.get(name, ""),
         "category": trace.category(name, origins.get(name, "")),
         "calls": counts[name] / steps, "us": ns / per_step}
        for name, ns in times.most_common()
    ]  # fmt: skip

    def sum_up(category: str | None, work: Work | None, limit: float | None) -> dict[str, Any]:
        mine = [k for k in kernels if category in (None, k["category"])]
        in_layers = [k for k in mine if "run_layer" in k["origin"] or k["calls"] >= layers - 0.5]
        us, limit = sum(k["us"] for k in mine), limit and limit * 1e6
        return {
            "calls": sum(k["calls"] for k in mine),
            "us": us, "us_layer": sum(k["us"] for k in in_layers) / layers,
            "bytes": work and work.bytes, "flops": work and work.flops,
            "limit_us": limit, "share_of_limit": limit / us if limit and us else None,
        }  # fmt: skip

    limits = {c: w.seconds(*rates) for c, w in costs.items() if c != "communication"}
    whole = Work(sum(w.bytes for w in costs.values()), sum(w.flops for w in costs.values()))
    limit = None if None in limits.values() else sum(filter(None, limits.values()))
    found = {k["category"] for k in kernels} | {*costs}
    between = gaps[last] if last else 0
    return {
        "busy_us": sum(times.values()) / per_step,
        "gaps_within_us": (sum(gaps.values()) - between) / per_step,
        "gaps_between_us": between / per_step,
        "categories": {c: sum_up(c, costs.get(c), limits.get(c))
                       for c in trace.CATEGORIES if c in found},
        "total": sum_up(None, whole, limit),
        "kernels": kernels,
    }  # fmt: skip


def show(name: str, table: Mapping[str, Any], layers: int, top: int) -> None:
    """Print a table of `tabulate`."""
    context = table["context_tokens"] / table["rows"]
    print(f"\n{name}: {table['rows']} rows, {table['tokens']} tokens, context {context:,.0f}")
    busy, loop, alone = table["busy_us"], table["loop_us"], table["alone_us"]
    texts = ("engine's loop, without the profiler", "compiled step alone, back to back")
    for text, us in zip(texts, (loop, alone), strict=True):
        print(f"  {text:40} {us:10,.1f} us, device idle {max(0, 1 - busy / us):.1%}")
    note = ", slowed down by the profiler" if busy > min(loop, alone) else ""
    print(f"  {'kernels, in the trace':40} {busy:10,.1f} us{note}\n")

    columns = (
        ("calls", "calls", 6, ",.0f", 1), ("us", "us", 10, ",.1f", 1),
        ("us/layer", "us_layer", 9, ",.2f", 1), ("MB", "bytes", 9, ",.2f", 1e6),
        ("GFLOP", "flops", 9, ",.3f", 1e9), ("limit us", "limit_us", 9, ",.1f", 1),
        ("share", "share_of_limit", 6, ".0%", 1),
    )  # fmt: skip
    print(f"  {'a step':28}", *(f"{header:>{width}}" for header, _, width, _, _ in columns))
    for label, row in {**table["categories"], "kernels in all": table["total"]}.items():
        cells = (("-" if row[key] is None else format(row[key] / unit, spec)).rjust(width)
                 for _, key, width, spec, unit in columns)  # fmt: skip
        print(f"  {label:28}", *cells)
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
    add("--random-weights", choices=SHAPES, metavar="SIZE", help=f"instead: {', '.join(SHAPES)}")
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
    steps_in_a_call = args.num_scheduler_steps or EngineConfig.num_scheduler_steps
    output = WARM_STEPS + 2 * args.timed_steps + args.steps + SPARE_TOKENS + 4 * steps_in_a_call
    args.cases = [Case(f"decode-{n}", False, n, args.context, output) for n in args.batch]
    args.cases.append(Case("prefill-{}x{}".format(*args.prefill), True, *args.prefill, output=1))
    return args


def options_for(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """Return the engine's options: the user's, and for the others room for the steps.

    Raises:
        UsageError: the steps do not fit into what the user gave.
    """
    tokens = args.prefill[0] * args.prefill[1]
    needs = {
        "max_num_seqs": max(case.prompts for case in args.cases),
        "max_model_len": max(case.length + case.output for case in args.cases),
        "max_num_batched_tokens": tokens,
    }
    given = options.engine_options(args)
    longest = min(given.get("max_model_len", 4096), model.longest_context)
    given = needs | {"max_num_batched_tokens": max(tokens, longest)} | given
    given["max_model_len"] = longest
    for name, needed in needs.items():
        if needed > given[name]:
            raise UsageError(
                f"the steps need {name} of {needed}, it is {given[name]}: raise it "
                f"({options.flag(name)}), or lower --batch, --context, --prefill or --timed-steps"
            )
    return given


def main(argv: Sequence[str]) -> int:
    """Profile what the command line asks for, print it, and return 0; raises UsageError."""
    args = parse(argv)
    from nanovllm_jax import LLM  # which imports transformers: --help does not wait for it

    with model_directory(args) as path:
        with options.refusals(*options.ENGINE_ERRORS):
            llm = LLM(str(path), **options_for(args, ModelConfig.from_directory(path)))
        with llm:
            report = profile(llm, args, args.random_weights or path.resolve().name)
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(f"\n{args.out}: profile.json, and for each step hlo.txt, perfetto.json.gz and the "
              "profile that XProf opens")  # fmt: skip
    return 0


def profile(llm: LLM, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure and show all steps; return what profile.json has."""
    programs, report = describe(llm, name)
    costs, kind, dtype = (
        CostModel.of(programs, programs.sharding),
        report["device"],
        report["dtype"],
    )
    hardware = find_hardware(kind)
    memory = args.bandwidth * TB if args.bandwidth else hardware and hardware.memory
    flops = args.flops and args.flops * TB
    if hardware and dtype == "bfloat16":
        flops = flops or hardware.flops  # which was measured in 16 bits
    for option, rate, unit in (("bandwidth", memory, "TB/s"), ("flops", flops, "TFLOP/s")):
        text = f"{rate / TB:g} {unit}" if rate else f"unknown, so no share of it (give --{option})"
        print(f"{option} of {kind} in {dtype}: {text}")
    report |= {"kv_cache_dtype": str(programs.cache_dtype), "bandwidth": memory, "flops": flops}
    report["steps"] = {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "trace"
            table, hlo = measure(llm, case, args, costs, (memory, flops), found)
            if args.out:
                kept = args.out / case.name
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(found, kept)
                [perfetto] = kept.glob("**/perfetto_trace.json.gz")
                perfetto.replace(kept / "perfetto.json.gz")
                (kept / "hlo.txt").write_text(hlo, "utf-8")
        show(case.name, table, costs.config.num_layers, args.top)
        report["steps"][case.name] = table
    return report
