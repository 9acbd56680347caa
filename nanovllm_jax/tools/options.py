"""What several commands share: bad usage in one line, options of the engine and of sampling."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nanovllm_jax.outputs import CompletionOutput
from nanovllm_jax.recommended import recommended_sampling
from nanovllm_jax.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

# What `LLM(...)` raises if the options, the checkpoint or the memory do not do.
ENGINE_ERRORS = (AssertionError, TypeError, ValueError, OSError, MemoryError)

ENGINE_OPTIONS: dict[str, tuple[type, str]] = {
    "max_model_len": (int, "longest prompt plus output, in tokens"),
    "max_num_seqs": (int, "most requests that run at the same time"),
    "max_num_batched_tokens": (int, "most tokens that one step processes"),
    "chunked_prefill_size": (int, "the same for prompts while other requests decode"),
    "gpu_memory_utilization": (float, "share of the device's memory to use, in (0, 1]"),
    "tensor_parallel_size": (int, "number of devices to split the model over"),
    "num_scheduler_steps": (int, "most decode steps of one call of the device (default: 4)"),
    "kvcache_block_size": (int, "tokens of a cache block, a multiple of 256"),
    "num_kvcache_blocks": (int, "size of the cache in blocks, instead of sizing it by memory"),
    "dtype": (str, "float32 or bfloat16, instead of config.json's"),
    "kv_cache_dtype": (str, "auto, or fp8 for a KV cache of half the size"),
    "attention_backend": (str, "auto, triton, mosaic or xla"),
    "load_format": (str, "auto, or dummy for random weights (needs only config.json)"),
}
SWITCHES = ("enable_mixed_chunk", "enforce_eager")


class UsageError(Exception):
    """Bad usage. The message is one line, shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reports a bad option like any other bad usage, in one line; options are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists what there is)")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the engine's options; options that are not given keep LLM's defaults."""
    group = parser.add_argument_group("engine")
    for name, (kind, text) in ENGINE_OPTIONS.items():
        group.add_argument(flag(name), type=kind, help=text, metavar=kind.__name__.upper())
    eager = "run without compiling"
    mixed = "compute prompts and the tokens of requests that decode in one step"
    group.add_argument("--enable-mixed-chunk", action=argparse.BooleanOptionalAction, help=mixed)
    group.add_argument("--enforce-eager", action="store_true", default=None, help=eager)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine options that the user gave, as LLM's keyword arguments."""
    given = {name: getattr(args, name) for name in (*ENGINE_OPTIONS, *SWITCHES)}
    if getattr(args, "random_weights", None):
        given["load_format"] = "dummy"
    return {name: value for name, value in given.items() if value is not None}


def small_steps(model: Path, given: dict[str, Any], max_num_seqs: int) -> dict[str, Any]:
    """Complete the engine's options by small steps, which take less time to compile.

    Args:
        given: what the user asked for, which counts more.
        max_num_seqs: requests that run at the same time.
    """
    from nanovllm_jax.config import EngineConfig

    asked = given.get("max_model_len", EngineConfig.max_model_len)
    config = EngineConfig.resolve(model, **{"max_num_batched_tokens": asked, **given})
    sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": config.max_model_len}
    return sizes | given


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """Give `parser` the options of sampling; those that are not given are None.

    Args:
        max_tokens: the default of --max-tokens, in words.
    """
    group = parser.add_argument_group(
        "sampling", "Defaults come from the model's generation_config.json, if it has any."
    )
    add = group.add_argument
    add("--temperature", type=float, help="0, the default, is greedy")
    add("--max-tokens", type=int, help=f"most tokens of an answer (default: {max_tokens})")
    add("--top-k", type=int, help="sample among the K likeliest tokens (0: all)")
    add("--top-p", type=float, help="sample among the likeliest P of probability")
    add("--min-p", type=float, help="drop tokens below P times the likeliest")
    add("--seed", type=int, help="the same seed gives the same tokens")
    eos = "go on past the end-of-sequence token"
    add("--ignore-eos", action="store_true", default=None, help=eos)
    ends = "end where the text contains it, and leave it out; may be given several times"
    add("--stop", action="append", metavar="TEXT", help=ends)
    add("--stop-token-ids", type=_token_ids, metavar="ID[,ID...]", help="further ends")


def sampling_params(
    args: argparse.Namespace, model: Path, max_tokens: int | None
) -> SamplingParams:
    """The sampling options: the user's, else what the model's makers recommend, else greedy.

    Args:
        max_tokens: its default.

    Raises:
        UsageError: an option is wrong, or has no effect.
    """
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in args]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    with refusals(TypeError, ValueError, OSError):
        defaults = {"temperature": 0.0, "max_tokens": max_tokens} | recommended_sampling(model)
        sampling = SamplingParams(**defaults | given)
    for name in ("top_k", "top_p", "min_p", "seed"):
        if sampling.temperature == 0 and given.get(name) not in (
            None,
            getattr(SamplingParams, name),
        ):
            remedy = f"add --temperature 0.7, for example, or leave {flag(name)} out"
            raise UsageError(
                f"{flag(name)} does nothing at temperature 0, which is greedy: {remedy}"
            )
    return sampling


def cut_notice(completion: CompletionOutput, sampling: SamplingParams) -> str | None:
    """A sentence for the user if an answer ended before its end."""
    if completion.finish_reason != "length":
        return None
    count = len(completion.token_ids)
    option = "max_tokens" if count == sampling.max_tokens else "max_model_len"
    return f"cut off after {count} tokens; {flag(option)} allows no more"


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what a conversation begins with."""
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of the conversation")
    think = "ask the chat template for an answer without thinking (enable_thinking=False)"
    parser.add_argument("--no-think", action="store_true", help=think)


def opening(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def template(args: argparse.Namespace) -> dict[str, Any]:
    """What the chat template is given besides the messages."""
    return {"add_generation_prompt": True} | ({"enable_thinking": False} if args.no_think else {})


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids") from None


def flag(name: str) -> str:
    """Return the flag of an argument: `--max-len` of `max_len`."""
    return "--" + name.replace("_", "-")


def check_positive(args: argparse.Namespace, *names: str, at_least: int | None = None) -> None:
    """Refuse arguments, or lists of them, that are too small; None passes.

    Raises:
        UsageError: an argument is not positive, or less than `at_least`; the message names it.
    """
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and (value <= 0 if at_least is None else value < at_least):
                bound = "positive" if at_least is None else f"at least {at_least}"
                raise UsageError(f"{flag(name)} must be {bound}, got {value}")


@contextlib.contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, raised inside, into UsageError with their text in a line."""
    try:
        yield
    except kinds as error:
        raise UsageError(" ".join(str(error).split()) or type(error).__name__) from error
