"""An engine over two processes: the same tokens as in one, and an end when either ends."""

import contextlib
import copy
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import FakeFuture, FakeRunner
from multihost_program import serve

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine import core, multihost
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.commands import AbortRequests

PROGRAM = Path(__file__).parent / "multihost_program.py"
SMALL = {"max_num_seqs": 2, "max_model_len": 256, "max_num_batched_tokens": 256}
SMALL |= {"num_kvcache_blocks": 4, "dtype": "float32", "tensor_parallel_size": 8}


def start(*args):
    """The program in a process that sees four devices."""
    flags = "--xla_force_host_platform_device_count=4"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, args)],
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip


def run_two(model, options, scenario):
    """Run the program in two processes of four devices: [(exit status, output, end)] of each."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    both = [start(model, json.dumps(options), scenario, port, 2, i) for i in range(2)]
    ends = {}
    deadline = time.monotonic() + 240
    try:
        while len(ends) < 2 and time.monotonic() < deadline:
            ends |= {
                i: time.monotonic()
                for i, process in enumerate(both)
                if i not in ends and process.poll() is not None
            }
            time.sleep(0.1)
    finally:
        for process in both:
            process.kill()
        texts = [process.communicate()[0] for process in both]
    assert len(ends) == 2, f"still running: {texts}"
    return [(both[i].returncode, texts[i], ends[i]) for i in range(2)]


def result(text):
    (line,) = (line for line in text.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"data": 2, "tensor": 4}])
def test_two_processes_give_the_tokens_of_one(checkpoint, new_engine, mesh):
    model = checkpoint("eight_heads")
    options = {"mesh_shape": mesh, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 768}
    options |= {"max_num_batched_tokens": 768, "num_kvcache_blocks": 6 // mesh.get("data", 1)}
    alone = serve(new_engine(model, **options))
    (status, text, end), (other_status, other, other_end) = run_two(model, options, "serve")
    assert (status, other_status) == (0, 0), text + other
    assert result(text) == alone
    assert alone["preempted"] and alone["errors"][1] is None
    assert "requests are entered on process 0" in other and "followed" in other
    assert abs(end - other_end) < 10


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["leader", "follower"])
def test_when_one_process_dies_the_other_ends_with_an_error(checkpoint, dies):
    ends = run_two(checkpoint("eight_heads"), SMALL, f"{dies} dies")
    victim, survivor = ends if dies == "leader" else ends[::-1]
    assert victim[0] == -9
    assert survivor[0] != 0, survivor[1]
    assert "streamed" not in survivor[1] and "followed" not in survivor[1]
    assert survivor[2] - victim[2] < 30


@pytest.mark.slow
def test_processes_with_different_options_are_told_so(checkpoint):
    for status, text, _ in run_two(checkpoint("eight_heads"), SMALL, "differ"):
        assert status == 1 and "the engine options differ between processes" in text


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_out_is_refused(checkpoint):
    options = SMALL | {"tensor_parallel_size": 4}
    for status, text, _ in run_two(checkpoint("eight_heads"), options, "serve"):
        assert status == 1 and "leaves process 1 without any: ask for all 8" in text


# --- leader and follower in one process ---


class Store:
    """jax.distributed's key-value store."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        assert key not in self.values and len(value) < 4 << 20
        self.values[key] = value

    def key_value_delete(self, key):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(key + "/")}

    def blocking_key_value_get(self, key, timeout_ms):
        return self.values[key]


class Runner(FakeRunner):
    """Devices with little room, which note the engine's state at each step."""

    num_blocks, batch_shards, vocab = 5, 2, 8
    largest_bucket = Bucket(600, 4)

    def __init__(self, config):
        super().__init__(config)
        self.states = []

    def dispatch(self, batch):
        self.states.append(state(self.llm))
        return super().dispatch(batch)


