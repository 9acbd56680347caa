"""Rotary position embedding (RoPE, arXiv:2104.09864) in the rotate-half form, and its scalings."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rope(NamedTuple):
    """A kind of RoPE, with its numbers by the names that transformers has for them."""

    theta: float = 10000.0
    kind: str = "default"
    numbers: tuple[tuple[str, float], ...] = ()

    def frequencies(self, head_dim: int) -> tuple[Float[np.ndarray, " half"], float]:
        """The angle by which each pair turns from one position to the next, and a factor.

        Cosines and sines are multiplied by the factor. Computed in float32 as transformers does,
        whose modeling_rope_utils.py is the source of the formulas.
        """
        numbers: dict[str, Any] = dict(self.numbers)
        plain = self._plain(head_dim)
        if self.kind == "linear":
            return plain / np.float32(numbers["factor"]), 1.0
        if self.kind == "llama3":
            return _llama3(plain, **numbers), 1.0
        if self.kind == "yarn":
            return _yarn(plain, self.theta, **numbers)
        return plain, 1.0  # "dynamic", too, up to the length that the model was trained for

    def _plain(self, head_dim: int) -> Float[np.ndarray, " half"]:
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return 1 / np.float32(self.theta) ** exponents


def _llama3(
    plain, *, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
) -> Float[np.ndarray, " half"]:
    """Llama 3.1: slow pairs turn `factor` times as slowly, fast ones as ever, others in between.

    Which is which depends on how often a pair turns within the length of the first training.
    """
    turns = original_max_position_embeddings * plain / np.float32(2 * math.pi)
    share = (turns - low_freq_factor) / np.float32(high_freq_factor - low_freq_factor)
    share = np.clip(share, 0, 1)
    return ((1 - share) / np.float32(factor) + share) * plain


def _yarn(
    plain, theta, *, factor, original_max_position_embeddings, beta_fast=32, beta_slow=1,
    attention_factor=None, mscale=0, mscale_all_dim=0, truncate=True,
) -> tuple[Float[np.ndarray, " half"], float]:  # fmt: skip
    """YaRN (arXiv:2309.00071): as Llama 3.1's, but in between by the number of the pair.

    The scores of attention are sharpened, too, by a factor on cosines and sines.
    """
    head_dim = 2 * len(plain)

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that turns so often within the length of the first training."""
        ratio = original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    slowed = np.clip((np.arange(len(plain), dtype=np.float32) - low) / np.float32(high - low), 0, 1)
    frequencies = plain / np.float32(factor) * slowed + plain * (1 - slowed)

    def sharpened(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = sharpened(mscale) / sharpened(mscale_all_dim) if both else sharpened(1)
    return frequencies.astype(np.float32), attention_factor


def rope_angles(
    positions: Int[Array, " T"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """(cos, sin) of each position's angles, in float32.

    Elementwise on purpose: a matrix product could round positions to bfloat16 or TF32.
    """
    frequencies, factor = rope.frequencies(head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def apply_rope(
    x: Float[Array, "T heads H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T heads H"]:
    """Rotate each pair (x[i], x[i + H/2]) by its angle; computed in float32, rounded once."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x.dtype)
