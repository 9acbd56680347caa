"""What several commands share: bad usage in one line, and the engine's options as flags."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

# What `LLM(...)` raises if the options, the checkpoint or the memory do not do.
ENGINE_ERRORS = (AssertionError, TypeError, ValueError, OSError, MemoryError)

ENGINE_OPTIONS: dict[str, tuple[type, str]] = {
    "max_model_len": (int, "longest prompt plus output, in tokens"),
    "max_num_seqs": (int, "most requests that run at the same time"),
    "max_num_batched_tokens": (int, "most tokens that one step processes"),
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
    group.add_argument("--enforce-eager", action="store_true", default=None, help=eager)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine options that the user gave, as LLM's keyword arguments."""
    given = {name: getattr(args, name) for name in (*ENGINE_OPTIONS, "enforce_eager")}
    if getattr(args, "random_weights", None):
        given["load_format"] = "dummy"
    return {name: value for name, value in given.items() if value is not None}


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
