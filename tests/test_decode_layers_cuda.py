"""The CUDA kernel of all layers of a decode step: run on the CPU, and compared with NumPy."""

from pathlib import Path
from typing import NamedTuple

import cuda_machine
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels

pytestmark = pytest.mark.skipif(bool(cuda_machine.problem()), reason=str(cuda_machine.problem()))

SOURCE = (Path(pallas_kernels.__file__).parent / "decode_layers.cu").read_text()
# A second kernel, which tells the sizes of what the first one is given.
SOURCE += """
extern "C" __global__ void sizes(int* result) {
  if (threadIdx.x == 0) {
    result[0] = sizeof(Shared);
    result[1] = LAYERS * MAIL_WORDS;
  }
}
"""
PAGE = 16  # positions
EPS, THETA = 1e-6, 1e4

# A relative error that is more than rounding. Before a result is written, some ten values that it
# depends on in a row have been rounded to bfloat16, each by 2^-9 at most and half of that as a rule,
# which makes 0.4% together. Any row, head or position that is left out makes more than 1%.
TOO_MUCH = 0.01


class Model(NamedTuple):
    """The sizes of a model, and how the kernel divides its work; names as in decode_layers.cu."""

    batch: int
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 192
    table: int = 6
    qk_norm: bool = True
    qkv_bias: bool = False
    no_rope_bits: int = 0
    blocks: int = 8
    splits: int = 1
    stages: int = 3
    in_flight: int = 2

    @property
    def pages(self):
        return self.batch * self.table + 1  # the last one is nobody's

    @property
    def qkv_shape(self):
        return self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim


def build(model, source=SOURCE):
    """Returns the kernel, the bytes of its shared memory and the words of its mail."""
    defines = {name.upper(): int(value) for name, value in model._asdict().items()}
    defines |= {"PAGES": model.pages, "PAGE": PAGE, "EPS": f"{EPS}f"}
    defines["NO_ROPE_BITS"] = f"{model.no_rope_bits}ull"
    defines["SCALE_LOG2E"] = f"{model.head_dim**-0.5 / np.log(2)}f"
    sizes = np.zeros(2, np.int32)
    cuda_machine.build(source, defines, name="sizes")(1, 32, 0, 0, sizes)
    return cuda_machine.build(source, defines, name="decode_layers"), *sizes.tolist()


class Step(NamedTuple):
    """The arguments of a step, drawn at random, and the keys and values that its caches hold."""

    weights: dict[str, np.ndarray]  # in the kernel's order
    x: np.ndarray  # [B, D]
    cos: np.ndarray  # [B, H / 2]
    sin: np.ndarray
    slots: np.ndarray  # [B]
    tables: np.ndarray  # [B, W]
    contexts: np.ndarray  # [B]; 0: padding
    k_cache: np.ndarray  # [L, P, S, K, H]
    v_cache: np.ndarray
    old: list[np.ndarray]  # of each sequence: keys and values [2, L, context - 1, K, H]


