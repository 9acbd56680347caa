"""vLLM, its engine in this process, where the profiler sees it."""

import os
from itertools import count


class Adapter:
    note = "continuous batching; its default compilation and CUDA graphs, engine in process"

    def __init__(self, model, limits):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.make_params, self.names = vllm.SamplingParams, map("stream-{}".format, count())
        self.llm = vllm.LLM(model, dtype=limits.dtype, seed=0, **limits.sizes)

    def params(self, n, heat):
        return self.make_params(temperature=heat, max_tokens=n, ignore_eos=True, detokenize=False)

    def generate(self, prompts, outputs, temperature):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [self.params(n, temperature) for n in outputs]
        results = self.llm.generate(requests, params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in results]

    def reset_prefix_cache(self):
        return self.llm.reset_prefix_cache()

    def add_request(self, prompt, output, temperature):
        name, request = next(self.names), {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(name, request, self.params(output, temperature))
        return name

    def step(self):
        return [(r.request_id, len(r.outputs[0].token_ids)) for r in self.llm.llm_engine.step()]
