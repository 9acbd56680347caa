"""What each option of a request costs a decode step.

    python -m scripts.bench_options MODEL_DIR --load-format dummy --batch 64 256

Every request of a batch has the option. The batches are run in turns, so that a change of the clock
meets all of them. Stop strings and forms need a tokenizer; without one they are left out.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.trace import busy_times, read_events, tracing

PROMPT = 128  # Tokens of a prompt.
ALL = -1  # Stands for all tokens of a run.
EVERYTHING = {"repetition_penalty": 1.1, "top_k": 50, "top_p": 0.9, "logprobs": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence and frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias, 300 tokens": {"logit_bias": {100 + i: 0.5 for i in range(300)}},
    "allowed_token_ids": {"allowed_token_ids": range(1000)},
    "min_tokens": {"min_tokens": ALL, "stop_token_ids": [7]},
    "logprobs, 1": {"logprobs": 1},
    "logprobs, 20": {"logprobs": 20},
    "penalties, filters, logprobs": EVERYTHING,
}  # fmt: skip
NEED_TEXT: dict[str, dict[str, Any]] = {
    "text": {"detokenize": True},
    "stop": {"detokenize": True, "stop": ["no such text", "nor this one"]},
    "bad_words": {"bad_words": ["foo", "a longer one"]},
    "regex": {"structured_outputs": {"regex": "[a-z ]{4000,}"}},
}


def run(llm: LLM, batch: int, tokens: int, options: dict[str, Any]) -> float:
    """Generate for a batch of new prompts; return the seconds."""
    prompts = [
        [random.randrange(min(10_000, llm.vocab_size)) for _ in range(PROMPT)] for _ in range(batch)
    ]
    common: dict[str, Any] = {
        "temperature": 0.6,
        "max_tokens": tokens,
        "ignore_eos": True,
        "detokenize": False,
    }
    chosen: dict[str, Any] = {
        name: tokens if value == ALL else value for name, value in options.items()
    }
    start = time.perf_counter()
    results = llm.generate(prompts, SamplingParams(**(common | chosen)), use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(result["token_ids"]) == tokens for result in results)
    return seconds


def kernels(llm: LLM, batch: int, steps: int, options: dict[str, Any]) -> Counter[str]:
    """Return the microseconds of each kernel in a traced run, by step."""
    with tempfile.TemporaryDirectory() as folder:
        with tracing(Path(folder)):
            run(llm, batch, steps, options)
        times, _ = busy_times(read_events(Path(folder)))
    return Counter({name: time / 1e3 / steps for name, time in times.items()})


def main() -> None:
    """Measure, and print a table for each batch."""
    parser = argparse.ArgumentParser(description="What each option of a request costs.")
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=100, help="decode steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kernels", type=int, default=0, help="kernels to list, beyond a plain step's"
    )
    args = parser.parse_args()
    llm = LLM(
        str(args.model), load_format=args.load_format, max_num_seqs=max(args.batch),
        max_model_len=min(4096, 2 * (PROMPT + args.steps)),
    )  # fmt: skip
    cases = OPTIONS | (NEED_TEXT if llm.tokenizer is not None else {})
    for batch in args.batch:
        long: dict[str, list[float]] = {name: [] for name in cases}
        short: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(args.repeats + 1):
            for name, options in cases.items():
                seconds = run(llm, batch, 1, options), run(llm, batch, 1 + args.steps, options)
                if repeat:  # the first one warms up
                    short[name].append(seconds[0])
                    long[name].append(seconds[1])
        print(f"batch {batch:3d}                                step us    more")
        step = {
            name: (statistics.median(long[name]) - statistics.median(short[name])) / args.steps
            for name in cases
        }
        for name in cases:
            more = step[name] - step["plain"]
            print(f"  {name:36s} {step[name] * 1e6:9,.0f} {more * 1e6:7,.0f}", flush=True)
        if args.kernels:
            plain, everything = (kernels(llm, batch, args.steps, o) for o in ({}, EVERYTHING))
            for kernel, us in (everything - plain).most_common(args.kernels):
                print(f"    {us:8.1f} us  {kernel}")
    llm.exit()


if __name__ == "__main__":
    main()
