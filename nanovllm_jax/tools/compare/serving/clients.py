"""Run the client's processes, which all begin at the same moment."""

import pickle
import subprocess
import sys
import time
from typing import IO

from nanovllm_jax.tools.compare.serving.messages import ClientJob, ClientResult

LEAD_S = 0.2  # seconds from the clients' being ready to the load's beginning


class ClientError(Exception):
    """A client process has failed; what it printed says why."""


class _Client:
    """One client process, with its job."""

    def __init__(self, job: ClientJob):
        command = [sys.executable, "-m", "nanovllm_jax.tools.compare.serving.client"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        pickle.dump(job, self._stdin)
        self._stdin.flush()

    def await_ready(self) -> None:
        if self._stdout.readline() != b"ready\n":
            raise ClientError("a client process did not start; see above")

    def begin(self, start: float) -> None:
        self._stdin.write(f"{start!r}\n".encode())
        self._stdin.flush()

    def result(self) -> ClientResult:
        return pickle.load(self._stdout)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def send(jobs: list[ClientJob]) -> list[ClientResult]:
    """Do each job in a process of its own.

    Raises:
        ClientError: a client has ended without a result.
    """
    running: list[_Client] = []
    try:
        running += [_Client(job) for job in jobs]
        for client in running:
            client.await_ready()
        start = time.monotonic() + LEAD_S
        for client in running:
            client.begin(start)
        return [client.result() for client in running]
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise ClientError("a client process ended early; see above") from None
    finally:
        for client in running:
            client.close()
