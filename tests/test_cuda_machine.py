"""The machine that runs CUDA kernels on the CPU: its functions, its orders, and what it notices."""

import re
from pathlib import Path

import cuda_machine
import ml_dtypes
import numpy as np
import pytest
from cuda_machine import MachineError

pytestmark = pytest.mark.skipif(bool(cuda_machine.problem()), reason=str(cuda_machine.problem()))

SEEDS = range(6)  # 0: in turns
SHARED = "extern __shared__ __align__(128) unsigned char shared[];"
EVERY = (Path(__file__).parent / "every_primitive.cu").read_text("utf-8")


def kernel(parameters, body, **defines):
    source = f'extern "C" __global__ void test({parameters}) {{\n{SHARED}\n{body}\n}}'
    return cuda_machine.build(source, defines)


def draw_bfloat16(random, *shape):
    return random.standard_normal(shape).astype(ml_dtypes.bfloat16)


def halves(array, row, column):
    """The pair of bfloat16 at [row, column] and [row, column + 1], for lanes' indices."""
    bits = array.view(np.uint16).astype(np.uint32)
    return bits[row, column] | bits[row, column + 1] << 16


LANE = np.arange(32)
G, K = LANE // 4, LANE % 4 * 2  # of a lane, as primitives.cuh has it


