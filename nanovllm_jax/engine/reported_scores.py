"""Scores in the form that a request's outputs have, with the texts of their tokens."""

from transformers import PreTrainedTokenizerBase

from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.token_scores import TokenScores
from nanovllm_jax.outputs import Logprob

PositionScores = dict[int, Logprob]  # token id -> its score at one position


class ReportedScores:
    """The scores of one sequence, as far as they have been reported.

    Args:
        tokenizer: gives the tokens' texts; None leaves them out.
    """

    def __init__(self, seq: Sequence, tokenizer: PreTrainedTokenizerBase | None):
        self._seq, self._tokenizer = seq, tokenizer
        self._texts: dict[int, str] = {}  # each token is decoded once, and by itself
        self._cumulative = 0.0
        self._completion: list[PositionScores] = []
        self._prompt: list[PositionScores | None] | None = None

    def completion(self, start: int, end: int) -> tuple[float | None, list[PositionScores] | None]:
        """The sum of all log probabilities of the tokens before `end`, and the scores from `start`.

        `end` never goes back. Both are None if the request has not asked for them.
        """
        if self._seq.params.logprobs is None:
            return None, None
        for scores in self._seq.scores[len(self._completion) : end]:
            self._cumulative += scores.logprobs[0]
            self._completion.append(self._by_token(scores))
        return self._cumulative, self._completion[start:end]

    def prompt(self) -> list[PositionScores | None] | None:
        """The scores of the prompt's tokens, the first one's None.

        It is None if the request has not asked for them, and until all are there.
        """
        seq = self._seq
        if seq.params.prompt_logprobs is None or seq.wants_prompt_scores:
            return None
        if self._prompt is None:
            scores = [seq.prompt_scores[i] for i in range(1, seq.num_prompt_tokens)]
            self._prompt = [None, *map(self._by_token, scores)]
        return self._prompt

    def _by_token(self, scores: TokenScores) -> PositionScores:
        """Where a token is the one drawn and among the likeliest too, its rank there counts."""
        return {
            token: Logprob(logprob, rank, self._text(token))
            for token, logprob, rank in zip(*scores, strict=True)
        }

    def _text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]
