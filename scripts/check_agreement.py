"""How often two attention backends, or two types of the KV cache, pick the same greedy token.

    python scripts/check_agreement.py MODEL_DIR            # or --random-weights 0.6B
    python scripts/check_agreement.py MODEL_DIR --backends xla triton --dtype float32
    python scripts/check_agreement.py MODEL_DIR --backends auto auto --kv-cache-dtypes auto fp8

Prints, for prompts of mixed lengths, the share of equal first tokens (one prefill each, the same
context on both sides), how far the logits behind these differ, and the share of equal tokens of
whole completions (where one early difference sends the rest its own way).
"""

import argparse
import random
from pathlib import Path

import numpy as np
from bench import QWEN3, model_directory

from nanovllm_jax import LLM, SamplingParams


def first_logits(llm: LLM, prompt: list[int]) -> np.ndarray:
    """The logits `[V]` behind the first token after the prompt."""
    assert llm.runner
    steps, seen = llm.runner.steps, []

    def recorded(step):
        def run(*args):
            results = step(*args)
            seen.append(np.asarray(results[2][0]))
            return results

        return run

    llm.reset_prefix_cache()
    llm.runner.steps = {bucket: recorded(step) for bucket, step in steps.items()}
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    llm.runner.steps = steps
    return seen[-1]  # of the last chunk


def main() -> None:
    """Run the same prompts through each backend and compare."""
    parser = argparse.ArgumentParser(description="Compare two attention backends.")
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL_DIR")
    parser.add_argument("--random-weights", choices=QWEN3, metavar="SIZE")
    parser.add_argument("--backends", nargs=2, default=["xla", "triton"])
    parser.add_argument("--kv-cache-dtypes", nargs=2, default=["auto", "auto"])
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=1024, help="longest prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    if (args.model is None) == (args.random_weights is None):
        parser.error("give either MODEL_DIR or --random-weights SIZE")

    rng = random.Random(0)
    lengths = [rng.randint(1, args.max_len) for _ in range(args.prompts)]
    completions, logits = [], []
    with model_directory(args) as directory:
        for backend, cache_dtype in zip(args.backends, args.kv_cache_dtypes, strict=True):
            with LLM(
                str(directory),
                attention_backend=backend,
                kv_cache_dtype=cache_dtype,
                dtype=args.dtype,
                max_num_seqs=args.prompts,
                num_kvcache_blocks=8 * args.prompts,
                load_format="dummy" if args.random_weights else "auto",
            ) as llm:
                vocab = min(10000, llm.vocab_size)
                rng = random.Random(1)
                prompts = [[rng.randrange(vocab) for _ in range(n)] for n in lengths]
                logits.append([first_logits(llm, prompt) for prompt in prompts])
                params = SamplingParams(
                    temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False
                )
                outputs = llm.generate(prompts, params, use_tqdm=False)
                completions.append([output["token_ids"] for output in outputs])

    pairs = list(zip(*completions, strict=True))
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    equal = [sum(x == y for x, y in zip(a, b, strict=True)) / len(a) for a, b in pairs]
    whole = sum(a == b for a, b in pairs) / len(pairs)
    names = [
        backend if dtype == "auto" else f"{backend} with {dtype} cache"
        for backend, dtype in zip(args.backends, args.kv_cache_dtypes, strict=True)
    ]
    a, b = np.stack(logits[0]), np.stack(logits[1])
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))  # softmax ignores the mean
    print(
        f"first logits: root mean square {np.sqrt(np.mean(a * a)):.3f}, of their difference "
        f"{np.sqrt(np.mean((a - b) ** 2)):.4f}, largest difference {np.abs(a - b).max():.3f}"
    )
    print(
        f"{names[0]} against {names[1]}, {len(pairs)} prompts of 1 to "
        f"{args.max_len} tokens: first token equal {first:.1%}, all {args.max_tokens} tokens "
        f"equal {whole:.1%}, tokens equal {sum(equal) / len(equal):.1%}"
    )


if __name__ == "__main__":
    main()
