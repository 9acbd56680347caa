"""Time the kernels at the shapes of Qwen3-0.6B, 8B and 30B-A3B, beside an H100's ceilings.

    python scripts/bench_kernels.py                        # on a GPU: under 100 s
    python scripts/bench_kernels.py --tiny                 # on a CPU: does it run?
    python scripts/bench_kernels.py --only decode --implementation xla
    python scripts/bench_kernels.py --only gated --settings    # gated_linear, tuned: under 90 s

Each case is a chain of calls in one compiled function, so that launches do not dominate. Every call
reads other pages and another layer, so that the second-level cache does not answer.
"""

import functools
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanovllm_jax.layers.linear import product
from nanovllm_jax.layers.sampler import filter_logits
from nanovllm_jax.tools.roofline import HARDWARE, TB
from pallas_kernels import (
    draw,
    expert_mlp,
    filter_thresholds,
    fused_linear,
    gated_linear,
    norm_rope_write,
    paged_decode,
    paged_prefill,
    supports_gated_linear,
)

# What an H100 reaches, by the unit of a case's work per second.
CEILINGS = {"TB/s": HARDWARE["H100"].memory / TB, "TFLOP/s": HARDWARE["H100"].flops / TB}

# KV heads and head dim, the same in Qwen3-0.6B and 8B.
KV_HEADS, HEAD_DIM = 8, 128
VOCAB = 151_936
# Query heads, hidden size and width of the MLP by model.
MODELS = {"0.6B": (16, 1024, 3072), "8B": (32, 4096, 12288)}
# XLA's own products are compiled as in the engine, by cuBLAS and untuned.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "0"}
# Settings of gated_linear that --settings tries besides its defaults.
SETTINGS = (
    {"lead": 0}, {"lead": 2}, {"stages": 3}, {"cluster": 1}, {"cluster": 1, "lead": 0},
    {"band": 4}, {"band": 16},
)  # fmt: skip
# Of Qwen3-30B-A3B: experts, those of a token, hidden size and hidden units of an expert.
EXPERTS, CHOICES, EXPERT_WIDTH, EXPERT_SIZE = 128, 8, 2048, 768


