"""Service: what the routes share, and how a request of a client becomes requests of the engine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.outputs import CompletionOutput
from nanovllm_jax.server.async_engine import AsyncEngine, EngineFault, Group
from nanovllm_jax.server.metrics import Metrics
from nanovllm_jax.server.protocol import RequestError, field_of
from nanovllm_jax.server.replies import DONE, EventStream, error_body, event, json_response

log = logging.getLogger("nanovllm_jax")

T = TypeVar("T")


class Disconnected(Exception):
    """The client has gone away; nobody reads the reply."""


class RequestFailed(Exception):
    """A request has ended with an error of the engine."""


@dataclass
class Service:
    """The engine behind the routes.

    Attributes:
        model: the name under which the model is served.
        defaults: sampling options that the model's makers recommend.
        timeout: seconds that a request may take; None for any time.
        trusts_templates: whether clients may send chat templates.
    """

    engine: AsyncEngine
    metrics: Metrics
    model: str
    defaults: dict[str, Any]
    timeout: float | None = None
    trusts_templates: bool = False

    def check_model(self, model: str | None) -> None:
        """Raise RequestError if another model is asked for."""
        if model not in (None, "", self.model):
            raise RequestError(
                f"the model {model!r} does not exist; this server has {self.model!r}", "model", 404
            )

    async def start(
        self, group: Group, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[Request]:
        """Start a request for each prompt; RequestError if one of them could never run."""
        requests = []
        for i, prompt in enumerate(prompts):
            try:
                requests.append(await group.start(prompt, params))
            except (TypeError, ValueError) as error:
                where = f"prompt[{i}]: " if len(prompts) > 1 else ""
                field = field_of(str(error)) or "prompt"
                raise RequestError(f"{where}{error}", field) from error
        return requests

    async def parts(self, group: Group) -> AsyncIterator[tuple[int, CompletionOutput]]:
        """What the group's completions get as it comes, each with the number of its request.

        Raises:
            RequestFailed: one of them has ended with an error of the engine.
            RequestError: one of them has, which an option has led to.
            TimeoutError: they take longer than they may.
        """
        observed = [self.metrics.observing(request) for request in group.requests]
        if self.timeout is not None:
            group.end_after(self.timeout)
        while news := await group.next():
            observed[news.number].note(news.parts)
            for part in news.parts:
                if part.finish_reason == "error":
                    error = group.requests[news.number].seqs[part.index].error or "it has failed"
                    if field := field_of(error):  # a form can be too complex to be followed
                        raise RequestError(error, field)
                    raise RequestFailed(error)
                yield news.number, part


class Reply:
    """The reply to one request of a client; each kind of completion has one of its own."""

    def __init__(self, service: Service, params: SamplingParams, num_prompts: int):
        self.service, self.params, self.num_prompts = service, params, num_prompts

    async def respond(self, http: HttpRequest, *, stream: bool) -> Response:
        """The reply, whole or as a stream of events."""
        with ExitStack() as stack:
            size = self.params.n * self.num_prompts
            group = stack.enter_context(self.service.engine.group(size))
            if self.starts_at_once:  # and needs no tasks
                await self.start(group)
            else:
                await unless_disconnected(http, self.start(group))
            if stream:
                return EventStream(self._told(self.events(group)), stack.pop_all())
            return json_response(await unless_disconnected(http, self.whole(group)))

    @property
    def starts_at_once(self) -> bool:
        """Whether `start` waits for nothing."""
        return False

    async def start(self, group: Group) -> None:
        """Start the engine's requests."""
        raise NotImplementedError

    async def whole(self, group: Group) -> dict[str, Any]:
        """All of the reply."""
        raise NotImplementedError

    def events(self, group: Group) -> AsyncIterator[list[dict[str, Any]]]:
        """The reply's chunks; those that are there at once come, and are sent, together."""
        raise NotImplementedError

    async def _told(self, events: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[bytes]:
        """The chunks as events. After the first byte an error can be told in an event only."""
        try:
            async for chunks in events:
                yield b"".join(map(event, chunks))
        except RequestError as error:
            yield event(error_body(str(error), error.status, error.param))
        except EngineFault as error:
            yield event(error_body(str(error), error.status))
        except TimeoutError:
            yield event(error_body(f"the request took longer than {self.service.timeout} s", 504))
        except Exception as error:
            if not isinstance(error, RequestFailed):
                log.exception("a stream has failed")
            yield event(error_body(str(error), 500))
        yield DONE


def token_by_token(part: CompletionOutput) -> list[CompletionOutput]:
    """A part for each token, because clients count chunks. The last one has all of the text.

    There are several if a call of the device takes several steps. A part with scores, which say to
    what token they belong, stays whole.
    """
    if part.logprobs is not None or len(part.token_ids) < 2:
        return [part]
    *before, last = part.token_ids
    return [CompletionOutput(part.index, "", [t]) for t in before] + [
        replace(part, token_ids=[last])
    ]


async def unless_disconnected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; end it, and raise Disconnected, if the client goes away."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
