"""Check and time the kernel that computes all layers of a decode step, on a Hopper GPU.

    PYTHONPATH=. python3 scripts/bench_decode_layers.py                       # 0.6B: about a minute
    PYTHONPATH=. python3 scripts/bench_decode_layers.py --shapes all --budget 240
    PYTHONPATH=. python3 scripts/bench_decode_layers.py --batch 1 --plans in_flight=3 splits=8

The check compares kernel and plain layers, the engine's other path, with float32 on random data:
hidden states, the new keys and values, and that nothing else of the cache has changed. What no
row may read is NaN: positions not yet written, pages of nobody, padding rows. The kernel is WRONG
if its error is above 3 times that of the plain layers.

Then both are timed in turns, in loops of 8 steps; the engine's calls are loops, too. Each shape has
a process of its own, which is killed when the time is up, since a kernel that fails takes the GPU's
context along.
"""

import functools
import itertools
import math
import multiprocessing
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from nanovllm_jax.layers.attention import PagedBatch
from nanovllm_jax.layers.backend import GpuBackend, XlaBackend
from nanovllm_jax.layers.kv_cache import KVCache
from nanovllm_jax.layers.rope import rope_angles
from nanovllm_jax.models import Decoder, ModelConfig
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tools.roofline import find_hardware
from nanovllm_jax.tools.shapes import SHAPES
from nanovllm_jax.weights import abstract_weights
from pallas_kernels import LayerWeights, decode_layers
from pallas_kernels.decode_layers import Plan, Sizes

MODELS = {
    "0.6B": SHAPES["0.6B"],
    "Llama-3.2-1B": SHAPES["Llama-3.2-1B"],
    "Qwen2.5-0.5B": replace(
        SHAPES["Qwen2.5-7B"], hidden_size=896, intermediate_size=4864, num_layers=24,
        num_heads=14, num_kv_heads=2, head_dim=64,
    ),
    "tiny": replace(
        SHAPES["0.6B"], hidden_size=64, intermediate_size=96, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=64,
    ),
}  # fmt: skip
CHECKED_LAYERS = 4
CHECKED_CONTEXTS = (1, 2, 38, 256, 257, 400, 1500)
PAGE = 256
STEPS = 8  # of a timed call
MOST_ROWS = 16  # of a checked step, padding included
# As the engine compiles its programs.
GPU_OPTIONS: dict[str, bool | str] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": "0",
    "xla_disable_hlo_passes": "rematerialization",
}


class Inputs(NamedTuple):
    """What a step takes beside weights and caches, for B rows."""

    x: Any  # [B, D]
    positions: Any  # [B], of the new tokens; -1: a padding row
    tables: Any  # [B, W]


