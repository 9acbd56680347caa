"""Pace: whether the device takes one decode step in a call, or several."""

import contextlib
import time
from collections.abc import Iterator

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.scheduler import Batch

# The host's load up to which the device takes one decode step in a call. Above, a host that is late
# now and then leaves a GPU idle; and a CPU is both host and device.
MOST_LOAD = {"cpu": 0.0, "gpu": 0.75}
MEMORY = 8  # Calls over which the load is averaged.


class Pace:
    """Measures the host's load: what it takes for a call of one decode step, over the step's time.

    Several steps in a call divide the load by their number. But their tokens come together, and a
    newcomer waits for whole calls; so calls are short if the host is quick enough.
    """

    def __init__(self, config: EngineConfig, platform: str):
        self.most = 1 if config.enforce_eager else config.num_scheduler_steps
        self.most_load = MOST_LOAD[platform]
        self.load = 1.0  # until it has been measured
        self._dispatching = 0.0  # seconds that dispatching has taken since the last call was read
        self._last_read: float | None = None  # when that was, if it was a decode

    @property
    def num_steps(self) -> int:
        """The decode steps that the next call should take."""
        return self.most if self.load > self.most_load else 1

    @contextlib.contextmanager
    def dispatching(self) -> Iterator[None]:
        """Time what the host does once for a call."""
        began = time.perf_counter()
        yield
        self._dispatching += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self, batch: Batch) -> Iterator[None]:
        """Time how long the host waits for a batch; all other time is its own work."""
        began = time.perf_counter()
        yield
        end = time.perf_counter()
        if self._last_read is not None and not batch.is_prefill:
            elapsed = end - self._last_read
            for_steps = elapsed - (end - began) - self._dispatching
            load = (batch.num_steps * self._dispatching + for_steps) / elapsed
            self.load += (load - self.load) / MEMORY
        self._last_read, self._dispatching = None if batch.is_prefill else end, 0.0
