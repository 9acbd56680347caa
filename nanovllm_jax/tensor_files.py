"""Finds a checkpoint's tensors: which files count, and whether they hold exactly the model.

Which files count is decided by their names alone, as in transformers: those that the index maps
tensors to, or else model.safetensors. Other files beside them (adapters, averages of the weights,
states of a trainer, macOS's `._` files) do not matter.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nanovllm_jax.files import check_readable, is_there, read_json
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.models.checkpoint import HEAD, TABLE, determined_tensor, tensor_shapes
from nanovllm_jax.quantization import SCALE, Blocks, dequantize, read_blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The types that are read: an integer type to view their bits in, and the bits of infinity, which
# those of infinite and undefined values are no less than, apart from the sign.
TYPES = {"F32": (np.int32, 0x7F80_0000), "F16": (np.int16, 0x7C00), "BF16": (np.int16, 0x7F80)}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of NumPy's types
FP8 = "F8_E4M3"  # The type of weights that are dequantized, and the bits of its NaN without a sign.
FP8_NAN = 0x7F
ROWS = 4096  # Rows of a table that are compared at a time.


class Checkpoint:
    """Reads the tensors of a directory's safetensors files by name, when asked for.

    Args:
        directory: has the files, and the config.json that says how they are quantized, if at all.
        dtype: what quantized weights are dequantized to.
    """

    def __init__(self, directory: Path, dtype: Any = np.float32):
        self.directory, self.dtype = directory, dtype
        files, self.index = _files(directory)
        self.handles: dict[str, Any] = {}  # file name -> open file
        self.holders: dict[str, list[str]] = {}  # tensor -> names of the files that hold it
        for file in files:
            check_readable(file)
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged or truncated: {error}") from None
            self.handles[file.name] = handle
            for name in handle.keys():  # noqa: SIM118 (it is no dict)
                self.holders.setdefault(name, []).append(file.name)
        self.blocks = _blocks(directory)
        self.quantized = {  # shapes of the weights that are dequantized
            name: tuple(self._slice(name).get_shape())
            for name in self.holders
            if self.blocks and self._slice(name).get_dtype() == FP8
        }

    @property
    def quantized_bytes(self) -> int:
        """Bytes that the quantized weights and their scales take in the files."""
        widths = {"F32": 4, "F16": 2, "BF16": 2}
        scales = [self._slice(name + SCALE) for name in self.quantized]
        stored = sum(math.prod(x.get_shape()) * widths[x.get_dtype()] for x in scales)
        return stored + sum(map(math.prod, self.quantized.values()))

    def read(self, name: str) -> np.ndarray:
        """Read a tensor, dequantized; ValueError if it has values that are no numbers."""
        if name not in self.holders:  # `check` has allowed no other tensor to be missing
            name = HEAD
        [file] = self.holders[name]
        if name in self.quantized:
            return self._dequantized(name)
        tensor = self.handles[file].get_tensor(name)
        if not _is_finite(tensor, self._slice(name).get_dtype()):
            raise self._no_numbers(name, "has NaN or infinite values")
        return tensor

    def _dequantized(self, name: str) -> np.ndarray:
        """Read a weight of 8-bit floats and multiply it by its scales."""
        assert self.blocks is not None
        bits = _read_bytes(self.directory / self.holders[name][0], name)
        bits = bits.reshape(self.quantized[name])
        weight = dequantize(bits, self.read(name + SCALE), self.blocks, self.dtype)
        if not _is_finite(weight, NAMES[weight.dtype.name]):
            if (bits & FP8_NAN == FP8_NAN).any():
                raise self._no_numbers(name, "has NaN or infinite values")
            raise self._no_numbers(name, f"times {name}{SCALE} is larger than {weight.dtype} holds")
        return weight

    def _no_numbers(self, name: str, problem: str) -> ValueError:
        return ValueError(
            f"{self.directory / self.holders[name][0]}: {name} {problem}, with which every answer "
            f"is the same token; download it again, or take an earlier checkpoint"
        )

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError unless the files hold exactly this model.

        Nothing that they hold is dropped, except what is known to be the same as what is used.
        """
        expected, found = tensor_shapes(config), self.holders.keys()
        if config.tie_word_embeddings and HEAD in found and TABLE not in found:
            expected[HEAD] = expected.pop(TABLE)  # the one table, saved under its other name
        if self.blocks:
            for name, shape in self.quantized.items():
                if name in expected and len(shape) == 2:
                    expected[name + SCALE] = self.blocks.scales_of(shape)
        shapes = {name: tuple(self._slice(name).get_shape()) for name in found}
        types = {name: self._slice(name).get_dtype() for name in found}
        unexpected, unlike = [], []
        for name in sorted(found - expected.keys()):
            if config.tie_word_embeddings and name == HEAD:
                if shapes[HEAD] != shapes[TABLE] or not self._same(HEAD, TABLE):
                    both = f"{self._named(HEAD)} and {self._named(TABLE)}"
                    unlike.append(f"{both}, although tie_word_embeddings is true")
            elif (value := determined_tensor(name, config)) is not None:
                stored = self._slice(name)[:] if types[name] in TYPES else None
                if stored is None or not _is_close(stored, value):
                    unlike.append(f"{self._named(name)} and what config.json determines")
            else:
                unexpected.append(name)
        problems = {
            "missing": sorted(expected.keys() - found),
            "unexpected": [self._named(name) for name in unexpected],
            "wrongly shaped": [
                f"{self._named(name)} has {shapes[name]}, config.json implies {expected[name]}"
                for name in sorted(expected.keys() & found)
                if shapes[name] != expected[name]
            ],
            f"of a type other than {', '.join(TYPES)}": [
                f"{self._named(name)} is {kind}"
                for name, kind in sorted(types.items())
                if kind not in TYPES and not (name + SCALE in expected and kind == FP8)
            ],
            "in two files": [
                f"{name} in {' and '.join(files)}"
                for name, files in sorted(self.holders.items())
                if len(files) > 1
            ],
            f"not where {INDEX} says": [
                f"{name} in {file}"
                for name, file in sorted(self.index.items())
                if file not in self.holders.get(name, ())
            ],
            "different from each other": unlike,
        }
        said = [
            f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5))
            for kind, names in problems.items()
            if names
        ]
        if said:
            files = SINGLE if SINGLE in self.handles else INDEX
            raise ValueError(
                f"{self.directory}: the weights of {files} do not fit config.json; "
                f"{'; '.join(said)}. Download the model's files again, all of one version"
            )

    def _named(self, name: str) -> str:
        """A tensor's name, with its file if there are several."""
        return name if len(self.handles) == 1 else f"{name} ({self.holders[name][0]})"

    def _slice(self, name: str) -> Any:
        """A tensor of which nothing has been read yet."""
        return self.handles[self.holders[name][0]].get_slice(name)

    def _same(self, a: str, b: str) -> bool:
        """Whether two tensors of one shape have the same values."""
        left, right = self._slice(a), self._slice(b)
        if not {left.get_dtype(), right.get_dtype()} <= TYPES.keys():
            return False
        parts = [slice(i, i + ROWS) for i in range(0, left.get_shape()[0] - ROWS, ROWS)]
        parts.append(slice(len(parts) * ROWS, None))  # safetensors allows no end beyond the last
        return all(np.array_equal(left[part], right[part]) for part in parts)


