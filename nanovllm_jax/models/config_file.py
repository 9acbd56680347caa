"""Reads config.json: the values that count, or all reasons to refuse the model at once.

A missing key means what the architecture's own class in transformers means by it. Whatever would
change the result and is not computed is refused by its name and value; what has no effect is not.
"""

from pathlib import Path
from typing import Any

from nanovllm_jax.files import is_there, read_json
from nanovllm_jax.models.families import ARCHITECTURES, Family
from nanovllm_jax.models.rope_settings import LAYER_TYPES, read_rope
from nanovllm_jax.quantization import other_method, read_blocks

DTYPES = ("float32", "float16", "bfloat16")  # of checkpoints; an engine computes in fewer
# Sizes beyond these are taken for damage.
LARGEST_SIZE, MOST_LAYERS, MOST_EXPERTS = 2**31 - 1, 10_000, 200_000  # experts of all layers
QUANTIZATION = ("quantization", "compression_config")  # of formats that are not read

# Settings of other decoders, and the value with which they change nothing. None never does.
NEUTRAL = {
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
    family = ARCHITECTURES[architecture]
    completed = {**family.defaults, **raw}
    if "eos_token_id" not in raw:  # the class's own belongs to its own vocabulary
        default, size = family.defaults.get("eos_token_id"), completed["vocab_size"]
        fits = default is not None and type(size) is int and default < size
        completed["eos_token_id"] = default if fits else None
    settings, problems = _settings(completed, family)
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
    expected = ARCHITECTURES[names[0]].model_type
    if (model_type := raw.get("model_type", expected)) != expected:
        return [f"model_type={model_type!r} contradicts {names[0]}, which is {expected!r}"]
    return []


def _settings(raw: dict[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """The fields of `ModelConfig` from a config.json with its defaults, and all problems."""
    problems = [
        f"{key}: {other_method(raw[key])}" for key in QUANTIZATION if raw.get(key) is not None
    ]
    if (quantization := raw.get("quantization_config")) is not None:
        problems += [f"quantization_config: {p}" for p in read_blocks(quantization)[1]]
    problems += [
        f"{key}={raw[key]!r:.80} is not supported; only {neutral!r} is"
        for key, neutral in NEUTRAL.items()
        if key in raw and key not in family.defaults and raw[key] not in (None, neutral)
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
    heads, hidden_size = size("num_attention_heads"), size("hidden_size")
    if raw["head_dim"] is None and family.defaults["head_dim"] is None:
        raw["head_dim"] = max(1, hidden_size // heads)
    head_dim = size("head_dim")
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
    layers, vocab_size = size("num_hidden_layers", MOST_LAYERS), size("vocab_size")
    positions = size("max_position_embeddings", smallest=2)
    switches = {
        switch: flag(key) if isinstance(key, str) else key
        for switch, key in family.switches.items()
    }
    for key, switch in (("attention_bias", "qkv_bias"), ("mlp_bias", "mlp_bias")):
        fixed = family.switches[switch]
        if key not in family.defaults and raw.get(key) not in (None, fixed):
            problems.append(f"{key}={raw[key]!r:.80} is not supported; only {fixed!r} is")
    unrotated, wrong_layers = _layers_without_rope(raw, layers)
    # Without such a key, a window is all layers'.
    from_layer = {} if "max_window_layers" in family.defaults else {"max_window_layers": 0}
    window, wrong_window = _sliding_window(raw | from_layer, layers, unrotated)
    experts, wrong_experts = {}, []
    if "num_experts" in family.defaults:
        count, wrong_experts = _num_experts(raw, layers)
        dense, wrong_dense = _dense_layers(raw, layers, count)
        experts = {
            "num_experts": count,
            "experts_per_token": size("num_experts_per_tok", max(1, count)),
            "expert_size": size("moe_intermediate_size"),
            "dense_layers": dense,
        }
        wrong_experts += wrong_dense
    rope, wrong_rope = read_rope(raw | {"max_position_embeddings": positions}, family.theta)
    eos_token_ids, wrong_ends = _token_ids(raw.get("eos_token_id"), vocab_size)
    dtype, wrong_dtype = _dtype(raw)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": size("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rope": rope,
        "rms_norm_eps": eps,
        "tie_word_embeddings": flag("tie_word_embeddings"),
        "dtype": dtype,
        "eos_token_ids": eos_token_ids,
        "layers_without_rope": unrotated,
        "sliding_window": window,
        **experts,
        **switches,
    }
    return settings, [
        *problems, *wrong_layers, *wrong_window, *wrong_experts, *wrong_rope, *wrong_ends,
        *wrong_dtype,
    ]  # fmt: skip


def _layers_without_rope(raw: dict[str, Any], layers: int) -> tuple[tuple[int, ...], list[str]]:
    """The layers whose queries and keys are not rotated, and all problems with that list."""
    if "no_rope_layer_interval" not in raw or "no_rope_layers" not in raw:
        return (), []
    rotated, interval = raw["no_rope_layers"], raw["no_rope_layer_interval"]
    if rotated is None:
        if type(interval) is not int or interval < 1:
            return (), [f"no_rope_layer_interval must be a positive integer, got {interval!r:.80}"]
        return tuple(range(interval - 1, layers, interval)), []
    ok = isinstance(rotated, list) and all(type(x) in (int, bool) and x in (0, 1) for x in rotated)
    if not ok or len(rotated) < layers:
        return (), [
            f"no_rope_layers must list a 1 (RoPE) or a 0 for each of num_hidden_layers={layers}, "
            f"got {rotated!r:.80}"
        ]
    return tuple(i for i in range(layers) if not rotated[i]), []


def _num_experts(raw: dict[str, Any], layers: int) -> tuple[int, list[str]]:
    """The experts of a layer, under the names of transformers 4 and 5, and all problems."""
    keys, most = ("num_experts", "num_local_experts"), MOST_EXPERTS // layers
    given = {key: raw[key] for key in keys if raw[key] is not None}
    wrong = {key: n for key, n in given.items() if type(n) is not int or not 0 <= n <= most}
    if wrong:
        return 1, [
            f"{key} must be an integer between 0 and {most}, got {n!r:.80}"
            for key, n in wrong.items()
        ]
    if len(set(given.values())) > 1:
        said = " and ".join(f"{key}={n}" for key, n in given.items())
        return 1, [f"{said} contradict each other"]
    return next(iter(given.values()), 128), []


def _dense_layers(raw: dict[str, Any], layers: int, experts: int) -> tuple[tuple[int, ...], list]:
    """The layers with an MLP in place of experts, and all problems with what says so."""
    step, listed = raw["decoder_sparse_step"], raw["mlp_only_layers"]
    listed = [] if listed is None else listed
    if type(step) is not int or step < 1:
        return (), [f"decoder_sparse_step must be a positive integer, got {step!r:.80}"]
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        return (), [f"mlp_only_layers must be a list of layers, got {listed!r:.80}"]
    return tuple(i for i in range(layers) if i in listed or (i + 1) % step or not experts), []


def _sliding_window(
    raw: dict[str, Any], layers: int, unrotated: tuple[int, ...]
) -> tuple[int | None, list[str]]:
    """How far back those layers see that do not see everything; None if all do. And problems."""
    types, window = raw["layer_types"], raw["sliding_window"]
    first = raw.get("max_window_layers", 0)
    if type(first) is not int:
        return None, [f"max_window_layers must be an integer, got {first!r}"]
    if window is not None and (type(window) is not int or not 2 <= window <= LARGEST_SIZE):
        return None, [f"sliding_window must be an integer from 2 on, or null, got {window!r:.30}"]
    flag = raw.get("use_sliding_window", True)
    if not isinstance(flag, bool):
        return None, [f"use_sliding_window must be true or false, got {flag!r:.80}"]
    if types is not None and "use_sliding_window" in raw:  # decides alone
        if not isinstance(types, list) or len(types) != layers:
            return None, [
                f"layer_types must be a list of num_hidden_layers={layers}, got {types!r:.80}"
            ]
        if others := [name for name in types if name not in LAYER_TYPES]:
            known = ", ".join(map(repr, LAYER_TYPES))
            return None, [f"layer_types: {others[0]!r} is not supported; only {known} are"]
        slides = "sliding_attention" in types
        if slides and (window is None or not flag):
            why = "sliding_window is null" if flag else "use_sliding_window is false"
            return None, [f"layer_types has 'sliding_attention', but {why}"]
        return window if slides else None, []
    which = unrotated if "no_rope_layers" in raw else range(first, layers)
    return window if flag and len(which) else None, []


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
