"""Edits: what a request adds to single logits or forbids, as one short list for the device.

logit_bias, min_tokens and bad_words all come down to it. In the order of the list:

    bias of a token               (token, bias, ALWAYS, itself)
    token that ends a request     (token, -inf, UNTIL_MIN_TOKENS, itself)
    bad word of three tokens      (first,  0,   2, index of the last)
                                  (second, 0,   1, index of the last)
                                  (last,  -inf, ALWAYS, itself)

The tokens of a bad word before its last say what must stand 2 and 1 places before the new token,
among the output, for the last one to be forbidden. So the device can decide, which alone knows the
token that the step before has drawn.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from nanovllm_jax.sampling_params import SamplingParams

MOST_EDITS = 1024  # Edits of one request at most: the room that each slot has on the device.

ALWAYS, UNTIL_MIN_TOKENS = 0, -1  # values of `Edit.back` that are no distance


class Edit(NamedTuple):
    """One entry of a request's list."""

    token: int
    bias: float  # what its logit gets
    back: int  # ALWAYS, UNTIL_MIN_TOKENS, or how far before the new token this one must stand
    target: int  # index of the edit that depends on this one; its own if none does


def edits_of(
    params: SamplingParams, bad_words: Iterable[list[int]], ends: Collection[int]
) -> list[Edit]:
    """The edits that a request asks for.

    Args:
        bad_words: params.bad_words as tokens.
        ends: the model's end-of-sequence tokens, which min_tokens holds back beside the request's
            stop_token_ids, under ignore_eos too (as in vLLM).

    Raises:
        ValueError: there are more than MOST_EDITS, or they forbid all tokens that are allowed.
    """
    edits: list[Edit] = []
    for token, bias in (params.logit_bias or {}).items():
        edits.append(Edit(token, bias, ALWAYS, len(edits)))
    if params.min_tokens:
        for token in sorted({*ends, *(params.stop_token_ids or ())}):
            edits.append(Edit(token, -float("inf"), UNTIL_MIN_TOKENS, len(edits)))
    num_others = len(edits)
    for word in bad_words:
        last = len(edits) + len(word) - 1
        for back, token in zip(range(len(word) - 1, 0, -1), word, strict=False):
            edits.append(Edit(token, 0.0, back, last))
        edits.append(Edit(word[-1], -float("inf"), ALWAYS, last))
    if len(edits) > MOST_EDITS:
        raise ValueError(
            f"logit_bias, bad_words and min_tokens need {len(edits)} entries together "
            f"({len(params.logit_bias or {})} biases, {len(edits) - num_others} tokens of bad "
            f"words), a request has room for {MOST_EDITS}; shorten them, or name the tokens that "
            f"are left in allowed_token_ids"
        )
    if params.allowed_token_ids is not None:
        depending = {edit.target for edit in edits if edit.back > 0}
        forbidden = {
            edit.token
            for i, edit in enumerate(edits)
            if edit.bias == -float("inf") and i not in depending
        }
        if forbidden.issuperset(params.allowed_token_ids):
            raise ValueError(
                f"allowed_token_ids {sorted(params.allowed_token_ids)[:8]} are all forbidden by "
                f"bad_words or, until there are min_tokens, as tokens that end the request; allow "
                f"others as well"
            )
    return edits
