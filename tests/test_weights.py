"""Checkpoints: what is read, what is refused and under which name, and how much the host holds."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import config_json, make_checkpoint, random_tensors, save_tensors
from safetensors.numpy import load_file, save_file

from nanovllm_jax import LLM
from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.models.checkpoint import sources, tensor_shapes
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tensor_files import INDEX, Checkpoint
from nanovllm_jax.weights import load_weights, random_weights

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | changes), "utf-8")


def edit_tensors(path, edit, shards=1):
    """Write the tensors again after `edit(tensors)`."""
    tensors = random_tensors(json.loads((path / "config.json").read_text("utf-8")))
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


def test_a_tied_table_may_be_saved_under_either_name_or_both(checkpoint, tmp_path):
    path = make_checkpoint(tmp_path, "mqa")

    def repeat(tensors):
        tensors[HEAD] = tensors[TABLE].copy()

    def rename(tensors):
        tensors[HEAD] = tensors.pop(TABLE)

    for edit in (repeat, rename):
        edit_tensors(path, edit)
        assert_same(load(path), load(checkpoint("mqa")))


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
def test_a_rotary_table_that_config_json_determines_is_no_weight(checkpoint, tmp_path, name, kind):
    path = make_checkpoint(tmp_path, "gqa", rope_parameters={"rope_theta": 1e6})
    torch = pytest.importorskip("torch")
    table = (1.0 / (1e6 ** (torch.arange(0, 16, 2).float() / 16))).numpy()
    edit_tensors(path, lambda tensors: tensors.update({name: table.astype(kind)}))
    assert_same(load(path), load(checkpoint("gqa")))
    edit_config(path, rope_parameters={"rope_theta": 1.1e6})
    with pytest.raises(ValueError, match=f"different from each other: {name} and what config"):
        load(path)


def test_files_of_other_names_do_not_matter(checkpoint, tmp_path):
    """Their names alone decide: adapters, averages, a trainer's state, macOS's metadata."""
    path = make_checkpoint(tmp_path, "gqa")
    other = {name: -x for name, x in random_tensors(config_json("gqa")).items()}
    for name in ("model_ema", "old", "zz", "adapter_model", "consolidated"):
        save_file(other, path / f"{name}.safetensors")
    save_file({"step": np.zeros(1, np.int64)}, path / "training_state.safetensors")
    for name in ("._model.safetensors", "._config.json", ".DS_Store"):
        (path / name).write_bytes(b"\0\5\26\7Mac OS X")
    assert_same(load(path), load(checkpoint("gqa")))


def test_the_index_may_name_model_safetensors_and_list_fewer_tensors(checkpoint, tmp_path):
    path = make_checkpoint(tmp_path, "gqa")
    index = {"weight_map": {QUERY: "model.safetensors"}}
    (path / INDEX).write_text(json.dumps(index), "utf-8")
    assert_same(load(path), load(checkpoint("gqa")))


def test_float16_is_read_exactly(checkpoint, tmp_path):
    path = make_checkpoint(tmp_path, "mqa")

    def halve(tensors):
        tensors.update({name: x.astype(np.float16) for name, x in tensors.items()})

    edit_tensors(path, halve)
    wanted = [x.astype(np.float16).astype(np.float32) for x in leaves(load(checkpoint("mqa")))]
    for found, want in zip(leaves(load(path)), wanted, strict=True):
        np.testing.assert_array_equal(found, want)


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


def test_tensors_of_one_parameter_may_have_different_types(checkpoint, tmp_path):
    path = make_checkpoint(tmp_path, "gqa")
    kinds = {QUERY: np.float16, QUERY.replace("q_proj", "k_proj"): ml_dtypes.bfloat16}

    def convert(tensors):
        tensors.update({name: tensors[name].astype(kind) for name, kind in kinds.items()})

    edit_tensors(path, convert)
    for found, near in zip(leaves(load(path)), leaves(load(checkpoint("gqa"))), strict=True):
        np.testing.assert_allclose(found, near, rtol=1e-2, atol=1e-6)


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
    (model_dir / "model.safetensors.index.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        LLM(str(model_dir))


def test_pickled_weights_are_never_loaded(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file.*pickle"):
        LLM(str(model_dir))


def test_a_file_of_another_name_alone_is_named_with_what_is_looked_for(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "old.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=r"neither model\.safetensors nor .*index\.json, only old\.safetensors: rename",
    ):
        LLM(str(model_dir))


def test_an_index_of_other_files_beside_model_safetensors_is_refused(model_dir):
    """transformers takes the one, vLLM the other; which is older cannot be known."""
    tensors = random_tensors(config_json("gqa"))
    save_tensors(model_dir, tensors, 2)
    with pytest.raises(ValueError, match=r"both model\.safetensors and .*index\.json.*00001-of"):
        LLM(str(model_dir))
    for file in model_dir.glob("model-*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"both model\.safetensors and .*index\.json.*00001-of"):
        LLM(str(model_dir))


def test_a_tensor_in_two_files_is_named_with_both(model_dir):
    edit_tensors(model_dir, lambda tensors: None, shards=2)
    first, second = sorted(model_dir.glob("model-*"))
    save_file(load_file(first) | {QUERY: load_file(second)[QUERY]}, first)
    with pytest.raises(ValueError, match=rf"two files: {QUERY} in {first.name} and {second.name}"):
        LLM(str(model_dir))


def test_a_tensor_that_is_not_where_the_index_says_is_named(model_dir):
    edit_tensors(model_dir, lambda tensors: None, shards=2)
    index = json.loads((model_dir / INDEX).read_text("utf-8"))
    first, second = sorted(model_dir.glob("model-*"))
    assert index["weight_map"][QUERY] == second.name
    index["weight_map"] |= {QUERY: first.name, "model.mtp.weight": second.name}
    (model_dir / INDEX).write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match=f"not where .* says: {QUERY} in {first.name}.*mtp"):
        LLM(str(model_dir))


def test_a_tensor_that_the_index_does_not_list_is_not_dropped(model_dir):
    edit_tensors(model_dir, lambda t: t.update({"extra": np.zeros(3, np.float32)}), shards=2)
    index = json.loads((model_dir / INDEX).read_text("utf-8"))
    del index["weight_map"]["extra"]
    (model_dir / INDEX).write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match=r"unexpected: extra \(model-0000"):
        LLM(str(model_dir))


@pytest.mark.parametrize("file", ["../model.safetensors", "pytorch_model.bin", "", 5, None])
def test_an_index_leads_to_safetensors_files_of_its_directory(model_dir, file):
    (model_dir / INDEX).write_text(json.dumps({"weight_map": {QUERY: file}}), "utf-8")
    with pytest.raises(ValueError, match=rf"{INDEX} maps {QUERY} to "):
        LLM(str(model_dir))


def test_a_tied_table_and_a_head_that_differ_are_refused(tmp_path):
    path = make_checkpoint(tmp_path, "mqa")

    def repeat(tensors):
        tensors[HEAD] = tensors[TABLE].copy()
        tensors[HEAD][-1, -1] += 1

    edit_tensors(path, repeat)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight, although"
    ):
        LLM(str(path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (np.int8, "I8"),
        (np.float64, "F64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        (np.int32, "I32"),
    ],
)
def test_types_that_are_not_computed_are_named(model_dir, kind, name):
    edit_tensors(model_dir, lambda t: t.update({QUERY: t[QUERY].astype(kind)}))
    with pytest.raises(ValueError, match=f"of a type other than F32, F16, BF16: {QUERY} is {name}"):
        LLM(str(model_dir))


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(model_dir, kind, value):
    def spoil(tensors):
        tensors[QUERY][7, 3] = value
        tensors.update({name: x.astype(kind) for name, x in tensors.items()})

    edit_tensors(model_dir, spoil)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {QUERY} has NaN or infinite"):
        LLM(str(model_dir))


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_smallest_numbers_are_weights(model_dir, kind):
    def stretch(tensors):
        limits = ml_dtypes.finfo(kind)
        tensors.update({name: x.astype(kind) for name, x in tensors.items()})
        tensors[QUERY][0, :4] = limits.max, limits.min, limits.smallest_subnormal, -0.0

    edit_tensors(model_dir, stretch)
    load(model_dir)


def test_pointers_and_links_in_place_of_weights_are_named(model_dir):
    file = model_dir / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git-LFS pointer.*git lfs pull"):
        LLM(str(model_dir))
    file.unlink()
    file.symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a link to \.\./\.\./blobs"):
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
