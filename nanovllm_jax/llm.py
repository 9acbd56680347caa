"""LLM: the one class that most programs need."""

from nanovllm_jax.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """A language model loaded from a local directory, ready to complete prompts.

    Args:
        model: local directory with config.json, safetensors weights and tokenizer files.
        max_num_batched_tokens: most prompt tokens of one step; at least max_model_len.
        max_num_seqs: most sequences in flight at once.
        max_model_len: longest sequence, prompt and completion; capped to the model's
            max_position_embeddings.
        gpu_memory_utilization: share, in (0, 1], of the memory that JAX holds of each GPU to use
            for weights, steps and KV cache.
        tensor_parallel_size: devices to split the model over, 1 to 8.
        mesh_shape: instead, devices along each axis of the mesh, {"data": 2, "tensor": 4}: "data"
            splits the sequences and their cache, "tensor" the model. num_kvcache_blocks is then
            the size of one data shard's cache.
        sharding_rules: changes to nanovllm_jax.sharding.DEFAULT_RULES, logical axis -> mesh axis,
            a list of them, or None.
        enforce_eager: run operation by operation, without compiling the model; to debug.
        kvcache_block_size: tokens of a KV-cache block, a multiple of 256.
        num_kvcache_blocks: size of the KV cache; None fills the memory.
        dtype: "float32" or "bfloat16"; None takes config.json's, and float32 on a CPU.
        kv_cache_dtype: "fp8" keeps keys and values as float8_e4m3fn, in half the memory of bfloat16
            and read in half the time; "auto" keeps them in `dtype`.
        seed: of the random streams of requests that name none.
        async_scheduling: let the device run one step ahead of the host; off only to debug.
        attention_backend: "triton" or "mosaic" (GPU), "xla", or "auto", the fastest.
        load_format: "auto" reads the weights; "dummy" makes random ones, to measure speed.

    Raises:
        AssertionError: `model` is no local directory with a config.json.
        TypeError: an option is unknown (the nearest valid one is named) or of the wrong type.
        ValueError: an option lies out of range, or the checkpoint does not fit its config.json.
        FileNotFoundError: the directory has no safetensors file.

    Example:
        >>> from nanovllm_jax import LLM, SamplingParams
        >>> with LLM("/path/to/Qwen3-0.6B") as llm:
        ...     outputs = llm.generate(["Hello."], SamplingParams(temperature=0.6, max_tokens=256))
        >>> outputs[0]["text"]
    """
