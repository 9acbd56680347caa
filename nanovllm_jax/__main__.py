"""The command line: `python -m nanovllm_jax "PROMPT" ...`, or `nanovllm-jax "PROMPT" ...`."""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.config import EngineConfig

DEMO_MODEL = Path(__file__).parent / "demo_model"

SCRIPTS = Path(__file__).parents[1] / "scripts"


ENGINE_OPTIONS: dict[str, tuple[type, str]] = {
    "max_model_len": (int, "longest prompt plus output, in tokens"),
    "max_num_seqs": (int, "most requests that run at the same time"),
    "max_num_batched_tokens": (int, "most tokens that one step processes"),
    "gpu_memory_utilization": (float, "share of the device's memory to use, in (0, 1]"),
    "tensor_parallel_size": (int, "number of devices to split the model over"),
    "kvcache_block_size": (int, "tokens of a cache block, a multiple of 256"),
    "num_kvcache_blocks": (int, "size of the cache in blocks, instead of sizing it by memory"),
    "dtype": (str, "float32 or bfloat16, instead of config.json's"),
    "kv_cache_dtype": (str, "auto, or fp8 for a KV cache of half the size"),
    "attention_backend": (str, "auto, triton, mosaic or xla"),
    "load_format": (str, "auto, or dummy for random weights (needs only config.json)"),
}


class UsageError(Exception):
    """What the user asked for cannot be done; the text is one line for them."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the engine's options; those that the user leaves out keep LLM's defaults."""
    group = parser.add_argument_group("engine")
    for name, (kind, text) in ENGINE_OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, help=text, metavar=kind.__name__.upper())
    group.add_argument(
        "--enforce-eager", action="store_true", default=None, help="run without compiling"
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """LLM's keyword arguments: the engine options that the user gave."""
    given = {name: getattr(args, name) for name in (*ENGINE_OPTIONS, "enforce_eager")}
    return {name: value for name, value in given.items() if value is not None}


class TextStream:
    """Turns tokens into text as they arrive, never printing half of a character.

    Text is held back while it ends in U+FFFD, the sign of an incomplete UTF-8 sequence; `flush`
    returns what is still held. Each decoding starts one piece back: some tokenizers drop the
    first token's leading space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        self._ids: list[int] = []
        self._start = 0  # of the piece printed last
        self._end = 0  # of the printed tokens

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete."""
        self._ids += token_ids
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def flush(self) -> str:
        """Return the text held back, complete or not; call it once, at the end."""
        return self._pending()

    def _pending(self) -> str:
        printed = self._decode(self._ids[self._start : self._end])
        return self._decode(self._ids[self._start :])[len(printed) :]


def script(module: str) -> Callable[[Sequence[str]], int]:
    """A command that is `main(argv)` of a module in the repository's scripts/."""

    def run(argv: Sequence[str]) -> int:
        if not SCRIPTS.is_dir():
            raise UsageError(
                f"this command needs the repository's scripts, and {SCRIPTS} is not there: clone "
                "the repository and install it with `pip install -e .`"
            )
        sys.path.insert(0, str(SCRIPTS))
        return importlib.import_module(module).main(argv)

    return run


# First words that mean a tool, not a prompt; `nanovllm-jax -- WORD` makes one a prompt again.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": script("compare.main"),
    "profile": script("profile_engine"),
    "sharding": script("sharding_report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (sys.argv's without the program) and return its exit status.

    0: done; 1: a request failed while running; 2: bad usage; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
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


def generate(argv: Sequence[str]) -> int:
    """Generate from the prompts in `argv`: token by token for one, in prompt order for several."""
    args = _parser().parse_intermixed_args(argv)
    if args.prompts.count("-") > 1:
        raise UsageError("only one prompt can be '-': there is one standard input")
    sampling = _sampling_params(args)
    prompts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in args.prompts]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[attr-defined]
    with _load(args.model, len(prompts), engine_options(args)) as llm:
        if (tokenizer := llm.tokenizer) is None:
            raise UsageError(f"{args.model} has no tokenizer")
        if args.chat:
            prompts = [_chat(tokenizer, prompt) for prompt in prompts]
        if len(prompts) == 1:
            return _print_stream(llm, TextStream(tokenizer), prompts[0], sampling)
        return _print_all(llm, args.prompts, prompts, sampling)


class Parser(argparse.ArgumentParser):
    """Reports a bad option like any other bad usage: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nanovllm-jax",
        usage="%(prog)s [options] PROMPT [PROMPT ...]",
        description="Generate text with a language model.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="'-' reads standard input")
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, metavar="DIR",
        help="Hugging Face style model directory (default: the small demo model shipped here)",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat template"
    )
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--max-tokens", type=int, default=256, help="most tokens per prompt (default: 256)")
    add("--top-k", type=int, default=0, help="sample among the K likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest P of probability")
    add("--min-p", type=float, default=0.0, help="drop tokens below P times the likeliest")
    add("--seed", type=int, help="the same seed gives the same tokens")
    add("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    add("--stop-token-ids", type=_token_ids, default=(), metavar="ID[,ID...]", help="further ends")
    add_engine_options(parser)
    return parser


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in args]
    with _refusals(TypeError, ValueError):
        return SamplingParams(**{name: getattr(args, name) for name in names})


def _load(model: Path, num_prompts: int, options: dict[str, Any]) -> LLM:
    # The number of requests is known here, and smaller largest steps take less time to compile.
    options = {"max_num_seqs": min(num_prompts, 512), **options}
    with _refusals(AssertionError, TypeError, ValueError):
        longest = EngineConfig.from_kwargs(str(model), **options).max_model_len
    with (
        _refusals(ValueError, OSError),  # the weights do not fit config.json, or the memory
        contextlib.redirect_stdout(sys.stderr),  # standard output is for what is generated
    ):
        return LLM(str(model), **{"max_num_batched_tokens": longest, **options})


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    with _refusals(ValueError):  # the tokenizer has no template
        return str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )


def _print_stream(llm: LLM, text: TextStream, prompt: str, sampling: SamplingParams) -> int:
    failure = None
    stream = llm.stream(prompt, sampling)
    try:
        with _refusals(TypeError, ValueError):  # before the first token, and not later
            first = list(itertools.islice(stream, 1))
        for token_ids in itertools.chain(first, stream):
            print(text.push(token_ids), end="", flush=True)
    except RuntimeError as error:  # the request outgrew the cache; what it has got is good
        failure = error
    print(text.flush(), flush=True)
    if failure:
        print(f"nanovllm-jax: failed: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _print_all(llm: LLM, names: list[str], prompts: list[str], sampling: SamplingParams) -> int:
    with _refusals(TypeError, ValueError):
        results = llm.generate(prompts, sampling, use_tqdm=sys.stderr.isatty())
    failed = 0
    for name, result in zip(names, results, strict=True):
        print(f">>> {name}\n{result['text']}\n")
        if error := result.get("error"):
            print(f"nanovllm-jax: {name!r} failed: {error}", file=sys.stderr)
            failed = 1
    return failed


@contextlib.contextmanager
def _refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds, raised within, are the user's errors."""
    try:
        yield
    except kinds as error:
        raise usage_error(error) from error


def usage_error(error: Exception) -> UsageError:
    """What an exception says, in one line for the user."""
    return UsageError(" ".join(str(error).split()) or type(error).__name__)


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids") from None


if __name__ == "__main__":
    # This file, run by `python -m`, is a second module beside the one that the scripts import:
    # their UsageError is that module's, so its `main` must be the one that catches it.
    sys.exit(importlib.import_module("nanovllm_jax.__main__").main())
