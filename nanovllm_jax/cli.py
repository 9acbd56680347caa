"""The command line: `nanovllm-jax "PROMPT" ...`, and the tools by their names.

JAX and transformers are imported when a model is needed: --help, and most of what is wrong with a
command, is answered before.
"""

import argparse
import importlib
import io
import json
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
    from nanovllm_jax import LLM, RequestOutput

# First words that mean a tool, not a prompt, with the tool's module and what it does;
# `nanovllm-jax -- WORD` makes one a prompt again.
TOOLS = {
    "chat": ("tools.chat", "talk with a model"),
    "serve": ("server.serve", "serve a model to clients of OpenAI's API"),
    "bench": ("tools.bench", "measure throughput and latency with nano-vLLM's benchmark"),
    "compare": ("tools.compare.main", "run the same work on other engines and report"),
    "profile": ("tools.profile", "show where a step's time goes"),
    "sharding": ("tools.sharding", "report what a sharding costs"),
}

MAX_TOKENS = 256  # Tokens of an answer at most, unless the user or the model's makers say so.

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
        tool = importlib.import_module(f"nanovllm_jax.{module}")
        before_tool()
        return tool.main(argv[1:])
    return generate(argv)


def generate(argv: Sequence[str]) -> int:
    """Generate from the prompts in `argv`: token by token for one, in prompt order for several."""
    args = _parse(argv)
    sampling = options.sampling_params(args, args.model, MAX_TOKENS)
    given = options.engine_options(args)
    texts = [_read(word, is_protected) for word, is_protected in args.prompts]
    with refusals(*options.ENGINE_ERRORS):
        given = options.small_steps(args.model, given, _most_prompts())
        prompts = _tokenize(args, texts, sampling, given)
        from nanovllm_jax import LLM

        llm = LLM(str(args.model), **given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with llm:
        if len(prompts) == 1 and not args.json:
            return _print_stream(llm, prompts[0], sampling)
        names = texts if args.json else [word for word, _ in args.prompts]
        return _print_all(llm, names, prompts, sampling, as_json=args.json)


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
    add("--json", action="store_true", help="one JSON object a line for each prompt, at the end")
    options.add_chat_options(parser)
    options.add_sampling_options(parser, max_tokens=str(MAX_TOKENS))
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
    if (args.system is not None or args.no_think) and not args.chat:
        name = "--no-think" if args.no_think else "--system"
        raise UsageError(f"{name} is for the chat template: add --chat, or leave it out")
    return args


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
                messages = [*options.opening(args), {"role": "user", "content": text}]
                prompt = encode_chat(tokenizer, messages, **options.template(args))
            command = checked_request(prompt, sampling, None, tokenizer, config, num_blocks)
        except (TypeError, ValueError) as error:
            which = f"prompt {number} of {len(texts)}: " if len(texts) > 1 else ""
            raise ValueError(f"{which}{error}") from error
        token_ids.append(command.token_ids)
    return token_ids


def _print_stream(llm: "LLM", prompt: list[int], sampling: SamplingParams) -> int:
    """Print the answer token by token, and return the exit status."""
    with refusals(ValueError):  # the cache has too few blocks for the prompt
        llm.add_request(prompt, sampling)
    printed, output = 0, None
    while not llm.is_finished():
        for output in llm.step_outputs():
            text = output.outputs[0].text
            print(text[printed:], end="", flush=True)
            printed = len(text)
    print(flush=True)
    assert output
    return _tell("", output, sampling)


def _print_all(
    llm: "LLM", names: list[str], prompts: list[list[int]], sampling: SamplingParams, as_json: bool
) -> int:
    """Print the answers in the order of the prompts, and return the exit status."""
    with refusals(ValueError):
        outputs = llm.generate_outputs(prompts, sampling, use_tqdm=sys.stderr.isatty())
    status = 0
    for name, output in zip(names, outputs, strict=True):
        completion = output.outputs[0]
        if as_json:
            line = {"prompt": name, "text": completion.text, "token_ids": completion.token_ids}
            line |= {"finish_reason": completion.finish_reason}
            line |= {"stop_reason": completion.stop_reason}
            line |= {"error": output.error} if output.error else {}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f">>> {name}\n{completion.text}\n", flush=True)
        status = max(status, _tell(f" {name!r}", output, sampling))
    return status


def _tell(name: str, output: "RequestOutput", sampling: SamplingParams) -> int:
    """Say on standard error if an answer is not complete; returns the exit status."""
    if output.error:  # the request outgrew the cache; what it has got is good
        print(f"nanovllm-jax:{name} failed: {output.error}", file=sys.stderr)
        return 1
    if notice := options.cut_notice(output.outputs[0], sampling):
        print(f"nanovllm-jax:{name} {notice}", file=sys.stderr)
    return 0


def _most_prompts() -> int:
    from nanovllm_jax.engine import cuda_driver

    return MAX_NUM_SEQS["gpu" if cuda_driver.total_memory() else "cpu"]


def _show_warning(message: Warning | str, *_: Any) -> None:
    print("nanovllm-jax: warning:", *str(message).split(), file=sys.stderr)
