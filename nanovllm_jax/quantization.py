"""Weights that a checkpoint stores as 8-bit floats with a scale for each block of them.

Published Qwen3 checkpoints in FP8 are of this kind: a matrix X.weight [out, in] in float8_e4m3fn,
and X.weight_scale_inv [out / 128, in / 128], rounded up, which its blocks are multiplied by. They
are dequantized when they are read, so the model takes as much memory as its checkpoint in bfloat16
would; the download and the files are half of that.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

SCALE = "_scale_inv"  # What follows a weight's name in that of its scales.
REMEDY = "take the model's checkpoint in bfloat16, or in fp8 with a scale for each block"

# What each byte stands for as a float8_e4m3fn: looking it up is quicker than converting it.
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

# Values of the keys of quantization_config with which weights are stored as described above. Which
# modules are not converted shows in the tensors' types.
SUPPORTED: dict[str, tuple] = {"quant_method": ("fp8",), "activation_scheme": ("dynamic",)}
SUPPORTED |= {"fmt": ("e4m3", None), "scale_fmt": ("float", None)}
WITHOUT_EFFECT = ("modules_to_not_convert", "ignored_layers")


class Blocks(NamedTuple):
    """The size of the block of a weight [out, in] that one scale belongs to."""

    rows: int
    columns: int

    def scales_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight; blocks at its ends may be smaller."""
        return tuple(-(-n // size) for n, size in zip(shape, self, strict=True))


def read_blocks(settings: Any) -> tuple[Blocks | None, list[str]]:
    """Read `quantization_config` of a config.json.

    Returns:
        The blocks, or None if there are problems; and the problems, each with its key and value.
    """
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return None, [other_method(settings)]
    problems = [
        f"{key}={value!r:.80} is not supported; {REMEDY}"
        for key, value in settings.items()
        if key not in ("weight_block_size", *WITHOUT_EFFECT) and value not in SUPPORTED.get(key, ())
    ]
    size = settings.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return (None if problems else Blocks(*size)), problems
    problems.append(
        f"weight_block_size={size!r:.80} is not supported, only two positive integers, as [128, "
        f"128] (one scale for a whole weight is another format); {REMEDY}"
    )
    return None, problems


def other_method(settings: Any) -> str:
    """The refusal of a model that is quantized in a way that is not read."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    said = f"quant_method={method!r}" if method else f"{settings!r:.80}"
    return f"the model is quantized ({said}), which is not supported; {REMEDY}"


def dequantize(
    weight: UInt8[np.ndarray, "out in"],
    scales: Float[np.ndarray, "rows columns"],
    blocks: Blocks,
    dtype: Any,
) -> Float[np.ndarray, "out in"]:
    """Multiply each block of 8-bit floats, given as their bytes, by its scale.

    The product is computed in float32 and rounded once; beside the result there is no more than a
    row of blocks in memory.
    """
    result = np.empty(weight.shape, dtype)
    buffer = np.empty((min(blocks.rows, len(weight)), weight.shape[1]), np.float32)
    for i, row in enumerate(scales.astype(np.float32)):
        bits = weight[i * blocks.rows : (i + 1) * blocks.rows]
        values = buffer[: len(bits)]
        np.take(VALUES, bits, out=values, mode="clip")  # a mode without a copy; all indices exist
        with np.errstate(over="ignore"):  # the caller looks for infinite values
            values *= np.repeat(row, blocks.columns)[: weight.shape[1]]
            result[i * blocks.rows :][: len(bits)] = values
    return result
