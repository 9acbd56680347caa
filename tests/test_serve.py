"""`nanovllm-jax serve` as a process: how it ends, by a signal and by a fault of the engine."""

import asyncio
import os
import re
import signal
import socket

import pytest

pytest.importorskip("fastapi")
aiohttp = pytest.importorskip("aiohttp")

from nanovllm_jax.engine import cuda_driver  # noqa: E402
from nanovllm_jax.server import serve  # noqa: E402
from nanovllm_jax.tools.options import UsageError  # noqa: E402
from scripts.load_server import (  # noqa: E402
    Ask,
    Client,
    Failed,
    children,
    main,
    served,
    stop_under_load,
)

SMALL = ("--max-num-seqs", "2", "--max-model-len", "512", "--num-kvcache-blocks", "4")
SMALL += ("--enforce-eager",)  # starts soon
LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("XLA_FLAGS", "")


def test_sigterm_ends_the_server_with_an_answer_for_everyone():
    """Those that run for longer than --shutdown-timeout get an error, and the status is 0."""
    with served(*SMALL, "--shutdown-timeout", "1") as (process, url):
        outcomes, took = asyncio.run(stop_under_load(process, url, 12, 500))
    assert set(outcomes) <= {"answered", "failed"} and outcomes["failed"]
    assert process.returncode == 0
    assert 1 <= took < 20


def test_a_server_on_a_gpu_computes_prompts_beside_what_decodes(monkeypatch, checkpoint):
    """Unless the user says otherwise; on a CPU it starts soon instead."""
    assert "enable_mixed_chunk" not in serve.completed({}, checkpoint())
    monkeypatch.setattr(cuda_driver, "total_memory", lambda: [80 << 30])
    mixed = {"enable_mixed_chunk": True, "chunked_prefill_size": 2048}
    assert serve.completed({}, checkpoint()) == mixed
    given = {"enable_mixed_chunk": False, "max_num_batched_tokens": 1024}
    assert serve.completed(given, checkpoint()) == given | {"chunked_prefill_size": 1024}
    args = serve.parse(["--no-enable-mixed-chunk", "--port", "0"])
    assert args.enable_mixed_chunk is False


def test_the_key_may_come_from_the_environment(monkeypatch):
    """The command line of a process is there to read for every user of the machine."""
    monkeypatch.delenv(serve.KEY, raising=False)
    assert serve.parse([]).api_key is None
    monkeypatch.setenv(serve.KEY, "secret")
    assert serve.parse([]).api_key == "secret"
    assert serve.parse(["--api-key", "other"]).api_key == "other"


# What Python runs at its start: an engine's thirtieth step fails.
FAULTY = """
from nanovllm_jax.engine.model_runner import ModelRunner

works, left = ModelRunner.dispatch, 30

def dispatch(*args, **options):
    global left
    left -= 1
    if not left:
        raise RuntimeError("no such device")
    return works(*args, **options)

ModelRunner.dispatch = dispatch
"""


def test_a_fault_of_the_engine_ends_the_server(tmp_path, monkeypatch):
    """Each request under way fails with status 500, and so does the process."""
    (tmp_path / "sitecustomize.py").write_text(FAULTY, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def ask(url):
        client = Client(url)
        asked = (
            client.ask(Ask("long", "/v1/completions", LONG, False), stream=i > 0) for i in range(3)
        )
        return await asyncio.gather(*asked, return_exceptions=True)

    with served(*SMALL) as (process, url):
        for error in asyncio.run(ask(url)):
            assert isinstance(error, Failed), error
            assert error.status == 500 and "no such device" in str(error)
        assert process.wait(20) == 1


def test_an_engine_that_dies_while_nothing_runs_ends_the_server():
    with served(*SMALL) as (process, _):
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 1


def test_an_address_that_cannot_be_had_is_told_of_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}: .*in use"):
            serve.main(["--port", port])
    with pytest.raises(UsageError, match="cannot listen"):
        serve.main(["--host", "203.0.113.1", "--port", "0"])


@pytest.mark.slow
def test_a_short_load(capsys):
    """Fails on an answer that is wrong or lost, on leftovers, and on a server that grows."""
    main(["--requests", "600", "--num-each", "3"])
    said = capsys.readouterr().out
    assert re.search(r"tools, stream: [1-9]", said) and "clients that go away" in said
