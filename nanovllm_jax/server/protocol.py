"""What clients send, as OpenAI's API and vLLM's additions name it, and what it means here.

A field that is known is checked by pydantic. Any other field passes if its value asks for nothing,
and is refused by its name if it asks for something: silence would be a wrong answer.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm_jax import SamplingParams

# Fields that change no answer here, whatever they say.
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
)
# Values with which other fields ask for nothing, beside null, false, and empty ones.
NEUTRAL: dict[str, Any] = {
    "best_of": 1, "length_penalty": 1.0, "modalities": ["text"],
    "spaces_between_special_tokens": True, "guided_decoding_backend": "auto", "priority": 0,
    "reasoning_effort": None, "include_reasoning": True, "n": 1,
}  # fmt: skip


class RequestError(Exception):
    """A request that cannot be served as it is: status 400, unless it says otherwise.

    Args:
        param: the field that is wrong.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


def field_of(message: str) -> str | None:
    """The option that an error of the engine's is about: the one that its message begins with."""
    found = re.match(r"\w+", message)
    names = {field.name for field in fields(SamplingParams)}
    return found[0] if found and found[0] in names else None


class Strict(BaseModel):
    """A JSON object, whose fields have the types that they should have.

    Nothing is converted: `"logprobs": false` does not ask for 0 of them.
    """

    model_config = ConfigDict(strict=True)


class Fields(Strict):
    """A body that may have fields which are not known."""

    model_config = ConfigDict(extra="allow")

    def check_other_fields(self) -> None:
        """Raise RequestError if a field that is not known asks for something."""
        for name, value in (self.model_extra or {}).items():
            nothing = value is None or value is False or value in ("", [], {})
            if not nothing and name not in WITHOUT_EFFECT and NEUTRAL.get(name) != value:
                raise RequestError(f"the field {name!r} is not supported; leave it out", name)


class StreamOptions(Strict):
    """What a stream tells besides text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """A named schema of a response."""

    name: str = "response"
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of a response."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Fields):
    """The fields that both kinds of completion have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None

    def sampling_params(
        self, defaults: Mapping[str, Any], most: int | None, **more: Any
    ) -> SamplingParams:
        """The options of the engine.

        Args:
            defaults: what the model's makers recommend, for what the client leaves open.
            most: the default of max_tokens.
            more: further options, which count more.

        Raises:
            RequestError: an option is not possible.
        """
        self.check_other_fields()
        names = (
            "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
            "frequency_penalty", "repetition_penalty",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        same = (
            "n", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
            "skip_special_tokens", "allowed_token_ids", "bad_words", "truncate_prompt_tokens",
        )  # fmt: skip
        given |= {name: getattr(self, name) for name in same}
        given["stop"] = self.stop or None  # some clients send "" or []
        given["max_tokens"] = most if self.max_tokens is None else self.max_tokens
        if self.logit_bias:
            given["logit_bias"] = _by_token(self.logit_bias)
        if (form := self.form()) is not None:
            given["structured_outputs"] = form
        try:
            return SamplingParams(**{**defaults, **given, **more})
        except (TypeError, ValueError) as error:
            raise RequestError(str(error), field_of(str(error))) from error

    def form(self) -> dict[str, Any] | None:
        """What the output must be, as `structured_outputs`."""
        format_ = self.response_format
        if format_ is None or format_.type == "text":
            return self.structured_outputs
        if self.structured_outputs:
            raise RequestError(
                "response_format and structured_outputs are two forms; send one", "response_format"
            )
        if format_.type == "json_object":
            return {"json_object": True}
        if format_.json_schema is None or format_.json_schema.json_schema is None:
            raise RequestError(
                'response_format of type json_schema needs {"json_schema": {"schema": ...}}',
                "response_format",
            )
        return {"json": format_.json_schema.json_schema}


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0)
    suffix: str | None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """The prompts, as texts or token ids.

        Raises:
            RequestError: there is none.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise RequestError("prompt is empty; send at least one", "prompt")
        return prompt


class FunctionCall(Strict):
    """A function and its arguments as JSON, as the model has written them."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    """A call that an assistant's message has made."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """A message of a conversation; templates may read more of its fields."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Strict):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The one tool that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TokenizeRequest(Fields):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def conversation(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: contents are texts, arguments are objects.

    Raises:
        RequestError: a part of a message is no text.
    """
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(number: int, message: ChatMessage) -> dict[str, Any]:
    written = message.model_dump(exclude_none=True)
    content = message.content
    if isinstance(content, list):
        texts = []
        for part in content:
            if part.get("type") not in ("text", "input_text") or "text" not in part:
                what = part.get("type")
                raise RequestError(
                    f"messages[{number}]: content of type {what!r} is not supported, only text",
                    f"messages[{number}].content",
                )
            texts.append(str(part["text"]))
        content = "\n".join(texts)
    written["content"] = "" if content is None else content
    for call in written.get("tool_calls", ()):
        call["function"]["arguments"] = _object(call["function"]["arguments"])
    return written


def _object(arguments: str | dict[str, Any]) -> Any:
    """The arguments of a call as an object, which templates write out themselves."""
    if isinstance(arguments, dict):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _by_token(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise RequestError("logit_bias takes token ids as keys", "logit_bias") from None
