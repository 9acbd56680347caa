"""The one table of a model's tensors: what a Hugging Face checkpoint calls them and their shapes.

Loading joins tensors into parameters, writing splits parameters into tensors, and random weights
need the shapes alone.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanovllm_jax.models.config import ModelConfig

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STACKED = "layers"  # Parameters whose path begins so have a leading axis of layers.


class Source(NamedTuple):
    """The tensors that make up one parameter (of one layer, for a parameter of the layers)."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # name with "{i}" for the layer, and shape
    join: Callable[..., np.ndarray]  # the tensors, in this order -> the parameter
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # the inverse


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each parameter comes from, by its dotted path in the decoder.

    The config may be a sharded one: its copies of KV heads and its padded vocabulary are added to
    the published tensors, and removed again by `split`.
    """
    c, d, copies = config, config.hidden_size, config.kv_head_copies
    k, g, h, ffn = c.num_kv_heads, c.group_size, c.head_dim, c.intermediate_size
    vocab = c.vocab_size - c.vocab_padding

    def one(name: str, *shape: int) -> Source:
        return Source(((f"{name}.weight", shape),), lambda x: x, lambda x: (x,))

    def layer(name: str, *shape: int) -> tuple[str, tuple[int, ...]]:
        return f"model.layers.{{i}}.{name}.weight", shape

    def table(name: str) -> Source:
        return Source(
            ((f"{name}.weight", (vocab, d)),),
            lambda x: np.pad(x, ((0, c.vocab_padding), (0, 0))),
            lambda x: (x[:vocab],),
        )

    def join_qkv(q, k_, v):
        k_, v = (np.repeat(x.reshape(-1, 1, h, x.shape[1]), copies, axis=0) for x in (k_, v))
        return np.concatenate([q.reshape(k, g, h, q.shape[1]), k_, v], axis=1)

    def split_qkv(x):
        kv, inputs = x[::copies], x.shape[-1]
        return tuple(y.reshape(-1, inputs) for y in (x[:, :g], kv[:, g], kv[:, g + 1]))

    def bias(of: str) -> Source:
        """The biases of the products that make up one parameter: one number for each row."""
        weights = found[of]
        tensors = ((name.replace(".weight", ".bias"), rows) for name, (rows, _) in weights.tensors)
        return Source(
            tuple((name, (rows,)) for name, rows in tensors),
            lambda *rows: weights.join(*(r[:, None] for r in rows))[..., 0],
            lambda x: tuple(rows[:, 0] for rows in weights.split(x[..., None])),
        )

    found = {
        "embed_tokens": table("model.embed_tokens"),
        "norm": one("model.norm", d),
        "layers.self_attn.qkv_proj": Source(
            (
                layer("self_attn.q_proj", k * g * h, d),
                layer("self_attn.k_proj", k // copies * h, d),
                layer("self_attn.v_proj", k // copies * h, d),
            ),
            join_qkv,
            split_qkv,
        ),
        "layers.self_attn.o_proj": Source(
            (layer("self_attn.o_proj", d, k * g * h),),
            lambda o: o.reshape(d, k * g, h),
            lambda o: (o.reshape(d, -1),),
        ),
        "layers.mlp.gate_up_proj": Source(
            (layer("mlp.gate_proj", ffn, d), layer("mlp.up_proj", ffn, d)),
            lambda gate, up: np.stack([gate, up]),
            lambda gate_up: (gate_up[0], gate_up[1]),
        ),
        "layers.mlp.down_proj": one("model.layers.{i}.mlp.down_proj", d, ffn),
        "layers.moe.router": one("model.layers.{i}.mlp.gate", c.num_experts, d),
        "layers.moe.gate_up_proj": Source(
            tuple(
                layer(f"mlp.experts.{e}.{part}_proj", c.expert_size, d)
                for e in range(c.num_experts)
                for part in ("gate", "up")
            ),
            lambda *parts: np.stack(parts).reshape(-1, 2, c.expert_size, d),
            lambda gate_up: tuple(gate_up.reshape(-1, c.expert_size, d)),
        ),
        "layers.moe.down_proj": Source(
            tuple(
                layer(f"mlp.experts.{e}.down_proj", d, c.expert_size) for e in range(c.num_experts)
            ),
            lambda *down: np.stack(down),
            tuple,
        ),
    }
    sizes = {"input_layernorm": d, "post_attention_layernorm": d}
    if c.qk_norm:
        sizes |= {"self_attn.q_norm": h, "self_attn.k_norm": h}
    found |= {f"layers.{n}": one(f"model.layers.{{i}}.{n}", size) for n, size in sizes.items()}
    if not c.tie_word_embeddings:
        found["lm_head"] = table("lm_head")
    biases = {}
    if c.qkv_bias:
        biases["layers.self_attn.qkv_proj"] = bias("layers.self_attn.qkv_proj")
    if c.o_bias:
        name = "model.layers.{i}.self_attn.o_proj.bias"
        biases["layers.self_attn.o_proj"] = Source(((name, (d,)),), lambda x: x, lambda x: (x,))
    if c.mlp_bias:
        names = "layers.mlp.gate_up_proj", "layers.mlp.down_proj"
        biases |= {name: bias(name) for name in names}
    table_of_all = {f"{path}.weight": source for path, source in found.items()}
    table_of_all |= {f"{path}.bias": source for path, source in biases.items()}
    return {path: source for path, source in table_of_all.items() if layers_of(path, config)}


def layers_of(path: str, config: ModelConfig) -> Sequence[int]:
    """The numbers of the layers that are stacked in a parameter; of one without layers just 0."""
    first, _, rest = path.partition(".")
    return config.layers_of(rest) if first == STACKED else (0,)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a checkpoint of this model."""
    return {
        name.format(i=i): shape
        for path, source in sources(config).items()
        for i in layers_of(path, config)
        for name, shape in source.tensors
    }


def determined_tensor(name: str, config: ModelConfig) -> np.ndarray | None:
    """The value of a tensor that some checkpoints repeat from config.json; None for any other."""
    if not re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name):
        return None
    frequencies, _ = config.rope.frequencies(config.head_dim)
    return frequencies
