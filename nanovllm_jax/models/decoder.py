"""The decoder: grouped-query attention, RoPE and SwiGLU, with pre-norms, as Llama and its kin.

Families differ by switches of `ModelConfig`: a norm of queries and keys (Qwen3), biases (Qwen2),
the kind of RoPE, layers without it (SmolLM3), experts in place of an MLP (Qwen3-MoE).

The parameters of all layers of a kind are stacked along a leading axis [L, ...], so that a step
passes about a dozen arrays to the compiled program, however deep the model is. How a layer computes
is the caller's choice: the engine passes a backend over its KV cache, a trainer a dense one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from nanovllm_jax.layers.attention import Angles
from nanovllm_jax.layers.backend import Backend
from nanovllm_jax.layers.linear import Embedding, Linear
from nanovllm_jax.layers.mlp import MLP
from nanovllm_jax.layers.moe import MoE
from nanovllm_jax.layers.norm import Hidden, NormAt, RMSNorm, plain
from nanovllm_jax.layers.rope import rope_angles
from nanovllm_jax.models.config import ModelConfig
from pallas_kernels import LayerWeights


class Attention(nnx.Module):
    """Grouped-query attention with its norm and residual; q, k and v come from one product.

    Of a family that does not norm queries and keys, `q_norm` and `k_norm` are None.
    """

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        c, head = config, {"head_dim": config.head_dim}
        # Grouped by KV head, so that a shard of KV heads brings its query heads along.
        qkv = {"kv_heads": c.num_kv_heads, "group": c.group_size + 2, **head}
        hidden, heads = {"embed": c.hidden_size}, {"heads": c.num_heads, **head}
        self.qkv_proj = Linear(qkv, hidden, bias=c.qkv_bias, dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm | None:
            if not c.qk_norm:
                return None
            return RMSNorm(c.head_dim, c.rms_norm_eps, axis="head_dim", dtype=dtype)

        self.q_norm, self.k_norm = norm(), norm()
        self.o_proj = Linear(hidden, heads, bias=c.o_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x, norm: RMSNorm, rope, cache, layer, backend: Backend, then: NormAt):
        qkv = backend.linear(x, self.qkv_proj, layer, norm=norm)
        out, cache = backend.attend(qkv, self.q_norm, self.k_norm, rope, cache, layer)
        return backend.linear(out, self.o_proj, layer, residual=x, then=then), cache


class DecoderLayer(nnx.Module):
    """Pre-norm attention and a feed-forward layer, each with its residual.

    Each is told which norm comes after it, for a backend that computes both in one kernel. The
    feed-forward layer is an MLP or a mixture of experts; `Decoder` stacks each kind by itself.
    """

    mlp: MLP
    moe: MoE

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.config = c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(c, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)

    def __call__(self, x, rope, cache, layer, place, backend: Backend, *, kind: str):
        """Run one layer: number `layer` of all, and `place` among those of its kind."""
        to_mlp = self.post_attention_layernorm.at(layer)
        to_next_layer = self.input_layernorm.at(layer + 1)  # after the last layer nobody uses it
        x, cache = self.self_attn(x, self.input_layernorm, rope, cache, layer, backend, to_mlp)
        x = backend.constrain(x, "activation_tokens", "activation_embed")
        norm = self.post_attention_layernorm
        if len(numbers := self.config.layers_of(f"{kind}.")) < self.config.num_layers:
            norm = norm.of_layers(numbers)  # then one number names the layer in both stacks
        feed_forward: MLP | MoE = getattr(self, kind)
        x = feed_forward(x, norm, place, backend, to_next_layer)
        return backend.constrain(x, "activation_tokens", "activation_embed"), cache


class Decoder(nnx.Module):
    """Turns token ids and positions into hidden states; `logits` turns chosen rows into scores."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.config = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        layer = nnx.vmap(lambda r: DecoderLayer(c, dtype=dtype, rngs=r))
        mlp = nnx.vmap(
            lambda r: MLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, dtype=dtype, rngs=r)
        )
        moe = nnx.vmap(
            lambda r: MoE(
                c.hidden_size, c.expert_size, c.num_experts, c.experts_per_token,
                normalize=c.norm_topk_prob, dtype=dtype, rngs=r,
            )
        )  # fmt: skip
        self.layers = layer(rngs.split(c.num_layers))
        if dense := len(c.layers_of("mlp.")):
            self.layers.mlp = mlp(rngs.split(dense))
        if sparse := len(c.layers_of("moe.")):
            self.layers.moe = moe(rngs.split(sparse))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        token_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        backend: Backend,
        cache: Any = None,
    ) -> tuple[Float[Array, "T D"], Any]:
        """Run all layers over T tokens; returns hidden states, not yet normed, and the cache."""
        to_first_layer = self.layers.input_layernorm.at(jnp.int32(0))
        x = backend.embed(self.embed_tokens, token_ids, to_first_layer)
        x = backend.constrain(x, "activation_tokens", "activation_embed")
        rope = rope_angles(positions, self.config.rope, self.config.head_dim)
        return self._all_layers(x, rope, backend, cache) or self.run_layers(x, rope, backend, cache)

    def _all_layers(self, x: Hidden, rope: Angles, backend: Backend, cache: Any):
        """All layers at once if the backend can, else None. Eagerly, each operation runs alone."""
        c = self.config
        if not isinstance(plain(x), Tracer) or c.num_experts or c.o_bias or c.mlp_bias:
            return None
        return backend.all_layers(
            plain(x), self.layer_weights(), rope, cache,
            eps=c.rms_norm_eps, layers_without_rope=c.layers_without_rope,
        )  # fmt: skip

    def layer_weights(self) -> LayerWeights:
        """The weights of layers without experts, and without biases of `o_proj` and the MLP."""
        layers = self.layers
        attn, mlp = layers.self_attn, layers.mlp

        def value(module: RMSNorm | Linear | None) -> Any:
            return None if module is None else module.weight[...]

        bias = attn.qkv_proj.bias
        return LayerWeights(
            input_norm=value(layers.input_layernorm),
            qkv=value(attn.qkv_proj),
            qkv_bias=None if bias is None else bias[...],
            q_norm=value(attn.q_norm),
            k_norm=value(attn.k_norm),
            o=value(attn.o_proj),
            post_norm=value(layers.post_attention_layernorm),
            gate_up=value(mlp.gate_up_proj),
            down=value(mlp.down_proj),
        )

    def run_layers(
        self, x: Hidden, rope: Angles, backend: Backend, cache: Any
    ) -> tuple[Float[Array, "T D"], Any]:
        """Run one layer after the other; returns hidden states and the cache."""
        no_rope = jnp.ones_like(rope[0]), jnp.zeros_like(rope[1])  # turns by nothing
        graph, weights = nnx.split(self.layers)

        def run_layer(weights, x, rope, cache, layer, place, kind):
            # Every weight goes in whole, [L, ...]: products and kernels read their layer's slice
            # in place, while an array sliced out here would be copied for the kernels.
            layers = nnx.merge(graph, weights)
            return layers(x, rope, cache, layer, place, backend, kind=kind)

        # Under jit each kind of layer is traced and lowered once and called for every layer; XLA
        # inlines the calls. Eagerly it runs operation by operation, so that print and a debugger
        # work inside it.
        if isinstance(plain(x), Tracer):
            run_layer = jax.jit(run_layer, static_argnames="kind")
        kinds = {
            i: (kind, place)
            for kind in ("mlp", "moe")
            for place, i in enumerate(self.config.layers_of(f"{kind}."))
        }
        for i in range(self.config.num_layers):
            angles = no_rope if i in self.config.layers_without_rope else rope
            kind, place = kinds[i]
            x, cache = run_layer(
                weights, x, angles, cache, jnp.int32(i), jnp.int32(place), kind=kind
            )
        return plain(x), cache

    def logits(self, hidden: Float[Array, "B D"], backend: Backend) -> Float[Array, "B V"]:
        """Next-token scores of the hidden states of chosen rows, in float32."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return backend.linear(hidden, head, norm=self.norm, dtype=jnp.float32)