class Model:
    """A decoder, and the ways to compute its layers; its weights are shapes until `draw`."""

    def __init__(self, config: ModelConfig, *, tiny: bool):
        self.config, self.tiny = replace(config, vocab_size=8, vocab_padding=0), tiny
        self.sharding = make_sharding({})
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0))))
        self.weights: Any = abstract_weights(self.config, self.sharding)

    def draw(self, seed: int) -> None:
        """Make random weights on the device."""
        self.weights = jax.jit(functools.partial(random_weights, self.weights))(seed)

    def batch_of(self, inputs: Inputs) -> tuple[tuple, PagedBatch]:
        """The angles of the rows, and where they are in the cache."""
        pages = jnp.take_along_axis(inputs.tables, inputs.positions[:, None] // PAGE, axis=1)[:, 0]
        slots = jnp.where(inputs.positions >= 0, pages * PAGE + inputs.positions % PAGE, -1)
        angles = rope_angles(inputs.positions, self.config.rope, self.config.head_dim)
        return angles, PagedBatch(slots, inputs.tables, inputs.positions + 1)

    def plain(self, weights, inputs: Inputs, cache: KVCache) -> tuple[Any, KVCache]:
        """A step of the engine's layers, one by one."""
        angles, batch = self.batch_of(inputs)
        if self.tiny:
            backend = XlaBackend(self.sharding, batch, "xla")
        else:
            backend = GpuBackend(self.sharding, batch, "triton")
        return nnx.merge(self.graph, weights).run_layers(inputs.x, angles, backend, cache)

    def at_once(
        self, weights, inputs: Inputs, cache: KVCache, plan: Plan | None
    ) -> tuple[Any, KVCache]:
        """A step by the kernel, or without a plan by its reference."""
        angles, batch = self.batch_of(inputs)
        c = self.config
        hidden, k, v = decode_layers(
            inputs.x, self.layers_of(weights), *angles, batch.slot_mapping, *cache,
            batch.block_tables, batch.context_lens, eps=c.rms_norm_eps, scale=c.head_dim**-0.5,
            layers_without_rope=c.layers_without_rope,
            implementation="xla" if plan is None else "cuda", plan=plan,
        )  # fmt: skip
        return hidden, KVCache(k, v)

    def layers_of(self, weights) -> LayerWeights:
        """The weights as the kernel takes them."""
        return nnx.merge(self.graph, weights).layer_weights()

    def abstract_cache(self, rows: int, table: int) -> KVCache:
        """The cache of these rows as a shape, with a page more, which is nobody's."""
        c = self.config
        shape = (c.num_layers, rows * table + 1, PAGE, c.num_kv_heads, c.head_dim)
        array: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return KVCache(array, array)

    def plan(self, cache: KVCache, rows: int) -> Plan | None:
        """How the kernel computes a step of this many rows."""
        if self.tiny:
            return None
        weights = jax.eval_shape(self.layers_of, self.weights)
        plan = Plan.of(Sizes.of(weights, cache.k, rows, 0))
        if plan is None:
            raise ValueError(f"the kernel takes no {rows} rows of this model")
        return plan


def random_weights(abstract, seed):
    """Weights with which hidden states stay near 1, norms near 1, and biases that count."""
    leaves, tree = jax.tree.flatten_with_path(abstract)
    made = []
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), leaf.shape, leaf.dtype)
        if "norm" in name:
            x = 1 + x * jnp.bfloat16(0.2)
        elif "bias" in name:
            x *= jnp.bfloat16(0.5)
        else:
            inputs = math.prod(leaf.shape[-2:]) if "o_proj" in name else leaf.shape[-1]
            x *= jnp.bfloat16(inputs**-0.5)
        made.append(x)
    return jax.tree.unflatten(tree, made)


# --- The check -------------------------------------------------------------------------------


