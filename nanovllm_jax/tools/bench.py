"""nano-vLLM's benchmark, with figures per phase and the share of the memory limit that it reaches.

    nanovllm-jax bench MODEL_DIR            # throughput: 256 requests of random length
    nanovllm-jax bench --random-weights 0.6B --all --json results.jsonl

Three measurements: throughput (the workload of nano-vLLM's bench.py), --latency (batch 1, 16 and
64, and newcomers beside 32) and --prefill (64 long prompts, one output token). Start-up,
compilation and a whole warm-up run are outside every timed part, and no timed prompt is in the
prefix cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, check_positive
from nanovllm_jax.tools.roofline import TB, CostModel, find_hardware
from nanovllm_jax.tools.shapes import SHAPES, model_directory

if TYPE_CHECKING:
    from nanovllm_jax import LLM

MAX_TOKEN_ID = 10_000  # largest token id of the prompts
STANDARD = (256, 1024)  # requests and longest length of nano-vLLM's bench.py
BATCHES = (1, 16, 64)  # requests of the latency runs
LATENCY_PROMPT = 128  # tokens
PREFILL_PROMPTS = 64
RUNNING, NEWCOMERS = 32, 20  # requests that decode while others arrive, one after another
say = functools.partial(print, flush=True)  # progress is seen through a pipe, too


@dataclass(frozen=True)
class Workload:
    """Requests whose prompts are token ids and whose output lengths are forced."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens that will be generated in all."""
        return sum(self.outputs)

    @property
    def context_tokens(self) -> int:
        """Cached tokens that decoding reads: p + j - 1 for output token j of a prompt of p.

        The first output token is the prefill's, so j starts at 2.
        """
        lengths = zip(map(len, self.prompts), self.outputs, strict=True)
        return sum((n - 1) * p + n * (n - 1) // 2 for p, n in lengths)


def random_workload(seed: int, requests: int, max_len: int, vocab_size: int) -> Workload:
    """Draw nano-vLLM's workload, in its order: lengths are uniform in 100..max_len."""
    rng = random.Random(seed)  # the stream of random.seed(seed) and the module's functions
    low, top = min(100, max_len // 2), min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [
        [rng.randint(0, top) for _ in range(rng.randint(low, max_len))] for _ in range(requests)
    ]
    return Workload(prompts, [rng.randint(low, max_len) for _ in range(requests)])


def fixed_workload(
    rng: random.Random, batch: int, prompt_len: int, output_len: int, vocab_size: int
) -> Workload:
    """Draw a batch of equally long requests with prompts that were never used before."""
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(prompt_len)] for _ in range(batch)]
    return Workload(prompts, [output_len] * batch)


