#!/usr/bin/env python3
"""A load test: thousands of requests of all kinds to a server, some from clients that go away.

`python -m scripts.load_server` serves the demo model in a process of its own and sends it 2,000
requests, 64 at a time: text and chat, streamed and whole, greedy and sampled, with stop strings,
scores, schemas and tools. It fails if a request is lost, if an answer differs from the one that the
server gives when it has nothing else to do, if anything is left of the requests afterwards, or if
the server grows. Then it ends the server by SIGTERM while it works, and fails unless each request
is answered, whole or with an error, in the time that it may take.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

Json = dict[str, Any]
Outcome = Literal["answered", "refused", "failed", "cut off"]

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
WARM_UP = 500  # Requests after which the server's memory is measured for the first time.
GROWTH = 0.05  # Share by which the server's memory may grow from then on.
START = 300.0  # Seconds that a server may take to start.
PATIENCE = 120.0  # Seconds after which a request counts as lost.
# A chat template that knows tools, unlike the demo model's.
TEMPLATE = "{% for t in tools %}<tool_call>{{ t }}{% endfor %}{{ messages[0].content }}"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "s": {"enum": ["a", "b"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Ask:
    """What a client asks for.

    Attributes:
        repeats: whether the answer is the same each time, since it is greedy or has a seed.
    """

    kind: str
    path: str
    body: Json
    repeats: bool


def draw_asks(rng: random.Random, token_ids: Sequence[Sequence[int]]) -> list[Ask]:
    """Draw a request of each kind.

    Args:
        token_ids: prompts as tokens.
    """
    a, b = rng.randrange(1000), rng.randrange(1000)
    hero, thing = rng.choice(["fox", "hare", "owl"]), rng.choice(["lantern", "boat", "key"])
    text = f"Once upon a time there was a {hero} with a {thing} and {a} coins."
    question = rng.choice([f"What is {a} + {b}?", f"Tell me a story about a {hero} and a {thing}."])
    chat: Json = {"messages": [{"role": "user", "content": question}]}
    greedy = {"temperature": 0, "max_tokens": rng.randrange(1, 60)}
    seeded = {"temperature": rng.uniform(0.3, 1.5), "top_p": 0.9, "seed": a, "max_tokens": 30}
    call: Json = {"name": "add", "parameters": SCHEMA}
    tools: Json = {"tools": [{"type": "function", "function": call}], "chat_template": TEMPLATE}
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA}}
    forced = {"temperature": 0, "max_tokens": 80}
    return [
        Ask("text", TEXT, {"prompt": text, **greedy}, True),
        Ask("texts", TEXT, {"prompt": [text, question], **greedy}, True),
        Ask("ids", TEXT, {"prompt": rng.choice(token_ids), **greedy}, True),
        Ask("id lists", TEXT, {"prompt": rng.sample(token_ids, 2), **greedy}, True),
        Ask("echo", TEXT, {"prompt": text, "echo": True, "logprobs": 1, **greedy}, True),
        Ask("stop", TEXT, {"prompt": text, "stop": ["the", "."], **greedy}, True),
        Ask("seed", TEXT, {"prompt": text, "n": 2, **seeded}, True),
        Ask("sampled", TEXT, {"prompt": text, "n": 2, "temperature": 1, "max_tokens": 30}, False),
        Ask("chat", CHAT, chat | greedy, True),
        Ask("chat scores", CHAT, chat | greedy | {"logprobs": True, "top_logprobs": 3}, True),
        Ask("chat sampled", CHAT, chat | {"max_completion_tokens": 40, "stop": ["\n"]}, False),
        Ask("schema", CHAT, chat | forced | {"response_format": form}, True),
        Ask("tools", CHAT, chat | forced | tools | {"tool_choice": "required"}, True),
    ]


def answer_of(reply: Json) -> Json:
    """The part of a whole reply that is the same each time: choices by their index, and counts."""
    choices: Json = {}
    for choice in reply["choices"]:
        message = choice.get("message", choice)
        choices[choice["index"]] = {
            "text": message.get("text") or message.get("content") or "",
            "calls": [call["function"] for call in message.get("tool_calls") or ()],
            "reason": choice["finish_reason"],
            "scores": _scores(choice["logprobs"]),
        }
    usage = reply["usage"]
    return {"choices": choices, "usage": (usage["prompt_tokens"], usage["completion_tokens"])}


def answer_of_chunks(chunks: Sequence[Json]) -> Json:
    """The same of a streamed reply; AssertionError if a chunk comes after a choice's end."""
    *chunks, last = chunks
    assert last["choices"] == [], "the last chunk has the usage alone"
    choices: Json = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        new = {"text": "", "calls": [], "reason": None, "scores": []}
        found = choices.setdefault(choice["index"], new)
        assert found["reason"] is None, "a chunk after the choice's end"
        delta = choice.get("delta", choice)
        found["text"] += delta.get("text") or delta.get("content") or ""
        found["calls"] += [call["function"] for call in delta.get("tool_calls") or ()]
        found["reason"] = choice["finish_reason"]
        found["scores"] += _scores(choice["logprobs"])
    usage = last["usage"]
    return {"choices": choices, "usage": (usage["prompt_tokens"], usage["completion_tokens"])}


