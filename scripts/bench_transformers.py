#!/usr/bin/env python3
"""The engine against transformers' generate on a CPU, in turns: the same prompts, float32, greedy.

    python scripts/bench_transformers.py                 # the demo model, batch 1 and 16
    python scripts/bench_transformers.py MODEL_DIR --batch 1 --tokens 64

Needs PyTorch, as the peer only. End of sequence is ignored by one and forbidden to the other, so
that every completion has the full length. Compilation and a first run of each are not timed.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
from transformers import AutoModelForCausalLM

import nanovllm_jax
from nanovllm_jax import LLM, SamplingParams

DEMO_MODEL = Path(nanovllm_jax.__file__).parent / "demo_model"


def main() -> int:
    """Time both on each batch size and print tokens per second."""
    parser = argparse.ArgumentParser(description="Compare with transformers on a CPU.")
    add = parser.add_argument
    add("model", type=Path, nargs="?", default=DEMO_MODEL, metavar="MODEL_DIR")
    add("--batch", type=int, nargs="+", default=[1, 16], help="prompts at a time")
    add("--context", type=int, default=128, help="prompt tokens (default: 128)")
    add("--tokens", type=int, default=128, help="output tokens (default: 128)")
    add("--runs", type=int, default=3, help="timed runs of each (default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    peer: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    vocab = min(1000, peer.config.vocab_size)
    rng = random.Random(0)

    def ours(prompts: list[list[int]]) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False
        )
        llm.generate(prompts, params, use_tqdm=False)

    def theirs(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        lengths = dict(min_new_tokens=args.tokens, max_new_tokens=args.tokens)
        with torch.inference_mode():
            peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths
            )

    with LLM(str(args.model), max_num_seqs=max(args.batch), max_model_len=1024) as llm:
        for batch in args.batch:
            seconds = {ours: [], theirs: []}
            for i in range(args.runs + 1):
                for run in (ours, theirs) if i % 2 else (theirs, ours):
                    prompts = [
                        [rng.randrange(3, vocab) for _ in range(args.context)] for _ in range(batch)
                    ]
                    start = time.perf_counter()
                    run(prompts)
                    if i:
                        seconds[run].append(time.perf_counter() - start)
            for name, run in (("nanovllm_jax", ours), ("transformers", theirs)):
                rates = sorted(batch * args.tokens / s for s in seconds[run])
                print(
                    f"batch {batch:3}  {name:13} {statistics.median(rates):8,.0f} tok/s "
                    f"({rates[0]:,.0f} to {rates[-1]:,.0f})"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
