"""Start, await and stop the servers under test, one at a time."""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nanovllm_jax.tools.compare.adapters import ENGINES

POLL_S = 0.2  # seconds between two looks at whether a server answers
URL_S = 5.0  # seconds that a server that should run already has to answer
STOP_S = 30.0  # seconds that a server has to stop by itself before it is killed
TAIL = 15  # lines of a log that are shown after an error


class ServerError(Exception):
    """A server did not start, died, or answers wrongly; the message is one line for the user.

    Args:
        log: what the server has printed; its last line is part of the message.

    Attributes:
        tail: the end of the log.
    """

    def __init__(self, reason: str, log: Path | None = None):
        lines = log.read_text(errors="replace", encoding="utf-8").splitlines() if log else []
        self.tail = [line for line in lines if line.strip()][-TAIL:]
        super().__init__(": ".join([reason, *self.tail[-1:]]))


@dataclass(frozen=True)
class Server:
    """A server under test.

    Attributes:
        name: by which the report calls it.
        command: starts it; `{python}`, `{model}`, `{port}`, `{load_format}`, `{max_model_len}` and
            `{max_num_seqs}` are filled in. None: it runs already, at `url`.
        takes_ids: prompts are token ids, and the end of a sequence can be ignored. If not, prompts
            are texts, and an answer may be shorter than it should be.
    """

    name: str
    command: str | None = None
    url: str | None = None
    takes_ids: bool = True


@dataclass(frozen=True)
class Known:
    """A server whose command is known.

    Attributes:
        needs: modules that must be there.
    """

    server: Server
    needs: tuple[str, ...]
    install: str

    @property
    def makes_weights(self) -> bool:
        """Whether it can make up weights for a config.json."""
        return "{load_format}" in (self.server.command or "")


LIMITS = "--max-model-len {max_model_len} --max-num-seqs {max_num_seqs}"
KNOWN = {
    "nanovllm_jax": Known(
        Server(
            "nanovllm_jax",
            "{python} -m nanovllm_jax serve --model {model} --port {port} {load_format} "
            # The queue of vLLM's server has no limit; neither has this one's.
            f"{LIMITS} --max-waiting 1000000",
        ),
        ("nanovllm_jax", "fastapi", "uvicorn"),
        '"nanovllm-jax[server]"',
    ),
    "vllm": Known(
        Server(
            "vllm",
            # What `vllm serve` runs, without its script on the path.
            "{python} -m vllm.entrypoints.openai.api_server --model {model} --port {port} "
            f"--host 127.0.0.1 {{load_format}} {LIMITS} --disable-uvicorn-access-log",
        ),
        ("vllm", "torch"),
        "vllm",
    ),
    "transformers": Known(
        Server(
            "transformers",
            "{python} -m transformers.cli.transformers serve {model} --port {port} "
            "--host 127.0.0.1 --continuous-batching",
            takes_ids=False,
        ),
        ("transformers", "torch", "fastapi", "uvicorn", "openai"),
        '"transformers[serving]" torch',
    ),
}


def missing_modules(needs: Sequence[str], python_path: str | None) -> list[str]:
    """Those of the modules that are not there, also looked for in a folder of the server's own."""
    own = Path(python_path) if python_path else None

    def is_there(name: str) -> bool:
        return bool(own and (own / name).is_dir()) or importlib.util.find_spec(name) is not None

    return [name for name in needs if not is_there(name)]


def color(name: str, number: int) -> str:
    """The color of a server's plots: its engine's, or the next one."""
    engine = {"transformers": "transformers_eager"}.get(name, name)
    others = ("#d55e00", "#56b4e9", "#009e73", "#7f7f7f", "#cc79a7")
    return ENGINES[engine].color if engine in ENGINES else others[number % len(others)]


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        address: without /v1.
        model: the name that requests give.
        start_s: seconds until it answered; None if it ran already.
        process: its guard; None if it was started by somebody else.
    """

    address: str
    model: str
    start_s: float | None
    version: str | None
    process: subprocess.Popen | None = None
    log: Path | None = None

    def check(self) -> None:
        """Raise ServerError if the server has died."""
        if self.process and (code := self.process.poll()) is not None:
            raise ServerError(f"the server ended with {code}", self.log)


@contextlib.contextmanager
def running(
    server: Server,
    values: Mapping[str, Any],
    log: Path,
    *,
    python_path: str | None = None,
    on_cpu: bool = False,
    start_limit: float = 900.0,
    api_key: str | None = None,
) -> Iterator[Running]:
    """Run a server, or find one that runs; it is stopped at the end.

    Args:
        values: what the command's placeholders stand for, without the port.
        log: file that takes what it prints.
        start_limit: seconds that it may take until it answers.

    Raises:
        ServerError: it does not answer in time, or ends.
    """
    if server.command is None:
        assert server.url
        address = server.url.rstrip("/").removesuffix("/v1")
        yield _await(address, None, None, URL_S, api_key)
        return
    port = _free_port()
    # An installation's own environment comes first; a GPU that is hidden stays hidden.
    env = dict(os.environ)
    if python_path:
        env["PYTHONPATH"] = os.pathsep.join([python_path, *filter(None, [env.get("PYTHONPATH")])])
    if on_cpu:
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = filled(server.command, {**values, "port": port})
    guard = [sys.executable, "-m", f"{__package__}.guard", *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            guard, env=env, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield _await(f"http://127.0.0.1:{port}", process, log, start_limit, api_key)
    finally:
        _stop(process)


def filled(command: str, values: Mapping[str, Any]) -> list[str]:
    """The words of a command, its placeholders filled in; braces of other things stay."""
    for name, value in values.items():
        # {load_format} is two words or none; any other value is one, with whatever it contains.
        text = str(value) if name == "load_format" else shlex.quote(str(value))
        command = command.replace(f"{{{name}}}", text)
    return shlex.split(command)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _await(
    address: str,
    process: subprocess.Popen | None,
    log: Path | None,
    limit: float,
    api_key: str | None,
) -> Running:
    """Wait until the server tells which model it has."""
    start = time.monotonic()
    while True:
        try:
            found = _get(f"{address}/v1/models", api_key)
            break
        except (OSError, ValueError) as error:  # HTTP errors are OSErrors
            Running(address, "", None, None, process, log).check()
            if time.monotonic() - start > limit:
                text = f"no model from {address}/v1/models after {limit:.0f} s ({error})"
                raise ServerError(text, log) from None
        time.sleep(POLL_S)
    try:
        model = str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ServerError(f"{address}/v1/models names no model: {found}") from None
    start_s, version = round(time.monotonic() - start, 1) if process else None, None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        version = _get(f"{address}/version", api_key).get("version")
    return Running(address, model, start_s, version, process, log)


def _get(url: str, api_key: str | None) -> Any:
    """The JSON behind an address; raises OSError or ValueError if there is none."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
        return json.load(reply)


def _stop(process: subprocess.Popen) -> None:
    """Let a server stop by itself, then end what is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stdin: IO[bytes] | None = process.stdin
    if stdin:
        stdin.close()
