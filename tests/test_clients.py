"""Clients that others have written get from the server what the engine gives."""

import asyncio
import functools
from typing import Literal

import pytest
from helpers import quick_start
from pydantic import BaseModel, ConfigDict

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import DEMO_MODEL

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from server_thread import serving  # noqa: E402  (needs what is looked for above)

QUESTION = [{"role": "user", "content": "What is 345 + 678?"}]
# A template that knows tools, which the demo model's does not; it has the model copy its prompt.
TEMPLATE = "{% for t in tools or () %}<tool_call>{{ t }}{% endfor %}{{ messages[-1].content }}"


class Sum(BaseModel):
    """Adds two numbers."""

    model_config = ConfigDict(extra="forbid")  # or so small a model invents more and more

    a: Literal[1, 2, 3]
    b: Literal[4, 5]


@pytest.fixture(scope="module")
def llm():
    options = {
        "max_num_seqs": 4,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "dtype": "float32",
    }
    with quick_start(), LLM(DEMO_MODEL, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def url(llm):
    with serving(llm, api_key="secret", trust_request_chat_template=True) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def no_spaces(llm):
    """A logit bias against spaces, which so small a model may write without end in JSON."""
    texts = [llm.tokenizer.decode([token]) for token in range(llm.tokenizer.vocab_size)]
    return {str(token): -100 for token, text in enumerate(texts) if set(text) & set(" \n\t\r")}


@pytest.fixture(scope="module")
def answer(llm):
    """What the engine answers to the question, greedily."""
    params = SamplingParams(temperature=0, max_tokens=40)
    return llm.chat(QUESTION, params, use_tqdm=False)[0]["text"]


# --- OpenAI's ---


def test_openais_async_client_streams(url, answer):
    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key="secret") as client:
            stream = await client.chat.completions.create(
                model="demo", messages=QUESTION, temperature=0, max_tokens=40, stream=True
            )
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    parts = asyncio.run(ask())
    assert "".join(parts) == answer and len(parts) > 2


def test_openais_client_puts_a_stream_together(client, answer):
    """Its helper checks each event against its own types."""
    options = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    with client.chat.completions.stream(
        **options, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= kinds
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    [choice], [expected] = found.choices, whole.choices
    assert choice.message.content == expected.message.content == answer
    assert choice.finish_reason == expected.finish_reason
    assert choice.logprobs.content == expected.logprobs.content
    assert found.usage.completion_tokens == whole.usage.completion_tokens


def test_openais_client_parses_an_answer(client, no_spaces):
    found = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Sum, max_tokens=60, logit_bias=no_spaces
    )
    assert isinstance(found.choices[0].message.parsed, Sum)


def test_openais_client_streams_a_call_and_answers_it(client):
    tool = openai.pydantic_function_tool(Sum)
    options = {"model": "demo", "tools": [tool], "max_tokens": 100, "temperature": 0}
    options["extra_body"] = {"chat_template": TEMPLATE}
    with client.chat.completions.stream(
        messages=QUESTION, tool_choice="required", parallel_tool_calls=False, **options
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)
    result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    messages = [*QUESTION, message.to_dict(), result]
    answer = client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_openais_client_knows_our_errors(client, url):
    create = client.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="demo", prompt="a", temperature=-1)
    assert caught.value.param == "temperature" and "must be 0" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        create(model="gpt", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_openais_client_raises_what_ends_a_stream(client, llm, monkeypatch):
    def fail(*args):
        raise ValueError("not a number")

    monkeypatch.setattr("nanovllm_jax.server.completions.TextReply._choice", fail)
    stream = client.completions.create(model="demo", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="not a number"):
        list(stream)
    assert not llm.stats().waiting


# --- LangChain's ---


@pytest.fixture(scope="module")
def make_chat(url):
    langchain = pytest.importorskip("langchain_openai")
    return functools.partial(
        langchain.ChatOpenAI, base_url=url, api_key="secret", model="demo", temperature=0,
        max_tokens=40, max_retries=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat(make_chat):
    return make_chat()


def test_langchain_asks_and_streams(chat, answer):
    found = chat.invoke("What is 345 + 678?")
    assert found.content == answer and found.response_metadata["finish_reason"] == "stop"
    assert found.usage_metadata["total_tokens"] > found.usage_metadata["input_tokens"] > 0
    parts = list(chat.stream("What is 345 + 678?", stop=["\n\n"]))
    assert "".join(part.content for part in parts) == answer and len(parts) > 2
    batch = asyncio.run(chat.abatch(["What is 345 + 678?"] * 3))
    assert [each.content for each in batch] == [answer] * 3


def test_langchain_gets_scores(chat):
    found = chat.bind(logprobs=True, top_logprobs=2).invoke("What is 345 + 678?")
    for entry in found.response_metadata["logprobs"]["content"]:
        first, second = entry["top_logprobs"]
        assert first["logprob"] >= second["logprob"] and entry["logprob"] == first["logprob"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_objects(make_chat, no_spaces, method):
    chat = make_chat(logit_bias=no_spaces, extra_body={"chat_template": TEMPLATE}, max_tokens=60)
    found = chat.with_structured_output(Sum, method=method).invoke("What is 2 + 4?")
    assert isinstance(found, Sum)


def test_langchain_calls_tools(make_chat):
    chat = make_chat(extra_body={"chat_template": TEMPLATE}, max_tokens=100)
    bound = chat.bind_tools([Sum], tool_choice="required", parallel_tool_calls=False)
    [call] = bound.invoke("2 + 4").tool_calls
    assert call["name"] == "Sum" and Sum(**call["args"])


def test_langchain_completes_texts(url, llm):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.OpenAI(
        base_url=url, api_key="secret", model="demo", temperature=0, max_tokens=8
    )
    texts = ["Once upon a time", "What is"]
    expected = llm.generate(texts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    found = model.generate(texts)
    assert [each[0].text for each in found.generations] == [each["text"] for each in expected]
    assert "".join(model.stream(texts[0])) == expected[0]["text"]
