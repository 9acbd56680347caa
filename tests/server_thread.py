"""Servers in a thread of the test's process, so that the test can look into what they serve."""

import asyncio
import contextlib
import threading

import uvicorn

from nanovllm_jax.server.app import ServerOptions, make_app


@contextlib.contextmanager
def running(app):
    """Run an ASGI application; yields its address."""
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # those are the main thread's
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def serving(llm, **options):
    """Serve an engine; yields the server's address."""
    return running(make_app(llm, ServerOptions("demo", **options)))
