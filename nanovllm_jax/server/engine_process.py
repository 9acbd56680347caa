"""EngineProcess: an engine in a process of its own, for a server to use like an `LLM`.

Commands go there through a pipe, and reports come back. Here are copies of the requests, which get
the tokens of the reports; text, scores and stop strings are made of them as the engine would.
"""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.commands import AbortRequests, Command, Exit, RequestId, ResetPrefixCache
from nanovllm_jax.engine.llm_engine import EngineStats
from nanovllm_jax.engine.owner import Listener, Round
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.request_maker import Limits, RequestMaker
from nanovllm_jax.engine.sequence import Sequence, Status
from nanovllm_jax.server.worker import Progress, Refused, Report
from nanovllm_jax.tokenizer import load_tokenizer

DEADLINE_S = 20.0  # Seconds that the process has to free the device before it is killed.
START = "import sys; from nanovllm_jax.server import worker; worker.main(int(sys.argv[1]))"
PACKAGES = Path(__file__).parents[2]  # the folder that nanovllm_jax is in


class Copy(NamedTuple):
    """A sequence that the other process computes, and who is told of it."""

    seq: Sequence
    listener: Listener


class EngineProcess:
    """Starts an engine in another process; for `with`, which ends it.

    Args:
        model: the model's directory.
        options: as for `LLM`.

    Raises:
        Exception: what `LLM` raises.
        RuntimeError: the process has ended before the engine was there.
    """

    def __init__(self, model: str | Path, **options: Any):
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:  # and close it here, or else its end would never be seen
            path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            limits = self._started(str(model), options)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self.config = limits.config
        self.tokenizer = load_tokenizer(Path(self.config.model))
        self.vocab_size = self.config.model_config.vocab_size
        self._maker = RequestMaker(limits, self.tokenizer)
        self._copies: dict[int, Copy] = {}  # by the sequence's number
        self._listeners: set[Listener] = set()
        self._stats = EngineStats(0, 0, 0.0, 0, 0, 0)
        self._writing = threading.Lock()
        self._failure: RuntimeError | None = None  # what has ended the process
        threading.Thread(target=self._listen, name="reports", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the process takes no more requests."""
        return self._failure is not None

    def start(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Request:
        """Have a request run, and return its copy here; see `LLMEngine.start`."""
        request = self._maker.make(self._maker.check(prompt, params))
        self._listeners.add(listener)
        for seq in request.seqs:
            self._copies[seq.seq_id] = Copy(seq, listener)
        self._send(request.command)
        return request

    def end(self, request_ids: list[RequestId]) -> None:
        """End those of the requests that have not ended, soon, and return at once."""
        with contextlib.suppress(RuntimeError):  # they have ended with the process
            self._send(AbortRequests(request_ids))

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next request."""
        self._send(ResetPrefixCache())

    def stats(self) -> EngineStats:
        """How much the engine had to do when it reported last."""
        return self._stats

    def exit(self) -> None:
        """End the engine and its process. May be called twice."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._send(Exit())
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exc_info) -> None:
        self.exit()

    def _started(self, model: str, options: dict[str, Any]) -> Limits:
        """Tell the process what to start, and wait for its word."""
        try:
            self._connection.send((model, options))
            word: Limits | Refused = self._connection.recv()
        except (EOFError, OSError):
            raise self._end() from None
        if isinstance(word, Refused):
            raise word.error
        return word

    def _send(self, command: Command) -> None:
        if self._failure:
            raise self._failure
        try:
            with self._writing:
                self._connection.send(command)
        except OSError:
            raise self._end() from None

    def _end(self) -> RuntimeError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEADLINE_S)
        return RuntimeError(f"the engine's process has ended, status {self._process.returncode}")

    def _listen(self) -> None:
        """Take reports, until the process has ended."""
        try:
            while True:
                self._take(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            self._failure = self._end()
            self._tell(set(self._listeners), self._failure)

    def _take(self, report: Report) -> None:
        self._stats = report.stats
        listeners = set()
        for progress in report.progress:
            copy = self._copies[progress.number]
            listeners.add(copy.listener)
            self._advance(copy.seq, progress)
            if progress.end:
                del self._copies[progress.number]
        if report.failure:
            self._tell(set(self._listeners), RuntimeError(report.failure))
        else:
            self._tell(listeners)

    def _advance(self, seq: Sequence, progress: Progress) -> None:
        """Give a copy what its sequence has got; its tokens last, since others may read it."""
        end, seq.num_cached = progress.end, progress.num_cached
        seq.prompt_scores.update(progress.prompt_scores)
        seq.scores += progress.scores
        for token_id in progress.token_ids:
            # As in the engine; there, a token that does not fit its form ends it by an error.
            reason = seq.end_with(token_id, self._maker.limits.eos_token_ids)
            seq.finish_reason = end.reason if end and end.reason == "error" else reason
            seq.token_ids.append(token_id)
        if end:
            seq.finish_reason, seq.error, seq.status = end.reason, end.error, Status.FINISHED

    @staticmethod
    def _tell(listeners: set[Listener], failure: Exception | None = None) -> None:
        for listener in listeners:
            listener.failure = failure or listener.failure
            listener.tell(Round(0, time.perf_counter()))
