"""Blocks: who holds them, which prefixes are found again, and what is forgotten first."""

import pytest

from nanovllm_jax.engine import block_manager
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams

BLOCK = 4


def sequence(token_ids, seq_id=0):
    return Sequence(seq_id, list(token_ids), SamplingParams(), seed=0, max_tokens=8)


def compute(books, seq):
    """All of the sequence's tokens are scheduled: full blocks enter the prefix cache."""
    seq.num_computed = seq.num_tokens
    books.cache_full_blocks(seq)


def admit(books, token_ids):
    """A sequence that holds blocks with all of its tokens computed; its cached tokens."""
    seq = sequence(token_ids)
    assert books.allocate(seq)
    cached = seq.num_cached
    compute(books, seq)
    return seq, cached


@pytest.fixture
def books():
    return BlockManager(6, BLOCK)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(books, tokens, blocks):
    assert books.blocks_for(tokens) == blocks
    seq = sequence(range(tokens))
    books.allocate(seq)
    assert len(seq.block_table) == blocks


def test_allocate_refuses_without_side_effects_when_the_pool_is_short(books):
    held, _ = admit(books, range(16))
    late = sequence(range(100, 109))
    assert not books.allocate(late)
    assert late.block_table == [] and late.num_cached == late.num_computed == 0
    books.check([held])
    assert books.num_free_blocks == 2


def test_append_takes_a_block_exactly_when_one_is_needed(books):
    """nano-vLLM's condition was correct but cryptic, and was reported nine times."""
    seq = sequence(range(3))
    books.allocate(seq)
    for position in range(3, 13):
        seq.num_computed = position
        assert books.append(seq)
        assert len(seq.block_table) == books.blocks_for(position + 1)
        assert books.append(seq), "asked twice, it takes nothing more"
        assert len(seq.block_table) == books.blocks_for(position + 1)
    books.check([seq])


def test_append_says_no_when_no_block_is_free():
    books = BlockManager(1, BLOCK)
    seq, _ = admit(books, range(4))
    assert not books.append(seq)
    assert len(seq.block_table) == 1


def test_free_gives_back_every_block(books):
    a, _ = admit(books, range(10))
    b, _ = admit(books, range(50, 55))
    books.check([a, b])
    books.free(a)
    books.check([b])
    books.free(b)
    books.check([])
    assert books.num_free_blocks == 6
    assert (a.block_table, a.num_computed, a.num_cached) == ([], 0, 0)


def test_full_blocks_are_shared_while_both_run(books):
    a, _ = admit(books, range(10))
    b, cached = admit(books, [*range(8), 99, 99])
    assert cached == 8
    assert b.block_table[:2] == a.block_table[:2] and b.block_table[2] != a.block_table[2]
    books.check([a, b])
    books.free(a)
    books.check([b])
    assert books.num_free_blocks == 3


def test_a_prefix_is_found_after_its_sequence_has_ended(books):
    a, _ = admit(books, range(10))
    table = a.block_table
    books.free(a)
    b, cached = admit(books, range(10))
    assert cached == 8 and b.block_table[:2] == table[:2]


def test_a_full_hit_leaves_one_token_to_compute(books):
    """nano-vLLM #144, #199: a prefill of no tokens."""
    a, _ = admit(books, range(8))
    books.free(a)
    b = sequence(range(8))
    assert books.allocate(b)
    assert (b.num_cached, b.num_computed) == (8, 7)


def test_tokens_in_another_block_do_not_match(books):
    """A block stands for everything before it, not for its own tokens alone."""
    a, _ = admit(books, [1, 2, 3, 4, 5, 6, 7, 8])
    books.free(a)
    for other in ([5, 6, 7, 8, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7, 8]):
        b, cached = admit(books, other)
        assert cached == 0
        books.free(b)


def test_a_block_is_not_found_before_it_is_computed(books):
    """nano-vLLM #208: blocks were hashed before their keys and values existed."""
    a, b = sequence(range(8)), sequence(range(8))
    books.allocate(a)
    a.num_computed = 7
    books.cache_full_blocks(a)
    books.allocate(b)
    assert b.num_cached == 4


