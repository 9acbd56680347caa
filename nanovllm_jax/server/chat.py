"""POST /v1/chat/completions: a conversation goes on."""

import json
from collections.abc import AsyncIterator
from typing import Any

from nanovllm_jax.engine.prompts import encode_chat
from nanovllm_jax.outputs import CompletionOutput
from nanovllm_jax.server import replies
from nanovllm_jax.server.answers import THINK, AnswerReader, Call, Parts, ToolFormat, tool_format
from nanovllm_jax.server.async_engine import Group
from nanovllm_jax.server.protocol import ChatRequest, NamedTool, RequestError, conversation
from nanovllm_jax.server.replies import Usage
from nanovllm_jax.server.service import Reply, Service, token_by_token


class ChatReply(Reply):
    """The answers to a conversation.

    Raises:
        RequestError: the client asks for what cannot be.
    """

    def __init__(self, service: Service, body: ChatRequest):
        service.check_model(body.model)
        if not service.trusts_templates:
            _check_no_template(body)
        self._body, self._conversation = body, conversation(body.messages)
        self._tools: ToolFormat | None = self._tool_format(service)
        more: dict[str, Any] = {"prompt_logprobs": body.prompt_logprobs}
        if body.stream and body.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs comes without stream only", "prompt_logprobs")
        if body.logprobs:
            more["logprobs"] = body.top_logprobs or 0
        elif body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        if body.max_completion_tokens is not None:
            more["max_tokens"] = body.max_completion_tokens
        if form := self._form_of_calls():
            if body.form():
                raise RequestError("tool_choice and response_format are two forms", "tool_choice")
            # Nobody reads spaces between the parts, and a small model may never stop writing them.
            more["structured_outputs"] = {"json": form, "disable_any_whitespace": True}
        params = body.sampling_params(service.defaults, None, **more)
        super().__init__(service, params, 1)
        self._head = {
            "id": replies.new_id("chatcmpl"), "object": "chat.completion",
            "created": replies.now(), "model": service.model,
        }  # fmt: skip

    def _tool_format(self, service: Service) -> ToolFormat | None:
        """How the model writes calls; None if the client wants none."""
        if not self._body.tools:
            if (
                isinstance(self._body.tool_choice, NamedTool)
                or self._body.tool_choice == "required"
            ):
                raise RequestError("tool_choice needs tools", "tool_choice")
            return None
        if self._body.tool_choice == "none":
            return None
        tokenizer = service.engine.llm.tokenizer
        template = self._body.chat_template or getattr(tokenizer, "chat_template", None) or ""
        found = tool_format(str(template))
        if found is None:
            raise RequestError("the model's chat template knows no tools; leave them out", "tools")
        return found

    def _form_of_calls(self) -> dict[str, Any] | None:
        """A JSON schema that the answer must follow, if calls are asked for."""
        choice, tools = self._body.tool_choice, self._body.tools or []
        parameters = {tool.function.name: tool.function.parameters or {} for tool in tools}
        if isinstance(choice, NamedTool):
            if choice.function.name not in parameters:
                raise RequestError(
                    f"tool_choice names {choice.function.name!r}; there are {list(parameters)}",
                    "tool_choice",
                )
            return {"type": "object"} | parameters[choice.function.name]
        if choice != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name}, "parameters": {"type": "object"} | schema,
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, schema in parameters.items()
        ]  # fmt: skip
        several = {} if self._body.parallel_tool_calls else {"maxItems": 1}
        return {"type": "array", "minItems": 1, **several, "items": {"anyOf": calls}}

    async def start(self, group: Group) -> None:
        engine = self.service.engine
        prompt = await engine.in_thread(self._encode)
        await self.service.start(group, [prompt], self.params)
        self._usage = Usage(group.requests)
        tail = str(engine.llm.tokenizer.decode(prompt[-8:])).rstrip()  # pyright: ignore[reportOptionalMemberAccess]
        self._answers = [Answer(self._reader(tail.endswith(THINK))) for _ in range(self.params.n)]

    def _encode(self) -> list[int]:
        body, tokenizer = self._body, self.service.engine.llm.tokenizer
        if tokenizer is None:
            raise RequestError("the model has no tokenizer, so no chat template")
        template: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if body.chat_template:
            template["chat_template"] = body.chat_template
        if body.tools and body.tool_choice != "none":
            template["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
        goes_on = body.continue_final_message
        template["continue_final_message"] = goes_on
        template["add_generation_prompt"] = body.add_generation_prompt and not goes_on
        try:
            return encode_chat(tokenizer, self._conversation, **template)
        except (TypeError, ValueError) as error:
            raise RequestError(str(error), "messages") from error

    def _reader(self, is_thinking: bool) -> AnswerReader | None:
        """What takes an answer apart; None for one that is nothing but calls."""
        choice = self._body.tool_choice
        if choice == "required" or isinstance(choice, NamedTool):
            return None
        return AnswerReader(is_thinking=is_thinking, tools=self._tools)

    async def whole(self, group: Group) -> dict[str, Any]:
        async for _, part in self.service.parts(group):
            self._usage.completion_tokens += len(part.token_ids)
            self._answers[part.index].add(part, self._body)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", **answer.message()},
                "logprobs": answer.logprobs if self._body.logprobs else None,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(self._answers)
        ]
        reply = self._head | {"choices": choices, "usage": self._usage.as_json()}
        if self._body.prompt_logprobs is not None:
            scores = group.requests[0].prompt_logprobs() or []
            reply["prompt_logprobs"] = [by_token and _by_id(by_token) for by_token in scores]
        return reply

    async def events(self, group: Group) -> AsyncIterator[list[dict[str, Any]]]:
        options, head = self._body.stream_options, self._head | {"object": "chat.completion.chunk"}

        def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            found = head | {"choices": [choice | more]}
            if options and options.continuous_usage_stats:
                found["usage"] = self._usage.as_json()
            return found

        def chunk_of(part: CompletionOutput) -> dict[str, Any]:
            self._usage.completion_tokens += len(part.token_ids)
            answer = self._answers[part.index]
            delta, logprobs = answer.add(part, self._body)
            ends = {}
            if part.finish_reason:
                ends = {"finish_reason": answer.finish_reason, "stop_reason": part.stop_reason}
            return chunk(part.index, delta, logprobs=logprobs, **ends)

        for index in range(self.params.n):
            yield [chunk(index, {"role": "assistant", "content": ""})]
        async for _, part in self.service.parts(group):
            yield [chunk_of(token) for token in token_by_token(part)]
        if options and options.include_usage:
            yield [head | {"choices": [], "usage": self._usage.as_json()}]