def draw_step(model, contexts, seed):
    """Draw a step's arguments; whatever nobody may look at is NaN."""
    m, random = model, np.random.default_rng(seed)

    def draw(*shape, std=1.0, mean=0.0):
        return (mean + std * random.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    absent = np.full(1, np.nan, ml_dtypes.bfloat16)
    attended = m.heads * m.head_dim
    norms = [draw(m.layers, m.head_dim, std=0.2, mean=1) if m.qk_norm else absent for _ in "qk"]
    weights = {
        "input_norm": draw(m.layers, m.hidden, std=0.2, mean=1),
        "qkv": draw(m.layers, *m.qkv_shape, m.hidden, std=m.hidden**-0.5),
        "qkv_bias": draw(m.layers, *m.qkv_shape) if m.qkv_bias else absent,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "o": draw(m.layers, m.hidden, attended, std=attended**-0.5),
        "post_norm": draw(m.layers, m.hidden, std=0.2, mean=1),
        "gate_up": draw(m.layers, 2, m.ffn, m.hidden, std=m.hidden**-0.5),
        "down": draw(m.layers, m.hidden, m.ffn, std=m.ffn**-0.5),
    }
    contexts = np.array(contexts, np.int32)
    padding = contexts == 0
    x = draw(m.batch, m.hidden)
    x[padding] = np.nan
    angles = np.maximum(contexts - 1, 0)[:, None] * THETA ** -np.linspace(
        0, 1, m.head_dim // 2, endpoint=False
    )
    tables = random.permutation(m.pages - 1).reshape(m.batch, m.table).astype(np.int32)
    caches = np.full(
        (2, m.layers, m.pages, PAGE, m.kv_heads, m.head_dim), np.nan, ml_dtypes.bfloat16
    )
    slots, old = np.full(m.batch, -1, np.int32), []
    for b, context in enumerate(contexts):
        # The more positions, the less each counts: so large values, and attention is most of all.
        n = max(context - 1, 0)
        old.append(draw(2, m.layers, n, m.kv_heads, m.head_dim, std=[[[[[1]]]], [[[[1 + n**0.5]]]]]))
        pages, offsets = tables[b, np.arange(n) // PAGE], np.arange(n) % PAGE
        caches[:, :, pages, offsets] = old[-1]
        if context:
            slots[b] = tables[b, n // PAGE] * PAGE + n % PAGE
        tables[b, -(-context // PAGE) :] = m.pages - 1
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Step(weights, x, cos, sin, slots, tables, contexts, *caches, old)


def compute(model, step, b):
    """Compute row b in float32: returns hidden [D], and new keys and values [2, L, K, H]."""
    m, w = model, {name: weight.astype(np.float32) for name, weight in step.weights.items()}
    cos, sin, half = step.cos[b], step.sin[b], m.head_dim // 2
    new = np.zeros((2, m.layers, m.kv_heads, m.head_dim), np.float32)

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight

    def turn(x):
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    x = step.x[b].astype(np.float32)
    for i in range(m.layers):
        qkv = w["qkv"][i] @ norm(x, w["input_norm"][i])  # [K, G + 2, H]
        if m.qkv_bias:
            qkv += w["qkv_bias"][i]
        q, k, v = qkv[:, :-2], qkv[:, -2], qkv[:, -1]
        if m.qk_norm:
            q, k = norm(q, w["q_norm"][i]), norm(k, w["k_norm"][i])
        if not m.no_rope_bits >> i & 1:
            q, k = turn(q), turn(k)
        new[:, i] = k, v
        keys, values = np.concatenate([step.old[b][:, i], new[:, None, i]], 1)  # [context, K, H]
        scores = np.exp(np.einsum("kgh,nkh->kgn", q, keys) * m.head_dim**-0.5)
        attended = np.einsum("kgn,nkh->kgh", scores / scores.sum(-1, keepdims=True), values)
        x = x + w["o"][i] @ attended.ravel()
        gate, up = w["gate_up"][i] @ norm(x, w["post_norm"][i])
        x = x + w["down"][i] @ (gate / (1 + np.exp(-gate)) * up)
    return x, new


def run(model, step, seed, source=SOURCE):
    """Run the kernel; returns hidden [B, D] and the caches [2, L, P, S, K, H]."""
    kernel, shared_bytes, mail_words = build(model, source)
    k_cache, v_cache, mail = step.k_cache.copy(), step.v_cache.copy(), np.zeros(mail_words, np.uint32)
    hidden = np.full_like(step.x, np.nan)
    batch = step.cos, step.sin, step.slots, step.tables, step.contexts
    kernel(
        model.blocks, 288, shared_bytes, seed,
        step.x, *step.weights.values(), *batch, k_cache, v_cache, mail,
        hidden, k_cache, v_cache, mail,
    )  # fmt: skip
    return hidden, np.stack([k_cache, v_cache])


def relative_error(result, expected):
    return np.linalg.norm(result.astype(np.float32) - expected) / np.linalg.norm(expected)


def errors(model, step, seed, source=SOURCE):
    """Run the kernel; return the relative errors of each row's hidden state, keys and values.

    Nothing else in the caches may have changed.
    """
    hidden, caches = run(model, step, seed, source)
    found = []
    for b in np.flatnonzero(step.contexts):
        x, new = compute(model, step, b)
        written = caches[:, :, step.slots[b] // PAGE, step.slots[b] % PAGE]
        found.append([relative_error(hidden[b], x), *map(relative_error, written, new)])
        caches[:, :, step.slots[b] // PAGE, step.slots[b] % PAGE] = np.nan
    before = np.stack([step.k_cache, step.v_cache])
    np.testing.assert_array_equal(caches.view(np.uint16), before.view(np.uint16))
    return np.array(found)


# Models, each with contexts of some steps.
CASES = {
    "one sequence": (
        Model(1, blocks=5),
        [[1], [2], [9], [16], [17], [18], [64], [65], [66], [96]],
    ),
    "two sequences, wide heads": (
        Model(2, head_dim=128, heads=2, blocks=6, stages=2),
        [[1, 33], [96, 32], [0, 5]],
    ),
    "four sequences, two parts, as Qwen2": (
        Model(4, kv_heads=1, hidden=160, qk_norm=False, qkv_bias=True, splits=2, blocks=9, table=10),
        [[65, 66, 72, 73], [74, 0, 144, 145], [146, 129, 1, 0]],
    ),
    "eight sequences, some layers without RoPE, one stage under way": (
        Model(8, layers=3, heads=2, no_rope_bits=0b101, blocks=17, in_flight=1),
        [[5, 1, 33, 96, 0, 8, 9, 64]],
    ),
    "sixteen sequences, groups of eight": (
        Model(16, heads=8, kv_heads=1, blocks=16),
        [[5, 1, 33, 96, 7, 8, 0, 64, 16, 17, 2, 0, 65, 66, 32, 15]],
    ),
    "sixteen parts, groups of seven": (
        Model(1, heads=7, kv_heads=1, splits=16, blocks=16, table=73),
        [[1], [513], [960], [961], [962], [1025], [1026], [1167]],
    ),
    "narrow heads": (Model(2, head_dim=32, splits=2, blocks=8), [[20, 90]]),
    "wide products, two stages": (
        Model(1, hidden=1056, ffn=2080, heads=7, kv_heads=1, blocks=3, stages=2),
        [[30]],
    ),
    "blocks without rows": (
        Model(3, hidden=64, heads=2, kv_heads=1, ffn=64, blocks=40, stages=2, in_flight=1),
        [[7, 0, 80]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_numpy_does(name):
    model, steps = CASES[name]
    for number, contexts in enumerate(steps):
        for seed in (0, 2 * number + 1, 2 * number + 2):
            found = errors(model, draw_step(model, contexts, seed), seed)
            print(name, contexts, seed, np.round(found.max(0)*1e3, 2))
            assert found.max() < TOO_MUCH
