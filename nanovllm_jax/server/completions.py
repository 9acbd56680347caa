"""POST /v1/completions: a text goes on."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from nanovllm_jax.engine.prompts import Prompt, encode
from nanovllm_jax.outputs import CompletionOutput
from nanovllm_jax.server import replies
from nanovllm_jax.server.async_engine import Group, are_short
from nanovllm_jax.server.protocol import CompletionRequest, RequestError
from nanovllm_jax.server.replies import TextScores, Usage
from nanovllm_jax.server.service import Reply, Service, token_by_token

MAX_TOKENS = 16  # The default of `max_tokens`, as in OpenAI's API.


class TextReply(Reply):
    """The completions of one or several prompts.

    Raises:
        RequestError: the client asks for what cannot be.
    """

    def __init__(self, service: Service, body: CompletionRequest):
        service.check_model(body.model)
        self._body, self._prompts = body, body.prompts()
        if body.suffix:
            raise RequestError("suffix is not supported: the model goes on at the end", "suffix")
        more: dict[str, Any] = {"logprobs": body.logprobs}
        if body.max_tokens == 0:
            if not body.echo:
                raise RequestError(
                    "max_tokens must be at least 1, unless echo is set", "max_tokens"
                )
            more["max_tokens"] = 1  # it is drawn, and not shown
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
        params = body.sampling_params(service.defaults, MAX_TOKENS, **more)
        super().__init__(service, params, len(self._prompts))
        self._head = {
            "id": replies.new_id("cmpl"), "object": "text_completion", "created": replies.now(),
            "model": service.model,
        }  # fmt: skip
        self._scores: dict[int, TextScores] = {}  # of the choices that have begun

    @property
    def starts_at_once(self) -> bool:
        return self._body.add_special_tokens and are_short(self._prompts)

    async def start(self, group: Group) -> None:
        prompts: list[Prompt] = [*self._prompts]
        if not self._body.add_special_tokens:
            prompts = await self.service.engine.in_thread(self._without_special_tokens)
        await self.service.start(group, prompts, self.params)
        self._usage = Usage(group.requests)

    def _without_special_tokens(self) -> list[Prompt]:
        tokenizer = self.service.engine.llm.tokenizer
        try:
            return [
                encode(tokenizer, prompt, add_special_tokens=False)
                if isinstance(prompt, str) and tokenizer
                else prompt
                for prompt in self._prompts
            ]
        except ValueError as error:
            raise RequestError(str(error), "prompt") from error

    async def whole(self, group: Group) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async for number, part in self.service.parts(group):
            new = self._choice(group, number, part)
            old = choices.setdefault(new["index"], new)
            if old is not new:
                old["text"] += new["text"]
                for name, values in (new["logprobs"] or {}).items():
                    old["logprobs"][name] += values
                old |= {name: new[name] for name in ("finish_reason", "stop_reason")}
        found = [choices[index] for index in sorted(choices)]
        return self._head | {"choices": found, "usage": self._usage.as_json()}

    async def events(self, group: Group) -> AsyncIterator[list[dict[str, Any]]]:
        options = self._body.stream_options

        def chunk(number: int, part: CompletionOutput) -> dict[str, Any]:
            found = self._head | {"choices": [self._choice(group, number, part)]}
            if options and options.continuous_usage_stats:
                found["usage"] = self._usage.as_json()
            return found

        async for number, part in self.service.parts(group):
            yield [chunk(number, token) for token in token_by_token(part)]
        if options and options.include_usage:
            yield [self._head | {"choices": [], "usage": self._usage.as_json()}]

    def _choice(self, group: Group, number: int, part: CompletionOutput) -> dict[str, Any]:
        """What is new of a completion; with `echo`, its first part has the prompt before it."""
        index = number * self.params.n + part.index
        self._usage.completion_tokens += len(part.token_ids)
        has_begun, tokenizer = index in self._scores, self.service.engine.llm.tokenizer
        scores = self._scores.setdefault(index, TextScores(self._body.logprobs or 0, tokenizer))
        text, token_ids = part.text, part.token_ids
        by_token: Sequence[Any] = part.logprobs or ()
        if self._body.max_tokens == 0:
            text, token_ids, by_token = "", [], []
        if self._body.echo and not has_begun:
            request, prompt = group.requests[number], self._prompts[number]
            if not isinstance(prompt, str):
                prompt = "" if tokenizer is None else str(tokenizer.decode(prompt))
            text = prompt + text
            token_ids = [*request.command.token_ids, *token_ids]
            by_token = [*(request.prompt_logprobs() or ()), *by_token]
        wants_scores = self._body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": scores.add(token_ids, by_token) if wants_scores else None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
