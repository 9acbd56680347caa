"""Which options an engine or a request accepts.

Whatever is refused is refused before any weight is read, with its value and what would be valid.
"""

import json
import math
import re

import numpy as np
import pytest
from helpers import config_json

from nanovllm_jax import LLM, SamplingParams, config, sampling_params
from nanovllm_jax.config import EngineConfig, EngineOptions


@pytest.fixture
def directory(tmp_path):
    """directory(shape, **changes) -> a directory with that config.json and nothing else."""

    def write(shape="gqa", **changes):
        (tmp_path / "config.json").write_text(json.dumps(config_json(shape, **changes)), "utf-8")
        return tmp_path

    return write


# --- the engine's options ---


def test_defaults(directory):
    config = EngineConfig.resolve(directory())
    names = "max_num_batched_tokens max_num_seqs gpu_memory_utilization tensor_parallel_size"
    names += " enforce_eager kvcache_block_size num_kvcache_blocks dtype seed"
    values = [getattr(config, name) for name in names.split()]
    assert values == [16384, 512, 0.9, 1, False, 256, None, None, 0]
    assert EngineConfig.max_model_len == 4096
    assert config.max_model_len == 2048, "capped to max_position_embeddings"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_num_batched_tokens", 1023, "at least max_model_len=1024"),
        ("chunked_prefill_size", 0, "between 1 and max_num_batched_tokens=16384"),
        ("chunked_prefill_size", 20000, "between 1 and max_num_batched_tokens=16384"),
        ("max_num_seqs", 0, "at least 1"),
        ("num_scheduler_steps", 0, "between 1 and 64"),
        ("num_scheduler_steps", 65, "between 1 and 64"),
        ("max_model_len", 1, "at least 2"),
        ("gpu_memory_utilization", 0.0, r"\(0, 1\]"),
        ("gpu_memory_utilization", 1.01, r"\(0, 1\]"),
        ("tensor_parallel_size", 0, "between 1 and 8"),
        ("tensor_parallel_size", 9, "between 1 and 8"),
        ("kvcache_block_size", 0, "multiple of 256"),
        ("kvcache_block_size", 128, "multiple of 256"),
        ("kvcache_block_size", 300, "multiple of 256"),
        ("num_kvcache_blocks", 0, "at least 1"),
        ("dtype", "float16", "float32.*bfloat16"),
        ("attention_backend", "cuda", "triton"),
        ("kv_cache_dtype", "int8", "fp8"),
        ("load_format", "pickle", "auto"),
        ("gpu_memory_utilization", float("nan"), r"\(0, 1\]"),
        ("seed", 2**64, r"-2\*\*63 to 2\*\*64 - 1"),
        ("seed", -(2**63) - 1, "64-bit"),
    ],
)
def test_options_out_of_range_name_their_value_and_the_range(directory, name, value, rule):
    options = {"max_model_len": 1024, name: value}
    with pytest.raises(ValueError, match=f"(?s){name}.*{rule}|{name} .*{rule}") as error:
        LLM(str(directory()), **options)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 2.0),
        ("max_num_seqs", True),
        ("max_model_len", "1024"),
        ("enforce_eager", 1),
        ("gpu_memory_utilization", "0.9"),
        ("num_kvcache_blocks", 1.5),
        ("seed", None),
        ("seed", 1.0),
        ("dtype", np.dtype("float32")),
        ("attention_backend", None),
        ("mesh_shape", 2),
        ("sharding_rules", "tensor"),
        ("sharding_rules", {"heads": 5}),
        ("tensor_parallel_size", True),
    ],
)
def test_options_of_the_wrong_type(directory, name, value):
    shown = re.escape(repr(value["heads"] if isinstance(value, dict) else value))
    with pytest.raises(TypeError, match=f"{name}.*{shown}"):
        LLM(str(directory()), **{name: value})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("max_seqs", "max_num_seqs"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("max_model_length", "max_model_len"),
    ],
)
def test_unknown_options_name_the_nearest(directory, wrong, nearest):
    """nano-vLLM dropped options that it did not know."""
    with pytest.raises(TypeError, match=f"{wrong}.*did you mean '{nearest}'"):
        LLM(str(directory()), **{wrong: 1})


