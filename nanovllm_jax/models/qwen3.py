"""Qwen3 (arXiv:2505.09388): grouped-query attention with per-head q/k norm, RoPE, SwiGLU.

The parameters of all layers are stacked along a leading axis [L, ...]: a step passes about a
dozen arrays to the compiled program, however deep the model is. How a layer attends is the
caller's choice (`attend`): the engine passes paged attention over its KV cache, a trainer dense
causal attention.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.linear import Embedding, Linear, Project, project
from nanovllm_jax.layers.mlp import MLP
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.layers.rope import rope_angles

Constrain = Callable[..., Array]  # (x, *logical axes) -> x; Sharding.constrain, or nothing


class Attend(Protocol):
    """Norm, rotate and attend: the part of a layer that differs between serving and training."""

    def __call__(
        self,
        qkv: Float[Array, "T K G+2 H"],  # of each KV head: its G query heads, then k, then v
        q_norm: RMSNorm,  # these two with the weights of all layers, [L, H]
        k_norm: RMSNorm,
        rope: tuple[Float[Array, "T half"], Float[Array, "T half"]],
        cache: Any,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "T N H"], Any]: ...


class Attention(nnx.Module):
    """Grouped-query attention with its norm and residual; the q, k and v products in one."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        c, head = config, {"head_dim": config.head_dim}
        # Grouped by KV head, so that a shard of KV heads brings its query heads along.
        qkv = {"kv_heads": c.num_kv_heads, "group": c.group_size + 2, **head}
        hidden = {"embed": c.hidden_size}
        self.qkv_proj = Linear(qkv, hidden, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, axis="head_dim", dtype=dtype)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, axis="head_dim", dtype=dtype)
        self.o_proj = Linear(hidden, {"heads": c.num_heads, **head}, dtype=dtype, rngs=rngs)

    def __call__(self, x, norm: RMSNorm, rope, attend: Attend, project: Project, cache, layer):
        qkv = project(x, self.qkv_proj, layer, norm=norm)
        out, cache = attend(qkv, self.q_norm, self.k_norm, rope, cache, layer)
        return project(out, self.o_proj, layer, residual=x), cache


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(c, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, rope, attend: Attend, project: Project, cache, layer, constrain):
        x, cache = self.self_attn(x, self.input_layernorm, rope, attend, project, cache, layer)
        x = constrain(x, "activation_tokens", "activation_embed")
        x = self.mlp(x, self.post_attention_layernorm, layer, project)
        return constrain(x, "activation_tokens", "activation_embed"), cache


