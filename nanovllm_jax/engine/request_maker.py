"""RequestMaker: from what users ask for to requests that can run."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import AddRequest
from nanovllm_jax.engine.grammar import Grammars
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.request import Request, checked_request
from nanovllm_jax.sampling_params import SamplingParams


class Limits(NamedTuple):
    """What an engine's requests have to keep to."""

    config: EngineConfig
    num_blocks: int  # of the KV cache, for one sequence
    eos_token_ids: Sequence[int]
    num_processes: int  # that the engine runs in


class RequestMaker:
    """Checks requests, numbers them, and makes them; it needs no device.

    Args:
        tokenizer: the model's; None if it has none.
    """

    def __init__(self, limits: Limits, tokenizer: PreTrainedTokenizerBase | None):
        self.limits, self._tokenizer = limits, tokenizer
        self._numbers = itertools.count()  # of sequences; a request has its first one's

    def check(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> AddRequest:
        """The command that adds a request; TypeError or ValueError if it could never run."""
        limits = self.limits
        command = checked_request(
            prompt, params, request_id, self._tokenizer, limits.config, limits.num_blocks,
            limits.eos_token_ids,
        )  # fmt: skip
        if form := command.params.form:
            self._grammars.matcher(form)  # compiles it, or says why not
        return command

    def make(self, command: AddRequest) -> Request:
        """The request that a command adds, under the command's numbers if it has some."""
        numbers = command.numbers or [next(self._numbers) for _ in range(command.params.n)]
        grammars = self._grammars if command.params.form else None
        return Request(command, numbers, self.limits.config, self._tokenizer, grammars)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        limits = self.limits
        if self._tokenizer is None:
            raise ValueError("structured_outputs needs the model's tokenizer, which is not there")
        if limits.num_processes > 1:
            raise ValueError("structured_outputs needs an engine of one process; this has several")
        vocab_size = limits.config.model_config.vocab_size
        return Grammars(self._tokenizer, vocab_size, limits.eos_token_ids)
