"""SamplingParams: how one request's tokens are drawn and when it ends."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanovllm_jax.checks import (
    check_text,
    check_types,
    check_values,
    explain_unknown_names,
    is_integer,
    plain,
    seed_rule,
)
from nanovllm_jax.structured_outputs import StructuredOutputsParams

MOST_LOGPROBS = 20  # Likeliest tokens whose scores a request can have at each position.

# Options of vLLM that this engine lacks, by the reason.
OF_VLLM = {
    "n completions are drawn, and all of them returned": "best_of",
    "completions are drawn one by one, no beam is searched": "use_beam_search beam_width "
    "length_penalty",
    "use logprobs, which gives dicts": "flat_logprobs logprob_token_ids",
    "use structured_outputs, which has taken its place": "guided_decoding",
    "the tokenizer alone puts spaces between tokens": "spaces_between_special_tokens",
    "users cannot add sampling steps": "logits_processors extra_args",
    "use step_outputs for each token, generate for the end": "output_kind",
}

MOST_COMPLETIONS = 16384  # Completions of one request at most, as in vLLM.
# Repetition penalty below which, or above its inverse, float32 may overflow.
LEAST_REPETITION = 1e-2
MOST_BIAS = 1e9  # Bias of a logit at most: logits and biases then stay apart from infinity.
_LOGPROBS_RULE = f"from 0 to {MOST_LOGPROBS}, or None for no scores"


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
        min_tokens: tokens before the request may end by an end-of-sequence token or one of
            stop_token_ids.
        presence_penalty: subtracted from the logits of tokens that the output has, in [-2, 2].
        frequency_penalty: the same for each time that the output has them, in [-2, 2].
        repetition_penalty: divides positive logits of tokens that prompt or output have, and
            multiplies negative ones; above 0, and 1 is none.
        logit_bias: token id -> number that its logit gets.
        allowed_token_ids: the only tokens that may be drawn.
        bad_words: texts that may not come; of their tokens, the last is never drawn after the
            others. It takes the model's tokenizer.
        logprobs: return the log probability of each token, and of this many likeliest ones, 0 to
            20. They are those before temperature, filters, and all other options.
        structured_outputs: the form that the output must have: `StructuredOutputsParams`, or a dict
            with its names. It takes the model's tokenizer and the extra [structured].
        prompt_logprobs: the same for the prompt's tokens; such a prompt is computed in whole, also
            where the prefix cache has it.

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
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    bad_words: Collection[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

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
            "min_tokens": (
                0 <= self.min_tokens <= (self.max_tokens or math.inf),
                f"0 or more, and no more than max_tokens={self.max_tokens}",
            ),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "in [-2, 2]; 0 is none"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "in [-2, 2]; 0 is none"),
            "repetition_penalty": (
                LEAST_REPETITION <= self.repetition_penalty <= 1 / LEAST_REPETITION,
                f"from {LEAST_REPETITION} to {1 / LEAST_REPETITION:.0f}; 1 is none",
            ),
            "logprobs": (0 <= (self.logprobs or 0) <= MOST_LOGPROBS, _LOGPROBS_RULE),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MOST_LOGPROBS, _LOGPROBS_RULE),
        }
        check_values(self, requirements)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature=0 would give the same greedy completion {self.n} "
                f"times; raise temperature, or leave n at 1"
            )
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        _check_stop(self.stop)
        if self.stop_strings and not self.detokenize:
            raise ValueError(
                f"stop={self.stop!r} needs text to look into; leave detokenize at True, or use "
                f"stop_token_ids"
            )
        _check_token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise ValueError("allowed_token_ids must name at least one token; None allows all")
        _check_bias(self.logit_bias)
        if self.form and self.min_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} contradicts structured_outputs, whose form decides "
                f"where the output ends; say the length in the form"
            )
        _check_words(self.bad_words)

    @property
    def form(self) -> StructuredOutputsParams | None:
        """What the output must be."""
        form = self.structured_outputs
        return None if form is None else StructuredOutputsParams.of(form)

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

    @property
    def changes_logits(self) -> bool:
        """Whether logits are to be changed before a token is drawn from them."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        has_words = self.bad_words is not None and len(self.bad_words) > 0
        lists = self.logit_bias or self.allowed_token_ids is not None or has_words
        lists = lists or self.structured_outputs is not None
        return bool(lists or self.min_tokens or penalties != (0, 0, 1))

    @property
    def needs_sample_all(self) -> bool:
        """Whether the `sample_all` program has to draw the tokens of a request."""
        return self.logprobs is not None or self.changes_logits

    def frozen(self) -> "SamplingParams":
        """The same options in Python's own numbers, and apart from the user's lists."""
        if {type(value) for value in vars(self).values()} <= {bool, int, float, type(None)}:
            return self  # as most are
        options = check_types(self, vars(self))
        if self.stop_token_ids is not None:
            options["stop_token_ids"] = frozenset(map(int, self.stop_token_ids))
        options["stop"] = self.stop_strings or None
        if self.logit_bias is not None:
            options["logit_bias"] = {int(t): float(bias) for t, bias in self.logit_bias.items()}
        if self.allowed_token_ids is not None:
            options["allowed_token_ids"] = tuple(map(int, self.allowed_token_ids))
        if self.bad_words is not None:
            options["bad_words"] = tuple(map(str, self.bad_words))
        if self.form is not None:
            options["structured_outputs"] = self.form.frozen()
        return replace(self, **options)


def _check_token_ids(name: str, token_ids: Collection[int] | None) -> None:
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Collection | None):
        raise TypeError(f"{name} must be a list of token ids, got {token_ids!r}")
    for token in () if token_ids is None else token_ids:
        if not is_integer(token):
            raise TypeError(f"each of {name} must be an integer, got {token!r}")
        if token < 0:
            raise ValueError(f"each of {name} must be 0 or more, got {token}")


def _check_bias(biases: Mapping[int, float] | None) -> None:
    if not isinstance(biases, Mapping | None):
        raise TypeError(f"logit_bias must be a dict of token id to number, got {biases!r:.80}")
    _check_token_ids("logit_bias", None if biases is None else biases.keys())
    for token, bias in (biases or {}).items():
        if isinstance(plain(bias), bool) or not isinstance(plain(bias), int | float):
            raise TypeError(f"logit_bias of token {token} must be a number, got {bias!r}")
        if not abs(bias) <= MOST_BIAS:
            raise ValueError(
                f"logit_bias of token {token} must be in [{-MOST_BIAS:.0e}, {MOST_BIAS:.0e}], got "
                f"{bias}; to forbid tokens, name the others in allowed_token_ids"
            )


def _check_words(words: Collection[str] | None) -> None:
    if isinstance(words, str | bytes) or not isinstance(words, Collection | None):
        raise TypeError(f"bad_words must be a list of texts, got {words!r:.80}")
    for word in () if words is None else words:
        if not isinstance(word, str):
            raise TypeError(f"each of bad_words must be a text, got {word!r:.80}")
        if not word.strip():
            raise ValueError(f"each of bad_words must have more than spaces, got {word!r:.80}")
        check_text(word)


def _check_stop(stop: str | Collection[str] | None) -> None:
    if isinstance(stop, bytes) or not isinstance(stop, Collection | None):
        raise TypeError(f"stop must be a string or a list of strings, got {stop!r}")
    for text in () if stop is None else [stop] if isinstance(stop, str) else stop:
        if not isinstance(text, str):
            raise TypeError(f"each of stop must be a string, got {text!r}")
        if not text:
            raise ValueError("stop must have no empty string: every text contains it")