def test_products():
    random = np.random.default_rng(0)
    a, b = draw_bfloat16(random, 16, 16), draw_bfloat16(random, 16, 8)
    c = random.standard_normal((16, 8)).astype(np.float32)
    transposed = np.ascontiguousarray(b.T)
    pairs_a = [halves(a, G + i % 2 * 8, K + i // 2 * 8) for i in range(4)]
    pairs_b = [halves(transposed, G, K + i * 8) for i in range(2)]
    operands = np.stack([*pairs_a, *pairs_b], -1)  # [32, 6]
    rows, columns = np.stack([G, G, G + 8, G + 8], -1), np.stack([K, K + 1, K, K + 1], -1)
    sums = np.ascontiguousarray(c[rows, columns])  # [32, 4]
    run = kernel(
        "const u32* operands, float* sums",
        "const u32* o = operands + threadIdx.x * 6;\n"
        "float c[4]; for (int i = 0; i < 4; i++) c[i] = sums[threadIdx.x * 4 + i];\n"
        "mma16(c, o[0], o[1], o[2], o[3], o[4], o[5]);\n"
        "for (int i = 0; i < 4; i++) sums[threadIdx.x * 4 + i] = c[i];",
    )
    run(1, 32, 0, 1, operands, sums)
    expected = c + a.astype(np.float32) @ b.astype(np.float32)
    np.testing.assert_allclose(sums, expected[rows, columns], rtol=1e-6, atol=1e-6)


def test_other_lanes_values():
    """A matrix is transposed in each of two warps, and numbers change places."""
    random = np.random.default_rng(1)
    matrices = draw_bfloat16(random, 2, 8, 8)
    values = random.standard_normal(64).astype(np.float32)
    pairs, xored = np.zeros((2, 32), np.uint32), np.zeros_like(values)
    run = kernel(
        "const u32* matrices, const float* values, u32* pairs, float* xored",
        "const int t = threadIdx.x; pairs[t] = transpose(matrices[t]);\n"
        "xored[t] = shuffle_xor(values[t], 5) + shuffle(values[t], 7);",
    )
    run(1, 64, 0, 1, matrices.view(np.uint32), values, pairs, xored)
    transposed = np.ascontiguousarray(np.swapaxes(matrices, 1, 2))
    np.testing.assert_array_equal(pairs, [halves(m, G, K) for m in transposed])
    for warp in (slice(0, 32), slice(32, 64)):
        np.testing.assert_array_equal(xored[warp], values[warp][LANE ^ 5] + values[warp][7])


def test_numbers():
    """Halves of a pair are rounded as everywhere else; functions are those of numpy."""
    x = np.random.default_rng(3).standard_normal((4096, 2)).astype(np.float32) * 8
    x[:8, 0] = [0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3e38]
    pairs = np.zeros(4096, np.uint32)
    back, functions = np.zeros((4096, 2), np.float32), np.zeros((4096, 4), np.float32)
    run = kernel(
        "const float* x, u32* pairs, float* back, float* functions",
        "for (int i = threadIdx.x; i < 4096; i += 32) {\n"
        "pairs[i] = pack(x[2 * i], x[2 * i + 1]);\n"
        "back[2 * i] = low_of(pairs[i]); back[2 * i + 1] = high_of(pairs[i]);\n"
        "const float y = x[2 * i + 1]; float* f = functions + 4 * i;\n"
        "f[0] = exp_2(y); f[1] = rsqrt_of(y * y); f[2] = silu(y); f[3] = log_2(y * y); }",
    )
    run(1, 32, 0, 1, x, pairs, back, functions)
    rounded = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back, rounded.astype(np.float32))
    same = pairs.view(np.uint16).reshape(-1, 2) == rounded.view(np.uint16)
    assert (same | np.isnan(x)).all()
    y = x[:, 1]
    expected = np.stack([np.exp2(y), 1 / abs(y), y / (1 + np.exp(-y)), np.log2(y * y)], -1)
    np.testing.assert_allclose(functions, expected, rtol=1e-5, atol=1e-6)


RING = """
const int stages = 3, t = threadIdx.x, lane = t % 32;
u64* full = reinterpret_cast<u64*>(shared + stages * 1024);
u64* empty = full + stages;
if (t == 0) {
  for (int i = 0; i < stages; i++) { barrier_init(full + i, 1); barrier_init(empty + i, 8); }
  barriers_ready();
}
__syncthreads();
int stage = 0;
u32 parity = 0;
float sum = 0;
for (int n = 0; n < ROUNDS; n++) {
  if (t == 256) {
    barrier_wait(empty + stage, parity ^ 1);
    barrier_expect(full + stage, 1024);
    for (int half = 0; half < 2; half++)
      copy_in(shared + stage * 1024 + half * 512,
              x + (blockIdx.x * ROUNDS + n) * 256 + half * 128, 512, full + stage);
  } else if (t < 256) {
    if (WAIT_FIRST) barrier_wait(full + stage, parity);
    sum += reinterpret_cast<const float*>(shared + stage * 1024)[t];
    if (!WAIT_FIRST) barrier_wait(full + stage, parity);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + stage);
  }
  if (++stage == stages) { stage = 0; parity ^= 1; }
}
if (t < 256) sums[blockIdx.x * 256 + t] = sum;
"""


def run_ring(seed, ring=RING, wait_first=1):
    x = np.random.default_rng(seed).standard_normal((4, 20, 256)).astype(np.float32)
    sums = np.zeros((4, 256), np.float32)
    run = kernel("const float* x, float* sums", ring, WAIT_FIRST=wait_first, ROUNDS=20)
    run(4, 288, 3 * 1024 + 48, seed, x, sums)
    return sums, x.sum(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_copies(seed):
    sums, expected = run_ring(seed)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_reading_before_a_copy_has_arrived_is_noticed(seed):
    with pytest.raises(MachineError, match="races with"):
        run_ring(seed, wait_first=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_over_what_is_still_read_is_noticed(seed):
    """The copying warp does not wait until a stage has been read."""
    try:
        sums, _ = run_ring(seed, RING.replace("barrier_wait(empty + stage, parity ^ 1);", ""))
    except MachineError as error:
        assert re.search("more arrivals|deadlock", str(error))
    else:
        assert np.isnan(sums).any()


EXCHANGE = """
const int t = threadIdx.x, blocks = gridDim.x;
float value = start[blockIdx.x];
for (int n = 0; n < ROUNDS; n++) {
  // Each block sends its number to all, four copies of it, and sums what all have sent.
  uint4* words = mail + n * blocks;
  if (t < SENT) tell(reinterpret_cast<u32*>(words + blockIdx.x) + t, __float_as_uint(value));
  float sum = 0;
  if (t < 32) {
    for (int i = t; i < blocks; i += 32) {
      Deadline deadline;
      uint4 item;
      while (item = look(words + i), !(CHECK)) deadline.check();
      sum += 0.5f * (__uint_as_float(item.x) + __uint_as_float(item.w));
    }
    for (int bits = 16; bits; bits /= 2) sum += shuffle_xor(sum, bits);
    if (t == 0) *reinterpret_cast<float*>(shared) = sum;
  }
  __syncthreads();
  value = *reinterpret_cast<float*>(shared) / blocks + SCALE * blockIdx.x;
  __syncthreads();
}
if (t == 0) result[blockIdx.x] = value;
"""
ALL_FOUR = "item.x && item.y && item.z && item.w"


def run_exchange(seed, sent="4", check=ALL_FOUR, rounds=10, scale=1):
    """Exchange numbers; with a scale of 0, all of them are zero."""
    blocks = 6
    value = scale * np.random.default_rng(seed).standard_normal(blocks).astype(np.float32)
    result = np.zeros_like(value)
    run = kernel(
        "const float* start, uint4* mail, float* result",
        EXCHANGE,
        SENT=sent,
        CHECK=check,
        ROUNDS=rounds,
        SCALE=scale,
    )
    run(blocks, 64, 16, seed, value, np.zeros((rounds, blocks, 4), np.uint32), result)
    for _ in range(rounds):
        value = value.mean() + scale * np.arange(blocks)
    return result, value


@pytest.mark.parametrize("seed", range(20))
def test_an_exchange_between_blocks(seed):
    result, expected = run_exchange(seed)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_zeros_arrive(seed):
    result, expected = run_exchange(seed, scale=0)
    np.testing.assert_array_equal(result, expected)


def test_words_of_an_item_arrive_one_by_one():
    """A reader who looks at one of the four alone takes another word too early."""

    def is_right(seed):
        result, expected = run_exchange(seed, check="item.x")
        return np.allclose(result, expected, rtol=1e-5)

    assert not all(is_right(seed) for seed in range(1, 20))


def test_the_same_seed_gives_the_same_order_and_another_seed_another():
    run = kernel(
        "u32* told, u32* seen",
        "if (threadIdx.x == 0) {\n"
        "const uint4 words = look(reinterpret_cast<uint4*>(told) + blockIdx.x % 2);\n"
        "seen[blockIdx.x] = !words.x + 2 * !words.y + 4 * !words.z + 8 * !words.w;\n"
        "tell(told + blockIdx.x, 1);\n}",
    )

    def order(seed):
        seen = np.zeros(8, np.uint32)
        run(8, 32, 0, seed, np.zeros(8, np.uint32), seen)
        return tuple(seen.tolist())

    orders = [order(seed) for seed in range(1, 9)]
    assert orders == [order(seed) for seed in range(1, 9)]
    assert len(set(orders)) > 4


@pytest.mark.parametrize("seed", [0, 1])
def test_a_barrier_that_nobody_ends_is_a_deadlock(seed):
    run = kernel(
        "float* x",
        "u64* bar = reinterpret_cast<u64*>(shared);\n"
        "if (threadIdx.x == 0) barrier_init(bar, 2);\n"
        "__syncthreads();\nif (threadIdx.x == 0) barrier_arrive(bar);\nbarrier_wait(bar, 0);",
    )
    where = r"block 1, warp 0: barrier_wait of line 7 .*parity 0; 1 arrivals and 0 bytes missing"
    with pytest.raises(MachineError, match=rf"(?s)deadlock.*{where}.*lanes 0 1"):
        run(2, 32, 16, seed, np.zeros(1, np.float32))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_word_that_nobody_sends_is_a_deadlock(seed):
    with pytest.raises(MachineError, match=r"(?s)deadlock: some only look.*look of line"):
        run_exchange(seed, sent="(blockIdx.x == 2 ? 3 : 4)")


def test_a_kernel_without_an_end_is_stopped():
    run = kernel("float* x", "while (true) __syncwarp();")
    with pytest.raises(MachineError, match=r"not done after 0\.5 seconds"):
        run(1, 32, 0, 1, np.zeros(1, np.float32), limit_seconds=0.5)


# What the machine refuses: {what: (code of one warp, what the machine says)}. `bar` is a barrier of
# one arrival at byte 1024 of 1056.
COPY = "if (t == 0) { barrier_expect(bar, 64); %s }\nbarrier_wait(bar, 0);"
REFUSED = {
    "misaligned copy": (COPY % "copy_in(shared + 8, x, 64, bar);", "line 1: byte 8.* misaligned"),
    "misaligned source": (COPY % "copy_in(shared, x + 1, 64, bar);", "misaligned"),
    "copy of odd size": (COPY % "copy_in(shared, x, 40, bar);", "not a multiple of 16"),
    "copy beyond shared memory": (
        COPY % "copy_in(shared + 1008, x, 64, bar);",
        "64 bytes from 1008 on are not within the 1056 bytes",
    ),
    "copy from beyond an array": (COPY % "copy_in(shared, x + 244, 64, bar);", "any array"),
    "copy before the barriers are ready": (
        "u64* other = bar + 1;\n"
        "if (t == 0) { barrier_init(other, 1); copy_in(shared, x, 16, other); }",
        r"line 2: a copy before barriers_ready",
    ),
    "the end before a copy has arrived": (
        "if (t == 0) { barrier_expect(bar, 64); copy_in(shared, x, 64, bar); }",
        "copies under way",
    ),
    "fewer bytes than expected": (
        COPY % "copy_in(shared, x, 32, bar);",
        "deadlock.*32 bytes missing",
    ),
    "no barrier": ("barrier_wait(reinterpret_cast<u64*>(shared), 0);", "there is no barrier"),
    "overwritten barrier": (
        "if (t == 0) *bar = 0;\n__syncwarp();\nbarrier_arrive(bar);",
        "written over",
    ),
    "a barrier that another lane has just set up": (
        "if (t == 0) barrier_init(bar + 1, 1);\nbarrier_wait(bar + 1, 1);",
        "line 2: (nothing says that thread 0|there is no barrier)",
    ),
    "a barrier set up twice": ("if (t == 0) barrier_init(bar, 1);", "set up before"),
    "too many arrivals": (
        "if (t == 0) barrier_expect(bar, 16);\n__syncwarp();\nbarrier_arrive(bar);",
        "line 3: more arrivals",
    ),
    "different collectives": (
        "if (t < 7) __syncwarp(); else x[t] = shuffle_xor(1.0f, 1);",
        "while other lanes are in (__syncwarp|shuffle_xor)",
    ),
    "a product at two places": (
        "float c[4];\nif (t < 7) mma16(c, 0, 0, 0, 0, 0, 0);\nelse mma16(c, 0, 0, 0, 0, 0, 0);",
        "in mma16, while other lanes are in mma16 of line [23]",
    ),
    "a lane that is missing": ("if (t) __syncwarp();", "deadlock.*__syncwarp of line 1"),
    "misaligned load": ("x[0] = reinterpret_cast<float4*>(x + t)->x;", "line 1: misaligned"),
    "misaligned look": ("look(reinterpret_cast<uint4*>(x + 1));", "misaligned"),
    "index outside a local array": ("float c[4] = {};\nx[t] = c[t];", "line 2: index outside"),
    "store outside shared memory": ("shared[1056 + t] = 1;", "outside its shared memory"),
    "store outside an array": ("x[256 + t] = 1;", "outside the array of argument 0"),
    "fetch outside an array": ("fetch(x + 256 + t);", "any array"),
    "look outside an array": ("look(reinterpret_cast<uint4*>(x) + 64);", "any array"),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what, seed):
    codes = enumerate(code for code, _ in REFUSED.values())
    cases = "\n".join(f"case {i}: {{\n#line 1\n{code}\n}} break;" for i, code in codes)
    run = kernel(
        "float* x, const int* which",
        "const int t = threadIdx.x; u64* bar = reinterpret_cast<u64*>(shared + 1024);\n"
        "if (t == 0) { barrier_init(bar, 1); barriers_ready(); }\n__syncwarp();\n"
        f"switch (*which) {{\n{cases}\n}}",
    )
    which = np.array([list(REFUSED).index(what)], np.int32)
    with pytest.raises(MachineError, match=f"(?s){REFUSED[what][1]}"):
        run(1, 32, 1056, seed, np.zeros(256, np.float32), which)


# Races within a block of two warps: {where: (code, is it one?)}
RACES = {
    "lanes exchange": ("y[t] = t;\n__syncwarp();\nx[t] = y[t ^ 1];", False),
    "lanes do not wait": ("y[t] = t;\nx[t] = y[t ^ 1];", True),
    "a shuffle does not order memory": ("y[t] = t;\nshuffle_xor(1, 1);\nx[t] = y[t ^ 1];", True),
    "warps exchange": ("y[t] = t;\n__syncthreads();\nx[t] = y[t ^ 32];", False),
    "lanes wait, and not warps": ("y[t] = t;\n__syncwarp();\nx[t] = y[t ^ 32];", True),
    "all read": ("if (t == 0) y[0] = 1;\n__syncthreads();\nx[t] = y[0];", False),
    "a write after reads": (
        "y[t] = t;\n__syncthreads();\nx[t] = y[t ^ 32];\n__syncwarp();\ny[t] = 2;",
        True,
    ),
    "two writes of the same": ("y[0] = 1;", True),
    "a barrier orders those who wait for it": (
        "if (t == 5) { y[0] = 1; barrier_arrive(bar); }\nbarrier_wait(bar, 0);\nx[t] = y[0];",
        False,
    ),
    "a barrier orders nothing after the arrival": (
        "if (t == 5) { barrier_arrive(bar); y[0] = 1; }\nbarrier_wait(bar, 0);\nx[t] = y[0];",
        True,
    ),
    "neighbours of two bytes": ("reinterpret_cast<u16*>(y)[t] = 1;", False),
    "a word and a plain load of it": (
        "if (t == 0) tell(words, 1);\nif (t == 32) x[t] = words[0];",
        True,
    ),
    "two tell a word": ("if (t % 32 == 0) tell(words, 1);", False),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("where", RACES)
def test_races_in_a_block(where, seed):
    cases = "\n".join(
        f"case {i}: {{\n#line 1\n{code}\n}} break;" for i, (code, _) in enumerate(RACES.values())
    )
    run = kernel(
        "float* x, u32* words, const int* which",
        "const int t = threadIdx.x; u64* bar = reinterpret_cast<u64*>(shared);\n"
        "float* y = reinterpret_cast<float*>(shared + 16);\n"
        "if (t == 0) barrier_init(bar, 1);\n__syncthreads();\n"
        f"switch (*which) {{\n{cases}\n}}",
    )
    arrays = np.zeros(64, np.float32), np.zeros(1, np.uint32)
    which = np.array([list(RACES).index(where)], np.int32)
    if RACES[where][1]:
        with pytest.raises(MachineError, match=r"line \d: byte \d+ of .* races with .* line \d$"):
            run(1, 64, 272, seed, *arrays, which)
    else:
        run(1, 64, 272, seed, *arrays, which)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_do_not_order_memory_between_blocks(seed):
    """What a block has stored plainly another one must not load in the same kernel."""
    run = kernel(
        "u32* mail, float* stored, float* loaded",
        "if (threadIdx.x) return;\n"
        "if (blockIdx.x == 0) { stored[0] = 1; tell(mail, 1); return; }\n"
        "while (!look(reinterpret_cast<uint4*>(mail)).x);\nloaded[0] = stored[0];",
    )
    with pytest.raises(MachineError, match=r"block 1, .*an array races with what block 0"):
        run(2, 32, 0, seed, np.zeros(4, np.uint32), *np.zeros((2, 1), np.float32))


def test_it_refuses_a_stack_overflow():
    run = kernel(
        "float* x",
        "volatile float big[15600]; for (int i = 0; i < 15600; i++) big[i] = 1; x[0] = big[3];",
    )
    with pytest.raises(MachineError, match="stack is too small"):
        run(1, 32, 0, 1, np.zeros(1, np.float32))


def test_computing_threads_alone_can_wait_for_one_another():
    run = kernel("float* x", "sync_computing();")
    with pytest.raises(MachineError, match=r"thread 2.*does not compute"):
        run(1, 288, 0, 1, np.zeros(1, np.float32))


def test_shared_memory_is_nan_before_it_is_written():
    result = np.zeros(32, np.float32)
    run = kernel("float* x", "x[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];")
    run(1, 32, 128, 1, result)
    assert np.isnan(result).all()


def test_arguments():
    run = kernel("const float* a, float* b", "b[threadIdx.x] = a[threadIdx.x] + 1;")
    x = np.arange(32, dtype=np.float32)
    run(1, 32, 0, 1, x, x)  # one piece of memory
    np.testing.assert_array_equal(x, np.arange(1, 33))
    with pytest.raises(MachineError, match="takes 2 arrays, not 1"):
        run(1, 32, 0, 1, x)
    with pytest.raises(MachineError, match="argument 1 has items of 8 bytes, not 4"):
        run(1, 32, 0, 1, x, x.astype(np.float64))
    with pytest.raises(MachineError, match="multiple of 32 threads"):
        run(1, 33, 0, 1, x, x)
    with pytest.raises(RuntimeError, match=r"kernel\.cu:3"):
        kernel("float* x", "x[0] = nothing;")


@pytest.mark.parametrize("flags", [(), ("-DMACHINE_WITH_UCONTEXT",)])
def test_every_primitive(flags):
    """It knows each function that kernels can use on a GPU, on each kind of processor."""
    primitives = (Path(__file__).parents[1] / "pallas_kernels" / "primitives.cuh").read_text(
        "utf-8"
    )
    names = set(re.findall(r"__device__ inline \w+ (\w+)\(", primitives)) - {"shared_address"}
    assert "silu" in names and all(re.search(rf"\b{name}\(", EVERY) for name in names)
    random = np.random.default_rng(4)
    matrix = draw_bfloat16(random, 16, 16)
    m = matrix.astype(np.float32)
    expected = m @ m[:, :8]  # [16, 8]
    x = random.uniform(1, 2, (256, 2)).astype(ml_dtypes.bfloat16)
    received = np.ones((256, 4), np.uint32)
    received[:, 0] = x[:, 0].view(np.uint16)
    received[:, 1] = x[:, 1].view(np.uint16).astype(np.uint32) << 16
    y = x.astype(np.float32).sum(1)
    functions = 2**y + y**-0.5 + np.log2(y) + y / (1 + np.exp(-y))
    run = cuda_machine.build(EVERY, {}, machine_flags=flags)
    for seed in SEEDS:
        sent, numbers = np.zeros(256, np.uint32), np.zeros((8, 32, 2), np.float32)
        run(1, 288, 640, seed, matrix, received, sent, numbers)
        told = sent.view(ml_dtypes.bfloat16).reshape(8, 32, 2).astype(np.float32)
        np.testing.assert_allclose(told[..., 0], np.tile(expected[G, K], (8, 1)), rtol=2**-8)
        np.testing.assert_allclose(told[..., 1], np.tile(expected[G, K + 1], (8, 1)), rtol=2**-8)
        swapped = expected[(G ^ 1) + 8, K]
        np.testing.assert_allclose(numbers[..., 0], np.tile(swapped, (8, 1)), rtol=1e-4)
        np.testing.assert_allclose(numbers[..., 1].ravel(), functions, rtol=1e-4)
