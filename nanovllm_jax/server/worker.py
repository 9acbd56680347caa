"""The engine's own process: it runs the requests that come through a pipe.

The server beside it turns tokens into text, JSON and events, which keeps a core busy. Threads of
one process take turns in Python: an engine in the server's process would wait at every step.
"""

import contextlib
import pickle
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from nanovllm_jax import LLM
from nanovllm_jax.engine import commands
from nanovllm_jax.engine.llm_engine import EngineStats
from nanovllm_jax.engine.owner import Listener
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.token_scores import TokenScores
from nanovllm_jax.outputs import FinishReason
from nanovllm_jax.server.threads import keep_threads_short_of_waiting


class End(NamedTuple):
    """How a sequence has ended."""

    reason: FinishReason
    error: str | None


class Progress(NamedTuple):
    """What a sequence has got since the last report, and its end if it has ended."""

    number: int  # of the sequence
    num_cached: int
    token_ids: list[int]
    scores: list[TokenScores]  # of these tokens, if they are wanted
    prompt_scores: dict[int, TokenScores]  # all of them, once they are all there
    end: End | None


class Report(NamedTuple):
    """What has come of a round."""

    progress: list[Progress]
    stats: EngineStats
    failure: str | None  # what has ended the round


class Refused(NamedTuple):
    """Why the engine has not started."""

    error: Exception


def main(handle: int) -> None:
    """Run an engine for the process at a socket's other end, until that one says `Exit` or ends.

    It is told the model and the engine's options, and answers with the engine's `Limits`, or
    `Refused`; then it takes commands, and sends `Report`s.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(handle)
    with contextlib.suppress(EOFError, OSError):  # the server has ended first
        _run(connection, *connection.recv())


def _run(connection: Connection, model: str, options: dict[str, Any]) -> None:
    try:
        llm = LLM(model, **options)
    except Exception as error:
        connection.send(Refused(_picklable(error)))
        return
    keep_threads_short_of_waiting()
    with llm:
        connection.send(llm.limits)
        _Worker(llm, connection).run()


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass
class _Told:
    """What has been reported of a sequence."""

    tokens: int = 0
    prompt: bool = False  # its prompt's scores
    end: bool = False


class _Worker:
    def __init__(self, llm: LLM, connection: Connection):
        self._llm, self._connection = llm, connection
        self._listener = Listener(self._report)
        self._told: dict[int, _Told] = {}  # by the sequence's number
        self._stats: EngineStats | None = None
        self._reports: SimpleQueue[Report] = SimpleQueue()

    def run(self) -> None:
        """Take commands, until the last one or the end of the process that sends them."""
        threading.Thread(target=self._send, name="reports", daemon=True).start()
        while self._carries_out(self._connection.recv()):
            pass

    def _carries_out(self, command: commands.Command) -> bool:
        match command:
            case commands.AddRequest():
                self._llm.enter(command, self._listener)
            case commands.AbortRequests(request_ids):
                self._llm.end(request_ids)
            case commands.ResetPrefixCache():
                self._llm.reset_prefix_cache()
        return not isinstance(command, commands.Exit)

    def _report(self) -> None:
        """Report what is new. (In the engine's thread, between two rounds.)"""
        listener, stats = self._listener, self._llm.stats()
        ended, failure = listener.ended.copy(), listener.failure
        listener.ended.clear()
        progress = []
        for request in (*listener.under_way.values(), *ended):
            for seq in request.seqs:
                told = self._told.setdefault(seq.seq_id, _Told())
                if not told.end and (new := _progress(seq, told)):
                    progress.append(new)
        for request in ended:
            for seq in request.seqs:
                del self._told[seq.seq_id]
        if progress or failure or stats != self._stats:
            self._stats = stats
            self._reports.put(Report(progress, stats, failure and str(failure)))

    def _send(self) -> None:
        """Send reports. Where the server is slow they wait here, and the engine goes on."""
        with contextlib.suppress(OSError):  # nobody is there to read
            while True:
                report = pickle.dumps(self._reports.get(), pickle.HIGHEST_PROTOCOL)
                self._connection.send_bytes(report)


def _progress(seq: Sequence, told: _Told) -> Progress | None:
    """What is new of a sequence, if anything is; and that it has been told."""
    start, prompt_scores = told.tokens, {}
    token_ids = seq.token_ids[seq.num_prompt_tokens + start :]
    if seq.prompt_scores and not told.prompt and not seq.wants_prompt_scores:
        prompt_scores, told.prompt = seq.prompt_scores, True
    if not (token_ids or seq.is_finished or prompt_scores):
        return None
    told.tokens, told.end = start + len(token_ids), seq.is_finished
    end = None
    if seq.is_finished:
        assert seq.finish_reason
        end = End(seq.finish_reason, seq.error)
    return Progress(seq.seq_id, seq.num_cached, token_ids, seq.scores[start:], prompt_scores, end)
