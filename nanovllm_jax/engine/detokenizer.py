"""Turns tokens into text while they arrive."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Decoders of the `tokenizers` library under which new tokens never change the text of older ones.
STABLE = {"ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "Fuse"}
INCOMPLETE = "\ufffd"  # what decoders write for an incomplete UTF-8 sequence


class Detokenizer:
    """Decodes one request's tokens piece by piece and never gives out half of a character.

    The text is the same however the tokens are divided among calls. It is what the tokenizer makes
    of all tokens at once, unless its decoder would change text that was given out: byte fallback
    writes U+FFFD for complete characters too, if half a character follows them.

    Text is held back while it ends in U+FFFD, which stands for an incomplete UTF-8 sequence. Each
    decoding starts one piece back, because some tokenizers drop the first token's leading space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._unstable = {kind for kind in _decoders(tokenizer) if kind not in STABLE}
        self._ids: list[int] = []
        self._start = 0  # index of the token that decodings start with
        self._last = 0  # index of the first token of the piece given out last
        self._end = 0  # tokens that were given out

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they complete."""
        self._ids += token_ids
        text = self._new_text()
        if len(token_ids) > 1 and self._depends_on_pieces(text):
            del self._ids[len(self._ids) - len(token_ids) :]
            return "".join(self.push([token_id]) for token_id in token_ids)
        # A piece of special tokens alone, which have no text, is none that a decoding can start at.
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._last, self._end = self._end, len(self._ids)
        return text

    def flush(self) -> str:
        """Return the text held back, complete or not; call it once, at the end."""
        return self._new_text() if self._end < len(self._ids) else ""

    def _depends_on_pieces(self, text: str) -> bool:
        """Whether token by token may give something else than this new text of several tokens."""
        return bool(self._unstable - {"ByteFallback"} or (self._unstable and INCOMPLETE in text))

    def _new_text(self) -> str:
        """The text that was not given out."""
        given_out = self._decode(self._ids[self._last : self._end])
        if given_out:
            self._start = self._last
        else:  # The piece is a space, which was dropped: the next one must not be.
            given_out = self._decode(self._ids[self._start : self._end])
        text = self._decode(self._ids[self._start :])
        if text.startswith(given_out):
            return text[len(given_out) :]
        return self._decode(self._ids[self._end :])

    def _decode(self, token_ids: list[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(token_ids, **options))


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
