"""The application: routes, errors, and what holds for every request."""

import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from nanovllm_jax import __version__
from nanovllm_jax.engine.prompts import encode, encode_chat
from nanovllm_jax.recommended import recommended_sampling
from nanovllm_jax.server.async_engine import AsyncEngine, Engine, EngineFault, QueueFull
from nanovllm_jax.server.chat import ChatReply
from nanovllm_jax.server.completions import TextReply
from nanovllm_jax.server.metrics import Metrics
from nanovllm_jax.server.page import page_response
from nanovllm_jax.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
    conversation,
)
from nanovllm_jax.server.replies import error_body, json_response, now
from nanovllm_jax.server.service import Disconnected, RequestFailed, Service

log = logging.getLogger("nanovllm_jax")

# Paths that need no key: they tell of no request, and start none.
OPEN = ("/", "/health", "/metrics", "/version", "/docs", "/openapi.json")
GONE = 499  # the status that servers log for a client that has gone away


@dataclass(frozen=True)
class ServerOptions:
    """What a server allows.

    Attributes:
        served_model_name: the name that clients send.
        api_key: what they must send as a bearer's token; None: nothing.
        max_waiting: completions that may wait beside those that run.
        max_body: most bytes of a request's body.
        timeout: seconds that a request may take; None: any time.
        trust_request_chat_template: whether clients may send chat templates, which are programs.
    """

    served_model_name: str
    api_key: str | None = None
    max_waiting: int = 1024
    max_body: int = 32 << 20
    timeout: float | None = None
    trust_request_chat_template: bool = False


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """Every reply that is an error."""

    error: ErrorDetail


def make_app(
    llm: Engine, options: ServerOptions, on_fault: Callable[[], None] = lambda: None
) -> FastAPI:
    """The application around an engine, which the caller keeps and ends.

    Args:
        on_fault: is called if the engine fails; the server cannot go on then.
    """
    name = options.served_model_name
    metrics = Metrics(llm, name)
    service: Service

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal service
        engine = AsyncEngine(llm, options.max_waiting, on_fault)
        defaults = recommended_sampling(Path(llm.config.model))
        service = app.state.service = Service(
            engine, metrics, name, defaults, options.timeout, options.trust_request_chat_template
        )
        yield
        engine.close()

    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "The request is wrong, or there are too many"},
        "5XX": {"model": ErrorReply, "description": "The server or its engine has failed"},
    }
    app = FastAPI(
        title="nanovllm_jax", version=__version__, lifespan=lifespan, redoc_url=None,
        responses=errors,
    )  # fmt: skip
    events: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
    _tell_errors(app)

    @app.post("/v1/completions", responses=events)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue texts."""
        return await TextReply(service, body).respond(http, stream=body.stream)

    @app.post("/v1/chat/completions", responses=events)
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a conversation."""
        return await ChatReply(service, body).respond(http, stream=body.stream)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to talk with the model."""
        return page_response()

    served = {
        "id": name, "object": "model", "created": now(), "owned_by": "nanovllm_jax",
        "root": str(llm.config.model), "parent": None,
        "max_model_len": llm.config.max_model_len,
    }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served, in a list."""
        return json_response({"object": "list", "data": [served]})

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Response:
        """The model that is served."""
        service.check_model(model)
        return json_response(served)

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Status 200 while the engine works, 503 after it has failed."""
        if fault := service.engine.failure():
            return json_response(error_body(f"the engine has failed: {fault}", 503), 503)
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_text() -> Response:
        """Counts and times, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        """The server's version."""
        return json_response({"version": __version__})

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text or of a conversation."""
        body.check_other_fields()
        token_ids = await service.engine.in_thread(_tokenized, llm, body)
        reply: dict[str, Any] = {"count": len(token_ids), "tokens": token_ids}
        reply["max_model_len"] = llm.config.max_model_len
        if body.return_token_strs and llm.tokenizer is not None:
            reply["token_strs"] = llm.tokenizer.convert_ids_to_tokens(token_ids)
        return json_response(reply)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        body.check_other_fields()
        tokenizer = _tokenizer(llm)
        if wrong := [t for t in body.tokens if not 0 <= t < llm.vocab_size]:
            raise RequestError(f"token {wrong[0]} is not in the vocabulary", "tokens")
        text = await service.engine.in_thread(tokenizer.decode, body.tokens)
        return json_response({"prompt": str(text)})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What the model's tokenizer is."""
        tokenizer = _tokenizer(llm)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        info = {n: None if (t := getattr(tokenizer, n)) is None else str(t) for n in names}
        info |= {"tokenizer_class": type(tokenizer).__name__}
        return json_response(info | {"chat_template": tokenizer.chat_template})

    @app.post("/reset_prefix_cache", response_class=Response)
    async def reset_prefix_cache() -> Response:
        """Forget all cached prefixes."""
        await service.engine.in_thread(llm.reset_prefix_cache)
        return Response()

    app.add_middleware(_Gate, options=options)  # pyright: ignore[reportArgumentType]
    return app


