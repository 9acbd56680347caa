"""The least time that a step can take: the hardware's rates, and what a step moves and computes.

Bytes and operations come from the shapes, types and logical axes of the weights themselves, so a
weight of 8 bits counts as one byte, and a device counts its own shards.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.sharding import Sharding

TB, GB = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """The rates that a device reaches a second, and the latencies of its collectives in seconds.

    Memory and products are measured (by copying, and by a large product); `link` is NVLink 4's
    rate. Between two H200s the engine's own all-reduce took 2.4 to 5.5 us.
    """

    name: str
    memory: float  # bytes read or written
    flops: float  # operations of bfloat16 products
    link: float  # bytes sent, while as many are received
    latency: float  # one of XLA's collectives, however small
    one_shot_latency: float  # the engine's own all-reduce, however small


HARDWARE = {
    name: Hardware(name, memory * TB, 790 * TB, 450 * GB, 25e-6, 6e-6)
    for name, memory in {"H100": 2.99, "H200": 4.2}.items()
}


def find_hardware(device_kind: str) -> Hardware | None:
    """Look up the measured rates of a device by JAX's name of its kind; None if unknown."""
    return next((rates for name, rates in HARDWARE.items() if name in device_kind), None)


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations; a multiplication and an addition are two."""

    bytes: float
    flops: float = 0.0

    def seconds(self, memory: float | None, flops: float | None) -> float | None:
        """Return the least time at these rates per second; None if a rate it needs is unknown."""
        if memory is None or (self.flops and flops is None):
            return None
        return max(self.bytes / memory, self.flops / flops if flops else 0.0)


class CostModel:
    """What one device moves and computes when its model runs: at `least`, or by `categories`.

    On a mesh, tokens, rows and contexts are those of one shard of the batch.

    Attributes:
        weight_bytes: bytes of the weights but an embedding that is no head. A step reads them all,
            or of experts only some (`bytes_read`).
        kv_bytes: bytes of the keys and values of one position, over all layers.
    """

    def __init__(
        self, config: ModelConfig, weights: nnx.State, *, kv_itemsize: int | None = None,
        sharding: Sharding | None = None,
    ):  # fmt: skip
        """Read the costs off the weights.

        Args:
            config: the model in its sharded form, with copies of KV heads and a padded vocabulary.
            weights: its parameters, as arrays or as shapes, with their logical axes.
            kv_itemsize: bytes of an element of the KV cache; default: as of the activations.
            sharding: how the weights lie on the mesh; default: whole, on one device.
        """
        self.config = c = config
        self._sharding = sharding
        self._itemsize = jnp.dtype(c.dtype).itemsize  # of the activations
        self.weight_bytes = self._norm_bytes = self._expert_bytes = 0.0
        # Elements on this device, over all layers, that one token meets (for the head, one row).
        self._layers_size = self._head_size = 0.0  # weights that it is multiplied by
        self._in_and_out = 0.0  # inputs and outputs of the layers' products
        self._gated = 0.0  # outputs that a gate takes in
        self._normed = 0.0  # inputs of the norms of the residual stream
        self._sent = _ring(self._shards("vocab")) * c.hidden_size  # sums; first the lookup's
        for name, axes, value in named_parameters(weights):
            if name.startswith("embed_tokens.") and not c.tie_word_embeddings:
                continue
            held = sharding.local_shape(value.shape, axes) if sharding else value.shape
            num_bytes = math.prod(held) * value.dtype.itemsize
            self.weight_bytes += num_bytes
            if "norm" in name:
                self._norm_bytes += num_bytes
            sizes = dict(zip(axes, value.shape, strict=True))
            if axes == ("layers", "embed"):
                self._normed += math.prod(value.shape)
            layers = sizes.pop("layers", None)
            chosen = 1  # times that a token meets the weight, or the parts that it chose
            if experts := sizes.get("experts", 0):
                self._expert_bytes += num_bytes
                chosen, sizes["experts"] = c.experts_per_token, c.experts_per_token
            if len(sizes) == 1 or "embed" not in sizes:  # norms, and scales of 8-bit weights
                continue
            size = math.prod(n / self._shards(axis) for axis, n in sizes.items())
            if layers is None:
                self._head_size += size
                continue
            hidden = sizes["embed"] / self._shards("embed")
            self._layers_size += layers * size
            self._in_and_out += layers * (chosen * hidden + size / hidden)
            if "gate_up" in sizes:
                self._gated += layers * size / hidden
            # Devices with other parts of the input, or other experts, add up their outputs.
            if list(sizes)[bool(experts)] == "embed":
                others = (self._shards(axis) for axis in sizes if axis != "embed")
                self._sent += layers * hidden * _ring(math.prod(others))
        self.kv_bytes = 2 * self._heads(c.num_kv_heads) * (kv_itemsize or self._itemsize)

    @classmethod
    def of(cls, programs: Programs, sharding: Sharding | None = None) -> "CostModel":
        """Return the costs of an engine's model on all devices together, or on one of a mesh."""
        p, itemsize = programs, programs.cache_dtype.itemsize
        return cls(p.model_config, p.weights, kv_itemsize=itemsize, sharding=sharding)

    def bytes_read(self, tokens: float) -> float:
        """Count the bytes of weights that a step of this many tokens reads.

        Of the experts they are those that some token chose, on average and if none is favored.
        """
        share = 1 - self.config.experts_per_token / max(1, self.config.num_experts)
        return self.weight_bytes - share**tokens * self._expert_bytes

    def least(
        self, *, steps: float, tokens: float, rows: float, context: float, pairs: float
    ) -> Work:
        """Count what no implementation can avoid, however much it fuses.

        Args:
            steps: how often every weight is read.
            tokens: tokens that run through the layers.
            rows: tokens that run through the head.
            context: cached positions that are read, over all rows and steps.
            pairs: pairs of a query token and a position that it attends to.
        """
        products = tokens * self._layers_size + rows * self._head_size
        flops = 2 * products + 4 * pairs * self._heads(self.config.num_heads)
        return Work(
            steps * self.bytes_read(tokens / max(1, steps)) + context * self.kv_bytes, flops
        )

    def categories(self, starts: Sequence[int], lengths: Sequence[int]) -> dict[str, Work]:
        """Count one step by category, with the arrays that one operation hands to the next.

        Each such array is written once and read once, every weight read once, and the keys and
        values of each context read once. A kernel that fuses operations needs less, one that reads
        an array twice needs more.

        Args:
            starts, lengths: as for `attended`.
        """
        c, size = self.config, self._itemsize
        tokens, rows = sum(lengths), len(lengths)
        context, pairs = attended(starts, lengths)
        q, qkv = self._heads(c.num_heads), self._heads(c.num_heads + 2 * c.num_kv_heads)
        logits = rows * c.vocab_size / self._shards("vocab") * 4  # in float32
        # A norm of the residual stream takes two arrays in and gives two out, a gate takes two in
        # and gives one out; the embedding's rows and the last norm are one in, one out.
        elementwise = tokens * (4 * self._normed + 1.5 * self._gated)
        elementwise += 2 * c.hidden_size * (tokens + rows)
        products = self.bytes_read(tokens) - self._norm_bytes + logits
        products += (tokens * self._in_and_out + rows * c.hidden_size) * size
        work = {
            "attention": Work(context * self.kv_bytes + 2 * tokens * q * size, 4 * pairs * q),
            "KV write": Work(tokens * ((qkv + q) * size + self.kv_bytes)),
            "products": Work(products, 2 * (tokens * self._layers_size + rows * self._head_size)),
            "sampling": Work(logits),
            "norms, activations, inputs": Work(self._norm_bytes + elementwise * size),
        }
        if self._sent:
            work["communication"] = Work(tokens * self._sent * size)
        return work

    def _heads(self, heads: int) -> float:
        """Count the elements of `heads` heads of every layer on this device."""
        c = self.config
        return c.num_layers * heads * c.head_dim / self._shards("heads")

    def _shards(self, axis: str) -> int:
        """Return how many devices with the same tokens share a product along an axis."""
        if self._sharding is None:
            return 1
        names = set(self._sharding.mesh_axes(axis)) - set(self._sharding.mesh_axes("batch"))
        return math.prod(self._sharding.mesh.shape[name] for name in names)


def attended(starts: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """Return the cached positions that rows read, and the pairs of a token and one that it sees.

    Args:
        starts: first position that each row computes.
        lengths: how many tokens each row computes.
    """
    rows = list(zip(starts, lengths, strict=True))
    return sum(s + n for s, n in rows), sum(s * n + n * (n + 1) // 2 for s, n in rows)


def named_parameters(weights: nnx.State) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield each parameter's dotted name, logical axes ("layers" first if stacked), and array."""
    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    for path, param in jax.tree.leaves_with_path(weights, is_leaf=is_param):
        name = ".".join(str(key.key) for key in path)
        stacked = ("layers",) if name.startswith("layers.") else ()
        yield name, (*stacked, *param.get_metadata()["axes"]), param.get_value()


def _ring(devices: int) -> float:
    """Return how often each device sends an element that a ring of devices sums."""
    return 2 * (devices - 1) / devices
