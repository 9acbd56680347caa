"""EngineThread: the one thread in which an engine's rounds run.

Python handles signals in the main thread only, so an interruption (Ctrl-C, an alarm) can end a wait
for a round, and never a round itself. The JAX settings that a user's thread has entered do not
reach this thread. And calls from several threads queue up here: their requests are batched
together, whoever made them.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from nanovllm_jax.engine.ambient import default_settings
from nanovllm_jax.engine.core import EngineCore
from nanovllm_jax.engine.owner import Owner, Round, Waiter
from nanovllm_jax.engine.request import Request

log = logging.getLogger("nanovllm_jax")

DEADLINE_S = 20.0  # Seconds that the end of the process waits for a round or a compilation.

SHUT_DOWN = "the engine has been shut down by exit(); make a new LLM"

T = TypeVar("T")
Call = Callable[[], int]  # returns the count of `EngineCore.run_round`, or 0


class EngineThread:
    """Calls an EngineCore: what it is asked to, and rounds while somebody waits for tokens.

    It has no reference to the engine that users hold, so that a forgotten engine is collected.
    """

    def __init__(self, make_core: Callable[[], EngineCore]):
        """Start the thread and have it make the core; raises what `make_core` raises."""
        self._core: EngineCore | None = None
        self._calls: SimpleQueue[Call | None] = SimpleQueue()  # None is the last
        self._waiters: list[Waiter] = []
        self._pid, self._has_ended = os.getpid(), False
        self._failure: BaseException | None = None  # what ended the thread
        self._thread = threading.Thread(target=self._run, name="nanovllm_jax", daemon=True)
        self._thread.start()

        def make() -> None:
            self._core = make_core()

        try:
            self.call(make)
        except BaseException:
            self._calls.put(None)
            raise
        atexit.register(self._close_at_exit)  # runs before JAX's own clean-up

    @property
    def core(self) -> EngineCore:
        """The core, for the thread's calls and to look into while it is idle."""
        assert self._core
        return self._core

    @property
    def has_ended(self) -> bool:
        """Whether the thread calls nothing any more, after `close` or a failure."""
        return self._has_ended

    def call(self, run: Callable[..., T], *args: object) -> T:
        """Have the thread call `run` between two rounds, and return what it returns.

        If the wait is interrupted, `run` is called all the same.

        Raises:
            RuntimeError: the engine has been shut down, or belongs to the process that this one
                was forked from.
        """
        self.check_usable()
        # A queue and no Future: interrupted inside the lock of a Future, this thread would keep it,
        # and the engine's would wait for it for ever.
        answer: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

        def body() -> int:
            try:
                if self._has_ended:
                    raise RuntimeError(SHUT_DOWN)
                answer.put((run(*args), None))
            except BaseException as error:
                answer.put((None, error))
            return 0

        self._put(body)
        result, error = answer.get()
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def send(self, run: Callable[..., object], *args: object) -> None:
        """Have the thread call `run` between two rounds, and return at once."""
        self.check_usable()

        def body() -> int:
            run(*args)
            return 0

        self._put(body)

    def catch_up(self) -> None:
        """Wait until all that was asked for before has been done."""
        if not self._has_ended and threading.current_thread() is not self._thread:
            self.call(lambda: None)

    def check_usable(self) -> None:
        """Raise RuntimeError if the engine has been shut down, or is another process's."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this engine belongs to process {self._pid}, of which process {os.getpid()} is a "
                f'fork: JAX does not work there. Start processes with the method "spawn", for '
                f'example multiprocessing.get_context("spawn"), and make an LLM in each'
            )
        if self._has_ended:
            raise RuntimeError(SHUT_DOWN) from self._failure

    def add(self, requests: list[Request], owner: Owner) -> None:
        """Queue requests and return at once; for a `Waiter`, rounds run until they have ended."""
        self.check_usable()

        def body() -> int:
            self.core.add(requests, owner)
            if isinstance(owner, Waiter) and owner not in self._waiters:
                self._waiters.append(owner)
            return 0

        self._put(body)

    def abandon(self, waiter: Waiter) -> None:
        """End what is left of a waiter's requests, if anything is.

        The garbage collector may close a stream in any thread; if it does so in this one, in the
        middle of a round, the requests end after that round.
        """
        if self._has_ended or os.getpid() != self._pid:
            return
        if threading.current_thread() is self._thread:
            self._calls.put(lambda: self.core.abort_all_of(waiter) or 0)
        else:
            self.call(self.core.abort_all_of, waiter)

    def close(self) -> None:
        """Free the device's memory and end the thread, after what it has been asked for already."""
        if os.getpid() != self._pid:  # a forked child has neither the thread nor the memory
            return
        atexit.unregister(self._close_at_exit)
        self._calls.put(None)
        if threading.current_thread() is not self._thread:  # where the garbage collector may be
            self._thread.join()
            if self._failure:
                raise self._failure

    def _put(self, call: Call) -> None:
        self._calls.put(call)
        if self._has_ended:  # meanwhile, and the thread may not see the call any more
            raise RuntimeError(SHUT_DOWN)

    def _run(self) -> None:
        try:
            with default_settings():
                while call := self._next_call():
                    self._tell(call())
                if self._core:
                    self._core.shut_down()
        except BaseException as error:
            self._failure = error
        self._has_ended = True
        while not self._calls.empty():  # those who called too late get their error
            if call := self._calls.get():
                call()
        self._fail(RuntimeError(SHUT_DOWN))
        self._tell(0)

    def _next_call(self) -> Call | None:
        """The oldest call; a round if somebody waits for one and nobody has called."""
        try:
            return self._calls.get(block=not self._waiters)
        except Empty:
            return self._round

    def _round(self) -> int:
        try:
            return self.core.run_round()
        except BaseException as error:
            self._fail(error)
            return 0

    def _fail(self, error: BaseException) -> None:
        """End the requests that somebody waits for, with an error."""
        for waiter in self._waiters:
            waiter.failure = error  # first: whoever sees a request end can see why
            self.core.abort_all_of(waiter)

    def _tell(self, num_tokens: int) -> None:
        """Wake those who wait, and forget those whose requests have ended."""
        for waiter in self._waiters:
            waiter.tell(Round(num_tokens, time.perf_counter()))
        self._waiters = [waiter for waiter in self._waiters if waiter.under_way]

    def _close_at_exit(self) -> None:
        self._calls.put(None)
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():  # JAX's clean-up would wait for the device, too
            log.error("the device has not answered for %.0f s; ending the process", DEADLINE_S)
            os._exit(1)
