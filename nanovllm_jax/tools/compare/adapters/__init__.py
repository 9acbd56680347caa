"""The engines, and the protocol of their adapters. docs/compare.md tells how to add one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Engine:
    """What is known of an engine without importing it; its adapter is the file of its name."""

    label: str  # its name in the report
    color: str  # its color in every plot
    needs: tuple[str, ...]  # modules that must import; their versions are recorded
    install: str  # what pip installs if one of them does not


TORCH = ("transformers", "torch")
NANOVLLM = "git+https://github.com/GeeeekExplorer/nano-vllm.git"
ENGINES = {
    "nanovllm_jax": Engine("nanovllm_jax", "#0072b2", ("nanovllm_jax", "jax"), "nanovllm-jax"),
    "vllm": Engine("vLLM", "#e69f00", ("vllm", "torch"), "vllm"),
    "nanovllm": Engine("nano-vLLM", "#009e73", ("nanovllm", "torch"), NANOVLLM),
    "transformers_eager": Engine("transformers, eager", "#cc79a7", TORCH, "torch"),
    "transformers_compiled": Engine("transformers, torch.compile", "#7f7f7f", TORCH, "torch"),
}


@dataclass(frozen=True)
class Limits:
    """The options that every engine is started with."""

    device: str  # "cuda" or "cpu"
    dtype: str  # "bfloat16" or "float32"
    sizes: dict[str, int]  # options that engines with continuous batching have in common


Tokens = list[list[int]]  # token ids of each request


class Adapter(Protocol):
    """Drives one engine, made by `Adapter(model, limits)`.

    `model` is a directory with config.json, safetensors and tokenizer, `limits` are Limits. An
    engine that takes whole batches only has no `add_request` and no `step`; then the stream of
    arrivals is not measured. Without `profile`, PyTorch's profiler is used.
    """

    note: str  # what a reader must know of the way it works; may be empty

    def generate(self, prompts: Tokens, outputs: list[int], temperature: float) -> Tokens:
        """Return completions in order, i of exactly outputs[i] tokens; no token ends one."""

    def reset_prefix_cache(self) -> Any:
        """Forget cached prefixes; return False if that failed."""

    def add_request(self, prompt: list[int], output: int, temperature: float) -> Any:
        """Queue a request and return the name under which `step` reports it."""

    def step(self) -> list[tuple[Any, int]]:
        """Run one step; return (request, output tokens so far) of those that may have got some.

        A finished request is reported with all its tokens by the step that finishes it.
        """

    def profile(self, run: Callable[[], Any], batch: int) -> dict[str, Any]:
        """Profile `run`, which decodes `batch` requests, with a function of profiling.py."""
