"""The engine: the loop, the scheduler, the block manager and the model runner."""

import logging

# The progress of an engine's start is shown at this level; a higher one silences it.
if logging.getLogger("nanovllm_jax").level == logging.NOTSET:
    logging.getLogger("nanovllm_jax").setLevel(logging.INFO)
