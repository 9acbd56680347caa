"""The server as its clients see it: OpenAI's own client, unmodified, and plain HTTP."""

import asyncio
import json
import threading
import time

import httpx2 as httpx
import pytest
from helpers import quick_start

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import DEMO_MODEL

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from server_thread import serving  # noqa: E402  (needs what is looked for above)

from nanovllm_jax.server.engine_process import EngineProcess  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 345 + 678?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm():
    with (
        quick_start(),
        LLM(DEMO_MODEL, max_num_seqs=8, max_model_len=512, max_num_batched_tokens=512) as llm,
    ):
        yield llm


@pytest.fixture(scope="module", params=["thread", "process"])
def engine(request, llm):
    """What is served: the engine that tests compare with, or one in a process of its own."""
    if request.param == "thread":
        yield llm
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        engine = EngineProcess(
            DEMO_MODEL, max_num_seqs=8, max_model_len=512, max_num_batched_tokens=512
        )
    with engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, trust_request_chat_template=True) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def post(url, path="/v1/completions", **body):
    return httpx.post(url + path, json=body, timeout=60)


def idle(engine):
    """Wait until nothing runs; the free blocks are then all."""
    for _ in range(6000):
        stats = engine.stats()
        if not (stats.running or stats.waiting) and stats.cache_usage == 0:
            return True
        time.sleep(0.01)
    return False


# --- chat ---


def test_an_answer_is_the_engines(client, llm):
    expected = llm.chat(QUESTION, GREEDY, use_tqdm=False)[0]
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_completion_tokens=40
    )
    [choice] = answer.choices
    assert choice.message.content == expected["text"]
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(expected["token_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected["token_ids"])


def test_a_stream_is_the_answer_in_pieces(client, llm):
    expected = llm.chat(QUESTION, GREEDY, use_tqdm=False)[0]
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, max_tokens=40, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *parts, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == len(expected["token_ids"])
    assert "".join(c.choices[0].delta.content or "" for c in parts) == expected["text"]
    assert parts[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in parts][-1] == "stop"
    assert len(parts) == 1 + len(expected["token_ids"])  # the role's, and one for each token


def test_a_stream_without_usage_has_a_choice_in_each_chunk(client):
    stream = client.chat.completions.create(model="demo", messages=QUESTION, stream=True)
    assert all(chunk.choices for chunk in stream)


def test_texts_stream_with_a_chunk_for_each_token(client):
    """Of several completions, whose calls of the device take several steps."""
    stream = client.completions.create(
        model="demo", prompt=["a", "b c"], max_tokens=9, n=2, temperature=1, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    *parts, last = list(stream)
    assert [sum(c.choices[0].index == i for c in parts) for i in range(4)] == [9] * 4
    assert [c.usage.completion_tokens for c in parts] == list(range(1, 37))
    assert last.choices == [] and last.usage.completion_tokens == 36


def test_many_answers_at_the_same_time(url, engine, llm):
    expected = llm.chat(QUESTION, GREEDY, use_tqdm=False)[0]["text"]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="demo", messages=QUESTION, temperature=0, max_tokens=40
                    )
                    for _ in range(30)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [expected] * 30
    assert idle(engine)


def test_scores_are_the_engines(client, llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    expected = llm.chat(QUESTION, params, use_tqdm=False)[0]
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    for token, by_token, found in zip(
        expected["token_ids"], expected["logprobs"], content, strict=True
    ):
        assert found.logprob == pytest.approx(by_token[token].logprob, abs=1e-5)
        assert found.token == by_token[token].decoded_token
        likeliest = sorted(by_token.values(), key=lambda score: score.rank)[:3]
        assert [top.token for top in found.top_logprobs] == [s.decoded_token for s in likeliest]


def test_an_answer_that_must_follow_a_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}},
        "required": ["n", "s"], "additionalProperties": False,
    }  # fmt: skip
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=100, temperature=1, seed=1,
        extra_body={"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"n", "s"} and value["s"] in "ab"
    choice = {"name": "x", "schema": {"enum": ["yes", "no"]}}
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": choice},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content) in ("yes", "no")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add", "description": "adds",
            "parameters": {
                "type": "object", "properties": {"a": {"type": "integer", "maximum": 9}},
                "required": ["a"], "additionalProperties": False,
            },
        },
    }
]  # fmt: skip
TEMPLATE = "{% for t in tools %}<tool_call>{{ t }}{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_asked_for(client, choice, stream):
    pytest.importorskip("llguidance")
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, tools=TOOLS, tool_choice=choice, max_tokens=100, seed=3,
        extra_body={"chat_template": TEMPLATE}, stream=stream, parallel_tool_calls=False,
    )  # fmt: skip
    if stream:
        chunks = list(answer)
        [call] = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        [call], reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert call.function.name == "add" and call.id.startswith("call")
    assert json.loads(call.function.arguments)["a"] <= 9
    assert reason == "tool_calls"


