"""Checkpoints into sharded arrays: safetensors only, one layer's tensors on the host at a time."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from nanovllm_jax.config import ModelConfig, read_json
from nanovllm_jax.models import Qwen3
from nanovllm_jax.sharding import Sharding, place

INDEX = "model.safetensors.index.json"
STACKED = "layers."  # parameters under this path carry a leading axis of layers

# (parameter path, layer number, shape of one layer's parameter) -> its value
Source = Callable[[str, int, tuple[int, ...]], np.ndarray | jax.Array]


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
    sources = {path: model.checkpoint_tensors(config, path) for path in _parameters(model, config)}
    expected = {}
    for path, (tensors, _) in sources.items():
        layers = range(config.num_layers if path.startswith(STACKED) else 1)
        expected |= {name.format(i=i): shape for i in layers for name, shape in tensors}
    checkpoint.check(expected, tied=config.tie_word_embeddings)

    def read(path: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        tensors, join = sources[path]
        return join(*(checkpoint.read(name.format(i=layer)) for name, _ in tensors))

    return _place(model, config, sharding, read)


def random_weights(
    model: type[Qwen3], config: ModelConfig, sharding: Sharding, seed: int
) -> nnx.State:
    """Random parameters of the right shapes, made on the devices: speed without a checkpoint."""
    root = jax.random.key(seed)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    count = 0

    def draw(path: str, layer: int, shape: tuple[int, ...]) -> jax.Array:
        nonlocal count
        count += 1
        if "norm" in path:
            return jnp.ones(shape, config.dtype)
        return normal(jax.random.fold_in(root, count), shape, config.dtype) * 0.02

    return _place(model, config, sharding, draw)


def abstract_weights(model: type[Qwen3], config: ModelConfig, sharding: Sharding) -> nnx.State:
    """The model's parameters as shapes, types and layouts, without their values."""
    state = []
    for path, param in _parameters(model, config).items():
        axes, value = param.get_metadata()["axes"], param.get_value()
        layout = sharding.named(*(("layers",) if path.startswith(STACKED) else ()), *axes)
        value = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout)
        state.append((tuple(path.split(".")), param.replace(value)))
    return nnx.from_flat_state(state)


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


def _place(
    model: type[Qwen3], config: ModelConfig, sharding: Sharding, source: Source
) -> nnx.State:
    """Build the model's state on the mesh, each parameter taken from `source`."""
    dtype = jnp.dtype(config.dtype)
    state = []
    for path, param in _parameters(model, config).items():
        axes, shape = param.get_metadata()["axes"], param.get_value().shape
        if not path.startswith(STACKED):
            value = place(source(path, 0, shape).astype(dtype), sharding.named(*axes))
        else:
            value = jnp.zeros(shape, dtype, device=sharding.named("layers", *axes))
            for i in range(config.num_layers):
                one = source(path, i, shape[1:]).astype(dtype)
                value = _fill(value, place(one, sharding.named(*axes)), i)
        state.append((tuple(path.split(".")), param.replace(value)))
    return nnx.from_flat_state(state)


def _parameters(model: type[Qwen3], config: ModelConfig) -> dict[str, nnx.Variable]:
    """The model's parameters as shapes, by dotted path."""
    abstract = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
