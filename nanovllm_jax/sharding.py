"""The device mesh, and the one table that says how arrays are laid out over it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nanovllm_jax.checks import alternatives

MESH_AXES = ("data", "tensor")

Rule = str | tuple[str, ...] | None  # The mesh axis or axes that a logical axis is split over.

# Logical axis -> mesh axis. "tensor" is Megatron's tensor parallelism (arXiv:1909.08053): attention
# is split by KV head together with the query heads that share it, the MLP by its hidden units,
# embedding and logits by vocabulary entry. "data" splits the sequences: tokens, rows and cache.
# Experts are split like the MLP; {"experts": "tensor", "expert_ffn": None} deals them out whole.
DEFAULT_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "ffn": "tensor",
        "experts": None,
        "expert_ffn": "tensor",  # hidden units of an expert
        "embed": None,  # of weights: the side that meets the residual stream
        "batch": "data",  # sequences: their tokens, rows and cache pages
        "activation_tokens": "data",  # the residual stream between a layer's two halves
        "activation_embed": None,
    }
)


@dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh
    rules: Mapping[str, Rule] = field(hash=False)

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over."""
        rule = self.rules.get(axis) if axis else None
        return (rule,) if isinstance(rule, str) else tuple(rule or ())

    def size(self, axis: str | None) -> int:
        """How many shards a logical axis is cut into."""
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.mesh_axes(axis))

    def local_shape(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        """The shape of a device's shard of an array whose dimensions carry these logical names."""
        return tuple(n // self.size(axis) for n, axis in zip(shape, axes, strict=True))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry these logical names (None: unnamed).

        Raises:
            ValueError: the rules split two of the dimensions over the same mesh axis.
        """
        used = Counter(mesh_axis for axis in axes for mesh_axis in self.mesh_axes(axis))
        if any(count > 1 for count in used.values()):
            rules = {axis: self.rules[axis] for axis in axes if axis and self.mesh_axes(axis)}
            raise ValueError(
                f"sharding_rules split an array [{', '.join(map(str, axes))}] twice over the "
                f"same mesh axis: {rules}; set one of them to None"
            )
        names = (self.mesh_axes(axis) for axis in axes)
        return PartitionSpec(*(n[0] if len(n) == 1 else n or None for n in names))

    def named(self, *axes: str | None) -> NamedSharding:
        """NamedSharding of an array whose dimensions carry these logical names."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Tell the compiler how an intermediate array is sharded.

        Axes that do not divide evenly are left unsharded.
        """
        fitting = [a if n % self.size(a) == 0 else None for a, n in zip(axes, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, self.named(*fitting))

    def shard_map(self, fn: Callable, in_axes: tuple, out_axes: tuple | PartitionSpec) -> Callable:
        """Run `fn` on each device's shards; axes are PartitionSpecs made by `spec`."""
        # check_vma=False: Pallas kernels carry no replication types.
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_axes, out_specs=out_axes, check_vma=False
        )


def place(x: np.ndarray | Array, sharding: NamedSharding) -> Array:
    """Shard an array, of which every process holds a full copy, over the mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def make_sharding(
    mesh_shape: Mapping[str, int],
    rules: Mapping[str, Rule] | None = None,
    devices: Sequence | None = None,
) -> Sharding:
    """Make a mesh of the first devices, with the rules that say how arrays are laid out over it.

    Args:
        mesh_shape: devices along each of MESH_AXES; an axis that is left out has 1.
        rules: as `merge_rules` returns them; default: DEFAULT_RULES.
        devices: instead of all that are visible; they may be ones that are only compiled for.

    Raises:
        ValueError: fewer devices are visible, or a process would be left without any.
    """
    devices = jax.devices() if devices is None else devices  # of all processes
    shape = tuple(mesh_shape.get(axis, 1) for axis in MESH_AXES)
    count = math.prod(shape)
    if count > len(devices):
        wanted = " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True))
        raise ValueError(
            f"tensor_parallel_size or mesh_shape asks for {count} devices ({wanted}), "
            f"but only {len(devices)} {devices[0].platform} device(s) are visible: ask for no more"
        )
    used, unused = devices[:count], devices[count:]
    if left_out := {d.process_index for d in unused} - {d.process_index for d in used}:
        raise ValueError(
            f"tensor_parallel_size or mesh_shape asks for {count} devices, which leaves process "
            f"{max(left_out)} without any: ask for all {len(devices)}"
        )
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=used)
    return Sharding(mesh, DEFAULT_RULES if rules is None else rules)


def merge_rules(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """Change DEFAULT_RULES by the user's `rules`: logical axis -> mesh axis, several, or None.

    Raises:
        TypeError: a rule is no name, list of names or None.
        ValueError: a rule names an unknown axis, or rules that belong together differ.
    """
    for axis, rule in rules.items():
        if axis not in DEFAULT_RULES:
            raise ValueError(
                f"sharding_rules: there is no logical axis {axis!r}"
                f"{alternatives(axis, DEFAULT_RULES)}"
            )
        if not isinstance(rule, str | tuple | list | None):
            raise TypeError(f"sharding_rules: {axis!r} must have a mesh axis or None, got {rule!r}")
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        if unknown := [name for name in names if name not in MESH_AXES]:
            raise ValueError(
                f"sharding_rules: {axis!r} is split over {unknown[0]!r}, which is no mesh axis; "
                f"valid: {list(MESH_AXES)}, a list of them, or None"
            )
    lists_as_tuples = {a: tuple(r) if isinstance(r, list) else r for a, r in rules.items()}
    merged = {**DEFAULT_RULES, **lists_as_tuples}
    if merged["heads"] != merged["kv_heads"]:
        raise ValueError(
            f"sharding_rules must split 'heads' ({merged['heads']!r}) and 'kv_heads' "
            f"({merged['kv_heads']!r}) alike: query heads attend on the device of their KV head"
        )
    return merged
