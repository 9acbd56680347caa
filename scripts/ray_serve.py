#!/usr/bin/env python3
"""Serves a model with many engines behind one address, by Ray Serve.

    python scripts/ray_serve.py --replicas 8 --model MODEL_DIR [options of nanovllm-jax serve]

A client meets Ray's HTTP proxy, which hands each request to a gateway. The gateway picks an engine
that has seen the same beginning of a prompt before, and passes on what it answers. Each engine is a
whole server (nanovllm_jax.server.app) in a process of its own, with its own GPUs; HTTP goes in and
comes out of it as ASGI messages in place of a socket.

If an engine dies, Ray starts another one in its place. Requests of which nothing has been sent yet
are given to other engines; a stream that has begun ends with an error, as an event that clients
raise as an exception.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from nanovllm_jax.server.serve import (
    add_server_options,
    check_server_options,
    completed,
    server_options,
    warn_of_strangers,
)
from nanovllm_jax.server.threads import keep_threads_short_of_waiting
from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, refusals

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import RayServeException
    from ray.serve.handle import DeploymentHandle
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    raise SystemExit(
        'ray_serve: error: Ray Serve is not installed: pip install "nanovllm-jax[ray,server]"'
    ) from error

Message = dict[str, Any]  # of ASGI
# Requests that Ray lets into one process. The engines' own --max-waiting is what counts.
UNLIMITED = 1 << 20
# Bytes of a prompt's beginning that decide on its engine. The prefix cache keeps whole blocks, of
# 256 tokens by default, so that shorter prompts find nothing in it.
BEGINNING = 1024
# Requests that an engine may have more than the least busy one, before prompts go elsewhere.
MOST_AHEAD = 8
# Engines that are tried for one request, with a pause in seconds that grows between them.
ATTEMPTS, PAUSE = 5, 0.2
# Paths whose requests concern all engines.
EVERYWHERE = ("/metrics", "/reset_prefix_cache")
# What an application reads of a request's scope, and can be sent to another process.
SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string",
    "root_path", "headers", "client", "server",
)  # fmt: skip


class PrefixRouter(RequestRouter):
    """Picks the engine for a request: the same for the same beginning of a prompt."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The engines in groups; Ray takes the least busy one of the first that has room."""
        if pending_request is None or not (beginning := pending_request.args[0]):
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # wait, if all are full
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = {
            own: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for own, replica in replicas.items()
        }
        return [[replicas[own]] for own in ranked(beginning, lengths)]


def ranked(beginning: bytes, lengths: Mapping[str, int]) -> list[str]:
    """Engines in the order in which a prompt prefers them; those that are much busier come last.

    The order is one of hashes of the beginning and of the engine's id (rendezvous hashing). So an
    engine that comes or goes changes the place of its own share of prompts only, and gateways need
    not tell each other anything.

    Args:
        lengths: each engine's requests under way, by its id.
    """
    limit = min(lengths.values()) + MOST_AHEAD

    def rank(own: str) -> tuple[bool, bytes]:
        return lengths[own] > limit, hashlib.blake2b(beginning + own.encode()).digest()

    return sorted(lengths, key=rank)


def beginning_of_prompt(body: bytes) -> bytes:
    """What decides on the engine of a request; nothing for a request without a prompt."""
    import orjson

    try:
        fields = orjson.loads(body)
    except ValueError:
        return b""
    said = (fields.get("messages") or fields.get("prompt")) if isinstance(fields, dict) else None
    return orjson.dumps(said)[:BEGINNING] if said else b""


def own_id() -> str:
    """Ray's name for this process among those of its kind."""
    return serve.get_replica_context().replica_id.unique_id


