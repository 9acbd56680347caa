"""Attention over a paged KV cache: arrays in, arrays out, one file per kernel.

The cache of each of K and V is one array `[L, P, S, K, H]`: layers, pages, positions in a page, KV
heads, head dim. A block table lists the pages of a sequence in order, so that position p of
sequence b lies in page `block_tables[b, p // S]`, row `p % S`.

Every function of attention takes `implementation`: "triton" (Pallas, NVIDIA GPUs from Ampere on;
interpreted where there is no GPU), "mosaic" (Pallas with Hopper's own instructions, in bfloat16;
the KV write stays in Triton) or "xla" (plain JAX: the CPU path, and what the kernels are compared
with). Triton kernels only: `fused_linear`, the linear layer of a single row, and sums and maxima
over the GPUs of a process, `one_shot_all_reduce` and `one_shot_max`.
"""

from pallas_kernels.all_reduce import (
    Mailboxes,
    fits_one_shot,
    make_mailboxes,
    one_shot_all_reduce,
    one_shot_max,
)
from pallas_kernels.fused_linear import fits_fused_linear, fused_linear
from pallas_kernels.kv_write import norm_rope_write
from pallas_kernels.paged_decode import decode_step, paged_decode
from pallas_kernels.paged_prefill import paged_prefill

__all__ = [
    "Mailboxes",
    "decode_step",
    "fits_fused_linear",
    "fits_one_shot",
    "fused_linear",
    "make_mailboxes",
    "norm_rope_write",
    "one_shot_all_reduce",
    "one_shot_max",
    "paged_decode",
    "paged_prefill",
]
