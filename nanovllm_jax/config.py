"""EngineConfig: the engine's options, checked and completed once."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from nanovllm_jax.checks import check_types, check_values
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sharding import MESH_AXES, Rule, merge_rules

DTYPES = ("float32", "bfloat16")
CHOICES = {
    "attention_backend": ("auto", "triton", "mosaic", "xla"),
    "kv_cache_dtype": ("auto", "fp8"),
    "load_format": ("auto", "dummy"),
}


class EngineOptions(TypedDict, total=False):
    """The keywords of `LLM`, whose docstring explains them; EngineConfig has their defaults."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    mesh_shape: Mapping[str, int] | None
    sharding_rules: Mapping[str, Rule] | None
    enforce_eager: bool
    kvcache_block_size: int
    num_kvcache_blocks: int | None
    dtype: str | None
    kv_cache_dtype: str
    seed: int
    async_scheduling: bool
    attention_backend: str
    load_format: str


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options as it runs with them. Made by `resolve`, and never changed.

    `model_config.dtype` is what the model computes in, `mesh_shape` names every axis of the mesh,
    and `sharding_rules` every logical axis.
    """

    model: str
    model_config: ModelConfig
    mesh_shape: Mapping[str, int]
    sharding_rules: Mapping[str, Rule]
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int | None = None
    dtype: str | None = None  # what the user asked for
    kv_cache_dtype: str = "auto"
    seed: int = 0
    async_scheduling: bool = True
    attention_backend: str = "auto"
    load_format: str = "auto"

    @classmethod
    def resolve(
        cls, model: str | Path, *, platform: str | None = None, **options: Any
    ) -> "EngineConfig":
        """Check the user's options and complete them from config.json.

        Args:
            model: the model's directory.
            platform: "cpu" or "gpu", as for `on`; None: to be said later.

        Raises:
            AssertionError: `model` is no local directory with a config.json.
            TypeError: an option is unknown (the nearest valid one is named) or of the wrong type.
            ValueError: an option lies out of range, with its value and the range.
        """
        for name in options:
            if name not in (known := list(EngineOptions.__annotations__)):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise TypeError(
                    f"LLM() has no option {name!r}; did you mean {near!r}? Valid: {known}"
                )
        path = Path(model)
        assert path.is_dir(), f"model must be a local directory, got {str(model)!r}"
        assert (path / "config.json").is_file(), f"{path} has no config.json"
        check_types(cls, options)
        model_config = ModelConfig.from_directory(path)
        dtype = options.get("dtype")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {dtype!r} is not supported; pass dtype= one of {DTYPES}")
        asked = options.get("max_model_len", cls.max_model_len)
        completed: dict[str, Any] = {
            "mesh_shape": _mesh_shape(options),
            "sharding_rules": _rules(options.get("sharding_rules")),
            "max_model_len": min(asked, model_config.max_position_embeddings),
        }
        given = {name: value for name, value in options.items() if name != "tensor_parallel_size"}
        config = cls(
            str(path),
            replace(model_config, dtype=dtype or model_config.dtype),
            **(given | completed),
        )
        return config.on(platform) if platform else config

    def __post_init__(self):
        longest, size, blocks = self.max_model_len, self.kvcache_block_size, self.num_kvcache_blocks
        requirements = {
            "max_num_seqs": (self.max_num_seqs >= 1, "at least 1"),
            "max_model_len": (longest >= 2, "at least 2 (a prompt and an output token)"),
            "max_num_batched_tokens": (
                self.max_num_batched_tokens >= longest,
                f"at least max_model_len={longest}",
            ),
            "gpu_memory_utilization": (0 < self.gpu_memory_utilization <= 1, "in (0, 1]"),
            "kvcache_block_size": (size > 0 and size % 256 == 0, "a positive multiple of 256"),
            "num_kvcache_blocks": (blocks is None or blocks >= 1, "at least 1, or None to size it"),
        }
        for name, valid in CHOICES.items():
            requirements[name] = (getattr(self, name) in valid, f"one of {valid}")
        check_values(self, requirements)

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that the model is split over."""
        return self.mesh_shape["tensor"]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh_shape["data"] * self.mesh_shape["tensor"]

    def on(self, platform: str) -> "EngineConfig":
        """The config for a platform: a CPU computes in float32 unless the user said otherwise.

        (XLA's CPU backend converts bfloat16 operands at every use: 7 times slower.)
        """
        if platform == "cpu" and self.dtype is None:
            return replace(self, model_config=replace(self.model_config, dtype="float32"))
        if self.model_config.dtype not in DTYPES:
            raise ValueError(
                f"config.json: dtype={self.model_config.dtype!r} is not computed on this platform; "
                f"pass dtype='bfloat16', or dtype='float32', which keeps every bit"
            )
        return self


def _mesh_shape(options: Mapping[str, Any]) -> Mapping[str, int]:
    """Devices along every axis of the mesh, from either of the two options that say so."""
    size, given = options.get("tensor_parallel_size", 1), options.get("mesh_shape")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"tensor_parallel_size must be an integer, got {size!r}")
    if not 1 <= size <= 8:
        raise ValueError(f"tensor_parallel_size must be between 1 and 8, got {size}")
    if not isinstance(given, Mapping | None):
        raise TypeError(f"mesh_shape must be a dict or None, got {given!r}")
    mesh = dict(given or {"tensor": size})
    for axis, n in mesh.items():
        if axis not in MESH_AXES:
            raise ValueError(f"mesh_shape has no axis {axis!r}; valid: {list(MESH_AXES)}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"mesh_shape[{axis!r}] must be a positive integer, got {n!r}")
    if size not in (1, mesh.get("tensor", 1)):
        raise ValueError(
            f"tensor_parallel_size={size} contradicts mesh_shape={given}; give one of them"
        )
    return {axis: mesh.get(axis, 1) for axis in MESH_AXES}


def _rules(given: Any) -> Mapping[str, Rule]:
    """The table of sharding rules with the user's changes."""
    if not isinstance(given, Mapping | None):
        raise TypeError(f"sharding_rules must be a dict or None, got {given!r}")
    return merge_rules(given or {})
