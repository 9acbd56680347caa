"""The command line: `nanovllm-jax "PROMPT" ...`, and the tools by their names.

JAX and transformers are imported when a model is needed: --help, and most of what is wrong with a
command, is answered before.
"""

import argparse
import dataclasses
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_jax import __version__
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, refusals

if TYPE_CHECKING:
    from nanovllm_jax import LLM

# First words that mean a tool, not a prompt, with the tool's module and what it does;
# `nanovllm-jax -- WORD` makes one a prompt again.
TOOLS = {
    "bench": ("bench", "measure throughput and latency with nano-vLLM's benchmark"),
    "compare": ("compare.main", "run the same work on other engines and report"),
    "profile": ("profile", "show where a step's time goes"),
    "sharding": ("sharding", "report what a sharding costs"),
}


# Most prompts that run at the same time; further ones wait. Every size has programs of its own, so
# the number of prompts does not choose it. Two cores compute 100 prompts of the demo model in
# batches of 4 as fast as in batches of 64, while its start takes 41 s of them with 8 and 57 s with
# 64, or 9 s and 11 s if all is in the cache. A GPU reads the weights once for the whole batch: an
# H100 gives 2.8 times the tokens of 16 rows with 64.
MAX_NUM_SEQS = {"cpu": 8, "gpu": 64}


