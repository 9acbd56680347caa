"""How often two attention backends pick the same greedy token.

    python scripts/check_agreement.py MODEL_DIR            # or --random-weights 0.6B
    python scripts/check_agreement.py MODEL_DIR --backends xla triton --dtype float32

Prints, for prompts of mixed lengths, the share of equal first tokens (one prefill each, the same
context on both sides) and the share of equal tokens of whole completions (where one early
difference sends the rest its own way).
"""

import argparse
import random
from pathlib import Path

from bench import QWEN3, model_directory

from nanovllm_jax import LLM, SamplingParams


def main() -> None:
    """Run the same prompts through each backend and compare."""
    parser = argparse.ArgumentParser(description="Compare two attention backends.")
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL_DIR")
    parser.add_argument("--random-weights", choices=QWEN3, metavar="SIZE")
    parser.add_argument("--backends", nargs=2, default=["xla", "triton"])
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=1024, help="longest prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    if (args.model is None) == (args.random_weights is None):
        parser.error("give either MODEL_DIR or --random-weights SIZE")

    rng = random.Random(0)
    lengths = [rng.randint(1, args.max_len) for _ in range(args.prompts)]
    completions = []
    with model_directory(args) as directory:
        for backend in args.backends:
            with LLM(
                str(directory),
                attention_backend=backend,
                dtype=args.dtype,
                max_num_seqs=args.prompts,
                num_kvcache_blocks=8 * args.prompts,
                load_format="dummy" if args.random_weights else "auto",
            ) as llm:
                vocab = min(10000, llm.vocab_size)
                rng = random.Random(1)
                prompts = [[rng.randrange(vocab) for _ in range(n)] for n in lengths]
                params = SamplingParams(
                    temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False
                )
                outputs = llm.generate(prompts, params, use_tqdm=False)
                completions.append([output["token_ids"] for output in outputs])

    pairs = list(zip(*completions, strict=True))
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    equal = [sum(x == y for x, y in zip(a, b, strict=True)) / len(a) for a, b in pairs]
    whole = sum(a == b for a, b in pairs) / len(pairs)
    print(
        f"{args.backends[0]} against {args.backends[1]}, {len(pairs)} prompts of 1 to "
        f"{args.max_len} tokens: first token equal {first:.1%}, all {args.max_tokens} tokens "
        f"equal {whole:.1%}, tokens equal {sum(equal) / len(equal):.1%}"
    )


if __name__ == "__main__":
    main()
