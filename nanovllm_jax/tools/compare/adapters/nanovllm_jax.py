"""This engine."""

from nanovllm_jax.tools.compare.profiling import jax_profile


class Adapter:
    note = "continuous batching; programs for all buckets compiled at the start, or found on disk"

    def __init__(self, model, limits):
        import nanovllm_jax as library

        self.make_params = library.SamplingParams
        self.llm = library.LLM(model, dtype=limits.dtype, **limits.sizes)

    def params(self, output, temperature):
        return self.make_params(temperature, output, ignore_eos=True, detokenize=False)

    def generate(self, prompts, outputs, temperature):
        params = [self.params(n, temperature) for n in outputs]
        return [r["token_ids"] for r in self.llm.generate(prompts, params, use_tqdm=False)]

    def reset_prefix_cache(self):
        self.llm.reset_prefix_cache()

    def add_request(self, prompt, output, temperature):
        return self.llm.add_request(prompt, self.params(output, temperature))

    def step(self):
        return [(r.request_id, len(r.outputs[0].token_ids)) for r in self.llm.step_outputs()]

    def profile(self, run, batch):
        programs = self.llm.runner.programs
        buckets = [b for b in programs.decode_buckets if b.num_rows >= batch]
        return jax_profile(run, programs.steps[(buckets or programs.decode_buckets[-1:])[0]])
