"""Run a server's command so that it cannot outlive the comparison.

    python -m nanovllm_jax.tools.compare.serving.guard COMMAND ARGUMENT ...

The guard leads a process group, which is killed when its standard input ends: that happens in
whichever way the comparison ends. SIGTERM is passed on, so that the server can stop by itself.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence

from nanovllm_jax.tools.compare.worker import end_with_parent


def main(command: Sequence[str]) -> int:
    """Run the command; return its exit status, 128 and more if a signal ended it."""
    end_with_parent()
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
