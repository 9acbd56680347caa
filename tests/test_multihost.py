"""An engine over two processes: the same tokens as in one, and an end when either ends."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import multihost
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence

PROGRAM = Path(__file__).parent / "multihost_program.py"
SMALL = {"max_num_seqs": 2, "max_model_len": 256, "max_num_batched_tokens": 256}
SMALL |= {"num_kvcache_blocks": 4, "dtype": "float32", "tensor_parallel_size": 8}


def start(devices, *args):
    """The program in a process that sees so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, args)],
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_two(model, options, scenario):
    """Run the program in two processes of four devices: [(exit status, output, end)] of each."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    both = [start(4, model, json.dumps(options), scenario, port, 2, i) for i in range(2)]
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
def test_two_processes_give_the_tokens_of_one(checkpoint, mesh):
    model = checkpoint("eight_heads")
    options = {"mesh_shape": mesh, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 768}
    options |= {"max_num_batched_tokens": 768, "num_kvcache_blocks": 6 // mesh.get("data", 1)}
    one = start(8, model, json.dumps(options), "serve")
    alone = result(one.communicate(timeout=240)[0])
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


class Wire:
    """A channel within a process."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(json.loads(json.dumps(message)))

    def receive(self):
        return self.messages.pop(0) + ([] if self.messages else [["exit"]])


class Runner:
    def __init__(self):
        self.dispatched = []

    def dispatch(self, batch):
        self.dispatched.append(batch)


def scheduler():
    pools = [BlockManager(5, 256) for _ in range(2)]
    return Scheduler(
        pools, max_num_seqs=6, max_num_batched_tokens=600, max_prefill_seqs=4, eos_token_ids=(0,)
    )


def state(scheduler):
    seqs = [*scheduler.waiting, *scheduler.running]
    shown = [(s.seq_id, s.token_ids, s.num_computed, s.slot, s.shard, s.block_table) for s in seqs]
    return shown, scheduler.free_slots, scheduler.decode_next


@pytest.mark.parametrize("seed", range(20))
def test_a_follower_does_what_the_leader_does(seed):
    rng, wire, runner = random.Random(seed), Wire(), Runner()
    leader = multihost.Leader(scheduler(), wire)
    follower = multihost.Follower(scheduler(), runner, wire)
    alive, in_flight, dispatched, checked = [], [], [], 0
    for number in range(300):
        action = rng.random()
        if action < 0.15:
            ids = [rng.randrange(1, 3) for _ in range(rng.choice((1, 40, 256, 513, 900)))]
            max_tokens = rng.choice((1, 30, 400))
            seq = Sequence(number, ids, SamplingParams(temperature=0.5), 7, max_tokens)
            leader.add(seq)
            alive.append(seq)
        elif action < 0.2 and alive:
            leader.finish(rng.choice(alive))  # also one that has finished
        elif action < 0.23:
            leader.reset_prefix_cache()
        elif action < 0.6 and len(in_flight) < 2:
            if batch := leader.schedule():
                in_flight.append(batch)
                dispatched.append(batch)
                follower.follow()
                assert state(follower.scheduler) == state(leader.scheduler)
                checked += 1
            leader.take_failed()
        elif in_flight:
            if leader.is_finished:
                in_flight = in_flight[-1:]  # as the engine, which needs none of these tokens
            batch = in_flight.pop(0)
            leader.postprocess(batch, [rng.randrange(4) for _ in batch.seqs])
    assert checked > 30 and len(runner.dispatched) == len(dispatched)
    unfinished = {s.seq_id for s in [*leader.scheduler.waiting, *leader.scheduler.running]}
    leader.exit()
    follower.follow()
    assert set(follower.seqs) == unfinished


def test_a_follower_that_decides_otherwise_stops(monkeypatch):
    wire = Wire()
    leader = multihost.Leader(scheduler(), wire)
    other = scheduler()
    other.free_slots[0].pop()
    leader.add(Sequence(0, [1], SamplingParams(), 0, 4))
    leader.schedule()
    leader.exit()
    with pytest.raises(RuntimeError, match="another batch than process 0"):
        multihost.Follower(other, Runner(), wire).follow()


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


def test_messages_arrive_in_order_at_any_length_and_are_deleted_later(monkeypatch):
    store = Store()
    monkeypatch.setattr(multihost.Channel, "_store", staticmethod(lambda: store))
    sender, receiver = multihost.Channel(), multihost.Channel()
    assert sender.name != receiver.name
    receiver.name = sender.name
    for n in range(500):
        sender.send(["x" * (n * 10_000), n])
        if n >= 3:  # as far behind as a follower can be
            assert receiver.receive() == ["x" * ((n - 3) * 10_000), n - 3]
    assert len({key.split("/")[2] for key in store.values}) <= 3 * multihost.GENERATION
