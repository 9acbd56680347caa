"""`nanovllm-jax serve`: an OpenAI-compatible server."""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, refusals

if TYPE_CHECKING:
    from nanovllm_jax.server.app import ServerOptions

# Requests that run at the same time on a CPU, which starts sooner with few and small programs.
CPU_MAX_NUM_SEQS = 8
# Tokens of a step on a GPU while prompts wait, those of requests that decode among them.
CHUNK = 2048

KEY = "NANOVLLM_JAX_API_KEY"  # The environment variable of the clients' key.
# Seconds that clients have to take the errors of requests that were cut off at the server's end.
FAREWELL = 2

log = logging.getLogger("nanovllm_jax")


def main(argv: Sequence[str]) -> int:
    """Serve until a signal ends it; the exit status is 1 if the engine has failed."""
    args = parse(argv)
    try:
        import uvicorn

        from nanovllm_jax.server.app import make_app
        from nanovllm_jax.server.engine_process import EngineProcess
        from nanovllm_jax.server.threads import keep_threads_short_of_waiting
    except ImportError as error:
        raise UsageError(f'serve needs {error.name}: pip install "nanovllm-jax[server]"') from error
    _check_free(args.host, args.port)
    with refusals(*options.ENGINE_ERRORS):
        given = completed(options.engine_options(args), args.model)
        engine = EngineProcess(args.model, **given)
    log.setLevel(logging.INFO)
    warn_of_strangers(args)
    server: uvicorn.Server

    def stop() -> None:
        server.should_exit = True

    app = make_app(engine, server_options(args), on_fault=stop)
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=args.shutdown_timeout + FAREWELL, timeout_keep_alive=75,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # Its own handlers end the process by the signal, after everything has been done.
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    keep_threads_short_of_waiting()
    with engine:
        asyncio.run(_serve(server, args.host, args.shutdown_timeout))
        failed = not server.started or app.state.service.engine.fault is not None
    return int(failed)


def completed(given: dict[str, Any], model: Path) -> dict[str, Any]:
    """The engine's options that the user has given, and for others what suits a server."""
    from nanovllm_jax.config import EngineConfig
    from nanovllm_jax.engine import cuda_driver

    if not cuda_driver.total_memory():
        return options.small_steps(model, given, CPU_MAX_NUM_SEQS)
    most = given.get("max_num_batched_tokens", EngineConfig.max_num_batched_tokens)
    return {"enable_mixed_chunk": True, "chunked_prefill_size": min(CHUNK, most)} | given


async def _serve(server, host: str, drain: float) -> None:
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        server.handle_exit(number, None)
        loop.call_later(drain, lambda: server.config.app.state.service.engine.stop())

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    serving = asyncio.ensure_future(server.serve())
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        for bound in server.servers:
            port = bound.sockets[0].getsockname()[1]
            log.info("serving on http://%s:%d, with its API at /docs", host, port)
    await serving


def warn_of_strangers(args: argparse.Namespace) -> None:
    """Log a warning if other machines reach the server and need no key."""
    if args.api_key is None and not _is_loopback(args.host):
        log.warning(
            "%s is reachable from other machines, and there is no --api-key: whoever reaches it "
            "can use it",
            args.host,
        )


def _check_free(host: str, port: int) -> None:
    """Raise UsageError if nothing can listen there: sooner than after the model has been loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; UsageError if it is wrong."""
    description = "Serve a model to clients of OpenAI's API."
    parser = options.Parser(prog="nanovllm-jax serve", description=description)
    add_server_options(parser)
    args = parser.parse_args(argv)
    check_server_options(args)
    return args


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of a server and of its engine."""
    add = parser.add_argument
    model = "Hugging Face style model directory (default: the small demo model shipped here)"
    add("--model", type=Path, default=options.DEMO_MODEL, metavar="DIR", help=model)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    key = f"what clients must send (default: ${KEY}, which other users of the machine cannot see)"
    add("--api-key", metavar="KEY", default=os.environ.get(KEY), help=key)
    name = "the model's name for clients (default: its directory's)"
    add("--served-model-name", metavar="NAME", help=name)
    waiting = "completions that may wait beside those that run; more get status 429"
    add("--max-waiting", type=int, default=1024, metavar="N", help=f"{waiting} (%(default)s)")
    body = "largest body of a request in MiB (%(default)s)"
    add("--max-body-mib", type=int, default=32, metavar="N", help=body)
    add("--timeout", type=float, metavar="SECONDS", help="that a request may take; default: any")
    trust = "let clients send chat_template: a program, which may take all time and memory"
    add("--trust-request-chat-template", action="store_true", help=trust)
    drain = "time for requests under way after SIGTERM (%(default)s)"
    add("--shutdown-timeout", type=int, default=30, metavar="SECONDS", help=drain)
    options.add_engine_options(parser)


def check_server_options(args: argparse.Namespace) -> None:
    """Raise UsageError if an option of the server is wrong."""
    options.check_positive(args, "max_body_mib", "timeout")
    options.check_positive(args, "max_waiting", "shutdown_timeout", "port", at_least=0)


def server_options(args: argparse.Namespace) -> "ServerOptions":
    """What the server allows, as the command line says."""
    from nanovllm_jax.server.app import ServerOptions

    return ServerOptions(
        args.served_model_name or args.model.resolve().name, args.api_key, args.max_waiting,
        args.max_body_mib << 20, args.timeout, args.trust_request_chat_template,
    )  # fmt: skip
