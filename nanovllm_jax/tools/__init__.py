"""The tools behind the commands of `nanovllm-jax`; each is imported when its command runs."""
