"""Sums and maxima over the GPUs that share a layer, through memory that they can all reach."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from nanovllm_jax.layers.norm import Hidden, NormAt, Normed
from nanovllm_jax.sharding import Sharding
from pallas_kernels import (
    Mailboxes,
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_all_reduce_norm,
    one_shot_max,
    one_shot_sum,
    supports_one_shot,
    supports_one_shot_norm,
)

AXIS = "tensor"  # The mesh axis whose GPUs exchange.

# Words of 4 bytes in the largest sum that takes the kernel: 4 MiB (512 rows of 8B's width). Up to
# this size XLA (of jax 0.11) would take a kernel of its own, and keep two buffers of the sum's size
# outside JAX's pool for each place in each program: by its sources over 1 GiB for one program of
# 32B's 129 sums. Larger sums are NCCL's, which has its buffers in common.
MAX_WORDS = 1 << 20


@functools.partial(jax.tree_util.register_dataclass, data_fields=["addresses"], meta_fields=[])
@dataclass(frozen=True)
class Collectives:
    """One-kernel sums and maxima over the GPUs of `AXIS`; for use under `jax.shard_map`.

    It is an argument of the function that is mapped, with the PartitionSpec `spec(sharding)`. The
    mailboxes that its addresses name belong to the caller of `make`, and must outlive its use.
    """

    addresses: Int32[Array, "devices 2"]  # inside shard_map [1, 2]: this GPU's own

    @staticmethod
    def make(sharding: Sharding) -> tuple["Collectives", Mailboxes]:
        """Allocate mailboxes on every GPU of a mesh, which lies within one process."""
        mailboxes = make_mailboxes(sharding.mesh, AXIS, MAX_WORDS)
        return Collectives(mailboxes.addresses), mailboxes

    @staticmethod
    def abstract(sharding: Sharding) -> "Collectives":
        """The shapes of what `make` returns first; no device is touched."""
        layout = NamedSharding(sharding.mesh, Collectives.spec(sharding))
        shape: Any = jax.ShapeDtypeStruct((sharding.mesh.size, 2), jnp.int32, sharding=layout)
        return Collectives(shape)

    @staticmethod
    def spec(sharding: Sharding) -> PartitionSpec:
        """The addresses' layout, one row for each device of the mesh; fits None as well."""
        return PartitionSpec(sharding.mesh.axis_names)

    @staticmethod
    def fits(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        """Whether `sum` takes arrays of this shape."""
        return supports_one_shot(shape, dtype, MAX_WORDS)

    @staticmethod
    def fits_norm(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        """Whether `sum` takes arrays of this shape together with a norm."""
        return supports_one_shot_norm(shape, dtype, MAX_WORDS)

    def sum(
        self,
        part: Float[Array, "T D"],
        residual: Float[Array, "T D"] | None = None,
        then: NormAt | None = None,
    ) -> Hidden:
        """residual + the sum of every GPU's part; every GPU gets the same bits.

        With `then` it is `Normed`: the sum and its RMSNorm.
        """
        residual = jnp.zeros_like(part) if residual is None else residual
        if then is None:
            return one_shot_all_reduce(part, residual, self.addresses, AXIS, MAX_WORDS)
        x, normed = one_shot_all_reduce_norm(
            part, residual, then.weight, then.layer, self.addresses, AXIS, MAX_WORDS, eps=then.eps
        )
        return Normed(x, normed)

    def max(self, keys: Int32[Array, "B 2"]) -> Int32[Array, "B 2"]:
        """The largest of each key, taken as unsigned 64-bit integers [low, high]."""
        return one_shot_max(keys, self.addresses, AXIS, MAX_WORDS)

    def total(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of every GPU's float32 numbers; every GPU gets the same bits."""
        return one_shot_sum(x, self.addresses, AXIS, MAX_WORDS)
