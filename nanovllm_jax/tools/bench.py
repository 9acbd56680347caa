"""nano-vLLM's benchmark, with figures per phase and the share of the memory limit that it reaches.

    nanovllm-jax bench MODEL_DIR            # throughput: 256 requests of random length
    nanovllm-jax bench --random-weights 0.6B --all --json results.jsonl

Three measurements: throughput (the workload of nano-vLLM's bench.py), --latency (batch 1, 16 and
64) and --prefill (64 long prompts, one output token). Start-up, compilation and a whole warm-up run
are outside every timed part, and no timed prompt is in the prefix cache.
"""

import argparse
import functools
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import (
    Parser,
    UsageError,
    add_engine_options,
    check_positive,
    engine_options,
    refusals,
)
from nanovllm_jax.tools.roofline import TB, CostModel, find_hardware
from nanovllm_jax.tools.shapes import QWEN3, model_directory

MAX_TOKEN_ID = 10_000  # largest token id of the prompts
STANDARD = (256, 1024, 142_827, 133_966)  # requests, longest length, prompt and output tokens
BATCHES = (1, 16, 64)  # requests of the latency runs
LATENCY_PROMPT = 128  # tokens
PREFILL_PROMPTS = 64
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
    work = Workload(prompts, [rng.randint(low, max_len) for _ in range(requests)])
    if (seed, top, requests, max_len) == (0, MAX_TOKEN_ID, *STANDARD[:2]):
        assert (work.prompt_tokens, work.output_tokens) == STANDARD[2:], "not nano-vLLM's workload"
    return work


def fixed_workload(
    rng: random.Random, batch: int, prompt_len: int, output_len: int, vocab_size: int
) -> Workload:
    """Draw a batch of equally long requests with prompts that were never used before."""
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(prompt_len)] for _ in range(batch)]
    return Workload(prompts, [output_len] * batch)


@dataclass
class Run:
    """What one pass over a workload took. A step that does both counts as prefill."""

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_steps: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0

    def add_step(self, tokens: int, seconds: float) -> None:
        """Count one step by what `LLM.step` says that it processed."""
        if tokens > 0:
            self.prefill_seconds += seconds
            self.prefill_tokens += tokens
            self.prefill_steps += 1
        else:
            self.decode_seconds += seconds
            self.decode_tokens -= tokens
            self.decode_steps += 1


def run(llm: LLM, work: Workload, temperature: float, detokenize: bool = False) -> Run:
    """Drive the engine over `work` step by step; every output has exactly its forced length."""
    began = time.perf_counter()
    for prompt, length in zip(work.prompts, work.outputs, strict=True):
        params = SamplingParams(
            temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=detokenize
        )
        llm.add_request(prompt, params)
    lengths, result = [], Run()
    now = time.perf_counter()
    while not llm.is_finished():
        finished, tokens = llm.step()
        for _, token_ids in finished:
            lengths.append(len(token_ids))
            if detokenize:
                assert llm.tokenizer, "--detokenize needs a model directory with a tokenizer"
                llm.tokenizer.decode(token_ids, skip_special_tokens=True)
        if tokens:  # else nothing was read back yet, and the time belongs to the step that does
            before, now = now, time.perf_counter()
            result.add_step(tokens, now - before)
    assert sorted(lengths) == sorted(work.outputs), "outputs of a wrong length"
    result.seconds = time.perf_counter() - began
    return result


