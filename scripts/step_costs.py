"""What a step must move and compute, by category, from the model's shape: the cost model.

Every array that one operation hands to the next is written once and read once, every weight read
once, and the keys and values of each context read once. A kernel that fuses operations needs less;
one that reads an array twice needs more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm_jax.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations (a multiplication and an addition are two)."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bandwidth: float | None, flops: float | None) -> float | None:
        """The least time at these rates per second; None if a rate that it needs is unknown."""
        if bandwidth is None or (self.flops and flops is None):
            return None
        return max(self.bytes / bandwidth, self.flops / flops if flops else 0.0)


def step_costs(
    model: ModelConfig, starts: Sequence[int], lengths: Sequence[int], devices: int = 1,
    kv_bytes: int | None = None,
) -> dict[str, Work]:  # fmt: skip
    """The work of one step on each device, by category.

    Args:
        model: as it lies on the devices: with its copies of KV heads and padded vocabulary.
        starts, lengths: of each row, the first position that it computes, and how many.
        devices: over how many the model is split (Megatron's tensor parallelism).
        kv_bytes: bytes of an element of the KV cache (default: as those of the model).
    """
    m, n, size = model, devices, 4 if model.dtype == "float32" else 2
    layers, hidden, mlp = m.num_layers, m.hidden_size, m.intermediate_size
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    qkv = q + 2 * kv
    tokens, rows = sum(lengths), len(lengths)
    cache = 2 * kv * (kv_bytes or size)  # bytes of a position in a layer
    context = sum(s + c for s, c in zip(starts, lengths, strict=True))
    pairs = sum(s * c + c * (c + 1) // 2 for s, c in zip(starts, lengths, strict=True))
    weights = hidden * qkv + q * hidden + 3 * hidden * mlp
    logits = rows * m.vocab_size * 4 / n
    head = m.vocab_size * hidden / n

    in_and_out = 4 * hidden + (qkv + q + 3 * mlp) / n  # of a layer's products, for a token
    products = size * (layers * (weights / n + tokens * in_and_out) + head + rows * hidden)
    # Residual and norm twice: two arrays in, two out. The gate: two in, one out. The embedding's
    # rows and the last norm: one in, one out.
    elementwise = layers * tokens * (8 * hidden + 3 * mlp / n) + 2 * hidden * (tokens + rows)
    costs = {
        "attention": Work(
            layers * (context * cache + 2 * tokens * q * size) / n, layers * 4 * q * pairs / n
        ),
        "KV write": Work(layers * tokens * ((qkv + q) * size + cache) / n),
        "products": Work(products + logits, 2 * (layers * tokens * weights / n + rows * head)),
        "sampling": Work(logits),
        "norms, activations, inputs": Work(size * elementwise),
    }
    if n > 1:  # after o, after down, after the embedding's lookup; what a ring sends
        one = 2 * (n - 1) / n * tokens * hidden * size
        costs["communication"] = Work((2 * layers + 1) * one)
    return costs