def _scores(logprobs: Json | None) -> list[tuple[str, float]]:
    """Tokens and their log probabilities, of either kind of completion."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [(entry["token"], entry["logprob"]) for entry in logprobs["content"]]
    values = (value or 0.0 for value in logprobs["token_logprobs"])
    return list(zip(logprobs["tokens"], values, strict=True))


def equal(a: Any, b: Any) -> bool:
    """Whether two answers are the same, with log probabilities to within 0.001."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, abs_tol=1e-3)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(itertools.starmap(equal, zip(a, b, strict=True)))
    return a == b


class Failed(Exception):
    """A reply that is an error, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}: {message}")
        self.status = status


@dataclass
class Client:
    """Sends requests to a server, over a new connection each, as many clients would."""

    url: str

    def session(self) -> aiohttp.ClientSession:
        """Give a session whose connections are not kept."""
        return aiohttp.ClientSession(
            self.url,
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        )

    async def get(self, path: str) -> str:
        """Give the text of a page."""
        async with self.session() as session, session.get(path) as reply:
            return await reply.text()

    async def ask(self, ask: Ask, *, stream: bool) -> Json:
        """Return the answer; raises Failed if it is an error."""
        body: Json = ask.body
        if stream:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.session() as session, session.post(ask.path, json=body) as reply:
            if reply.status != 200:
                raise Failed(reply.status, await reply.text())
            if not stream:
                return answer_of(await reply.json())
            return answer_of_chunks([chunk async for chunk in _chunks(reply)])

    async def vanish(self, ask: Ask, after: float, *, stream: bool, sends_all: bool) -> None:
        """Ask, and go away after some seconds, with an answer or without.

        Args:
            sends_all: whether the server gets the whole request.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                if sends_all:
                    await self.ask(ask, stream=stream)
                else:
                    await self._send_half(ask)

    async def _send_half(self, ask: Ask) -> None:
        data = json.dumps(ask.body).encode()

        async def half() -> AsyncIterator[bytes]:
            yield data[: len(data) // 2]
            await asyncio.Event().wait()

        async with self.session() as session, session.post(ask.path, data=half()):
            pass

    async def metrics(self) -> dict[str, float]:
        """The server's values by their names, sums over labels."""
        values: dict[str, float] = Counter()  # pyright: ignore[reportAssignmentType]
        for line in (await self.get("/metrics")).splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                values[name.partition("{")[0].removeprefix("vllm:")] += float(value)
        return values


async def _chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The events of a stream as JSON; raises Failed for an error, or for a stream that is cut."""
    async for line in reply.content:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        if data:
            chunk = json.loads(data)
            if error := chunk.get("error"):
                raise Failed(error["code"], error["message"])
            yield chunk
    raise aiohttp.ClientPayloadError("the stream has no [DONE]")


@dataclass
class Load:
    """A server under load, what it answers without, and counts of what has happened.

    Attributes:
        pid: the server's process, to measure; None if it is elsewhere.
    """

    client: Client
    rng: random.Random
    pid: int | None = None
    asks: list[Ask] = field(default_factory=list)
    alone: dict[int, Json] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    num_done: int = 0

    async def prepare(self, num_each: int) -> None:
        """Draw requests, `num_each` of each kind, and have them answered one by one."""
        token_ids = [[self.rng.randrange(500) for _ in range(n)] for n in range(3, 60, 4)]
        for _ in range(num_each):
            self.asks += draw_asks(self.rng, token_ids)
        for i, ask in enumerate(self.asks):
            answer = await self.client.ask(ask, stream=False)
            if ask.repeats:
                self.alone[i] = answer

    async def run(self, num_requests: int, at_once: int, vanishing: float) -> None:
        """Send requests from `at_once` clients; AssertionError if an answer is wrong."""
        numbers = iter(range(num_requests))

        async def client() -> None:
            for _ in numbers:
                await self._one(vanishing)
                self.num_done += 1
                if self.num_done in (min(WARM_UP, num_requests // 2), num_requests):
                    self.measure()

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())

    async def _one(self, vanishing: float) -> None:
        rng = self.rng
        i, stream = rng.randrange(len(self.asks)), rng.random() < 0.5
        ask = self.asks[i]
        if rng.random() < vanishing:
            sends_all = rng.random() < 0.8
            await self.client.vanish(ask, rng.uniform(0, 1.5), stream=stream, sends_all=sends_all)
            self.counts["clients that go away"] += 1
            return
        answer = await self.client.ask(ask, stream=stream)
        if ask.repeats:
            what = f"{ask.kind}, stream={stream}: {ask.body}"
            assert equal(answer, self.alone[i]), f"{what}\n{answer}\nalone:\n{self.alone[i]}"
        else:
            most = ask.body.get("max_tokens") or ask.body["max_completion_tokens"]
            assert answer["usage"][1] <= most * ask.body.get("n", 1)
            assert all(c["reason"] in ("stop", "length") for c in answer["choices"].values())
        self.counts[f"{ask.kind}, {'stream' if stream else 'whole'}"] += 1

    def measure(self) -> None:
        """Note the size of the server's memory in KiB, and the number of its open files."""
        if self.pid is not None:
            size = files = 0
            for pid in (self.pid, *children(self.pid)):  # the engine's process is one of these
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                size += int(status.partition("VmRSS:")[2].split()[0])
                files += len(os.listdir(f"/proc/{pid}/fd"))
            self.sizes.append((size, files))

    async def check_idle(self, seconds: float = 5.0) -> None:
        """Wait until the server has nothing left of the requests; AssertionError if it keeps it."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        end = time.monotonic() + seconds
        while any(left := [(await self.client.metrics())[name] for name in names]):
            assert time.monotonic() < end, f"left over: {dict(zip(names, left, strict=True))}"
            await asyncio.sleep(0.05)

    def check_memory(self) -> None:
        """AssertionError if the server has grown."""
        if self.pid is not None:
            (first, _), (last, _) = self.sizes
            assert last <= first * (1 + GROWTH), f"the server grew from {first} to {last} KiB"


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for found in lists for child in found.read_text("utf-8").split()]


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Serve the demo model in another process; give it and its address, and kill it in the end.

    Args:
        options: of the command line.
    """
    command = [sys.executable, "-m", "nanovllm_jax", "serve", "--port", "0", *options]
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, encoding="utf-8")
    late = threading.Timer(START, process.kill)
    late.start()
    try:
        assert process.stderr
        url = None
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if found := re.search(r"serving on (http://\S+),", line):
                url = found[1]
                break
        late.cancel()
        assert url, "the server did not start"
        # A pipe that nobody reads would stop the server once it is full.
        copied = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True)
        copied.start()
        yield process, url
    finally:
        late.cancel()
        process.kill()
        process.wait()


