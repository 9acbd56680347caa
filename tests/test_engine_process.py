"""An engine in a process of its own: how it starts, fails and ends. (What it says: test_server.)"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue

import pytest

pytest.importorskip("fastapi")

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.owner import Listener
from nanovllm_jax.server.engine_process import EngineProcess
from nanovllm_jax.tools.options import DEMO_MODEL

SMALL = {"max_num_seqs": 2, "max_model_len": 512, "num_kvcache_blocks": 4, "enforce_eager": True}
ROOT = Path(__file__).parents[1]
LONG = SamplingParams(max_tokens=500, ignore_eos=True)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with EngineProcess(DEMO_MODEL, **SMALL) as engine:
        yield engine


def listening():
    """A listener, and the queue of what it hears."""
    heard = SimpleQueue()
    return Listener(lambda: heard.put(None)), heard


def test_what_the_engine_refuses_is_raised_here(tmp_path):
    with pytest.raises(AssertionError, match=r"config\.json"):
        EngineProcess(tmp_path)
    with pytest.raises(ValueError, match="max_num_seqs"):
        EngineProcess(DEMO_MODEL, max_num_seqs=0)
    with pytest.raises(TypeError, match="max_num_seqs"):
        EngineProcess(DEMO_MODEL, max_nums_seqs=1)


def test_a_process_that_ends_is_told_of(engine):
    listener, heard = listening()
    request = engine.start("Once", LONG, listener)
    heard.get(timeout=60)
    assert not engine.has_ended
    os.kill(engine._process.pid, signal.SIGKILL)
    while listener.failure is None:
        heard.get(timeout=60)
    assert "status -9" in str(listener.failure) and engine.has_ended
    with pytest.raises(RuntimeError, match="status -9"):
        engine.start("Once", LONG, listener)
    engine.end([request.request_id])  # which has ended with it


def test_a_request_that_is_ended_leaves_nothing(engine):
    listener, heard = listening()
    requests = [engine.start("Once", LONG, listener) for _ in range(3)]
    heard.get(timeout=60)
    engine.end([request.request_id for request in requests])
    while not all(request.seqs[0].is_finished for request in requests):
        heard.get(timeout=60)
    assert {request.seqs[0].finish_reason for request in requests} == {"abort"}
    for _ in range(1000):
        if engine.stats().cache_usage == 0:
            break
        time.sleep(0.01)
    assert engine.stats()[:3] == (0, 0, 0.0)
    assert not engine._copies


def test_signals_are_for_the_server(engine):
    """Whoever ends a service signals all of its processes; requests under way shall be finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine._process.pid, number)
    listener, heard = listening()
    request = engine.start("Once", SamplingParams(max_tokens=5, ignore_eos=True), listener)
    while not request.seqs[0].is_finished:
        heard.get(timeout=60)
    assert request.seqs[0].num_completion_tokens == 5
    engine.exit()
    assert engine._process.returncode == 0


SERVER_DIES = """
import os, sys
from jax._src import xla_bridge
from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.owner import Listener
from nanovllm_jax.server.engine_process import EngineProcess

small = dict(max_num_seqs=2, max_model_len=512, num_kvcache_blocks=4, enforce_eager=True)
engine = EngineProcess(sys.argv[1], **small)
engine.start("Once", SamplingParams(), Listener(lambda: None))
print(engine._process.pid, xla_bridge.backends_are_initialized(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_it_ends_with_its_server_which_touches_no_device(tmp_path):
    """JAX would take most of a GPU's memory for the server, which needs none."""
    program = tmp_path / "server.py"
    program.write_text(SERVER_DIES, "utf-8")
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), str(DEMO_MODEL)]
    ended = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=300)
    pid, touched = ended.stdout.split()
    assert ended.returncode == -9 and touched == "False", ended
    for _ in range(3000):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("the engine's process goes on")
