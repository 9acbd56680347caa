"""The client: a process that sends requests at their times and notes when chunks come back.

It waits for no answer before it sends the next request (an open loop), so a slow server is offered
as much as a fast one. While requests are under way it only notes times and bytes; the streams are
parsed afterwards. It imports no JAX.

    python -m nanovllm_jax.tools.compare.serving.client

reads a pickled `ClientJob` from standard input, answers with the line "ready", reads the time of
`time.monotonic()` at which the load begins, and at the end writes a pickled `ClientResult`.
"""

import asyncio
import contextlib
import gc
import json
import pickle
import sys
import time
from typing import Any

from nanovllm_jax.tools.compare.serving.load import Request
from nanovllm_jax.tools.compare.serving.messages import Answer, ClientJob, ClientResult

UNFINISHED = "not finished in time"
BEAT_S = 0.01  # seconds between two looks at how late the event loop is


def body(request: Request, fields: dict[str, Any]) -> bytes:
    """The JSON of a request to /v1/completions."""
    own = {"prompt": request.prompt, "max_tokens": request.output, "stream": True}
    return json.dumps(fields | own).encode()


def read_stream(blocks: list[tuple[float, bytes]], answer: Answer) -> None:
    """Fill an answer from the bytes of its server-sent events and the times at which they came."""
    rest, is_complete = b"", False
    for now, block in blocks:
        *events, rest = (rest + block).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                continue  # a comment that keeps the connection alive
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                is_complete = True
                continue
            try:
                chunk = json.loads(data)
            except ValueError:
                answer.error = answer.error or f"no JSON in the stream: {data[:80]!r}"
                continue
            if told := chunk.get("error"):
                message = told.get("message", told) if isinstance(told, dict) else told
                answer.error = f"error in the stream: {message}"
            if choices := chunk.get("choices"):
                answer.times.append(now)
                # transformers sends no [DONE].
                is_complete |= choices[0].get("finish_reason") is not None
            if usage := chunk.get("usage"):
                answer.prompt_tokens = usage.get("prompt_tokens")
                answer.completion_tokens = usage.get("completion_tokens")
    if not answer.error and not is_complete:
        answer.error = "the stream broke off"


async def send(session: Any, url: str, data: bytes, due: float, answer: Answer) -> list:
    """Send one request; return the blocks of its stream, each with the time at which it came."""
    import aiohttp

    blocks: list[tuple[float, bytes]] = []
    answer.late_s = time.monotonic() - due
    try:
        async with session.post(url, data=data) as response:
            if response.status == 200:
                async for block in response.content.iter_any():
                    blocks.append((time.monotonic() - due, block))
            else:
                answer.error = f"HTTP {response.status}: {_message(await response.text())}"
    except asyncio.CancelledError:
        answer.error = UNFINISHED
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended_s = time.monotonic() - due
    return blocks


def _message(text: str) -> str:
    """What a body of an error says, in a line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(text.split())[:200]


async def _beat(beats: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(BEAT_S)
        beats.append(time.monotonic() - before - BEAT_S)


async def run(job: ClientJob, bodies: list[bytes], start: float) -> ClientResult:
    """Send each request at its time, and wait for all of them until `job.wait_s`."""
    import aiohttp

    headers = {"Content-Type": "application/json"}
    if job.api_key:
        headers["Authorization"] = f"Bearer {job.api_key}"
    answers, beats = [Answer() for _ in job.requests], []
    url, tasks = f"{job.address}/v1/completions", []
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=headers,
    )
    async with session:
        beating = asyncio.ensure_future(_beat(beats))
        began, cpu = time.monotonic(), time.process_time()
        for request, data, answer in zip(job.requests, bodies, answers, strict=True):
            due = start + request.due
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            tasks.append(asyncio.ensure_future(send(session, url, data, due, answer)))
        left = start + job.wait_s - time.monotonic()
        _, pending = await asyncio.wait(tasks, timeout=max(0.0, left))
        for task in pending:
            task.cancel()
        streams = await asyncio.gather(*tasks)
        cpu_share = (time.process_time() - cpu) / (time.monotonic() - began)
        beating.cancel()
    for blocks, answer in zip(streams, answers, strict=True):
        read_stream(blocks, answer)
    return ClientResult(answers, beats, cpu_share)


def main() -> None:
    """Do the job of standard input."""
    job: ClientJob = pickle.load(sys.stdin.buffer)
    bodies = [body(request, job.fields) for request in job.requests]
    import aiohttp  # noqa: F401  # before the load begins

    gc.collect()
    gc.disable()  # a collection would hold up all streams; the run is short
    print("ready", flush=True)
    start = float(sys.stdin.buffer.readline())
    # Not by uvloop: after its loop, a pipe that is full loses a part of what is written (0.23).
    result = asyncio.run(run(job, bodies, start))
    pickle.dump(result, sys.stdout.buffer)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
