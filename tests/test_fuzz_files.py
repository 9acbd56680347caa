"""Damages the files of a model's directory at random, and judges what is read from them.

Each mutation of config.json, generation_config.json, the headers and the index of the weights, or
the tokenizer's files must end in one of two ways. Either it is refused by a ValueError or OSError
that names a file it touched (a missing config.json is the AssertionError of the API's contract), or
it is accepted and every reading is right:

- config.json means what transformers' Qwen3Config says that it means;
- if weights or config.json differ from the undamaged ones, the logits of a forward pass in NumPy,
  from what was read here, are those of transformers' own model of the same directory;
- otherwise the weights are the undamaged ones bit for bit, and none of the files that transformers
  would read holds a tensor that is not used;
- the tokens that end a request are all that the files name;
- the tokenizer's ids are those of the `tokenizers` library reading tokenizer.json by itself.

Equal readings and weights give equal tokens: test_parity compares those with transformers.

`FUZZ_MUTATIONS=50000 pytest tests/test_fuzz_files.py -s` tries that many and prints the figures.
"""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import struct
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import VOCAB, byte_tokenizer, config_json, random_tensors, save_tensors
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tokenizer import eos_token_ids, load_tokenizer
from nanovllm_jax.weights import load_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "2000"))
SECONDS = 60  # A mutation that takes longer is taken to hang.
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8}
TEXT = 'Hello, you! {"a": [1, 2]} <end> x'
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 130, 35]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# --- the undamaged directories ---


def write_model(path, name):
    """Write one of the models: in transformers' present spelling, or as published until 2025."""
    if name == "fp8":
        config = config_json(**SIZES, eos_token_id=5, quantization_config=FP8)
        tensors = {}
        for key, tensor in random_tensors(config).items():
            tensors[key] = tensor
            if "proj" in key:
                tensors |= quantized(key, tensor, 4)
        save_tensors(path, tensors)
    elif name != "two files":
        config = config_json(**SIZES, eos_token_id=5)
        save_tensors(path, random_tensors(config))
    else:
        config = config_json(**SIZES, tie_word_embeddings=True, rope_parameters=None, dtype=None)
        config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"}
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
        tensors = random_tensors(config)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.rotary_emb.inv_freq"] = 1e4 ** (-np.arange(0, 8, 2) / 8)
        tensors = {name: x.astype(np.float16) for name, x in tensors.items()}
        save_tensors(path, tensors, shards=2)
    (path / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    generation = {"do_sample": True, "eos_token_id": [5, 7], "temperature": 0.6}
    (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    if name == "no tokenizer":  # transformers judges config.json as it loads one
        return
    byte_tokenizer(VOCAB).save_pretrained(path)
    if name == "two files":
        tokenizer = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]
        (path / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), "utf-8")
        (path / "merges.txt").write_text("#version: 0.2\n", "utf-8")
        (path / "tokenizer.json").unlink()
        settings_ = {"eos_token": "<end>", "unk_token": None, "tokenizer_class": "Qwen2Tokenizer"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings_), "utf-8")


