"""Make the work that every engine gets: tokens, output lengths and arrivals, from fixed seeds."""

import itertools
import random
from dataclasses import dataclass

from nanovllm_jax.tools import bench
from nanovllm_jax.tools.compare.job import Workload
from nanovllm_jax.tools.compare.results import Task
from nanovllm_jax.tools.roofline import CostModel

NAMES = ("batch1", "batch16", "batch64", "prefill", "prefix", "stream", "bench")
SEED, WARM_UP_SEED, CHECK_SEED = 0, 12345, 7


@dataclass(frozen=True)
class Scale:
    """How long the workloads are, in tokens, and the options that every engine gets."""

    prompt: int  # each prompt of the batches
    output: int
    prefill: tuple[int, int]  # prompts, length of each
    prefix: tuple[int, int, int, int]  # prompts, shared prefix, rest of each, output of each
    stream: tuple[int, int, int]  # requests, longest prompt, longest output
    rate: float  # requests a second of the stream
    bench: tuple[int, int]  # requests, longest prompt and longest output
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


SCALES = {
    "gpu": Scale(
        prompt=128, output=256, prefill=(64, 1024), prefix=(32, 2048, 64, 32),
        stream=(80, 512, 192), rate=20, bench=(256, 1024),
        max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=16384,
    ),
    "cpu": Scale(
        prompt=32, output=48, prefill=(32, 128), prefix=(16, 256, 16, 8),
        stream=(16, 64, 48), rate=8, bench=(32, 128),
        max_model_len=512, max_num_seqs=64, max_num_batched_tokens=512,
    ),
}  # fmt: skip


def make(name: str, scale: Scale, seed: int, vocab_size: int) -> Workload:
    """Make a workload; another seed gives other token ids of the same lengths or distribution."""
    rng = random.Random(f"{name} {seed}")
    if name == "prefix":
        return _prefix(rng, scale, vocab_size)
    if name == "stream":
        return _stream(rng, scale, vocab_size)
    if name == "bench":  # at full size seed 0 is nano-vLLM's bench.py, token for token
        work = bench.random_workload(seed, *scale.bench, vocab_size)
        scaled = "" if scale.bench == bench.STANDARD[:2] else ", scaled down"
        size = f"{work.prompt_tokens:,} prompt and {work.output_tokens:,} output tokens"
        title = f"nano-vLLM's bench.py{scaled}: {len(work.prompts)} requests, {size}"
    elif name == "prefill":
        count, length = scale.prefill
        work = bench.fixed_workload(rng, count, length, 1, vocab_size)
        title = f"prefill: {count} x {length} tokens"
    else:
        count = int(name.removeprefix("batch"))
        work = bench.fixed_workload(rng, count, scale.prompt, scale.output, vocab_size)
        title = f"batch {count}: {scale.prompt} prompt + {scale.output} output tokens each"
    parts = {"whole": [(work.prompts, work.outputs)]}
    if name.startswith("batch"):  # once more for the first tokens alone
        parts["first"] = [(work.prompts, [1] * len(work.prompts))]
    return Workload(name, title, parts)


def _prefix(rng: random.Random, scale: Scale, vocab_size: int) -> Workload:
    """Make prompts behind one prefix, the first of them ahead; then as many that share nothing."""
    count, shared, rest, output = scale.prefix
    own = bench.fixed_workload(rng, 2 * count, shared + rest, output, vocab_size).prompts
    behind_one = [own[0][:shared] + prompt[shared:] for prompt in own[:count]]
    outputs = [output] * count
    parts = {
        label: [(prompts[:1], outputs[:1]), (prompts[1:], outputs[1:])]
        for label, prompts in (("shared", behind_one), ("own", own[count:]))
    }
    title = f"{count} prompts of {shared} shared + {rest} own tokens, {output} output"
    return Workload("prefix", f"shared prefix: {title}", parts)


def _stream(rng: random.Random, scale: Scale, vocab_size: int) -> Workload:
    """Make requests that arrive one by one, at random times."""
    count, prompt, output = scale.stream
    top = min(bench.MAX_TOKEN_ID, vocab_size - 1)
    lengths = [rng.randint(prompt // 4, prompt) for _ in range(count)]
    prompts = [[rng.randint(0, top) for _ in range(length)] for length in lengths]
    outputs = [rng.randint(output // 4, output) for _ in range(count)]
    arrivals = itertools.accumulate(rng.expovariate(scale.rate) for _ in range(count))
    size = f"up to {prompt} prompt and {output} output tokens"
    title = f"arrivals: {count} requests at {scale.rate:g}/s (Poisson), {size}"
    return Workload("stream", title, {"whole": [(prompts, outputs)]}, list(arrivals))


def describe(workload: Workload, scale: Scale, costs: CostModel) -> Task:
    """Describe a workload's main part, with what it must move and compute at the very least.

    Decoding reads every weight once a step, in as few steps as the longest output needs if all
    requests run at once, and the keys and values of each sequence once a token. Of a prefill only
    the operations count; a shared prefix is computed once.
    """
    prompts, outputs = (list(itertools.chain(*lists)) for lists in zip(*workload.main, strict=True))
    work = bench.Workload(prompts, outputs)
    lengths = [len(p) + n - 1 for p, n in zip(prompts, outputs, strict=True)]
    shared = scale.prefix[1] if workload.name == "prefix" else 0
    saved = shared * (len(prompts) - 1)  # tokens
    pairs = sum(n * (n + 1) / 2 for n in lengths) - saved * (shared + 1) / 2
    least = costs.least(
        steps=max(outputs) - 1, tokens=sum(lengths) - saved, rows=work.output_tokens,
        context=work.context_tokens, pairs=pairs,
    )  # fmt: skip
    return Task(
        name=workload.name, title=workload.title, requests=len(prompts),
        longest_output=max(outputs), prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens, rate=scale.rate if workload.arrivals else 0.0,
        bytes=least.bytes, operations=least.flops,
    )  # fmt: skip
