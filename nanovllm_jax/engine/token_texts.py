"""Scores of tokens as outputs have them: by token, each with its text."""

from transformers import PreTrainedTokenizerBase

from nanovllm_jax.engine.token_scores import TokenScores
from nanovllm_jax.outputs import Logprob, PositionScores


class TokenTexts:
    """Gives scored tokens their texts, each decoded once and by itself.

    Args:
        tokenizer: None leaves the texts out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def with_texts(self, scores: TokenScores) -> PositionScores:
        """The scores by token, as a request's output has them.

        Where a token is the one drawn and among the likeliest too, its rank among these counts.
        """
        return {
            token: Logprob(logprob, rank, self._text(token))
            for token, logprob, rank in zip(*scores, strict=True)
        }

    def _text(self, token: int) -> str | None:
        if self._tokenizer is not None and token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts.get(token)
