"""Turns tokens into text while they arrive."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Decoders of the `tokenizers` library under which new tokens never change the text of older ones.
STABLE = {"ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "Fuse"}
INCOMPLETE = "\ufffd"  # what decoders write for an incomplete UTF-8 sequence
# Tokens that may follow the last token of a character's beginning: it has 4 bytes at most.
CONTINUATION = 3
MOST_HELD = 16  # Tokens held back, from which on those are given out that no more can change.


class Detokenizer:
    """Decodes one request's tokens piece by piece and never gives out half of a character.

    The text is the same however the tokens are divided among calls. It is what the tokenizer makes
    of all tokens at once, unless its decoder would change text that was given out: byte fallback
    writes U+FFFD for complete characters too, if half a character follows them.

    Text is held back while it ends in U+FFFD, which stands for an incomplete UTF-8 sequence. Each
    decoding starts one piece back, because some tokenizers drop the first token's leading space. It
    never starts more than a few dozen tokens back, so all of them take time linear in the tokens.

    Args:
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        # What transformers' `decode` calls in the end. Its conversions on the way took 6 of 8.5 us.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_ids = tokenizer.decode if backend is None else backend.decode
        if backend is None:
            self._options["clean_up_tokenization_spaces"] = False
        self._unstable = {kind for kind in _decoders(tokenizer) if kind not in STABLE}
        self._joins = _joins_pieces(tokenizer)
        self._special: set[int] | None = None  # tokens that are skipped, once they are needed
        self._ids: list[int] = []
        self._start = 0  # index of the token that decodings start with
        self._pieces = (0, 0)  # index of the first token of each of the last two pieces given out
        self._end = 0  # tokens that were given out

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they complete."""
        self._ids += token_ids
        text = self._new_text()
        if len(token_ids) > 1 and self._depends_on_pieces(text):
            del self._ids[len(self._ids) - len(token_ids) :]
            return "".join(self.push([token_id]) for token_id in token_ids)
        if not text or text.endswith(INCOMPLETE):
            return self._settled_part(text)
        self._give_out(len(self._ids))
        return text

    def flush(self) -> str:
        """Return the text held back, complete or not; call it once, at the end."""
        return self._new_text() if self._end < len(self._ids) else ""

    def _depends_on_pieces(self, text: str) -> bool:
        """Whether token by token may give something else than this new text of several tokens."""
        return bool(self._unstable - {"ByteFallback"} or (self._unstable and INCOMPLETE in text))

    def _new_text(self) -> str:
        """The text that was not given out."""
        if self._joins:
            self._start = self._end
            return self._decode(self._end)
        given_out = ""
        for start in self._pieces:  # a piece may be a space, which is dropped at the beginning
            if given_out := self._decode(start, self._end):
                self._start = start
                break
        given_out = given_out or self._decode(self._start, self._end)
        text = self._decode(self._start)
        if text.startswith(given_out):
            return text[len(given_out) :]
        return self._decode(self._end)

    def _settled_part(self, text: str) -> str:
        """Give out what no further token can change of text that is being held back, if it is long.

        Tokens without a text are forgotten here: no decoding can start at them, and a model that
        repeats its end token would make a long run of them.
        """
        self._ids[self._end :] = [t for t in self._ids[self._end :] if not self._is_skipped(t)]
        last = len(self._ids) - CONTINUATION
        if len(self._ids) - self._end <= MOST_HELD:
            return ""
        # One of these is no position inside of a character; there, its parts give more text.
        for end in range(last, last - CONTINUATION - 1, -1):
            part = text[: len(text) - len(rest)] if (rest := self._decode(end)) else text
            given_out = self._decode(self._start, self._end)
            if part and self._decode(self._start, end) == given_out + part and text == part + rest:
                self._give_out(end)
                return part
        return ""

    def _give_out(self, end: int) -> None:
        """Note that the text of all tokens before `end` is given out, as one more piece."""
        self._pieces, self._end = (self._end, self._pieces[0]), end

    def _is_skipped(self, token_id: int) -> bool:
        """Whether decoding leaves a token out, wherever it stands."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._special is None:
            special = getattr(self._tokenizer, "all_special_ids", [])
            if backend is not None:
                added = backend.get_added_tokens_decoder()
                special = [i for i, token in added.items() if token.special]
            self._special = set(special) if self._options["skip_special_tokens"] else set()
        if token_id in self._special:
            return True
        return backend is not None and backend.id_to_token(token_id) is None

    def _decode(self, start: int, end: int | None = None) -> str:
        return str(self._decode_ids(self._ids[start:end], **self._options))


def _joins_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a piece has the same text alone as behind others, if none ends within a character.

    So it is with byte-level tokenizers, as those of Qwen and Llama 3.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"


def _decoders(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The kinds of the decoders that run one after another, without those that are harmless."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ["not of the `tokenizers` library"]
    if backend.decoder is None:  # spaces are put between tokens
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in decoder.get("decoders", [decoder]) if not _is_local(part)]


def _is_local(decoder: dict[str, Any]) -> bool:
    """Whether a decoder replaces single characters, or drops one space at the beginning."""
    if decoder["type"] == "Strip":
        return decoder["start"] <= 1 and decoder["stop"] == 0
    return decoder["type"] == "Replace" and len(decoder["pattern"].get("String", "")) == 1
