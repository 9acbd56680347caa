#!/usr/bin/env python3
"""nano-vLLM's benchmark, with figures per phase and the share of the memory limit that it reaches.

    python scripts/bench.py MODEL_DIR            # throughput: 256 requests of random length
    python scripts/bench.py --random-weights 0.6B --all --json results.jsonl

Three measurements: throughput (nano-vLLM's bench.py workload), --latency (batch 1, 16 and 64) and
--prefill (64 long prompts, one output token). Start-up, compilation and a whole warm-up run are
outside every timed part, and no timed prompt is in the prefix cache.
"""

import argparse
import contextlib
import functools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

START = time.perf_counter()

import jax  # noqa: E402  the import counts as start-up

from nanovllm_jax import LLM, SamplingParams  # noqa: E402
from nanovllm_jax.__main__ import add_engine_options, engine_options  # noqa: E402
from nanovllm_jax.config import ModelConfig  # noqa: E402

MAX_TOKEN_ID = 10_000
STANDARD = (256, 1024, 142_827, 133_966)  # requests, longest length, prompt and output tokens
BATCHES = (1, 16, 64)
TB = 1e12
say = functools.partial(print, flush=True)  # progress is seen through a pipe, too

# Measured by copying, in TB/s: what a kernel that does nothing but read and write reaches.
BANDWIDTH = {"H100": 2.99, "H200": 4.2}
# Of a large bfloat16 matrix product, in TFLOP/s.
FLOPS = {"H100": 790.0, "H200": 790.0}

# The published dense shapes: hidden, intermediate, layers, query heads, KV heads, tied embeddings.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}


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
    """nano-vLLM's workload: lengths uniform in 100..max_len, drawn in its order."""
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
    """A batch of equally long requests with prompts that were never used before."""
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(prompt_len)] for _ in range(batch)]
    return Workload(prompts, [output_len] * batch)


@dataclass(frozen=True)
class Run:
    """What one pass over a workload took. A step that does both counts as prefill."""

    seconds: float
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_steps: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0


