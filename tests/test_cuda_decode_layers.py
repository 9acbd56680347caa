"""The CUDA kernel of all layers of a decode step, run on the CPU, against the same in NumPy."""

from pathlib import Path
from typing import NamedTuple

import cuda_machine
import ml_dtypes
import numpy as np
import pytest
from cuda_machine import MachineError

import pallas_kernels
from pallas_kernels.decode_layers import Plan, Sizes, defines

pytestmark = pytest.mark.skipif(bool(cuda_machine.problem()), reason=str(cuda_machine.problem()))

SOURCE = (Path(pallas_kernels.__file__).parent / "decode_layers.cu").read_text("utf-8")
# A second kernel, which says what the first one needs.
SIZES = """
extern "C" __global__ void sizes(int* result) {
  if (threadIdx.x == 0) result[0] = sizeof(Shared), result[1] = LAYERS * MAIL_WORDS;
}
"""
PAGE = 16  # positions
EPS = 0.25  # so large that it shows if it is missing
THETA = 1e4


def sizes_of(source, values):
    """Ask the source for its bytes of shared memory and its words of mail."""
    result = np.zeros(2, np.int32)
    cuda_machine.build(source, values, name="sizes")(1, 32, 0, 0, result)
    return result.tolist()


# --- What the plan says of the kernel --------------------------------------------------------

# Sizes of 0.6B, 8B, Llama's 1B and Qwen2.5's 0.5B: layers, hidden, heads, KV heads, head dim, FFN.
MODELS = [
    (28, 1024, 16, 8, 128, 3072),
    (36, 4096, 32, 8, 128, 12288),
    (16, 2048, 32, 8, 64, 8192),
    (24, 896, 14, 2, 64, 4864),
]


@pytest.mark.parametrize(("model", "batch"), [(0, 1), (0, 16), (1, 4), (2, 3), (3, 1), (3, 11)])
def test_the_plan_has_the_kernels_formulas(model, batch):
    sizes = Sizes(batch, *MODELS[model], pages=4, page=256, table=2)
    plan = Plan.of(sizes)
    assert plan is not None
    options = {"scale": 1, "layers_without_rope": (), "qkv_bias": False, "qk_norm": True}
    declarations = SOURCE.split('extern "C"')[0]
    needed = sizes_of(declarations + SIZES, defines(sizes, plan, eps=EPS, **options))
    assert needed == [plan.shared_bytes, plan.mail_words]


# --- What it computes ------------------------------------------------------------------------


class Model(NamedTuple):
    """The sizes of a model, and how the kernel divides its work."""

    batch: int
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 192
    table: int = 10
    qk_norm: bool = True
    qkv_bias: bool = False
    layers_without_rope: tuple[int, ...] = ()
    blocks: int = 8
    splits: int = 1
    stages: int = 3
    in_flight: int = 2

    @property
    def pages(self):
        return self.batch * self.table + 1  # the last one is nobody's

    @property
    def defines(self):
        m = self
        sizes = m.batch, m.layers, m.hidden, m.heads, m.kv_heads, m.head_dim, m.ffn, m.pages
        return defines(
            Sizes(*sizes, page=PAGE, table=m.table),
            Plan(m.blocks, m.splits, m.stages, m.in_flight, shared_bytes=0, mail_words=0),
            eps=EPS,
            scale=m.head_dim**-0.5,
            layers_without_rope=m.layers_without_rope,
            qkv_bias=m.qkv_bias,
            qk_norm=m.qk_norm,
        )


class Step(NamedTuple):
    """The arguments of a step, drawn at random, and the keys and values that its caches hold."""

    weights: dict[str, np.ndarray]  # in the kernel's order
    x: np.ndarray  # [B, D]
    cos: np.ndarray  # [B, H / 2]
    sin: np.ndarray
    slots: np.ndarray  # [B]
    tables: np.ndarray  # [B, W]
    contexts: np.ndarray  # [B]; 0: padding
    caches: np.ndarray  # keys and values [2, L, P, S, K, H]
    old: list[np.ndarray]  # each row's, in order: [2, L, context - 1, K, H]


