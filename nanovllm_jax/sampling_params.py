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
    "a request has one completion; repeat the prompt": "n best_of use_beam_search beam_width",
    "tokens are never penalized": "presence_penalty frequency_penalty repetition_penalty "
    "length_penalty",
    "only token ids end a request; use stop_token_ids": "stop include_stop_str_in_output",
    "log probabilities are not returned": "logprobs prompt_logprobs flat_logprobs "
    "logprob_token_ids",
    "no token is forced or forbidden": "min_tokens logit_bias allowed_token_ids bad_words",
    "outputs follow no grammar": "guided_decoding structured_outputs",
    "the text always leaves out special tokens": "skip_special_tokens "
    "spaces_between_special_tokens",
    "a prompt is never cut; shorten it": "truncate_prompt_tokens",
    "users cannot add sampling steps": "logits_processors extra_args",
    "use step_outputs for each token, generate for the end": "output_kind",
}


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
        stop_token_ids: further tokens that end the request. They stay in the output, like EOS, and
            end it under ignore_eos as well.
        detokenize: decode the output into text; False leaves the text empty.

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

    def __post_init__(self):
        check_types(self, vars(self))
        enough = self.max_tokens is None or self.max_tokens >= 1
        requirements = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "max_tokens": (enough, "at least 1, or None for as many as fit"),
            "top_k": (self.top_k >= -1, "positive, or 0 or -1 to keep all"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": seed_rule(0 if self.seed is None else self.seed),
        }
        check_values(self, requirements)
        stop = self.stop_token_ids
        if isinstance(stop, str | bytes) or not isinstance(stop, Collection | None):
            raise TypeError(f"stop_token_ids must be a list of token ids, got {stop!r}")
        for token in () if stop is None else stop:
            if not is_integer(token):
                raise TypeError(f"each of stop_token_ids must be an integer, got {token!r}")
            if token < 0:
                raise ValueError(f"each of stop_token_ids must be 0 or more, got {token}")

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p can drop a token (never under greedy decoding)."""
        narrowed = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return narrowed and self.temperature > 0

    def frozen(self) -> "SamplingParams":
        """The same options in Python's own numbers, and apart from the user's list of tokens."""
        stop = None if self.stop_token_ids is None else frozenset(map(int, self.stop_token_ids))
        return replace(self, **check_types(self, vars(self)) | {"stop_token_ids": stop})
