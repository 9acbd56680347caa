"""LLMEngine: requests in, tokens out; the loop that keeps the device one step ahead of the host."""

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import multihost
from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.model_runner import ModelRunner, TokenFuture
from nanovllm_jax.engine.scheduler import Batch, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams

Prompt = str | Items[int]


class LLMEngine:
    """See `LLM`, which this is under the name that users know."""

    def __init__(self, model: str, **kwargs: Any):
        self.config = EngineConfig.from_kwargs(model, **kwargs)
        self.tokenizer = _load_tokenizer(Path(self.config.model))
        self.vocab_size = self.config.model_config.vocab_size
        self.runner: ModelRunner | None = ModelRunner(self.config)
        self.pools = [
            BlockManager(self.runner.num_blocks, self.config.kvcache_block_size)
            for _ in range(self.runner.batch_shards)
        ]
        largest = self.runner.prefill_buckets[-1]
        self.scheduler = Scheduler(
            self.pools,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=largest.num_tokens,
            max_prefill_seqs=largest.num_rows,
            eos_token_ids=self._eos_token_ids(),
        )
        self.processes = multihost.Processes()  # does nothing where there is only one
        self.next_seq_id = 0
        self.in_flight: deque[tuple[Batch, TokenFuture]] = deque()  # dispatched, not yet read
        self.unclaimed: list[Sequence] = []  # finished during somebody else's generate()

    # --- the loop ---

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams) -> int:
        """Queue one request; returns its seq_id, under which `step` will report it.

        Raises:
            TypeError, ValueError: the request could never run; the message has the numbers.
        """
        return self._add(self._check_request(prompt, sampling_params), sampling_params).seq_id

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Run one round of scheduling and inference.

        Returns:
            The (seq_id, completion token ids) of each request that finished in this round, and a
            count: the prompt tokens of a prefill round, or minus the sequences of a decode round.
        """
        finished, num_tokens = self._step()
        finished, self.unclaimed = self.unclaimed + finished, []
        return [(seq.seq_id, seq.completion_token_ids) for seq in finished], num_tokens

    def is_finished(self) -> bool:
        """Whether every request has been reported."""
        return self.scheduler.is_finished and not self.unclaimed

    def _step(self) -> tuple[list[Sequence], int]:
        """Dispatch the next batch, then read the one before it."""
        self._check_usable()
        while len(self.in_flight) < (2 if self.config.async_scheduling else 1):
            if self.scheduler.is_finished or not self._dispatch():
                break
        if not self.in_flight:
            failed = self.scheduler.take_failed()
            assert failed or self.scheduler.is_finished, "requests are left, but none can run"
            return failed, 0
        return self._collect()

    def _dispatch(self, digest: int | None = None) -> bool:
        """Start the next batch; False if none can run before pending tokens are read.

        `digest` is that of process 0's batch, where this process follows it.
        """
        batch = self.scheduler.schedule()
        self.processes.agree(batch, digest)
        if batch is None:
            return False
        assert self.runner
        self.in_flight.append((batch, self.runner.dispatch(batch)))
        return True

    def _collect(self) -> tuple[list[Sequence], int]:
        """Read the oldest batch; returns what `_step` does."""
        batch, tokens = self.in_flight[0]
        token_ids = tokens.result()  # the wait of each round: an interruption here loses nothing
        self.processes.repeat("_collect")
        self.in_flight.popleft()
        finished = self.scheduler.take_failed() + self.scheduler.postprocess(batch, token_ids)
        if self.scheduler.is_finished:
            self.in_flight.clear()  # only rows of finished sequences are left in it
        return finished, batch.num_tokens if batch.is_prefill else -len(batch.seqs)

    # --- whole requests ---

    def generate(
        self,
        prompts: Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams],
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Complete all prompts.

        Args:
            prompts: texts or lists of token ids, also mixed.
            sampling_params: one for all prompts, or exactly one for each.
            use_tqdm: show completed requests and live prefill and decode tokens/s.

        Returns:
            In the order of the prompts: {"text": str, "token_ids": list[int]}. `token_ids` holds
            the completion, with the token that ended it; `text` leaves out special tokens. A
            request that outgrew the KV cache also has "error": str and what it got so far.

        Raises:
            TypeError, ValueError: a request could never run; nothing has been started then.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string")
        params = self._params_for(prompts, sampling_params)
        token_ids = [self._check_request(p, s) for p, s in zip(prompts, params, strict=True)]
        seqs = [self._add(ids, s) for ids, s in zip(token_ids, params, strict=True)]
        mine, texts = set(seqs), {}
        try:
            with _Progress(len(seqs), disable=not use_tqdm) as progress:
                while len(texts) < len(seqs):
                    finished, num_tokens = self._step()
                    for seq in finished:
                        if seq in mine:
                            texts[seq] = self._text(seq)
                        else:
                            self.unclaimed.append(seq)
                    progress.update(num_tokens, len(texts))
        except BaseException:
            self._finish([seq.seq_id for seq in seqs])
            raise
        return [_output(seq, texts[seq]) for seq in seqs]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Iterator[list[int]]:
        """Complete one prompt, yielding new token ids as they come; closing it ends the request.

        Raises:
            TypeError, ValueError: as `add_request`, at the first token.
            RuntimeError: the request outgrew the KV cache.
        """
        seq = self._add(self._check_request(prompt, sampling_params), sampling_params)
        seen = seq.num_prompt_tokens
        try:
            while not seq.is_finished:
                finished, _ = self._step()
                self.unclaimed += [other for other in finished if other is not seq]
                while seen < seq.num_tokens:  # it may also advance while this waits in the yield
                    new, seen = seq.token_ids[seen:], seq.num_tokens
                    yield new
        finally:
            self._finish([seq.seq_id])
            if seq in self.unclaimed:
                self.unclaimed.remove(seq)
        if seq.error:
            raise RuntimeError(seq.error)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.processes.repeat("reset_prefix_cache")
        self.scheduler.reset_prefix_cache()

    def follow(self) -> None:
        """On each process but the first of several: do what process 0's engine does, to its exit().

        Raises:
            RuntimeError: this is process 0, or the only one; or the processes do not agree.
        """
        if not self.processes.follows:
            raise RuntimeError("follow() is for the processes after the first (jax.distributed)")
        try:
            while self.runner is not None:
                for method, *args in self.processes.receive():
                    getattr(self, method)(*args)
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

    # --- requests ---

    def _add(self, token_ids: list[int], params: SamplingParams) -> Sequence:
        self.processes.repeat("_add", token_ids.copy(), params)
        seq_id, self.next_seq_id = self.next_seq_id, self.next_seq_id + 1
        seed = params.seed if params.seed is not None else self.config.seed + seq_id
        room = self.config.max_model_len - len(token_ids)
        seq = Sequence(seq_id, token_ids, params, seed & 0xFFFFFFFF, min(params.max_tokens, room))
        self.scheduler.add(seq)
        return seq

    def _finish(self, seq_ids: list[int]) -> None:
        """End those of the requests that have not ended."""
        self.processes.repeat("_finish", seq_ids)
        ending = set(seq_ids)
        for seq in [*self.scheduler.waiting, *self.scheduler.running]:
            if seq.seq_id in ending:
                self.scheduler.finish(seq)

    def _check_request(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids, if the request can run."""
        self._check_usable()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{self.config.model} has no tokenizer; pass the prompt as token ids"
                )
            prompt = self.tokenizer.encode(prompt)
        token_ids = _as_token_ids(prompt)
        n, longest = len(token_ids), self.config.max_model_len
        if n == 0:
            raise ValueError("the prompt is empty; at least one token is needed")
        if n >= longest:
            raise ValueError(
                f"the prompt has {n} tokens, which leaves no room for an output within "
                f"max_model_len={longest}"
            )
        needed, pool = self.pools[0].blocks_for(n), len(self.pools[0].blocks)
        if needed > pool:
            raise ValueError(
                f"the prompt has {n} tokens and needs {needed} blocks of "
                f"{self.config.kvcache_block_size}, the KV cache has {pool}"
            )
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"token id {bad} is not in the vocabulary of {self.vocab_size}")
        return token_ids

    @staticmethod
    def _params_for(
        prompts: Items[Prompt], sampling_params: SamplingParams | Items[SamplingParams]
    ) -> list[SamplingParams]:
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * len(prompts)
        params = list(sampling_params)
        if len(params) != len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(params)} sampling_params; pass one for all "
                f"prompts or one for each"
            )
        return params

    def _text(self, seq: Sequence) -> str:
        if self.tokenizer is None or not seq.params.detokenize:
            return ""
        return str(self.tokenizer.decode(seq.completion_token_ids, skip_special_tokens=True))

    def _eos_token_ids(self) -> tuple[int, ...]:
        """What the model's files name; the tokenizer's own where they name none."""
        named = self.config.model_config.eos_token_ids
        if not named and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            return (int(self.tokenizer.eos_token_id),)  # pyright: ignore[reportArgumentType]
        return named

    def _check_usable(self) -> None:
        if self.runner is None:
            raise RuntimeError("the engine has been shut down by exit(); make a new LLM")
        if self.processes.follows:
            raise RuntimeError("requests are entered on process 0; here, call follow()")


class _Progress:
    """A bar of completed requests with the current prefill and decode rates."""

    def __init__(self, total: int, disable: bool):
        self.bar = tqdm(total=total, desc="Generating", dynamic_ncols=True, disable=disable)
        self.rates = {"Prefill": "0tok/s", "Decode": "0tok/s"}
        self.last = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.bar.close()

    def update(self, num_tokens: int, completed: int) -> None:
        now = time.perf_counter()
        kind = "Prefill" if num_tokens > 0 else "Decode"
        self.rates[kind] = f"{int(abs(num_tokens) / (now - self.last))}tok/s"
        self.last = now
        self.bar.set_postfix(self.rates, refresh=False)
        self.bar.update(completed - self.bar.n)


def _as_token_ids(prompt: Any) -> list[int]:
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple) or not all(type(t) is int for t in prompt):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {prompt!r:.80}")
    return list(prompt)


def _output(seq: Sequence, text: str) -> dict[str, Any]:
    output: dict[str, Any] = {"text": text, "token_ids": seq.completion_token_ids}
    return output | ({"error": seq.error} if seq.error else {})


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The directory's tokenizer; None if it has no tokenizer files at all."""
    if not any(directory.glob("tokenizer*")) and not (directory / "vocab.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)