async def stop_under_load(
    process: subprocess.Popen, url: str, num_requests: int, max_tokens: int
) -> tuple[Counter[Outcome], float]:
    """End a server by SIGTERM while it works.

    Returns how each request went, and the seconds that the server's end took. AssertionError if the
    server took a new connection.
    """
    client = Client(url)
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True}

    async def one(number: int) -> Outcome:
        try:
            await client.ask(Ask("long", TEXT, body, False), stream=number % 2 == 0)
        except aiohttp.ClientConnectorError:
            return "refused"
        except Failed:
            return "failed"
        except aiohttp.ClientError:
            return "cut off"
        return "answered"

    asked = [asyncio.ensure_future(one(number)) for number in range(num_requests)]
    while (await client.metrics())["num_requests_running"] < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    if process.poll() is None:
        assert await one(0) == "refused", "a server that ends took a new connection"
    outcomes: Counter[Outcome] = Counter(await asyncio.gather(*asked))
    await asyncio.to_thread(process.wait, PATIENCE)
    return outcomes, time.monotonic() - start


async def run(args: argparse.Namespace) -> None:
    """Do all of it."""
    with contextlib.ExitStack() as stack:
        process, url = None, args.url
        if url is None:
            process, url = stack.enter_context(
                served("--dtype", "float32", "--trust-request-chat-template")
            )
        load = Load(Client(url), random.Random(args.seed), process and process.pid)
        await load.prepare(args.num_each)
        start = time.perf_counter()
        await load.run(args.requests, args.at_once, args.vanishing)
        took = time.perf_counter() - start
        await load.check_idle()
        for name, count in sorted(load.counts.items()):
            print(f"{name}: {count}")
        print(f"{args.requests} requests in {took:.1f} s")
        if load.sizes:
            print("memory in KiB and open files:", *load.sizes)
        load.check_memory()
        if process:
            outcomes, took = await stop_under_load(process, url, args.at_once, 100)
            print(f"SIGTERM: {dict(outcomes)}, status {process.returncode} after {took:.1f} s")
            assert set(outcomes) == {"answered"} and process.returncode == 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Put a server under load.")
    parser.add_argument("--url", help="a server that runs; default: one for this test")
    parser.add_argument("--requests", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--at-once", type=int, default=64, help="clients (%(default)s)")
    share = "of clients that go away (%(default)s)"
    parser.add_argument("--vanishing", type=float, default=0.1, metavar="SHARE", help=share)
    each = "different requests of each kind (%(default)s)"
    parser.add_argument("--num-each", type=int, default=8, metavar="N", help=each)
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
