"""Turns a GGUF file of a Llama or Qwen model into a directory that `LLM` loads.

    python -m scripts.convert_gguf MODEL.gguf OUT_DIR [--dtype bfloat16]

The weights are dequantized and written in one type, a few rows at a time, so that the memory needed
does not grow with the model. OUT_DIR appears when it is complete. What the engine does not compute
is refused by its key, before anything is written. Needs the extra `gguf`.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from nanovllm_jax.files import check_readable
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tensor_files import INDEX, SINGLE
from nanovllm_jax.tokenizer import load_tokenizer
from nanovllm_jax.tools.options import Parser, UsageError, refusals
from scripts.gguf_tokenizer import GGUFTokenizer, read_tokenizer

# A type's name in safetensors, and NumPy's type.
DTYPES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
}
SHARD_BYTES = 5 * 10**9  # Largest file of weights; larger models get several and an index.
CHUNK = 2**22  # Weights that are dequantized at a time.


@dataclass(frozen=True)
class Family:
    """What sets an architecture's files apart."""

    architecture: str  # as config.json names it
    is_interleaved: bool = False  # rows of q and k come in the order of RoPE on neighbours
    has_qkv_bias: bool = False
    has_qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", is_interleaved=True),
    "qwen2": Family("Qwen2ForCausalLM", has_qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", has_qk_norm=True),
}
TABLE, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Keys behind the architecture's name that are read, or whose only value changes nothing.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.finetuned": None}
NEUTRAL |= {"tensor_data_layout": None, "attention.causal": True}
READ = ("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size")
READ += ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
READ += ("attention.key_length", "attention.value_length", "rope.dimension_count")
READ += ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
READ += ("rope.scaling.original_context_length",)

# Meta's scaling of RoPE in all published Llama 3.x, but for the factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFFile:
    """The keys and tensors of a GGUF file; nothing of the tensors is read yet.

    Raises:
        ValueError: it is none, is truncated, or has a key or type that the gguf package lacks.
        UsageError: the gguf package is not installed.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise UsageError('gguf is not installed: pip install "nanovllm-jax[gguf]"') from None
        check_readable(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
        try:
            reader = gguf.GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{path} is truncated or damaged, or newer than the gguf package: {error}; "
                f"download it again, or upgrade gguf"
            ) from error
        self.path, self.values = path, values
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        size = path.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ValueError(f"{path} is truncated at {tensor.name}; download it again")
        self._dequantize = gguf.dequantize

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in NumPy's order, [out, in]."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def check_types(self) -> None:
        """Raise ValueError if a tensor has a type that cannot be dequantized."""
        known = set()
        for tensor in self.tensors.values():
            if (kind := tensor.tensor_type) in known:
                continue
            known.add(kind)
            try:
                self._dequantize(np.array(tensor.data[:1]), kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {tensor.name} is of type {kind.name}, which the gguf package "
                    f"does not dequantize; take a file of another quantization, as Q8_0"
                ) from None

    def chunks(self, name: str, rotary_heads: int = 0) -> Iterator[np.ndarray]:
        """Dequantize a tensor, a few rows at a time, to float32.

        With `rotary_heads`, the rows of each head, which alternate between the halves that RoPE
        rotates, are put back into two halves. Whole rows are quantized, so this needs no values.
        """
        tensor = self.tensors[name]
        rows = tensor.data
        if rotary_heads:
            order = np.arange(len(rows)).reshape(rotary_heads, -1, 2).swapaxes(1, 2).ravel()
            rows = rows[order]
        count = max(1, CHUNK // max(1, math.prod(self.shape(name)[1:])))
        for start in range(0, len(rows), count):
            # A copy, because memory that a file is mapped to need not be aligned.
            yield self._dequantize(np.array(rows[start : start + count]), tensor.tensor_type)


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written."""

    name: str  # in the checkpoint
    source: str  # in the GGUF file
    shape: tuple[int, ...]
    rotary_heads: int = 0  # see `GGUFFile.chunks`


