"""LLMEngine: requests in, outputs out, with the device kept one step ahead of the host."""

from collections import deque
from pathlib import Path
from typing import Unpack

import jax

from nanovllm_jax.config import EngineConfig, EngineOptions
from nanovllm_jax.engine import commands, multihost
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.commands import RequestId
from nanovllm_jax.engine.model_runner import ModelRunner, TokenFuture
from nanovllm_jax.engine.request import Prompt, Request, checked_request
from nanovllm_jax.engine.runtime import configure_runtime
from nanovllm_jax.engine.scheduler import Batch, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tokenizer import eos_token_ids, load_tokenizer


class LLMEngine:
    """The engine behind `LLM`: queues requests and runs the loop.

    Each request has an owner, who finds it in a list of its own when it has ended. `add_request`
    uses the engine's, which `step` and `step_outputs` report and empty.
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]):
        config = EngineConfig.resolve(model, **options)
        configure_runtime(config)
        self.config = config.on(jax.default_backend())
        self.tokenizer = load_tokenizer(Path(config.model))
        self.vocab_size = config.model_config.vocab_size
        self.runner: ModelRunner | None = ModelRunner(self.config)
        programs = self.runner.programs
        self.pools = [
            BlockManager(self.runner.num_blocks, config.kvcache_block_size)
            for _ in range(programs.batch_shards)
        ]
        largest = programs.prefill_buckets[-1]
        self.scheduler = Scheduler(
            self.pools,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=largest.num_tokens,
            max_prefill_seqs=largest.num_rows,
            eos_token_ids=eos_token_ids(config.model_config, self.tokenizer),
        )
        self.processes = multihost.Processes()  # does nothing if there is only one
        self.next_seq_id = 0
        self.requests: dict[int, Request] = {}  # requests under way, by their sequence's id
        self.ended: list[Request] = []
        self.in_flight: deque[tuple[Batch, TokenFuture]] = deque()  # dispatched, not yet read

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str | None = None
    ) -> RequestId:
        """Queue one request, and return the id under which `step` will report it.

        Args:
            prompt: text, or a list of token ids.
            request_id: the id; default: the next number.

        Raises:
            TypeError, ValueError: the request could never run (the message has the numbers), or
                another one of that id is under way.
        """
        return self._add(self._check(prompt, sampling_params, request_id), self.ended).request_id

    def abort_request(self, request_id: RequestId | list[RequestId]) -> None:
        """End a request, or several, if they have not ended; `step` reports what they have got."""
        request_ids = request_id if isinstance(request_id, list) else [request_id]
        self.processes.record(commands.AbortRequests(request_ids))
        chosen = set(request_ids)
        for request in [r for r in self.requests.values() if r.request_id in chosen]:
            self.scheduler.finish(request.seq, "abort")
            self._end(request.seq)

    def step(self) -> tuple[list[tuple[RequestId, list[int]]], int]:
        """Run one round of scheduling and inference.

        Returns:
            The (request id, completion token ids) of each request that has ended, and a count: the
            prompt tokens of a prefill round, or minus the sequences of a decode round.
        """
        num_tokens = self._run_round()
        ended = [(r.request_id, r.seq.completion_token_ids) for r in self.ended]
        self.ended.clear()
        return ended, num_tokens

    def step_outputs(self) -> list[RequestOutput]:
        """Run one round; the outputs of the requests that got tokens or ended, as in vLLM."""
        self._run_round()
        own = [r for r in self.requests.values() if r.ended is self.ended and r.has_news]
        outputs = [request.output() for request in [*own, *self.ended]]
        self.ended.clear()
        return outputs

    def is_finished(self) -> bool:
        """Whether every request has ended and been reported."""
        return not (self.requests or self.ended)

    def _run_round(self) -> int:
        """Dispatch the next batch, then read the one before it; returns the count of `step`."""
        self._check_usable()
        if not self.requests:
            return 0
        while len(self.in_flight) < 1 + self.config.async_scheduling and self._dispatch():
            pass
        return self._collect()

    def _dispatch(self, expected_digest: int | None = None) -> bool:
        """Start the next batch; False if none can run before pending tokens are read."""
        batch = self.scheduler.schedule()
        self.processes.agree(batch, expected_digest)
        if batch is None:
            return False
        assert self.runner
        self.in_flight.append((batch, self.runner.dispatch(batch)))
        return True

    def _collect(self) -> int:
        """Read the oldest batch; returns the count of `step`."""
        batch, token_ids = Batch.empty(), []
        if self.in_flight:
            batch, tokens = self.in_flight[0]
            token_ids = tokens.result()  # an interruption of this wait loses nothing
            self.in_flight.popleft()
        self.processes.record(commands.Collect())
        advanced = self.scheduler.postprocess(batch, token_ids)
        assert advanced or batch.seqs or not self.requests, "requests are left, but none can run"
        for seq in advanced:
            if seq.finish_reason:
                self._end(seq)
        return batch.num_tokens if batch.is_prefill else -len(batch.seqs)

    def _end(self, seq: Sequence) -> None:
        """Hand a request whose sequence has ended to its owner."""
        request = self.requests.pop(seq.seq_id)
        request.ended.append(request)
        if not self.requests:
            self.in_flight.clear()  # only rows of finished sequences are left in them

    def apply(self, command: commands.Command) -> None:
        """Carry out a command."""
        match command:
            case commands.AddRequest():
                self._add(command, self.ended)
            case commands.AbortRequests(request_ids):
                self.abort_request(request_ids)
            case commands.ResetPrefixCache():
                self.reset_prefix_cache()
            case commands.Dispatch(digest):
                self._dispatch(digest)
            case commands.Collect():
                self._collect()
            case commands.Exit():
                self.exit()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.processes.record(commands.ResetPrefixCache())
        self.scheduler.reset_prefix_cache()

    def follow(self) -> None:
        """On each process but the first of several: do as process 0's engine does, to its exit().

        Raises:
            RuntimeError: this is process 0, or the only one; or the processes do not agree.
        """
        if not self.processes.follows:
            raise RuntimeError("follow() is for the processes after the first (jax.distributed)")
        try:
            while self.runner is not None:
                for command in self.processes.receive():
                    self.apply(command)
                self.ended.clear()  # process 0 reports them
        finally:
            self.exit()

    def exit(self) -> None:
        """Free all device memory; the engine cannot be used after it. May be called twice."""
        if self.runner is not None:
            self.processes.exit()
            self.in_flight.clear()
            self.runner.shut_down()
            self.runner = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.exit()

    def _add(self, command: commands.AddRequest, ended: list[Request]) -> Request:
        """Queue a request that is put into `ended` when it has ended."""
        self.processes.record(command)
        seq_id, self.next_seq_id = self.next_seq_id, self.next_seq_id + 1
        params, token_ids = command.params, command.token_ids
        seed = params.seed if params.seed is not None else self.config.seed + seq_id
        max_tokens = min(params.max_tokens, self.config.max_model_len - len(token_ids))
        seq = Sequence(seq_id, list(token_ids), params, seed & 0xFFFFFFFF, max_tokens)
        request_id = seq_id if command.request_id is None else command.request_id
        request = Request(request_id, command.prompt, seq, ended, self.tokenizer)
        self.requests[seq_id] = request
        self.scheduler.add(seq)
        return request

    def _check(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> commands.AddRequest:
        """The command that adds a request; TypeError or ValueError if it could never run."""
        self._check_usable()
        if request_id in {r.request_id for r in self.requests.values() if request_id is not None}:
            raise ValueError(f"request_id {request_id!r} is under way already; choose another")
        num_blocks = len(self.pools[0].blocks)
        return checked_request(prompt, params, request_id, self.tokenizer, self.config, num_blocks)

    def _check_usable(self) -> None:
        if self.runner is None:
            raise RuntimeError("the engine has been shut down by exit(); make a new LLM")
        if self.processes.follows:
            raise RuntimeError("requests are entered on process 0; here, call follow()")
