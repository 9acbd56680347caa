"""What a request gives back, under the names that vLLM uses."""

from dataclasses import dataclass
from typing import Literal

# Why a completion ended: an end token, max_tokens, a call of abort_request, or a failure.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """The log probability of one token at one position.

    Attributes:
        logprob: natural logarithm of the token's probability.
        rank: the token's place among all of the vocabulary, 1 for the likeliest; None if unknown.
        decoded_token: the token's text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request, as far as it has come.

    Attributes:
        index: number of the completion among the request's.
        text: the completion decoded, without special tokens; empty with detokenize=False.
        token_ids: the completion's tokens, with the one that ended it.
        finish_reason: "stop" (an end token), "length" (max_tokens or max_model_len), "abort" or
            "error"; None while it goes on.
        stop_reason: the one of the request's stop_token_ids that ended it, if one did.
        cumulative_logprob: the sum of the tokens' log probabilities; None unless asked for.
        logprobs: for each token its score and those of the likeliest; None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its completions, as far as they have come.

    Attributes:
        request_id: the id that `add_request` was given or returned.
        prompt: the prompt's text, or None if it came as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: the completions.
        finished: whether this is the request's last output.
        error: what went wrong, if the finish_reason is "error".
        prompt_logprobs: for each token of the prompt its score and those of the likeliest, None
            for the first one; all is None unless asked for, and until the prompt is computed.
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
