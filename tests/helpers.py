"""Tiny random checkpoints (Qwen3's unless told), requests for them, ways to look into an engine."""

import contextlib
import json
import zlib
from array import array
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import programs
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.layers.kv_cache import KVCache

VOCAB = 131  # no multiple of 2, 4 or 8
BLOCK = 256
EDGES = (1, 5, 255, 256, 257, 512)  # prompt lengths around the edges of blocks
NEW = 10  # tokens that a parity test generates

# name -> the part of config.json in which the shapes differ
SHAPES = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "mqa": {  # five query heads over one, tied, hidden_size unlike heads x head_dim
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_size": 40,
        "tie_word_embeddings": True,
    },
    "mha": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "eight_heads": {  # for 8 devices: four copies of each KV head
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
    },
}


# --- other families, as changes of `config_json` ---

ORIGINAL = {"original_max_position_embeddings": 160}  # the prompts have up to 512 tokens
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **ORIGINAL}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **ORIGINAL}


def family(name: str, model_type: str, heads: int, kv_heads: int, **changes) -> dict:
    changes = {"architectures": [f"{name}ForCausalLM"], "model_type": model_type} | changes
    changes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"head_dim": None, "attention_bias": None} | changes


EXPERTS = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
FAMILIES = {
    "qwen2": family("Qwen2", "qwen2", 14, 2, hidden_size=112, tie_word_embeddings=True),
    "qwen2-yarn": family("Qwen2", "qwen2", 3, 1, rope_parameters=YARN),
    "llama3": family("Llama", "llama", 6, 2, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biases": family(
        "Llama", "llama", 3, 3, attention_bias=True, mlp_bias=True, max_position_embeddings=512,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "llama-dynamic": family(
        "Llama", "llama", 15, 5, hidden_size=60,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral": family("Mistral", "mistral", 4, 2, head_dim=20, sliding_window=None),
    "smollm3": family(
        "SmolLM3", "smollm3", 4, 1, num_hidden_layers=5, no_rope_layers=[1, 0, 1, 1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": 2e6}, pad_token_id=0, eos_token_id=3,
    ),
    "qwen3-yarn": family("Qwen3", "qwen3", 6, 2, head_dim=16, rope_parameters=YARN),
    "qwen3-moe": family(
        "Qwen3Moe", "qwen3_moe", 4, 2, head_dim=16, norm_topk_prob=True, **EXPERTS
    ),
    "qwen3-moe-some": family(  # layers 1, 3 and 4 have an MLP
        "Qwen3Moe", "qwen3_moe", 6, 3, num_hidden_layers=6, decoder_sparse_step=1,
        mlp_only_layers=[1, 3, 4], tie_word_embeddings=True, **EXPERTS,
    ),
    "qwen3-biases": family("Qwen3", "qwen3", 4, 2, head_dim=16, attention_bias=True),
}  # fmt: skip


def config_json(shape: str = "gqa", **changes) -> dict:
    """Return a tiny Qwen3's config.json as transformers 5 writes it; None drops a key."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    config |= SHAPES[shape] | changes
    return {key: value for key, value in config.items() if value is not None}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw a checkpoint's tensors, at a scale that makes greedy outputs diverse."""
    rng = np.random.default_rng(seed)
    d, family = config["hidden_size"], config["model_type"]
    n, k, vocab = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size")
    )
    h = config.get("head_dim", d // n)

    def matrix(*shape):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    def norm(size):
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, d)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(d),
            "self_attn.q_proj": matrix(n * h, d),
            "self_attn.k_proj": matrix(k * h, d),
            "self_attn.v_proj": matrix(k * h, d),
        }
        if family in ("qwen3", "qwen3_moe"):
            layer |= {"self_attn.q_norm": norm(h), "self_attn.k_norm": norm(h)}
        layer |= {
            "self_attn.o_proj": matrix(d, n * h),
            "post_attention_layernorm": norm(d),
        }
        if family == "qwen3_moe" and i not in (config.get("mlp_only_layers") or []):
            f = config["moe_intermediate_size"]
            names = [f"mlp.experts.{e}." for e in range(config["num_experts"])]
            layer["mlp.gate"] = matrix(len(names), d)
        else:
            f, names = config["intermediate_size"], ["mlp."]
        for name in names:
            layer |= {f"{name}{part}_proj": matrix(f, d) for part in ("gate", "up")}
            layer |= {f"{name}down_proj": matrix(d, f)}
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
        biased = ["q_proj", "k_proj", "v_proj"] if family == "qwen2" else []
        biased = (
            ["q_proj", "k_proj", "v_proj", "o_proj"] if config.get("attention_bias") else biased
        )
        biased += ["gate_proj", "up_proj", "down_proj"] if config.get("mlp_bias") else []
        tensors |= {
            f"model.layers.{i}.{name}.bias": 2 * matrix(len(weight))
            for name, weight in layer.items()
            if name.split(".")[-1] in biased
        }
    tensors["model.norm.weight"] = norm(d)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, d)
    return tensors


def make_checkpoint(
    path: Path, shape: str = "gqa", *, shards: int = 1, tokenizer: bool = False, **changes
) -> Path:
    """Write a checkpoint directory: config.json, safetensors in `shards` files, a tokenizer."""
    config = config_json(shape, **changes)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = random_tensors(config)
    if config.get("dtype", config.get("torch_dtype")) == "bfloat16":
        tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_tensors(path, tensors, shards)
    if tokenizer:
        byte_tokenizer(VOCAB).save_pretrained(path)
    return path