def test_tokens_that_the_host_does_not_know_are_not_hashed(books):
    """A row can be computed while its token is still in flight."""
    a = sequence(range(7))
    books.allocate(a)
    a.num_computed = 8
    books.cache_full_blocks(a)
    assert len(books.cached) == 1
    a.token_ids.append(7)
    books.cache_full_blocks(a)
    assert len(books.cached) == 2


def test_the_same_text_computed_twice_is_cached_once(books):
    a, b = sequence(range(8)), sequence(range(8))
    assert books.allocate(a) and books.allocate(b)  # neither is computed yet: no sharing
    compute(books, a)
    compute(books, b)
    assert len(books.cached) == 2
    assert {block.block_id for block in books.cached.values()} == set(a.block_table)
    books.check([a, b])
    books.free(a)
    books.free(b)
    books.check([])
    c, cached = admit(books, range(8))
    assert cached == 8 and c.block_table == [0, 1]


def test_blocks_without_content_are_taken_before_cached_ones(books):
    full, _ = admit(books, range(4))
    part, _ = admit(books, range(50, 53))
    books.free(full)
    books.free(part)  # the last to be freed, but there is nothing to be found in it
    books.free(admit(books, range(100, 119))[0])  # five blocks: all that hold nothing
    assert admit(books, range(5))[1] == 4


def test_the_least_recently_used_prefix_is_evicted_first(books):
    first, second = range(4), range(10, 14)
    for text in (first, second, first):  # first is used again, and outlives second
        books.free(admit(books, text)[0])
    books.free(admit(books, range(20, 40))[0])  # five blocks: four empty ones and one eviction
    assert second[0] == 10 and books._match(sequence(second)) == []
    assert len(books._match(sequence(first))) == 1


def test_a_prefix_outlives_its_continuation(books):
    books.free(admit(books, range(12))[0])
    books.free(admit(books, range(100, 116))[0])  # four blocks: evicts the last one of the first
    assert len(books._match(sequence(range(12)))) == 2


def test_an_evicted_parent_hides_its_children(books):
    a, _ = admit(books, range(8))
    root = books.blocks[a.block_table[0]]
    books.free(a)
    books.free_blocks.move_to_end(root.block_id, last=False)
    b, _ = admit(books, [99])
    assert b.block_table == [root.block_id]
    assert books._match(sequence(range(8))) == []
    c, _ = admit(books, range(4))  # the parent comes back under another registration
    assert len(books._match(sequence(range(8)))) == 1
    books.check([b, c])


def test_reset_forgets_everything_and_takes_nothing_away(books):
    a, _ = admit(books, range(8))
    books.free(admit(books, range(50, 54))[0])
    books.reset_prefix_cache()
    books.check([a])
    assert books.cached == {} and len(a.block_table) == 2
    assert admit(books, range(8))[1] == 0
    assert books._match(sequence(range(50, 54))) == []


def test_content_decides_when_hashes_collide(books, monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, tokens: 42)
    a, _ = admit(books, range(8))
    b, cached = admit(books, range(50, 58))
    assert cached == 0 and not set(a.block_table) & set(b.block_table)
    c, cached = admit(books, range(4))
    assert cached == 4
    books.check([a, b, c])


def test_the_parent_decides_when_the_hash_forgets_it(books, monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, tokens: 1 + tokens[0])
    a, _ = admit(books, [1, 1, 1, 1, 3, 3, 3, 3])
    b, _ = admit(books, [2, 2, 2, 2])
    c, cached = admit(books, [2, 2, 2, 2, 3, 3, 3, 3])
    assert cached == 4 and c.block_table[1] not in a.block_table
    books.check([a, b, c])


def test_check_finds_a_lost_block(books):
    a, _ = admit(books, range(8))
    books.blocks[a.block_table[0]].ref_count += 1
    with pytest.raises(AssertionError):
        books.check([a])
    books.blocks[a.block_table[0]].ref_count -= 1
    books.check([a])
    with pytest.raises(AssertionError):
        books.check([])
