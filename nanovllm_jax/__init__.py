"""A small, readable, fast LLM inference engine in JAX."""

import importlib

# Not from typing, which takes longer to import than all of this: until the command line watches
# for interruptions, they end in a traceback.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from nanovllm_jax.llm import LLM
    from nanovllm_jax.outputs import CompletionOutput, RequestOutput
    from nanovllm_jax.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

__version__ = "0.2.0.dev0"

_MODULES = {"LLM": "llm", "SamplingParams": "sampling_params"}
_MODULES |= dict.fromkeys(["CompletionOutput", "RequestOutput"], "outputs")


def __getattr__(name: str):
    """Import a public name, and with it JAX, when it is first asked for.

    So the command line answers --help at once, and the processes in which `nanovllm-jax compare`
    runs other engines start without JAX.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
