"""ModelConfig: what config.json says about the model, read once and checked."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3-like decoder.

    `from_directory` reads it from a checkpoint and `sharded` adapts it to a mesh.

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

    def sharded(self, shards: Callable[[str], int]) -> "ModelConfig":
        """The equivalent config for a sharded model, in which every axis divides.

        It computes the same function: KV heads are copied if there are more shards than heads, and
        the vocabulary is padded.

        Args:
            shards: maps a logical axis to the number of parts that it is split into.

        Raises:
            ValueError: heads, hidden units of the MLP or the hidden size cannot be split so.
        """
        for axis in ("heads", "ffn", "embed", "activation_embed"):
            if not self._splits(axis, shards(axis)):
                valid = [
                    n for n in range(1, 9) if self._splits("heads", n) and self._splits("ffn", n)
                ]
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

    def _splits(self, axis: str, parts: int) -> bool:
        """Whether an axis can be split into that many equal parts."""
        if axis == "heads":  # a KV head that has no device of its own is copied
            kv_heads = self.num_kv_heads
            return self.num_heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)
        sizes = {"ffn": self.intermediate_size}
        return sizes.get(axis, self.hidden_size) % parts == 0

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

    def as_json(self) -> dict[str, Any]:
        """The config.json of this model, in the spelling that transformers 4 and 5 both read."""
        eos = list(self.eos_token_ids)
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size - self.vocab_padding,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads // self.kv_head_copies,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


def read_json(path: Path) -> dict:
    """Read a JSON file; ValueError names the file if it holds none."""
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
