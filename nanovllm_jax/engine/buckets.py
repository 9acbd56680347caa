"""Buckets: the few shapes that batches are padded to, since every shape is a program of its own.

There are two families, each of one dimension: tokens for prefill, rows for decode. A third is there
if prefills take decode rows along: tokens again.
"""

from typing import NamedTuple


class Bucket(NamedTuple):
    """A shape that batches are padded to; if the batch is sharded, the shape of one shard.

    A prefill bucket has room for `num_tokens` prompt tokens in `num_rows` rows. A decode bucket has
    no prompt tokens: each of its rows computes the one token that the device drew last. In a mixed
    bucket the first rows do that, and the others have the rest of the tokens for their prompts.
    """

    num_tokens: int
    num_rows: int
    is_mixed: bool = False

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 0


def decode_buckets(max_num_seqs: int) -> list[Bucket]:
    """Batch sizes: powers of two, from 64 on also the steps half-way between, up to any maximum."""
    exponents = max_num_seqs.bit_length()
    sizes = {1 << k for k in range(exponents)} | {3 << k for k in range(5, exponents)}
    sizes = sorted(size for size in sizes if size < max_num_seqs)
    return [Bucket(0, size) for size in [*sizes, max_num_seqs]]


def prefill_buckets(max_num_batched_tokens: int, max_num_seqs: int) -> list[Bucket]:
    """Token counts: powers of two from 64 up to any maximum, with room for a row in 8 tokens.

    So a batch of short rests behind cached prefixes needs no long bucket, and the rows stay a small
    part of the step.
    """
    sizes = {1 << k for k in range(6, max_num_batched_tokens.bit_length())}
    sizes = sorted(size for size in sizes if size < max_num_batched_tokens)
    return [
        Bucket(size, max(8, min(max_num_seqs, size // 8)))
        for size in [*sizes, max_num_batched_tokens]
    ]


def mixed_buckets(
    chunk: int | None, max_num_batched_tokens: int, max_num_seqs: int
) -> list[Bucket]:
    """Token counts as for prefill, with room for a row in 2 tokens, up to one that holds all rows.

    So whatever the number of rows that decode, the smallest bucket with more rows than that leaves
    half of its tokens to prompts.

    Args:
        chunk: tokens of a mixed batch if few sequences decode; None: the most.
    """
    buckets = []
    for size, _, _ in prefill_buckets(max_num_batched_tokens, max_num_seqs):
        if size < 16:
            continue
        buckets.append(Bucket(size, max(8, min(max_num_seqs, size // 2)), is_mixed=True))
        if chunk is not None and size >= chunk and buckets[-1].num_rows >= max_num_seqs:
            break
    return buckets
