"""Sweep servers: start one, warm it up, and raise the rate until it is saturated for good."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm_jax.tools.compare import results
from nanovllm_jax.tools.compare.serving import clients, load, records, servers
from nanovllm_jax.tools.compare.serving.figures import is_saturated, percentile, point
from nanovllm_jax.tools.compare.serving.load import Request
from nanovllm_jax.tools.compare.serving.messages import Answer, ClientJob, ClientResult
from nanovllm_jax.tools.compare.serving.records import (
    Point,
    ServerAbsent,
    ServerFailure,
    Started,
    SweepSettings,
)
from nanovllm_jax.tools.compare.serving.servers import KNOWN, Running, Server, ServerError

WARM_UP_SEED = 12345
WARM_UP = 64  # requests, all at once
WARM_UP_S = 300.0  # seconds that they may take: a server may compile
# Saturation at one rate may be chance, and its queue has only begun to grow: the next rate confirms
# it, and shows what the server does with a full queue.
ENOUGH = 2


def summary(found: Point) -> str:
    """A point in a line, for whoever watches."""

    def shown(values: Sequence[float | None]) -> str:
        value = percentile(values, 99)
        return "∞" if value is None else results.number(value)

    itl = found.itl_ms["p99"]
    return (
        f"{found.rate:g} req/s: {results.number(found.output_tok_s)} output tok/s, p99 TTFT "
        f"{shown(found.ttft_ms)} ms, ITL {results.number(itl) if itl is not None else '∞'} ms, "
        f"{sum(found.failures.values())} of {len(found.ttft_ms)} failed, client late by "
        f"{found.lag_ms['p99']:.1f} ms{', saturated' if found.is_saturated else ''}"
    )


class Sweeper:
    """Measures servers one after another; the results grow as they come.

    Args:
        model: its directory.
        file: to which records are appended.
    """

    def __init__(self, args: argparse.Namespace, settings: SweepSettings, model: Path, file: Path):
        self._args, self._settings, self._model, self._file = args, settings, model, file

    def emit(self, *found: Any) -> None:
        """Append records to the results."""
        results.append(self._file, *found, kinds=records.KINDS)

    def measure(self, server: Server) -> None:
        """Measure one server, as far as it goes; what fails is recorded."""
        known = KNOWN.get(server.name)
        python_path = self._args.python_path.get(server.name)
        # A command that the user gives may run in another interpreter.
        needs = known.needs if known and known.server == server else ()
        if known and (missing := servers.missing_modules(needs, python_path)):
            print(f"{server.name}: not installed ({', '.join(missing)} missing)")
            self.emit(ServerAbsent(server.name, missing, known.install))
            return
        try:
            self._sweep(server, python_path)
        except (ServerError, clients.ClientError) as error:
            print(f"  failure: {error}")
            for line in getattr(error, "tail", ()):
                print(f"    {line}")
            self.emit(ServerFailure(server.name, str(error)))

    def _sweep(self, server: Server, python_path: str | None) -> None:
        """Start a server, warm it up, and raise the rate until it is saturated twice in a row."""
        settings, args = self._settings, self._args
        print(f"{server.name}: starting" if server.command else f"{server.name}: {server.url}")
        values = {
            "python": sys.executable, "model": self._model,
            "load_format": "--load-format dummy" if args.random_weights else "",
            "max_model_len": settings.max_model_len, "max_num_seqs": settings.max_num_seqs,
        }  # fmt: skip
        log = self._file.with_suffix(f".{server.name}.log")
        with servers.running(
            server, values, log, python_path=python_path, on_cpu=settings.device == "cpu",
            start_limit=args.start_limit, api_key=args.api_key,
        ) as there:  # fmt: skip
            self.emit(
                Started(server.name, server.command, server.url, server.takes_ids, there.start_s,
                        there.version)
            )  # fmt: skip
            self._warm_up(server, there)
            in_a_row = 0  # rates at which it is saturated
            for rate in settings.rates:
                found = self._point(server, there, rate)
                self.emit(found)
                print(" ", summary(found), flush=True)
                there.check()
                in_a_row = in_a_row + 1 if found.is_saturated else 0
                if in_a_row == ENOUGH:
                    break

    def _load(self, server: Server, rate: float, seed: int) -> list[Request]:
        """The load of a rate, as texts if the server takes no ids."""
        s = self._settings
        made = load.make(rate, s.seconds, s.prompt_tokens, s.output_tokens, s.vocab_size, seed)
        if server.takes_ids:
            return made
        from nanovllm_jax.tokenizer import load_tokenizer

        if (tokenizer := load_tokenizer(self._model)) is None:
            raise ServerError(f"it takes texts only, and {self._model} has no tokenizer")
        return [replace(r, prompt=str(tokenizer.decode(r.prompt))) for r in made]  # pyright: ignore[reportArgumentType]

    def _warm_up(self, server: Server, there: Running) -> None:
        """Send a burst of requests; raise ServerError if one of them fails."""
        rate = max(self._settings.rates[0], WARM_UP / self._settings.seconds)
        requests = load.burst(WARM_UP, self._load(server, rate, WARM_UP_SEED))
        answers, told = self._send(server, there, requests, WARM_UP_S)
        there.check()
        found = point(
            server.name, rate, WARM_UP_S, requests, answers, told, takes_ids=server.takes_ids
        )
        for reason, count in found.failures.items():
            raise ServerError(f"{count} of {len(requests)} requests of the warm-up: {reason}")

    def _point(self, server: Server, there: Running, rate: float) -> Point:
        """Offer a rate."""
        settings, requests = self._settings, self._load(server, rate, self._settings.seed)
        wait_s = settings.seconds + settings.drain_s
        answers, told = self._send(server, there, requests, wait_s)
        found = point(
            server.name, rate, settings.seconds, requests, answers, told,
            takes_ids=server.takes_ids,
        )  # fmt: skip
        saturated = is_saturated(found, settings.min_share, 1000 * settings.max_ttft_s)
        return replace(found, is_saturated=saturated)

    def _send(
        self, server: Server, there: Running, requests: list[Request], wait_s: float
    ) -> tuple[list[Answer], list[ClientResult]]:
        """Have the client processes send a load; return the answers in the order of requests."""
        fields: dict[str, Any] = {
            "model": there.model, "temperature": self._settings.temperature
        }  # fmt: skip
        if server.takes_ids:
            fields |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        count = min(self._settings.clients, len(requests))
        jobs = [
            ClientJob(there.address, requests[i::count], fields, wait_s, self._args.api_key)
            for i in range(count)
        ]
        found = clients.send(jobs)
        answers: list[Any] = [None] * len(requests)
        for i, client in enumerate(found):
            answers[i::count] = client.answers
        return answers, found
