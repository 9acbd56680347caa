"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from nanovllm_jax.layers.linear import Linear


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype, rngs: nnx.Rngs):
        hidden, ffn = {"embed": hidden_size}, {"ffn": intermediate_size}
        self.gate_up_proj = Linear({"gate_up": 2, **ffn}, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, ffn, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_up = self.gate_up_proj(x)
        return self.down_proj(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])
