"""Reads checkpoints into sharded arrays: safetensors only, one layer on the host at a time."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.models.checkpoint import STACKED, layers_of, sources
from nanovllm_jax.sharding import Sharding, place
from nanovllm_jax.tensor_files import Checkpoint

logger = logging.getLogger("nanovllm_jax")

# Maps (parameter path, place in its stack of layers, shape of one layer's parameter) to its value.
GetValue = Callable[[tuple, int, tuple[int, ...]], np.ndarray | jax.Array]


def load_weights(config: ModelConfig, sharding: Sharding, directory: Path) -> nnx.State:
    """Read a Hugging Face checkpoint straight into the shards of the model's parameters.

    Raises:
        FileNotFoundError: there is no safetensors file, or the index names one that is not there.
        ValueError: a file is damaged, or weights are missing, unexpected, of another shape or type,
            or no numbers; the message names them.
    """
    table, dtype = sources(config), jnp.dtype(config.dtype)
    checkpoint = Checkpoint(directory, dtype)
    checkpoint.check(config)
    if quantized := checkpoint.quantized:
        logger.info(
            "dequantizing %d of %d tensors from fp8 to %s: %.1f MB in the files, %.1f MB on the "
            "devices",
            len(quantized),
            len(checkpoint.holders) - len(quantized),  # each has a tensor of scales
            dtype,
            checkpoint.quantized_bytes / 1e6,
            sum(map(math.prod, quantized.values())) * dtype.itemsize / 1e6,
        )

    def read(path: tuple, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        dotted = ".".join(map(str, path))
        source, number = table[dotted], layers_of(dotted, config)[layer]
        names = [name.format(i=number) for name, _ in source.tensors]
        # Converted one by one: NumPy joins no float16 with bfloat16.
        return source.join(*(checkpoint.read(n).astype(dtype, copy=False) for n in names))

    return _place(abstract_weights(config, sharding), read)


def random_weights(config: ModelConfig, sharding: Sharding, seed: int) -> nnx.State:
    """Make random parameters on the devices, to measure speed without a checkpoint."""
    root = jax.random.key(seed % 2**32)  # JAX uses no further bits, and refuses 2**63
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    count = 0

    def draw(path: tuple, layer: int, shape: tuple[int, ...]) -> jax.Array:
        nonlocal count
        count += 1
        if "norm" in str(path):
            return jnp.ones(shape, config.dtype)
        return normal(jax.random.fold_in(root, count), shape, config.dtype) * 0.02

    return _place(abstract_weights(config, sharding), draw)


def abstract_weights(config: ModelConfig, sharding: Sharding) -> nnx.State:
    """The model's parameters as shapes, dtypes and shardings, without their values."""

    def lay_out(path: tuple, param: nnx.Variable) -> nnx.Variable:
        axes, value = param.get_metadata()["axes"], param.get_value()
        layout = sharding.named(*(("layers",) if path[0] == STACKED else ()), *axes)
        return param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout))

    return nnx.map_state(lay_out, parameters(config))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["order"])
@dataclass(frozen=True)
class LayerWeights:
    """One weight as separate per-layer arrays, the layout in which a CPU multiplies fastest.

    Each layer's axes are transposed into `order`. XLA forwards the slices of `stacked()` to their
    origins, for this and for both transpositions; from one stacked array it would copy each layer's
    slice once a step.
    """

    layers: tuple[Array, ...]
    order: tuple[int, ...]

    @classmethod
    def from_stacked(cls, weight: Array, axes: tuple[str, ...]) -> "LayerWeights":
        """Split a weight [L, *axes], to be multiplied with activations.

        Weights of three axes or more get their inputs first, [*in, *out]: XLA multiplies with
        matrices, which it would make of the other order by a transposition at each use. Experts
        stay apart, since a step reads few of them.
        """
        order = list(range(len(axes)))
        if len(axes) > 2 and "experts" not in axes:  # a product into the hidden size, or out of it
            order = order[-1:] + order[:-1] if axes[-1] == "embed" else order[1:] + order[:1]
        layers = tuple(weight[i].transpose(order) for i in range(len(weight)))
        return cls(layers, tuple(order))

    def stacked(self) -> Array:
        """The weight [L, *axes]."""
        order = [self.order.index(i) for i in range(len(self.order))]
        return jnp.stack([w.transpose(order) for w in self.layers])


Weight = Array | LayerWeights


def layers_apart(weights: nnx.State) -> list[Weight]:
    """Turn the stacked weights of the layers into `LayerWeights`, freeing the originals.

    Returns:
        The flat list of weights that a step takes. (On a GPU it takes `jax.tree.leaves(weights)`:
        products read their slices of a stack in place there.)
    """
    variables = jax.tree.leaves_with_path(weights, is_leaf=lambda x: isinstance(x, nnx.Param))
    apart: list[Weight] = []
    for path, param in variables:
        weight = param.get_value()
        if path[0].key == STACKED:
            apart.append(LayerWeights.from_stacked(weight, param.get_metadata()["axes"]))
            weight.delete()
        else:
            apart.append(weight)
    return apart


def stack(weights: list[Weight]) -> list[Array]:
    """The weights as `abstract_weights` describes them; for use inside a compiled step."""
    return [w.stacked() if isinstance(w, LayerWeights) else w for w in weights]


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    """Write one layer's value into the stacked array, in place."""
    return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, axis=0)


def _place(abstract: nnx.State, get_value: GetValue) -> nnx.State:
    """Make the arrays that `abstract` describes on the mesh, with values from `get_value`."""

    def make(path: tuple, param: nnx.Variable) -> nnx.Variable:
        like = param.get_value()
        if path[0] != STACKED:
            value = get_value(path, 0, like.shape).astype(like.dtype)
            return param.replace(place(value, like.sharding))
        layout = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[1:]))
        stacked = jnp.zeros(like.shape, like.dtype, device=like.sharding)
        for i in range(len(stacked)):
            value = get_value(path, i, like.shape[1:]).astype(like.dtype)
            stacked = _fill(stacked, place(value, layout), i)
        return param.replace(stacked)

    return nnx.map_state(make, abstract)
