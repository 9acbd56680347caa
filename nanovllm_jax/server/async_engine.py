"""AsyncEngine: an engine's requests for asyncio.

The engine calls `_ring` after each round, in a thread of its own, which wakes the event loop at
most once for all requests. No request is polled, or has a thread or a task of its own.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from nanovllm_jax import SamplingParams
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import RequestId
from nanovllm_jax.engine.llm_engine import EngineStats
from nanovllm_jax.engine.owner import Listener
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.outputs import CompletionOutput

# Threads that check and tokenize long prompts. The tokenizers' library works without the GIL, so
# that they do not hold up the event loop.
TOKENIZER_THREADS = 2
# Token ids or characters of prompts that the event loop takes itself: 0.1 ms for so many ids, half
# a millisecond for a text. The way through a thread is several turns of the loop, each of which
# takes milliseconds while many streams are under way.
SHORT = 2048

log = logging.getLogger("nanovllm_jax")

ENDS = "the server ends"
WATCH_S = 1.0  # Seconds between two looks at an engine that may have ended without a request.

T = TypeVar("T")


class Engine(Protocol):
    """What a server needs: an `LLM`, or an engine in another process."""

    config: EngineConfig
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int

    @property
    def has_ended(self) -> bool:
        """Whether the engine takes no more requests."""
        ...

    def start(self, prompt: Prompt, params: SamplingParams, listener: Listener, /) -> Request:
        """Queue a request of a listener, and return it; TypeError or ValueError if it is wrong."""
        ...

    def end(self, request_ids: list[RequestId], /) -> None:
        """End those of the requests that have not ended, soon, and return at once."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        ...

    def stats(self) -> EngineStats:
        """How much the engine has to do, and has done."""
        ...


def are_short(prompts: Sequence[Prompt]) -> bool:
    """Whether a group starts requests of these prompts at once, without waiting for a thread."""
    return all(isinstance(p, str | list) for p in prompts) and sum(map(len, prompts)) <= SHORT


class QueueFull(Exception):
    """As many completions are under way as may be."""


class EngineFault(Exception):
    """The engine has failed, and with it all requests under way."""

    status = 500


class Stopped(EngineFault):
    """The server ends before the request has ended."""

    status = 503


class News(NamedTuple):
    """What one of a group's requests has got."""

    number: int  # of the request in the group
    parts: list[CompletionOutput]


class AsyncEngine:
    """Runs requests of an event loop.

    Args:
        max_waiting: completions that may wait for a place among the engine's `max_num_seqs`.
        on_fault: is called once, when the engine has failed.
    """

    def __init__(self, llm: Engine, max_waiting: int, on_fault: Callable[[], None] = lambda: None):
        self.llm, self._on_fault = llm, on_fault
        self.most = llm.config.max_num_seqs + max_waiting
        self.fault: BaseException | None = None  # what ended the engine's work
        self.groups: set[Group] = set()
        self._has_stopped = False
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(self._ring)
        self._has_rung = False
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._timer = self._loop.call_later(WATCH_S, self._watch)

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Call a function in one of the tokenizers' threads."""
        return await self._loop.run_in_executor(self._tokenizers, work, *args)

    def failure(self) -> BaseException | None:
        """What has ended the engine's work, if anything has."""
        if not self.fault and self.llm.has_ended:  # between two rounds, where no listener is told
            self._fail(RuntimeError("the engine has ended"))
        return self.fault

    def _watch(self) -> None:
        if not self.failure():
            self._timer = self._loop.call_later(WATCH_S, self._watch)

    def group(self, size: int) -> "Group":
        """A place for the requests that one reader waits for, with `size` completions in all.

        Raises:
            QueueFull: with them there would be more than may be.
            EngineFault: the engine works no more, or the server ends.
        """
        if fault := self.failure():
            raise EngineFault(str(fault))
        if self._has_stopped:
            raise Stopped(ENDS)
        taken = sum(group.size for group in self.groups)
        if taken and taken + size > self.most:
            raise QueueFull(f"{taken} completions are under way or wait already")
        return Group(self, size)

    def _start(self, prompt: Prompt, params: SamplingParams) -> Request:
        return self.llm.start(prompt, params, self._listener)

    def _ring(self) -> None:
        """Have the loop look for news. (A flag that is set twice is as good as once: no lock.)"""
        if not self._has_rung:
            self._has_rung = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Tell each group what is new."""
        self._has_rung = False  # first: what comes from here on rings again
        self._listener.ended.clear()  # the groups have them
        if self._listener.failure and not self.fault:
            self._fail(self._listener.failure)
        for group in self.groups:
            group.look(self.fault)

    def _fail(self, fault: BaseException) -> None:
        self.fault = fault
        log.error("the engine has failed: %s", fault)
        self._on_fault()

    def stop(self) -> None:
        """Have all requests under way fail at once, and take no more."""
        self._has_stopped = True
        for group in self.groups:
            group.fail(Stopped(ENDS))

    def close(self) -> None:
        """End the threads."""
        self._timer.cancel()
        self._tokenizers.shutdown(wait=False, cancel_futures=True)


class Group:
    """Requests that one reader waits for. It is used with `with`, which ends those that are left.

    Attributes:
        size: completions of all of them.
        requests: those that have been started.
    """

    def __init__(self, engine: AsyncEngine, size: int):
        self.size = size
        self.requests: list[Request] = []
        self._engine, self._num_left = engine, 0
        self._news: asyncio.Queue[News | Exception] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Group":
        self._engine.groups.add(self)
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    async def start(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Start a request; ValueError or TypeError if it could never run."""
        if are_short([prompt]):
            request = self._engine._start(prompt, params)
        else:
            request = await self._start_in_thread(prompt, params)
        self.requests.append(request)
        self._num_left += params.n
        self.look(self._engine.fault)  # it may have news already
        return request

    async def _start_in_thread(self, prompt: Prompt, params: SamplingParams) -> Request:
        starting = asyncio.ensure_future(
            self._engine.in_thread(self._engine._start, prompt, params)
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:  # the thread goes on, and its request would have no reader
            starting.add_done_callback(self._end_started)
            raise

    async def next(self) -> News | None:
        """What comes next; None when all completions have ended.

        Raises:
            EngineFault: the engine has failed, or the server ends.
            TimeoutError: see `end_after`.
        """
        if not self._num_left:
            return None
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        self._num_left -= sum(part.finish_reason is not None for part in news.parts)
        return news

    def look(self, fault: BaseException | None) -> None:
        """Take in what is new."""
        if fault:
            self.fail(EngineFault(str(fault)))
            return
        for number, request in enumerate(self.requests):
            if parts := request.news():
                self._news.put_nowait(News(number, parts))

    def end_after(self, seconds: float) -> None:
        """Have the reader get a TimeoutError then, if there is still something to come."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, TimeoutError())

    def fail(self, fault: Exception) -> None:
        """Have the reader get an exception, after what has come before."""
        self._news.put_nowait(fault)

    def close(self) -> None:
        """End the requests that have not ended."""
        self._engine.groups.discard(self)
        if self._timer:
            self._timer.cancel()
        if self.requests and self._num_left and not self._engine.failure():
            self._engine.llm.end([request.request_id for request in self.requests])

    def _end_started(self, starting: "asyncio.Future[Request]") -> None:
        if not starting.cancelled() and not starting.exception():
            self._engine.llm.end([starting.result().request_id])
