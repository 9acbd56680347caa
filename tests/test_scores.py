"""Log probabilities and ranks against NumPy in float64, over one device and over several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_sampler import largest_key_over

from nanovllm_jax.layers.scores import score
from nanovllm_jax.sampling_params import MOST_LOGPROBS
from nanovllm_jax.sharding import make_sharding

ROWS = 24


def logits_of(kind, size):
    rng = np.random.default_rng([len(kind), size])
    x = rng.standard_normal((ROWS, size)).astype(np.float32) * 3
    if kind == "ties":
        x = np.round(x)
    elif kind == "huge":
        x *= 1e4
    elif kind == "one chunk":  # the likeliest all lie side by side
        x[:, 130:160] += 40
    return x


@functools.cache
def scores_over(devices, kernels, vocab_size):
    run = functools.partial(score, vocab_size=vocab_size)
    if devices == 1:
        return jax.jit(run)
    axis = ("tensor",)
    if kernels:
        total = functools.partial(jax.lax.psum, axis_name=axis)
        run = functools.partial(
            run, total=total, largest_key=functools.partial(largest_key_over, axis)
        )
    sharding = make_sharding({"tensor": devices})
    run = functools.partial(run, axis=axis)
    return jax.jit(sharding.shard_map(run, (P(None, "tensor"), P()), P()))


# 128 divides the first; the others have small chunks, or none; the last has fewer than 20 tokens.
@pytest.mark.parametrize("size", [8192, 4112, 1000, 131 * 8, 24])
@pytest.mark.parametrize("kind", ["normal", "ties", "huge", "one chunk"])
@pytest.mark.parametrize(("devices", "kernels"), [(1, False), (2, False), (8, False), (8, True)])
def test_scores_are_those_of_the_reference(devices, kernels, kind, size):
    vocab = size - 5  # the last shard is partly padding
    logits = logits_of(kind, size)
    logits[:, vocab:] = 1e9
    rng = np.random.default_rng(size)
    tokens = rng.integers(0, vocab, ROWS).astype(np.int32)
    tokens[:8] = logits[:8, :vocab].argmax(axis=1)
    got = jax.device_get(scores_over(devices, kernels, vocab)(jnp.asarray(logits), tokens))
    x = logits[:, :vocab].astype(np.float64)
    largest = x.max(axis=1, keepdims=True)
    logprobs = x - largest - np.log(np.exp(x - largest).sum(axis=1, keepdims=True))
    own = logprobs[np.arange(ROWS), tokens]
    np.testing.assert_allclose(got.logprobs, own, rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(got.ranks, (logprobs >= own[:, None]).sum(axis=1))
    order = np.argsort(-x, axis=1, kind="stable")[:, :MOST_LOGPROBS]
    np.testing.assert_array_equal(got.top_ids, order)
    top = np.take_along_axis(logprobs, order, axis=1)
    np.testing.assert_allclose(got.top_logprobs, top, rtol=1e-6, atol=2e-6)
