"""LLMEngine: requests in, outputs out, from any thread of the process."""

import functools
import logging
import threading
import weakref
from pathlib import Path
from typing import NamedTuple, Unpack

import jax

from nanovllm_jax.config import EngineConfig, EngineOptions
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.commands import AddRequest, RequestId
from nanovllm_jax.engine.core import EngineCore
from nanovllm_jax.engine.engine_thread import EngineThread
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.owner import Listener, Owner
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.request_maker import Limits, RequestMaker
from nanovllm_jax.engine.runtime import check_not_forked, configure_runtime
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tokenizer import eos_token_ids, load_tokenizer

log = logging.getLogger("nanovllm_jax")


class EngineStats(NamedTuple):
    """How much an engine has to do, and has done since its start."""

    running: int  # sequences that decode
    waiting: int  # sequences whose prompts are not, or not wholly, computed
    cache_usage: float  # share of the cache's blocks that sequences hold
    preemptions: int
    prefix_queries: int  # tokens of admitted sequences
    prefix_hits: int  # and those of them that were in the prefix cache


class LLMEngine:
    """The engine behind `LLM`: checks requests, has them run, and reports them.

    An `EngineCore` does the work, in a thread of its own. The requests of `add_request` run while
    somebody calls `step` or `step_outputs`, which report them, or waits for requests of their own.
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]):
        config = EngineConfig.resolve(model, **options)
        check_not_forked()
        configure_runtime(config)
        self.config = config.on(jax.default_backend())
        self.tokenizer = load_tokenizer(Path(config.model))
        self.vocab_size = config.model_config.vocab_size
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            log.warning("jax_disable_jit does not reach the engine: pass enforce_eager=True")
        eos = eos_token_ids(self.config.model_config, self.tokenizer)
        make_core = functools.partial(EngineCore, self.config, eos)
        self._thread = EngineThread(make_core)
        self._core = self._thread.core
        num_blocks = len(self._core.pools[0].blocks)
        limits = Limits(self.config, num_blocks, eos, jax.process_count())
        self._maker = RequestMaker(limits, self.tokenizer)
        self._owner = Owner()  # of what `add_request` makes
        self._reporting = threading.Lock()  # two threads that step report a request once
        weakref.finalize(self, self._thread.close).atexit = False

    # The engine's parts, to look into while no round runs.

    @property
    def runner(self) -> ModelRunner | None:
        """What is on the devices; None after `exit`."""
        return self._core.runner

    @property
    def scheduler(self) -> Scheduler:
        """The queues, with all that has been added so far."""
        self._thread.catch_up()
        return self._core.scheduler

    @property
    def pools(self) -> list[BlockManager]:
        """The KV-cache blocks of each shard of the batch."""
        return self.scheduler.pools

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
        request = self._request(self._check(prompt, sampling_params, request_id))
        if request_id is None:
            self._thread.add([request], self._owner)
        else:  # wait: there may be one of that id
            self._thread.call(self._core.add, [request], self._owner)
        return request.request_id

    def start(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        listener: Listener,
        request_id: str | None = None,
    ) -> Request:
        """Queue one request of a listener, and return it; see `add_request`.

        Its id must not be under way. Checking tokenizes: a server calls this beside its event loop.
        """
        return self.enter(self._check(prompt, sampling_params, request_id), listener)

    def enter(self, command: AddRequest, listener: Listener) -> Request:
        """Queue one request of a listener that has been checked, and return it.

        If the command has numbers, which must tell its sequences from all others, it keeps them.
        """
        request = self._request(command)
        self._thread.add([request], listener)
        return request

    def end(self, request_ids: list[RequestId]) -> None:
        """End those of the requests that have not ended, soon, and return at once."""
        self._thread.send(self._core.abort, request_ids)

    def abort_request(self, request_id: RequestId | list[RequestId]) -> None:
        """End a request, or several, if they have not ended; `step` reports what they have got."""
        request_ids = request_id if isinstance(request_id, list) else [request_id]
        self._thread.call(self._core.abort, request_ids)

    def step(self) -> tuple[list[tuple[RequestId, list[int]]], int]:
        """Run one round of scheduling and inference.

        Returns:
            The (request id, completion token ids) of each request that has ended, and a count: the
            prompt tokens of a prefill round, or minus the sequences of a decode round. Of a
            request with several completions (`n`) it has the first; `step_outputs` has all.
        """
        num_tokens = self._run_round()
        with self._reporting:
            ended = [(r.request_id, r.seqs[0].completion_token_ids) for r in self._owner.ended]
            del self._owner.ended[: len(ended)]
        return ended, num_tokens

    def step_outputs(self) -> list[RequestOutput]:
        """Run one round; the outputs of the requests that got tokens or ended, as in vLLM."""
        self._run_round()
        with self._reporting:
            under_way, ended = list(self._owner.under_way.values()), list(self._owner.ended)
            news = [r for r in under_way if r.has_news and r not in ended]
            outputs = [request.output() for request in [*news, *ended]]
            del self._owner.ended[: len(ended)]
        return outputs

    def is_finished(self) -> bool:
        """Whether every request has ended and been reported."""
        if self._core.requests or self._owner.ended:
            return False
        self._thread.catch_up()
        return not (self._core.requests or self._owner.ended)

    @property
    def limits(self) -> Limits:
        """What requests have to keep to."""
        return self._maker.limits

    @property
    def has_ended(self) -> bool:
        """Whether the engine takes no more requests, after `exit` or a failure of its thread."""
        return self._thread.has_ended

    def stats(self) -> EngineStats:
        """How much the engine has to do, and has done; a glance from any thread."""
        scheduler = self._core.scheduler
        pools = scheduler.pools
        blocks = sum(len(pool.blocks) for pool in pools)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_usage=1 - sum(pool.num_free_blocks for pool in pools) / blocks,
            preemptions=scheduler.num_preemptions,
            prefix_queries=sum(pool.num_queried_tokens for pool in pools),
            prefix_hits=sum(pool.num_hit_tokens for pool in pools),
        )

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._thread.call(self._core.reset_prefix_cache)

    def follow(self) -> None:
        """On each process but the first of several: do as process 0's engine does, to its exit().

        Raises:
            RuntimeError: this is process 0, or the only one; or the processes do not agree.
        """
        processes = self._core.processes
        if not processes.follows:
            raise RuntimeError("follow() is for the processes after the first (jax.distributed)")
        try:
            while self.runner is not None:
                for command in processes.receive():
                    self._thread.call(self._core.apply, command)
        finally:
            self.exit()

    def exit(self) -> None:
        """Free all device memory; the engine cannot be used after it. May be called twice."""
        self._thread.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.exit()

    def _run_round(self) -> int:
        self._check_usable()
        return self._thread.call(self._core.run_round)

    def _check(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> AddRequest:
        """The command that adds a request; TypeError or ValueError if it could never run."""
        self._check_usable()
        return self._maker.check(prompt, params, request_id)

    def _request(self, command: AddRequest) -> Request:
        return self._maker.make(command)

    def _check_usable(self) -> None:
        self._thread.check_usable()
        if self._core.processes.follows:
            raise RuntimeError("requests are entered on process 0; here, call follow()")
