"""Time the kernels at the shapes of Qwen3-0.6B and Qwen3-8B, beside an H100's ceilings.

    python scripts/bench_kernels.py                        # on a GPU: under 100 s
    python scripts/bench_kernels.py --tiny                 # on a CPU: does it run?
    python scripts/bench_kernels.py --only decode --implementation xla

Each case is a chain of calls in one compiled function, so that launches do not dominate. Every call
reads other pages and another layer, so that the second-level cache does not answer.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax.tools.roofline import HARDWARE
from pallas_kernels import fused_linear, norm_rope_write, paged_decode, paged_prefill

BYTES_PER_SECOND, FLOPS_PER_SECOND = HARDWARE["H100"].memory, HARDWARE["H100"].flops

# KV heads and head dim, the same in Qwen3-0.6B and 8B.
KV_HEADS, HEAD_DIM = 8, 128
# Query heads by model.
MODELS = {"0.6B": 16, "8B": 32}
# Hidden size and width of the MLP by model.
SIZES = {"0.6B": (1024, 3072), "8B": (4096, 12288)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of the cases."""

    layers: int = 8
    pages: int = 1280
    page_size: int = 256
    calls: int = 16
    repeats: int = 9
    batches: tuple[int, ...] = (1, 16, 64, 256)
    contexts: tuple[int, ...] = (256, 1024)
    mixed_contexts: tuple[int, int] = (100, 2048)
    prompts: tuple[int, int] = (16, 1024)
    write_tokens: tuple[int, ...] = (1, 256, 16384)


