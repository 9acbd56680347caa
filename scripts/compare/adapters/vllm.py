"""vLLM, its engine in this process, where the profiler sees it."""

import itertools
import os

from compare.profiling import torch_profile


class Adapter:
    note = "continuous batching; its default compilation and CUDA graphs, engine in process"

    def __init__(self, model, limits):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # pyright: ignore[reportMissingImports]

        self.make_params = vllm.SamplingParams
        self.names = (f"stream-{i}" for i in itertools.count())
        self.llm = vllm.LLM(model, dtype=limits.dtype, seed=0, **limits.sizes)

    def params(self, output, temperature):
        sampling = dict(temperature=temperature, max_tokens=output)
        return self.make_params(**sampling, ignore_eos=True, detokenize=False)

    def generate(self, prompts, outputs, temperature):
        params = [self.params(n, temperature) for n in outputs]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self.llm.generate(requests, params, use_tqdm=False)
        return [r.outputs[0].token_ids for r in results]

    def reset_prefix_cache(self):
        return self.llm.reset_prefix_cache()

    def add_request(self, prompt, output, temperature):
        name, params = next(self.names), self.params(output, temperature)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def step(self):
        return [(r.request_id, len(r.outputs[0].token_ids)) for r in self.llm.llm_engine.step()]

    def profile(self, run, batch):
        return torch_profile(run)
