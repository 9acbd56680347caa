"""The work that every engine gets: token ids, output lengths and arrival times, from fixed seeds.

A workload has parts, timed one by one, each starting with an empty prefix cache. A part is a list
of waves: a wave is submitted when the one before it is complete.
"""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import bench

BATCHES = (1, 16, 64)
NAMES = (*(f"batch{n}" for n in BATCHES), "prefill", "prefix", "stream", "bench")

Wave = tuple[list[list[int]], list[int]]  # prompts, output lengths


@dataclass(frozen=True)
class Scale:
    """How long the workloads are; every length in tokens."""

    prompt: int  # of the batches
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
        prompt=128,
        output=256,
        prefill=(64, 1024),
        prefix=(32, 2048, 64, 32),
        stream=(80, 512, 192),
        rate=20,
        bench=(256, 1024),
        max_model_len=4096,
        max_num_seqs=256,
        max_num_batched_tokens=16384,
    ),
    "cpu": Scale(
        prompt=32,
        output=48,
        prefill=(32, 128),
        prefix=(16, 256, 16, 8),
        stream=(16, 64, 48),
        rate=8,
        bench=(32, 128),
        max_model_len=512,
        max_num_seqs=64,
        max_num_batched_tokens=512,
    ),
}


@dataclass(frozen=True)
class Workload:
    """Parts of one workload by label; with `arrivals`, the one part's requests come over time."""

    name: str
    title: str
    parts: dict[str, list[Wave]]
    arrivals: list[float] = field(default_factory=list)  # seconds from the start, ascending
    rate: float = 0.0

    @property
    def main(self) -> list[Wave]:
        """The part that the title describes."""
        return next(iter(self.parts.values()))

    @property
    def work(self) -> bench.Workload:
        """The main part's requests, all waves together."""
        prompts, outputs = zip(*self.main, strict=True)
        return bench.Workload(list(itertools.chain(*prompts)), list(itertools.chain(*outputs)))


def make(name: str, scale: Scale, seed: int, vocab_size: int) -> Workload:
    """The workload of that name; another seed gives other token ids of the same lengths or law."""
    rng = random.Random(f"{name} {seed}")
    if name.startswith("batch"):
        batch = int(name.removeprefix("batch"))
        work = bench.fixed_workload(rng, batch, scale.prompt, scale.output, vocab_size)
        title = f"batch {batch}: {scale.prompt} prompt + {scale.output} output tokens each"
        first = (work.prompts, [1] * batch)
        return Workload(name, title, {"whole": [_wave(work)], "first": [first]})
    if name == "prefill":
        prompts, length = scale.prefill
        work = bench.fixed_workload(rng, prompts, length, 1, vocab_size)
        return Workload(name, f"prefill: {prompts} x {length} tokens", {"whole": [_wave(work)]})
    if name == "prefix":
        return _prefix(rng, scale, vocab_size)
    if name == "stream":
        return _stream(rng, scale, vocab_size)
    if name == "bench":
        requests, longest = scale.bench
        # Seed 0 of full size is nano-vLLM's bench.py, token for token.
        work = bench.random_workload(seed, requests, longest, vocab_size)
        full = (requests, longest) == bench.STANDARD[:2]
        title = (
            f"nano-vLLM's bench.py{'' if full else ', scaled down'}: {requests} requests, "
            f"{work.prompt_tokens:,} prompt and {work.output_tokens:,} output tokens"
        )
        return Workload(name, title, {"whole": [_wave(work)]})
    raise ValueError(f"there is no workload {name!r}; there are {', '.join(NAMES)}")


def _prefix(rng: random.Random, scale: Scale, vocab_size: int) -> Workload:
    """Prompts behind one prefix, the first of them ahead; then as many with their own prefixes."""
    count, shared, rest, output = scale.prefix
    own = bench.fixed_workload(rng, 2 * count, shared + rest, output, vocab_size)
    prefix = own.prompts[0][:shared]
    parts = {}
    for label, prompts in (
        ("shared", [prefix + prompt[shared:] for prompt in own.prompts[:count]]),
        ("own", own.prompts[count:]),
    ):
        outputs = [output] * count
        parts[label] = [(prompts[:1], outputs[:1]), (prompts[1:], outputs[1:])]
    title = (
        f"shared prefix: {count} prompts of {shared} shared + {rest} own tokens, {output} output"
    )
    return Workload("prefix", title, parts)


def _stream(rng: random.Random, scale: Scale, vocab_size: int) -> Workload:
    """Poisson arrivals; lengths uniform from a quarter of the longest."""
    count, prompt, output = scale.stream
    top = min(bench.MAX_TOKEN_ID, vocab_size - 1)
    lengths = [rng.randint(prompt // 4, prompt) for _ in range(count)]
    prompts = [[rng.randint(0, top) for _ in range(length)] for length in lengths]
    outputs = [rng.randint(output // 4, output) for _ in range(count)]
    gaps = [rng.expovariate(scale.rate) for _ in range(count)]
    title = (
        f"arrivals: {count} requests at {scale.rate:g}/s (Poisson), up to {prompt} prompt and "
        f"{output} output tokens"
    )
    arrivals = list(itertools.accumulate(gaps))
    return Workload("stream", title, {"whole": [(prompts, outputs)]}, arrivals, scale.rate)


def _wave(work: bench.Workload) -> Wave:
    return work.prompts, work.outputs


@dataclass(frozen=True)
class Need:
    """What the main part of a workload must move and compute at the very least."""

    bytes: float
    operations: float

    @classmethod
    def of(cls, work: bench.Workload, model: Any, shared: int = 0) -> "Need":
        """`model` is a ModelConfig; `shared` tokens are computed once for all prompts.

        Decoding reads every weight once a step, of which there are as many as the longest output
        needs if all run at once, and each sequence's keys and values once a token. Operations are
        two for each weight of the layers and token, two for each weight of the head and output
        token, and four for each query and key of a head's dimension.
        """
        traffic = bench.Traffic.of(model, "auto")
        steps = max(work.outputs) - 1
        size = 4 if model.dtype == "float32" else 2
        head = model.vocab_size * model.hidden_size
        layers = traffic.weights_per_step / size - head
        lengths = list(zip(map(len, work.prompts), work.outputs, strict=True))
        saved = shared * (len(lengths) - 1)
        tokens = sum(p + n - 1 for p, n in lengths) - saved
        pairs = sum((p + n - 1) * (p + n) / 2 for p, n in lengths)
        pairs -= (len(lengths) - 1) * shared * (shared + 1) / 2
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * pairs
        products = 2 * (layers * tokens + head * work.output_tokens)
        return cls(traffic.total(steps, work.context_tokens), products + attention)
