"""What a request gives back, under the names that vLLM uses."""

from dataclasses import dataclass
from typing import Literal

# Why a completion ended: an end token, max_tokens, a call of abort_request, or a failure.
FinishReason = Literal["stop", "length", "abort", "error"]


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
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


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
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