def _blocks(directory: Path) -> Blocks | None:
    """How the weights are quantized; None if they are not."""
    settings = read_json(directory / "config.json").get("quantization_config")
    if settings is None:
        return None
    blocks, problems = read_blocks(settings)
    if problems:
        raise ValueError(f"{directory / 'config.json'}: quantization_config: {problems[0]}")
    return blocks


def _read_bytes(file: Path, name: str) -> np.ndarray:
    """Read a tensor's bytes from a sound file: safetensors gives NumPy no 8-bit floats."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(size))[name]["data_offsets"]
        stream.seek(8 + size + begin)
        return np.frombuffer(stream.read(end - begin), np.uint8)


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that count, and the index's map from tensors to files (empty without an index)."""
    single, index = directory / SINGLE, directory / INDEX
    if not is_there(index):
        if is_there(single):
            return [single], {}
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE} nor {INDEX}, only {', '.join(others[:5])}: rename "
            f"the model's file, or download the model again"
            if others
            else f"{directory} has no *.safetensors file: {SINGLE}, or {INDEX} and the files that "
            f"it names, are needed (pickled checkpoints are never loaded)"
        )
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ValueError(f"{index} is damaged: it has no weight_map; download it again")
    for name, file in weight_map.items():
        inside = isinstance(file, str) and file == Path(file).name
        if not inside or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} maps {name} to {file!r}, which is no *.safetensors file of its directory"
            )
    files = sorted(set(weight_map.values()))
    if is_there(single) and SINGLE not in files:
        raise ValueError(
            f"{directory} has both {SINGLE} and {INDEX}, which names other files ({files[0]}): "
            f"transformers would take the first, vLLM the others; remove what is out of date"
        )
    missing = [file for file in files if not is_there(directory / file)]
    if missing:
        raise FileNotFoundError(
            f"{index} names {', '.join(missing[:5])}, which is not there; download the model again"
        )
    return [directory / file for file in files], weight_map


def _is_finite(tensor: np.ndarray, kind: str) -> bool:
    """Whether no value is NaN or infinite, in two passes and without a temporary array.

    As signed integers, the positive values that are no numbers are the largest, at least infinity's
    bits; as unsigned ones, the negative.
    """
    signed, infinity = TYPES[kind]
    bits = tensor.view(signed)
    unsigned = bits.view(f"u{bits.itemsize}")
    sign = 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < infinity and unsigned.max() < sign | infinity)


def _is_close(stored: np.ndarray, value: np.ndarray) -> bool:
    """Whether a stored tensor is `value`, to the precision of its type."""
    if stored.shape != value.shape:
        return False
    digits = {"float32": 1e-5, "float16": 1e-3}.get(str(stored.dtype), 1e-2)
    return np.allclose(stored.astype(np.float64), value, rtol=digits, atol=digits * 1e-4)