@pytest.mark.parametrize("wrong", ["xyzzy", "model_path", "platform", "do_sample"])
def test_a_name_that_is_near_to_none_gets_no_guess(directory, wrong):
    """`trust_remote_code` once got 'seed'."""
    with pytest.raises(TypeError, match=rf"{wrong}'\. Valid: .*'seed'"):
        LLM(str(directory()), **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trust_remote_code", "no code of a checkpoint is run"),
        ("enable_prefix_caching", "always on"),
        ("block_size", "use kvcache_block_size"),
        ("num_gpu_blocks_override", "use num_kvcache_blocks"),
        ("quantization", "unquantized"),
        ("swap_space", "nothing is moved"),
    ],
)
def test_options_of_vllm_that_are_lacking_are_named_as_such(directory, name, reason):
    with pytest.raises(TypeError, match=rf"no option '{name}', which vLLM has: .*{reason}"):
        LLM(str(directory()), **{name: 1})


@pytest.mark.parametrize("of_vllm", [config.OF_VLLM, sampling_params.OF_VLLM])
def test_no_option_that_exists_is_said_to_be_lacking(of_vllm):
    names = " ".join(of_vllm.values()).split()
    assert len(names) == len({*names})
    assert not {*names} & {*EngineOptions.__annotations__, *vars(SamplingParams())}


def test_numpys_numbers_become_pythons(directory):
    config = EngineConfig.resolve(
        directory(),
        max_num_seqs=np.int64(7),
        gpu_memory_utilization=np.float32(0.5),
        enforce_eager=np.True_,
        seed=np.uint64(2**64 - 1),
        mesh_shape={"tensor": np.int32(2)},
    )
    values = [config.max_num_seqs, config.gpu_memory_utilization, config.enforce_eager, config.seed]
    assert values == [7, 0.5, True, 2**64 - 1]
    assert [*map(type, [*values, config.num_devices])] == [int, float, bool, int, int]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Qwen/Qwen3-0.6B", r"'Qwen/Qwen3-0\.6B'.*`hf download Qwen/Qwen3-0\.6B --local-dir DIR`"),
        ("/no/such/place", "'/no/such/place'; there is no such directory$"),
        ("~/model", "os.path.expanduser"),
        (__file__, "pass the directory of this file"),
        ("", "got ''"),
        (None, "got None"),
        (5, "got 5"),
    ],
)
def test_anything_but_a_local_directory_is_an_assertion_error(model, message):
    with pytest.raises(AssertionError, match=message):
        LLM(model)


def test_a_directory_without_config_json_is_an_assertion_error(tmp_path):
    with pytest.raises(AssertionError, match=str(tmp_path)):
        LLM(str(tmp_path))


def test_heads_that_cannot_be_split_name_the_valid_sizes(directory):
    with pytest.raises(
        ValueError, match=r"over 4 devices.*valid tensor parallel sizes: \[1, 2, 6\]"
    ):
        LLM(str(directory()), tensor_parallel_size=4)


def test_tied_kv_heads_are_never_split_unevenly(directory):
    with pytest.raises(ValueError, match="'heads' cannot be split over 3 devices"):
        LLM(str(directory()), tensor_parallel_size=3)


def test_both_ways_to_ask_for_a_mesh_give_the_same_config(directory):
    path = directory()
    asked = [{"tensor_parallel_size": 2}, {"mesh_shape": {"tensor": 2}}]
    asked += [{"mesh_shape": {"data": 1, "tensor": 2}, "tensor_parallel_size": 2}]
    configs = [EngineConfig.resolve(path, **options) for options in asked]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].mesh_shape == {"data": 1, "tensor": 2}
    assert (configs[0].tensor_parallel_size, configs[0].num_devices) == (2, 2)


@pytest.mark.parametrize(
    ("stored", "platform", "asked", "computes_in"),
    [
        ("bfloat16", "cpu", None, "float32"),
        ("bfloat16", "gpu", None, "bfloat16"),
        ("bfloat16", "cpu", "bfloat16", "bfloat16"),
        ("bfloat16", "gpu", "float32", "float32"),
        ("float16", "cpu", None, "float32"),
        ("float16", "gpu", "bfloat16", "bfloat16"),
    ],
)
def test_the_platform_and_the_user_settle_the_dtype(
    directory, stored, platform, asked, computes_in
):
    path = directory(dtype=stored)
    config = EngineConfig.resolve(path, platform, dtype=asked)
    assert config.model_config.dtype == computes_in


def test_float16_on_a_gpu_is_refused_with_the_types_to_ask_for(directory):
    path = directory(dtype="float16")
    with pytest.raises(ValueError, match=r"config\.json: dtype='float16'.*dtype='bfloat16'"):
        EngineConfig.resolve(path, "gpu")


