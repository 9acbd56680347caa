"""Requests: from a prompt, checked, to the outputs that its owner is told of."""

from array import array
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

import xxhash
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.commands import AddRequest
from nanovllm_jax.engine.detokenizer import Detokenizer
from nanovllm_jax.engine.edits import edits_of
from nanovllm_jax.engine.grammar import Grammars
from nanovllm_jax.engine.prompts import Prompt, tokenized, tokens_of_bad_words
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.token_scores import TokenScores
from nanovllm_jax.outputs import CompletionOutput, Logprob, PositionScores, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class Request:
    """A request, its sequence, and what has been told of it.

    Args:
        number: tells the engine's requests apart.
        grammars: needed if the output must have a form.
    """

    def __init__(
        self,
        command: AddRequest,
        number: int,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        grammars: Grammars | None = None,
    ):
        self.command = replace(command, number=number)
        self.request_id = number if command.request_id is None else command.request_id
        self.seq = make_sequence(command, number, config)
        if form := command.params.form:
            assert grammars
            self.seq.matcher = grammars.matcher(form)
        self._detokenizer = None
        if tokenizer is not None and command.params.detokenize:
            self._detokenizer = Detokenizer(tokenizer)
        self._tokens = TokenTexts(tokenizer if command.params.detokenize else None)
        self._text, self._num_reported = "", 0
        self._logprobs: list[PositionScores] = []
        self._cumulative_logprob = 0.0
        self._prompt_logprobs: list[PositionScores | None] | None = None

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
        cumulative, logprobs = self._scores(len(token_ids))
        completion = CompletionOutput(
            0, self._text, token_ids, reason, seq.stop_reason, cumulative, logprobs
        )
        return RequestOutput(
            self.request_id, self.command.prompt, seq.token_ids[: seq.num_prompt_tokens],
            [completion], is_finished, seq.error, self._prompt_scores(),
        )  # fmt: skip

    def _scores(self, num_tokens: int) -> tuple[float | None, list[PositionScores] | None]:
        """The sum of the completion's scores, and the scores; None if they are not wanted."""
        if self.seq.params.logprobs is None:
            return None, None
        for scores in self.seq.scores[len(self._logprobs) : num_tokens]:
            self._cumulative_logprob += scores.logprobs[0]
            self._logprobs.append(self._tokens.with_texts(scores))
        return self._cumulative_logprob, list(self._logprobs)

    def _prompt_scores(self) -> list[PositionScores | None] | None:
        seq = self.seq
        if seq.params.prompt_logprobs is None or seq.wants_prompt_scores:
            return None
        if self._prompt_logprobs is None:
            scores = [seq.prompt_scores[i] for i in range(1, seq.num_prompt_tokens)]
            self._prompt_logprobs = [None, *map(self._tokens.with_texts, scores)]
        return self._prompt_logprobs


class TokenTexts:
    """Gives scored tokens their texts, each decoded once and by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def with_texts(self, scores: TokenScores) -> PositionScores:
        """The scores by token, as a request's output has them.

        Where a token is the one drawn and among the likeliest too, its rank among these counts.
        """
        return {
            token: Logprob(logprob, rank, self._text(token))
            for token, logprob, rank in zip(*scores, strict=True)
        }

    def _text(self, token: int) -> str | None:
        if self._tokenizer is not None and token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts.get(token)


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
    text, token_ids = tokenized(prompt, tokenizer)
    _check_length(len(token_ids), config, num_blocks)
    _check_vocabulary("token id", token_ids, config)
    _check_vocabulary("stop_token_ids: token id", params.stop_token_ids, config)
    _check_vocabulary("logit_bias: token id", params.logit_bias, config)
    _check_vocabulary("allowed_token_ids: token id", params.allowed_token_ids, config)
    params = params.frozen()
    bad_words = tokens_of_bad_words(params.bad_words, tokenizer)
    edits = edits_of(params, bad_words, eos_token_ids)
    return AddRequest(token_ids, params, text, request_id, edits=edits)


def make_sequence(command: AddRequest, number: int, config: EngineConfig) -> Sequence:
    """The sequence of the engine's request of this number."""
    params, room = command.params, config.max_model_len - len(command.token_ids)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    seed = stream_seed(params.seed, command.token_ids, config.seed, number)
    return Sequence(number, list(command.token_ids), params, seed, max_tokens, command.edits)


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