@serve.deployment
class Engine:
    """A server without a socket, in a process of its own.

    Args:
        given: the engine's options that the user gave.
        server: what the server allows, a ServerOptions.
    """

    async def __init__(self, model: str, given: dict[str, Any], server: Any):
        from pathlib import Path

        from nanovllm_jax import LLM
        from nanovllm_jax.server.app import make_app

        self.llm = LLM(model, **completed(given, Path(model)))
        self.app = make_app(self.llm, server)
        self.lifespan = self.app.router.lifespan_context(self.app)
        await self.lifespan.__aenter__()
        keep_threads_short_of_waiting()
        print(f"process {os.getpid()}: engine {own_id()} is ready", flush=True)

    async def stream(
        self, beginning: bytes, scope: dict[str, Any], body: bytes
    ) -> AsyncIterator[list[Message]]:
        """The application's messages for a request, as they come; it ends if nobody reads on."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            await asyncio.Event().wait()  # a client that leaves ends this task, see below
            raise AssertionError

        running = asyncio.ensure_future(self.app(scope, receive, messages.put))  # pyright: ignore[reportArgumentType]
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while message := await messages.get():
                ready = [message]  # and what else there is: a call of Ray's costs more than a token
                while not messages.empty() and (message := messages.get_nowait()):
                    ready.append(message)
                yield ready
                if message is None:
                    return
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def whole(self, scope: dict[str, Any], body: bytes) -> tuple[str, list[Message]]:
        """This engine's id, and its application's messages for a request."""
        batches = [batch async for batch in self.stream(b"", scope, body)]
        return own_id(), [message for batch in batches for message in batch]

    def check_health(self) -> None:
        """Raise an exception if the engine has failed; Ray then starts another."""
        if fault := self.app.state.service.engine.fault:
            raise RuntimeError(f"the engine has failed: {fault}")


@serve.deployment
@serve.ingress()
class Gateway:
    """Passes requests on to engines, and their answers back.

    Args:
        max_body: most bytes of a request's body that an engine takes.
    """

    def __init__(self, engines: DeploymentHandle, max_body: int):
        self.engines, self.max_body = engines, max_body

    def __serve_build_asgi_app__(self) -> Any:
        from starlette.applications import Starlette
        from starlette.routing import Mount

        return Starlette(routes=[Mount("/", app=self.forward)])

    async def forward(self, scope, receive, send) -> None:
        """Answer one request. It is an ASGI application."""
        body = await self._body(receive)
        request = {name: scope[name] for name in SCOPE if name in scope}
        request["root_path"] = ""  # of the mount; the engines' applications are at the root
        if scope["path"] in EVERYWHERE:
            messages = await self._from_all(request, body)
        else:
            messages = None
            for attempt in range(ATTEMPTS):
                await asyncio.sleep(PAUSE * attempt)
                messages = await self._from_one(request, body, send)
                if messages is not None:
                    break
        for message in failure("no engine could answer", 503) if messages is None else messages:
            await send(without_id(message))

    async def _body(self, receive) -> bytes:
        """A request's body. Of one that is too long there is enough for an engine to refuse it."""
        body = bytearray()
        while len(body) <= self.max_body:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return bytes(body)

    async def _from_one(self, request: dict[str, Any], body: bytes, send) -> list[Message] | None:
        """Have one engine answer; returns what is still to be sent, None if nothing has come.

        Events are sent as they come. Other answers are kept until they are complete, so that
        another engine can be asked if this one dies.
        """
        held: list[Message] = []
        is_stream = has_begun = False
        answer = self.engines.options(stream=True).stream.remote(  # pyright: ignore[reportAttributeAccessIssue]
            beginning_of_prompt(body), request, body
        )
        try:
            async for batch in answer:  # pyright: ignore[reportGeneralTypeIssues]
                held += batch
                is_stream |= any(is_event_stream(message) for message in batch)
                if is_stream and held[-1]["type"] == "http.response.body":
                    has_begun = True
                    for message in held:
                        await send(without_id(message))
                    if is_complete(held):
                        return []
                    held.clear()
            if is_complete(held):
                return held
        except (RayError, RayServeException):
            pass  # the engine has died, or cannot be reached
        finally:
            answer.cancel()  # if the client has gone away; else it has no effect
        return [final_event("the engine has gone")] if has_begun else None

    async def _from_all(self, request: dict[str, Any], body: bytes) -> list[Message] | None:
        """Have all engines answer: with one text of their metrics, else with the worst answer."""
        answers = await self.engines.broadcast("whole", request, body).results_async(
            timeout_s=10, return_exceptions=True
        )
        told = {a[0]: a[1] for a in answers if not isinstance(a, BaseException) and a[1]}
        if not told:
            return None
        head, *bodies = max(told.values(), key=lambda messages: messages[0]["status"])
        if request["path"] == "/metrics" and head["status"] == 200:
            texts = {own: b"".join(m["body"] for m in found[1:]) for own, found in told.items()}
            return answer_messages(200, merged_metrics(texts), b"text/plain; version=0.0.4")
        return [head, *bodies]


