"""Runs one engine over the devices of several processes: the others repeat what the first does.

Every process runs the same programs over its own part of one mesh (`jax.distributed`). Requests
are entered on process 0. It records the commands that decide what its engine runs, and sends them
ahead of each step; the others apply them to theirs. The rest follows: scheduling is
deterministic, and every process reads the sampled tokens from its own devices. Messages go through
the key-value store of jax.distributed: from host to host, beside the devices' work, and a process
that dies ends the others (see docs/multihost.md).
"""

import atexit
import secrets
import zlib
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public way to its key-value store
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import Command, Dispatch, Exit, decode, encode
from nanovllm_jax.engine.scheduler import Batch

PIECE = 1 << 20  # Characters of a message that are sent at once; gRPC takes 4 MiB.
GENERATION = 64  # Messages that are deleted together.
POLL_MS = 1000  # Milliseconds after which a waiting follower looks for an interrupt.


def check_same_options(config: EngineConfig) -> None:
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


class Processes:
    """This process's role among those of one engine: leader, follower or alone."""

    def __init__(self):
        self.leads = jax.process_count() > 1 and jax.process_index() == 0
        self.follows = jax.process_index() > 0
        # The processes make their engines in the same order, so they agree on a name for each.
        name = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
        self.name, self.count = f"nanovllm_jax/{name}", 0  # count: messages so far
        self.commands: list[Command] = []  # not yet sent
        if self.leads:
            atexit.register(self.exit)  # runs before jax.distributed's own, which waits for all

    def record(self, command: Command) -> None:
        """Have the followers' engines apply this command too, ahead of their next step."""
        if self.leads:
            self.commands.append(command)

    def agree(self, batch: Batch | None, num_steps: int, expected_digest: int | None) -> None:
        """Make sure that every process has scheduled the same batch.

        The leader has the followers dispatch what they schedule now. A follower compares its batch
        with `expected_digest`, the leader's.

        Raises:
            RuntimeError: this process has scheduled another batch than process 0.
        """
        if self.leads:
            self.record(Dispatch(_digest(batch), num_steps))
            if batch is not None:
                self.send()
        elif self.follows and _digest(batch) != expected_digest:
            raise RuntimeError(
                f"process {jax.process_index()} has scheduled another batch than process 0: "
                "do all processes run the same version?"
            )

    def exit(self) -> None:
        """Let the followers go."""
        if self.leads:
            atexit.unregister(self.exit)
            self.record(Exit())
            self.send()

    def send(self) -> None:
        """Send the recorded commands.

        Followers must have received what was sent GENERATION messages ago.
        """
        text = encode(self.commands)
        self.commands = []
        key, generation = self._next_key()
        for start in range(0, len(text), PIECE):
            is_last = start + PIECE >= len(text)
            value = f"{is_last:d}{text[start : start + PIECE]}"
            self._store().key_value_set(f"{key}/{start // PIECE}", value)
        if self.count % GENERATION == 0 and generation >= 2:
            self._store().key_value_delete(f"{self.name}/{generation - 2}")

    def receive(self) -> list[Command]:
        """Wait for the leader's next commands."""
        key, _ = self._next_key()
        pieces: list[str] = []
        while not pieces or pieces[-1][0] != "1":
            try:
                pieces.append(self._store().blocking_key_value_get(f"{key}/{len(pieces)}", POLL_MS))
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        text = "".join(piece[1:] for piece in pieces)
        return decode(text)

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


def _digest(batch: Batch | None) -> int:
    """A number that differs if two processes' batches do, or the tokens that they have read."""
    if batch is None:
        return 0
    rows = [(s.seq_id, s.slot, s.shard, *s.block_table[-1:], s.token_ids[-1]) for s in batch.seqs]
    kind = batch.is_prefill, batch.num_decodes
    return zlib.crc32(repr((kind, rows, batch.starts, batch.lengths)).encode())
