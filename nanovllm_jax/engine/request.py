"""Requests: from a prompt, checked, to the outputs that its owner is told of."""

from collections.abc import Sequence as Items
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import AddRequest, RequestId
from nanovllm_jax.engine.detokenizer import Detokenizer
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

Prompt = str | Items[int]


class Owner:
    """Who made some requests; `ended` has those of them that have ended, in that order."""

    def __init__(self):
        self.ended: list[Request] = []


class Round(NamedTuple):
    """What a round has done.

    `num_tokens` counts the prompt tokens of a prefill round, or minus the sequences of a decode
    round; it is 0 if requests have changed without a round.
    """

    num_tokens: int
    end: float  # time.perf_counter() when it ended, in seconds


class Waiter(Owner):
    """An owner who waits: the engine runs rounds until its requests have ended."""

    def __init__(self):
        super().__init__()
        self.num_requests = 0
        self.rounds: SimpleQueue[Round] = SimpleQueue()
        self.failure: BaseException | None = None  # what ended a round; the requests are aborted

    def wait(self) -> Round:
        """Wait for the next of the rounds since the requests were queued; raises `failure`."""
        new_round = self.rounds.get()
        self.check()
        return new_round

    def check(self) -> None:
        """Raise `failure`, if there is one. Requests that have ended without it have ended well."""
        if self.failure:
            raise self.failure


class Request:
    """A request, its sequence, and what its owner has been told of it."""

    def __init__(
        self,
        request_id: RequestId,
        prompt: str | None,
        seq: Sequence,
        owner: Owner,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.request_id, self.prompt, self.seq, self.owner = request_id, prompt, seq, owner
        self._detokenizer = None
        if tokenizer is not None and seq.params.detokenize:
            self._detokenizer = Detokenizer(tokenizer)
        self._text, self._num_reported = "", 0

    @property
    def has_news(self) -> bool:
        """Whether there are tokens that no `output` has had."""
        return self.seq.num_completion_tokens > self._num_reported

    def output(self) -> RequestOutput:
        """The request and its completion, as far as it has come."""
        seq = self.seq
        is_finished = seq.is_finished  # before its tokens: the engine may be adding some
        token_ids = seq.completion_token_ids
        if self._detokenizer:
            self._text += self._detokenizer.push(token_ids[self._num_reported :])
            if is_finished:
                self._text += self._detokenizer.flush()
                self._detokenizer = None
        self._num_reported = len(token_ids)
        reason = seq.finish_reason if is_finished else None
        completion = CompletionOutput(0, self._text, token_ids, reason, seq.stop_reason)
        prompt_token_ids = seq.token_ids[: seq.num_prompt_tokens]
        return RequestOutput(
            self.request_id, self.prompt, prompt_token_ids, [completion], is_finished, seq.error
        )


def checked_request(
    prompt: Prompt,
    params: SamplingParams,
    request_id: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    num_blocks: int,
) -> AddRequest:
    """The command that adds a request, if the request can run.

    Args:
        num_blocks: blocks of the KV cache that one sequence can have.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the prompt could never run; the message has the numbers.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
    if not isinstance(request_id, str | None):
        raise TypeError(f"request_id must be a string, got {request_id!r}")
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{config.model} has no tokenizer; pass the prompt as token ids")
        prompt = tokenizer.encode(prompt)
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple) or not all(type(t) is int for t in prompt):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {prompt!r:.80}")
    token_ids = list(prompt)
    _check_length(len(token_ids), config, num_blocks)
    lowest, highest = min(token_ids), max(token_ids)
    vocab_size = config.model_config.vocab_size
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"token id {bad} is not in the vocabulary of {vocab_size}")
    return AddRequest(token_ids, params, text, request_id)


def _check_length(n: int, config: EngineConfig, num_blocks: int) -> None:
    block_size = config.kvcache_block_size
    if n == 0:
        raise ValueError("the prompt is empty; at least one token is needed")
    if n >= config.max_model_len:
        raise ValueError(
            f"the prompt has {n} tokens, which leaves no room for an output within "
            f"max_model_len={config.max_model_len}"
        )
    if (needed := -(-n // block_size)) > num_blocks:
        raise ValueError(
            f"the prompt has {n} tokens and needs {needed} blocks of {block_size}, "
            f"the KV cache has {num_blocks}"
        )