@pytest.fixture
def pair(checkpoint, monkeypatch):
    """The engines of a leader and of a follower, whose messages wait until they are read."""
    store = Store()
    monkeypatch.setattr(core, "ModelRunner", Runner)
    monkeypatch.setattr(multihost, "GENERATION", 1 << 20)
    monkeypatch.setattr(multihost.Processes, "_store", staticmethod(lambda: store))
    options = {"max_num_seqs": 6, "max_model_len": 2048, "max_num_batched_tokens": 2048}
    leader, follower = (LLM(checkpoint(tokenizer=True), **options) for _ in range(2))
    leader._core.processes.leads = follower._core.processes.follows = True
    follower._core.processes.name = leader._core.processes.name
    for llm in (leader, follower):
        llm.runner.llm = llm
        llm.scheduler.eos_token_ids = frozenset({0})
    return leader, follower


def state(llm):
    seqs = [*llm.scheduler.waiting, *llm.scheduler.running]
    shown = [(s.seq_id, s.token_ids, s.num_computed, s.slot, s.shard, s.block_table) for s in seqs]
    rest = llm.scheduler.free_slots, llm.scheduler.decode_next, len(llm._core.in_flight)
    return copy.deepcopy((shown, *rest))


@pytest.mark.parametrize("seed", range(20))
def test_a_follower_does_what_the_leader_does(pair, seed):
    leader, follower = pair
    leads, follows = leader.runner, follower.runner
    rng, interrupts, added = random.Random(seed), [], 0

    def interrupt():
        if rng.random() < 0.1:
            interrupts.append(len(leads.states))
            raise KeyboardInterrupt

    leads.before_read = interrupt
    for _ in range(300):
        action = rng.random()
        if action < 0.15:
            ids = [rng.randrange(1, 3) for _ in range(rng.choice((1, 40, 256, 513, 900)))]
            length, on = rng.choice((1, 30, 600)), rng.random() < 0.3
            params = SamplingParams(
                temperature=0.5, max_tokens=length, ignore_eos=on, n=rng.choice((1, 1, 1, 3)),
                stop=rng.choice((None, None, leader.tokenizer.decode([2, 3]))),
            )  # fmt: skip
            added = leader.add_request(ids, params)
        elif action < 0.2:
            # It may be one that has finished, or that has never been.
            leader.abort_request(rng.randrange(added + 1))
        elif action < 0.23:
            leader.reset_prefix_cache()
        else:
            with contextlib.suppress(KeyboardInterrupt):
                leader.step()
    leader.exit()
    follower.follow()
    assert len(interrupts) > 5 and len(leads.states) > 30
    assert follows.states == leads.states and state(follower) == state(leader)


@pytest.mark.parametrize("drift", ["slots", "tokens"])
def test_a_follower_that_decides_otherwise_stops(pair, drift):
    leader, follower = pair
    if drift == "slots":
        follower.scheduler.free_slots[0].pop()
    else:
        dispatch = follower.runner.dispatch
        follower.runner.dispatch = lambda batch: FakeFuture(
            [[token ^ 2 for token in row] for row in dispatch(batch).tokens], follower.runner
        )
    leader.add_request([1], SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(20):
        leader.step()
    leader.exit()
    with pytest.raises(RuntimeError, match="another batch than process 0"):
        follower.follow()
    assert follower.runner is None


def test_an_idle_leader_has_nothing_to_say(pair):
    leader, _ = pair
    leader.add_request([1], SamplingParams(max_tokens=4))
    while not leader.is_finished():
        leader.step()
    said = len(leader._core.processes.commands)
    for _ in range(5):
        assert leader.step() == ([], 0)
    assert len(leader._core.processes.commands) == said


def test_messages_arrive_in_order_at_any_length_and_are_deleted_later(monkeypatch):
    store = Store()
    monkeypatch.setattr(multihost.Processes, "_store", staticmethod(lambda: store))
    sender, receiver = multihost.Processes(), multihost.Processes()
    assert sender.name != receiver.name
    receiver.name = sender.name
    # Most are short; some take several pieces, and some are just about one piece long.
    lengths = [
        {0: 5 * multihost.PIECE, 50: multihost.PIECE - 11 + n // 100}.get(n % 100, 10 * n)
        for n in range(500)
    ]
    for n, length in enumerate(lengths):
        sender.commands = [AbortRequests(["x" * length, n])]
        sender.send()
        if n >= 3:  # as far behind as a follower can be
            assert receiver.receive() == [AbortRequests(["x" * lengths[n - 3], n - 3])]
    assert len({key.split("/")[2] for key in store.values}) <= 3 * multihost.GENERATION