TINY = Scale(
    layers=2, pages=8, page_size=16, calls=2, repeats=1, batches=(3,), contexts=(),
    mixed_contexts=(3, 40), prompts=(2, 24), write_tokens=(8,),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain of kernel calls: `run(k_cache, v_cache, *args) -> (k_cache, v_cache, output)`."""

    name: str
    run: Callable
    args: tuple
    calls: int
    work: float  # bytes moved or FLOPs per call
    ceiling: float  # what an H100 reaches, in the same unit per second


def block_tables(rng, contexts, scale: Scale):
    """Draw a table of pages from the whole pool for each call; a page may serve two sequences."""
    width = -(-max(contexts) // scale.page_size)
    shape = (len(contexts), width)
    return [
        jnp.asarray(np.resize(rng.permutation(scale.pages), shape), jnp.int32)
        for _ in range(scale.calls)
    ]


def normal(key: int, shape, dtype=jnp.bfloat16):
    """Draw random numbers on the device."""
    return jax.random.normal(jax.random.key(key), shape, dtype)


def decode_case(name, contexts, heads, scale, options) -> Case:
    """Make a case of decode attention: its work is the bytes of the keys and values it reads."""
    rng = np.random.default_rng(len(contexts))

    def run(k_cache, v_cache, q, tables, lens):
        for i, table in enumerate(tables):
            layer = jnp.int32(i % scale.layers)
            q = paged_decode(
                q, k_cache, v_cache, table, lens, layer, scale=HEAD_DIM**-0.5, **options
            )
        return k_cache, v_cache, q

    q = normal(0, (len(contexts), heads, HEAD_DIM))
    args = (q, block_tables(rng, contexts, scale), jnp.asarray(contexts, jnp.int32))
    bytes_moved = sum(contexts) * KV_HEADS * HEAD_DIM * 2 * 2 + 2 * q.nbytes
    return Case(f"decode {name}", run, args, scale.calls, bytes_moved, BYTES_PER_SECOND)


def prefill_case(name, lengths, contexts, heads, scale, options) -> Case:
    """Make a case of prefill attention: its work is the FLOPs of its products' causal half."""
    rng = np.random.default_rng(len(lengths))
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    calls = max(1, scale.calls // 4)

    def run(k_cache, v_cache, q, tables, starts, lens):
        for i, table in enumerate(tables):
            layer = jnp.int32(i % scale.layers)
            q = paged_prefill(
                q, k_cache, v_cache, table, starts, lens, layer, scale=HEAD_DIM**-0.5, **options
            )
        return k_cache, v_cache, q

    q = normal(0, (sum(lengths), heads, HEAD_DIM))
    tables = block_tables(rng, contexts, scale)[:calls]
    pairs = sum(n * c - n * (n - 1) // 2 for n, c in zip(lengths, contexts, strict=True))
    args = (q, tables, starts, jnp.asarray(contexts, jnp.int32))
    return Case(f"prefill {name}", run, args, calls, 4 * heads * HEAD_DIM * pairs, FLOPS_PER_SECOND)


def write_case(tokens, heads, scale, options) -> Case:
    """Make a case of norm, rotation and cache write: its work is the bytes read and written."""
    rng = np.random.default_rng(tokens)

    def run(k_cache, v_cache, qkv, norm, cos, slot_mapping):
        for i in range(scale.calls):
            q, k_cache, v_cache = norm_rope_write(
                qkv, norm, norm, cos, cos, slot_mapping, k_cache, v_cache,
                jnp.int32(i % scale.layers), eps=1e-6, **options,
            )  # fmt: skip
        return k_cache, v_cache, q

    qkv = normal(0, (tokens, KV_HEADS, heads // KV_HEADS + 2, HEAD_DIM))
    cos = normal(1, (tokens, HEAD_DIM // 2), jnp.float32)
    slot_mapping = rng.permutation(scale.pages * scale.page_size)[:tokens]
    args = (qkv, jnp.ones(HEAD_DIM, jnp.bfloat16), cos, jnp.asarray(slot_mapping, jnp.int32))
    bytes_moved = 2 * qkv.nbytes + 2 * cos.nbytes  # all of qkv is written: to q or to the caches
    return Case(f"write {tokens} tokens", run, args, scale.calls, bytes_moved, BYTES_PER_SECOND)


def linear_case(name, width, outputs, gated, scale) -> Case:
    """Make a case of a normed linear layer of one row: its work is the bytes of its weight."""
    layers = jnp.arange(scale.calls, dtype=jnp.int32) % scale.layers

    def run(k_cache, v_cache, x, weight, norm):
        outs = [fused_linear(x, weight, i, norm, eps=1e-6, gated=gated) for i in layers]
        return k_cache, v_cache, jnp.concatenate(outs)

    weight = normal(0, (scale.layers, outputs, width))
    args = (normal(1, (1, width)), weight, jnp.ones((scale.layers, width), jnp.bfloat16))
    bytes_moved = weight.nbytes / scale.layers
    return Case(f"linear {name}", run, args, scale.calls, bytes_moved, BYTES_PER_SECOND)


def cases(model: str, scale: Scale, options: dict):
    """Yield the cases of one model; each is made when its turn comes."""
    heads, rng = MODELS[model], np.random.default_rng(0)
    for batch in scale.batches:
        for n in scale.contexts:
            yield functools.partial(
                decode_case, f"B={batch} context {n}", [n] * batch, heads, scale, options
            )
        low, high = scale.mixed_contexts
        mixed = [int(n) for n in rng.integers(low, high + 1, batch)]
        yield functools.partial(
            decode_case, f"B={batch} context {low}-{high}", mixed, heads, scale, options
        )
    count, length = scale.prompts
    whole = [length] * count
    yield functools.partial(prefill_case, f"{count}x{length}", whole, whole, heads, scale, options)
    chunks = [int(n) for n in rng.integers(max(1, length // 10), length + 1, 2 * count)]
    contexts = [n + (i % 3) * scale.page_size for i, n in enumerate(chunks)]
    yield functools.partial(
        prefill_case, f"{len(chunks)} mixed, cached prefixes", chunks, contexts, heads, scale,
        options,
    )  # fmt: skip
    for tokens in scale.write_tokens:
        yield functools.partial(write_case, tokens, heads, scale, options)
    hidden, ffn = (size // (8 if scale is TINY else 1) for size in SIZES[model])
    q_width = heads * HEAD_DIM
    for name, width, outputs in (
        ("qkv", hidden, q_width + 2 * KV_HEADS * HEAD_DIM),
        ("o", q_width, hidden),
        ("gate and up", hidden, 2 * ffn),
        ("down", ffn, hidden),
    ):
        gated = name == "gate and up"
        yield functools.partial(linear_case, name, width, outputs, gated, scale)


def measure(case: Case, caches, repeats: int):
    """Return the median seconds per call, and the caches, which every run consumes and returns."""
    run = jax.jit(case.run, donate_argnums=(0, 1))
    seconds = []
    for _ in range(repeats + 2):  # the first compiles, the second warms up
        start = time.perf_counter()
        *caches, out = jax.block_until_ready(run(*caches, *case.args))
        seconds.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise FloatingPointError(f"{case.name}: the output is not finite")
    return statistics.median(seconds[2:]) / case.calls, caches


def main():
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--implementation", default="triton", choices=["triton", "mosaic", "xla"])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=90, help="seconds; then skip the rest")
    options = parser.parse_args()

    began = time.perf_counter()
    scale = TINY if options.tiny else Scale()
    shape = (scale.pages, scale.page_size, KV_HEADS, HEAD_DIM)
    stack = jax.jit(lambda x: jnp.repeat(x[None], scale.layers, axis=0))
    caches = [stack(normal(key, shape)) for key in (1, 2)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.implementation}")
    print(f"{'model':6}{'case':36}{'us':>9}{'reached':>14}{'of ceiling':>12}")
    for model in MODELS:
        for make in cases(model, scale, {"implementation": options.implementation}):
            label = f"{make.func.__name__.removesuffix('_case')} {make.args[0]}"
            if options.only not in label:
                continue
            if time.perf_counter() - began > options.budget:
                print(f"{model:6}{label:36}  skipped: the budget is spent")
                continue
            case = make()
            seconds, caches = measure(case, caches, scale.repeats)
            rate = case.work / seconds
            unit = "TB/s" if case.ceiling == BYTES_PER_SECOND else "TFLOP/s"
            print(
                f"{model:6}{case.name:36}{seconds * 1e6:9.1f}{rate / 1e12:8.2f} {unit:7}"
                f"{rate / case.ceiling:8.0%}",
                flush=True,
            )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
