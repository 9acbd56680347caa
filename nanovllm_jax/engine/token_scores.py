"""Scores of tokens on the host, as a sequence keeps them."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike


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


class ScoreLists(NamedTuple):
    """The numbers of `layers.scores.Scores` as lists: Python takes an array's apart one by one."""

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @classmethod
    def of(cls, scores: Iterable[ArrayLike]) -> "ScoreLists":
        """The arrays of `Scores`, once they are there."""
        return cls._make([np.asarray(array).tolist() for array in scores])

    def at(self, row: int, token_id: int, count: int) -> TokenScores:
        """The scores of a row's token and of the `count` likeliest."""
        ids, logprobs = self.top_ids[row][:count], self.top_logprobs[row][:count]
        return TokenScores(
            [token_id, *ids],
            [self.logprobs[row], *logprobs],
            [self.ranks[row], *range(1, len(ids) + 1)],
        )
