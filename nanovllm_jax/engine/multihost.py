"""One engine over the devices of several processes: the first decides, the others repeat it.

Every process runs the same programs over its own part of one mesh (`jax.distributed`). Requests
are entered on process 0. What its scheduler is told (requests, their ends, sampled tokens) is sent
ahead of each step; the other processes' schedulers, told the same in the same order, choose the
same batches. Messages go through the key-value store of jax.distributed: from host to host, beside
the devices' work, and a process that dies ends the others (see docs/multihost.md).
"""

import atexit
import json
import secrets
import zlib
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public way to its key-value store
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from nanovllm_jax.engine.scheduler import Batch, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm_jax.config import EngineConfig
    from nanovllm_jax.engine.model_runner import ModelRunner

PIECE = 1 << 20  # characters of a message that are sent at once: gRPC takes 4 MiB
GENERATION = 64  # pieces that are deleted together
POLL_MS = 1000  # so often a waiting follower looks for an interrupt


def check_same_options(config: "EngineConfig") -> None:
    """Raise ValueError, on every process, if the processes' engine options differ."""
    if jax.process_count() > 1:
        options = {name: value for name, value in vars(config).items() if name != "model"}
        digest = np.uint32(zlib.crc32(repr(sorted(options.items())).encode()))
        if len(set(multihost_utils.process_allgather(digest).tolist())) > 1:
            raise ValueError(
                "the engine options differ between processes; give every process the same"
            )


def smallest(number: int) -> int:
    """The smallest of the processes' numbers (below 2^31)."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).min())


def join(scheduler: Scheduler, runner: "ModelRunner") -> "Leader | Follower | None":
    """This process's part in an engine of several; None where there is only one process."""
    if jax.process_count() == 1:
        return None
    channel = Channel()
    if jax.process_index() == 0:
        return Leader(scheduler, channel)
    return Follower(scheduler, runner, channel)


class Channel:
    """Messages from process 0 to all others, in order."""

    def __init__(self):
        # The processes make their engines in the same order, so they agree on a name for each.
        name = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
        self.name, self.count = f"nanovllm_jax/{name}", 0

    def send(self, message: Any) -> None:
        """Send; the followers must have received what was sent GENERATION messages ago."""
        key, generation = self._next_key()
        text = json.dumps(message)
        for start in range(0, len(text), PIECE):
            is_last = start + PIECE >= len(text)
            value = f"{is_last:d}{text[start : start + PIECE]}"
            self._store().key_value_set(f"{key}/{start // PIECE}", value)
        if self.count % GENERATION == 0 and generation >= 2:
            self._store().key_value_delete(f"{self.name}/{generation - 2}")

    def receive(self) -> Any:
        """Wait for the next message."""
        key, _ = self._next_key()
        pieces: list[str] = []
        while not pieces or pieces[-1][0] != "1":
            try:
                pieces.append(self._store().blocking_key_value_get(f"{key}/{len(pieces)}", POLL_MS))
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return json.loads("".join(piece[1:] for piece in pieces))

    def _next_key(self) -> tuple[str, int]:
        self.count += 1
        generation = self.count // GENERATION
        return f"{self.name}/{generation}/{self.count}", generation

    @staticmethod
    def _store() -> Any:
        client = distributed.global_state.client
        if client is None:
            raise RuntimeError("jax.distributed has been shut down; call the engine's exit() first")
        return client


class Leader:
    """Process 0's scheduler: what it is told, it tells the followers, ahead of each step."""

    def __init__(self, scheduler: Scheduler, channel: Channel):
        self.scheduler, self.channel = scheduler, channel
        self.calls: list[tuple] = []  # since the last step
        self.batches: deque[Batch] = deque()  # scheduled, their tokens not yet taken in
        atexit.register(self.exit)  # runs before jax.distributed's own, which waits for everyone

    @property
    def is_finished(self) -> bool:
        return self.scheduler.is_finished

    @property
    def waiting(self) -> deque[Sequence]:
        return self.scheduler.waiting

    @property
    def running(self) -> list[Sequence]:
        return self.scheduler.running

    def add(self, seq: Sequence) -> None:
        fields = (seq.seq_id, seq.token_ids.copy(), asdict(seq.params), seq.seed, seq.max_tokens)
        self.calls.append(("add", *fields))
        self.scheduler.add(seq)

    def finish(self, seq: Sequence) -> None:
        if not seq.is_finished:
            self.calls.append(("finish", seq.seq_id))
            self.scheduler.finish(seq)

    def schedule(self) -> Batch | None:
        """As `Scheduler.schedule`; a batch must be dispatched then, as the followers do."""
        batch = self.scheduler.schedule()
        self.calls.append(("schedule", _digest(batch)))
        if batch is not None:
            self.batches.append(batch)
            self._send()
        return batch

    def postprocess(self, batch: Batch, token_ids: list[int]) -> list[Sequence]:
        skipped = 0  # whose tokens nobody needed
        while self.batches.popleft() is not batch:
            skipped += 1
        self.calls.append(("postprocess", skipped, token_ids))
        return self.scheduler.postprocess(batch, token_ids)

    def take_failed(self) -> list[Sequence]:
        return self.scheduler.take_failed()

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache",))
        self.scheduler.reset_prefix_cache()

    def exit(self) -> None:
        """Let the followers go."""
        atexit.unregister(self.exit)
        self.calls.append(("exit",))
        self._send()

    def _send(self) -> None:
        calls, self.calls = self.calls, []
        self.channel.send(calls)


class Follower:
    """Another process's part: does what process 0 does."""

    def __init__(self, scheduler: Scheduler, runner: "ModelRunner", channel: Channel):
        self.scheduler, self.runner, self.channel = scheduler, runner, channel
        self.seqs: dict[int, Sequence] = {}  # not yet finished
        self.batches: deque[Batch] = deque()

    def follow(self) -> None:
        """Repeat process 0's calls until its engine exits.

        Raises:
            RuntimeError: this process has scheduled another batch than process 0.
        """
        while True:
            for name, *args in self.channel.receive():
                if name == "exit":
                    return
                getattr(self, f"_{name}")(*args)

    def _add(self, seq_id: int, token_ids: list[int], params: dict, seed: int, max_tokens: int):
        seq = Sequence(seq_id, token_ids, SamplingParams(**params), seed, max_tokens)
        self.seqs[seq_id] = seq
        self.scheduler.add(seq)

    def _finish(self, seq_id: int) -> None:
        self.scheduler.finish(self.seqs.pop(seq_id))

    def _schedule(self, digest: int) -> None:
        batch = self.scheduler.schedule()
        if _digest(batch) != digest:
            raise RuntimeError(
                f"process {jax.process_index()} has scheduled another batch than process 0: "
                "do all processes run the same version?"
            )
        for seq in self.scheduler.take_failed():
            del self.seqs[seq.seq_id]
        if batch is not None:
            self.batches.append(batch)
            self.runner.dispatch(batch)

    def _postprocess(self, skipped: int, token_ids: list[int]) -> None:
        for _ in range(skipped):
            self.batches.popleft()
        for seq in self.scheduler.postprocess(self.batches.popleft(), token_ids):
            del self.seqs[seq.seq_id]

    def _reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()


def _digest(batch: Batch | None) -> int:
    """What two processes' batches are compared by."""
    if batch is None:
        return 0
    rows = [(s.seq_id, s.slot, s.shard, *s.block_table[-1:]) for s in batch.seqs]
    return zlib.crc32(repr((batch.is_prefill, rows, batch.starts, batch.lengths)).encode())
