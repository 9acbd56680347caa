"""transformers' generate with a static cache, its decode step compiled by torch.compile."""

import torch
import transformers

from nanovllm_jax.tools.compare.adapters import transformers_eager

STEP = 64  # cache lengths are multiples of it, so that like lengths share a compiled program


class Adapter(transformers_eager.Adapter):
    note = f"{transformers_eager.Adapter.note}; the decode step is compiled, prefill is not"

    def __init__(self, model, limits):
        super().__init__(model, limits)
        torch._dynamo.config.recompile_limit = 64  # a program for each shape
        on_gpu = limits.device == "cuda"
        mode = "reduce-overhead" if on_gpu else "default"  # the former is CUDA graphs
        self.options = transformers.CompileConfig(mode=mode, dynamic=False)
        self.options._compile_all_devices = not on_gpu  # unless told, it compiles on no CPU
        self.caches = {}  # batch -> (length, cache): a new one would be compiled or captured anew

    def cache(self, batch, length):
        if batch not in self.caches or self.caches[batch][0] < length:
            size, config = -(-length // STEP) * STEP, self.model.config
            self.caches.pop(batch, None)
            self.caches[batch] = size, transformers.StaticCache(config, max_cache_len=size)
        cache = self.caches[batch][1]
        cache.reset()
        return dict(past_key_values=cache, compile_config=self.options)
