"""A mixture of experts: each token's feed-forward layer is a few MLPs out of many.

Whatever the mesh, a device has all tokens of its part of the batch. It computes the share of its
own experts, or of its hidden units of all experts, and one sum over the devices follows: the one
that a dense MLP needs as well. No token travels to another device.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from nanovllm_jax.layers.backend import Backend, Choice
from nanovllm_jax.layers.linear import Linear
from nanovllm_jax.layers.norm import Hidden, NormAt, RMSNorm


class MoE(nnx.Module):
    """Computes x + the weighted MLPs of the experts that a router chooses for each row of norm(x).

    The router of Qwen3-MoE (arXiv:2505.09388): softmax over all experts, then the choice.
    """

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, num_choices: int, *,
        normalize: bool, dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        hidden, experts, ffn = {"embed": hidden_size}, {"experts": num_experts}, "expert_ffn"
        self.choice = Choice(num_choices, normalize)
        # The scores of all experts are on every device: the router's own axis is never split.
        self.router = Linear({"scores": num_experts}, hidden, dtype=dtype, rngs=rngs)
        gate_up = {**experts, "gate_up": 2, ffn: expert_size}
        self.gate_up_proj = Linear(gate_up, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = Linear({**experts, **hidden}, {ffn: expert_size}, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Hidden, norm: RMSNorm, layer: Int32[Array, ""], backend: Backend, then: NormAt,
        ahead=None,
    ) -> Hidden:
        scores = backend.linear(x, self.router, layer, norm=norm, dtype=jnp.float32)
        return backend.experts(
            x, self.gate_up_proj, self.down_proj, scores, self.choice, layer, norm=norm, then=then
        )
