"""SamplingParams: how one request's tokens are drawn and when it ends."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from nanovllm_jax.checks import check_types, check_values


@dataclass(frozen=True)
class SamplingParams:
    """Per-request sampling options, named as in vLLM; immutable and checked on construction.

    Attributes:
        temperature: softmax temperature; 0 is greedy decoding.
        max_tokens: upper bound on generated tokens (the engine caps it at max_model_len).
        ignore_eos: go on past the model's end-of-sequence tokens.
        top_k: sample among the k most likely tokens; 0 or -1 keeps all.
        top_p: sample among the fewest tokens whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        seed: the request's random stream; the same seed gives the same tokens in any batch.
            None takes one from the engine's seed and the request's number.
        stop_token_ids: further tokens that end the request. They stay in the output, like EOS, and
            end it under ignore_eos as well.
        detokenize: decode the output into text; False leaves the text empty.

    Raises:
        TypeError, ValueError: an option has the wrong type or lies out of range.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: Collection[int] | None = None
    detokenize: bool = True

    def __post_init__(self):
        check_types(self, vars(self))
        requirements = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "top_k": (self.top_k >= -1, "positive, or 0 or -1 to keep all"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
        }
        check_values(self, requirements)
        stop = self.stop_token_ids
        if isinstance(stop, str) or not isinstance(stop, Collection | None):
            raise TypeError(f"stop_token_ids must be a list of token ids, got {stop!r}")
        for token in stop or ():
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"each of stop_token_ids must be an integer, got {token!r}")

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p can drop a token (never under greedy decoding)."""
        narrowed = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return narrowed and self.temperature > 0
