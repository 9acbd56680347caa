"""A small, readable, fast LLM inference engine in JAX."""

from nanovllm_jax.llm import LLM
from nanovllm_jax.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
