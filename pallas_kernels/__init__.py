"""Attention over a paged KV cache, and what surrounds it: arrays in, arrays out.

There is one file per kernel.

The cache of each of K and V is one array `[L, P, S, K, H]`: layers, pages, positions in a page, KV
heads, head dim. A block table lists the pages of a sequence in order, so that position p of
sequence b lies in page `block_tables[b, p // S]`, row `p % S`.

Every function of attention, `choose_experts` and `expert_mlp` take `implementation`:

- "triton": Pallas kernels for NVIDIA GPUs from Ampere on, interpreted if there is no GPU.
- "mosaic": prefill with Hopper's own instructions, in bfloat16; the rest is Triton's.
- "xla": plain JAX, which runs on a CPU and which the kernels are compared with.

`decode_layers` computes all layers of a decode step of a few sequences. It is the one kernel in
CUDA ("cuda"), compiled where it runs; "xla" is its reference, too.

One function is a Mosaic kernel only: `gated_linear` is the first product of a gated MLP for many
rows, with its gate. Eight are Triton kernels only: `fused_linear` is the linear layer of a single
row and `expert_rows` the experts of a few, `draw` samples tokens, with noise that `gumbel`,
`random_bits` and `stream_words` define, from the logits that reach `filter_thresholds`, and
`one_shot_all_reduce`, `one_shot_all_reduce_norm`, `one_shot_sum` and `one_shot_max` combine small
arrays over the GPUs of a process.

A kernel that does not take every shape and dtype says what it takes: `supports_fused_linear`,
`supports_expert_rows`, `supports_gated_linear`, `supports_one_shot`, `supports_one_shot_norm`,
`supports_mosaic_prefill`. `plan_decode_layers` says it with a plan, or None.
`mosaic_problem` tells why a GPU does not run Mosaic's. How large a cache and a step may be is told
by `addressable_pages` and `most_tokens`.
"""

from pallas_kernels._common import addressable_pages, mosaic_problem, most_tokens
from pallas_kernels.all_reduce import (
    Mailboxes,
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_all_reduce_norm,
    one_shot_max,
    one_shot_sum,
    supports_one_shot,
    supports_one_shot_norm,
)
from pallas_kernels.choose_experts import choose_experts
from pallas_kernels.decode_layers import LayerWeights, decode_layers, plan_decode_layers
from pallas_kernels.draw import draw, gumbel, random_bits, stream_words
from pallas_kernels.expert_rows import expert_rows, supports_expert_rows
from pallas_kernels.filter_thresholds import filter_thresholds
from pallas_kernels.fused_linear import fused_linear, supports_fused_linear
from pallas_kernels.gated_linear import gated_linear, supports_gated_linear
from pallas_kernels.grouped_linear import expert_mlp
from pallas_kernels.kv_write import norm_rope_write
from pallas_kernels.mosaic_prefill import supports_mosaic_prefill
from pallas_kernels.paged_decode import decode_step, paged_decode
from pallas_kernels.paged_prefill import paged_prefill

__all__ = [
    "LayerWeights",
    "Mailboxes",
    "addressable_pages",
    "choose_experts",
    "decode_layers",
    "decode_step",
    "draw",
    "expert_mlp",
    "expert_rows",
    "filter_thresholds",
    "fused_linear",
    "gated_linear",
    "gumbel",
    "make_mailboxes",
    "mosaic_problem",
    "most_tokens",
    "norm_rope_write",
    "one_shot_all_reduce",
    "one_shot_all_reduce_norm",
    "one_shot_max",
    "one_shot_sum",
    "paged_decode",
    "paged_prefill",
    "plan_decode_layers",
    "random_bits",
    "stream_words",
    "supports_expert_rows",
    "supports_fused_linear",
    "supports_gated_linear",
    "supports_mosaic_prefill",
    "supports_one_shot",
    "supports_one_shot_norm",
]
