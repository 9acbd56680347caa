"""Blocks of the KV cache: who holds which, and the prefix cache over them.

A *block* is a page of `block_size` token positions, the same page in every layer. Sequences that
begin alike share their full blocks. A full block is known by a chain of hashes (its own tokens
and all before it), as in vLLM's automatic prefix caching; a block that no sequence holds any more
keeps its content and can be found again until it is taken for something else, least recently used
first.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from nanovllm_jax.engine.sequence import Sequence

ROOT = 0  # hash and uid of the empty prefix


@dataclass(frozen=True, slots=True)
class BlockContent:
    """What a full block holds: its tokens, behind the prefix that `parent_uid` stands for."""

    hash: int
    uid: int  # identifies this content and all before it
    parent_uid: int
    tokens: bytes

    def is_for(self, parent_uid: int, tokens: bytes) -> bool:
        """Whether it is this content, and not another with the same hash."""
        return self.parent_uid == parent_uid and self.tokens == tokens


@dataclass(slots=True)
class Block:
    """One block; `content` is what the prefix cache knows to be in it."""

    block_id: int
    ref_count: int = 0
    content: BlockContent | None = None


def hash_block(parent_hash: int, tokens: bytes) -> int:
    """64-bit hash of a block's tokens and of everything before them."""
    return xxhash.xxh64_intdigest(parent_hash.to_bytes(8, "little") + tokens)


class BlockManager:
    """Hands out blocks, counts who holds them, and finds cached prefixes."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [Block(i) for i in range(num_blocks)]
        # Blocks that nobody holds, the next to be taken first: those without cached content,
        # then the least recently used.
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.cached: dict[int, Block] = {}  # hash of the content -> block
        self.next_uid = ROOT + 1
        # Tokens of admitted sequences, and those of them that the prefix cache had.
        self.num_queried_tokens = self.num_hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, with or without cached content."""
        return len(self.free_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def num_cached(self, seq: Sequence) -> int:
        """How many of the sequence's tokens `allocate` would find in the prefix cache."""
        return len(self._match(seq)) * self.block_size

    def allocate(self, seq: Sequence) -> bool:
        """Give a waiting sequence blocks for all of its tokens, cached ones where they match.

        Sets `block_table`, `num_cached` and `num_computed`. Where every token is cached the last
        one is computed again, since its logits are needed, but not written. Returns False, and
        changes nothing, when too few blocks are free.
        """
        # Tokens of a cached block are not computed again, so they would get no scores.
        hits = [] if seq.wants_prompt_scores else self._match(seq)
        num_new = self.blocks_for(seq.num_tokens) - len(hits)
        num_taken_from_free = num_new + sum(block.ref_count == 0 for block in hits)
        if num_taken_from_free > self.num_free_blocks:
            return False
        for block in hits:
            if block.ref_count == 0:
                del self.free_blocks[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.prefix = [(c.hash, c.uid) for block in hits if (c := block.content)]
        for _ in range(num_new):
            seq.block_table.append(self._take_free_block())
        seq.num_cached = len(hits) * self.block_size
        self.num_queried_tokens += seq.num_tokens
        self.num_hit_tokens += seq.num_cached
        seq.num_computed = min(seq.num_cached, seq.num_tokens - 1)
        return True

    def append(self, seq: Sequence, num_tokens: int = 1) -> bool:
        """Make room for `num_tokens` more at position `num_computed`; False if no block is free."""
        num_blocks_needed = self.blocks_for(seq.num_computed + num_tokens)
        while num_blocks_needed > len(seq.block_table):
            if not self.free_blocks:
                return False
            seq.block_table.append(self._take_free_block())
        return True

    def free(self, seq: Sequence) -> None:
        """Take all blocks back from a sequence; what is cached in them stays to be found."""
        for block_id in reversed(seq.block_table):  # so that a prefix outlives its continuation
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_blocks[block_id] = None
                if block.content is None:
                    self.free_blocks.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.prefix = []
        seq.num_computed = seq.num_cached = 0

    def cache_full_blocks(self, seq: Sequence) -> None:
        """Enter the sequence's full blocks into the prefix cache.

        Call it once the step that fills them is scheduled, and not before: any reader is then in
        the same step, where each layer writes keys and values before it attends, or in a later one.
        """
        size, token_ids = self.block_size, seq.token_ids
        while (end := (len(seq.prefix) + 1) * size) <= seq.num_computed and end <= len(token_ids):
            index = len(seq.prefix)
            parent_hash, parent_uid = seq.prefix[-1] if seq.prefix else (ROOT, ROOT)
            tokens = self._tokens(seq, index)
            key = hash_block(parent_hash, tokens)
            if content := self._cached_content(key):
                if not content.is_for(parent_uid, tokens):
                    return  # a hash collision: this prefix stays private
            else:
                content = BlockContent(key, self.next_uid, parent_uid, tokens)
                self.next_uid += 1
                block = self.cached[key] = self.blocks[seq.block_table[index]]
                block.content = content
            seq.prefix.append((key, content.uid))

    def reset_prefix_cache(self) -> None:
        """Forget all cached content. Running sequences keep their blocks."""
        for block in self.cached.values():
            block.content = None
        self.cached.clear()

    def check(self, seqs: list[Sequence]) -> None:
        """Assert that the books balance, given all sequences that hold blocks."""
        held = [block_id for seq in seqs for block_id in seq.block_table]
        for block in self.blocks:
            assert block.ref_count == held.count(block.block_id), block
            assert (block.ref_count == 0) == (block.block_id in self.free_blocks), block
            if block.content is not None:
                assert self.cached[block.content.hash] is block, block
        for seq in seqs:
            assert len(seq.block_table) == len(set(seq.block_table)), seq
        assert sum(block.ref_count == 0 for block in self.blocks) == self.num_free_blocks
        assert sum(block.content is not None for block in self.blocks) == len(self.cached)

    def _match(self, seq: Sequence) -> list[Block]:
        """The longest run of cached blocks that begins the sequence, compared by content."""
        hits: list[Block] = []
        parent_hash, parent_uid = ROOT, ROOT
        for index in range(seq.num_tokens // self.block_size):
            tokens = self._tokens(seq, index)
            key = hash_block(parent_hash, tokens)
            content = self._cached_content(key)
            if content is None or not content.is_for(parent_uid, tokens):
                break
            hits.append(self.cached[key])
            parent_hash, parent_uid = key, content.uid
        return hits

    def _cached_content(self, key: int) -> BlockContent | None:
        block = self.cached.get(key)
        return block.content if block else None

    def _tokens(self, seq: Sequence, index: int) -> bytes:
        start = index * self.block_size
        return array("i", seq.token_ids[start : start + self.block_size]).tobytes()

    def _take_free_block(self) -> int:
        block_id, _ = self.free_blocks.popitem(last=False)
        block = self.blocks[block_id]
        if block.content is not None:
            del self.cached[block.content.hash]
            block.content = None
        block.ref_count = 1
        return block_id
