"""Takes a chat model's answer apart while it comes: thoughts, text for the user, calls of tools.

What may be the beginning of a mark, such as `<tool_call>`, is held back until it is clear.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

THINK, END_THINK = "<think>", "</think>"  # Qwen3, SmolLM3 and others
CALL, END_CALL = "<tool_call>", "</tool_call>"  # Qwen's, and Hermes' before it
PYTHON_TAG = "<|python_tag|>"  # Llama's, before a call

# How a model writes calls: Qwen's marks around {"name": ..., "arguments": {...}}; Llama's answers
# that are nothing but {"name": ..., "parameters": {...}}, several with semicolons between them.
ToolFormat = Literal["qwen", "llama"]


@dataclass(frozen=True)
class Call:
    """A call of a function, with its arguments as JSON."""

    name: str
    arguments: str


@dataclass
class Parts:
    """What has become clear of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


def tool_format(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls; None if the template knows no tools."""
    if "tools" not in template:
        return None
    if CALL in template:
        return "qwen"
    return "llama" if '"parameters"' in template or PYTHON_TAG in template else None


class AnswerReader:
    """Takes one answer apart.

    Args:
        is_thinking: the prompt has begun the thoughts already.
        tools: how calls are written; None finds none.
    """

    def __init__(self, *, is_thinking: bool = False, tools: ToolFormat | None = None):
        self._tools = tools
        self._held = ""
        self._state: Literal["start", "thoughts", "content", "call", "llama"] = (
            "thoughts" if is_thinking else "start"
        )
        self._skips_space = False  # line breaks behind a mark are no part of what follows

    def push(self, text: str) -> Parts:
        """Take in more of the answer."""
        self._held += text
        parts = Parts()
        while self._step(parts):
            pass
        return parts

    def flush(self) -> Parts:
        """End the answer: what was held back is what it looks like."""
        parts, held = Parts(), self._held
        self._held = ""
        if self._state == "thoughts":
            parts.reasoning = held
        elif self._state == "llama":
            calls = _llama_calls(held)
            parts.calls, parts.content = calls, "" if calls else held
        elif self._state == "call":
            parts.content = CALL + held  # it has no end
        else:
            parts.content = held
        return parts

    def _step(self, parts: Parts) -> bool:
        """Move on by one mark; False if more has to come first."""
        if self._skips_space:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return False
            self._skips_space = False
        match self._state:
            case "start":
                return self._start()
            case "thoughts":
                text, found = self._until(END_THINK)
                parts.reasoning += text
                if found:
                    self._state, self._skips_space = "start", True
                return found
            case "content":
                if self._tools != "qwen":
                    parts.content, self._held = parts.content + self._held, ""
                    return False
                text, found = self._until(CALL)
                parts.content += text.rstrip("\n") if found else text
                self._state = "call" if found else self._state
                return found
            case "call":
                before, mark, after = self._held.partition(END_CALL)
                if not mark:
                    return False
                self._held, self._skips_space, self._state = after, True, "content"
                call = _call(_loaded(before), "arguments")
                if call:
                    parts.calls.append(call)
                else:
                    parts.content += CALL + before + END_CALL
                return True
            case "llama":
                return False

    def _start(self) -> bool:
        """Decide what the answer begins with."""
        text = self._held.lstrip()
        if not text:
            return False
        if THINK.startswith(text[: len(THINK)]):
            if len(text) < len(THINK):
                return False
            self._held, self._state, self._skips_space = text[len(THINK) :], "thoughts", True
            return True
        if self._tools == "llama" and (text[0] == "{" or PYTHON_TAG.startswith(text[:14])):
            self._state = "llama"
            return False
        self._state = "content"
        return True

    def _until(self, mark: str) -> tuple[str, bool]:
        """What comes before a mark, as far as it is clear, and whether the mark has come."""
        before, found, after = self._held.partition(mark)
        if found:
            self._held = after
            return before, True
        keep = next((n for n in range(len(mark) - 1, 0, -1) if before.endswith(mark[:n])), 0)
        # Line breaks before a call are no part of the text.
        stripped = before[: len(before) - keep]
        if mark == CALL:
            stripped = stripped.rstrip("\n")
        self._held = before[len(stripped) :]
        return stripped, False


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, key: str) -> Call | None:
    """The call that an object stands for, if it does."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(key, value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments)


def _llama_calls(text: str) -> list[Call]:
    """The calls that an answer is made of; none if anything else is in it."""
    text = text.strip().removeprefix(PYTHON_TAG).strip()
    decoder, calls = json.JSONDecoder(), []
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        call = _call(value, "parameters")
        if call is None:
            return []
        calls.append(call)
        text = text[end:].lstrip().removeprefix(";").lstrip()
    return calls
