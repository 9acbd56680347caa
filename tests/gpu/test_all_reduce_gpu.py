"""The engine's all-reduce on two or more GPUs that reach each other's memory."""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.layers.norm import rms_norm
from nanovllm_jax.tools.shapes import SHAPES, write_config
from pallas_kernels import (
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_all_reduce_norm,
    one_shot_max,
    one_shot_sum,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs"
    ),
]

MOST = 1 << 20
once_or_twice = pytest.mark.parametrize("crossings", [1, 2])


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), ("tensor",))


@pytest.fixture(scope="module")
def mailboxes(mesh):
    return make_mailboxes(mesh, "tensor", MOST)


def reduce_on(mesh, fn, num_parts):
    """fn(parts, residual, address) on each device's part; the result of every device, apart."""
    parts, whole = PartitionSpec("tensor"), PartitionSpec()

    def on_device(parts, residual, address):
        return fn([part[0] for part in parts], residual, address)[None]

    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=([parts] * num_parts, whole, parts),
            out_specs=parts,
            check_vma=False,
        )
    )


def draw(mesh, shape, seed):
    parts = np.random.default_rng(seed).standard_normal((mesh.size, *shape))
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    return jax.device_put(jnp.asarray(parts, jnp.bfloat16), sharding)


def exact(parts, residual):
    return np.asarray(residual, np.float32) + np.asarray(parts, np.float32).sum(axis=0)


@once_or_twice
@pytest.mark.parametrize(
    "shape",
    [(1, 1024), (1, 5120), (7, 2560), (3, 256), (16, 5120), (64, 4096), (256, 4096), (512, 4096)],
)
def test_sum(mesh, mailboxes, shape, crossings):
    residual = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.bfloat16)

    def add(parts, residual, address):
        return one_shot_all_reduce(parts[0], residual, address, "tensor", MOST, crossings=crossings)

    run = reduce_on(mesh, add, 1)
    for seed in range(5):
        part = draw(mesh, shape, seed)
        got = np.asarray(run([part], residual, mailboxes.addresses))
        assert (got == got[0]).all(), "the devices got different sums"
        want = exact(part, residual)
        np.testing.assert_array_equal(got[0], want.astype(jnp.bfloat16))


def wrong_in_bfloat16(got, want, most=0.002) -> bool:
    """Whether bfloat16 differ by more than one rounding, or more than a few of them do."""
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    apart = np.abs(got - want) > 0
    return (np.abs(got - want) > np.abs(want) * 2**-7 + 1e-6).any() or apart.mean() > most


