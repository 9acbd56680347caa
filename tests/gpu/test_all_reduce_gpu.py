"""The one-shot all-reduce on two or more GPUs that reach each other's memory."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import make_mailboxes, one_shot_all_reduce, one_shot_max, one_shot_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs"
    ),
]

MOST = 1 << 19


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


@pytest.mark.parametrize(
    "shape", [(1, 1024), (1, 5120), (7, 2560), (3, 256), (16, 5120), (64, 4096), (256, 4096)]
)
def test_sum(mesh, mailboxes, shape):
    residual = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.bfloat16)

    def add(parts, residual, address):
        return one_shot_all_reduce(parts[0], residual, address, "tensor", MOST)

    run = reduce_on(mesh, add, 1)
    for seed in range(5):
        part = draw(mesh, shape, seed)
        got = np.asarray(run([part], residual, mailboxes.addresses))
        assert (got == got[0]).all(), "the devices got different sums"
        want = exact(part, residual)
        np.testing.assert_array_equal(got[0], want.astype(jnp.bfloat16))


def test_chains_of_changing_shapes(mesh, mailboxes):
    """Thousands of calls, each of which depends on the one before; many fast and slow devices."""
    shapes = [(1, 1024), (16, 5120), (2, 2560), (64, 4096)]
    parts = [draw(mesh, shape, i) for i, shape in enumerate(shapes)]

    def chain(parts, residual, address):
        total = residual
        for _ in range(25):
            for part in parts:
                rest = jnp.zeros_like(part).at[0, 0].set(total[0, 0] / 256)
                out = one_shot_all_reduce(part, rest, address, "tensor", MOST)
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
    with pytest.raises(ValueError, match="up to 1048576 numbers"):
        run([draw(mesh, (4, MOST), 0)], jnp.zeros((4, MOST), jnp.bfloat16), mailboxes.addresses)


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
        [sys.executable, "-c", ONE_SIDED], env=env, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0 and "CUDA" in ended.stderr
