"""scripts/ray_serve.py: engines behind one address; one that dies loses no request silently."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import DEMO_MODEL

pytest.importorskip("ray", reason="Ray is not installed: the extra [ray]")
pytest.importorskip("fastapi")

from scripts import ray_serve

ROOT = Path(__file__).parents[1]
ENGINE = {"max_num_seqs": 4, "max_model_len": 256, "max_num_batched_tokens": 256}
PROMPTS = [f"Tell me a story about {i} foxes and a lantern." for i in range(16)]
GREEDY = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}


# --- which engine ---


def test_prompts_that_begin_alike_prefer_the_same_engine():
    idle = {"a": 0, "b": 0, "c": 0}
    system = {"role": "system", "content": "Be brief. " * 200}

    def order(lengths, text):
        messages = [system | {"content": f"{text} {system['content']}"}]
        body = {"model": "m", "messages": [*messages, {"role": "user", "content": str(order)}]}
        return ray_serve.ranked(ray_serve.beginning_of_prompt(json.dumps(body).encode()), lengths)

    orders = {i: order(idle, i) for i in range(100)}
    assert {first for first, *_ in orders.values()} == set(idle)  # all have some
    assert all(order(idle, i) == orders[i] for i in range(100))
    for i, (first, *rest) in orders.items():
        others = {own: 0 for own in idle if own != first}
        assert order(others, i) == rest  # what goes takes nothing along
        assert order(idle | {first: ray_serve.MOST_AHEAD}, i) == orders[i]
        assert order(idle | {first: ray_serve.MOST_AHEAD + 1}, i) == [*rest, first]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"tokens": [1]}', b'{"prompt": ""}'])
def test_what_has_no_prompt_prefers_no_engine(body):
    assert ray_serve.beginning_of_prompt(body) == b""


def test_metrics_of_all_engines_are_one_text():
    prometheus = pytest.importorskip("prometheus_client")
    parser = pytest.importorskip("prometheus_client.parser")
    texts = {}
    for engine, count in (("a", 3), ("b", 4)):
        registry = prometheus.CollectorRegistry()
        counter = prometheus.Counter("tokens", "Tokens.", ["model_name"], registry=registry)
        counter.labels("demo").inc(count)
        texts[engine] = prometheus.generate_latest(registry)
    text = ray_serve.merged_metrics(texts).decode()
    assert text.count("# TYPE tokens_total counter") == 1
    found = {
        sample.labels["engine"]: sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tokens_total"
    }
    assert found == {"a": 3, "b": 4}


# --- a whole server ---


class Server:
    """The script in a process, with its lines as they come."""

    def __init__(self, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        engine = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
        argv = [ROOT / "scripts" / "ray_serve.py", f"--port={self.port}", *engine, *options]
        self.url, self.text = f"http://127.0.0.1:{self.port}", ""
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip

    def __enter__(self):
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.reader.join()
        self.process.stdout.close()
        self.process.wait()

    def read(self):
        for line in self.process.stdout:
            self.text += line

    def engines(self):
        """The engines that have been ready, with their process ids."""
        found = re.findall(r"process (\d+): engine (\w+) is ready", self.text)
        return {own: int(pid) for pid, own in found}

    def until(self, condition, limit=240):
        end = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.text
            time.sleep(0.1)

    def values(self, name):
        """A metric of all engines, by their ids."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.findall(rf'^vllm:{name}{{engine="(\w+)".*}} (\S+)$', text, re.MULTILINE)
        return {own: float(value) for own, value in found}


async def ask(client, url, prompt, stream):
    """One request's text if it came to its end; None if the client was told of an error."""
    body = {"prompt": prompt, "stream": stream, **GREEDY}
    if not stream:
        answer = await client.post(f"{url}/v1/completions", json=body)
        if answer.status_code >= 500 and answer.json()["error"]["message"]:
            return None
        return answer.json()["choices"][0]["text"]
    text, events = "", []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]", "the stream has no end, and tells of no error"
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            return None
        text += event["choices"][0]["text"]
    return text


async def ask_all(url, requests, started):
    """Ask 12 at a time, and set `started` when some have been answered."""
    gate, answers = asyncio.Semaphore(12), []
    async with httpx.AsyncClient(timeout=120) as client:

        async def one(prompt, stream):
            async with gate:
                answers.append((prompt, stream, await ask(client, url, prompt, stream)))
            if len(answers) == 6:
                started.set()

        await asyncio.gather(*(one(*request) for request in requests))
    return answers


@pytest.mark.slow
def test_a_killed_engine_loses_no_request_without_an_error():
    with LLM(DEMO_MODEL, **ENGINE) as llm:  # whose programs the replicas find compiled
        params = SamplingParams(**GREEDY)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    expected = {p: output["text"] for p, output in zip(PROMPTS, outputs, strict=True)}
    requests = [(prompt, i % 3 > 0) for i in range(3) for prompt in PROMPTS]

    with Server("--replicas=2") as server:
        server.until(lambda: "serving on" in server.text and len(server.engines()) == 2)
        first, second = server.engines()
        answers, started = [], threading.Event()
        load = threading.Thread(
            target=lambda: answers.extend(asyncio.run(ask_all(server.url, requests, started)))
        )
        load.start()
        started.wait(60)
        server.until(lambda: server.values("num_requests_running").get(first, 0) >= 2)
        os.kill(server.engines()[first], signal.SIGKILL)
        load.join()

        assert sorted((p, stream) for p, stream, _ in answers) == sorted(requests)
        for prompt, stream, text in answers:
            assert text == expected[prompt] or (text is None and stream), server.text
        told = sum(text is None for _, _, text in answers)
        assert told <= 12, "more than were under way"

        server.until(lambda: len(server.engines()) == 3)  # it has come back
        [third] = set(server.engines()) - {first, second}
        server.until(lambda: set(server.values("num_requests_running")) == {second, third})
        answers = asyncio.run(ask_all(server.url, requests[:16], started))
        assert all(text == expected[prompt] for prompt, _, text in answers)
        assert all(count > 0 for count in server.values("generation_tokens_total").values())

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
