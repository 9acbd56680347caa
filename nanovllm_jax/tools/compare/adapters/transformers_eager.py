"""transformers' generate, not compiled: static batches of left-padded prompts."""

import torch
import transformers

BATCH = 64  # prompts of one call at most: generate keeps the whole cache of all of them


class Adapter:
    note = f"static batches of at most {BATCH}, left-padded; a batch ends with its longest request"

    def __init__(self, model, limits):
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(model, dtype=getattr(torch, limits.dtype)).to(limits.device).eval()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no end token

    @torch.inference_mode()
    def generate(self, prompts, outputs, temperature):
        completions = []
        for start in range(0, len(prompts), BATCH):
            batch, counts = prompts[start : start + BATCH], outputs[start : start + BATCH]
            longest, count = max(map(len, batch)), max(counts)
            rows = [[(0, 0)] * (longest - len(p)) + [(1, token) for token in p] for p in batch]
            mask, ids = torch.tensor(rows, device=self.model.device).unbind(-1)
            draw = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
            options = (draw if temperature else {}) | self.cache(len(batch), longest + count)
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)
            completions += [row[longest:][:n] for row, n in zip(out.tolist(), counts, strict=True)]
        return completions

    def cache(self, batch, length):
        return {}  # generate's own, which grows

    def reset_prefix_cache(self):
        pass  # nothing is kept from one call to the next
