"""The device mesh, and the one table that says how arrays are laid out over it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Logical axis -> mesh axis; an axis that is not named here is replicated. Megatron's tensor
# parallelism (arXiv:1909.08053): attention is split by KV head together with the query heads
# that share it, the MLP by its hidden units, embedding and logits by vocabulary entry.
DEFAULT_RULES: Mapping[str, str | None] = MappingProxyType(
    {"kv_heads": "tensor", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
)


@dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh
    rules: Mapping[str, str | None] = field(default_factory=lambda: DEFAULT_RULES, hash=False)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry these logical names (None: unnamed)."""
        return PartitionSpec(*(self.rules.get(axis) if axis else None for axis in axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """NamedSharding of an array whose dimensions carry these logical names."""
        return NamedSharding(self.mesh, self.spec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def size(self, axis: str) -> int:
        """How many shards a logical axis is cut into."""
        mesh_axis = self.rules.get(axis)
        return self.mesh.shape[mesh_axis] if mesh_axis else 1

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Tell the compiler the layout of an intermediate array."""
        return jax.lax.with_sharding_constraint(x, self.named(*axes))

    def shard_map(self, fn: Callable, in_axes: tuple, out_axes: tuple | PartitionSpec) -> Callable:
        """Run `fn` on each device's shards; axes are PartitionSpecs made by `spec`."""
        # check_vma=False: Pallas kernels carry no replication types.
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_axes, out_specs=out_axes, check_vma=False
        )


def make_sharding(tensor_parallel_size: int = 1) -> Sharding:
    """A mesh of the first `tensor_parallel_size` local devices along the axis "tensor".

    Raises:
        ValueError: fewer devices are visible.
    """
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}, but only {len(devices)} "
            f"{devices[0].platform} device(s) are visible"
        )
    mesh = jax.make_mesh(
        (tensor_parallel_size,),
        ("tensor",),
        axis_types=(AxisType.Auto,),
        devices=devices[:tensor_parallel_size],
    )
    return Sharding(mesh)