def test_tools_that_the_template_does_not_know_are_refused(url):
    answer = post(url, "/v1/chat/completions", messages=QUESTION, tools=TOOLS)
    assert answer.status_code == 400
    assert "knows no tools" in answer.json()["error"]["message"]


# --- text ---


def test_texts_and_ids_go_on(client, llm):
    text = "Once upon a time"
    token_ids = llm.tokenizer.encode(text)
    expected = llm.generate([text], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    for prompt in (text, [text, text], token_ids, [token_ids, token_ids]):
        answer = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=8)
        texts = [choice.text for choice in answer.choices]
        count = 2 if prompt in ([text, text], [token_ids, token_ids]) else 1
        assert texts == [expected[0]["text"]] * count
        assert [choice.index for choice in answer.choices] == list(range(count))


def test_several_completions(client):
    options = {"model": "demo", "prompt": ["a", "b"], "seed": 5, "max_tokens": 6, "temperature": 1}
    answer = client.completions.create(**options, n=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    firsts = client.completions.create(**options)
    assert [answer.choices[i].text for i in (0, 3)] == [c.text for c in firsts.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_scores(client, llm, stream):
    """As lm-eval asks for likelihoods."""
    token_ids = llm.tokenizer.encode("What is 2 + 2?")
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    [expected] = llm.generate([token_ids], params, use_tqdm=False)
    options = {"temperature": 0, "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = client.completions.create(model="demo", prompt=token_ids, stream=stream, **options)
    [choice] = next(iter(answer)).choices if stream else answer.choices
    own = [
        by_token and by_token[token].logprob
        for token, by_token in zip(token_ids, expected["prompt_logprobs"], strict=True)
    ]
    own.append(expected["logprobs"][0][expected["token_ids"][0]].logprob)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own[1:], abs=1e-4)
    assert len(choice.logprobs.tokens) == len(token_ids) + 1
    assert choice.text.startswith("What is 2 + 2?")
    offsets = choice.logprobs.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets)


def test_echo_of_the_prompt_alone(client):
    answer = client.completions.create(
        model="demo", prompt="What is", max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "What is"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens


def test_a_stop_string_ends_the_text(client, llm):
    story = "Once upon a time"
    text = llm.generate([story], SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    stop = text[0]["text"][9:13]
    answer = client.completions.create(
        model="demo", prompt=story, temperature=0, max_tokens=30, stop=stop
    )
    assert answer.choices[0].text == text[0]["text"].partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop


# --- errors ---


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"prompt": "a", "best_of": 2}, 400, "best_of", "not supported"),
        ({"prompt": "a", "no_such_field": 1}, 400, "no_such_field", "not supported"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "must be 0"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"prompt": []}, 400, "prompt", "at least one"),
        ({"prompt": [[]]}, 400, "prompt", "empty"),
        ({"prompt": [1, 10**6]}, 400, "prompt", "not in the vocabulary"),
        ({"prompt": ["a", "b " * 600]}, 400, "prompt", "prompt[1]: the prompt has"),
        ({}, 400, "prompt", "required"),
        ({"prompt": "a", "model": "gpt"}, 404, "model", "does not exist"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        ({"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options.x", "not permitted"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "response_format", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(url, engine, body, status, param, words):
    answer = post(url, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert param in (error["param"] or "") and error["code"] == status
    assert idle(engine)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "\ud800", "add_special_tokens": False}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": [1]}, "tools"),
        ("/detokenize", {"tokens": ["0"]}, "tokens.0"),
        ("/v1/completions", {"prompt": "a", "logprobs": False}, "logprobs"),
        ("/v1/completions", {"prompt": "\ud800", "add_special_tokens": False}, "prompt"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["\ud800"]}, None),
        (
            "/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}},
            "structured_outputs",
        ),
        (
            "/v1/chat/completions", {"messages": QUESTION, "chat_template": "{{ 1 / 0 }}"},
            "messages",
        ),
        (
            "/v1/chat/completions", {"messages": QUESTION, "prompt_logprobs": 1, "stream": True},
            "prompt_logprobs",
        ),
    ],
)  # fmt: skip
def test_what_no_client_should_send_is_refused_too(url, path, body, param):
    answer = httpx.post(
        url + path, content=json.dumps(body), headers={"content-type": "application/json"},
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_form_too_complex_to_follow_is_the_clients_error(url):
    """The second time, too, although the form's grammar is known then."""
    body = {"prompt": "a", "structured_outputs": {"regex": "a{1000000}"}}
    answer = post(url, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"
    answer = post(url, **body, stream=True)
    assert '"code":400' in answer.text and answer.text.endswith("data: [DONE]\n\n")


def test_arguments_of_a_call_may_be_anything(url):
    call = {"function": {"name": "f", "arguments": "[" * 50_000}}
    messages = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, *QUESTION]
    answer = post(url, "/v1/chat/completions", messages=messages, max_tokens=1)
    assert answer.status_code == 200


def test_templates_of_clients_are_refused_unless_they_are_trusted(engine):
    """A template is a program, which may take all memory: {{ 'a' * 10**9 }}."""
    with serving(engine) as url:
        for body in ({"chat_template": "a"}, {"chat_template_kwargs": {"chat_template": "a"}}):
            answer = post(url, "/v1/chat/completions", messages=QUESTION, **body)
            assert answer.status_code == 400
            assert "--trust-request-chat-template" in answer.json()["error"]["message"]


def test_fields_that_ask_for_nothing_pass(url):
    neutral = {"best_of": 1, "suffix": None, "user": "me", "logprobs": None, "stop": None, "x": []}
    assert post(url, prompt="a", max_tokens=1, **neutral).status_code == 200


def test_what_is_no_request_is_refused_as_clients_read_it(url):
    for answer in (
        httpx.post(
            f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"}
        ),
        httpx.get(f"{url}/v1/completions"),
        httpx.get(f"{url}/v1/nothing"),
    ):
        assert answer.status_code in (400, 404, 405)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["param"] is None
        assert answer.headers.get("allow") == ("POST" if answer.status_code == 405 else None)


def test_the_key(engine):
    with serving(engine, api_key="secret") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert [model.id for model in client.models.list()] == ["demo"]


def test_a_body_that_is_too_large(engine):
    with serving(engine, max_body=1000) as url:
        assert post(url, prompt="a" * 2000).status_code == 413
        streamed = (b"a" * 600 for _ in range(3))  # whose length nobody tells
        assert httpx.post(f"{url}/v1/completions", content=streamed).status_code == 413


def test_too_many_at_once(engine):
    with serving(engine, max_waiting=0) as url:  # 8 run at the same time
        answers, busy = [], threading.Barrier(13)

        def ask():
            busy.wait()
            options = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
            answers.append(post(url, **options))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        busy.wait()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429} and statuses.count(200) >= 8
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
    assert idle(engine)


