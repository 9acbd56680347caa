"""What is read from config.json and generation_config.json, and what is refused by which name.

The config classes of transformers are the oracle: what is accepted means here what it means there.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import config_json

from nanovllm_jax import LLM
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tools.shapes import SHAPES, as_json, write_config

# --- published files, with the keys that they are published with ---

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
LARGE |= {"num_hidden_layers": 36, "max_window_layers": 36, "tie_word_embeddings": False}
PUBLISHED = {
    "0.6B": QWEN3,
    "1.7B": QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
    "0.6B-Base": QWEN3 | {"max_position_embeddings": 32768, "eos_token_id": 151643},
    "4B": QWEN3 | LARGE | {"hidden_size": 2560, "intermediate_size": 9728}
    | {"tie_word_embeddings": True},
    "4B-Instruct-2507": QWEN3 | LARGE | {"hidden_size": 2560, "intermediate_size": 9728}
    | {"tie_word_embeddings": True, "rope_theta": 5000000, "max_position_embeddings": 262144},
    "8B": QWEN3 | LARGE,
    "32B": QWEN3 | LARGE | {"hidden_size": 5120, "intermediate_size": 25600}
    | {"num_attention_heads": 64, "num_hidden_layers": 64, "max_window_layers": 64},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 8192}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
IS_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
ENDS = {"eos_token_id": [151645, 151643]}
PUBLISHED |= {
    "8B with YaRN": QWEN3 | LARGE | {"rope_scaling": YARN},
    "8B with YaRN, as older files have it": QWEN3 | LARGE
    | {"rope_scaling": {"type": "yarn"} | {k: v for k, v in YARN.items() if k != "rope_type"}},
    "30B-A3B": MOE,
    "30B-A3B, as transformers 5 has it": {
        ("num_local_experts" if key == "num_experts" else key): value for key, value in MOE.items()
    },
    "30B-A3B with dense layers": MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3, 7, 8]},
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009],
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
        "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": 49152, "eos_token_id": 2,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151936, **ENDS,
    },
    "Mistral-Nemo": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 131072, "eos_token_id": 2,
    },
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
FP8 |= {"weight_block_size": [128, 128]}


@pytest.fixture
def written(tmp_path):
    """written(config, **generation_config) -> a directory with these files and nothing else."""

    def write(config, **generation):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text, "utf-8")
        if generation:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
        return tmp_path

    return write


def read(path):
    return ModelConfig.from_directory(Path(path))


def assert_as_transformers(path):
    """All that the result depends on, as transformers understands the same file."""
    transformers = pytest.importorskip("transformers")
    named = "model_type" in json.loads((path / "config.json").read_text("utf-8"))
    config_class = transformers.AutoConfig if named else transformers.Qwen3Config
    ours, theirs = read(path), config_class.from_pretrained(path)
    rope = theirs.rope_parameters if hasattr(theirs, "rope_parameters") else vars(theirs)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    if ours.architecture != "MistralForCausalLM":
        assert set(getattr(theirs, "layer_types", [])) <= {"full_attention"}
    assert ours.rope.kind == (rope or {}).get("rope_type", "default")
    assert not [key for key, number in ours.rope.numbers if rope[key] != number]
    assert theirs.hidden_act in ("silu", "swish")
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.rope.theta == rope["rope_theta"]
    assert (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert (ours.intermediate_size, ours.head_dim) == (theirs.intermediate_size, head_dim)
    assert (ours.num_heads, ours.num_layers) == (
        theirs.num_attention_heads,
        theirs.num_hidden_layers,
    )
    assert (ours.num_kv_heads, ours.rms_norm_eps) == (
        theirs.num_key_value_heads,
        theirs.rms_norm_eps,
    )
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    if ours.architecture == "Qwen3MoeForCausalLM":
        assert ours.num_experts == theirs.num_experts
        assert ours.experts_per_token == theirs.num_experts_per_tok
        assert ours.expert_size == theirs.moe_intermediate_size
        assert ours.norm_topk_prob == theirs.norm_topk_prob
        assert list(ours.dense_layers) == [
            i
            for i in range(ours.num_layers)  # as its decoder layers decide
            if i in theirs.mlp_only_layers or (i + 1) % theirs.decoder_sparse_step
        ]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    return ours


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(written, size):
    ends = PUBLISHED[size]["eos_token_id"]
    ends = {ends} if isinstance(ends, int) else set(ends)
    path = written(PUBLISHED[size], eos_token_id=[*ends, 7], temperature=0.6, top_p=0.95)
    config = assert_as_transformers(path)
    assert set(config.eos_token_ids) == {*ends, 7} and config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "published"),
    [("8B", "8B"), ("Llama-3.2-1B", "Llama-3.2-1B-Instruct")],
)
def test_shapes_for_random_weights_are_those_of_published_models(written, name, published):
    ours, theirs = SHAPES[name], read(written(PUBLISHED[published]))
    assert replace(ours, eos_token_ids=()) == replace(theirs, eos_token_ids=())


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_written_and_read_again(tmp_path, name):
    write_config(SHAPES[name], tmp_path)
    assert read(tmp_path) == SHAPES[name]


@pytest.mark.parametrize("size", PUBLISHED)
def test_what_transformers_saves_again_is_the_same_model(written, tmp_path_factory, size):
    config_class = pytest.importorskip("transformers").AutoConfig
    again = tmp_path_factory.mktemp("again")
    path = written(PUBLISHED[size])
    config_class.from_pretrained(path).save_pretrained(again)
    assert read(path) == read(again)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            (
                QWEN3 | {"quantization_config": {"quant_method": name}},
                f"quantized .*'{name}'.* take",
            )
            for name in ("awq", "gptq", "compressed-tensors", "bitsandbytes", "gguf", "mxfp4")
        ),
        *(
            (QWEN3 | {"quantization_config": FP8 | change}, rf"quantization_config: .*{message}")
            for change, message in [
                ({"activation_scheme": "static"}, "activation_scheme='static' is not supp.*; take"),
                ({"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
                ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported"),
                ({"kv_cache_scheme": {}}, "kv_cache_scheme={} is not supported"),
                ({"weight_block_size": None}, "weight_block_size=None is not .* whole weight"),
                ({"weight_block_size": [128]}, r"weight_block_size=\[128\] is not"),
                ({"weight_block_size": [0, 128]}, r"weight_block_size=\[0, 128\] is not"),
            ]
        ),
        (QWEN3 | {"quantization_config": []}, r"quantized \(\[\]\)"),
        (QWEN3 | {"compression_config": FP8}, "compression_config: .*quantized"),
        (QWEN3 | {"quantization": {"group_size": 64, "bits": 4}}, "quantized .*'bits': 4"),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "rope_scaling": None,
                "hidden_size": 640,
                "num_attention_heads": 4,
            },
            r"config\.json: architecture 'Gemma3ForCausalLM'.*Qwen3ForCausalLM",
        ),
        (
            {
                "architectures": ["Qwen3VLForConditionalGeneration"],
                "model_type": "qwen3_vl",
                "text_config": QWEN3,
                "vision_config": {"depth": 24},
            },
            r"config\.json: architecture 'Qwen3VLForConditionalGeneration'",
        ),
        (
            QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128},
            "model_type='qwen3' contradicts Qwen3MoeForCausalLM",
        ),
        (
            MOE | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
            "'Qwen2MoeForCausalLM'",
        ),
    ],
)
def test_published_models_that_are_not_computed_are_refused_by_what_they_are(
    written, config, message
):
    with pytest.raises(ValueError, match=message):
        LLM(str(written(config)))


# --- defaults, spellings ---


@pytest.mark.parametrize(
    "spelling",
    [
        {"dtype": "bfloat16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        {"dtype": None},
    ],
)
def test_both_spellings_of_dtype(written, spelling):
    assert read(written(config_json(**spelling))).dtype == "bfloat16"


@pytest.mark.parametrize(
    "missing",
    [
        "head_dim num_key_value_heads",
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads",
        "max_position_embeddings rms_norm_eps tie_word_embeddings hidden_act attention_bias",
        "rope_parameters model_type dtype",
    ],
)
def test_missing_keys_are_the_architectures_own(written, missing):
    changes = {"num_attention_heads": 32} | dict.fromkeys(missing.split())
    assert_as_transformers(written(config_json("eight_heads", **changes)))


def test_no_key_value_heads_are_as_many_as_query_heads(written):
    path = written(config_json() | {"num_key_value_heads": None})
    assert assert_as_transformers(path).num_kv_heads == 6


def test_blocks_of_fp8_change_how_weights_are_read_and_nothing_else(written):
    plain = read(written(QWEN3))
    for more in ({}, {"modules_to_not_convert": ["lm_head"]}, {"weight_block_size": [64, 32]}):
        assert read(written(QWEN3 | {"quantization_config": FP8 | more})) == plain


@pytest.mark.parametrize(
    "flags",
    [
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 28, "sliding_window": 512},
        {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 512},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": True, "max_window_layers": 0},
        {"hidden_act": "swish"},
        {"mlp_bias": False, "final_logit_softcapping": None, "quantization_config": None},
    ],
)
def test_a_flag_that_changes_nothing_is_accepted(written, flags):
    assert_as_transformers(written(config_json() | flags))


# --- RoPE ---


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, "factor": None}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}, "rope_scaling": {}},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_every_spelling_of_the_rope_settings(written, spelling):
    """nano-vLLM #167, #198: transformers 5 renamed them, and the base fell back to 10,000."""
    config = config_json(rope_parameters=None) | spelling
    assert assert_as_transformers(written(config)).rope.theta == 5e5


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_settings_by_type_of_layer(written, name):
    """transformers itself has no such spelling of Qwen3, but writes it for other models."""
    nested = {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}
    config = config_json(rope_parameters=None)
    assert read(written(config | {name: nested})).rope.theta == 5e5
    nested["sliding_attention"] = {"rope_theta": 1e4, "rope_type": "default"}
    with pytest.raises(ValueError, match=rf"500000.0 in {name}.full_attention, 10000.0 in"):
        read(written(config | {name: nested}))
    assert read(written(config | {name: {"full_attention": YARN}})).rope.kind == "yarn"


