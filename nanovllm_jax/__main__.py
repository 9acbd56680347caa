"""`python -m nanovllm_jax` is the command `nanovllm-jax`."""

import sys

from nanovllm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