def throughput(
    llm: LLM, args: argparse.Namespace, costs: CostModel, bandwidth: float | None
) -> dict[str, Any]:
    """Time nano-vLLM's workload; medians over the runs, the fastest and the slowest.

    Args:
        costs: the model's costs on all devices together.
        bandwidth: TB/s of all devices together, if known.
    """
    warm = random_workload(12345, args.requests, args.max_len, llm.vocab_size)
    run(llm, warm, args.temperature, args.detokenize)
    work = random_workload(0, args.requests, args.max_len, llm.vocab_size)
    runs = []
    for _ in range(args.runs):
        llm.reset_prefix_cache()
        runs.append(run(llm, work, args.temperature, args.detokenize))
    rates = [work.output_tokens / r.seconds for r in runs]
    middle = sorted(runs, key=lambda r: r.seconds)[len(runs) // 2]
    result: dict[str, Any] = {
        "requests": args.requests,
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "detokenize": args.detokenize,
        "output_tok_s": statistics.median(rates),
        "output_tok_s_range": [min(rates), max(rates)],
        **asdict(middle),
        "prefill_tok_s": _rate(middle.prefill_tokens, middle.prefill_seconds),
        "decode_tok_s": _rate(middle.decode_tokens, middle.decode_seconds),
    }
    say(
        f"throughput: {args.requests} requests, {work.prompt_tokens:,} prompt and "
        f"{work.output_tokens:,} output tokens"
        f"{', detokenized' if args.detokenize else ''}, {args.runs} runs\n"
        f"  output      {result['output_tok_s']:,.0f} tok/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}), {middle.seconds:.2f} s\n"
        f"  prefill     {result['prefill_tok_s']:,.0f} tok/s, "
        f"{middle.prefill_seconds:.2f} s in {middle.prefill_steps} steps\n"
        f"  decode      {result['decode_tok_s']:,.0f} tok/s, "
        f"{middle.decode_seconds:.2f} s in {middle.decode_steps} steps"
    )
    if bandwidth:
        result |= memory_share(middle, work, costs, bandwidth)
        say(
            f"  memory      {result['decode_bytes'] / TB:.4g} TB must be read: "
            f"{result['limit_tok_s']:,.0f} tok/s at {bandwidth:g} TB/s is the limit\n"
            f"              {result['share_of_limit']:.1%} of it reached over the run, "
            f"{result['decode_share_of_limit']:.1%} in the decode steps"
        )
    return result


def memory_share(
    result: Run, work: Workload, costs: CostModel, bandwidth: float
) -> dict[str, float]:
    """Return how near `result` comes to reading at `bandwidth` TB/s what decoding must read.

    That is every weight once a step, and the keys and values of each context once a token.
    """
    # Steps that also prefill decode some tokens, which their num_tokens does not tell apart.
    decoded = work.output_tokens - len(work.outputs)
    share = result.decode_tokens / decoded if decoded else 0.0
    weights = result.decode_steps * costs.weight_bytes
    total = weights + work.context_tokens * costs.kv_bytes
    in_decode = weights + work.context_tokens * share * costs.kv_bytes
    limit = total / (bandwidth * TB)
    return {
        "bandwidth_tb_s": bandwidth,
        "decode_bytes": total,
        "limit_tok_s": _rate(work.output_tokens, limit),
        "share_of_limit": limit / result.seconds,
        "decode_share_of_limit": _rate(in_decode / (bandwidth * TB), result.decode_seconds),
    }


def latency(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Time small batches; the time of one output token is subtracted to get the time per token."""
    rng, results, tokens = random.Random(99), {}, args.latency_tokens

    def seconds(batch: int, length: int) -> float:
        work = fixed_workload(rng, batch, LATENCY_PROMPT, length, llm.vocab_size)
        return run(llm, work, args.temperature).seconds

    say(f"latency: {LATENCY_PROMPT} prompt and {tokens} output tokens, median of {args.runs}")
    for batch in BATCHES:
        seconds(batch, tokens)  # warm-up
        whole = statistics.median(seconds(batch, tokens) for _ in range(args.runs))
        first = statistics.median(seconds(batch, 1) for _ in range(args.runs))
        results[f"batch_{batch}"] = row = {
            "ms_per_token": (whole - first) / (tokens - 1) * 1e3,
            "output_tok_s": batch * tokens / whole,
            "ttft_ms": first * 1e3,
        }
        say(
            f"  batch {batch:<5} {row['ms_per_token']:.2f} ms per token, "
            f"{row['output_tok_s']:,.0f} output tok/s, first token after {row['ttft_ms']:.1f} ms"
        )
    return {"output_tokens": tokens, **results}


def prefill(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Time prompts of the longest length with one output token each."""
    rng = random.Random(98)

    def seconds() -> float:
        work = fixed_workload(rng, PREFILL_PROMPTS, args.max_len, 1, llm.vocab_size)
        return run(llm, work, args.temperature).seconds

    seconds()  # warm-up
    times = [seconds() for _ in range(args.runs)]
    rates = [PREFILL_PROMPTS * args.max_len / s for s in times]
    say(
        f"prefill: {PREFILL_PROMPTS} x {args.max_len} tokens, median of {args.runs}\n"
        f"  input       {statistics.median(rates):,.0f} tok/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}), {statistics.median(times):.3f} s"
    )
    return {
        "prompts": PREFILL_PROMPTS,
        "prompt_len": args.max_len,
        "input_tok_s": statistics.median(rates),
        "input_tok_s_range": [min(rates), max(rates)],
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; LLM itself checks the engine options."""
    parser = Parser(prog="nanovllm-jax bench", description="Benchmark the engine.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="model directory")
    add("--random-weights", choices=QWEN3, metavar="SIZE", help=f"instead: {', '.join(QWEN3)}")
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
    add_engine_options(parser)
    args = parser.parse_args(argv)
    if (args.model is None) == (args.random_weights is None):
        raise UsageError("give either MODEL_DIR or --random-weights SIZE")
    check_positive(args, "runs", "requests", "bandwidth")
    check_positive(args, "max_len", "latency_tokens", at_least=2)
    if args.detokenize and args.random_weights:
        raise UsageError("--detokenize needs a model directory with a tokenizer")
    return args


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for, print it, and return 0.

    Raises:
        UsageError: the options are wrong; the message is one line.
    """
    args = parse(argv)
    options = {"max_model_len": 4096, **engine_options(args)}
    if args.random_weights:
        options["load_format"] = "dummy"
    began = time.perf_counter()
    with (
        model_directory(args) as path,
        refusals(AssertionError, TypeError, ValueError, OSError),
    ):
        llm = LLM(str(path), **options)
    with llm:
        result = _describe(llm, args, options, time.perf_counter() - began)
        assert llm.runner
        programs = llm.runner.programs
        if args.all or not (args.latency or args.prefill):
            costs = CostModel(
                programs.model_config, programs.weights, kv_itemsize=programs.cache_dtype.itemsize
            )
            hardware = find_hardware(result["device"])
            bandwidth = args.bandwidth or (hardware and hardware.memory / TB)
            total = bandwidth and bandwidth * result["devices"]
            result["throughput"] = throughput(llm, args, costs, total)
        if args.all or args.latency:
            result["latency"] = latency(llm, args)
        if args.all or args.prefill:
            result["prefill"] = prefill(llm, args)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    return 0


def _describe(
    llm: LLM, args: argparse.Namespace, options: dict[str, Any], engine_start: float
) -> dict[str, Any]:
    """Print and return what is measured, and how long the start took."""
    assert llm.runner
    mesh = llm.runner.programs.sharding.mesh
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.random_weights or str(args.model),
        "dtype": llm.runner.programs.model_config.dtype,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "options": options,
        "engine_start_s": engine_start,
    }
    say(
        f"{result['model']} on {result['devices']} x {result['device']}, {result['dtype']}, "
        f"jax {jax.__version__}\nstart-up of the engine: {engine_start:.1f} s"
    )
    return result


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