def test_a_request_that_takes_too_long(engine):
    with serving(engine, timeout=0.05) as url:
        options = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
        assert post(url, **options).status_code == 504
        answer = post(url, **options, stream=True)
        assert '"code":504' in answer.text and answer.text.endswith("data: [DONE]\n\n")
    assert idle(engine)


# --- clients that go away ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(url, engine, stream):
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        if not stream:
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        raise httpx.ReadTimeout("left")
    assert idle(engine)


# --- the rest ---


def test_models_version_health_and_ids(url):
    [model] = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["id"] == "demo" and model["root"] == str(DEMO_MODEL)
    assert model["max_model_len"] == 512
    assert httpx.get(f"{url}/version").json()["version"]
    answer = httpx.get(f"{url}/health", headers={"x-request-id": "mine"})
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
    assert "/v1/chat/completions" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_tokens_and_back(url, llm):
    text = "What is 2 + 2?"
    answer = post(url, "/tokenize", prompt=text).json()
    assert answer["tokens"] == llm.tokenizer.encode(text) and answer["count"] == len(
        answer["tokens"]
    )
    assert post(url, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    chat = post(url, "/tokenize", messages=QUESTION).json()["tokens"]
    assert "345 + 678" in llm.tokenizer.decode(chat)
    assert post(url, "/tokenize").status_code == 400
    assert post(url, "/detokenize", tokens=[-1]).status_code == 400
    assert httpx.get(f"{url}/tokenizer_info").json()["chat_template"]


def test_metrics_under_vllms_names(url):
    def values():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("vllm:"))
        return {name.partition("{")[0]: float(value) for name, value in pairs}

    before = values()
    assert post(url, prompt=[1, 2, 3], max_tokens=5, ignore_eos=True).status_code == 200
    after = values()

    def more(name):
        return after[f"vllm:{name}"] - before.get(f"vllm:{name}", 0)

    assert more("prompt_tokens_total") == 3 and more("generation_tokens_total") == 5
    assert more("time_to_first_token_seconds_count") == 1
    assert more("inter_token_latency_seconds_count") == 4
    assert more("e2e_request_latency_seconds_count") == 1
    assert {f"vllm:{name}" for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_hits_total", "prefix_cache_queries_total", "num_preemptions_total",
    )} <= set(after)  # fmt: skip


