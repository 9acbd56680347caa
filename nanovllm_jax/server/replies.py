"""What all replies have: ids, usage, scores, events and errors, as in OpenAI's API."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.engine.request import Request
from nanovllm_jax.outputs import Logprob

DONE = b"data: [DONE]\n\n"
# Kinds of errors by HTTP status; OpenAI's clients make exceptions of the status.
KINDS = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


def new_id(prefix: str) -> str:
    """An id for a reply."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """The time in seconds since the epoch."""
    return int(time.time())


def json_response(value: Any, status: int = 200, **headers: str) -> Response:
    """A reply in JSON."""
    return Response(orjson.dumps(value), status, headers, "application/json")


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error as clients read it."""
    other = "invalid_request_error" if status < 500 else "internal_server_error"
    kind = KINDS.get(status, other)
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def event(value: Any) -> bytes:
    """A server-sent event with JSON data."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class EventStream(StreamingResponse):
    """A reply that goes on. Proxies shall pass each event on at once.

    Args:
        resources: are closed at the end, however it comes: also if the client has gone away before
            the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], resources: ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._resources = resources

    async def __call__(self, scope, receive, send) -> None:
        with self._resources:
            await super().__call__(scope, receive, send)


class Usage:
    """Counts the tokens of the requests that a reply is made of."""

    def __init__(self, requests: Sequence[Request]):
        self._requests = requests
        self.completion_tokens = 0

    def as_json(self) -> dict[str, Any]:
        """The counts so far."""
        prompt = sum(len(r.command.token_ids) for r in self._requests)
        cached = sum(r.seqs[0].num_cached for r in self._requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def text_of(score: Logprob, token: int) -> str:
    """A token's text, or its number if it has none."""
    return f"token_id:{token}" if score.decoded_token is None else score.decoded_token


def chat_scores(
    token_ids: Sequence[int], scores: Sequence[dict[int, Logprob]], num_top: int
) -> dict[str, Any]:
    """Scores as chat completions have them."""

    def one(token: int, score: Logprob) -> dict[str, Any]:
        text = text_of(score, token)
        return {"token": text, "logprob": score.logprob, "bytes": list(text.encode())}

    content = []
    for token, by_token in zip(token_ids, scores, strict=True):
        likeliest = sorted(by_token.items(), key=lambda item: item[1].rank or 0)[:num_top]
        top = [one(other, score) for other, score in likeliest]
        content.append(one(token, by_token[token]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


class TextScores:
    """Scores as text completions have them, part by part: the places go on."""

    def __init__(self, num_top: int, tokenizer: PreTrainedTokenizerBase | None):
        self._num_top, self._tokenizer, self._offset = num_top, tokenizer, 0

    def add(
        self, token_ids: Sequence[int], scores: Sequence[dict[int, Logprob] | None]
    ) -> dict[str, Any]:
        """The scores of more tokens; None for a token without any, which is a prompt's first."""
        found: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token, by_token in zip(token_ids, scores, strict=True):
            score = None if by_token is None else by_token[token]
            if score is None and self._tokenizer is not None:
                text = str(self._tokenizer.decode([token]))
            else:
                text = text_of(score or Logprob(0.0), token)
            found["tokens"].append(text)
            found["token_logprobs"].append(score and score.logprob)
            found["top_logprobs"].append(by_token and self._top(token, by_token))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found

    def _top(self, token: int, by_token: dict[int, Logprob]) -> dict[str, float]:
        """The likeliest tokens by their texts, and the token itself."""
        likeliest = sorted(by_token.items(), key=lambda item: item[1].rank or 0)
        chosen = [pair for pair in likeliest[: max(1, self._num_top)] if pair[0] != token]
        own = by_token[token]
        return {text_of(own, token): own.logprob} | {text_of(s, t): s.logprob for t, s in chosen}