class Answer:
    """One answer, as far as it has come.

    Args:
        reader: takes its text apart; None if the text is nothing but calls, as JSON.
    """

    def __init__(self, reader: AnswerReader | None):
        self._reader = reader
        self._text = ""  # of an answer without a reader
        self._reasoning, self._content = "", ""
        self._calls: list[dict[str, Any]] = []
        self.logprobs: dict[str, Any] = {"content": [], "refusal": None}
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(
        self, part: CompletionOutput, body: ChatRequest
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Take in more; returns what is new as a delta, and the scores of its tokens."""
        if self._reader:
            parts = self._reader.push(part.text)
            if part.finish_reason:
                last = self._reader.flush()
                parts = Parts(
                    parts.reasoning + last.reasoning, parts.content + last.content,
                    parts.calls + last.calls,
                )  # fmt: skip
        else:
            self._text += part.text
            parts = Parts(calls=_forced_calls(self._text, body)) if part.finish_reason else Parts()
        scores = None
        if body.logprobs and part.logprobs:
            scores = replies.chat_scores(part.token_ids, part.logprobs, body.top_logprobs or 0)
            self.logprobs["content"] += scores["content"]
        self._reasoning += parts.reasoning
        self._content += parts.content
        most = None if body.parallel_tool_calls else max(0, 1 - len(self._calls))
        calls = [self._new_call(call) for call in parts.calls[:most]]
        delta: dict[str, Any] = {"content": parts.content}
        if parts.reasoning:
            delta["reasoning_content"] = parts.reasoning
        if calls:
            delta["tool_calls"] = calls
        if part.finish_reason:
            has_called = self._calls and part.finish_reason == "stop"
            self.finish_reason = "tool_calls" if has_called else part.finish_reason
            self.stop_reason = part.stop_reason
        return delta, scores

    def message(self) -> dict[str, Any]:
        """All of the answer."""
        content = self._content.strip("\n") if self._calls else self._content
        found: dict[str, Any] = {"content": content or (None if self._calls else "")}
        if self._reasoning:
            found["reasoning_content"] = self._reasoning
        if self._calls:
            found["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"}
                for call in self._calls
            ]
        return found

    def _new_call(self, call: Call) -> dict[str, Any]:
        new = {
            "index": len(self._calls), "id": replies.new_id("call"), "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }  # fmt: skip
        self._calls.append(new)
        return new


def _check_no_template(body: ChatRequest) -> None:
    """Raise RequestError if the client sends a template: a program that may never end."""
    if body.chat_template or (body.chat_template_kwargs or {}).get("chat_template"):
        raise RequestError(
            "chat_template is not allowed: this server was started without "
            "--trust-request-chat-template",
            "chat_template",
        )


def _forced_calls(text: str, body: ChatRequest) -> list[Call]:
    """The calls of an answer that had to be calls; an answer that was cut off has what it has."""
    if isinstance(body.tool_choice, NamedTool):
        return [Call(body.tool_choice.function.name, text)]
    try:
        calls = json.loads(text)
    except ValueError:
        return []
    return [Call(call["name"], json.dumps(call["parameters"])) for call in calls]


def _by_id(by_token: dict) -> dict[str, dict[str, Any]]:
    return {
        str(token): {
            "logprob": score.logprob, "rank": score.rank, "decoded_token": score.decoded_token,
        }
        for token, score in by_token.items()
    }  # fmt: skip