# The sizes of the cases, at full scale and for --tiny.
SIZES = {
    "layers": (8, 2), "pages": (1280, 8), "page_size": (256, 16), "calls": (16, 2),
    "repeats": (9, 1), "batches": ((1, 16, 64, 256), (3,)), "contexts": ((256, 1024), ()),
    "mixed_contexts": ((100, 2048), (3, 40)), "prompts": ((16, 1024), (2, 24)),
    "gated_rows": ((16384, 2048, 1024), (16,)),
    "write_tokens": ((1, 256, 16384), (8,)),
    "expert_tokens": ((1, 16, 64, 256, 2048, 16384), (5,)),
    "widths_over": (1, 8),  # divides hidden size and width of the MLP
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A chain of kernel calls: `run(k_cache, v_cache, *make()) -> (k_cache, v_cache, output)`."""

    name: str
    run: Callable
    make: Callable[[], tuple]
    calls: int
    work: float  # bytes moved or FLOPs per call
    unit: str  # of the work per second, in CEILINGS


def normal(key: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Draw random numbers on the device."""
    return jax.random.normal(jax.random.key(key), shape, dtype)


def attention_case(
    name: str, heads: int, scale: Namespace, contexts: Sequence[int], chunks: Sequence[int] = ()
) -> Case:
    """Make a case of attention: a prefill of `chunks`, one for each sequence, or a decode step.

    Decode's work is the bytes of the keys and values that it reads, prefill's the FLOPs of its
    products' causal half.
    """
    kernel = paged_prefill if chunks else paged_decode
    calls = max(1, scale.calls // 4) if chunks else scale.calls
    rows = sum(chunks) or len(contexts)

    def run(k_cache, v_cache, q, tables, *lengths):
        options = {"scale": HEAD_DIM**-0.5, "implementation": scale.implementation}
        for i, table in enumerate(tables):
            layer = jnp.int32(i % scale.layers)
            q = kernel(q, k_cache, v_cache, table, *lengths, layer, **options)
        return k_cache, v_cache, q

    def make():
        # A table of pages from the whole pool for each call; a page may serve two sequences.
        rng = np.random.default_rng(len(contexts))
        shape = (len(contexts), -(-max(contexts) // scale.page_size))
        tables = [jnp.int32(np.resize(rng.permutation(scale.pages), shape)) for _ in range(calls)]
        starts = [jnp.int32(np.cumsum([0, *chunks]))] if chunks else []
        return normal(0, rows, heads, HEAD_DIM), tables, *starts, jnp.int32(contexts)

    if chunks:
        pairs = sum(n * c - n * (n - 1) // 2 for n, c in zip(chunks, contexts, strict=True))
        return Case(f"prefill {name}", run, make, calls, 4 * heads * HEAD_DIM * pairs, "TFLOP/s")
    num_bytes = (2 * sum(contexts) * KV_HEADS + 2 * rows * heads) * HEAD_DIM * 2
    return Case(f"decode {name}", run, make, calls, num_bytes, "TB/s")


def write_case(heads: int, scale: Namespace, tokens: int) -> Case:
    """Make a case of norm, rotation and cache write: its work is the bytes read and written."""

    def run(k_cache, v_cache, qkv, norm, cos, slot_mapping):
        for i in range(scale.calls):
            q, k_cache, v_cache = norm_rope_write(
                qkv, norm, norm, cos, cos, slot_mapping, k_cache, v_cache,
                jnp.int32(i % scale.layers), eps=1e-6, implementation=scale.implementation,
            )  # fmt: skip
        return k_cache, v_cache, q

    def make():
        slots = np.random.default_rng(tokens).permutation(scale.pages * scale.page_size)[:tokens]
        qkv = normal(0, tokens, KV_HEADS, heads // KV_HEADS + 2, HEAD_DIM)
        cos = normal(1, tokens, HEAD_DIM // 2, dtype=jnp.float32)
        return qkv, jnp.ones(HEAD_DIM, jnp.bfloat16), cos, jnp.int32(slots)

    qkv, cos = (heads + 2 * KV_HEADS) * HEAD_DIM * 2, HEAD_DIM // 2 * 4  # bytes of a token
    # All of qkv is written, to q or to the caches; sines are read like cosines.
    return Case(f"write {tokens} tokens", run, make, scale.calls, 2 * tokens * (qkv + cos), "TB/s")


def linear_case(name: str, scale: Namespace, width: int, outputs: int) -> Case:
    """Make a case of a normed linear layer of one row: its work is the bytes of its weight."""

    def run(k_cache, v_cache, x, weight, norm):
        gated = name == "gate and up"
        layers = (jnp.int32(i % scale.layers) for i in range(scale.calls))
        outs = [fused_linear(x, weight, i, norm, eps=1e-6, gated=gated) for i in layers]
        return k_cache, v_cache, jnp.concatenate(outs)

    def make():
        weight = normal(0, scale.layers, outputs, width)
        return normal(1, 1, width), weight, jnp.ones((scale.layers, width), jnp.bfloat16)

    return Case(f"linear {name}", run, make, scale.calls, 2 * outputs * width, "TB/s")


def gated_case(name: str, scale: Namespace, shape: tuple[int, int, int], gated: Callable) -> Case:
    """Make a case of gate and up for many rows; `shape` is rows, width, outputs of either."""
    rows, width, outputs = shape
    calls = max(1, scale.calls // 4)

    def run(k_cache, v_cache, x, weight):
        outs = []
        for i in range(calls):
            out = lax.optimization_barrier(gated(x, weight, jnp.int32(i % scale.layers)))
            outs.append(out[:1])  # behind the barrier, so that every row is computed
        return k_cache, v_cache, jnp.concatenate(outs)

    def make():
        weight = normal(0, scale.layers, 2, outputs, width) * width**-0.5
        return normal(1, rows, width), weight

    flops = 4 * rows * width * outputs
    return Case(f"gated {rows} {name}", run, make, calls, flops, "TFLOP/s")


def gated_cases(scale: Namespace, width: int, outputs: int) -> Iterator[Case]:
    """Yield XLA's product and gate, and the kernel that is both, if this GPU runs it."""

    def plain(x, weight, layer):
        y = product(x, weight[layer], 1)
        return jax.nn.silu(y[:, 0]) * y[:, 1]

    for rows in scale.gated_rows:
        shape = rows, width, outputs
        yield gated_case("xla", scale, shape, plain)
        if supports_gated_linear(rows, outputs, width, jnp.bfloat16, jax.devices()[0]):
            for setting in ({}, *(SETTINGS if scale.settings else ())):
                name = "".join(f" {key}={value}" for key, value in setting.items())
                kernel = functools.partial(gated_linear, **setting)
                yield gated_case(f"mosaic{name}", scale, shape, kernel)


def draw_case(rows: int, scale: Namespace) -> Case:
    """Make a case of sampling: its work is the bytes of the logits."""
    width = VOCAB // scale.widths_over

    def run(k_cache, v_cache, logits, temperatures, seeds, positions):
        for _ in range(scale.calls):  # drawn tokens make the next noise
            _, positions = draw(logits, temperatures, seeds, positions, vocab_size=width)
        return k_cache, v_cache, positions

    def make():
        logits = normal(0, rows, width, dtype=jnp.float32)
        seeds = jax.random.bits(jax.random.key(1), (rows, 2))
        return logits, jnp.full(rows, 0.6), seeds, jnp.arange(rows)

    return Case(f"draw {rows} tokens", run, make, scale.calls, 4 * rows * width, "TB/s")


# What the cases of filters ask for: the spread of the logits, then top_k, top_p and min_p. Of
# peaked rows top_p keeps some 40 tokens, of flat ones most of the vocabulary.
FILTERS = {
    "k 20, p 0.95": (4.0, 20, 0.95, 0.0),
    "p 0.95, peaked": (4.0, 0, 0.95, 0.0),
    "p 0.95, flat": (0.5, 0, 0.95, 0.0),
    "min_p 0.05": (4.0, 0, 1.0, 0.05),
}


def filter_case(rows: int, name: str, scale: Namespace) -> Case:
    """Make a case of filters and sampling: its work is the bytes of the logits, read once."""
    width = VOCAB // scale.widths_over
    spread, *filters = FILTERS[name]

    def run(k_cache, v_cache, logits, temperatures, filters, seeds, positions):
        draw_here = functools.partial(draw, vocab_size=width)
        for _ in range(scale.calls):
            # Otherwise the filters, which the last draw changes nothing of, would run only once.
            logits, positions = lax.optimization_barrier((logits, positions))
            if scale.implementation == "xla":
                kept = filter_logits(logits, temperatures, *filters, vocab_size=width)
                _, positions = draw_here(kept, temperatures, seeds, positions)
            else:
                lowest = filter_thresholds(logits, temperatures, *filters, vocab_size=width)
                _, positions = draw_here(logits, temperatures, seeds, positions, thresholds=lowest)
        return k_cache, v_cache, positions

    def make():
        logits = normal(0, rows, width, dtype=jnp.float32) * spread
        seeds = jax.random.bits(jax.random.key(1), (rows, 2))
        options = tuple(jnp.full(rows, value) for value in filters)
        return logits, jnp.full(rows, 0.6), options, seeds, jnp.arange(rows)

    return Case(f"filter {rows} {name}", run, make, scale.calls, 4 * rows * width, "TB/s")


def expert_case(tokens: int, scale: Namespace) -> Case:
    """Make a case of experts, evenly chosen: its work is the bytes of those chosen, or the FLOPs.

    Few tokens are bound by the bytes of weights, many by the products.
    """
    calls, layers = scale.calls // 4 if tokens > 1000 else scale.calls, max(1, scale.layers // 2)
    width, size = EXPERT_WIDTH // scale.widths_over, EXPERT_SIZE // scale.widths_over

    def run(k_cache, v_cache, x, gate_up, down, choices, weights):
        outs = []
        for i in range(max(1, calls)):  # with other experts and another layer each time
            layer, chosen = jnp.int32(i % layers), (choices + 16 * i) % EXPERTS
            out = expert_mlp(
                x, gate_up, down, chosen, weights, layer, implementation=scale.implementation
            )
            outs.append(lax.optimization_barrier(out)[:1])
        return k_cache, v_cache, jnp.concatenate(outs)

    def make():
        gate_up = normal(0, layers, EXPERTS, 2, size, width) * width**-0.5
        down = normal(1, layers, EXPERTS, width, size) * 2 * size**-0.5
        return normal(2, tokens, width), gate_up, down, choices, jnp.full((tokens, CHOICES), 0.5)

    rng = np.random.default_rng(tokens)
    choices = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)]).astype(np.int32)
    bound_by_bytes = tokens * CHOICES / EXPERTS < 250
    work = 2 * 3 * width * size * (len(np.unique(choices)) if bound_by_bytes else choices.size)
    unit = "TB/s" if bound_by_bytes else "TFLOP/s"
    return Case(f"experts {tokens} tokens", run, make, max(1, calls), work, unit)


def cases(model: str, scale: Namespace) -> Iterator[Case]:
    """Yield the cases of one model; their arrays are made when their turn comes."""
    rng = np.random.default_rng(0)
    heads, hidden, ffn = MODELS[model]
    hidden, ffn = hidden // scale.widths_over, ffn // scale.widths_over
    for batch in scale.batches:
        for n in scale.contexts:
            yield attention_case(f"B={batch} context {n}", heads, scale, [n] * batch)
        low, high = scale.mixed_contexts
        mixed = sorted(rng.integers(low, high + 1, batch).tolist(), reverse=True)
        yield attention_case(f"B={batch} context {low}-{high}", heads, scale, mixed)
    count, length = scale.prompts
    yield attention_case(f"{count}x{length}", heads, scale, [length] * count, [length] * count)
    chunks = rng.integers(max(1, length // 10), length + 1, 2 * count).tolist()
    contexts = [n + (i % 3) * scale.page_size for i, n in enumerate(chunks)]
    yield attention_case(f"{2 * count} mixed, cached prefixes", heads, scale, contexts, chunks)
    for tokens in scale.write_tokens:
        yield write_case(heads, scale, tokens)
    for rows in scale.batches:
        yield draw_case(rows, scale)
    yield linear_case("qkv", scale, hidden, (heads + 2 * KV_HEADS) * HEAD_DIM)
    yield linear_case("o", scale, heads * HEAD_DIM, hidden)
    yield linear_case("gate and up", scale, hidden, 2 * ffn)
    yield linear_case("down", scale, ffn, hidden)
    yield from gated_cases(scale, hidden, ffn)


def measure(case: Case, caches: Sequence[jax.Array], repeats: int):
    """Return the median seconds per call, and the caches, which every run consumes and returns."""
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None
    run = jax.jit(case.run, donate_argnums=(0, 1), compiler_options=options)
    args, seconds = case.make(), []
    for _ in range(repeats + 2):  # the first compiles, the second warms up
        start = time.perf_counter()
        *caches, out = jax.block_until_ready(run(*caches, *args))
        seconds.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise FloatingPointError(f"{case.name}: the output is not finite")
    return statistics.median(seconds[2:]) / case.calls, caches


def main():
    """Run the cases and print the table."""
    parser = ArgumentParser(description="Time the kernels.", allow_abbrev=False)
    add = parser.add_argument
    add("--tiny", action="store_true", help="small shapes, for a CPU")
    add("--implementation", default="triton", choices=["triton", "mosaic", "xla"])
    add("--settings", action="store_true", help="time gated_linear with other settings, too")
    add("--only", default="", help="cases whose name contains this")
    add("--budget", type=float, default=90, help="seconds; then skip the rest")
    options = parser.parse_args()
    if not options.tiny and jax.default_backend() != "gpu":
        problem = "full sizes need a GPU (on a CPU they would take 24 GB); --tiny is for a CPU"
        parser.exit(2, f"{parser.prog}: {problem}\n")

    began = time.perf_counter()
    sizes = {name: tiny if options.tiny else full for name, (full, tiny) in SIZES.items()}
    scale = Namespace(**sizes, implementation=options.implementation, settings=options.settings)
    stack = jax.jit(lambda x: jnp.repeat(x[None], scale.layers, axis=0))
    caches = [stack(normal(k, scale.pages, scale.page_size, KV_HEADS, HEAD_DIM)) for k in (1, 2)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.implementation}")
    print(f"{'model':6}{'case':36}{'us':>9}{'reached':>14}{'of ceiling':>12}")
    all_cases = [(m, case) for m in MODELS for case in cases(m, scale)]
    all_cases += [("", filter_case(n, kind, scale)) for n in scale.batches for kind in FILTERS]
    all_cases += [("A3B", expert_case(tokens, scale)) for tokens in scale.expert_tokens]
    for model, case in all_cases:
        if options.only not in case.name:
            continue
        if time.perf_counter() - began > options.budget:
            print(f"{model:6}{case.name:36}  skipped: the budget is spent")
            continue
        seconds, caches = measure(case, caches, scale.repeats)
        rate = case.work / seconds / 1e12
        print(f"{model:6}{case.name:36}{seconds * 1e6:9.1f}{rate:8.2f} {case.unit:7}"
              f"{rate / CEILINGS[case.unit]:8.0%}", flush=True)  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
