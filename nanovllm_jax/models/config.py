"""ModelConfig: the shape of a model, read from its directory once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanovllm_jax.layers.rope import Rope
from nanovllm_jax.models.config_file import read_settings


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, and what its family does otherwise than others.

    `from_directory` reads it from a checkpoint and `sharded` adapts it to a mesh.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope = field(default_factory=Rope)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = True  # queries and keys are normed before RoPE
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    layers_without_rope: tuple[int, ...] = ()
    num_experts: int = 0  # of each layer that has any; a mixture takes the place of its MLP
    experts_per_token: int = 0
    expert_size: int = 0  # hidden units of an expert
    norm_topk_prob: bool = False  # the weights of a token's experts add up to 1
    dense_layers: tuple[int, ...] = ()  # among layers of experts, those with an MLP
    sliding_window: int | None = None  # some layer sees no further back; contexts end here
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    kv_head_copies: int = 1  # num_kv_heads counts every copy
    vocab_padding: int = 0  # vocab_size counts the padding

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def layers_of(self, path: str) -> Sequence[int]:
        """The numbers of the layers that have a parameter, by its path below "layers"."""
        dense = self.dense_layers if self.num_experts else range(self.num_layers)
        if path.startswith("mlp."):
            return dense
        sparse = [i for i in range(self.num_layers) if i not in dense]
        return sparse if path.startswith("moe.") else range(self.num_layers)

    @property
    def longest_context(self) -> int:
        """The most positions for which the model is made, and computed here."""
        rope, longest = self.rope, self.max_position_embeddings
        numbers = dict(rope.numbers)
        if rope.kind == "linear":
            longest = int(longest * numbers["factor"])
        elif rope.kind == "yarn":
            longest = int(numbers["original_max_position_embeddings"] * numbers["factor"])
        return min(longest, self.sliding_window or longest)

    def sharded(self, shards: Callable[[str], int]) -> "ModelConfig":
        """The equivalent config for a sharded model, in which every axis divides.

        It computes the same function: KV heads are copied if there are more shards than heads, and
        the vocabulary is padded.

        Args:
            shards: maps a logical axis to the number of parts that it is split into.

        Raises:
            ValueError: heads, hidden units, experts or the hidden size cannot be split so.
        """
        for axis in ("heads", "ffn", "experts", "expert_ffn", "embed", "activation_embed"):
            if not self._splits(axis, shards(axis)):
                split = [a for a in ("heads", "ffn", "experts", "expert_ffn") if shards(a) > 1]
                valid = [n for n in range(1, 9) if all(self._splits(a, n) for a in split)]
                experts = (
                    f"{self.num_experts} experts, moe_intermediate_size {self.expert_size}, "
                    if self.num_experts
                    else ""
                )
                raise ValueError(
                    f"{axis!r} cannot be split over {shards(axis)} devices (tensor_parallel_size "
                    f"or mesh_shape): this model has {self.num_heads} query heads, "
                    f"{self.num_kv_heads} key/value heads, intermediate_size "
                    f"{self.intermediate_size}, {experts}hidden_size {self.hidden_size}; valid "
                    f"tensor parallel sizes: {valid}"
                )
        copies = max(1, shards("kv_heads") // self.num_kv_heads)
        padding = -self.vocab_size % shards("vocab")
        return replace(
            self,
            num_kv_heads=self.num_kv_heads * copies,
            kv_head_copies=copies,
            vocab_size=self.vocab_size + padding,
            vocab_padding=padding,
        )

    def _splits(self, axis: str, parts: int) -> bool:
        """Whether an axis can be split into that many equal parts."""
        if axis == "heads":  # a KV head that has no device of its own is copied
            kv_heads = self.num_kv_heads
            return self.num_heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)
        sizes = {
            "ffn": self.intermediate_size if self.layers_of("mlp.") else 0,
            "experts": self.num_experts,
            "expert_ffn": self.expert_size if self.num_experts else 0,
        }
        return sizes.get(axis, self.hidden_size) % parts == 0

    @classmethod
    def from_directory(cls, path: Path) -> "ModelConfig":
        """Read config.json and, for the ends of a request, generation_config.json.

        Raises:
            ValueError: they ask for something that the engine does not compute, or are damaged.
        """
        return cls(**read_settings(path))
