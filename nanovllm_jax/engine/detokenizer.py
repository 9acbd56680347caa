"""Turns tokens into text while they arrive."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes one request's tokens piece by piece and never gives out half of a character.

    Text is held back while it ends in U+FFFD, which stands for an incomplete UTF-8 sequence. Each
    decoding starts one piece back, because some tokenizers drop the first token's leading space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # index of the first token of the piece given out last
        self._end = 0  # tokens that were given out

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they complete."""
        self._ids += token_ids
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def flush(self) -> str:
        """Return the text held back, complete or not; call it once, at the end."""
        return self._pending()

    def _pending(self) -> str:
        given_out = self._decode(self._ids[self._start : self._end])
        return self._decode(self._ids[self._start :])[len(given_out) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
