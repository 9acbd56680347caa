"""Scores of tokens on the host, as a sequence keeps them."""

from typing import NamedTuple, Protocol

from jaxtyping import Float, Int
from numpy import ndarray


class TokenScores(NamedTuple):
    """One position's token and then the likeliest ones instead, which may name it again."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class StepScores(Protocol):
    """What a call has scored of its rows."""

    def of_row(self, row: int, token_id: int, count: int) -> TokenScores:
        """The scores of the token that a row has drawn, and of the `count` likeliest."""
        ...

    def of_prompt(self, row: int) -> list[tuple[int, TokenScores]]:
        """Scores of tokens of a row's prompt, each with the token's position."""
        ...


class ScoreArrays(NamedTuple):
    """The arrays of `layers.scores.Scores`."""

    logprobs: Float[ndarray, " B"]
    ranks: Int[ndarray, " B"]
    top_ids: Int[ndarray, "B K"]
    top_logprobs: Float[ndarray, "B K"]

    def at(self, row: int, token_id: int, count: int) -> TokenScores:
        """The scores of a row's token and of the `count` likeliest."""
        ids, logprobs = self.top_ids[row, :count].tolist(), self.top_logprobs[row, :count].tolist()
        return TokenScores(
            [token_id, *ids],
            [float(self.logprobs[row]), *logprobs],
            [int(self.ranks[row]), *range(1, len(ids) + 1)],
        )
