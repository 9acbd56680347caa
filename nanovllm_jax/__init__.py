"""A small, readable, fast LLM inference engine in JAX."""

import logging

from nanovllm_jax.llm import LLM
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

__version__ = "0.2.0.dev0"

# The progress of an engine's start is shown at this level; a higher one silences it.
if logging.getLogger(__name__).level == logging.NOTSET:
    logging.getLogger(__name__).setLevel(logging.INFO)