@dataclass
class Phase:
    """The prefill or the decode steps of a run; a step that does both counts as prefill."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0


class Run(NamedTuple):
    """What one pass over a workload took."""

    seconds: float
    prefill: Phase
    decode: Phase


def run(llm: LLM, work: Workload, temperature: float, detokenize: bool = False) -> Run:
    """Drive the engine over `work` step by step; every output has exactly its forced length."""
    began = time.perf_counter()
    for prompt, length in zip(work.prompts, work.outputs, strict=True):
        sampling = {"temperature": temperature, "max_tokens": length, "ignore_eos": True}
        llm.add_request(prompt, SamplingParams(**sampling, detokenize=detokenize))
    lengths, prefill, decode = [], Phase(), Phase()
    now = time.perf_counter()
    while not llm.is_finished():
        finished, tokens = llm.step()
        for _, token_ids in finished:
            lengths.append(len(token_ids))
            if detokenize and llm.tokenizer:
                llm.tokenizer.decode(
                    token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        if tokens:  # else nothing was read back yet, and the time belongs to the step that does
            phase, before, now = prefill if tokens > 0 else decode, now, time.perf_counter()
            phase.seconds += now - before
            phase.tokens += abs(tokens)
            phase.steps += 1
    assert sorted(lengths) == sorted(work.outputs), "outputs of a wrong length"
    return Run(time.perf_counter() - began, prefill, decode)


def throughput(
    llm: LLM, args: argparse.Namespace, costs: CostModel, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Time nano-vLLM's workload; medians over the runs, the slowest and the fastest."""

    def one_run(seed: int) -> tuple[Workload, Run]:
        llm.reset_prefix_cache()
        work = random_workload(seed, args.requests, args.max_len, llm.vocab_size)
        return work, run(llm, work, args.temperature, args.detokenize)

    one_run(12345)  # warm-up
    runs = sorted((one_run(0) for _ in range(args.runs)), key=lambda pair: pair[1].seconds)
    work, middle = runs[len(runs) // 2]
    rates = [work.output_tokens / run.seconds for _, run in runs]
    result: dict[str, Any] = {
        "requests": args.requests, "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens, "detokenize": args.detokenize,
        "output_tok_s": statistics.median(rates), "output_tok_s_range": [min(rates), max(rates)],
        "seconds": middle.seconds,
    }  # fmt: skip
    say(f"throughput: {args.requests} requests, {work.prompt_tokens:,} prompt and "
        f"{work.output_tokens:,} output tokens{', detokenized' * args.detokenize}, "
        f"{args.runs} runs\n  output      {result['output_tok_s']:,.0f} tok/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}), {middle.seconds:.2f} s")  # fmt: skip
    for name, phase in (("prefill", middle.prefill), ("decode", middle.decode)):
        result |= {f"{name}_{key}": value for key, value in asdict(phase).items()}
        result[f"{name}_tok_s"] = rate = phase.tokens / (phase.seconds or math.inf)
        say(f"  {name:11} {rate:,.0f} tok/s, {phase.seconds:.2f} s in {phase.steps} steps")
    hardware = find_hardware(about["device"])
    if each := args.bandwidth * TB if args.bandwidth else hardware and hardware.memory:
        result |= memory_share(middle, work, costs, each * about["devices"])
        say("  memory      {:.4g} TB must be read: {limit_tok_s:,.0f} tok/s at "
            "{bandwidth_tb_s:g} TB/s is the limit\n"
            "              {share_of_limit:.1%} of it reached over the run, "
            "{decode_share_of_limit:.1%} in the decode steps"
            .format(result["decode_bytes"] / TB, **result))  # fmt: skip
    return result


def memory_share(
    result: Run, work: Workload, costs: CostModel, bandwidth: float
) -> dict[str, float]:
    """Return how near `result` comes to reading at `bandwidth` what decoding must read.

    That is every weight once a step (of experts those that are chosen), and the keys and values of
    each context once a token. Costs and bandwidth are those of all devices together.
    """
    # Steps that also prefill decode some tokens, which their num_tokens does not tell apart.
    decoded = work.output_tokens - len(work.outputs)
    share = result.decode.tokens / decoded if decoded else 0.0
    steps = result.decode.steps
    weights = steps * costs.bytes_read(result.decode.tokens / max(1, steps))
    contexts = work.context_tokens * costs.kv_bytes
    limit = (weights + contexts) / bandwidth
    decode_limit = (weights + share * contexts) / bandwidth
    return {
        "bandwidth_tb_s": bandwidth / TB,
        "decode_bytes": weights + contexts,
        "limit_tok_s": work.output_tokens / limit,
        "share_of_limit": limit / result.seconds,
        "decode_share_of_limit": decode_limit / (result.decode.seconds or math.inf),
    }


def latency(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Time small batches; the time of one output token is subtracted to get the time per token."""
    rng, tokens = random.Random(99), args.latency_tokens
    results: dict[str, Any] = {"output_tokens": tokens}
    say(f"latency: {LATENCY_PROMPT} prompt and {tokens} output tokens, median of {args.runs}")
    for batch in BATCHES:
        whole = statistics.median(_seconds(llm, args, rng, batch, LATENCY_PROMPT, tokens))
        first = statistics.median(_seconds(llm, args, rng, batch, LATENCY_PROMPT, 1))
        results[f"batch_{batch}"] = row = {
            "ms_per_token": (whole - first) / (tokens - 1) * 1e3,
            "output_tok_s": batch * tokens / whole, "ttft_ms": first * 1e3,
        }  # fmt: skip
        say("  batch {:<5} {ms_per_token:.2f} ms per token, {output_tok_s:,.0f} output tok/s, "
            "first token after {ttft_ms:.1f} ms".format(batch, **row))  # fmt: skip
    running = min(RUNNING, llm.config.max_num_seqs - 1)
    if waits := newcomers(llm, rng, running):
        row = {"running": running, "count": len(waits), "ttft_ms": statistics.median(waits) * 1e3}
        results["newcomer"] = row
        say("  first token of {count} newcomers beside {running} that decode after {ttft_ms:.1f} ms"
            .format(**row))  # fmt: skip
    else:
        say("  no newcomer: the requests that decode end too soon; give a larger --max-model-len")
    return results


def newcomers(llm: LLM, rng: random.Random, running: int) -> list[float]:
    """Time the first tokens of requests that arrive one by one while others decode.

    Each arrives at a random moment, 20 to 100 rounds after the one before it, and is added at the
    end of the round in which it does, as a server would. Returns the seconds from arrival to token;
    none if the others come to their ends before the first.
    """
    output = llm.config.max_model_len - LATENCY_PROMPT
    work = fixed_workload(rng, running + NEWCOMERS, LATENCY_PROMPT, output, llm.vocab_size)
    forced = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False)
    others = [llm.add_request(prompt, forced) for prompt in work.prompts[:running]]
    while llm.step()[1] != -running:
        pass
    waits, rounds, began = [], 0, time.perf_counter()

    def step() -> tuple[set, float]:
        nonlocal rounds
        rounds += 1
        return {request_id for request_id, _ in llm.step()[0]}, time.perf_counter()

    ended, now = step()
    for prompt in work.prompts[running:]:
        arrival = now + rng.uniform(20, 100) * (now - began) / rounds
        while now < arrival and not ended:
            ended, now = step()
        if ended:  # the others have come to their ends
            break
        newcomer = llm.add_request(prompt, SamplingParams(max_tokens=1, detokenize=False))
        while newcomer not in ended:
            ended, now = step()
        waits.append(now - arrival)
        ended -= {newcomer}
    llm.abort_request(others)
    while not llm.is_finished():
        llm.step()
    return waits


def prefill(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Time prompts of the longest length with one output token each."""
    times = _seconds(llm, args, random.Random(98), PREFILL_PROMPTS, args.max_len, 1)
    rates = [PREFILL_PROMPTS * args.max_len / seconds for seconds in times]
    middle, extremes = statistics.median(rates), [min(rates), max(rates)]
    say(f"prefill: {PREFILL_PROMPTS} x {args.max_len} tokens, median of {args.runs}\n"
        "  input       {:,.0f} tok/s ({:,.0f} to {:,.0f}), {:.3f} s"
        .format(middle, *extremes, statistics.median(times)))  # fmt: skip
    return {"prompts": PREFILL_PROMPTS, "prompt_len": args.max_len,
            "input_tok_s": middle, "input_tok_s_range": extremes}  # fmt: skip


def _seconds(llm: LLM, args: argparse.Namespace, rng: random.Random, *sizes: int) -> list[float]:
    """Time a `fixed_workload` of these sizes in each run; another run ahead of them warms up."""
    works = (fixed_workload(rng, *sizes, vocab_size=llm.vocab_size) for _ in range(1 + args.runs))
    return [run(llm, work, args.temperature).seconds for work in works][1:]


def describe(llm: LLM, name: str) -> tuple[Programs, dict[str, Any]]:
    """Print and return which model is measured on which devices, behind its programs."""
    assert llm.runner
    programs = llm.runner.programs
    mesh = programs.sharding.mesh
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name, "dtype": programs.model_config.dtype,
        "device": mesh.devices.flat[0].device_kind, "devices": mesh.size, "jax": jax.__version__,
    }  # fmt: skip
    say("{model} on {devices} x {device}, {dtype}, jax {jax}".format(**about))
    return programs, about


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; LLM itself checks the engine options."""
    parser = options.Parser(prog="nanovllm-jax bench", description="Benchmark the engine.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="model directory")
    add("--random-weights", choices=SHAPES, metavar="SIZE", help=f"instead: {', '.join(SHAPES)}")
    add("--latency", action="store_true", help="batch 1, 16 and 64 instead of the throughput")
    add("--prefill", action="store_true", help="64 long prompts instead of the throughput")
    add("--all", action="store_true", help="all three")
    add("--runs", type=int, default=3, help="timed runs of each measurement (default: 3)")
    add("--requests", type=int, default=256, help="requests of the throughput run (default: 256)")
    add("--max-len", type=int, default=1024, help="longest prompt and output (default: 1024)")
    add("--latency-tokens", type=int, default=256, help="output tokens of --latency (default: 256)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--detokenize", action="store_true", help="decode the throughput run's output to text")
    add("--bandwidth", type=float, metavar="TB/S", help="memory bandwidth of one device")
    add("--json", type=Path, metavar="FILE", help="append the results to FILE as one JSON line")
    options.add_engine_options(parser)
    args = parser.parse_args(argv)
    if (args.model is None) == (args.random_weights is None):
        raise UsageError("give either MODEL_DIR or --random-weights SIZE")
    check_positive(args, "runs", "requests", "bandwidth")
    check_positive(args, "max_len", "latency_tokens", at_least=2)
    if args.detokenize and args.random_weights:
        raise UsageError("--detokenize needs a tokenizer, and random weights have none")
    if args.json:
        with options.refusals(OSError):
            args.json.open("a", encoding="utf-8").close()
    return args


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for, print it, and return 0; raises UsageError."""
    args = parse(argv)
    from nanovllm_jax import LLM  # which imports transformers: --help does not wait for it

    given = {"max_model_len": 4096, **options.engine_options(args)}
    began = time.perf_counter()
    with model_directory(args) as path, options.refusals(*options.ENGINE_ERRORS):
        llm = LLM(str(path), **given)
    start = time.perf_counter() - began
    with llm:
        if args.detokenize and llm.tokenizer is None:
            raise UsageError(f"--detokenize needs a tokenizer, and {args.model} has none")
        programs, result = describe(llm, args.random_weights or str(args.model))
        say(f"start-up of the engine: {start:.1f} s")
        result |= {"python": platform.python_version(), "options": given, "engine_start_s": start}
        if args.all or not (args.latency or args.prefill):
            result["throughput"] = throughput(llm, args, CostModel.of(programs), result)
        if args.all or args.latency:
            result["latency"] = latency(llm, args)
        if args.all or args.prefill:
            result["prefill"] = prefill(llm, args)
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0
