"""`nanovllm-jax compare`: the same work for every engine that is installed, and one report."""