def run(llm: LLM, work: Workload, temperature: float, detokenize: bool = False) -> Run:
    """Drive the engine over `work` step by step; every output has exactly its forced length."""
    began = time.perf_counter()
    for prompt, length in zip(work.prompts, work.outputs, strict=True):
        params = SamplingParams(
            temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=detokenize
        )
        llm.add_request(prompt, params)
    lengths, result = [], Run(0.0)
    now = time.perf_counter()
    while not llm.is_finished():
        finished, tokens = llm.step()
        for _, token_ids in finished:
            lengths.append(len(token_ids))
            if detokenize:
                assert llm.tokenizer, "--detokenize needs a model directory with a tokenizer"
                llm.tokenizer.decode(token_ids, skip_special_tokens=True)
        if not tokens:
            continue  # nothing read back yet: its time belongs to the step that does
        before, now = now, time.perf_counter()
        if tokens > 0:
            result = replace(
                result,
                prefill_seconds=result.prefill_seconds + now - before,
                prefill_tokens=result.prefill_tokens + tokens,
                prefill_steps=result.prefill_steps + 1,
            )
        else:
            result = replace(
                result,
                decode_seconds=result.decode_seconds + now - before,
                decode_tokens=result.decode_tokens - tokens,
                decode_steps=result.decode_steps + 1,
            )
    assert sorted(lengths) == sorted(work.outputs), "outputs of a wrong length"
    return replace(result, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding cannot avoid to read, over all devices."""

    weights_per_step: int
    kv_per_token: int

    @classmethod
    def of(cls, model: ModelConfig, kv_cache_dtype: str) -> "Traffic":
        """Every weight once per step, of the embedding only the rows in use; KV once per token."""
        size = 4 if model.dtype == "float32" else 2
        q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention = model.hidden_size * (2 * q + 2 * kv) + 2 * model.head_dim
        mlp = 3 * model.hidden_size * model.intermediate_size
        layer = attention + mlp + 2 * model.hidden_size
        head = model.vocab_size * model.hidden_size + model.hidden_size
        kv_size = 1 if kv_cache_dtype == "fp8" else size
        return cls((model.num_layers * layer + head) * size, 2 * model.num_layers * kv * kv_size)

    def total(self, steps: int, context_tokens: float) -> float:
        """Bytes of `steps` decode steps whose contexts add up to `context_tokens`."""
        return steps * self.weights_per_step + context_tokens * self.kv_per_token


def throughput(
    llm: LLM, args: argparse.Namespace, traffic: Traffic, bandwidth: float | None, vocab: int
) -> dict[str, Any]:
    """Time nano-vLLM's workload; medians over the runs, the fastest and the slowest."""
    warm = random_workload(12345, args.requests, args.max_len, vocab)
    run(llm, warm, args.temperature, args.detokenize)
    work = random_workload(0, args.requests, args.max_len, vocab)
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
        result |= memory_share(middle, work, traffic, bandwidth)
        say(
            f"  memory      {result['decode_bytes'] / TB:.4g} TB must be read: "
            f"{result['limit_tok_s']:,.0f} tok/s at {bandwidth:g} TB/s is the limit\n"
            f"              {result['share_of_limit']:.1%} of it reached over the run, "
            f"{result['decode_share_of_limit']:.1%} in the decode steps"
        )
    return result


def memory_share(
    result: Run, work: Workload, traffic: Traffic, bandwidth: float
) -> dict[str, float]:
    """How near `result` comes to reading each byte that it must read once at `bandwidth` TB/s."""
    total = traffic.total(result.decode_steps, work.context_tokens)
    # Steps that also prefill decode some tokens, which their num_tokens does not tell apart.
    decoded = work.output_tokens - len(work.outputs)
    share = result.decode_tokens / decoded if decoded else 0.0
    in_decode = traffic.total(result.decode_steps, work.context_tokens * share)
    limit = total / (bandwidth * TB)
    return {
        "bandwidth_tb_s": bandwidth,
        "decode_bytes": total,
        "limit_tok_s": _rate(work.output_tokens, limit),
        "share_of_limit": limit / result.seconds,
        "decode_share_of_limit": _rate(in_decode / (bandwidth * TB), result.decode_seconds),
    }


def latency(llm: LLM, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Time small batches; the time of one output token is subtracted to get the time per token."""
    rng, results = random.Random(99), {}
    tokens = args.latency_tokens

    def seconds(batch: int, length: int) -> float:
        return run(llm, fixed_workload(rng, batch, 128, length, vocab), args.temperature).seconds

    say(f"latency: 128 prompt and {tokens} output tokens, median of {args.runs}")
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


def prefill(llm: LLM, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Time 64 prompts of the longest length with one output token each."""
    rng, batch = random.Random(98), 64

    def seconds() -> float:
        work = fixed_workload(rng, batch, args.max_len, 1, vocab)
        return run(llm, work, args.temperature).seconds

    seconds()  # warm-up
    times = [seconds() for _ in range(args.runs)]
    rates = [batch * args.max_len / s for s in times]
    say(
        f"prefill: {batch} x {args.max_len} tokens, median of {args.runs}\n"
        f"  input       {statistics.median(rates):,.0f} tok/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}), {statistics.median(times):.3f} s"
    )
    return {
        "prompts": batch,
        "prompt_len": args.max_len,
        "input_tok_s": statistics.median(rates),
        "input_tok_s_range": [min(rates), max(rates)],
    }


def qwen3_config(size: str) -> dict[str, Any]:
    """config.json of a published Qwen3 dense model."""
    hidden, intermediate, layers, heads, kv_heads, tied = QWEN3[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


@contextlib.contextmanager
def model_directory(args: argparse.Namespace) -> Iterator[Path]:
    """The model's directory; for --random-weights a temporary one with only a config.json."""
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(qwen3_config(args.random_weights)))
        yield path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; LLM itself checks the engine options."""
    parser = argparse.ArgumentParser(description="Benchmark the engine.")
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
        parser.error("give either MODEL_DIR or --random-weights SIZE")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"{args.model} is no model directory: it has no config.json")
    for name in ("runs", "requests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("max_len", "latency_tokens"):
        if getattr(args, name) < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2")
    if args.detokenize and args.random_weights:
        parser.error("--detokenize needs a model directory with a tokenizer")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it, and return 0."""
    args = parse(argv)
    options = {"max_model_len": 4096, **engine_options(args)}
    if args.random_weights:
        options["load_format"] = "dummy"
    with model_directory(args) as path:
        engine_start = time.perf_counter()
        llm = LLM(str(path), **options)
    ready = time.perf_counter()
    assert llm.runner
    model = llm.runner.model_config  # as it lies on the devices
    devices = options.get("tensor_parallel_size", 1)
    kind = jax.devices()[0].device_kind
    bandwidth = args.bandwidth or rate_of(BANDWIDTH, kind)
    name = args.random_weights or str(args.model)
    say(
        f"{name} on {devices} x {kind}, {model.dtype}, jax {jax.__version__}\n"
        f"start-up: {ready - START:.1f} s, of which the engine {ready - engine_start:.1f} s"
    )
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name,
        "dtype": model.dtype,
        "device": kind,
        "devices": devices,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "options": options,
        "start_s": ready - START,
        "engine_start_s": ready - engine_start,
    }
    with llm:
        if args.all or not (args.latency or args.prefill):
            total = bandwidth and bandwidth * devices
            traffic = Traffic.of(model, llm.config.kv_cache_dtype)
            result["throughput"] = throughput(llm, args, traffic, total, llm.vocab_size)
        if args.all or args.latency:
            result["latency"] = latency(llm, args, llm.vocab_size)
        if args.all or args.prefill:
            result["prefill"] = prefill(llm, args, llm.vocab_size)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    return 0


def rate_of(table: dict[str, float], device_kind: str) -> float | None:
    """The device's entry of BANDWIDTH or FLOPS; None if it was never measured."""
    return next((rate for name, rate in table.items() if name in device_kind), None)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


if __name__ == "__main__":
    sys.exit(main())
