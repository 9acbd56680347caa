"""Rotary position embedding (arXiv:2104.09864), rotate-half form as Qwen3 uses it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, " T"], head_dim: int, theta: float
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """(cos, sin) of position * theta^(-2i/head_dim), in float32.

    Elementwise on purpose: a matrix product could round positions to bfloat16 or TF32.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inv_freq = 1.0 / (theta**exponent)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "T heads H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T heads H"]:
    """Rotate each pair (x[i], x[i + H/2]) by its angle; computed in float32, rounded once."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x.dtype)
