"""Completions: a sequence's tokens as the text and the output that users see."""

from transformers import PreTrainedTokenizerBase

from nanovllm_jax.engine.detokenizer import Detokenizer
from nanovllm_jax.engine.reported_scores import ReportedScores
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.stop_strings import StopStrings
from nanovllm_jax.outputs import CompletionOutput, FinishReason
from nanovllm_jax.sampling_params import SamplingParams


class Completion:
    """One completion of a request: its sequence, and the text of its tokens.

    Tokens are decoded when an output is asked for, in the thread that asks. If there are stop
    strings, the engine's thread decodes each token as it comes instead, to end the sequence there.

    Args:
        tokenizer: None leaves the text empty.
    """

    def __init__(self, seq: Sequence, tokenizer: PreTrainedTokenizerBase | None):
        self.seq = seq
        self.scores = ReportedScores(seq, tokenizer if seq.params.detokenize else None)
        self._num_reported = 0
        self._has_reported_end = False
        self._text = None
        if tokenizer is not None and seq.params.detokenize:
            self._text = _Text(tokenizer, seq.params)
            if seq.params.stop_strings:
                seq.find_stop_string = lambda token, reason: self._add([token], reason)

    @property
    def has_news(self) -> bool:
        """Whether there are tokens that no `output` has had."""
        return self.seq.num_completion_tokens > self._num_reported

    def output(self) -> CompletionOutput:
        """The completion, as far as it has come."""
        _, reason, stop_reason = self._advance()
        token_ids = self.seq.completion_token_ids[: self._num_reported]
        text = self._text.so_far() if self._text else ""
        cumulative, logprobs = self.scores.completion(0, len(token_ids))
        return CompletionOutput(
            self.seq.index, text, token_ids, cumulative, logprobs, reason, stop_reason
        )

    def news(self) -> CompletionOutput | None:
        """What has come since the last call, which may be the end alone; None if nothing has.

        A completion is reported by this method or by `output`, not by both.
        """
        if self._has_reported_end or not (self.has_news or self.seq.is_finished):
            return None
        start = self._num_reported
        token_ids, reason, stop_reason = self._advance()
        text = self._text.new() if self._text else ""
        self._has_reported_end = reason is not None
        if not (token_ids or reason):
            return None
        cumulative, logprobs = self.scores.completion(start, self._num_reported)
        return CompletionOutput(
            self.seq.index, text, token_ids, cumulative, logprobs, reason, stop_reason
        )

    def _advance(self) -> tuple[list[int], FinishReason | None, int | str | None]:
        """Take in the tokens that have come; returns them, and how the completion ended."""
        seq = self.seq
        is_finished = seq.is_finished  # before its tokens: the engine may be adding some
        token_ids = seq.token_ids[seq.num_prompt_tokens + self._num_reported :]
        if seq.finish_reason and not is_finished:  # it is ending: its last token may have no text
            token_ids = token_ids[:-1]
        reason = seq.finish_reason if is_finished else None
        if not seq.find_stop_string:
            self._add(token_ids, reason)
        elif is_finished:
            self._add([], reason)  # the engine adds no more: it may have been aborted
        self._num_reported += len(token_ids)
        return token_ids, reason, seq.stop_reason if is_finished else None

    def _add(self, token_ids: list[int], reason: FinishReason | None) -> str | None:
        return self._text.add(token_ids, reason) if self._text else None


class _Text:
    """The text of a completion, cut at the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams):
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._include = params.include_stop_str_in_output
        self._stop = StopStrings(params.stop_strings, self._include)
        self._num_passed = params.min_tokens  # tokens in whose text no stop string is looked for
        self._parts: list[str] = []
        self._num_given = 0  # parts that `new` has given
        self._has_ended = False

    def add(self, token_ids: list[int], reason: FinishReason | None) -> str | None:
        """Add tokens, and if there is a `reason`, end the text.

        Returns:
            The stop string in the text, if there is one.
        """
        if self._has_ended:
            return self._stop.found
        if reason == "stop" and not self._include:
            token_ids = token_ids[:-1]  # an end token is no part of the text
        passed, token_ids = token_ids[: self._num_passed], token_ids[self._num_passed :]
        self._num_passed -= len(passed)
        if passed:
            self._parts.append(self._detokenizer.push(passed))
        text = self._detokenizer.push(token_ids)
        if reason:
            text += self._detokenizer.flush()
        self._parts.append(self._stop.push(text))
        if reason:
            self._parts.append(self._stop.flush())
        self._has_ended = bool(reason or self._stop.found)
        return self._stop.found

    def so_far(self) -> str:
        """What can be shown of the text."""
        return "".join(self._parts)

    def new(self) -> str:
        """What can be shown of the text and was not given by this method before."""
        parts = self._parts[self._num_given :]
        self._num_given += len(parts)
        return "".join(parts)
