"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Int32

from nanovllm_jax.layers.backend import Backend
from nanovllm_jax.layers.linear import Linear
from nanovllm_jax.layers.norm import Hidden, NormAt, RMSNorm


class MLP(nnx.Module):
    """Computes x + down(silu(gate(norm(x))) * up(norm(x))), gate and up in one product."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias=False, dtype, rngs: nnx.Rngs
    ):
        hidden, ffn = {"embed": hidden_size}, {"ffn": intermediate_size}
        rest: dict[str, Any] = {"bias": bias, "dtype": dtype, "rngs": rngs}
        self.gate_up_proj = Linear({"gate_up": 2, **ffn}, hidden, **rest)
        self.down_proj = Linear(hidden, ffn, **rest)

    def __call__(
        self, x: Hidden, norm: RMSNorm, layer: Int32[Array, ""], backend: Backend, then: NormAt,
        ahead=lambda _: (),
    ) -> Hidden:
        gated = backend.linear(
            x, self.gate_up_proj, layer, norm=norm, gated=True, ahead=ahead("gate_up")
        )
        return backend.linear(
            gated, self.down_proj, layer, residual=x, then=then, ahead=ahead("down")
        )