def test_the_prefix_cache_can_be_reset(url):
    assert httpx.post(f"{url}/reset_prefix_cache").status_code == 200


def test_an_engine_that_fails_is_told_of(monkeypatch):
    """Requests under way get status 500, later ones too, and /health says so."""
    options = {"max_num_seqs": 2, "max_model_len": 256, "enforce_eager": True}
    with quick_start(), LLM(DEMO_MODEL, **options) as llm, serving(llm) as url:

        def fail(*args):
            raise RuntimeError("no such device")

        monkeypatch.setattr(llm.runner, "dispatch", fail)
        for _ in range(2):
            answer = post(url, prompt="a")
            assert answer.status_code == 500 and "no such device" in answer.text
        assert httpx.get(f"{url}/health").status_code == 503


def test_an_engine_whose_thread_has_ended_is_told_of():
    """Between two rounds nobody waits who could be told; /health finds out, and later requests."""
    options = {"max_num_seqs": 2, "max_model_len": 256, "enforce_eager": True}

    def fail():
        raise RuntimeError("the books do not balance")

    with (
        quick_start(),
        pytest.raises(RuntimeError, match="the books do not balance"),  # as the engine is closed
        LLM(DEMO_MODEL, **options) as llm,
        serving(llm) as url,
    ):
        assert httpx.get(f"{url}/health").status_code == 200
        llm._thread.send(fail)
        llm._thread._thread.join(10)
        assert httpx.get(f"{url}/health").status_code == 503
        assert post(url, prompt="a").status_code == 500