@once_or_twice
@pytest.mark.parametrize(
    "shape",
    [(1, 256), (2, 1024), (16, 1024), (256, 1024), (3, 2560), (16, 4096), (256, 4096), (7, 4352),
     (16, 5120), (256, 5120), (5, 8192)],
)  # fmt: skip
def test_sum_with_norm(mesh, mailboxes, shape, crossings):
    """The sum exactly, and its norm as layers/norm.py computes it but for the mean's order."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((3, shape[1])), jnp.bfloat16)

    def add(parts, rest, address):
        residual, layer = rest
        out = one_shot_all_reduce_norm(
            parts[0], residual, weight, layer, address, "tensor", MOST,
            eps=1e-6, crossings=crossings,
        )  # fmt: skip
        return jnp.stack(out)

    run = reduce_on(mesh, add, 1)
    for seed in range(5):
        part, residual = draw(mesh, shape, seed), draw(mesh, shape, 100 + seed)[0]
        residual = jax.device_put(residual, NamedSharding(mesh, PartitionSpec()))
        got = run([part], (residual, jnp.int32(seed)), mailboxes.addresses)
        got = np.asarray(got)
        assert (got == got[0]).all(), "the devices got different sums or norms"
        want = exact(part, residual).astype(jnp.bfloat16)
        np.testing.assert_array_equal(got[0, 0], want)
        normed = rms_norm(jnp.asarray(want), weight[min(seed, 2)], 1e-6)
        assert not wrong_in_bfloat16(got[0, 1], normed)


def test_sums_with_and_without_norm_share_the_mailboxes(mesh, mailboxes):
    """Slots, blocks, crossings and the mailboxes' halves alternate in a loop, and in its calls."""
    shapes = [(16, 1024), (5, 5120), (2, 2560), (64, 4096), (3, 5120)]
    parts = [draw(mesh, shape, i) for i, shape in enumerate(shapes)]
    weights = [jnp.ones((1, shape[1]), jnp.bfloat16) for shape in shapes]

    def loop(parts, residual, address):
        def body(i, total):
            for n, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                rest = jnp.zeros_like(part).at[0, 0].set(total[0, 0].astype(part.dtype))
                out, normed = one_shot_all_reduce_norm(
                    part, rest, weight, jnp.int32(0), address, "tensor", MOST,
                    eps=1e-6, crossings=1 + n % 2,
                )  # fmt: skip
                again = one_shot_all_reduce(
                    normed, out, address, "tensor", MOST, crossings=1 + n // 2 % 2
                )
                sums = one_shot_sum(again[:, :15].astype(jnp.float32), address, "tensor", MOST)
                total = total / 2 + sums[:1, :1] / 64
            return total

        return jax.lax.fori_loop(0, 50, body, residual)

    def same_by_xla(parts, residual, address):
        def body(i, total):
            for part, weight in zip(parts, weights, strict=True):
                rest = jnp.zeros_like(part).at[0, 0].set(total[0, 0].astype(part.dtype))
                out = jax.lax.psum(part.astype(jnp.float32), "tensor") + rest
                out = out.astype(part.dtype)
                normed = rms_norm(out, weight[0], 1e-6)
                again = jax.lax.psum(normed.astype(jnp.float32), "tensor") + out
                sums = jax.lax.psum(again.astype(part.dtype).astype(jnp.float32)[:1, :1], "tensor")
                total = total / 2 + sums / 64
            return total

        return jax.lax.fori_loop(0, 50, body, residual)

    start = jnp.ones((1, 1), jnp.float32)
    run = reduce_on(mesh, loop, len(parts))
    outs = [np.asarray(run(parts, start, mailboxes.addresses)) for _ in range(20)]
    assert all((out == outs[0][0]).all() for out in outs)
    by_xla = reduce_on(mesh, same_by_xla, len(parts))
    want = np.asarray(by_xla(parts, start, mailboxes.addresses))
    np.testing.assert_allclose(outs[0][0], want[0], rtol=0.02)


def test_chains_of_changing_shapes(mesh, mailboxes):
    """Thousands of calls, each of which depends on the one before; many fast and slow devices."""
    shapes = [(1, 1024), (16, 5120), (2, 2560), (64, 4096)]
    parts = [draw(mesh, shape, i) for i, shape in enumerate(shapes)]

    def chain(parts, residual, address):
        total = residual
        for n in range(25):
            for part in parts:
                rest = jnp.zeros_like(part).at[0, 0].set(total[0, 0] / 256)
                out = one_shot_all_reduce(
                    part, rest, address, "tensor", MOST, crossings=1 + n // 2 % 2
                )
                total = total + out[:1, :1]
        return total

    run = reduce_on(mesh, chain, len(parts))
    residual = jnp.ones((1, 1), jnp.bfloat16)
    outs = [np.asarray(run(parts, residual, mailboxes.addresses)) for _ in range(20)]
    assert all((out == outs[0][0]).all() for out in outs)

    def same_by_xla(parts, residual, address):
        total = residual
        for _ in range(25):
            for part in parts:
                rest = (total[0, 0] / 256).astype(jnp.float32)
                first = jax.lax.psum(part[:1, :1].astype(jnp.float32), "tensor") + rest
                total = total + first.astype(jnp.bfloat16)
        return total

    by_xla = reduce_on(mesh, same_by_xla, len(parts))
    want = np.asarray(by_xla(parts, residual, mailboxes.addresses))
    np.testing.assert_array_equal(outs[0][0], want[0])


