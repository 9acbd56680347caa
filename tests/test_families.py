"""Every family of decoders on every path: greedy float32 tokens equal those of transformers.

Each one's shape has something odd: query heads that share a key in sevens, in threes or not at all,
a head_dim apart from hidden size and heads, biases that matter, a RoPE beyond its first length.
"""

import json

import numpy as np
import pytest
from helpers import (
    FAMILIES,
    LLAMA3,
    NEW,
    YARN,
    config_json,
    edge_prompts,
    family,
    greedy,
    make_checkpoint,
    poison,
    tokens,
)

from nanovllm_jax import LLM
from nanovllm_jax.layers.rope import Rope
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tools.shapes import as_json

ON_A_MESH = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 128}
MIXED = ["full_attention", "sliding_attention"]
CHUNKED = {"max_model_len": 640, "max_num_batched_tokens": 640}


@pytest.fixture
def expected(checkpoint, oracle):
    """The oracle's tokens for the edge prompts."""
    return lambda **changes: oracle(checkpoint(**changes), edge_prompts(), NEW)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_in_a_tight_pool_and_few_slots(new_engine, checkpoint, expected, name):
    options = CHUNKED | {"max_num_seqs": 3, "num_kvcache_blocks": 4}
    llm = new_engine(checkpoint(**FAMILIES[name]), **options)
    poison(llm)
    for _ in range(2):  # the second time with prefix hits
        assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == expected(**FAMILIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_seqs": 1}, {"enforce_eager": True}, {"attention_backend": "triton"}],
    ids=["plain", "one slot", "eager", "triton"],
)
def test_on_one_device(new_engine, checkpoint, expected, name, options):
    llm = new_engine(checkpoint(**FAMILIES[name]), **options)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == expected(**FAMILIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}])
def test_on_a_mesh(new_engine, checkpoint, expected, name, mesh):
    """With two KV heads, four devices hold copies."""
    changes = FAMILIES[name] | ON_A_MESH | ({"head_dim": None} if name == "qwen2" else {})
    llm = new_engine(checkpoint(**changes), mesh_shape=mesh)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == expected(**changes)


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"data": 2, "tensor": 2}])
def test_experts_dealt_out_to_devices(new_engine, checkpoint, expected, mesh):
    changes = FAMILIES["qwen3-moe-some"] | ON_A_MESH
    rules = {"experts": "tensor", "expert_ffn": None}
    llm = new_engine(checkpoint(**changes), mesh_shape=mesh, sharding_rules=rules)
    poison(llm)
    assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == expected(**changes)


def test_experts_that_cannot_be_split_are_refused(checkpoint):
    config = ModelConfig.from_directory(checkpoint(**FAMILIES["qwen3-moe-some"]))
    by_units = {"heads": 3, "kv_heads": 3, "ffn": 3, "expert_ffn": 3}
    with pytest.raises(
        ValueError, match=r"'expert_ffn' .* 3 devices.*12 experts, moe_inter.*\[1\]"
    ):
        config.sharded(lambda axis: by_units.get(axis, 1))
    by_expert = {"heads": 3, "kv_heads": 3, "ffn": 3, "experts": 3}
    assert config.sharded(lambda axis: by_expert.get(axis, 1)) == config
    with pytest.raises(ValueError, match="'experts' cannot be split over 5 devices"):
        config.sharded(lambda axis: {"experts": 5}.get(axis, 1))


def test_a_cpu_copies_no_table_of_experts(new_engine, checkpoint):
    """It copies an expert that is chosen, since products want matrices, and no other."""
    many = {"num_experts": 64, "moe_intermediate_size": 64}
    llm = new_engine(checkpoint(**FAMILIES["qwen3-moe"] | many))
    programs, weights = llm.runner.programs, llm.runner.weights
    step = programs.step_spec(programs.decode_buckets[0], 16, weights).trace().lower().compile()
    table = 64 * 48 * 64 * 4  # bytes of one layer's down
    assert step.memory_analysis().temp_size_in_bytes < table / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_that_transformers_makes(new_engine, tmp_path, oracle, name):
    """Names, shapes and spellings of the files are transformers' own, not those of our helpers."""
    torch, transformers = (pytest.importorskip(n) for n in ("torch", "transformers"))
    config = transformers.AutoConfig.for_model(**config_json(**FAMILIES[name]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, value in model.named_parameters():
        torch.nn.init.normal_(value, std=0.3, mean=float("norm" in key))
    model.save_pretrained(tmp_path)
    prompts = edge_prompts()[:3]
    assert tokens(new_engine(tmp_path), prompts, greedy(4, ignore_eos=True)) == oracle(
        tmp_path, prompts, 4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_again(tmp_path, name):
    config = ModelConfig.from_directory(make_checkpoint(tmp_path, **FAMILIES[name]))
    (tmp_path / "config.json").write_text(json.dumps(as_json(config)), "utf-8")
    assert ModelConfig.from_directory(tmp_path) == config


# --- RoPE ---


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768, "truncate": False},
        YARN | {"attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2.0},
        YARN | {"mscale": 0.8, "mscale_all_dim": 1.2, "factor": 40.0},
        YARN | {"factor": 1.0},
        YARN | {"original_max_position_embeddings": 4},
    ],
)
def test_frequencies_are_those_of_transformers(head_dim, settings):
    pytest.importorskip("torch")
    from transformers import LlamaConfig, modeling_rope_utils

    settings = {"rope_theta": 1e4} | settings
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(settings))
    want, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[settings["rope_type"]](config)
    numbers = {k: v for k, v in settings.items() if k not in ("rope_type", "rope_theta")}
    rope = Rope(settings["rope_theta"], settings["rope_type"], tuple(numbers.items()))
    got, ours = rope.frequencies(head_dim)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    assert ours == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 2048),
        ({"rope_parameters": YARN}, 640),
        ({"rope_parameters": LLAMA3}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, 5120),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.5}}, 2048),
    ],
)
def test_how_far_a_context_may_go(tmp_path, changes, longest):
    config = ModelConfig.from_directory(make_checkpoint(tmp_path, **changes))
    assert config.longest_context == longest


# --- windows ---


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (family("Mistral", "mistral", 4, 2, sliding_window=300), 300),
        (family("Mistral", "mistral", 4, 2), 4096),  # MistralConfig's own
        ({"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1}, 300),
        ({"sliding_window": 300, "use_sliding_window": True, "layer_types": MIXED}, 300),
    ],
)  # fmt: skip
def test_contexts_end_where_a_window_would_begin_to_matter(
    new_engine, checkpoint, oracle, caplog, changes, window
):
    changes = changes | {"max_position_embeddings": 8192}
    path = checkpoint(**changes)
    assert ModelConfig.from_directory(path).sliding_window == window
    llm = new_engine(path, max_model_len=1024)
    assert llm.config.max_model_len == min(window, 1024)
    if window == 300:
        assert f"sliding_window={window}" in caplog.text
        prompts = [edge_prompts()[-1][:290]]
        [got] = llm.generate(prompts, greedy(20, ignore_eos=True), use_tqdm=False)
        assert got["token_ids"] == oracle(path, prompts, 10)[0]


def test_a_window_without_a_width_is_refused(checkpoint):
    types = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}
    path = checkpoint(**types)
    (config := json.loads((path / "config.json").read_text("utf-8")))["sliding_window"] = None
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="'sliding_attention', but sliding_window is null"):
        LLM(str(path))