def model_config(file: GGUFFile, dtype: str) -> dict[str, Any]:
    """Translate a file's keys into the config.json of a published model.

    Raises:
        ValueError: a key is missing, or stands for something that this does not translate; the
            message has all of them.
    """
    arch = file.values.get("general.architecture")
    if arch not in FAMILIES:
        raise ValueError(
            f"{file.path}: general.architecture={arch!r} is not supported; have "
            f"{', '.join(FAMILIES)}"
        )
    if (parts := file.values.get("split.count", 1)) > 1:
        raise ValueError(
            f"{file.path} is one of {parts} parts; merge them first: `llama-gguf-split --merge`"
        )
    keys = {
        key.removeprefix(f"{arch}."): value
        for key, value in file.values.items()
        if key.startswith(f"{arch}.")
    }
    problems = [
        f"{arch}.{key}={value!r:.80} is not supported"
        for key, value in keys.items()
        if key not in READ and (key not in NEUTRAL or NEUTRAL[key] not in (None, value))
    ]

    def number(key: str, default: Any = None) -> Any:
        value = keys.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one for each layer
            value = value[0]
        if value is None:
            problems.append(f"{arch}.{key} is missing")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            problems.append(f"{arch}.{key} must be a positive number, got {value!r:.80}")
        else:
            return value
        return 1  # so that the other keys can be judged, too

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            problems.append(f"{arch}.{key}={keys[key]!r} is not the head's size, {head_dim}")
    vocab_size = number("vocab_size", file.shape(TABLE)[0] if TABLE in file.tensors else None)
    family = FAMILIES[arch]
    config = {
        "architectures": [family.architecture],
        "model_type": arch,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _decimal(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, keys, head_dim, problems),
        "tie_word_embeddings": HEAD not in file.tensors,
        "torch_dtype": dtype,
    }
    if arch == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif arch == "qwen3":
        config |= {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
    else:
        config |= {"use_sliding_window": False}
    if problems:
        raise ValueError(f"{file.path}: {'; '.join(problems)}")
    return config


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    file: GGUFFile, keys: Mapping[str, Any], head_dim: int, problems: list[str]
) -> dict[str, Any] | None:
    """The rope_scaling of config.json, from the keys or from the tensor that divides frequencies.

    What cannot be said in config.json is added to `problems`.
    """
    kind = keys.get("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        stored = np.concatenate(list(file.chunks(ROPE_FACTORS)))
        factor = float(stored.max())
        theta = keys.get("rope.freq_base", 10000.0)
        if kind != "none" or not np.allclose(
            stored, _llama3_factors(factor, head_dim, theta), 1e-4
        ):
            problems.append(f"{ROPE_FACTORS} is not the scaling of Llama 3.1, nor of a later one")
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    if kind == "none":
        return None
    factor, original = (
        keys.get(f"rope.scaling.{key}") for key in ("factor", "original_context_length")
    )
    if kind not in ("linear", "yarn"):
        problems.append(f"rope.scaling.type={kind!r} is not supported; linear, yarn and none are")
    elif factor is None or (original is None and kind == "yarn"):
        problems.append(f"rope.scaling.type={kind!r} needs its factor and original_context_length")
    elif kind == "linear":
        return {"rope_type": "linear", "factor": _decimal(factor)}
    return {
        "rope_type": kind,
        "factor": _decimal(factor or 1.0),
        "original_max_position_embeddings": original,
    }


def _llama3_factors(factor: float, head_dim: int, theta: float) -> np.ndarray:
    """What Llama 3.1 divides RoPE's frequencies by, [head_dim / 2].

    Long waves are stretched by `factor`, short ones are kept, and those between are interpolated
    (transformers' `_compute_llama3_parameters`).
    """
    low, high, original = LLAMA3.values()
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)


def model_tensors(file: GGUFFile, config: Mapping[str, Any]) -> list[Tensor]:
    """List the checkpoint's tensors with where each comes from.

    Raises:
        ValueError: the file lacks one, has another, or one of another shape than config.json's.
    """
    family = FAMILIES[config["model_type"]]
    d, ffn, h = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv = {"q": heads, "k": kv_heads, "v": kv_heads}

    def rotary(part: str) -> int:
        return qkv[part] if family.is_interleaved and part != "v" else 0

    def layer(i: int) -> Iterator[Tensor]:
        def tensor(
            name: str, source: str, *shape: int, kind: str = "weight", rotary_heads: int = 0
        ):
            names = f"model.layers.{i}.{name}.{kind}", f"blk.{i}.{source}.{kind}"
            return Tensor(*names, shape, rotary_heads)

        yield tensor("input_layernorm", "attn_norm", d)
        for part, count in qkv.items():
            names = f"self_attn.{part}_proj", f"attn_{part}"
            yield tensor(*names, count * h, d, rotary_heads=rotary(part))
            if family.has_qkv_bias:
                yield tensor(*names, count * h, kind="bias", rotary_heads=rotary(part))
        if family.has_qk_norm:
            yield tensor("self_attn.q_norm", "attn_q_norm", h)
            yield tensor("self_attn.k_norm", "attn_k_norm", h)
        yield tensor("self_attn.o_proj", "attn_output", d, heads * h)
        yield tensor("post_attention_layernorm", "ffn_norm", d)
        yield tensor("mlp.gate_proj", "ffn_gate", ffn, d)
        yield tensor("mlp.up_proj", "ffn_up", ffn, d)
        yield tensor("mlp.down_proj", "ffn_down", d, ffn)

    tensors = [Tensor("model.embed_tokens.weight", TABLE, (config["vocab_size"], d))]
    for i in range(config["num_hidden_layers"]):
        tensors += layer(i)
    tensors.append(Tensor("model.norm.weight", "output_norm.weight", (d,)))
    if not config["tie_word_embeddings"]:
        tensors.append(Tensor("lm_head.weight", HEAD, (config["vocab_size"], d)))

    wanted = {tensor.source: tensor.shape for tensor in tensors}
    problems = {
        "missing": [name for name in wanted if name not in file.tensors],
        "unexpected": [name for name in file.tensors if name not in {*wanted, ROPE_FACTORS}],
        "wrongly shaped": [
            f"{name} has {file.shape(name)}, the keys imply {shape}"
            for name, shape in wanted.items()
            if name in file.tensors and file.shape(name) != shape
        ],
    }
    said = [
        f"{kind}: {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
        for kind, names in problems.items()
        if names
    ]
    if said:
        raise ValueError(f"{file.path}: the tensors do not fit the keys; {'; '.join(said)}")
    return tensors


