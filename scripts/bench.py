"""nano-vLLM's benchmark: the same as `nanovllm-jax bench`."""

import sys

from nanovllm_jax.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