def _tokenizer(llm: Engine):
    if llm.tokenizer is None:
        raise RequestError("the model has no tokenizer", status=404)
    return llm.tokenizer


def _tokenized(llm: Engine, body: TokenizeRequest) -> list[int]:
    tokenizer = _tokenizer(llm)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", "prompt")
    field = "messages" if body.prompt is None else "prompt"
    try:
        if body.prompt is not None:
            return encode(tokenizer, body.prompt, add_special_tokens=body.add_special_tokens)
        return encode_chat(
            tokenizer, conversation(body.messages or ()),
            add_generation_prompt=body.add_generation_prompt,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RequestError(str(error), field) from error


def _tell_errors(app: FastAPI) -> None:
    """Have every error told as OpenAI's clients read it."""

    def tell(kind: type[Exception], make: Callable[[Any], Response]) -> None:
        async def handler(_: HttpRequest, error: Exception) -> Response:
            return make(error)

        app.add_exception_handler(kind, handler)

    def reply(
        status: int,
        error: object,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        return json_response(error_body(str(error), status, param), status, **(headers or {}))

    def invalid(error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return reply(400, f"the body is not JSON: {first['ctx']['error']}")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{place}: {first['msg']}" if place else first["msg"]
        return reply(400, message, place or None)

    tell(RequestValidationError, invalid)
    tell(RequestError, lambda e: reply(e.status, e, e.param))
    tell(HTTPException, lambda e: reply(e.status_code, e.detail, headers=e.headers))
    tell(QueueFull, lambda e: reply(429, e, headers={"Retry-After": "1"}))
    tell(EngineFault, lambda e: reply(e.status, e))
    tell(RequestFailed, lambda e: reply(500, e))
    tell(Disconnected, lambda e: Response(status_code=GONE))
    tell(TimeoutError, lambda e: reply(504, "the request took too long"))
    tell(Exception, lambda e: reply(500, "the server has failed; its log says why"))


class _Gate:
    """What comes before every route: the key, the size of the body, and the request's id."""

    def __init__(self, app, options: ServerOptions):
        self._app, self._options = app, options

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope["path"], headers):
            await refusal(scope, receive, send)
            return
        request_id, received = headers.get(b"x-request-id"), 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._options.max_body:
                raise _too_large(self._options.max_body)
            return message

        async def identified(message) -> None:
            if message["type"] == "http.response.start" and request_id:
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, counted, identified)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        key = self._options.api_key
        if key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                what = "the key is wrong" if given else "send the key as Authorization: Bearer KEY"
                return json_response(error_body(what, 401), 401, **{"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._options.max_body:
            error = _too_large(self._options.max_body)
            return json_response(error_body(error.detail, 413), 413)
        return None


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {most} bytes")