def quantized(name, tensor, size):
    """A matrix as 8-bit floats, and a scale for each square of so many of its numbers."""
    blocks = tensor.reshape(len(tensor) // size, size, -1, size)
    scales = np.abs(blocks).max((1, 3)) / 448
    weight = (blocks / scales[:, None, :, None]).reshape(tensor.shape)
    return {name: weight.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scales}


class Models:
    """The undamaged models: the bytes of their files, and what is read from them."""

    names = ("one file", "two files", "fp8", "no tokenizer")

    def __init__(self, folder):
        self.files, self.readings = {}, {}
        for name in self.names:
            (path := folder / name).mkdir()
            write_model(path, name)
            self.files[name] = {file.name: file.read_bytes() for file in path.iterdir()}
            self.readings[name] = read(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


class Reading(NamedTuple):
    config: object
    weights: dict
    ends: set
    token_ids: list | None


def read(path):
    """Read a directory as an engine does when it starts on a CPU."""
    config = EngineConfig.resolve(path, "cpu").model_config
    tokenizer = load_tokenizer(path)
    ends = set(eos_token_ids(config, tokenizer))
    state = load_weights(config, make_sharding({"tensor": 1}), path)
    weights = {
        ".".join(str(part.key) for part in where if hasattr(part, "key")): np.asarray(leaf)
        for where, leaf in jax.tree.leaves_with_path(state)
    }
    token_ids = tokenizer and tokenizer.encode(TEXT, add_special_tokens=False)
    return Reading(config, weights, ends, token_ids)


# --- mutations ---

ODD = [None, True, False, 0, 1, 2, 3, -1, 1.0, 0.5, 1e-6, 1e6, float("nan"), float("inf"), 2**31]
ODD += [10**30, "", "1", "x", "<end>", "full_attention", [], {}, [0], ["x"], {"x": 1}, [[]]]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPE = [None, {}, YARN, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}]
ROPE += [{"rope_type": "default", "rope_theta": theta} for theta in (1e4, 5e5)]
ROPE += [{"rope_theta": 5e5, "factor": 2.0}, {"full_attention": {"rope_theta": 5e5}}]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FP8 |= {"weight_block_size": [4, 4]}
FLAGS, COUNTS = [True, False, None], [None, 0, 1, 2, 3, 4, 8, 16, 24]
# Values that the keys have somewhere, whether in these files or not.
LIKELY = {
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "rope_theta": [1e4, 10000, 5e5, 1000000, None],
    "rope_type": ["default", "yarn", "linear"],
    "partial_rotary_factor": [1.0, 0.5],
    "rms_norm_eps": [1e-6, 1e-5, 0.1, 1],
    "tie_word_embeddings": FLAGS,
    "attention_bias": FLAGS,
    "mlp_bias": FLAGS,
    "use_sliding_window": FLAGS,
    "sliding_window": [None, 4, 4096],
    "max_window_layers": [0, 1, 2, 28],
    "layer_types": [["full_attention"] * 2, ["full_attention", "sliding_attention"], None],
    "hidden_act": ["silu", "swish", "gelu"],
    "dtype": ["float32", "float16", "bfloat16", "float64", None],
    "torch_dtype": ["float32", "float16", "bfloat16", "auto", None],
    "quantization_config": [None, {"quant_method": "fp8"}, FP8],
    "eos_token_id": [None, 2, 5, [5, 7], [9], [], 151645],
    "architectures": [["Qwen3ForCausalLM"], ["Qwen3Model"], ["Qwen3ForCausalLM", "X"], None],
    "model_type": ["qwen3", "qwen2", None],
    "num_hidden_layers": COUNTS,
    "num_attention_heads": COUNTS,
    "num_key_value_heads": COUNTS,
    "head_dim": COUNTS,
    "hidden_size": COUNTS,
    "vocab_size": [131, 130, 132, 256],
    "max_position_embeddings": [8, 2048, 40960],
    "per_layer_config": [None, {"0": {"rms_norm_eps": 0.1}}],
    "is_causal": FLAGS,
    "tokenizer_class": ["Qwen2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", None],
    "eos_token": ["<end>", "x", "<new>", None, {"content": "<end>", "__type": "AddedToken"}],
    "bos_token": ["<end>", "x", None],
    "add_bos_token": FLAGS,
    "add_prefix_space": FLAGS,
    "auto_map": [{"AutoTokenizer": ["tok.My", None]}],
    "extra_special_tokens": [["x"], {"image_token": "<img>"}],
    "chat_template": ["{{ messages }}", "{% if %}"],
    "weight_map": [{}, {"lm_head.weight": SINGLE}],
    "shape": [[16], [131, 16], [16, 131], [2, 8], []],
    "dtype of a tensor": ["F32", "F16", "BF16", "F64", "I8", "U8", "F8_E4M3", "I32", "BOOL"],
    "data_offsets": [[0, 0], [0, 64], [64, 0]],
    "weight_block_size": [[4, 4], [4, 8], [128, 128], None, 4],
}
OF_CONFIG = list(LIKELY)[:29]
OF_TOKENIZER = list(LIKELY)[29:37]
NAMES = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
NAMES += ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
NAMES += ["model.layers.2.input_layernorm.weight", "extra"]
FILES = [SINGLE, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES += ["old.safetensors", "._model.safetensors", "pytorch_model.bin", INDEX]
FILES += ["config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
FILES += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
LINK, FOLDER, GONE = "a link that leads nowhere", "a folder", "nothing"


class Mutation(NamedTuple):
    model: str
    changes: dict  # file name -> its new bytes, or one of LINK, FOLDER, GONE


@st.composite
def edited(draw, value, keys):
    """A JSON value with one change somewhere inside; `keys` may be added to the outermost dict."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value)))
    edits = ["set", "set", "set", "inside", "inside", "delete", "rename", "swap"]
    adds = ["add"] * (8 if keys else 1)
    edit = draw(st.sampled_from([*adds, *(edits if inner else [])]))
    result = value.copy()
    if edit == "add":
        key = draw(st.sampled_from(keys or ["x"]))
        new = draw(likely(key))
        if isinstance(value, dict):
            result[key] = new
        else:
            result.insert(draw(st.integers(0, len(value))), new)
        return result
    key = draw(st.sampled_from(inner))
    if edit == "inside" and isinstance(value[key], dict | list):
        result[key] = draw(edited(value[key], []))
    elif edit in ("set", "inside"):
        result[key] = draw(likely(key, value[key]))
    elif edit == "swap":
        other = draw(st.sampled_from(inner))
        result[key], result[other] = value[other], value[key]
    else:
        item = result.pop(key)
        if edit == "rename" and isinstance(value, dict):
            result[draw(st.sampled_from([*keys, *NAMES, f"{key}_"]))] = item
    return result


@st.composite
def likely(draw, key, old=None):
    """A value for a key: one that it has somewhere, one near the old one, or any."""
    known = LIKELY.get("dtype of a tensor" if old in LIKELY["dtype of a tensor"] else key, [])
    kinds = ["known"] * 3 * bool(known) + ["odd"]
    if type(old) in (int, float, str):
        kinds.append("near")
    match draw(st.sampled_from(kinds)):
        case "known":
            return draw(st.sampled_from(known))
        case "near" if isinstance(old, str):
            return draw(st.sampled_from([old + "_", old[1:], old.upper(), [old], *FILES]))
        case "near":
            return draw(st.sampled_from([old + 1, old - 1, -old, old * 2, float(old), str(old)]))
    return draw(st.sampled_from(ODD))


@st.composite
def damaged(draw, data):
    """Bytes with a damage that knows nothing of their meaning."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    match draw(st.sampled_from(["cut", "flip", "insert", "drop", "replace"])):
        case "cut":
            return data[:at]
        case "flip" if data:
            flipped = data[at] ^ 1 << draw(st.integers(0, 7))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        case "drop":
            return data[:at] + data[at + draw(st.integers(1, 16)) :]
    whole = [b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf" + data, b"\xff\xfe", b"[" * 100_000]
    whole += [data * 2, b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"]
    return draw(st.sampled_from(whole))


@st.composite
def changed_file(draw, name, data):
    """New contents of a file: edited as what it is, mostly, or damaged."""
    if draw(st.integers(0, 3)) == 0 or not name.endswith((".json", ".safetensors")):
        if name.endswith(".safetensors") and draw(st.booleans()):  # its header, not the numbers
            size = 8 + struct.unpack("<Q", data[:8])[0]
            return draw(damaged(data[:size])) + data[size:]
        return draw(damaged(data))
    if name.endswith(".safetensors"):
        size = struct.unpack("<Q", data[:8])[0]
        header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
        if draw(st.booleans()):  # one more tensor: a copy of another, or a new one
            like = dict(header[draw(st.sampled_from([n for n in header if n != "__metadata__"]))])
            begin, end = like["data_offsets"]
            copy = numbers[begin:end] if draw(st.booleans()) else bytes(end - begin)
            like["data_offsets"] = [len(numbers), len(numbers) + end - begin]
            header[draw(st.sampled_from([*NAMES, *header]))] = like
            numbers += copy
        else:
            header = draw(edited(header, NAMES))
        text = json.dumps(header).encode()
        size_of_it = draw(st.sampled_from([len(text)] * 9 + [len(text) + 1, 0, 2**62]))
        return struct.pack("<Q", size_of_it) + text + numbers
    value = json.loads(data)
    keys = {"config.json": OF_CONFIG, "generation_config.json": ["eos_token_id"], INDEX: NAMES}
    new = draw(edited(value, keys.get(name, OF_TOKENIZER)))
    text = json.dumps(new)
    if draw(st.integers(0, 15)) == 0:  # a key twice
        key = draw(st.sampled_from(list(value)))
        text = f"{{{json.dumps(key)}: {json.dumps(draw(likely(key, value[key])))}, {text[1:]}"
    return text.encode()


@st.composite
def mutations(draw, models):
    """One change of a model's files, or two or three."""
    name = draw(st.sampled_from(models.names))
    files = dict(models.files[name])
    changes = {}
    chosen = [*files, *[file for file in files if "model" in file], *["config.json"] * 4]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        file = draw(st.sampled_from(chosen))
        kind = draw(st.sampled_from(["change"] * 24 + ["copy", "copy", "move", LINK, FOLDER, GONE]))
        if file not in files or file in changes:
            continue
        if kind == "change":
            changes[file] = draw(changed_file(file, files[file]))
        elif kind in ("copy", "move"):
            changes[draw(st.sampled_from(FILES))] = draw(
                st.one_of(st.just(files[file]), changed_file(file, files[file]))
            )
            if kind == "move":
                changes[file] = GONE
        else:
            changes[file] = kind
        files |= {f: data for f, data in changes.items() if isinstance(data, bytes)}
        files = {f: data for f, data in files.items() if isinstance(changes.get(f, b""), bytes)}
    return Mutation(name, changes)


# --- judging ---


class Hangs(BaseException):
    """No exception that anything would catch."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def logits(config, weights, tokens):
    """The logits of tokens in NumPy float32, from a config and weights as they were read."""
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(x):  # [T, heads, H]
        half = config.head_dim // 2
        inv_freq, factor = config.rope.frequencies(config.head_dim)
        angles = (np.arange(len(x))[:, None] * inv_freq.astype(np.float64))[:, None]
        cos, sin = factor * np.cos(angles), factor * np.sin(angles)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embed_tokens.weight"].astype(np.float64)[tokens]
    mask = np.triu(np.full((len(tokens),) * 2, -np.inf), 1)
    layers = {k.removeprefix("layers."): w for k, w in weights.items() if k.startswith("layers.")}
    for i in range(config.num_layers):
        w = {name.removesuffix(".weight"): weight[i] for name, weight in layers.items()}
        qkv = np.einsum("td,kghd->tkgh", norm(x, w["input_layernorm"]), w["self_attn.qkv_proj"])
        groups = config.group_size
        q = qkv[:, :, :groups].reshape(len(x), config.num_heads, -1)
        q = rotate(norm(q, w["self_attn.q_norm"]))
        k = rotate(norm(qkv[:, :, groups], w["self_attn.k_norm"])).repeat(groups, 1)
        v = qkv[:, :, groups + 1].repeat(groups, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(config.head_dim) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("tnh,dnh->td", out, w["self_attn.o_proj"])
        h = norm(x, w["post_attention_layernorm"])
        gate, up = np.einsum("td,cfd->ctf", h, w["mlp.gate_up_proj"])
        x = x + (silu(gate) * up) @ w["mlp.down_proj"].T
    head = weights["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm(x, weights["norm.weight"]) @ head.T


def for_transformers(path):
    """config.json in the spelling that transformers has for Qwen3: flat RoPE, floats as floats."""
    raw = json.loads((path / "config.json").read_bytes())
    if type(raw.get("rms_norm_eps")) is int:
        raw["rms_norm_eps"] = float(raw["rms_norm_eps"])
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(name), dict) and "full_attention" in raw[name]:
            raw[name] = raw[name]["full_attention"]
    if isinstance(raw.get("quantization_config"), dict):
        raw["quantization_config"] = raw["quantization_config"] | {"dequantize": True}
    return raw


def assert_as_transformers(config, path):
    """config.json means the same to transformers."""
    raw = for_transformers(path)
    theirs = transformers.Qwen3Config.from_dict(raw)
    window = theirs.sliding_window if "sliding_attention" in theirs.layer_types else None
    assert config.sliding_window == window and not raw.get("per_layer_config")
    numbers = dict(config.rope.numbers)
    assert {key: theirs.rope_parameters[key] for key in numbers} == numbers
    assert not theirs.attention_bias  # there are no biases in these files
    assert theirs.hidden_act in ("silu", "swish")
    quantization = getattr(theirs, "quantization_config", None) or FP8
    assert {key: quantization[key] for key in ("quant_method", "activation_scheme")} == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
    }
    pairs = [
        (config.rope.theta, theirs.rope_parameters["rope_theta"]),
        (config.rope.kind, theirs.rope_parameters["rope_type"]),
        (config.rms_norm_eps, theirs.rms_norm_eps),
        (config.tie_word_embeddings, theirs.tie_word_embeddings),
        (config.num_layers, theirs.num_hidden_layers),
        (config.num_heads, theirs.num_attention_heads),
        (config.num_kv_heads, theirs.num_key_value_heads),
        (config.head_dim, theirs.head_dim),
        (config.hidden_size, theirs.hidden_size),
        (config.intermediate_size, theirs.intermediate_size),
        (config.vocab_size, theirs.vocab_size),
        (config.max_position_embeddings, theirs.max_position_embeddings),
    ]
    assert not [pair for pair in pairs if pair[0] != pair[1]]


def assert_same_logits(reading, path, folder):
    """A forward pass from what was read is transformers' own of these files."""
    folder.mkdir()
    for file in path.iterdir():
        if file.name == INDEX:  # transformers insists on a part of it that it does not use
            index = {"metadata": {}, "weight_map": json.loads(file.read_bytes())["weight_map"]}
            (folder / INDEX).write_text(json.dumps(index), "utf-8")
        elif file.suffix == ".safetensors":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(for_transformers(path)), "utf-8")
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = TOKENS[: reading.config.longest_context]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    with np.errstate(all="ignore"):
        ours = logits(reading.config, reading.weights, tokens)
    if np.isfinite(ours).all() and np.abs(ours).max() < 1e4:  # else float32 overflows somewhere
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


def assert_nothing_dropped(reading, path):
    """All tensors of the files that transformers would read are used, or known to be redundant."""
    names = [SINGLE]
    if not (path / SINGLE).is_file():
        names = set(json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values())
    held = set()
    for name in names:
        data = (path / name).read_bytes()
        held |= set(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))
    layers = reading.config.num_layers
    left = {n for n in held if not any(f"layers.{i}." in n for i in range(layers))}
    left -= {"__metadata__", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all("inv_freq" in name for name in left), left


def named_ends(path, token_ids):
    """All ends that the files name, read with nothing of the library."""
    ends = set()
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            found = json.loads((path / name).read_bytes()).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found])
    if token_ids is not None:
        ends.add(load_tokenizer(path).eos_token_id)
    return ends - {None}


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[k].view(np.uint8), b[k].view(np.uint8)) for k in a
    )


def judge(mutation, models, path, folder):
    """Read the mutated directory; return the outcome in a word or two, or fail."""
    right = models.readings[mutation.model]
    for name, data in (models.files[mutation.model] | mutation.changes).items():
        if isinstance(data, bytes):
            (path / name).write_bytes(data)
        elif data == LINK:
            (path / name).symlink_to("../../blobs/0123")
        elif data == FOLDER:
            (path / name).mkdir()
    try:
        with time_limit():
            reading = read(path)
    except AssertionError as error:
        assert not (path / "config.json").is_file() and "has no config.json" in str(error)
        return "refused", "no config.json"
    except (ValueError, OSError) as error:
        # The name alone, not as a part of another, as in tokenizer_config.json.
        patterns = {n: rf"(?<![\w-]){re.escape(n)}(?!\.?\w)" for n in mutation.changes}
        named = [name for name, pattern in patterns.items() if re.search(pattern, str(error))]
        assert named, f"{error!r} names none of the files {list(mutation.changes)}"
        return "refused", type(error).__name__
    if "config.json" in mutation.changes:
        assert_as_transformers(reading.config, path)
    assert_nothing_dropped(reading, path)
    assert reading.ends == named_ends(path, reading.token_ids)
    if reading.token_ids != right.token_ids and (path / "tokenizer.json").is_file():
        raw = Tokenizer.from_file(str(path / "tokenizer.json"))
        assert reading.token_ids == raw.encode(TEXT, add_special_tokens=False).ids
    if (
        reading.config._replace
        if False
        else (reading.config == right.config and same(reading.weights, right.weights))
    ):
        equal = (reading.ends, reading.token_ids) == (right.ends, right.token_ids)
        return "accepted", "equal" if equal else "other ends or tokenizer, compared"
    assert_same_logits(reading, path, folder)
    return "accepted", "other config or weights, compared"


@pytest.mark.parametrize("count", [500, pytest.param(MUTATIONS, marks=pytest.mark.slow)])
def test_a_mutation_ends_in_right_tokens_or_in_an_error_that_names_the_file(
    models, tmp_path_factory, count
):
    outcomes = collections.Counter()

    @seed(int(os.environ.get("FUZZ_SEED", "0")))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(models))
    def judged(mutation):
        path = tmp_path_factory.mktemp("mutated")
        try:
            outcome = judge(mutation, models, path, path / "oracle")
        finally:
            shutil.rmtree(path)
        outcomes[outcome] += 1

    judged()
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:7} {' '.join(outcome)}")
    accepted = sum(n for (verdict, _), n in outcomes.items() if verdict == "accepted")
    assert 0.1 < accepted / count < 0.5, "too few mutations are hard to judge"
    assert outcomes["accepted", "other config or weights, compared"] > count / 200
