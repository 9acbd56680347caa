"""The paged KV cache, and how weights are balanced for one of 8 bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class KVCache(NamedTuple):
    """Keys and values of all layers: L layers, P pages of S positions, K KV heads of size H."""

    k: Float[Array, "L P S K H"]
    v: Float[Array, "L P S K H"]

    AXES = ("layers", "batch", "positions", "kv_heads", "head_dim")


def balance_keys_and_values(weights: nnx.State) -> nnx.State:
    """Rescale a decoder's weights so that its keys and values have a root mean square near 1.

    There e4m3 is precise, and far from its limits of 2^-9 and 448. Other engines multiply by scales
    in their kernels; powers of two in the weights cost nothing and leave the function exactly as it
    was. Keys are scaled by their norm's weight, or else by their projection, and queries the other
    way; values by their projection, and the projection of the attention's output the other way.

    The size of what comes from a projection is an estimate: its input is normed, so its elements
    have a variance near 1 times the square of the norm's weight.
    """
    layers: Any = weights["layers"]
    attn, input_norm = layers["self_attn"], layers["input_layernorm"]["weight"].get_value()

    def change(module: str, scale: Callable[[Array], Array], kind: str = "weight") -> None:
        param = attn[module][kind]
        value = param.get_value()
        attn[module][kind] = param.replace(scale(value).astype(value.dtype))

    def power_of_2(mean_square: Array) -> Array:
        return jnp.exp2(jnp.round(jnp.log2(jnp.maximum(mean_square, 1e-12)) / 2))

    def square(x: Array) -> Array:
        return jnp.square(x.astype(jnp.float32))

    qkv = attn["qkv_proj"]["weight"].get_value()  # [L, K, G+2, H, D]
    group_size = qkv.shape[2] - 2
    biases = attn["qkv_proj"]["bias"].get_value() if "bias" in attn["qkv_proj"] else None

    def size_of(which: int) -> Array:
        """The estimate for the keys (-2) or values (-1) of each KV head, [L, K]."""
        variance = (square(qkv[:, :, which]) * square(input_norm)[:, None, None]).sum(axis=3)
        if biases is not None:
            variance += square(biases[:, :, which])
        return power_of_2(variance.mean(axis=2))

    v_size = size_of(-1)
    factors = jnp.ones((*v_size.shape, group_size + 2)).at[:, :, -1].set(1 / v_size)
    if "k_norm" in attn:
        k_size = power_of_2(square(attn["k_norm"]["weight"].get_value()).mean(axis=1))[:, None]
        change("k_norm", lambda w: w / k_size)
        change("q_norm", lambda w: w * k_size)
    else:
        k_size = size_of(-2)
        factors = factors.at[:, :, -2].set(1 / k_size).at[:, :, :-2].set(k_size[:, :, None])
    change("qkv_proj", lambda w: w * factors[:, :, :, None, None])
    if biases is not None:
        change("qkv_proj", lambda b: b * factors[:, :, :, None], "bias")
    o_factor = jnp.repeat(v_size, group_size, axis=1)[:, None, :, None]
    change("o_proj", lambda w: w * o_factor)  # [L, D, N, H]
    return weights
