"""EngineConfig: the engine's options. ModelConfig: what config.json says of the model."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanovllm_jax.checks import check_types, check_values
from nanovllm_jax.sharding import MESH_AXES, Rule, merge_rules

DTYPES = ("float32", "bfloat16")
CHOICES = {
    "attention_backend": ("auto", "triton", "mosaic", "xla"),
    "kv_cache_dtype": ("auto", "fp8"),
    "load_format": ("auto", "dummy"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3-like model, read from config.json and checked.

    Raises:
        ValueError: config.json asks for something that the engine does not compute.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    kv_head_copies: int = 1  # num_kv_heads counts every copy
    vocab_padding: int = 0  # vocab_size counts the padding

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: RoPE rotates pairs")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def over(self, shards: Callable[[str], int]) -> "ModelConfig":
        """This model cut into `shards(axis)` parts along each logical axis: the same function, with
        each KV head copied where there are more shards than heads, and the vocabulary padded.

        Raises:
            ValueError: heads, hidden units of the MLP or the hidden size cannot be split so.
        """
        for axis in ("heads", "ffn", "embed", "activation_embed"):
            if not self._divides(axis, shards(axis)):
                tensor = ("heads", "ffn")
                valid = [n for n in range(1, 9) if all(self._divides(a, n) for a in tensor)]
                raise ValueError(
                    f"{axis!r} cannot be split over {shards(axis)} devices (tensor_parallel_size "
                    f"or mesh_shape): this model has {self.num_heads} query heads, "
                    f"{self.num_kv_heads} key/value heads, intermediate_size "
                    f"{self.intermediate_size}, hidden_size {self.hidden_size}; valid tensor "
                    f"parallel sizes: {valid}"
                )
        copies = max(1, shards("kv_heads") // self.num_kv_heads)
        padding = -self.vocab_size % shards("vocab")
        return replace(
            self,
            num_kv_heads=self.num_kv_heads * copies,
            kv_head_copies=copies,
            vocab_size=self.vocab_size + padding,
            vocab_padding=padding,
        )

    def _divides(self, axis: str, shards: int) -> bool:
        kv_heads = self.num_kv_heads
        if axis == "heads":
            split = kv_heads % shards == 0 or shards % kv_heads == 0
            return split and self.num_heads % shards == 0
        return (self.intermediate_size if axis == "ffn" else self.hidden_size) % shards == 0

    @classmethod
    def from_directory(cls, path: Path) -> "ModelConfig":
        """Read config.json and, for the end-of-sequence ids, generation_config.json."""
        raw = read_json(path / "config.json")
        architectures = raw.get("architectures") or ["(none)"]
        hidden, heads = _require(raw, "hidden_size"), _require(raw, "num_attention_heads")
        for flag in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if raw.get(flag):
                raise ValueError(f"config.json: {flag}=true is not supported; only false is")
        if (activation := raw.get("hidden_act", "silu")) != "silu":
            raise ValueError(
                f"config.json: hidden_act={activation!r} is not supported; only 'silu'"
            )
        return cls(
            architecture=architectures[0],
            vocab_size=_require(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_require(raw, "intermediate_size"),
            num_layers=_require(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            max_position_embeddings=_require(raw, "max_position_embeddings"),
            rope_theta=_rope_theta(raw),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            # "torch_dtype" until transformers 4.55, "dtype" since
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
            eos_token_ids=_eos_token_ids(path, raw),
        )


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options, checked before any work. See `LLM` for what each of them means.

    Raises:
        AssertionError: `model` is no local directory with a config.json.
        TypeError: an option has the wrong type.
        ValueError: an option lies out of range, with its value and the range.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    mesh_shape: Mapping[str, int] | None = None
    sharding_rules: Mapping[str, Rule] | None = None
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int | None = None
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    seed: int = 0
    async_scheduling: bool = True
    attention_backend: str = "auto"
    load_format: str = "auto"
    model_config: ModelConfig = field(init=False)

    @classmethod
    def from_kwargs(cls, model: str, **kwargs) -> "EngineConfig":
        """Like the constructor, but an unknown keyword names its nearest valid one (TypeError)."""
        known = [f.name for f in dataclasses.fields(cls) if f.init and f.name != "model"]
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise TypeError(
                    f"LLM() has no option {name!r}; did you mean {near!r}? Valid: {known}"
                )
        return cls(model, **kwargs)

    def __post_init__(self):
        path = Path(self.model)
        assert path.is_dir(), f"model must be a local directory, got {str(self.model)!r}"
        assert (path / "config.json").is_file(), f"{path} has no config.json"
        check_types(self)
        model = ModelConfig.from_directory(path)
        dtype = self.dtype or model.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; pass dtype= one of {DTYPES}")
        longest = min(self.max_model_len, model.max_position_embeddings)
        object.__setattr__(self, "model", str(path))
        object.__setattr__(self, "model_config", replace(model, dtype=dtype))
        object.__setattr__(self, "max_model_len", longest)
        tokens, size = self.max_num_batched_tokens, self.kvcache_block_size
        blocks = self.num_kvcache_blocks
        rules = {
            "max_num_seqs": (self.max_num_seqs >= 1, "at least 1"),
            "max_model_len": (longest >= 2, "at least 2 (a prompt and an output token)"),
            "max_num_batched_tokens": (tokens >= longest, f"at least max_model_len={longest}"),
            "gpu_memory_utilization": (0 < self.gpu_memory_utilization <= 1, "in (0, 1]"),
            "tensor_parallel_size": (1 <= self.tensor_parallel_size <= 8, "between 1 and 8"),
            "kvcache_block_size": (size > 0 and size % 256 == 0, "a positive multiple of 256"),
            "num_kvcache_blocks": (blocks is None or blocks >= 1, "at least 1, or None to size it"),
        }
        for name, valid in CHOICES.items():
            rules[name] = (getattr(self, name) in valid, f"one of {valid}")
        check_values(self, rules)
        self._complete_mesh()

    def _complete_mesh(self) -> None:
        """Give `mesh_shape` and `sharding_rules` their defaults, and check them."""
        for name in ("mesh_shape", "sharding_rules"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise TypeError(f"{name} must be a dict or None, got {getattr(self, name)!r}")
        size = self.tensor_parallel_size
        mesh = dict(self.mesh_shape or {"tensor": size})
        for axis, n in mesh.items():
            if axis not in MESH_AXES:
                raise ValueError(f"mesh_shape has no axis {axis!r}; valid: {list(MESH_AXES)}")
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"mesh_shape[{axis!r}] must be a positive integer, got {n!r}")
        if size not in (1, mesh.get("tensor", 1)):
            raise ValueError(
                f"tensor_parallel_size={size} contradicts mesh_shape={self.mesh_shape}; give one "
                "of them"
            )
        object.__setattr__(self, "mesh_shape", mesh)
        object.__setattr__(self, "sharding_rules", merge_rules(self.sharding_rules or {}))


def read_json(path: Path) -> dict:
    """A JSON file's content; ValueError names the file that holds none."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _require(raw: dict, key: str) -> int:
    if not isinstance(raw.get(key), int):
        raise ValueError(f"config.json: {key} must be an integer, got {raw.get(key)!r}")
    return raw[key]


def _rope_theta(raw: dict) -> float:
    """RoPE base from either spelling: flat keys (transformers 4) or rope_parameters (5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type != "default":
        raise ValueError(f"config.json: rope_type {rope_type!r} is not supported; only 'default'")
    return float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)


def _eos_token_ids(path: Path, raw: dict) -> tuple[int, ...]:
    """End-of-sequence ids; generation_config.json's list wins over config.json's single id."""
    eos = None
    if (generation := path / "generation_config.json").is_file():
        eos = read_json(generation).get("eos_token_id")
    if eos is None:
        eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
