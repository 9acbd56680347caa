"""Checkpoints into sharded arrays: safetensors only, one layer's tensors on the host at a time."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from nanovllm_jax.config import ModelConfig, read_json
from nanovllm_jax.models import Qwen3
from nanovllm_jax.sharding import Sharding, place

INDEX = "model.safetensors.index.json"
STACKED = "layers"  # parameters whose path begins so carry a leading axis of layers

# (parameter path, layer number, shape of one layer's parameter) -> its value
Source = Callable[[tuple, int, tuple[int, ...]], np.ndarray | jax.Array]


def load_weights(
    model: type[Qwen3], config: ModelConfig, sharding: Sharding, directory: Path
) -> nnx.State:
    """The model's parameters, from a Hugging Face checkpoint straight into their shards.

    Raises:
        FileNotFoundError: there is no safetensors file, or the index names one that is not there.
        ValueError: a file is damaged, or weights are missing, unexpected or wrongly shaped; the
            message names them.
    """
    checkpoint = Checkpoint(directory)
    abstract = abstract_weights(model, config, sharding)
    sources = {
        path: model.checkpoint_tensors(config, ".".join(map(str, path)))
        for path, _ in nnx.to_flat_state(abstract)
    }
    expected = {}
    for path, (tensors, _) in sources.items():
        layers = range(config.num_layers if path[0] == STACKED else 1)
        expected |= {name.format(i=i): shape for i in layers for name, shape in tensors}
    checkpoint.check(expected, tied=config.tie_word_embeddings)

    def read(path: tuple, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        tensors, join = sources[path]
        return join(*(checkpoint.read(name.format(i=layer)) for name, _ in tensors))

    return _place(abstract, read)


def random_weights(
    model: type[Qwen3], config: ModelConfig, sharding: Sharding, seed: int
) -> nnx.State:
    """Random parameters of the right shapes, made on the devices: speed without a checkpoint."""
    root = jax.random.key(seed)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    count = 0

    def draw(path: tuple, layer: int, shape: tuple[int, ...]) -> jax.Array:
        nonlocal count
        count += 1
        if "norm" in str(path):
            return jnp.ones(shape, config.dtype)
        return normal(jax.random.fold_in(root, count), shape, config.dtype) * 0.02

    return _place(abstract_weights(model, config, sharding), draw)


def abstract_weights(model: type[Qwen3], config: ModelConfig, sharding: Sharding) -> nnx.State:
    """The model's parameters as shapes, types and layouts, without their values."""

    def lay_out(path: tuple, param: nnx.Variable) -> nnx.Variable:
        axes, value = param.get_metadata()["axes"], param.get_value()
        layout = sharding.named(*(("layers",) if path[0] == STACKED else ()), *axes)
        return param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout))

    whole = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
    return nnx.map_state(lay_out, nnx.state(whole, nnx.Param))


class Checkpoint:
    """The tensors of a directory's safetensors files, by name, read when asked for."""

    def __init__(self, directory: Path):
        if (directory / INDEX).is_file():
            index = read_json(directory / INDEX)
            if "weight_map" not in index:
                raise ValueError(f"{directory / INDEX} is damaged: it has no weight_map")
            names = set(index["weight_map"].values())
            files = [directory / name for name in sorted(names)]
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{directory} has no *.safetensors file (pickled checkpoints are never loaded)"
            )
        self.tensors = {}  # name -> open file
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{directory / INDEX} names {file.name}, which is not there"
                )
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or truncated: {error}") from None
            self.tensors |= dict.fromkeys(handle.keys(), handle)
        self.directory = directory

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].get_tensor(name)

    def check(self, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
        """Raise ValueError unless the files hold exactly these names and shapes."""
        # Checkpoints with tied embeddings may repeat the table under the head's name.
        ignored = {"lm_head.weight"} if tied else set()
        found = {n: tuple(f.get_slice(n).get_shape()) for n, f in self.tensors.items()}
        problems = {
            "missing": sorted(expected.keys() - found.keys()),
            "unexpected": sorted(found.keys() - expected.keys() - ignored),
            "wrongly shaped": [
                f"{name} has {found[name]}, config.json implies {expected[name]}"
                for name in sorted(expected.keys() & found.keys())
                if found[name] != expected[name]
            ],
        }
        said = [
            f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5))
            for kind, names in problems.items()
            if names
        ]
        if said:
            raise ValueError(f"{self.directory}: weights do not fit; {'; '.join(said)}")


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    """Write one layer's value into the stacked array, in place."""
    return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, axis=0)


def _place(abstract: nnx.State, source: Source) -> nnx.State:
    """Make the arrays that `abstract` describes on the mesh, each parameter taken from `source`."""

    def make(path: tuple, param: nnx.Variable) -> nnx.Variable:
        like = param.get_value()
        if path[0] != STACKED:
            value = source(path, 0, like.shape).astype(like.dtype)
            return param.replace(place(value, like.sharding))
        layout = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[1:]))
        stacked = jnp.zeros(like.shape, like.dtype, device=like.sharding)
        for i in range(len(stacked)):
            value = source(path, i, like.shape[1:]).astype(like.dtype)
            stacked = _fill(stacked, place(value, layout), i)
        return param.replace(stacked)

    return nnx.map_state(make, abstract)
