"""Requests: from a prompt, checked, to the outputs that its owner is told of."""

import time
from array import array
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

import xxhash
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import AddRequest
from nanovllm_jax.engine.completion import Completion
from nanovllm_jax.engine.edits import edits_of
from nanovllm_jax.engine.grammar import Grammars
from nanovllm_jax.engine.prompts import Prompt, tokenized, tokens_of_bad_words
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class Request:
    """A request and its completions.

    Args:
        numbers: tell the engine's sequences apart, one for each completion.
        tokenizer: None leaves the texts empty, and finds no stop strings.
        grammars: needed if the output must have a form.
    """

    def __init__(
        self,
        command: AddRequest,
        numbers: Items[int],
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        grammars: Grammars | None = None,
    ):
        self.command = replace(command, numbers=numbers)
        self.request_id = numbers[0] if command.request_id is None else command.request_id
        self.seqs = make_sequences(self.command, config)
        if form := command.params.form:
            assert grammars
            for seq in self.seqs:
                seq.matcher = grammars.matcher(form)
        self._completions = [Completion(seq, tokenizer) for seq in self.seqs]
        self._arrival_time, self._arrival = time.time(), time.perf_counter()
        self._num_left = len(self.seqs)  # completions that have not ended
        self._first_token_time: float | None = None
        self._finished_time: float | None = None

    @property
    def has_news(self) -> bool:
        """Whether there are tokens that no `output` has had."""
        return any(completion.has_news for completion in self._completions)

    def note_first_token(self) -> None:
        """Note the time, unless there has been a token before."""
        if self._first_token_time is None:
            self._first_token_time = self._now()

    def note_end(self) -> bool:
        """Note that one more completion has ended; returns whether it was the last."""
        self._num_left -= 1
        if not self._num_left:
            self._finished_time = self._now()
        return not self._num_left

    def output(self) -> RequestOutput:
        """The request and its completions, as far as they have come."""
        prompt, seq = self.command.prompt, self.seqs[0]
        finished_time = self._finished_time  # first: the engine may be adding tokens
        completions = [completion.output() for completion in self._completions]
        error = next((seq.error for seq in self.seqs if seq.error), None)
        return RequestOutput(
            self.request_id, prompt, seq.token_ids[: seq.num_prompt_tokens], completions,
            finished=finished_time is not None, error=error,
            metrics=RequestMetrics(self._arrival_time, self._first_token_time, finished_time),
            prompt_logprobs=self.prompt_logprobs(),
        )  # fmt: skip

    def news(self) -> list[CompletionOutput]:
        """What each completion has got since the last call, if anything; see `Completion.news`."""
        found = (completion.news() for completion in self._completions)
        return [completion for completion in found if completion is not None]

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """The scores of the prompt's tokens, as in `RequestOutput`."""
        return self._completions[0].scores.prompt()

    def _now(self) -> float:
        return self._arrival_time + time.perf_counter() - self._arrival


def checked_request(
    prompt: Prompt,
    params: SamplingParams,
    request_id: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    num_blocks: int,
    eos_token_ids: Collection[int] = (),
) -> AddRequest:
    """The command that adds a request, if the request can run.

    Args:
        num_blocks: blocks of the KV cache that one sequence can have.
        eos_token_ids: the model's end-of-sequence tokens.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the request could never run as it is meant; the message has the numbers.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r:.80}")
    if not isinstance(request_id, str | None):
        raise TypeError(f"request_id must be a string, got {request_id!r}")
    if params.stop_strings and tokenizer is None:
        raise ValueError(
            f"stop={params.stop!r} needs a tokenizer, and the model's directory has none; use "
            f"stop_token_ids"
        )
    text, token_ids = tokenized(prompt, tokenizer)
    token_ids = _truncated(token_ids, params, config)
    _check_length(len(token_ids), config, num_blocks)
    _check_vocabulary("token id", token_ids, config)
    _check_vocabulary("stop_token_ids: token id", params.stop_token_ids, config)
    _check_vocabulary("logit_bias: token id", params.logit_bias, config)
    _check_vocabulary("allowed_token_ids: token id", params.allowed_token_ids, config)
    params = params.frozen()
    bad_words = tokens_of_bad_words(params.bad_words, tokenizer)
    edits = edits_of(params, bad_words, eos_token_ids)
    return AddRequest(token_ids, params, text, request_id, edits=edits)


def make_sequences(command: AddRequest, config: EngineConfig) -> list[Sequence]:
    """The sequences of a request's completions."""
    params, room = command.params, config.max_model_len - len(command.token_ids)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    seed = stream_seed(params.seed, command.token_ids, config.seed, command.numbers[0])
    return [
        Sequence(
            number, list(command.token_ids), params, completion_seed(seed, index), max_tokens,
            command.edits, index,
        )
        for index, number in enumerate(command.numbers)
    ]  # fmt: skip


def stream_seed(seed: int | None, token_ids: Items[int], engine_seed: int, number: int) -> int:
    """64 bits that tell a request's random stream from all others.

    They are a hash of what the stream depends on, because sums collide: seed 1 of request 0 and
    seed 0 of request 1, or one seed given to every prompt of a batch.

    Args:
        seed: the user's seed, which with the prompt `token_ids` determines the stream; None or -1:
            the engine's seed and the request's number do.
    """
    if seed is None or seed == -1:
        return xxhash.xxh3_64_intdigest(f"engine {engine_seed} request {number}".encode())
    return xxhash.xxh3_64_intdigest(f"seed {seed} ".encode() + array("q", token_ids).tobytes())


def completion_seed(seed: int, index: int) -> int:
    """64 bits for one of a request's completions; the first has the request's own `stream_seed`."""
    if index == 0:
        return seed
    return xxhash.xxh3_64_intdigest(f"stream {seed} completion {index}".encode())


def _truncated(token_ids: list[int], params: SamplingParams, config: EngineConfig) -> list[int]:
    """The end of a prompt, as `truncate_prompt_tokens` asks."""
    last = params.truncate_prompt_tokens
    if last is None:
        return token_ids
    if last == -1:
        most, wanted = config.max_model_len, params.max_tokens
        last = most - (1 if wanted is None or wanted >= most else wanted)
    return token_ids[-last:]


def _check_length(n: int, config: EngineConfig, num_blocks: int) -> None:
    block_size, longest = config.kvcache_block_size, config.max_model_len
    if n == 0:
        raise ValueError("the prompt is empty; pass at least one token")
    if n >= longest:
        most = config.model_config.longest_context
        remedy = f" or raise it (the model goes to {most})" if longest < most else ""
        raise ValueError(
            f"the prompt has {n} tokens, which leaves no room for an output within "
            f"max_model_len={longest}; shorten the prompt{remedy}"
        )
    if (needed := -(-n // block_size)) > num_blocks:
        raise ValueError(
            f"the prompt has {n} tokens and needs {needed} blocks of {block_size}, the KV cache "
            f"has {num_blocks}; shorten the prompt, or raise num_kvcache_blocks or "
            f"gpu_memory_utilization"
        )


def _check_vocabulary(what: str, token_ids: Iterable[int] | None, config: EngineConfig) -> None:
    vocab_size = config.model_config.vocab_size
    token_ids = [] if token_ids is None else list(token_ids)
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise ValueError(
            f"{what} {bad} is not in the vocabulary of {vocab_size}; is it of another model?"
        )