def is_event_stream(message: Message) -> bool:
    """Whether an answer that begins with this message consists of server-sent events."""
    kind = dict(message.get("headers", ())).get(b"content-type", b"")
    return message["type"] == "http.response.start" and kind.startswith(b"text/event-stream")


def is_complete(messages: list[Message]) -> bool:
    """Whether the last of these messages ends an answer."""
    last = messages[-1] if messages else {"type": "none"}
    return last["type"] == "http.response.body" and not last.get("more_body", False)


def without_id(message: Message) -> Message:
    """A message without the request's id in its headers, which Ray's proxy adds as well."""
    if message["type"] != "http.response.start":
        return message
    kept = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
    return message | {"headers": kept}


def failure(text: str, status: int) -> list[Message]:
    """An error as OpenAI's clients read it."""
    return answer_messages(status, error_json(text, status), b"application/json")


def final_event(text: str) -> Message:
    """The end of a stream that cannot go on, with the error that clients raise."""
    data = b"data: " + error_json(text, 500) + b"\n\ndata: [DONE]\n\n"
    return {"type": "http.response.body", "body": data, "more_body": False}


def error_json(text: str, status: int) -> bytes:
    """An error's body."""
    kind = "internal_server_error" if status == 500 else "service_unavailable_error"
    error = {"message": text, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}).encode()


def answer_messages(status: int, body: bytes, kind: bytes) -> list[Message]:
    """A whole answer."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def merged_metrics(texts: dict[str, bytes]) -> bytes:
    """One text in Prometheus' format of several, which are told apart by the label `engine`."""
    families: dict[str, list[str]] = {}  # the lines of each, by its first: "# HELP name ..."
    for own, text in texts.items():
        lines: list[str] = []
        for line in text.decode().splitlines():
            if line.startswith("# HELP"):
                lines = families.setdefault(line, [])
            if not line.startswith("#"):
                lines.append(line.replace("{", f'{{engine="{own}",', 1))
            elif line not in lines:
                lines.append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from nanovllm_jax.config import EngineConfig

    given, server = options.engine_options(args), server_options(args)
    with refusals(*options.ENGINE_ERRORS):
        config = EngineConfig.resolve(args.model, **given)
    warn_of_strangers(args)
    ray.init(include_dashboard=False)
    gpus = config.num_devices if ray.cluster_resources().get("GPU") else 0
    for kind, each in (("CPU", 1), ("GPU", gpus)):
        if each * args.replicas > (there := ray.cluster_resources().get(kind, 0)):
            raise UsageError(f"--replicas {args.replicas} at {each} {kind} each: there are {there}")
    engines = Engine.options(
        num_replicas=args.replicas,
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        graceful_shutdown_timeout_s=args.shutdown_timeout,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),  # pyright: ignore[reportArgumentType]
    ).bind(str(args.model.resolve()), given, server)
    gateways = Gateway.options(
        num_replicas=args.gateways,
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=args.shutdown_timeout,
    ).bind(engines, server.max_body)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        serve.run(gateways, name="nanovllm_jax")
        print(f"serving on http://{args.host}:{args.port} with {args.replicas} engines", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:  # an engine does not start; Ray has shown why
        raise UsageError(str(error)) from None
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if a signal has ended it, 2 for bad usage."""
    parser = options.Parser(prog="ray_serve", description="Serve a model with many engines.")
    add_server_options(parser)
    group = parser.add_argument_group("replicas")
    replicas = "engines, each with its own GPUs (default: %(default)s)"
    group.add_argument("--replicas", type=int, default=1, metavar="N", help=replicas)
    gateways = "processes that pass requests on to engines (default: %(default)s)"
    group.add_argument("--gateways", type=int, default=1, metavar="N", help=gateways)
    try:
        args = parser.parse_args(argv)
        check_server_options(args)
        options.check_positive(args, "replicas", "gateways", "port")
        return run(args)
    except UsageError as error:
        print(f"ray_serve: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
