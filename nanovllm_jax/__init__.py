"""A small, readable, fast LLM inference engine in JAX."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm_jax.llm import LLM
    from nanovllm_jax.outputs import CompletionOutput, RequestOutput
    from nanovllm_jax.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

__version__ = "0.2.0.dev0"

# The progress of an engine's start is shown at this level; a higher one silences it.
if logging.getLogger(__name__).level == logging.NOTSET:
    logging.getLogger(__name__).setLevel(logging.INFO)

_MODULES = {"LLM": "llm", "SamplingParams": "sampling_params"}
_MODULES |= dict.fromkeys(["CompletionOutput", "RequestOutput"], "outputs")


def __getattr__(name: str) -> Any:
    """Import a public name, and with it JAX, when it is first asked for.

    So the processes in which `nanovllm-jax compare` runs other engines start without JAX.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