def main(
    argv: Sequence[str] | None = None, *, before_tool: Callable[[], None] = lambda: None
) -> int:
    """Run the command line and return its exit status.

    The status is 0 when all is done, 1 when a request failed while running or nothing could be
    written, 2 for bad usage and 130 after an interrupt.

    Args:
        argv: the arguments without the program's name; default: those of the process.
        before_tool: is called when a tool has been imported and is about to run.
    """
    argv = sys.argv[1:] if argv is None else argv
    logger, handler = logging.getLogger("nanovllm_jax"), logging.StreamHandler()
    logger.addHandler(handler)  # the engine's messages go to standard error
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _run(argv, before_tool)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"nanovllm-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnanovllm-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # for example a full disk behind standard output
        print(f"nanovllm-jax: failed: {error}", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(handler)


def _run(argv: Sequence[str], before_tool: Callable[[], None]) -> int:
    if argv and argv[0] in TOOLS:
        module, _ = TOOLS[argv[0]]  # the other tools are not imported
        tool = importlib.import_module(f"nanovllm_jax.tools.{module}")
        before_tool()
        return tool.main(argv[1:])
    return generate(argv)


def generate(argv: Sequence[str]) -> int:
    """Generate from the prompts in `argv`: token by token for one, in prompt order for several."""
    args = _parse(argv)
    sampling, given = _sampling(args), options.engine_options(args)
    names = [word for word, _ in args.prompts]
    texts = [_read(word, is_protected) for word, is_protected in args.prompts]
    with refusals(*options.ENGINE_ERRORS):
        given = _sizes(args.model, given)
        prompts = _tokenize(args, texts, sampling, given)
        from nanovllm_jax import LLM

        llm = LLM(str(args.model), **given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with llm:
        if len(prompts) == 1:
            return _print_stream(llm, prompts[0], sampling)
        return _print_all(llm, names, prompts, sampling)


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
    words = "'-' reads standard input; any word behind '--' is a prompt as it is"
    add("prompts", nargs="*", metavar="PROMPT", help=words)
    add("--version", action="version", version=f"%(prog)s {__version__}")
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `prompts` are its words, each with whether it stood behind `--`.

    Nothing behind `--` is shown to argparse, whose versions differ in what they make of it.
    """
    parser, words = _parser(), list(argv)
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:end])
    if args.prompts.count("-") > 1:
        raise UsageError("only one prompt can be '-': there is one standard input")
    args.prompts = [(word, False) for word in args.prompts]
    args.prompts += [(word, True) for word in words[end + 1 :]]
    if not words:
        parser.print_usage(sys.stderr)
    if not args.prompts:
        raise UsageError("no PROMPT is given (--help lists what there is)")
    return args


def _sampling(args: argparse.Namespace) -> SamplingParams:
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in args]
    with refusals(TypeError, ValueError):
        sampling = SamplingParams(**{name: getattr(args, name) for name in names})
    for name in ("top_k", "top_p", "min_p", "seed"):
        if sampling.temperature == 0 and getattr(sampling, name) != getattr(SamplingParams, name):
            flag = options.flag(name)
            remedy = f"add --temperature 0.7, for example, or leave {flag} out"
            raise UsageError(f"{flag} does nothing at temperature 0, which is greedy: {remedy}")
    return sampling


def _read(word: str, is_protected: bool) -> str:
    """Return the text of a prompt: the word itself, or standard input.

    Raises:
        UsageError: it is not UTF-8; the message has the byte and its position.
    """
    try:
        if is_protected or word != "-":
            # Python keeps bytes of the command line that it cannot decode as surrogates.
            return word.encode(errors="surrogateescape").decode()
        if sys.stdin is None:
            raise UsageError("'-' reads standard input, which is closed: give the text instead")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        what = "standard input" if word == "-" else f"prompt {word[:40]!a}"
        place = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise UsageError(f"{what} is not UTF-8: {place}; convert it, as iconv does") from error


def _sizes(model: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Complete the engine's options by small steps, which take less time to compile."""
    from nanovllm_jax.config import EngineConfig
    from nanovllm_jax.engine import cuda_driver

    asked = given.get("max_model_len", EngineConfig.max_model_len)
    config = EngineConfig.resolve(model, **{"max_num_batched_tokens": asked, **given})
    rows = MAX_NUM_SEQS["gpu" if cuda_driver.total_memory() else "cpu"]
    return {"max_num_seqs": rows, "max_num_batched_tokens": config.max_model_len, **given}


def _tokenize(
    args: argparse.Namespace, texts: list[str], sampling: SamplingParams, given: dict[str, Any]
) -> list[list[int]]:
    """Return the prompts' token ids; what is wrong with one is said before anything is loaded.

    (Only the engine knows whether a prompt fits into a cache that is sized by memory.)
    """
    from nanovllm_jax.config import EngineConfig
    from nanovllm_jax.engine.prompts import encode_chat
    from nanovllm_jax.engine.request import checked_request
    from nanovllm_jax.tokenizer import load_tokenizer

    config = EngineConfig.resolve(args.model, **given)
    if (tokenizer := load_tokenizer(args.model)) is None:
        raise UsageError(f"{args.model} has no tokenizer: it needs one's files, too")
    num_blocks = config.num_kvcache_blocks or sys.maxsize
    token_ids = []
    for number, text in enumerate(texts, 1):
        try:
            prompt = text
            if args.chat:
                message = {"role": "user", "content": text}
                prompt = encode_chat(tokenizer, [message], add_generation_prompt=True)
            command = checked_request(prompt, sampling, None, tokenizer, config, num_blocks)
        except (TypeError, ValueError) as error:
            which = f"prompt {number} of {len(texts)}: " if len(texts) > 1 else ""
            raise ValueError(f"{which}{error}") from error
        token_ids.append(command.token_ids)
    return token_ids


def _print_stream(llm: "LLM", prompt: list[int], sampling: SamplingParams) -> int:
    with refusals(ValueError):  # the cache has too few blocks for the prompt
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
    llm: "LLM", names: list[str], prompts: list[list[int]], sampling: SamplingParams
) -> int:
    with refusals(ValueError):
        results = llm.generate(prompts, sampling, use_tqdm=sys.stderr.isatty())
    failed = 0
    for name, result in zip(names, results, strict=True):
        print(f">>> {name}\n{result['text']}\n", flush=True)
        if error := result.get("error"):
            print(f"nanovllm-jax: {name!r} failed: {error}", file=sys.stderr)
            failed = 1
    return failed


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids") from None


def _show_warning(message: Warning | str, *_: Any) -> None:
    print("nanovllm-jax: warning:", *str(message).split(), file=sys.stderr)
