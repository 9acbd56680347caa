"""EngineCore: the loop that keeps the device one step ahead of the host."""

from collections import deque
from collections.abc import Sequence as Items
from itertools import chain

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import commands, multihost
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.commands import RequestId
from nanovllm_jax.engine.model_runner import ModelRunner, TokenFuture, Undrawn
from nanovllm_jax.engine.owner import Owner
from nanovllm_jax.engine.pace import Pace
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.scheduler import Batch, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.token_scores import StepScores


class EngineCore:
    """Queues, device and the rounds between them; one thread alone may call it.

    That thread is an `EngineThread`. Each request has an owner, who is told when it has ended.
    """

    def __init__(self, config: EngineConfig, eos_token_ids: Items[int]):
        self.config = config
        self.runner: ModelRunner | None = ModelRunner(config)
        programs = self.runner.programs
        self.pools = [
            BlockManager(self.runner.num_blocks, config.kvcache_block_size)
            for _ in range(programs.batch_shards)
        ]
        largest, size = programs.prefill_buckets[-1], config.chunked_prefill_size
        self.scheduler = Scheduler(
            self.pools,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=largest.num_tokens,
            max_prefill_seqs=largest.num_rows,
            chunk=programs.chunk(size) if size else None,
            mixed=programs.mixed_rooms(size),
            eos_token_ids=eos_token_ids,
        )
        self.processes = multihost.Processes()  # does nothing if there is only one
        self.requests: dict[int, Request] = {}  # of each sequence under way, by the sequence's id
        self.owners: dict[int, Owner] = {}  # the same for their owners
        self.pace = Pace(config, programs.platform)
        # Dispatched, not yet read; the last one may not yet be drawn, either.
        self.in_flight: deque[tuple[Batch, TokenFuture | Undrawn]] = deque()
        # Read, with their tokens and scores.
        self.rounds: deque[tuple[Batch, list[int], StepScores | None]] = deque()

    def add(self, requests: Items[Request], owner: Owner) -> None:
        """Queue requests of an owner.

        Raises:
            ValueError: the owner has another one of the same id under way.
        """
        for request in requests:
            if owner.under_way.setdefault(request.request_id, request) is not request:
                raise ValueError(
                    f"request_id {request.request_id!r} is under way already; choose another"
                )
            self.processes.record(request.command)
            for seq in request.seqs:
                self.requests[seq.seq_id], self.owners[seq.seq_id] = request, owner
                self.scheduler.add(seq)

    def abort(self, request_ids: list[RequestId]) -> None:
        """End those of the requests that have not ended, with all of their completions."""
        self.processes.record(commands.AbortRequests(request_ids))
        chosen = set(request_ids)
        requests = [r for r in self.requests.values() if r.request_id in chosen]
        for seq in chain.from_iterable(request.seqs for request in dict.fromkeys(requests)):
            if seq.seq_id in self.requests:
                self.scheduler.finish(seq, "abort")
                self._end(seq)

    def abort_all_of(self, owner: Owner) -> None:
        """End what an owner has under way."""
        if owner.under_way:
            self.abort(list(owner.under_way))

    def run_round(self) -> int:
        """Dispatch the next batch, then take in a step of the one before it.

        Returns:
            The prompt tokens of a prefill round, even if it is mixed, or minus the sequences of a
            decode round.
        """
        if not self.requests:
            return 0
        try:
            most = 0 if self.rounds else 1 + self.config.async_scheduling
            while len(self.in_flight) < most and self._dispatch(self.pace.num_steps):
                pass
            return self._collect()
        except BaseException:
            self.start_over()
            raise

    def start_over(self) -> None:
        """Forget all that the device has computed; every request will be computed again.

        A round that has failed may have left promises behind: blocks in the prefix cache, tokens in
        flight, a state given to a step that did not run. None of them is trusted. Samples depend on
        nothing but the request, so the tokens come out as they would have.
        """
        self.processes.record(commands.StartOver())
        self._forget_calls()
        self.scheduler.recompute_all()
        assert self.runner
        self.runner.renew_state()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.processes.record(commands.ResetPrefixCache())
        self.scheduler.reset_prefix_cache()

    def shut_down(self) -> None:
        """Free all device memory."""
        if self.runner is not None:
            self.processes.exit()
            self._forget_calls()
            self.runner.shut_down()
            self.runner = None

    def apply(self, command: commands.Command) -> None:
        """Carry out a command of the process that leads."""
        match command:
            case commands.AddRequest():
                self.add([Request(command, command.numbers, self.config, tokenizer=None)], Owner())
            case commands.AbortRequests(request_ids):
                self.abort(request_ids)
            case commands.StopSequence(number):
                self._stop(number)
            case commands.ResetPrefixCache():
                self.reset_prefix_cache()
            case commands.StartOver():
                self.start_over()
            case commands.Dispatch(digest, num_steps):
                self._dispatch(num_steps, digest)
            case commands.Collect():
                self._collect()
            case commands.Exit():
                self.shut_down()

    def _dispatch(self, num_steps: int, expected_digest: int | None = None) -> bool:
        """Start the next batch; False if none can run before pending tokens are read."""
        with self.pace.dispatching():
            batch = self.scheduler.schedule(num_steps)
            self.processes.agree(batch, num_steps, expected_digest)
            if batch is None:
                return False
            assert self.runner
            self.in_flight.append((batch, self.runner.dispatch(batch)))
            return True

    def _collect(self) -> int:
        """Take in the oldest step, having read its batch; returns the count of `run_round`."""
        if self.in_flight and not self.rounds:
            batch, tokens = self.in_flight[0]
            assert not isinstance(tokens, Undrawn)
            with self.pace.waiting(batch):
                token_ids, scores = tokens.result(), tokens.scores()
            self.in_flight.popleft()
            self.rounds.extend((*step, scores) for step in batch.rounds(token_ids))
        batch, token_ids, scores = (
            self.rounds.popleft() if self.rounds else (Batch.empty(), [], None)
        )
        self.processes.record(commands.Collect())
        advanced = self.scheduler.postprocess(batch, token_ids, scores)
        if self.in_flight and not self.rounds:
            self._draw_next()
        assert advanced or batch.seqs or not self.requests, "requests are left, but none can run"
        if batch.is_prefill:
            for seq in advanced:
                if seq.seq_id in self.requests:
                    self.requests[seq.seq_id].note_first_token()
        for seq in advanced:
            if seq.finish_reason and seq.seq_id in self.requests:  # else aborted since it failed
                if isinstance(seq.stop_reason, str):  # the other processes have no text
                    self.processes.record(commands.StopSequence(seq.seq_id))
                self._end(seq)
        num_prompt_tokens = batch.num_tokens - batch.num_decodes
        return num_prompt_tokens if batch.is_prefill else -len(batch.seqs)

    def _stop(self, number: int) -> None:
        """End a sequence in whose text another process found a stop string."""
        if request := self.requests.get(number):  # else it has ended with this very token
            seq = next(seq for seq in request.seqs if seq.seq_id == number)
            self.scheduler.finish(seq, "stop")
            self._end(seq)

    def _draw_next(self) -> None:
        """Draw the tokens of a step that has waited for those that were just read."""
        batch, tokens = self.in_flight[0]
        if isinstance(tokens, Undrawn):
            assert self.runner
            self.in_flight[0] = batch, self.runner.draw(tokens)

    def _end(self, seq: Sequence) -> None:
        """Forget a sequence that has ended; with a request's last one, tell its owner."""
        request, owner = self.requests.pop(seq.seq_id), self.owners.pop(seq.seq_id)
        if request.note_end():
            owner.ended.append(request)  # first, so that it is never in neither
            del owner.under_way[request.request_id]
        if not self.requests:
            self._forget_calls()  # only rows of finished sequences are left in them

    def _forget_calls(self) -> None:
        self.in_flight.clear()
        self.rounds.clear()
