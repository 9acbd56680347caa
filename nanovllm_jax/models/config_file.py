"""Reads config.json: the values that count, or all reasons to refuse the model at once.

A missing key means what the architecture's own class in transformers means by it. Whatever would
change the result and is not computed is refused by its name and value; what has no effect is not.
"""

from pathlib import Path
from typing import Any

from nanovllm_jax.files import is_there, read_json
from nanovllm_jax.models.rope_settings import rope_theta
from nanovllm_jax.quantization import other_method, read_blocks

# The supported architectures: their model_type, and the values of missing keys.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
}
DTYPES = ("float32", "float16", "bfloat16")  # of checkpoints; an engine computes in fewer
LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 10_000  # Sizes beyond these are taken for damage.
QUANTIZATION = ("quantization", "compression_config")  # of formats that are not read

# Settings of other decoders, and the value with which they change nothing. None never does.
NEUTRAL = {
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "no_rope_layers": None,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "per_layer_config": {},
}


def read_settings(directory: Path) -> dict[str, Any]:
    """Read config.json and, for further end tokens, generation_config.json.

    Returns:
        The fields of `ModelConfig`.

    Raises:
        ValueError: the model is not computed, or a value is not what it must be; all such values
            are named.
    """
    file = directory / "config.json"
    raw = read_json(file)
    problems = _wrong_architecture(raw)
    if problems:  # the other keys of another architecture may mean anything
        raise ValueError(f"{file}: {problems[0]}")
    [architecture] = raw["architectures"]
    settings, problems = _settings({**ARCHITECTURES[architecture], **raw})
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    generation = directory / "generation_config.json"
    ends, vocab_size = settings["eos_token_ids"], settings["vocab_size"]
    if is_there(generation):
        more, problems = _token_ids(read_json(generation).get("eos_token_id"), vocab_size)
        if problems:
            raise ValueError(f"{generation}: {problems[0]}")
        ends = tuple(dict.fromkeys(more + ends))
    return settings | {"architecture": architecture, "eos_token_ids": ends}


def _wrong_architecture(raw: dict[str, Any]) -> list[str]:
    names, have = raw.get("architectures"), list(ARCHITECTURES)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return [f"architectures={names!r} must be a list of one name; supported: {have}"]
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        return [f"architecture {unknown[0]!r} is not supported; have {have}"]
    if len(names) > 1:
        return [f"architectures={names!r} names several; leave the one of these weights"]
    expected = ARCHITECTURES[names[0]]["model_type"]
    if (model_type := raw.get("model_type", expected)) != expected:
        return [f"model_type={model_type!r} contradicts {names[0]}, which is {expected!r}"]
    return []


def _settings(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of `ModelConfig` from a config.json with its defaults, and all problems."""
    problems = [
        f"{key}: {other_method(raw[key])}" for key in QUANTIZATION if raw.get(key) is not None
    ]
    if (quantization := raw.get("quantization_config")) is not None:
        problems += [f"quantization_config: {p}" for p in read_blocks(quantization)[1]]
    problems += [
        f"{key}={raw[key]!r:.80} is not supported; only {neutral!r} is"
        for key, neutral in NEUTRAL.items()
        if key in raw and raw[key] not in (None, neutral)
    ]

    def size(key: str, largest: int = LARGEST_SIZE, smallest: int = 1) -> int:
        value = raw[key]
        if type(value) is not int:
            problems.append(f"{key} must be an integer, got {value!r:.80}")
        elif not smallest <= value <= largest:
            problems.append(f"{key}={value!r:.30} must be between {smallest} and {largest}")
        else:
            return value
        return largest  # so that the other keys can be judged, too

    def flag(key: str) -> bool:
        if not isinstance(raw[key], bool):
            problems.append(f"{key} must be true or false, got {raw[key]!r:.80}")
        return raw[key] is True

    before = len(problems)
    heads, head_dim = size("num_attention_heads"), size("head_dim")
    kv_heads = heads if raw["num_key_value_heads"] is None else size("num_key_value_heads")
    if before == len(problems):
        if heads % kv_heads:
            problems.append(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        if head_dim % 2:
            problems.append(f"head_dim={head_dim} is odd: RoPE rotates pairs")
    eps, activation = raw["rms_norm_eps"], raw["hidden_act"]
    if type(eps) not in (int, float) or not 0 <= eps <= 1:  # NaN is not, either
        problems.append(f"rms_norm_eps must be a number between 0 and 1, got {eps!r:.80}")
    if activation not in ("silu", "swish"):  # two names of one function
        problems.append(f"hidden_act={activation!r} is not supported; only 'silu' is")
    if flag("attention_bias"):
        problems.append("attention_bias=true is not supported; only false is")
    layers, vocab_size = size("num_hidden_layers", MOST_LAYERS), size("vocab_size")
    problems += _sliding_layers(raw, layers, flag("use_sliding_window"))
    theta, wrong_rope = rope_theta(raw)
    eos_token_ids, wrong_ends = _token_ids(raw.get("eos_token_id"), vocab_size)
    dtype, wrong_dtype = _dtype(raw)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": size("hidden_size"),
        "intermediate_size": size("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": size("max_position_embeddings", smallest=2),
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "tie_word_embeddings": flag("tie_word_embeddings"),
        "dtype": dtype,
        "eos_token_ids": eos_token_ids,
    }
    return settings, problems + wrong_rope + wrong_ends + wrong_dtype


def _sliding_layers(raw: dict[str, Any], layers: int, sliding: bool) -> list[str]:
    """Problems with layers that attend to a window only; a flag that reaches no layer is none."""
    types, first, window = (raw[k] for k in ("layer_types", "max_window_layers", "sliding_window"))
    if type(first) is not int:
        return [f"max_window_layers must be an integer, got {first!r}"]
    if window is not None and type(window) is not int:
        return [f"sliding_window must be an integer or null, got {window!r}"]
    if types is not None:  # decides alone
        if not isinstance(types, list) or len(types) != layers:
            return [f"layer_types must be a list of num_hidden_layers={layers}, got {types!r:.80}"]
        others = [name for name in types if name != "full_attention"]
        return [
            f"layer_types: {name!r} is not supported; only 'full_attention' is"
            for name in others[:1]
        ]
    if not sliding or window is None:
        return []
    if first < layers:
        return [
            f"use_sliding_window=true is not supported with max_window_layers={first} of {layers} "
            f"layers: the others would attend to a window"
        ]
    return []


def _token_ids(value: Any, vocab_size: int) -> tuple[tuple[int, ...], list[str]]:
    """The ids in eos_token_id, one or a list or null, and all problems with them."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    return tuple(i for i in ids if i not in wrong), [
        f"eos_token_id={i!r:.30} is not in the vocabulary of {vocab_size} (config.json)"
        for i in wrong[:1]
    ]


def _dtype(raw: dict[str, Any]) -> tuple[str, list[str]]:
    """The weights' type: `torch_dtype` until transformers 4.55, `dtype` since."""
    given = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    problems = [
        f"{key}={value!r} is not supported; only {', '.join(DTYPES)} are"
        for key, value in given.items()
        if value not in DTYPES
    ]
    if len(given) == 2 and given["dtype"] != given["torch_dtype"]:
        problems.append(
            f"dtype={given['dtype']!r} contradicts torch_dtype={given['torch_dtype']!r}; leave one"
        )
    return ([*given.values(), "bfloat16"][0], problems)
