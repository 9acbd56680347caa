"""A chat model's answers are taken apart the same way, however they are cut into pieces."""

import json
import random

import pytest

from nanovllm_jax.server.answers import AnswerReader, Call, Parts, tool_format

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = Call("add", '{"a": 1}')
# The answer, the format of calls, and what it is made of.
ANSWERS = {
    "plain": ("Hello <b>you</b>.", None, Parts(content="Hello <b>you</b>.")),
    "calls are text without tools": (CALL, None, Parts(content=CALL)),
    "thoughts": ("<think>\nHm <a>.\n</think>\n\nYes.", "qwen", Parts("Hm <a>.\n", "Yes.")),
    "only thoughts": ("<think>\nHm.", None, Parts("Hm.")),
    "no thoughts": ("<think>\n\n</think>\n\nYes.", None, Parts("", "Yes.")),
    "a call": (CALL, "qwen", Parts(calls=[ADD])),
    "text and calls": (f"Well:\n{CALL}\n{CALL}", "qwen", Parts(content="Well:", calls=[ADD, ADD])),
    "thoughts and a call": (f"<think>a</think>\n{CALL}", "qwen", Parts("a", calls=[ADD])),
    "text behind a call": (f"{CALL}\nDone.", "qwen", Parts(content="Done.", calls=[ADD])),
    "no JSON in a call": (
        "<tool_call>{x}</tool_call>", "qwen", Parts(content="<tool_call>{x}</tool_call>"),
    ),
    "a call without an end": ("<tool_call>\n{", "qwen", Parts(content="<tool_call>\n{")),
    "nearly a mark": ("a <tool_ca", "qwen", Parts(content="a <tool_ca")),
    "line breaks": ("a\n\nb\n", "qwen", Parts(content="a\n\nb\n")),
    "Llama's": ('{"name": "add", "parameters": {"a": 1}}', "llama", Parts(calls=[ADD])),
    "Llama's two": (
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "f"}', "llama",
        Parts(calls=[ADD, Call("f", "{}")]),
    ),
    "JSON that is no call": ('{"a": 1}', "llama", Parts(content='{"a": 1}')),
    "Llama's text": ("Hello {you}", "llama", Parts(content="Hello {you}")),
    "nothing": ("", "qwen", Parts()),
}  # fmt: skip


def read(pieces, **options):
    reader, whole = AnswerReader(**options), Parts()
    for parts in [*map(reader.push, pieces), reader.flush()]:
        whole.reasoning += parts.reasoning
        whole.content += parts.content
        whole.calls += parts.calls
    return whole


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_what_it_is_made_of(name):
    text, tools, expected = ANSWERS[name]
    assert read([text], tools=tools) == expected
    assert read(list(text), tools=tools) == expected
    rng = random.Random(name)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(pieces, tools=tools) == expected


def test_thoughts_that_the_prompt_has_begun():
    assert read(["Hm.</thi", "nk>\nYes."], is_thinking=True) == Parts("Hm.", "Yes.")


def test_text_is_not_held_back_longer_than_it_must():
    reader = AnswerReader(tools="qwen")
    assert reader.push("Well, ").content == "Well, "
    assert reader.push("a < b").content == "a < b"
    assert reader.push(" <").content == " "
    assert reader.push("b").content == "<b"


def test_arguments_stay_as_they_are_written():
    call = {"name": "say", "arguments": {"text": 'é "quoted" <tool_call>', "n": [1.5, None]}}
    text = f"<tool_call>{json.dumps(call)}</tool_call>"
    [found] = read([text], tools="qwen").calls
    assert json.loads(found.arguments) == call["arguments"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "qwen"),
        ('{% if tools %}{"name": x, "parameters": y}{% endif %}', "llama"),
        ("{{ messages }}", None),
        ("{% if tools %}[TOOLS]{% endif %}", None),
    ],
)
def test_the_template_tells_how_calls_are_written(template, expected):
    assert tool_format(template) == expected
