"""Metrics for Prometheus, under the names that vLLM gives them, so that its dashboards fit."""

import bisect
import itertools
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanovllm_jax.engine.request import Request
from nanovllm_jax.outputs import CompletionOutput
from nanovllm_jax.server.async_engine import Engine

# Upper bounds of the histograms' buckets, in seconds.
FIRST_TOKEN = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40,
)  # fmt: skip
EACH_TOKEN = (
    .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5,
)  # fmt: skip
WHOLE = (.1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)  # fmt: skip


class Metrics:
    """Counts and times of one server.

    Args:
        model: the label of all values.
    """

    def __init__(self, llm: Engine, model: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(llm, model))

        def make(kind, name: str, text: str, **options):
            metric = kind(f"vllm:{name}", text, ["model_name"], registry=self._registry, **options)
            return metric.labels(model)

        self._prompt = make(Counter, "prompt_tokens", "Tokens of prompts.")
        self._generated = make(Counter, "generation_tokens", "Tokens that were generated.")

        def times(name: str, text: str, bounds: tuple[float, ...]) -> Times:
            metric = Times(f"vllm:{name}_seconds", text, bounds, model)
            self._registry.register(metric)
            return metric

        self._first = times("time_to_first_token", "Time to a request's first token.", FIRST_TOKEN)
        self._each = times("inter_token_latency", "Time between tokens.", EACH_TOKEN)
        self._whole = times("e2e_request_latency", "Time from a request to its end.", WHOLE)
        self._success: Any = Counter(
            "vllm:request_success", "Requests that have ended.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._model = model

    def observing(self, request: Request) -> "Observed":
        """A request that is noted from here on."""
        self._prompt.inc(len(request.command.token_ids))
        return Observed(self, request.command.params.n)

    def text(self) -> bytes:
        """All values in Prometheus' format."""
        return generate_latest(self._registry)


class Times(Collector):
    """A histogram for the event loop alone, without the locks of prometheus_client's own.

    Every chunk of every stream passes here.

    Args:
        bounds: upper bounds of the buckets, in seconds, ascending.
    """

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], model: str):
        self._name, self._text, self._bounds, self._model = name, text, bounds, model
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Note a time that was seen `count` times."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The histogram, for the registry."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        totals = itertools.accumulate(self._counts)
        family.add_metric([self._model], list(zip(bounds, totals, strict=True)), self._sum)
        yield family


class Observed:
    """One request's times, as the server sees them."""

    def __init__(self, metrics: Metrics, num_left: int):
        self._metrics, self._num_left = metrics, num_left
        self._start = self._last = time.perf_counter()
        self._has_begun = False

    def note(self, news: Iterable[CompletionOutput]) -> None:
        """Note what a request has got."""
        m, now = self._metrics, time.perf_counter()
        count = most = 0
        for part in news:
            count, most = count + len(part.token_ids), max(most, len(part.token_ids))
            if part.finish_reason is not None:
                self._num_left -= 1
                m._success.labels(m._model, part.finish_reason).inc()
        if count:
            m._generated.inc(count)
            if self._has_begun:
                m._each.observe((now - self._last) / most, most)
            else:
                m._first.observe(now - self._start)
            self._has_begun, self._last = True, now
        if not self._num_left:
            m._whole.observe(now - self._start)


class _EngineCollector(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, llm: Engine, model: str):
        self._llm, self._model = llm, model

    def collect(self):
        stats = self._llm.stats()
        gauges = {
            "num_requests_running": ("Sequences that decode.", stats.running),
            "num_requests_waiting": ("Sequences that wait for their prefill.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 1 is all.", stats.cache_usage),
        }
        counters = {
            "num_preemptions": ("Sequences that were put back.", stats.preemptions),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", stats.prefix_hits),
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in values.items():
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
