"""EngineConfig: the engine's options, checked and completed once."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from nanovllm_jax.checks import (
    alternatives,
    check_names,
    check_types,
    check_values,
    is_integer,
    seed_rule,
)
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sharding import MESH_AXES, Rule, merge_rules

log = logging.getLogger("nanovllm_jax")

DTYPES = ("float32", "bfloat16")
CHOICES = {
    "attention_backend": ("auto", "triton", "mosaic", "xla"),
    "kv_cache_dtype": ("auto", "fp8"),
    "load_format": ("auto", "dummy"),
}

# Options of vLLM that this engine lacks, by the reason.
OF_VLLM = {
    "no code of a checkpoint is run": "trust_remote_code",
    "everything is read from the model's directory": "tokenizer tokenizer_mode revision "
    "tokenizer_revision download_dir hf_token hf_overrides config_format skip_tokenizer_init",
    "options of sampling are passed as SamplingParams": "generation_config "
    "override_generation_config",
    "it computes in dtype, with unquantized weights": "quantization",
    "prefix caching is always on": "enable_prefix_caching",
    "prompts are always computed in chunks": "enable_chunked_prefill",
    "use kvcache_block_size": "block_size",
    "use num_kvcache_blocks or gpu_memory_utilization": "num_gpu_blocks_override "
    "kv_cache_memory_bytes",
    "nothing is moved to the host's memory": "swap_space cpu_offload_gb",
    "use mesh_shape": "pipeline_parallel_size data_parallel_size",
    "one process drives all devices of a host": "distributed_executor_backend worker_cls",
    "the fastest all-reduce is chosen by itself": "disable_custom_all_reduce",
    "steps are compiled in advance unless enforce_eager=True": "compilation_config "
    "max_seq_len_to_capture",
    "log probabilities are not returned": "max_logprobs",
    "no statistics are logged": "disable_log_stats",
    "it has no adapters": "enable_lora max_loras max_lora_rank",
    "it guesses no tokens ahead": "speculative_config speculative_model num_speculative_tokens",
    "outputs follow no grammar": "guided_decoding_backend structured_outputs_config",
    "it reads and writes text only": "limit_mm_per_prompt mm_processor_kwargs task runner",
    "RoPE is set in config.json": "rope_scaling rope_theta",
    "JAX chooses the devices; set JAX_PLATFORMS": "device",
}


class EngineOptions(TypedDict, total=False):
    """The keywords of `LLM`, whose docstring explains them; EngineConfig has their defaults."""

    max_num_batched_tokens: int
    chunked_prefill_size: int | None
    enable_mixed_chunk: bool
    max_num_seqs: int
    max_model_len: int
    num_scheduler_steps: int
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
    chunked_prefill_size: int | None = None
    enable_mixed_chunk: bool = False
    max_num_seqs: int = 512
    max_model_len: int = 4096
    num_scheduler_steps: int = 4
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
        cls, model: str | Path, platform: str | None = None, /, **options: Any
    ) -> "EngineConfig":
        """Check the user's options and complete them from config.json.

        Args:
            model: the model's directory.
            platform: "cpu" or "gpu", as for `on`; None: to be said later.

        Raises:
            AssertionError: `model` is no local directory with a config.json.
            TypeError: an option is unknown (a near valid one is named) or of the wrong type.
            ValueError: an option lies out of range, with its value and the range.
        """
        check_names("LLM()", options, EngineOptions.__annotations__, OF_VLLM)
        path = _checked_directory(model)
        options = check_types(cls, options)
        model_config = ModelConfig.from_directory(path)
        dtype = options.get("dtype")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {dtype!r} is not supported; pass dtype= one of {DTYPES}")
        asked = options.get("max_model_len", cls.max_model_len)
        window = model_config.sliding_window
        if window is not None and asked > window:
            log.warning(
                "sliding_window=%d: attention to a window is not computed; max_model_len is %d, up "
                "to which it makes no difference", window, model_config.longest_context,
            )  # fmt: skip
        completed: dict[str, Any] = {
            "mesh_shape": _mesh_shape(options),
            "sharding_rules": _rules(options.get("sharding_rules")),
            "max_model_len": min(asked, model_config.longest_context),
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
        most, chunk = self.max_num_batched_tokens, self.chunked_prefill_size
        requirements = {
            "max_num_seqs": (self.max_num_seqs >= 1, "at least 1"),
            "max_model_len": (longest >= 2, "at least 2 (a prompt and an output token)"),
            "max_num_batched_tokens": (
                most >= longest,
                f"at least max_model_len={longest}",
            ),
            "chunked_prefill_size": (
                chunk is None or 1 <= chunk <= most,
                f"between 1 and max_num_batched_tokens={most}, or None for no other limit",
            ),
            "gpu_memory_utilization": (0 < self.gpu_memory_utilization <= 1, "in (0, 1]"),
            "kvcache_block_size": (size > 0 and size % 256 == 0, "a positive multiple of 256"),
            "num_kvcache_blocks": (blocks is None or blocks >= 1, "at least 1, or None to size it"),
            "num_scheduler_steps": (1 <= self.num_scheduler_steps <= 64, "between 1 and 64"),
            "seed": seed_rule(self.seed),
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


def _checked_directory(model: Any) -> Path:
    """The model's directory.

    Raises:
        AssertionError: as nano-vLLM's `assert` does, also under `python -O`, where that is gone.
    """
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise AssertionError(f"model must be a local directory, got {model!r}")
    path = Path(model)
    if not path.is_dir():
        remedy = "; there is no such directory"
        if path.is_file():
            remedy = "; pass the directory of this file"
        elif str(model).startswith("~"):
            remedy = "; expand '~' with os.path.expanduser"
        elif len(path.parts) == 2 and not path.is_absolute():  # it may be a name of the Hub
            remedy += f"; download from the Hub by `hf download {model} --local-dir DIR`, pass DIR"
        raise AssertionError(f"model must be a local directory, got {str(model)!r}{remedy}")
    if not (path / "config.json").is_file():
        raise AssertionError(f"{path} has no config.json; pass the directory that holds it")
    return path


def _mesh_shape(options: Mapping[str, Any]) -> Mapping[str, int]:
    """Devices along every axis of the mesh, from either of the two options that say so."""
    size, given = options.get("tensor_parallel_size", 1), options.get("mesh_shape")
    if not is_integer(size):
        raise TypeError(f"tensor_parallel_size must be an integer, got {size!r}")
    if not 1 <= size <= 8:
        raise ValueError(f"tensor_parallel_size must be between 1 and 8, got {size}")
    if not isinstance(given, Mapping | None):
        raise TypeError(f"mesh_shape must be a dict or None, got {given!r}")
    mesh = dict(given or {"tensor": size})
    for axis, n in mesh.items():
        if axis not in MESH_AXES:
            raise ValueError(f"mesh_shape has no axis {axis!r}{alternatives(axis, MESH_AXES)}")
        if not is_integer(n) or n < 1:
            raise ValueError(f"mesh_shape[{axis!r}] must be a positive integer, got {n!r}")
    if size not in (1, mesh.get("tensor", 1)):
        raise ValueError(
            f"tensor_parallel_size={size} contradicts mesh_shape={given}; give one of them"
        )
    return {axis: int(mesh.get(axis, 1)) for axis in MESH_AXES}


def _rules(given: Any) -> Mapping[str, Rule]:
    """The table of sharding rules with the user's changes."""
    if not isinstance(given, Mapping | None):
        raise TypeError(f"sharding_rules must be a dict or None, got {given!r}")
    return merge_rules(given or {})
