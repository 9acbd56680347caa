"""`nanovllm-jax compare serving`: engines behind their HTTP servers, under one client's load."""
