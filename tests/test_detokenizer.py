"""Text while tokens arrive: its parts joined are the text of all tokens, with any tokenizer."""

import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from nanovllm_jax.engine.detokenizer import Detokenizer

SPECIAL = ["<s>", "</s>"]
WORDS = ["▁", "▁▁", "▁a", "b", "é", "▁€", "😀", ".", "▁.", "\ufffd", "▁don", "'t"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Bytes that make random sequences meet: ASCII and the parts of "é€😀" and of U+FFFD.
SOME_BYTES = [*b" ab.\n", *"é€😀\ufffd".encode(), 0x80, 0xFF]


def fast(tokenizer, decoder):
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram(decoder, words=WORDS):
    """A tokenizer as SentencePiece's are converted: special tokens, bytes, words."""
    vocab = [(word, 0.0) for word in [*SPECIAL, *BYTES, *words]]
    return fast(Tokenizer(Unigram(vocab, unk_id=0, byte_fallback=True)), decoder)


@functools.cache
def tokenizer_of(kind):
    """A tokenizer of this kind, and the tokens to draw from."""
    words = [*range(len(SPECIAL) + 256, len(SPECIAL) + 256 + len(WORDS))]
    some_bytes = [len(SPECIAL) + byte for byte in SOME_BYTES]
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "byte-level":
        signs = {byte: sign for byte, sign in _byte_signs()}
        vocab = {sign: i for i, sign in enumerate([*SPECIAL, *signs.values(), "Ġa", "Ã©"])}
        made = Tokenizer(BPE(vocab=vocab, merges=[]))
        made = fast(made, decoders.ByteLevel())
        made.add_tokens(["<think>", "é "])
        order = [vocab[signs[byte]] for byte in SOME_BYTES]
        return made, [0, 1, *order, len(vocab) - 2, len(vocab) - 1, len(vocab), len(vocab) + 1]
    if kind == "llama":
        return unigram(decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)])), [
            0, 1, *some_bytes, *words
        ]  # fmt: skip
    if kind == "gemma":
        return unigram(decoders.Sequence(llama)), [0, 1, *some_bytes, *words]
    if kind == "metaspace":
        return unigram(decoders.Metaspace()), [0, 1, *words]
    if kind == "word-piece":
        pieces = [*SPECIAL, "a", "##b", "##é", ".", "do", "n't", "'s", "##.", "\ufffd"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        return fast(Tokenizer(WordPiece(vocab, unk_token="<s>")), decoders.WordPiece()), [
            *vocab.values()
        ]
    if kind == "suffix":
        pieces = [*SPECIAL, "a</w>", "b", "é</w>", "\ufffd</w>", "</w>"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        return fast(Tokenizer(BPE(vocab, [])), decoders.BPEDecoder()), [*vocab.values()]
    assert kind == "rewriting"  # it drops the space before a full stop that comes later
    parts = [decoders.Metaspace(), decoders.Fuse(), decoders.Replace(Regex(" +\\."), ".")]
    return unigram(decoders.Sequence(parts)), [0, 1, *words]


def _byte_signs():
    """The sign of each byte under byte-level BPE."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = {ord(sign) for sign in pre_tokenizers.ByteLevel.alphabet() if ord(sign) < 256}
    rest = iter(range(256, 512))
    for byte in range(256):
        yield byte, chr(byte) if byte in plain else chr(next(rest))
    assert pre.pre_tokenize_str(" ")[0][0] == "Ġ"


KINDS = ["byte-level", "llama", "gemma", "metaspace", "word-piece", "suffix", "rewriting"]
# Byte fallback turns complete characters into U+FFFD too if half a one follows; the last one is
# made up to change what has been written.
CHANGES_TEXT = {"llama": "\ufffd", "gemma": "\ufffd", "rewriting": "."}


def whole(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def streamed(tokenizer, pieces, skip=True):
    """The parts that pieces of tokens give, the last of them by `flush`."""
    detokenizer = Detokenizer(tokenizer, skip)
    return [*map(detokenizer.push, pieces), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_parts_joined_are_the_text_of_all_tokens(kind, data):
    tokenizer, choice = tokenizer_of(kind)
    ids = data.draw(st.lists(st.sampled_from(choice), max_size=14), label="ids")
    cuts = data.draw(st.sets(st.integers(0, len(ids))), label="cuts")
    edges = sorted({0, len(ids), *cuts})
    pieces = [ids[a:b] for a, b in itertools.pairwise(edges)]
    skip = data.draw(st.booleans(), label="skip_special_tokens")
    one_by_one = streamed(tokenizer, [[token] for token in ids], skip)
    text = "".join(one_by_one)
    assert text == "".join(streamed(tokenizer, pieces, skip))
    assert text == "".join(streamed(tokenizer, [ids], skip))
    assert not any(part.endswith("\ufffd") for part in one_by_one[:-1])
    expected = whole(tokenizer, ids, skip)
    if CHANGES_TEXT.get(kind, "none") not in expected:
        assert text == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_long_runs_of_broken_characters_come_out_as_they_are(data):
    """They are given out in parts, cut where no character goes on."""
    tokenizer, choice = tokenizer_of("byte-level")
    begin, go_on = (tokenizer.convert_tokens_to_ids([*signs]) for signs in ("ðâÃÿ", "ŁĺĢĤ¬©"))
    ids = []
    for _ in range(3):
        ids += data.draw(st.lists(st.sampled_from([*begin, 0]), min_size=15, max_size=24))
        ids += data.draw(st.lists(st.sampled_from(go_on), max_size=3))
    ids += data.draw(st.lists(st.sampled_from(choice), max_size=4))
    one_by_one = streamed(tokenizer, [[token] for token in ids])
    assert "".join(one_by_one) == whole(tokenizer, ids) == "".join(streamed(tokenizer, [ids]))


class Counting:
    """A tokenizer, or its backend, that counts the tokens which it decodes."""

    def __init__(self, wrapped, counts=None):
        self.wrapped, self.counts = wrapped, [] if counts is None else counts

    @property
    def count(self):
        return sum(self.counts)

    def __getattr__(self, name):
        found = getattr(self.wrapped, name)
        return Counting(found, self.counts) if name == "backend_tokenizer" else found

    def decode(self, token_ids, **options):
        self.counts.append(len(token_ids))
        return self.wrapped.decode(token_ids, **options)


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("byte-level", "a"), ("byte-level", "</s>"), ("byte-level", "ÿ"), ("llama", "▁"),
        ("llama", "<0xFF>"), ("gemma", "<0xE2>"), ("metaspace", "</s>"), ("metaspace", "▁"),
        ("word-piece", "</s>"), ("suffix", "b"), ("byte-level", None),
    ],
)  # fmt: skip
def test_the_cost_is_linear_in_the_tokens_whatever_they_are(kind, token):
    """A model under ignore_eos repeats its end token for ever; bytes may never make a character."""
    tokenizer, _ = tokenizer_of(kind)
    token_id = 9999 if token is None else tokenizer.convert_tokens_to_ids(token)  # in no vocabulary
    costs = []
    for length in (500, 1000):
        counting = Counting(tokenizer)
        text = "".join(streamed(counting, [[token_id]] * length))
        assert text == whole(tokenizer, [token_id] * length)
        costs.append(counting.count)
    assert costs[1] < 2.2 * costs[0] and costs[1] < 60 * 1000


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
def test_a_special_token_in_the_middle_keeps_the_space_after_it(kind):
    tokenizer, _ = tokenizer_of(kind)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁a", "</s>", "<s>", "▁a", "b")]
    parts = streamed(tokenizer, [[token] for token in ids])
    assert "".join(parts) == whole(tokenizer, ids) in ("a ab", " a ab")


def test_half_a_character_takes_no_complete_one_with_it():
    """Byte fallback decodes a run of bytes to U+FFFD throughout if any is incomplete."""
    tokenizer, _ = tokenizer_of("gemma")
    ids = [len(SPECIAL) + byte for byte in b"a\xe2"] + tokenizer.convert_tokens_to_ids(["b"])
    assert whole(tokenizer, ids) == "\ufffd\ufffdb"
    assert streamed(tokenizer, [[token] for token in ids]) == ["a", "", "\ufffdb", ""]
    assert "".join(streamed(tokenizer, [ids])) == "a\ufffdb"


@example(" .")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text("ab .,'?!nt", max_size=20))
def test_decoding_never_cleans_up_spaces(text):
    """transformers 4.57 did by default, and the stream lost punctuation."""
    tokenizer = byte_level_that_cleans_up()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(streamed(tokenizer, [[token] for token in ids])) == text
    assert "".join(streamed(tokenizer, [ids])) == text


@functools.cache
def byte_level_that_cleans_up():
    vocab = {sign: i for i, sign in enumerate(sign for _, sign in _byte_signs())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert made.decode(made.encode("a .")) == "a."
    return made


class Bytes:
    """A tokenizer of another library, whose tokens are bytes."""

    def decode(self, token_ids, **_):
        return bytes(token_ids).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_is_given_out_whole():
    text = "aé€😀z"
    pieces = streamed(Bytes(), [[byte] for byte in text.encode()])
    assert [piece for piece in pieces if piece] == list(text)


def test_an_incomplete_end_is_given_out_by_flush():
    assert streamed(Bytes(), [[*b"ab", 0xE2]]) == ["ab", "\ufffd"]
    assert streamed(Bytes(), [[0xE2]]) == ["", "\ufffd"]
