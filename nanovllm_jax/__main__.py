"""The process of the command `nanovllm-jax`, which is also `python -m nanovllm_jax`.

An interruption (Ctrl-C) ends it at any moment, with status 130. Python's own way does not: it
raises KeyboardInterrupt in the main thread, which comes late while C code runs, turns into other
errors or gets lost in the middle of an import, and then waits for threads that compile.
"""

import os
import select
import signal
from typing import Any

INTERRUPTED = 130  # The status that shells know an interrupted command by.
PATIENCE_S = 10.0  # Seconds that a tool may take to tidy up after an interruption.


def entry() -> None:
    """Run the command line, and end this process with its status."""
    # Nothing slow is imported before this. A job that was started with interruptions ignored, as
    # scripts start those in the background, keeps ignoring them.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        _watch()
    # transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from nanovllm_jax.cli import main

    try:
        os._exit(main(before_tool=_let_it_tidy_up))  # which waits for no thread of an engine
    except KeyboardInterrupt:
        _end()


def _end(*_: Any) -> None:
    """End this process now. Whatever it has printed was flushed."""
    try:
        if select.select([], [2], [], 0)[1]:  # or else writing could wait for a reader
            os.write(2, b"\nnanovllm-jax: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def _let_it_tidy_up() -> None:
    """Let interruptions raise KeyboardInterrupt from now on; a tool stops what it has started."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _watch() -> None:
    """Start a thread that ends this process if the main thread does not.

    Python runs the handler of a signal in the main thread only, after the C code that it is in.
    This thread reads the signal's number from a pipe, as soon as it has come.
    """
    import threading

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def run() -> None:
        while not (count := os.read(reader, 64).count(signal.SIGINT)):
            pass
        tidies_up = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if count == 1:  # wait, or until the next one
            select.select([reader], [], [], PATIENCE_S if tidies_up else 0.1)
        _end()

    threading.Thread(target=run, name="interruptions", daemon=True).start()


if __name__ == "__main__":
    entry()