def test_options_are_documented_where_users_look():
    for name in EngineOptions.__annotations__:
        assert f"{name}:" in LLM.__doc__


# --- a request's options ---


def test_sampling_params_defaults():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (1.0, 64, False)
    assert params.detokenize and params.seed is None and params.stop_token_ids is None
    assert not params.filters
    positional = SamplingParams(0.6, 256, True)
    assert (positional.temperature, positional.max_tokens, positional.ignore_eos) == (
        0.6,
        256,
        True,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"min_p": float("nan")},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"max_tokens": 0},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_tokens": -1},
        {"min_tokens": 65},  # above max_tokens
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"logprobs": -1},
        {"logprobs": 21},
        {"prompt_logprobs": 21},
    ],
)
def test_sampling_params_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "0"},
        {"temperature": True},
        {"max_tokens": 1.0},
        {"top_k": 1.5},
        {"seed": "x"},
        {"ignore_eos": 1},
        {"stop_token_ids": 5},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": ["a"]},
        {"detokenize": None},
        {"stop_token_ids": b"ab"},
        {"stop_token_ids": [True]},
        {"stop_token_ids": [[1]]},
        {"temperature": np.array([1.0])},
        {"max_tokens": np.float32(3)},
        {"seed": True},
        {"logprobs": True},
        {"prompt_logprobs": "1"},
        {"min_tokens": None},
        {"presence_penalty": "0"},
        {"logit_bias": [1, 2]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: "1"}},
        {"allowed_token_ids": 5},
        {"allowed_token_ids": [1.0]},
        {"bad_words": "word"},
        {"bad_words": [5]},
    ],
)
def test_sampling_params_of_the_wrong_type(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(TypeError, match=name):
        SamplingParams(**wrong)


def test_negative_stop_tokens_are_refused():
    with pytest.raises(ValueError, match="each of stop_token_ids must be 0 or more, got -1"):
        SamplingParams(stop_token_ids=[3, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {-1: 1.0}}, "each of logit_bias must be 0 or more, got -1"),
        ({"logit_bias": {3: -math.inf}}, "logit_bias of token 3 .* got -inf; .*allowed_token_ids"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 must be in .* got nan"),
        ({"allowed_token_ids": []}, "allowed_token_ids must name at least one token"),
        ({"bad_words": ["a", " "]}, "each of bad_words must have more than spaces, got ' '"),
        ({"bad_words": ["\ud800"]}, "not valid Unicode"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens .* no more than max_tokens=5, got 6"),
    ],
)
def test_lists_with_what_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_frozen_params_keep_nothing_of_the_users_lists():
    lists = {"logit_bias": {np.int64(3): np.float32(0.5)}, "allowed_token_ids": [np.int32(4)]}
    lists |= {"bad_words": ["a"], "stop_token_ids": [5]}
    frozen = SamplingParams(**lists, logprobs=np.int64(2), min_tokens=1).frozen()
    lists["logit_bias"][9] = 9.0
    for name in ("allowed_token_ids", "bad_words", "stop_token_ids"):
        lists[name].append(9)
    assert frozen.logit_bias == {3: 0.5} and frozen.allowed_token_ids == (4,)
    assert frozen.bad_words == ("a",) and frozen.stop_token_ids == {5}
    assert type(frozen.logprobs) is int and {*map(type, frozen.logit_bias)} == {int}
    assert SamplingParams(max_tokens=None, min_tokens=900).min_tokens == 900


@pytest.mark.parametrize(
    ("options", "changes", "needs_all"),
    [
        ({}, False, False),
        ({"top_k": 5, "prompt_logprobs": 3}, False, False),
        ({"logprobs": 0}, False, True),
        *(
            ({name: value}, True, True)
            for name, value in {
                "presence_penalty": 0.1, "frequency_penalty": -0.1, "repetition_penalty": 1.01,
                "min_tokens": 1, "logit_bias": {0: 1}, "allowed_token_ids": [0], "bad_words": ["x"],
            }.items()
        ),
    ],
)  # fmt: skip
def test_params_know_which_program_they_need(options, changes, needs_all):
    params = SamplingParams(**options)
    assert (params.changes_logits, params.needs_sample_all) == (changes, needs_all)


@pytest.mark.parametrize("seed", [None, 0, -1, -(2**63), 2**64 - 1])
def test_seeds_have_64_bits(seed):
    assert SamplingParams(seed=seed).seed == seed