def write_weights(folder: Path, file: GGUFFile, tensors: Sequence[Tensor], dtype: str) -> None:
    """Write the tensors as safetensors, in several files with an index if they are large.

    The format's own library wants all tensors of a file in memory; this needs a few rows of one.
    """
    size = np.dtype(DTYPES[dtype][1]).itemsize
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if (filled := filled + size * math.prod(tensor.shape)) > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = size * math.prod(tensor.shape)
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as out:
            _write_shard(out, file, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = size * sum(math.prod(tensor.shape) for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(out: BinaryIO, file: GGUFFile, tensors: Sequence[Tensor], dtype: str) -> None:
    """Write one safetensors file: the length of a JSON header, the header, the tensors' bytes."""
    name, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + np.dtype(kind).itemsize * math.prod(tensor.shape)
        entry = {"dtype": name, "shape": tensor.shape, "data_offsets": [begin, end]}
        header[tensor.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for chunk in file.chunks(tensor.source, tensor.rotary_heads):
            with np.errstate(over="ignore"):
                values = chunk.astype(kind)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{file.path}: {tensor.source} has values that {dtype} does not hold, or that "
                    f"are no numbers; try --dtype float32, or download it again"
                )
            out.write(values.tobytes())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, made: GGUFTokenizer, max_length: int) -> None:
    """Write the tokenizer, and check that what the engine will load is the file's own.

    Raises:
        ValueError: a token has another id than in the file, or a text other tokens.
    """
    made.tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", made.config(max_length))
    loaded = load_tokenizer(folder)
    assert loaded is not None
    ids = list(range(len(made.tokens)))
    if loaded.convert_ids_to_tokens(ids) != list(made.tokens):
        raise ValueError(f"{folder}: the tokenizer's ids are not those of the file")
    text = "It's 12345 o'clock,\r\n\n  {x: 'é 日本 🙂'}\t" + "".join(
        made.tokens[i] for i in made.ends
    )
    if loaded(text)["input_ids"] != made.tokenizer.encode(text).ids:
        raise ValueError(f"{folder}: transformers splits text otherwise than the file's tokenizer")


def convert(path: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Convert a GGUF file into a new directory, which appears when it is complete.

    Raises:
        ValueError: the file is damaged, or holds what cannot be converted.
        OSError: the directory exists, the file does not, or the disk has too little room.
    """
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists; remove it, or name another directory")
    file = GGUFFile(path)
    config = model_config(file, dtype)
    tensors = model_tensors(file, config)
    file.check_types()
    try:
        made = read_tokenizer(file.values, config["vocab_size"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config |= {f"{kind}_token_id": made.special[kind] for kind in ("bos",) if kind in made.special}
    config["eos_token_id"] = made.special.get("eos")

    folder.parent.mkdir(parents=True, exist_ok=True)
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    needed = count * np.dtype(DTYPES[dtype][1]).itemsize
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise OSError(f"{folder} needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} free")
    print(f"{path.name}: {config['architectures'][0]}, {count:,} weights", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        work = Path(name) / "model"
        work.mkdir()
        write_json(work / "config.json", config)
        generation = {"eos_token_id": made.ends, **_token_ids(made)}
        write_json(work / "generation_config.json", generation)
        ModelConfig.from_directory(work)  # refuses now what the engine would refuse then
        write_tokenizer(work, made, config["max_position_embeddings"])
        write_weights(work, file, tensors, dtype)
        work.rename(folder)
    print(f"{folder}: {needed / 1e6:,.1f} MB of {dtype}")


def _token_ids(made: GGUFTokenizer) -> dict[str, int]:
    return {
        f"{kind}_token_id": made.special[kind] for kind in ("bos", "pad") if kind in made.special
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if the directory was written, 2 for bad usage or a file that cannot be converted."""
    parser = Parser(description="Convert a GGUF file into a directory that LLM loads.")
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="must not exist yet")
    kinds = "type of the weights written (default: bfloat16)"
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help=kinds)
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        with refusals(ValueError, OSError):
            convert(args.file, args.folder, args.dtype)
    except UsageError as error:
        print(f"convert_gguf: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
