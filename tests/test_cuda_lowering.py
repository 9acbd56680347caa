"""Every kind of program that the default engine compiles on H100s, lowered without a GPU.

What a new JAX release changes under the kernels fails here, at the place where it would fail on a
GPU machine.
"""

import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from h100 import h100_mesh, kernels_in
from jax.sharding import AbstractMesh
from jax.stages import Traced

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cuda_driver
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.sharding import Sharding
from nanovllm_jax.tools.shapes import SHAPES, write_config
from pallas_kernels import _nvrtc
from pallas_kernels.decode_layers import MOST_ROWS

# The kernels of a step on one GPU. The buckets are the ends of both families, and the sizes at
# which decoding takes other kernels.
PREFILL = {"norm_rope_write", "paged_prefill_mosaic", "draw"}
STEPS = {
    Bucket(0, 1): {"fused_linear", "paged_decode", "paged_decode_combine", "draw"},
    Bucket(0, 16): {"paged_decode", "paged_decode_combine", "draw"},
    Bucket(0, 512): {"norm_rope_write", "paged_decode", "draw"},
    Bucket(64, 8): PREFILL,
    Bucket(1024, 128): PREFILL | {"gated_linear"},
    Bucket(16384, 512): PREFILL | {"gated_linear"},
    Bucket(64, 32, True): PREFILL | {"paged_decode", "paged_decode_combine"},
    Bucket(1024, 512, True): PREFILL | {"gated_linear", "paged_decode"},
}
# What they are on one Hopper GPU where NVRTC is installed. One row has a kernel for its logits.
WHOLE = {Bucket(0, n): {"decode_layers", "draw"} for n in (1, 4, MOST_ROWS)}
WHOLE[Bucket(0, 1)] |= {"fused_linear"}
FILTERS = {"filter_collect", "filter_choose"}  # on one GPU; on two, XLA and the sums
ALSO_ON_TWO = {"one_shot_all_reduce"}
# The norm joins the sums of a few rows; that of one is part of the product after it.
NORMS_ON_TWO = {Bucket(0, 16), Bucket(0, 512), Bucket(64, 8), Bucket(64, 32, True)}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """programs(head_dim, gpus, size) -> the default engine's, on a mesh that passes for H100s."""
    device = SimpleNamespace(
        platform="gpu",
        compute_capability="9.0",
        core_count=132,
        client=SimpleNamespace(platform_version="PJRT C API\ncuda 13000"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbstractMesh, "devices", np.array([device]))
        for_cuda = functools.partialmethod(Traced.lower, lowering_platforms=("cuda",))
        patch.setattr(Traced, "lower", for_cuda)

        @functools.cache
        def make(head_dim, gpus, size="0.6B", by_expert=False, backend="auto"):
            path = tmp_path_factory.mktemp("model")
            write_config(replace(SHAPES[size], num_layers=2, head_dim=head_dim), path)
            rules = {"experts": "tensor", "expert_ffn": None} if by_expert else None
            config = EngineConfig.resolve(
                path,
                "gpu",
                tensor_parallel_size=gpus,
                sharding_rules=rules,
                enable_mixed_chunk=True,
                attention_backend=backend,
            )
            mesh = h100_mesh(**config.mesh_shape)
            return Programs(config, Sharding(mesh, config.sharding_rules))

        yield make


@pytest.fixture(autouse=True)
def without_nvrtc(monkeypatch):
    """So that the tests are the same wherever they run."""
    monkeypatch.setattr(_nvrtc, "problem", lambda: "it is not installed")


@pytest.fixture
def with_nvrtc(without_nvrtc, monkeypatch):
    monkeypatch.setattr(_nvrtc, "problem", lambda: None)
    monkeypatch.setattr(_nvrtc, "compile_to_ptx", lambda *_: "PTX")


each_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
each_number_of_gpus = pytest.mark.parametrize("gpus", [1, 2])


@each_number_of_gpus
@each_head_dim
@pytest.mark.parametrize("bucket", STEPS, ids=str)
def test_steps(programs, head_dim, gpus, bucket):
    p = programs(head_dim, gpus)
    assert bucket in p.decode_buckets + p.prefill_buckets + p.mixed_buckets
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.lower_step(bucket, num_blocks=64).as_text()
    if gpus == 1:
        assert set(kernels_in(text)) == STEPS[bucket]
        return
    norms = {"one_shot_all_reduce_norm"} if bucket in NORMS_ON_TWO else set()
    assert set(kernels_in(text)) == STEPS[bucket] | ALSO_ON_TWO | norms


@pytest.mark.parametrize(("gpus", "by_expert"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("bucket", STEPS, ids=str)
def test_steps_with_experts(programs, gpus, by_expert, bucket):
    """Some kernels in place of the MLP's products, and the sum after it as for an MLP."""
    p = programs(128, gpus, "30B-A3B", by_expert)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.lower_step(bucket, num_blocks=64).as_text()
    experts = "expert_rows" if bucket == Bucket(0, 1) else "expert"
    kernels = STEPS[bucket] - {"gated_linear"}
    kernels |= {"choose_experts", f"{experts}_gate_up", f"{experts}_down"}
    pairs, experts = (bucket.num_tokens or bucket.num_rows) * 8, 64 if by_expert else 128
    mosaic = not bucket.is_decode and pairs >= 64 * experts  # it sorts pairs; so do very many
    kernels |= {"expert_schedule"} if 8 < pairs <= 2**19 / experts and not mosaic else set()
    if gpus == 2:
        kernels |= ALSO_ON_TWO | ({"one_shot_all_reduce_norm"} if bucket in NORMS_ON_TWO else set())
    assert set(kernels_in(text)) == kernels


@each_number_of_gpus
@pytest.mark.parametrize("bucket", [Bucket(0, 1), Bucket(0, 16)], ids=lambda b: str(b.num_rows))
def test_several_decode_steps_are_a_loop_of_known_length(programs, gpus, bucket):
    """Then XLA launches the body without asking the device whether to go on."""
    p = programs(128, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.decode_steps_spec(bucket, num_blocks=64).trace().lower().as_text()
    norms = {"one_shot_all_reduce_norm"} if gpus > 1 and bucket in NORMS_ON_TWO else set()
    assert set(kernels_in(text)) == STEPS[bucket] | (ALSO_ON_TWO | norms if gpus > 1 else set())
    assert text.count("stablehlo.while") == 1
    assert re.search(rf"dense<{p.config.num_scheduler_steps}> : tensor<i32>", text)


@each_head_dim
@pytest.mark.parametrize("bucket", WHOLE, ids=lambda b: str(b.num_rows))
def test_few_rows_take_one_kernel_for_all_layers(programs, with_nvrtc, head_dim, bucket):
    """One a step; in a loop of steps, its mail is wiped in each."""
    p = programs(head_dim, 1)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        one = p.lower_step(bucket, num_blocks=64).as_text()
        several = p.decode_steps_spec(bucket, num_blocks=64).trace().lower().as_text()
    for text in (one, several):
        assert sorted(kernels_in(text)) == sorted(WHOLE[bucket])
        assert len(re.findall(r"broadcast_in_dim .*xui32>", text)) == 1
    loop = several[several.index("stablehlo.while") :]
    assert "call @decode_layers" in loop


@pytest.mark.parametrize(
    ("options", "bucket"),
    [
        (dict(gpus=1), Bucket(0, 2 * MOST_ROWS)),
        (dict(gpus=2), Bucket(0, 1)),
        (dict(gpus=1, backend="triton"), Bucket(0, 1)),
        (dict(gpus=1, size="30B-A3B"), Bucket(0, 1)),
        (dict(gpus=1), Bucket(64, 8)),
        (dict(gpus=1), Bucket(64, 32, True)),
    ],
    ids=str,
)
def test_other_steps_compute_layer_by_layer(programs, with_nvrtc, options, bucket):
    p = programs(128, **options)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        found = kernels_in(p.lower_step(bucket, num_blocks=64).as_text())
    assert "decode_layers" not in found and len(set(found)) > 2


def test_a_gpu_shared_with_kernels_of_others_computes_layer_by_layer(
    programs, with_nvrtc, monkeypatch
):
    monkeypatch.setattr(cuda_driver, "shared_by_mps", lambda: True)
    p = programs.__wrapped__(128, 1)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        found = kernels_in(p.lower_step(Bucket(0, 1), num_blocks=64).as_text())
    assert set(found) == STEPS[Bucket(0, 1)]


@each_number_of_gpus
def test_sampling_with_filters(programs, gpus):
    p = programs(128, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.sample_spec(16, num_blocks=64).trace().lower().as_text()
    assert set(kernels_in(text)) == {"draw"} | (ALSO_ON_TWO if gpus > 1 else FILTERS)
    assert gpus == 1 or '"stablehlo.all_reduce"' not in text


@each_number_of_gpus
@pytest.mark.parametrize("rows", [16, 512])
def test_sampling_with_all_options(programs, gpus, rows):
    """More rows than are worked on at once are a loop, which runs to its end without the host."""
    p = programs(128, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.sample_all_spec(rows, num_blocks=64).trace().lower().as_text()
    assert set(kernels_in(text)) == {"draw"} | (ALSO_ON_TWO if gpus > 1 else FILTERS)
    assert gpus == 1 or '"stablehlo.all_reduce"' not in text


@each_number_of_gpus
def test_scoring_prompts(programs, gpus):
    p = programs(128, gpus)
    with jax.sharding.use_abstract_mesh(p.sharding.mesh):
        text = p.score_prompt_spec(num_blocks=64).trace().lower().as_text()
    assert set(kernels_in(text)) == (ALSO_ON_TWO if gpus > 1 else set())
