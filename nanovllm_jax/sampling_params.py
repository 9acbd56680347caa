"""SamplingParams: how one request's tokens are drawn and when it ends."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from nanovllm_jax.checks import (
    check_types,
    check_values,
    explain_unknown_names,
    is_integer,
    seed_rule,
)

# Options of vLLM that this engine lacks, by the reason.
OF_VLLM = {
    "n completions are drawn, and all of them returned": "best_of",
    "completions are drawn one by one, no beam is searched": "use_beam_search beam_width",
    "tokens are never penalized": "presence_penalty frequency_penalty repetition_penalty "
    "length_penalty",
    "log probabilities are not returned": "logprobs prompt_logprobs flat_logprobs "
    "logprob_token_ids",
    "no token is forced or forbidden": "min_tokens logit_bias allowed_token_ids bad_words",
    "outputs follow no grammar": "guided_decoding structured_outputs",
    "the tokenizer alone puts spaces between tokens": "spaces_between_special_tokens",
    "users cannot add sampling steps": "logits_processors extra_args",
    "use step_outputs for each token, generate for the end": "output_kind",
}

MOST_COMPLETIONS = 16384  # Completions of one request at most, as in vLLM.


@explain_unknown_names(OF_VLLM)
@dataclass(frozen=True)
class SamplingParams:
    """Per-request sampling options, named as in vLLM; immutable and checked on construction.

    Attributes:
        temperature: softmax temperature; 0 is greedy decoding. It is computed in float32: below
            about 1e-6 the likeliest token is all there is to draw, above 1e30 all are equal.
        max_tokens: upper bound on generated tokens; None, or more than fits, goes on to the
            engine's max_model_len.
        ignore_eos: go on past the model's end-of-sequence tokens.
        top_k: sample among the k most likely tokens; 0 or -1 keeps all.
        top_p: sample among the fewest tokens whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        seed: a 64-bit number that, together with the prompt, is the request's random stream: the
            same two give the same tokens in any batch. None (or -1, as in vLLM) takes a stream from
            the engine's seed and the request's number.
        stop_token_ids: further tokens that end the request. They stay in the output's token_ids,
            like EOS, and end it under ignore_eos as well.
        detokenize: decode the output into text; False leaves the text empty.
        n: completions of the prompt. They are drawn from streams derived from the request's; the
            first is the one that n=1 gives.
        stop: a text, or a list of texts, that end a completion when it contains one. The text ends
            before it; token_ids go up to the token that completed it.
        include_stop_str_in_output: let the text end with what ended it, be it a stop string or the
            text of an end token.
        skip_special_tokens: leave special tokens, such as <|im_start|>, out of the text.
        truncate_prompt_tokens: use only the last k tokens of a longer prompt; -1 takes as many as
            leave room for max_tokens within max_model_len, or for one token if max_tokens is None
            or does not fit. None refuses prompts that are too long.

    Raises:
        TypeError, ValueError: an option is unknown, has the wrong type or lies out of range.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: Collection[int] | None = None
    detokenize: bool = True
    n: int = 1
    stop: str | Collection[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self):
        check_types(self, vars(self))
        enough = self.max_tokens is None or self.max_tokens >= 1
        last = self.truncate_prompt_tokens
        requirements = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "max_tokens": (enough, "at least 1, or None for as many as fit"),
            "top_k": (self.top_k >= -1, "positive, or 0 or -1 to keep all"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": seed_rule(0 if self.seed is None else self.seed),
            "n": (1 <= self.n <= MOST_COMPLETIONS, f"in 1 to {MOST_COMPLETIONS}"),
            "truncate_prompt_tokens": (
                last is None or last == -1 or last >= 1,
                "positive, -1 for as many as fit, or None",
            ),
        }
        check_values(self, requirements)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature=0 would give the same greedy completion {self.n} "
                f"times; raise temperature, or leave n at 1"
            )
        _check_stop_token_ids(self.stop_token_ids)
        _check_stop(self.stop)
        if self.stop_strings and not self.detokenize:
            raise ValueError(
                f"stop={self.stop!r} needs text to look into; leave detokenize at True, or use "
                f"stop_token_ids"
            )

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p can drop a token (never under greedy decoding)."""
        narrowed = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return narrowed and self.temperature > 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def frozen(self) -> "SamplingParams":
        """The same options in Python's own numbers, and apart from the user's lists."""
        if {type(value) for value in vars(self).values()} <= {bool, int, float, type(None)}:
            return self  # as most are
        tokens = None if self.stop_token_ids is None else frozenset(map(int, self.stop_token_ids))
        lists = {"stop_token_ids": tokens, "stop": self.stop_strings or None}
        return replace(self, **check_types(self, vars(self)) | lists)


def _check_stop_token_ids(stop: Collection[int] | None) -> None:
    if isinstance(stop, str | bytes) or not isinstance(stop, Collection | None):
        raise TypeError(f"stop_token_ids must be a list of token ids, got {stop!r}")
    for token in () if stop is None else stop:
        if not is_integer(token):
            raise TypeError(f"each of stop_token_ids must be an integer, got {token!r}")
        if token < 0:
            raise ValueError(f"each of stop_token_ids must be 0 or more, got {token}")


def _check_stop(stop: str | Collection[str] | None) -> None:
    if isinstance(stop, bytes) or not isinstance(stop, Collection | None):
        raise TypeError(f"stop must be a string or a list of strings, got {stop!r}")
    for text in () if stop is None else [stop] if isinstance(stop, str) else stop:
        if not isinstance(text, str):
            raise TypeError(f"each of stop must be a string, got {text!r}")
        if not text:
            raise ValueError("stop must have no empty string: every text contains it")
