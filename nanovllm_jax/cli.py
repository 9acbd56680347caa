"""The command line: `nanovllm-jax "PROMPT" ...`, and the tools by their names."""

import argparse
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.request import Prompt
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, refusals

# First words that mean a tool, not a prompt, with the tool's module and what it does;
# `nanovllm-jax -- WORD` makes one a prompt again.
TOOLS = {
    "bench": ("bench", "measure throughput and latency with nano-vLLM's benchmark"),
    "compare": ("compare.main", "run the same work on other engines and report"),
    "profile": ("profile", "show where a step's time goes"),
    "sharding": ("sharding", "report what a sharding costs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when all is done, 1 when a request failed while running, 2 for bad usage and
    130 after an interrupt.

    Args:
        argv: the arguments without the program's name; default: those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    logger, handler = logging.getLogger("nanovllm_jax"), logging.StreamHandler()
    logger.addHandler(handler)  # the engine's messages go to standard error
    try:
        if argv and argv[0] in TOOLS:
            module, _ = TOOLS[argv[0]]  # the other tools are not imported
            return importlib.import_module(f"nanovllm_jax.tools.{module}").main(argv[1:])
        return generate(argv)
    except UsageError as error:
        print(f"nanovllm-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnanovllm-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        logger.removeHandler(handler)


def generate(argv: Sequence[str]) -> int:
    """Generate from the prompts in `argv`: token by token for one, in prompt order for several."""
    args = _parser().parse_intermixed_args(argv)
    if args.prompts.count("-") > 1:
        raise UsageError("only one prompt can be '-': there is one standard input")
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in args]
    with refusals(TypeError, ValueError):
        sampling = SamplingParams(**{name: getattr(args, name) for name in names})
    prompts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in args.prompts]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[attr-defined]
    with _load(args.model, len(prompts), options.engine_options(args)) as llm:
        if (tokenizer := llm.tokenizer) is None:
            raise UsageError(f"{args.model} has no tokenizer")
        if args.chat:
            prompts = [_chat(tokenizer, prompt) for prompt in prompts]
        if len(prompts) == 1:
            return _print_stream(llm, prompts[0], sampling)
        return _print_all(llm, args.prompts, prompts, sampling)


def _parser() -> argparse.ArgumentParser:
    tools = "\n".join(f"  {name:10} {text}" for name, (_, text) in TOOLS.items())
    parser = options.Parser(
        prog="nanovllm-jax",
        usage="%(prog)s [options] PROMPT [PROMPT ...]\n       %(prog)s TOOL [options]",
        description="Generate text with a language model.",
        epilog=f"tools, each with its own --help:\n{tools}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="'-' reads standard input")
    model = "Hugging Face style model directory (default: the small demo model shipped here)"
    add("--model", type=Path, default=options.DEMO_MODEL, metavar="DIR", help=model)
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--max-tokens", type=int, default=256, help="most tokens per prompt (default: 256)")
    add("--top-k", type=int, default=0, help="sample among the K likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest P of probability")
    add("--min-p", type=float, default=0.0, help="drop tokens below P times the likeliest")
    add("--seed", type=int, help="the same seed gives the same tokens")
    add("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    add("--stop-token-ids", type=_token_ids, default=(), metavar="ID[,ID...]", help="further ends")
    options.add_engine_options(parser)
    return parser


def _load(model: Path, num_prompts: int, given: dict[str, Any]) -> LLM:
    """Load the engine with steps no larger than the prompts need: they take less time to compile.

    Raises:
        UsageError: an option is wrong, or the weights do not fit config.json or the memory.
    """
    with refusals(*options.ENGINE_ERRORS):
        longest = ModelConfig.from_directory(model).max_position_embeddings
        longest = max(1, min(given.get("max_model_len", 4096), longest))
        given = {"max_num_seqs": min(num_prompts, 512), "max_num_batched_tokens": longest, **given}
        return LLM(str(model), **given)


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    message = [{"role": "user", "content": prompt}]
    with refusals(ValueError):  # the tokenizer has no template
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text), add_special_tokens=False)  # the template has written them


def _print_stream(llm: LLM, prompt: Prompt, sampling: SamplingParams) -> int:
    with refusals(TypeError, ValueError):
        llm.add_request(prompt, sampling)
    printed, error = 0, None
    while not llm.is_finished():
        for output in llm.step_outputs():
            text, error = output.outputs[0].text, output.error
            print(text[printed:], end="", flush=True)
            printed = len(text)
    print(flush=True)
    if error:  # the request outgrew the cache; what it has got is good
        print(f"nanovllm-jax: failed: {error}", file=sys.stderr)
    return 1 if error else 0


def _print_all(
    llm: LLM, names: list[str], prompts: Sequence[Prompt], sampling: SamplingParams
) -> int:
    with refusals(TypeError, ValueError):
        results = llm.generate(prompts, sampling, use_tqdm=sys.stderr.isatty())
    failed = 0
    for name, result in zip(names, results, strict=True):
        print(f">>> {name}\n{result['text']}\n")
        if error := result.get("error"):
            print(f"nanovllm-jax: {name!r} failed: {error}", file=sys.stderr)
            failed = 1
    return failed


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids") from None