def save_tensors(path: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write tensors to one file, or to several with the index that names them."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of printable ASCII: one token a character, an end token, a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_first = sorted(alphabet, key=lambda sign: (ord(sign) > 126 and sign != "Ġ", sign))
    vocab = {sign: i for i, sign in enumerate(["<end>", *ascii_first[: size - 1]])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return fast


def prompt(length: int, seed: int = 0) -> list[int]:
    """Draw random token ids, the same for the same arguments."""
    return np.random.default_rng((seed, length)).integers(0, VOCAB, length).tolist()


def edge_prompts(seed: int = 0) -> list[list[int]]:
    return [prompt(length, seed) for length in EDGES]


def greedy(max_tokens: int = NEW, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def tokens(llm, prompts, params) -> list[list[int]]:
    """Generate, and return the token ids alone; a request that failed fails the test."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not [output["error"] for output in outputs if "error" in output]
    return [output["token_ids"] for output in outputs]


def poison(llm) -> None:
    """Fill the engine's KV cache with NaN, so that whatever reads an unwritten position shows."""
    cache = llm.runner.state.cache
    nan = [jax.device_put(jnp.full(x.shape, jnp.nan, x.dtype), x.sharding) for x in cache]
    llm.runner.state = llm.runner.state._replace(cache=KVCache(*nan))


@contextlib.contextmanager
def quick_start(every_bucket: bool = False):
    """Make the engines that are built meanwhile start within a second or two.

    Compiling is what tests of engines spend their time on, so XLA optimizes little, and unless
    `every_bucket` an engine has one decode bucket and one prefill bucket, the largest of each, with
    the same number of rows: four programs instead of a dozen.
    """
    decode, prefill = programs.decode_buckets, programs.prefill_buckets
    quick = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        if not every_bucket:
            patch.setattr(programs, "decode_buckets", lambda seqs: decode(seqs)[-1:])
            patch.setattr(
                programs,
                "prefill_buckets",
                lambda tokens, seqs: [prefill(tokens, seqs)[-1]._replace(num_rows=seqs)],
            )
            patch.setattr(
                programs,
                "mixed_buckets",
                lambda _, tokens, seqs: [Bucket(tokens, seqs, is_mixed=True)],
            )
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", quick)


class FakeRunner:
    """Takes the place of `ModelRunner` for tests that need no device.

    A row's token is a checksum of all tokens before it, and of the request's seed unless it is
    greedy; so it depends on neither the batch nor the cache, as with a real model. Like a device,
    the runner keeps for itself the tokens that the host has not read yet.
    """

    num_blocks, batch_shards, vocab = 16, 1, VOCAB
    largest_bucket = None  # default: as large as the options allow

    def __init__(self, config):
        self.num_blocks = config.num_kvcache_blocks or self.num_blocks
        bucket = Bucket(config.max_num_batched_tokens, config.max_num_seqs)
        self.programs = SimpleNamespace(
            batch_shards=self.batch_shards, prefill_buckets=[self.largest_bucket or bucket],
            platform="cpu", chunk=None, mixed_rooms=lambda size: [],
        )  # fmt: skip
        self.known = {}  # seq_id -> its tokens
        self.before_read = lambda: None  # called whenever the host waits for a call's tokens

    def dispatch(self, batch):
        sampled = [[-1] * len(batch.seqs) for _ in range(batch.num_steps)]
        rows = zip(batch.seqs, batch.starts, batch.lengths, strict=True)
        for row, (seq, start, length) in enumerate(rows):
            decodes = batch.decodes(row)
            end = start + (1 if decodes else length)
            if not decodes:
                self.known[seq.seq_id] = seq.token_ids[:end]
            known = self.known[seq.seq_id]
            assert len(known) == end, "not the sequence's next token"
            seed = seq.seed if seq.params.temperature else 0
            for step in range(length if decodes else 1):
                token = zlib.crc32(array("q", known).tobytes(), seed) % self.vocab
                sampled[step][row] = token
                known.append(token)
        return FakeFuture(sampled, self)

    def renew_state(self):
        self.known = {}

    def shut_down(self):
        pass


class FakeFuture:
    """The tokens of one of `FakeRunner`'s calls."""

    def __init__(self, tokens, runner):
        self.tokens, self.runner = tokens, runner

    def result(self):
        self.runner.before_read()
        return self.tokens

    def scores(self):
        return None


def drain(llm) -> tuple[dict[int, list[int]], list[int]]:
    """Step until all is done; return {request id: tokens} and the count of each step."""
    results, counts = {}, []
    while not llm.is_finished():
        finished, num_tokens = llm.step()
        assert not results.keys() & dict(finished).keys(), "a request was reported twice"
        results |= finished
        counts.append(num_tokens)
    return results, counts


class Spy:
    """Records the batches that an engine dispatches: (is_prefill, [(seq_id, start, length)])."""

    def __init__(self, llm, monkeypatch):
        self.batches = []
        self.num_decodes = []  # rows of each mixed batch that decode
        self.num_steps = []  # decode steps of each batch
        self.preempted = []
        dispatch, preempt = llm.runner.dispatch, llm.scheduler.preempt

        def recording_dispatch(batch):
            rows = zip(batch.seqs, batch.starts, batch.lengths, strict=True)
            self.num_steps.append(batch.num_steps)
            self.num_decodes.append(batch.num_decodes)
            self.batches.append((batch.is_prefill, [(s.seq_id, at, n) for s, at, n in rows]))
            return dispatch(batch)

        def recording_preempt(seq):
            self.preempted.append(seq.seq_id)
            preempt(seq)

        monkeypatch.setattr(llm.runner, "dispatch", recording_dispatch)
        monkeypatch.setattr(llm.scheduler, "preempt", recording_preempt)

    @property
    def prefill_tokens(self) -> int:
        return sum(n for is_prefill, rows in self.batches if is_prefill for _, _, n in rows)