def draw_step(model, contexts, seed):
    """Draw a step's arguments. Padding rows, and whatever nobody may look at, are NaN."""
    m, random = model, np.random.default_rng(seed)

    def draw(*shape, std=1.0, mean=0.0):
        return (mean + std * random.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    absent = np.full(1, np.nan, ml_dtypes.bfloat16)
    qkv = m.layers, m.kv_heads, m.heads // m.kv_heads + 2, m.head_dim
    attended = m.heads * m.head_dim
    weights = {
        "input_norm": draw(m.layers, m.hidden, std=0.2, mean=1),
        "qkv": draw(*qkv, m.hidden, std=m.hidden**-0.5),
        "qkv_bias": draw(*qkv) if m.qkv_bias else absent,
        "q_norm": draw(m.layers, m.head_dim, std=0.2, mean=1) if m.qk_norm else absent,
        "k_norm": draw(m.layers, m.head_dim, std=0.2, mean=1) if m.qk_norm else absent,
        "o": draw(m.layers, m.hidden, attended, std=attended**-0.5),
        "post_norm": draw(m.layers, m.hidden, std=0.2, mean=1),
        "gate_up": draw(m.layers, 2, m.ffn, m.hidden, std=m.hidden**-0.5),
        "down": draw(m.layers, m.hidden, m.ffn, std=m.ffn**-0.5),
    }
    contexts = np.array(contexts, np.int32)
    x = draw(m.batch, m.hidden)
    x[:, 6:10] = 0  # words that are zero
    x[contexts == 0] = np.nan
    inverse = THETA ** -np.linspace(0, 1, m.head_dim // 2, endpoint=False)
    angles = np.maximum(contexts - 1, 0)[:, None] * inverse
    tables = random.permutation(m.pages - 1).reshape(m.batch, m.table).astype(np.int32)
    shape = 2, m.layers, m.pages, PAGE, m.kv_heads, m.head_dim
    caches = np.full(shape, np.nan, ml_dtypes.bfloat16)
    slots, old = np.full(m.batch, -1, np.int32), []
    for b, context in enumerate(contexts):
        n = max(context - 1, 0)
        keys, values = draw(2, m.layers, n, m.kv_heads, m.head_dim)
        # The more positions, the less each of them counts in a mean, unless values are larger.
        old.append(np.stack([keys, values * ml_dtypes.bfloat16(1 + n**0.5)]))
        positions = np.arange(n)
        caches[:, :, tables[b, positions // PAGE], positions % PAGE] = old[-1]
        if context:
            slots[b] = tables[b, n // PAGE] * PAGE + n % PAGE
        tables[b, -(-context // PAGE) :] = m.pages - 1
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Step(weights, x, cos, sin, slots, tables, contexts, caches, old)


def compute(model, step, b):
    """Compute row b in float32: returns hidden [D], and its new keys and values [2, L, K, H]."""
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
        if i not in m.layers_without_rope:
            q, k = turn(q), turn(k)
        new[:, i] = k, v
        keys, values = np.concatenate([step.old[b][:, i], new[:, i, None]], 1)  # [context, K, H]
        scores = np.exp(np.einsum("kgh,nkh->kgn", q, keys) * m.head_dim**-0.5)
        attended = np.einsum("kgn,nkh->kgh", scores / scores.sum(-1, keepdims=True), values)
        x = x + w["o"][i] @ attended.ravel()
        gate, up = w["gate_up"][i] @ norm(x, w["post_norm"][i])
        x = x + w["down"][i] @ (gate / (1 + np.exp(-gate)) * up)
    return x, new


def run(model, step, seed, source):
    """Run the kernel; returns hidden [B, D] and the caches [2, L, P, S, K, H]."""
    source, values = source + SIZES, model.defines
    kernel = cuda_machine.build(source, values, name="decode_layers")
    shared_bytes, mail_words = sizes_of(source, values)
    hidden, caches = np.full_like(step.x, np.nan), step.caches.copy()
    mail = np.zeros(mail_words, np.uint32)
    batch = step.cos, step.sin, step.slots, step.tables, step.contexts
    kernel(
        model.blocks, 288, shared_bytes, seed,
        step.x, *step.weights.values(), *batch, *caches, mail, hidden, *caches, mail,
    )  # fmt: skip
    return hidden, caches


def find_error(model, contexts, seed, source=SOURCE):
    """Run a random step; return the largest error of a row's hidden state, keys or values.

    An error is relative to the norm of what it should be. No other bit of the caches may change.
    """
    step = draw_step(model, contexts, seed)
    hidden, caches = run(model, step, seed, source)
    errors = []
    for b in np.flatnonzero(step.contexts):
        at = slice(None), slice(None), step.slots[b] // PAGE, step.slots[b] % PAGE
        x, new = compute(model, step, b)
        for result, expected in zip([hidden[b], *caches[at]], [x, *new], strict=True):
            error = np.linalg.norm(result.astype(np.float32) - expected)
            errors.append(error / np.linalg.norm(expected))
        caches[at] = step.caches[at]
    np.testing.assert_array_equal(caches.view(np.uint16), step.caches.view(np.uint16))
    return max(errors)


# Some ten values are rounded to bfloat16 in a row until a result is there, and add up: each by at
# most 2^-9, by 0.1% as a rule. It makes 0.3% to 0.8%. A row, a head or a position that is missing
# makes several percent.
TOO_MUCH = 0.01

# Models, each with the contexts of some steps: at the ends of tiles (16), pages, and parts. A part
# has at least 64 old positions, and more if the old ones are more than 64 for each part: of two
# parts, each has 80 from 128 old ones on, of sixteen from 1,024 on. Eight parts at a time are
# merged by those who need them.
CASES = {
    "one sequence": (
        Model(1, blocks=5),
        [[1], [2], [16], [17], [18], [128], [129], [130], [145]],
    ),
    "two sequences, wide heads, one stage under way": (
        Model(2, head_dim=128, heads=2, blocks=6, stages=2, in_flight=1),
        [[1, 33], [96, 32]],
    ),
    "four sequences in two parts, bias": (
        Model(
            4, hidden=160, kv_heads=1, qk_norm=False, qkv_bias=True, blocks=9, splits=2, table=19
        ),
        [[128, 129, 130, 0], [64, 65, 66, 81], [257, 1, 258, 289]],
    ),
    "eight sequences, some layers without RoPE": (
        Model(8, layers=3, heads=2, layers_without_rope=(0, 2), blocks=17),
        [[5, 1, 33, 96, 0, 8, 9, 64]],
    ),
    "sixteen sequences, groups of eight": (
        Model(16, heads=8, kv_heads=1, blocks=16),
        [[5, 1, 33, 96, 7, 8, 0, 64, 16, 17, 2, 0, 65, 66, 32, 15]],
    ),
    "sixteen parts, groups of seven": (
        Model(1, heads=7, kv_heads=1, splits=16, blocks=16, table=145),
        [[1], [65], [66], [513], [514], [1024], [1025], [1921], [2049], [2305]],
    ),
    "narrow heads, a stage for itself": (
        Model(2, head_dim=32, splits=2, blocks=8, stages=1, in_flight=1),
        [[20, 140]],
    ),
    "wide products": (
        Model(1, hidden=1056, ffn=1120, heads=7, kv_heads=1, blocks=4, stages=2),
        [[30]],
    ),
    # Eight warps share the pieces of 256 values. With two to a sequence, a lane has the same
    # columns of every sequence; with three it has others of each.
    "hidden states of two pieces": (
        Model(9, hidden=320, heads=2, kv_heads=1, ffn=64, blocks=9, stages=2),
        [[7, 0, 40, 1, 2, 3, 16, 17, 18]],
    ),
    "hidden states of three pieces": (
        Model(3, hidden=544, heads=2, kv_heads=1, ffn=64, blocks=6, stages=2),
        [[7, 0, 40]],
    ),
    "blocks without rows": (
        Model(3, hidden=64, heads=2, kv_heads=1, ffn=64, blocks=40, stages=2),
        [[7, 0, 140]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_numpy_does(name):
    """In turns with the first contexts, and in some random orders."""
    model, steps = CASES[name]
    assert find_error(model, steps[0], 0) < TOO_MUCH
    for seed, contexts in enumerate([*steps, steps[-1]], 1):
        assert find_error(model, contexts, seed) < TOO_MUCH


# --- What would be found ---------------------------------------------------------------------

# {what is broken: (the kernel's text, what stands there instead, what the machine says)}
BROKEN = {
    "warps multiply before all have received": (
        "    sync_computing();\n  }\n\n  __device__ void put(",
        "  }\n\n  __device__ void put(",
        "races with",
    ),
    "a warp frees a stage before all lanes have read it": (
        "    __syncwarp();\n    if (lane == 0) barrier_arrive(",
        "    if (lane == 0) barrier_arrive(",
        "races with",
    ),
    "the copying warp waits for the other parity": (
        "barrier_wait(&s.empty[place.slot], place.phase ^ 1)",
        "barrier_wait(&s.empty[place.slot], place.phase)",
        "(?s)deadlock: .*barrier_wait",
    ),
    "a part's logarithms do not fill an item": (
        "for (int j = split + 1; j < LSE_PITCH; j++)",
        "for (int j = LSE_PITCH; j < LSE_PITCH; j++)",
        "(?s)deadlock: some only look",
    ),
    "a part's last position is forgotten": (
        "end = min(begin + parts.per, parts.old);",
        "end = min(begin + parts.per, parts.old) - 1;",
        None,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_is_noticed_that(what):
    model, steps = CASES["four sequences in two parts, bias"]
    text, instead, message = BROKEN[what]
    assert SOURCE.count(text) == 1
    source = SOURCE.replace(text, instead)
    if message is None:
        assert find_error(model, steps[-1], 1, source) > 3 * TOO_MUCH
    else:
        with pytest.raises(MachineError, match=message):
            find_error(model, steps[-1], 1, source)