@pytest.mark.parametrize("rows", [1, 3, 64, 500])
def test_max(mesh, mailboxes, rows):
    keys = np.random.default_rng(rows).integers(-(2**31), 2**31, (mesh.size, rows, 2), np.int64)
    keys[:, : rows // 2, 1] = 7  # if the high words are equal, the low ones decide
    words = jax.device_put(keys.astype(np.int32), NamedSharding(mesh, PartitionSpec("tensor")))

    def largest(parts, residual, address):
        return one_shot_max(parts[0], address, "tensor", MOST)

    got = np.asarray(reduce_on(mesh, largest, 1)([words], jnp.zeros(1), mailboxes.addresses))
    bits = keys.astype(np.int32).view(np.uint32).astype(np.uint64)
    want = (bits[..., 0] | bits[..., 1] << np.uint64(32)).max(axis=0)
    assert (got == got[0]).all()
    bits = got[0].view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(bits[:, 0] | bits[:, 1] << np.uint64(32), want)


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (16, 15), (64, 15), (256, 15), (500, 15)])
def test_float32_sum(mesh, mailboxes, shape):
    """Exactly the sum in the order of the devices, alone and in a loop that reuses mailboxes."""

    def loop(parts, _, address):
        def add(i, x):
            return one_shot_sum(x, address, "tensor", MOST) / (i + 2)

        return jax.lax.fori_loop(0, 33, add, parts[0])

    def once(parts, _, address):
        return one_shot_sum(parts[0], address, "tensor", MOST)

    for seed in range(3):
        numbers = np.random.default_rng(seed).standard_normal((mesh.size, *shape), np.float32)
        x = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("tensor")))
        got = np.asarray(reduce_on(mesh, once, 1)([x], jnp.zeros(1), mailboxes.addresses))
        want = functools.reduce(np.add, numbers)
        assert (got == want).all()
        got = np.asarray(reduce_on(mesh, loop, 1)([x], jnp.zeros(1), mailboxes.addresses))
        for i in range(33):
            want = functools.reduce(np.add, [want] * mesh.size if i else numbers)
            want = want / np.float32(i + 2)
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-5)
        assert (got == got[0]).all()


def test_too_much_is_refused(mesh, mailboxes):
    add = functools.partial(one_shot_all_reduce, axis="tensor", max_words=MOST)
    run = reduce_on(mesh, lambda parts, r, a: add(parts[0], r, a), 1)
    with pytest.raises(ValueError, match="up to 2097152 numbers"):
        run([draw(mesh, (4, MOST), 0)], jnp.zeros((4, MOST), jnp.bfloat16), mailboxes.addresses)


def test_greedy_tokens_are_those_of_xlas_sums(tmp_path, monkeypatch):
    """First tokens by prefill and second ones by decoding, at batch 1 and 16; then with filters.

    Both engines round to bfloat16 at different places, which decides a few of the tokens.
    """
    write_config(replace(SHAPES["0.6B"], num_layers=4), tmp_path)
    lengths = 2 * [1, 17, 63, 64, 65, 200, 256, 300]
    prompts = [
        np.random.default_rng(i).integers(0, 10000, n).tolist() for i, n in enumerate(lengths)
    ]
    two = {"max_tokens": 2, "ignore_eos": True, "detokenize": False}
    drawn = SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.01, seed=1, **two)

    def outcome() -> np.ndarray:
        """The tokens [16 prompts, 5]."""
        llm = LLM(
            str(tmp_path), load_format="dummy", tensor_parallel_size=2, max_num_seqs=16,
            max_num_batched_tokens=2048, max_model_len=1024, num_kvcache_blocks=64,
        )  # fmt: skip
        greedy = SamplingParams(temperature=0, **two)
        with llm:
            runs = [llm.generate(prompts, params, use_tqdm=False) for params in (greedy, drawn)]
            alone = [
                llm.generate([p], greedy, use_tqdm=False)[0]["token_ids"][-1:] for p in prompts
            ]
        together = [[output["token_ids"] for output in outputs] for outputs in runs]
        return np.concatenate([*together, alone], axis=1)

    monkeypatch.setattr(Programs, "_program_cache", lambda *_: None)  # takes both for the same
    got = outcome()
    monkeypatch.setattr(Programs, "uses_collectives", False)
    same = got == outcome()
    assert same[:, [0, 2]].mean() > 0.8, same
    for first, second in ((0, 1), (2, 3), (0, 4)):
        assert same[same[:, first], second].mean() > 0.8, same


ONE_SIDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from pallas_kernels import make_mailboxes, one_shot_all_reduce

mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
boxes = make_mailboxes(mesh, "tensor", 1 << 14)

def reduce(x, address):
    def send():
        return one_shot_all_reduce(x, x, address, "tensor", 1 << 14)

    return jax.lax.cond(jax.lax.axis_index("tensor") == 0, send, lambda: x)

whole, parts = P(), P("tensor")
run = jax.shard_map(reduce, mesh=mesh, in_specs=(whole, parts), out_specs=parts, check_vma=False)
print(jax.jit(run)(jnp.ones((1, 1024), jnp.bfloat16), boxes.addresses))
"""


def test_a_peer_that_never_answers_ends_in_an_error():
    """In a process of its own, since the error leaves a GPU that the process cannot use again."""
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ended = subprocess.run(
        [sys.executable, "-c", ONE_SIDED],
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert ended.returncode != 0 and "CUDA" in ended.stderr
