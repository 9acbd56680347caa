"""Grammars: which tokens may come next, for requests whose outputs must have a form.

The library llguidance does the work: it parses the bytes that tokens stand for, and knows after
each token which ones can follow. Here are its grammars by the request's own terms, each compiled
once.
"""

import functools
import json
from collections.abc import Collection
from typing import Any

from jaxtyping import Int32
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.structured_outputs import StructuredOutputsParams

MOST_COMPILED = 256  # Grammars that are kept; the least recently used one makes room.


class Grammars:
    """The grammars of requests, for one tokenizer.

    Args:
        tokenizer: must be one of the `tokenizers` library, which tells each token's bytes.
        vocab_size: tokens of the model; those that the tokenizer lacks never come.
        eos_token_ids: the tokens that may come at the end.

    Raises:
        ImportError: llguidance is missing, which the extra [structured] installs.
        ValueError: the tokenizer does not tell its tokens' bytes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Collection[int]
    ):
        try:
            import llguidance.hf
        except ImportError as error:
            raise ImportError(
                'structured_outputs needs llguidance: pip install "nanovllm-jax[structured]"'
            ) from error
        ends = sorted(eos_token_ids)
        if not ends:
            raise ValueError("structured_outputs needs an end token; the model's config names none")
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, vocab_size, ends)  # type: ignore
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"structured_outputs: llguidance cannot read this model's tokenizer: {error}"
            ) from error
        self._compiled = functools.lru_cache(MOST_COMPILED)(self._compile)

    def matcher(self, form: StructuredOutputsParams) -> "Matcher":
        """A matcher of this form, at the beginning of an output.

        Raises:
            ValueError: the form is invalid, or more than llguidance supports, with its reason.
        """
        return Matcher(self._compiled(_source(form)).deep_copy())

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if is_error:
            raise ValueError(f"structured_outputs cannot be followed: {'; '.join(messages)}")
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"structured_outputs cannot be followed: {matcher.get_error()}")
        return matcher


def _source(form: StructuredOutputsParams) -> str:
    """The form as a grammar of llguidance's."""
    import llguidance

    if form.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(form.regex)
    try:
        if form.choice is not None:
            return llguidance.grammar_from("choice", json.dumps(list(form.choice)))
        if form.grammar is not None:
            return llguidance.grammar_from("grammar", form.grammar)
        schema = form.schema if form.json is not None else '{"type": "object"}'
        options: Any = {"whitespace_flexible": not form.disable_any_whitespace}
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)
    except ValueError as error:
        raise ValueError(f"structured_outputs cannot be followed: {error}") from None


class Matcher:
    """How far one output has come in its form."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def advance(self, token_id: int) -> str | None:
        """Go on by a token, or say why that cannot be.

        A token that the mask allows is wrong only if the form has become too complex. Others come
        if the request's other options forbid all that the mask allows.
        """
        # A form that has been too complex for the mask has stopped as well, so errors come first.
        if not self._matcher.is_error() and (
            self._matcher.is_stopped() or self._matcher.consume_token(token_id)
        ):
            return None
        reason = self._matcher.get_error().partition("\n")[0]
        return f"structured_outputs cannot be followed any further: {reason}"

    def write_mask(self, words: Int32[ndarray, " words"]) -> None:
        """Write a bit for each token: 1 if it may come next; after the end only end tokens may."""
        assert words.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