class Qwen3(nnx.Module):
    """Token ids and positions in, hidden states out; `logits` turns chosen rows into scores."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, constrain: Constrain | None = None):
        c, dtype = config, jnp.dtype(config.dtype)
        self.config = config
        self.constrain = constrain or (lambda x, *axes: x)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        stacked = nnx.vmap(lambda r: DecoderLayer(c, dtype=dtype, rngs=r))
        self.layers = stacked(rngs.split(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        token_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        attend: Attend,
        cache: Any = None,
        project: Project = project,
    ) -> tuple[Float[Array, "T D"], Any]:
        """Run all layers over T tokens; returns hidden states, not yet normed, and the cache."""
        x = project.lookup(self.embed_tokens, token_ids)
        x = self.constrain(x, "activation_tokens", "activation_embed")
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        graph, weights = nnx.split(self.layers)

        def run_layer(weights, x, rope, cache, layer):
            # Every weight goes in whole, [L, ...]: products and kernels read their layer's slice
            # in place, where an array sliced out here would be copied for the kernels.
            decoder = nnx.merge(graph, weights)
            return decoder(x, rope, attend, project, cache, layer, self.constrain)

        # Under jit the layer is traced and lowered once and called L times; XLA inlines the calls.
        # Eagerly it runs operation by operation, so that print and a debugger work inside it.
        if isinstance(x, Tracer):
            run_layer = jax.jit(run_layer)
        for i in range(self.config.num_layers):
            x, cache = run_layer(weights, x, rope, cache, jnp.int32(i))
        return x, cache

    def logits(
        self, hidden: Float[Array, "B D"], project: Project = project
    ) -> Float[Array, "B V"]:
        """Next-token scores of the hidden states of chosen rows, in float32."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return project(hidden, head, norm=self.norm, dtype=jnp.float32)

    @staticmethod
    def scale_for_8_bits(weights: nnx.State) -> nnx.State:
        """Weights of the same function whose keys and values have a root mean square near 1.

        There e4m3 is precise, and far from its limits of 2^-9 and 448. Other engines multiply by
        scales in their kernels. Powers of two in the weights cost nothing and are exact: keys are
        scaled by their norm's weight and queries the other way, values by their projection and
        the projection of the attention's output the other way.

        The size of values is estimated: their input is normed, so its elements have a variance
        near 1 times the square of the norm's weight.
        """
        layers: Any = weights["layers"]
        attn, input_norm = layers["self_attn"], layers["input_layernorm"]["weight"].get_value()

        def change(module: str, scale: Callable[[Array], Array]) -> None:
            param = attn[module]["weight"]
            value = param.get_value()
            attn[module]["weight"] = param.replace(scale(value).astype(value.dtype))

        def power_of_2(mean_square: Array) -> Array:
            return jnp.exp2(jnp.round(jnp.log2(jnp.maximum(mean_square, 1e-12)) / 2))

        def square(x: Array) -> Array:
            return jnp.square(x.astype(jnp.float32))

        k_size = power_of_2(square(attn["k_norm"]["weight"].get_value()).mean(axis=1))[:, None]
        change("k_norm", lambda w: w / k_size)
        change("q_norm", lambda w: w * k_size)

        qkv = attn["qkv_proj"]["weight"].get_value()  # [L, K, G+2, H, D]
        variance = (square(qkv[:, :, -1]) * square(input_norm)[:, None, None]).sum(axis=3)
        v_size = power_of_2(variance.mean(axis=2))  # [L, K]
        group_size = qkv.shape[2] - 2
        is_value = (jnp.arange(group_size + 2) == group_size + 1)[:, None, None]
        v_factor = jnp.where(is_value, 1 / v_size[:, :, None, None, None], 1)
        change("qkv_proj", lambda w: w * v_factor)
        o_factor = jnp.repeat(v_size, group_size, axis=1)[:, None, :, None]
        change("o_proj", lambda w: w * o_factor)  # [L, D, N, H]
        return weights

    @staticmethod
    def checkpoint_tensors(
        config: ModelConfig, parameter: str
    ) -> tuple[list[tuple[str, tuple[int, ...]]], Callable[..., np.ndarray]]:
        """Where a parameter comes from in a Hugging Face checkpoint.

        Args:
            config: the model; its padding and head copies are added to the published tensors.
            parameter: dotted path in this module, e.g. "layers.self_attn.qkv_proj.weight".

        Returns:
            The (name, shape) of each source tensor, "{i}" standing for the layer's number, and
            a function that joins them into the parameter (of one layer).
        """
        c, d, copies = config, config.hidden_size, config.kv_head_copies
        k, g, h, ffn = c.num_kv_heads, c.group_size, c.head_dim, c.intermediate_size
        vocab = c.vocab_size - c.vocab_padding

        def layer(name: str, *shape: int) -> tuple[str, tuple[int, ...]]:
            return f"model.layers.{{i}}.{name}.weight", shape

        def join_qkv(q, k_, v):
            k_, v = (np.repeat(x.reshape(-1, 1, h, d), copies, axis=0) for x in (k_, v))
            return np.concatenate([q.reshape(k, g, h, d), k_, v], axis=1)

        def pad_vocab(x):
            return np.pad(x, ((0, c.vocab_padding), (0, 0)))

        def keep(x):
            return x

        table = {
            "embed_tokens": ([("model.embed_tokens.weight", (vocab, d))], pad_vocab),
            "norm": ([("model.norm.weight", (d,))], keep),
            "lm_head": ([("lm_head.weight", (vocab, d))], pad_vocab),
            "layers.input_layernorm": ([layer("input_layernorm", d)], keep),
            "layers.self_attn.qkv_proj": (
                [
                    layer("self_attn.q_proj", k * g * h, d),
                    layer("self_attn.k_proj", k // copies * h, d),
                    layer("self_attn.v_proj", k // copies * h, d),
                ],
                join_qkv,
            ),
            "layers.self_attn.q_norm": ([layer("self_attn.q_norm", h)], keep),
            "layers.self_attn.k_norm": ([layer("self_attn.k_norm", h)], keep),
            "layers.self_attn.o_proj": (
                [layer("self_attn.o_proj", d, k * g * h)],
                lambda o: o.reshape(d, k * g, h),
            ),
            "layers.post_attention_layernorm": ([layer("post_attention_layernorm", d)], keep),
            "layers.mlp.gate_up_proj": (
                [layer("mlp.gate_proj", ffn, d), layer("mlp.up_proj", ffn, d)],
                lambda gate, up: np.stack([gate, up]),
            ),
            "layers.mlp.down_proj": ([layer("mlp.down_proj", d, ffn)], keep),
        }
        return table[parameter.removesuffix(".weight")]
