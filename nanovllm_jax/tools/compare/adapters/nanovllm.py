"""nano-vLLM, whose interface this repository's engine has. Not run yet: it needs flash-attn."""


class Adapter:
    note = "continuous batching; CUDA graphs for decoding; it always decodes its output to text"

    def __init__(self, model, limits):
        import nanovllm

        self.make_params, self.llm = nanovllm.SamplingParams, nanovllm.LLM(model, **limits.sizes)

    def params(self, output, temperature):  # it refuses greedy decoding
        return self.make_params(temperature or 1e-5, output, ignore_eos=True)

    def generate(self, prompts, outputs, temperature):
        params = [self.params(n, temperature) for n in outputs]
        return [r["token_ids"] for r in self.llm.generate(prompts, params, use_tqdm=False)]

    def reset_prefix_cache(self):  # it has no call for it
        self.llm.scheduler.block_manager.hash_to_block_id.clear()

    def add_request(self, prompt, output, temperature):
        self.llm.add_request(prompt, self.params(output, temperature))
        return self.llm.scheduler.waiting[-1].seq_id

    def step(self):
        finished, _ = self.llm.step()
        running = [(seq.seq_id, seq.num_completion_tokens) for seq in self.llm.scheduler.running]
        return running + [(seq_id, len(token_ids)) for seq_id, token_ids in finished]
