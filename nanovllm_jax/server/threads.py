"""How Python shares its time between the threads of a process that serves."""

import gc
import sys

SWITCH_INTERVAL = 0.0005  # Seconds that a thread of Python keeps another waiting; 0.005 is usual.


def keep_threads_short_of_waiting() -> None:
    """Set Python up for threads that are waited for; for the whole process.

    A full garbage collection looks at every object that JAX and the model's files have left, which
    holds all streams up for half a second; frozen ones are looked at no more. And a thread that
    wants Python back after a call of the device waits for the other one's switch interval.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL)
