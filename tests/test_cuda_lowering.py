"""Every kind of program that the default engine compiles on H100s, lowered without a GPU.

What a new JAX release changes under the kernels fails here, at the place where it would fail on a
GPU machine.
"""

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from h100 import h100_mesh, kernels_in
from jax.sharding import AbstractMesh
from jax.stages import Traced

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.sharding import Sharding, merge_rules

# Qwen3-0.6B, but for its number of layers.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# (tokens, rows) of a step -> its kernels on one GPU, and what two GPUs add to them. These are the
# ends of both families of buckets, and the sizes at which decoding takes other kernels.
DECODE, PREFILL = {"paged_decode"}, {"norm_rope_write", "mosaic_gpu"}
SUMS = {"one_shot_all_reduce"}
STEPS = {
    (0, 1): ({"fused_linear", "paged_decode_combine"} | DECODE, SUMS),
    (0, 16): ({"paged_decode_combine"} | DECODE, SUMS),
    (0, 512): ({"norm_rope_write"} | DECODE, SUMS),
    (64, 8): (PREFILL, SUMS),
    (1024, 128): (PREFILL, SUMS),
    (16384, 512): (PREFILL, SUMS),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """programs(head_dim, gpus) -> the default engine's, on a mesh that passes for H100s."""
    device = SimpleNamespace(
        platform="gpu",
        compute_capability="9.0",
        client=SimpleNamespace(platform_version="PJRT C API\ncuda 13000"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbstractMesh, "devices", np.array([device]))
        for_cuda = functools.partialmethod(Traced.lower, lowering_platforms=("cuda",))
        patch.setattr(Traced, "lower", for_cuda)

        @functools.cache
        def make(head_dim, gpus):
            path = tmp_path_factory.mktemp("model")
            (path / "config.json").write_text(json.dumps(MODEL | {"head_dim": head_dim}))
            config = EngineConfig(str(path), tensor_parallel_size=gpus)
            mesh = h100_mesh(data=1, tensor=gpus)
            return Programs(config, Sharding(mesh, merge_rules({})))

        yield make


each_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
each_number_of_gpus = pytest.mark.parametrize("gpus", [1, 2])


@each_number_of_gpus
@each_head_dim
@pytest.mark.parametrize("bucket", STEPS)
def test_steps(programs, head_dim, gpus, bucket):
    p = programs(head_dim, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        lowered = p.lower_step(jax.tree.leaves(p.weights), *bucket, num_blocks=64)
    kernels, sums = STEPS[bucket]
    assert set(kernels_in(lowered.as_text())) == (kernels | sums if gpus > 1 else kernels)


@each_number_of_gpus
def test_the_sampler_with_filters(programs, gpus):
    p = programs(128, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        lowered = p.lower_redraw(16, num_blocks=64)
    assert set(kernels_in(lowered.as_text())) == (SUMS if gpus > 1 else set())
