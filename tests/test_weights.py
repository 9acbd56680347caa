"""Checkpoints: what is read, what is refused and under which name, and how much the host holds."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import config_json, make_checkpoint, random_tensors, save_tensors

from nanovllm_jax import LLM
from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.models.checkpoint import sources, tensor_shapes
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.weights import Checkpoint, load_weights, random_weights

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model_dir(checkpoint, tmp_path):
    """A copy of a sound checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "model"))


def load(path, devices=1):
    sharding = make_sharding({"tensor": devices})
    config = ModelConfig.from_directory(Path(path)).sharded(sharding.size)
    return load_weights(config, sharding, Path(path))


def leaves(state):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(state)]


def assert_same(a, b):
    for left, right in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path, edit, shards=1):
    """Write the tensors again after `edit(tensors)`."""
    tensors = random_tensors(json.loads((path / "config.json").read_text()))
    edit(tensors)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_tensors(path, tensors, shards)


# --- what is read ---


@pytest.mark.parametrize("shape", ["gqa", "mqa"])
def test_one_file_or_many_are_the_same_model(checkpoint, shape):
    assert_same(load(checkpoint(shape)), load(checkpoint(shape, shards=4)))


def test_every_number_of_the_checkpoint_arrives(checkpoint):
    for shape in ("gqa", "mqa", "mha"):
        tensors = random_tensors(config_json(shape))
        loaded = leaves(load(checkpoint(shape)))
        assert sum(x.size for x in loaded) == sum(x.size for x in tensors.values())
        total = sum(float(np.abs(x).astype(np.float64).sum()) for x in tensors.values())
        assert sum(float(np.abs(x).astype(np.float64).sum()) for x in loaded) == pytest.approx(
            total, rel=1e-9
        )


def test_what_transformers_saves_is_read(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3ForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load(tmp_path), load(checkpoint()))
    ours, theirs = (ModelConfig.from_directory(Path(p)) for p in (checkpoint(), tmp_path))
    assert ours == theirs


def test_a_tied_checkpoint_may_repeat_the_table_as_its_head(checkpoint, tmp_path):
    path = make_checkpoint(tmp_path, "mqa")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(path, repeat)
    assert_same(load(path), load(checkpoint("mqa")))


def test_bfloat16_is_read_exactly(checkpoint):
    state = load(checkpoint("mqa", dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"bfloat16"}
    import ml_dtypes

    table = random_tensors(config_json("mqa"))["model.embed_tokens.weight"]
    want = table.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert any(x.shape == want.shape and np.array_equal(x, want) for x in leaves(state))


@pytest.mark.parametrize("devices", [2, 8])
def test_shards_hold_the_model_once(checkpoint, devices):
    """Each device gets its share; KV heads are copied where they are fewer than the devices."""
    state = load(checkpoint("eight_heads"), devices)
    whole = sum(x.size for x in leaves(load(checkpoint("eight_heads"))))
    per_device = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
    assert whole / devices < per_device < 1.4 * whole / devices


def test_random_weights_have_the_checkpoints_shapes(checkpoint):
    config = ModelConfig.from_directory(checkpoint())
    drawn = random_weights(config, make_sharding({"tensor": 1}), seed=2**64 - 1)
    read = load(checkpoint())
    assert jax.tree.structure(drawn) == jax.tree.structure(read)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(state)] for state in (drawn, read)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("shape", "shards"),
    [("gqa", 1), ("mqa", 1), ("gqa", 2), ("eight_heads", 4), ("eight_heads", 8)],
)
def test_parameters_are_split_into_the_tensors_that_they_are_joined_from(checkpoint, shape, shards):
    """Also those of a sharded model, with copies of KV heads and a padded vocabulary."""
    config = ModelConfig.from_directory(checkpoint(shape))
    config = config.sharded(lambda axis: 1 if "embed" in axis else shards)
    tensors = random_tensors(config_json(shape))
    shapes = {name: x.shape for name, x in tensors.items()}
    assert tensor_shapes(config) == shapes
    wanted = {
        ".".join(map(str, path)): param.get_value().shape
        for path, param in nnx.to_flat_state(parameters(config))
    }
    found = {}
    for path, source in sources(config).items():
        stacked = path.startswith("layers.")
        for i in range(config.num_layers if stacked else 1):
            names = [name.format(i=i) for name, _ in source.tensors]
            joined = source.join(*(tensors[name] for name in names))
            assert joined.shape == wanted[path][stacked:]
            found |= dict(zip(names, source.split(joined), strict=True))
    assert found.keys() == tensors.keys() and sources(config).keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, tensors[name])


# --- what is refused ---


def test_missing_weights_are_named(model_dir):
    edit_tensors(model_dir, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(ValueError, match=f"missing: {QUERY}"):
        LLM(str(model_dir))


def test_unexpected_weights_are_named(model_dir):
    edit_tensors(model_dir, lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"unexpected: model\.extra\.weight"):
        LLM(str(model_dir))


def test_an_untied_head_that_is_missing_is_named(model_dir):
    edit_tensors(model_dir, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        LLM(str(model_dir))


def test_wrongly_shaped_weights_are_named_with_both_shapes(model_dir):
    def transpose(tensors):
        tensors[QUERY] = np.ascontiguousarray(tensors[QUERY].T)

    edit_tensors(model_dir, transpose)
    with pytest.raises(
        ValueError, match=rf"{QUERY} has \(48, 96\), config.json implies \(96, 48\)"
    ):
        LLM(str(model_dir))


def test_many_problems_are_counted(model_dir):
    edit_config(model_dir, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\..*and 17 more"):
        LLM(str(model_dir))


def test_fewer_layers_than_the_checkpoint_has(model_dir):
    edit_config(model_dir, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.1\."):
        LLM(str(model_dir))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(model_dir, keep):
    file = model_dir / "model.safetensors"
    data = file.read_bytes()
    cut = int(len(data) * keep) if isinstance(keep, float) else keep
    file.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        LLM(str(model_dir))


def test_a_file_that_the_index_names_and_is_not_there(model_dir):
    edit_tensors(model_dir, lambda tensors: None, shards=3)
    (model_dir / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00003.safetensors"):
        LLM(str(model_dir))


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_index_is_named(model_dir, text):
    (model_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        LLM(str(model_dir))


def test_pickled_weights_are_never_loaded(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file.*pickle"):
        LLM(str(model_dir))


# --- how much the host holds ---


@pytest.mark.parametrize("shards", [1, 4])
def test_the_host_never_holds_a_second_copy(checkpoint, monkeypatch, shards):
    """Of what was read from the files, no more than one parameter of one layer is alive."""
    path = checkpoint("gqa", shards=shards, num_hidden_layers=6)
    alive, peak, total = {}, 0, 0
    read = Checkpoint.read

    def counted(self, name):
        nonlocal peak, total
        array = read(self, name)
        alive[id(array)] = array.nbytes
        total += array.nbytes
        weakref.finalize(array, alive.pop, id(array))
        peak = max(peak, sum(alive.values()))
        return array

    monkeypatch.setattr(Checkpoint, "read", counted)
    gc.disable()
    try:
        load(path)
    finally:
        gc.enable()
    largest = 2 * 96 * 48 * 4  # gate and up; q, k, v and the table are smaller
    assert total > 15 * largest
    assert peak <= 1.5 * largest
    assert not alive