def check_cases(batch: int) -> Iterator[list[int]]:
    """Yield the contexts of a step's rows: every one of them, and mixed ones; 0 is padding."""
    for i in range(0, len(CHECKED_CONTEXTS), batch):
        rows = list(CHECKED_CONTEXTS[i : i + batch])
        yield rows + [0] * (batch - len(rows))
    if batch > 1:
        rows = np.random.default_rng(batch).integers(1, max(CHECKED_CONTEXTS), batch).tolist()
        rows[batch // 2] = 0
        yield rows


def check_inputs(model: Model, contexts: list[int], seed: int) -> tuple[Inputs, np.ndarray]:
    """A step with random pages, and which positions of the cache have been written, [P, S]."""
    rng, width = np.random.default_rng(seed), -(-max(CHECKED_CONTEXTS) // PAGE)
    pages = MOST_ROWS * width + 1
    numbers = rng.permutation(pages)
    tables = np.full((len(contexts), width), numbers[-1], np.int32)  # that page is nobody's
    written = np.zeros((pages, PAGE), bool)
    for row, context in enumerate(contexts):
        used = -(-context // PAGE)
        tables[row, :used] = numbers[row * width : row * width + used]
        for position in range(context - 1):
            written[tables[row, position // PAGE], position % PAGE] = True
    x = rng.standard_normal((len(contexts), model.config.hidden_size)).astype(np.float32)
    x[np.array(contexts) == 0] = np.nan
    return Inputs(
        jnp.asarray(x, jnp.bfloat16), jnp.int32(contexts) - 1, jnp.asarray(tables)
    ), written


def poisoned(cache: KVCache, written) -> KVCache:
    """The cache with NaN where nothing has been written."""
    at = written[None, :, :, None, None]
    return KVCache(*(jnp.where(at, x, jnp.bfloat16(jnp.nan)) for x in cache))


def checked(step: Callable, model: Model) -> Callable:
    """A step that also returns its new keys and values, and how many others have changed."""

    def run(weights, inputs: Inputs, base: KVCache, written):
        before = poisoned(base, written)
        hidden, after = step(weights, inputs, before)
        slots = model.batch_of(inputs)[1].slot_mapping
        pages, offsets = jnp.where(slots < 0, written.shape[0], slots // PAGE), slots % PAGE
        new = [cache[:, pages, offsets].astype(jnp.float32) for cache in after]
        kept = jnp.ones(written.shape, bool).at[pages, offsets].set(False, mode="drop")
        bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint16)
        differs = [bits(a) != bits(b) for a, b in zip(after, before, strict=True)]
        changed = sum((d & kept[None, :, :, None, None]).sum() for d in differs)
        return hidden.astype(jnp.float32), *new, changed

    return run


def reference(model: Model) -> Callable:
    """The same in float32, with float32 copies of weights and cache."""

    def run(weights, inputs: Inputs, base: KVCache, written):
        exact = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        before = exact(poisoned(base, written))
        x = inputs.x.astype(jnp.float32)
        hidden, after = model.at_once(exact(weights), inputs._replace(x=x), before, None)
        slots = model.batch_of(inputs)[1].slot_mapping
        return hidden, *(cache[:, slots // PAGE, slots % PAGE] for cache in after)

    return run


def relative_errors(got, want, rows: np.ndarray) -> list[float]:
    """Of hidden states, keys and values, in the rows that are no padding."""
    errors = []
    for axis, a, b in zip((0, 1, 1), got, want, strict=True):
        a, b = (np.take(np.asarray(x, np.float64), rows, axis) for x in (a, b))
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return errors


def check(model: Model, batch: int, base: KVCache, programs: dict[str, Callable]) -> bool:
    """Print a line for each case; returns whether all were right."""
    right = True
    for seed, contexts in enumerate(check_cases(batch)):
        inputs, written = check_inputs(model, contexts, 100 * batch + seed)
        padding = MOST_ROWS - batch  # one program of the reference does for all batches
        padded = Inputs(
            jnp.pad(inputs.x, ((0, padding), (0, 0))),
            jnp.pad(inputs.positions, (0, padding), constant_values=-1),
            jnp.pad(inputs.tables, ((0, padding), (0, 0))),
        )
        want = jax.device_get(programs["reference"](model.weights, padded, base, written))
        arguments = model.weights, inputs, base, written
        plain = jax.device_get(programs["plain"](*arguments))
        kernel = jax.device_get(programs["kernel"](*arguments))
        again = jax.device_get(programs["kernel"](*arguments))
        rows = np.flatnonzero(contexts)
        errors = [relative_errors(out[:3], want, rows) for out in (kernel, plain)]
        problems = [
            f"{name} {a:.1e}"
            for name, a, b in zip(("hidden", "keys", "values"), *errors, strict=True)
            if not a <= 3 * b
        ]
        if kernel[3] > 0:
            problems.append(f"{kernel[3]} other numbers of the cache changed")
        if not np.array_equal(kernel[0][rows], again[0][rows]):
            problems.append("another result when run again")
        right &= not problems
        words = " ".join(f"{a:.2e}/{b:.2e}" for a, b in zip(*errors, strict=True))
        print(f"  {words}  {'WRONG: ' + ', '.join(problems) if problems else 'ok':8} "
              f"contexts {contexts}", flush=True)  # fmt: skip
    return right


# --- The timing ------------------------------------------------------------------------------


def timed(step: Callable) -> Callable:
    """STEPS steps in a loop, each of which takes the hidden states of the one before it."""

    def run(weights, inputs: Inputs, cache: KVCache):
        def one(i, carry):
            x, cache = carry
            at = Inputs(x, inputs.positions + i, inputs.tables)
            return step(weights, at, cache)

        return lax.fori_loop(0, STEPS, one, (inputs.x, cache))

    return run


def bytes_of(model: Model, contexts: int) -> int:
    """What a step reads of weights and of old keys and values, `contexts` of all rows together."""
    weights = jax.eval_shape(model.layers_of, model.weights)
    size = sum(math.prod(w.shape) * w.dtype.itemsize for w in jax.tree.leaves(weights))
    c = model.config
    return size + contexts * c.num_layers * c.num_kv_heads * c.head_dim * 2 * 2


def measure(
    model: Model, batch: int, context: int, cache: KVCache, programs: dict[str, Callable],
    rounds: int, calls: int,
) -> KVCache:  # fmt: skip
    """Time programs in turns and print a line for each; returns the cache, which they consume."""
    rng, width = np.random.default_rng(batch), (cache.k.shape[1] - 1) // batch
    tables = rng.permutation(cache.k.shape[1] - 1)[: batch * width].reshape(batch, width)
    x = jnp.asarray(rng.standard_normal((batch, model.config.hidden_size)), jnp.bfloat16)
    inputs = Inputs(x, jnp.full(batch, context - 1, jnp.int32), jnp.asarray(tables, jnp.int32))
    seconds = {name: [] for name in programs}
    for turn, (name, program) in itertools.product(range(-1, rounds), programs.items()):
        jax.block_until_ready(cache)
        start = time.perf_counter()
        for _ in range(calls):
            x, cache = program(model.weights, inputs, cache)
        jax.block_until_ready(x)
        if turn >= 0:  # the first warms up
            seconds[name].append((time.perf_counter() - start) / (calls * STEPS))
    work = bytes_of(model, batch * (context - 1))
    hardware = find_hardware(jax.devices()[0].device_kind)
    for name, times in seconds.items():
        median = statistics.median(times)
        share = "" if hardware is None else f"{work / median / hardware.memory:8.0%}"
        print(f"  {batch:5}{context:9}  {name:34}{median * 1e3:9.4f}{min(times) * 1e3:9.4f}"
              f"{work / median / 1e9:9.0f}{share}", flush=True)  # fmt: skip
    return cache


# --- All of it -------------------------------------------------------------------------------


def variants(plan: Plan | None, texts: list[str]) -> dict[str, Plan | None]:
    """The plan, and others with changes such as "in_flight=3,splits=8"."""
    plans: dict[str, Plan | None] = {"kernel": plan}
    for text in texts:
        assert plan is not None, "a CPU's reference has no plan"
        changes = {key: int(value) for key, value in (x.split("=") for x in text.split(","))}
        plans[f"kernel {text}"] = plan._replace(**changes)
    return plans


def random_cache(like: KVCache) -> KVCache:
    """Keys of 3 times the usual size, so that few positions matter much; values near 1."""
    k, v = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(like))
    return KVCache(k * 3, v)


def run_shape(name: str, options: Namespace) -> None:
    """Compile, check and time one shape."""
    began, tiny = time.perf_counter(), name == "tiny"
    config = MODELS[name]
    few = replace(config, num_layers=min(CHECKED_LAYERS, config.num_layers))
    checked_model, model = (Model(c, tiny=tiny) for c in (few, config))
    check_width = -(-max(CHECKED_CONTEXTS) // PAGE)
    check_cache = checked_model.abstract_cache(MOST_ROWS, check_width)
    timed_width = -(-(max(options.contexts) + STEPS) // PAGE)
    timed_caches = {n: model.abstract_cache(n, timed_width) for n in options.batch}

    lowered = {}

    def lower(key, function, *shapes, donate=()):
        lowered[key] = jax.jit(function, donate_argnums=donate).lower(*shapes)

    def inputs_of(rows, width):
        integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        x = jax.ShapeDtypeStruct((rows, config.hidden_size), jnp.bfloat16)
        return Inputs(x, integers((rows,)), integers((rows, width)))

    if not options.no_check:
        written = jax.ShapeDtypeStruct((check_cache.k.shape[1], PAGE), bool)
        ways = {(MOST_ROWS, "reference"): reference(checked_model)}
        for n in options.batch:
            plan = checked_model.plan(check_cache, n)
            kernel = functools.partial(checked_model.at_once, plan=plan)
            ways[n, "plain"] = checked(checked_model.plain, checked_model)
            ways[n, "kernel"] = checked(kernel, checked_model)
        for (n, way), function in ways.items():
            shapes = checked_model.weights, inputs_of(n, check_width), check_cache, written
            lower(("check", n, way), function, *shapes)
    for n, cache in timed_caches.items():
        steps = {"plain layers": model.plain} if not options.only_kernel else {}
        for text, plan in variants(model.plan(cache, n), options.plans).items():
            steps[text] = functools.partial(model.at_once, plan=plan)
        for text, step in steps.items():
            shapes = model.weights, inputs_of(n, timed_width), cache
            lower(("time", n, text), timed(step), *shapes, donate=2)
    traced = time.perf_counter() - began
    with ThreadPoolExecutor(16) as pool:
        compiler_options = {} if tiny else GPU_OPTIONS
        done = pool.map(lambda x: x.compile(compiler_options), lowered.values())
        programs = dict(zip(lowered, done, strict=True))
    total = time.perf_counter() - began
    print(f"{name}: lowered in {traced:.0f} s, compiled in {total - traced:.0f} s", flush=True)

    for seed, m in enumerate((checked_model, model)):
        m.draw(seed)
    for n in options.batch:
        plan = model.plan(timed_caches[n], n)
        print(f" batch {n}: {plan}", flush=True)
        if not options.no_check:
            print("  errors of hidden states, keys, values: kernel/plain layers")
            base = jax.jit(functools.partial(random_cache, check_cache))()
            chosen = {way: programs["check", n, way] for way in ("plain", "kernel")}
            chosen["reference"] = programs["check", MOST_ROWS, "reference"]
            check(checked_model, n, base, chosen)
            del base
        cache = jax.jit(functools.partial(random_cache, timed_caches[n]))()
        chosen = {way: p for (kind, m, way), p in programs.items() if (kind, m) == ("time", n)}
        print(f"  {'batch':>5}{'context':>9}  {'':34}{'ms':>9}{'least':>9}{'GB/s':>9}  of limit")
        for context in options.contexts:
            cache = measure(
                model, n, context, cache, chosen, options.rounds, 1 if tiny else options.calls
            )
        del cache
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def main():
    """Run each shape in a process of its own."""
    parser = ArgumentParser(description="Check and time decode_layers.", allow_abbrev=False)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["0.6B"], choices=[*MODELS, "all"],
        help="'tiny' runs on a CPU, with the reference in place of the kernel")  # fmt: skip
    add("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--contexts", type=int, nargs="+", default=[400], help="at which steps are timed")
    add("--plans", nargs="+", default=[], help="time the kernel with such changes, too: splits=8")
    add("--rounds", type=int, default=7)
    add("--calls", type=int, default=12, help="of 8 steps each, a round")
    add("--no-check", action="store_true")
    add("--only-kernel", action="store_true", help="do not time the plain layers")
    add("--budget", type=float, default=240, help="seconds, after which what runs is killed")
    options = parser.parse_args()
    shapes = [s for s in MODELS if s != "tiny"] if "all" in options.shapes else options.shapes
    began = time.perf_counter()
    for name in shapes:
        process = multiprocessing.get_context("spawn").Process(
            target=run_shape, args=(name, options)
        )
        process.start()
        process.join(max(0.0, options.budget - (time.perf_counter() - began)))
        if process.is_alive():
            process.kill()
            print(f"{name}: killed, since {options.budget:.0f} s are over", flush=True)
        elif process.exitcode:
            print(f"{name}: FAILED (status {process.exitcode})", flush=True)
        process.join()


if __name__ == "__main__":
    main()
