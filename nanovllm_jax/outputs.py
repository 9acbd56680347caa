"""What a request gives back, under the names that vLLM uses."""

from dataclasses import dataclass
from typing import Literal

# Why a completion ended: an end token or a stop string, max_tokens, a call of abort_request, or a
# failure.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """A token's score at a position, before temperature, filters and all other options.

    Attributes:
        logprob: natural logarithm of the token's probability.
        rank: the token's place among all of the vocabulary, 1 for the likeliest; None if unknown.
        decoded_token: the token's text; None without a tokenizer, or with detokenize=False.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """When a request came, got its first token, and ended.

    The times are in seconds since the epoch. Their differences come from a monotonic clock, so
    they are right even if the machine's clock is set meanwhile.

    Attributes:
        arrival_time: when `generate` or `add_request` made the request.
        first_token_time: when the host had its first token, of whichever completion; None before.
        finished_time: when the last of its completions ended; None before.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request, as far as it has come.

    Attributes:
        index: number of the completion among the request's.
        text: the completion decoded, cut at a stop string; empty with detokenize=False. While the
            completion goes on, an end that may become a stop string is held back.
        token_ids: the completion's tokens, with the one that ended it.
        cumulative_logprob: sum of the tokens' log probabilities; None unless `logprobs` is asked.
        logprobs: for each token {token id: Logprob} of the likeliest and of the token itself; None
            unless asked.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens or
            max_model_len), "abort" or "error"; None while it goes on.
        stop_reason: the one of the request's stop strings or stop_token_ids that ended it, if one
            did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its completions, as far as they have come.

    Attributes:
        request_id: the id that `add_request` was given or returned.
        prompt: the prompt's text, or None if it came as token ids.
        prompt_token_ids: the prompt's tokens, after truncate_prompt_tokens.
        outputs: the completions, `n` of them.
        finished: whether this is the request's last output.
        error: what went wrong, if the finish_reason of a completion is "error".
        metrics: the request's times.
        prompt_logprobs: for each of the prompt's tokens {token id: Logprob}, None for the first;
            None unless asked.
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