BASE = {"rope_theta": 1e4, "rope_type": "default"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_parameters": BASE, "rope_scaling": YARN},
            "rope_type is 'yarn' factor=4.0 .*in rope_scaling, 'default' in rope_parameters",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_type 'longrope' .*only defau",
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "default"}},
            "rope_type 'default' and type 'yarn' contradict",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be .*, got 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be .*, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast=32 is not"),
        (
            {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1.5}},
            "beta_slow=1.5 must be below",
        ),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate must be true or false"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, "long_factor="),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings=32768 contradicts 4096",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            r"low_freq_factor=4\.0 must be below high_freq_factor=4\.0",
        ),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "'llama3' needs high_freq_factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, r"factor=4\.0"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type None"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling: factor=4\.0"),
        ({"rope_parameters": BASE | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        (
            {"rope_parameters": BASE, "rope_theta": 1e6},
            r"1000000\.0 in config\.json, 10000\.0 in rope_p",
        ),
        (
            {"rope_parameters": BASE | {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
            r"10000\.0 in rope_scaling, 1000000\.0 in rope_parameters",
        ),
        ({"rope_theta": "1e6"}, "rope_theta in config.json must be a number.*'1e6'"),
        ({"rope_theta": True}, "rope_theta .*True"),
        ({"rope_theta": 0}, "rope_theta .*0"),
        ({"rope_theta": float("nan")}, "rope_theta .*nan"),
        ({"rope_theta": 10**400}, "rope_theta .*1000"),
        ({"rope_theta": [1e6]}, r"rope_theta .*\[1000000\.0\]"),
        ({"rope_scaling": False}, "rope_scaling must be an object, got False"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\]"),
        ({"rope_parameters": {"sliding_attention": BASE}}, "no settings for full_attention"),
        ({"rope_parameters": {"full_attention": None}}, "rope_parameters.full_attention .*None"),
    ],
)
def test_rope_that_is_not_computed_or_contradicts_itself_is_refused(written, settings, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        LLM(str(written(config_json(rope_parameters=None) | settings)))


# --- ends of a request ---


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (5, None, {5}),
        (None, [7, 9], {7, 9}),
        (5, [7, 9], {5, 7, 9}),
        ([5, 7], 7, {5, 7}),
        (None, None, set()),
    ],
)
def test_every_eos_id_of_every_file_counts(written, config, generation, ends):
    path = written(config_json(eos_token_id=config), eos_token_id=generation)
    assert set(read(path).eos_token_ids) == ends


@pytest.mark.parametrize("wrong", ["5", True, -1, 131, 5.0, [[5]], [5, None], {}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_end_that_is_no_token_is_named(written, file, wrong):
    if file == "config":
        path = written(config_json() | {"eos_token_id": wrong})
    else:
        path = written(config_json(), eos_token_id=wrong)
    with pytest.raises(ValueError, match=rf"/{file}\.json: eos_token_id.*vocabulary of 131 "):
        read(path)


# --- what is refused ---


@pytest.mark.parametrize("shape", ["gqa", "mqa", "mha"])
@pytest.mark.parametrize("eos", [None, 5, [7, 9]])
def test_a_config_that_is_written_is_read_back(written, tmp_path_factory, shape, eos):
    config = read(written(config_json(shape, eos_token_id=eos)))
    for again in (config, config.sharded(lambda axis: {"vocab": 4}.get(axis, 1))):
        path = tmp_path_factory.mktemp("again")
        (path / "config.json").write_text(json.dumps(as_json(again)), "utf-8")
        assert read(path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "131"}, "vocab_size must be an integer, got '131'"),
        ({"hidden_size": None}, "hidden_size must be an integer, got None"),
        ({"hidden_size": 48.0}, r"hidden_size must be an integer, got 48\.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be between 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be between"),
        ({"intermediate_size": -96}, "intermediate_size=-96"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings=1000"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 .*num_key_value_heads=4"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number .*'1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps .*nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps .*-1e-06"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": "false"}, "attention_bias must be true or false"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
        ({"residual_multiplier": 0.22}, r"residual_multiplier=0\.22"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"use_sliding_window": "yes"}, "use_sliding_window must be true or false, got 'yes'"),
        ({"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers"),
        ({"sliding_window": "4096"}, "sliding_window must be an integer from 2"),
        ({"sliding_window": 1}, "sliding_window must be an integer from 2 on, or null, got 1"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "'sliding_attention', but use_sliding_window is false",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention' is not"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            | {"attention_bias": True},
            "attention_bias=True is not supported; only False is",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
            | {"no_rope_layers": [1]},
            r"no_rope_layers must list a 1 \(RoPE\) or a 0 for each of num_hidden_layers=2",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
            | {"no_rope_layer_interval": 0},
            "no_rope_layer_interval must be a positive integer, got 0",
        ),
        (IS_MOE | {"num_experts": "8"}, "num_experts must be an integer .*, got '8'"),
        (IS_MOE | {"num_local_experts": -1}, "num_local_experts must be an integer .*, got -1"),
        (
            IS_MOE | {"num_experts": 8, "num_local_experts": 9},
            "num_experts=8 and num_local_experts=9 contradict",
        ),
        (
            IS_MOE | {"num_experts": 8, "num_experts_per_tok": 9},
            "num_experts_per_tok=9 must be between 1 and 8",
        ),
        (IS_MOE | {"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be"),
        (IS_MOE | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        (IS_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive .*, got 0"),
        (IS_MOE | {"mlp_only_layers": [0, "1"]}, "mlp_only_layers must be a list of layers"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of num_hidden_layers=2"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"dtype": ["bfloat16"]}, "dtype="),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype='float32' contradicts torch_dty"),
        ({"architectures": None}, "architectures=None must be a list of one name; supported"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures='Qwen3ForCausalLM' must be a list"),
        ({"architectures": ["Qwen3ForCausalLM"] * 2}, "names several"),
        ({"architectures": ["Qwen3ForCausalLM", "MyModel"]}, "'MyModel' is not supported"),
        ({"model_type": "llama"}, "model_type='llama' contradicts Qwen3ForCausalLM"),
    ],
)
def test_a_config_that_is_wrong_or_not_computed_is_refused_by_its_key(written, change, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        LLM(str(written(config_json() | change)))


def test_all_problems_are_named_at_once(written):
    changes = {"rms_norm_eps": "1e-6", "hidden_act": "gelu", "vocab_size": 0, "dtype": "int8"}
    with pytest.raises(ValueError) as error:
        read(
            written(config_json(eos_token_id=5) | changes | {"rope_scaling": {"type": "longrope"}})
        )
    named = [*changes, "longrope"]
    assert not [name for name in named if name not in str(error.value)]
    assert "eos_token_id" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b"{", "is not valid JSON"),
        (b"no json", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec"),
        (b'{"a":' + b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object, but None"),
        (b'{"vocab_size": 131, "vocab_size": 132}', ".*'vocab_size' twice, as 131 and 132"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(written, name, content, message):
    path = written(config_json())
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name} {message}|/{name} is a {message}"):
        LLM(str(path))


def test_a_link_of_an_unfinished_download_is_named(written):
    path = written(config_json())
    (path / "generation_config.json").symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=r"generation_config\.json is a link to .*blobs"):
        LLM(str(path))
