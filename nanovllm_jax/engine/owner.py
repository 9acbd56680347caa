"""Owners: who is told how requests go, and waits for them."""

from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from nanovllm_jax.engine.commands import RequestId
from nanovllm_jax.engine.request import Request


class Owner:
    """Who made some requests: `under_way` has them by their ids, then `ended`, in that order."""

    def __init__(self):
        self.under_way: dict[RequestId, Request] = {}
        self.ended: list[Request] = []


class Round(NamedTuple):
    """What a round has done.

    `num_tokens` counts the prompt tokens of a prefill round, or minus the sequences of a decode
    round; it is 0 if requests have changed without a round.
    """

    num_tokens: int
    end: float  # time.perf_counter() when it ended, in seconds


class Waiter(Owner):
    """An owner who waits: the engine runs rounds until none of its requests is under way."""

    def __init__(self):
        super().__init__()
        self.rounds: SimpleQueue[Round] = SimpleQueue()
        self.failure: BaseException | None = None  # what ended a round; the requests are aborted

    def tell(self, new_round: Round) -> None:
        """Note a round; the engine's thread calls this after each."""
        self.rounds.put(new_round)

    def wait(self) -> Round:
        """Wait for the next of the rounds since the requests were queued; raises `failure`."""
        new_round = self.rounds.get()
        self.check()
        return new_round

    def check(self) -> None:
        """Raise `failure`, if there is one. Requests that have ended without it have ended well."""
        if self.failure:
            raise self.failure


class Listener(Waiter):
    """A waiter for as long as the process lives, who has a function called after each round.

    Args:
        notify: is called in the engine's thread, and must not take long.
    """

    def __init__(self, notify: Callable[[], None]):
        super().__init__()
        self._notify = notify

    def tell(self, new_round: Round) -> None:
        self._notify()
