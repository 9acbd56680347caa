"""vLLM, its engine in this process, where the profiler sees it."""

import os
from itertools import count

from compare.profiling import torch_profile


class Adapter:
    note = "continuous batching; its default compilation and CUDA graphs, engine in process"

    def __init__(self, model, limits):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.make_params, self.names = vllm.SamplingParams, map("stream-{}".format, count())
        self.llm = vllm.LLM(model, dtype=limits.dtype, seed=0, **limits.sizes)

    def params(self, output, temperature):
        options = dict(temperature=temperature, ignore_eos=True, detokenize=False)
        return self.make_params(max_tokens=output, **options)

    def generate(self, prompts, outputs, temperature):
        params = [self.params(n, temperature) for n in outputs]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = self.llm.generate(requests, params, use_tqdm=False)
        return [r.outputs[0].token_ids for r in done]

    def reset_prefix_cache(self):
        return self.llm.reset_prefix_cache()

    def add_request(self, prompt, output, temperature):
        params, request = self.params(output, temperature), {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(name := next(self.names), request, params)
        return name

    def step(self):
        return [(r.request_id, len(r.outputs[0].token_ids)) for r in self.llm.llm_engine.step()]

    def profile(self, run, batch):
        return torch_profile(run)
