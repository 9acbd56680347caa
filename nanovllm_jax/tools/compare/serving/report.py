"""The report of a sweep: a Markdown page with tables, and plots of latency against rate."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nanovllm_jax.tools.compare import plots, results
from nanovllm_jax.tools.compare.results import Machine, number
from nanovllm_jax.tools.compare.serving import records, servers
from nanovllm_jax.tools.compare.serving.figures import Slo, goodput, percentile
from nanovllm_jax.tools.compare.serving.records import (
    Point,
    ServerAbsent,
    ServerFailure,
    Started,
    SweepSettings,
)
from nanovllm_jax.tools.options import UsageError

T = TypeVar("T")

# Milliseconds by which the client may be late, at its 99th percentile, without a note.
LATE_MS = 5.0
LABELS = {"nanovllm_jax": "nanovllm_jax", "vllm": "vLLM"}


class Sweep:
    """The records of a sweep, by what they are.

    Raises:
        UsageError: they are not of one sweep, or the servers were given different loads.
    """

    def __init__(self, found: Sequence[Any]):
        def all_of(kind: type[T]) -> list[T]:
            return [record for record in found if type(record) is kind]

        for kind in (SweepSettings, Machine):
            if (count := len(all_of(kind))) != 1:
                raise UsageError(f"the results have {count} lines of {kind.__name__}, not one")
        [self.settings], [self.machine] = all_of(SweepSettings), all_of(Machine)
        self.started = {record.server: record for record in all_of(Started)}
        self.failures = all_of(ServerFailure)
        absent = {record.server: record for record in all_of(ServerAbsent)}
        self.absent = [a for name, a in absent.items() if name not in self.started]
        points = all_of(Point)
        self.points = {
            name: sorted((p for p in points if p.server == name), key=lambda p: p.rate)
            for name in self.started
        }
        for rate in self.settings.rates:
            digests = {
                (self.started[p.server].takes_ids, p.digest) for p in points if p.rate == rate
            }
            if len(digests) > len({takes_ids for takes_ids, _ in digests}):
                raise UsageError(f"{rate:g} requests/s: the servers were given different loads")

    def title(self) -> str:
        """The model and the machine."""
        machine = self.machine
        return f"{self.settings.model} on {machine.gpu or f'{machine.cpu}, {machine.cores} cores'}"


def label(name: str) -> str:
    """A server's name in the report."""
    return LABELS.get(name, name)


def triple(values: Sequence[float | None] | dict[str, float | None]) -> str:
    """p50, p90 and p99 in a cell."""
    if isinstance(values, dict):
        found = [values[f"p{percent}"] for percent in (50, 90, 99)]
    else:
        found = [percentile(values, percent) for percent in (50, 90, 99)]
    return " / ".join("∞" if value is None else number(value) for value in found)


def markdown(sweep: Sweep, slo: Slo) -> str:
    """The whole page."""
    settings, machine = sweep.settings, sweep.machine
    prompt, output = settings.prompt_tokens, settings.output_tokens
    lines = [
        f"# Serving {sweep.title()}",
        "",
        f"{settings.date[:10]}; Poisson arrivals for {settings.seconds:g} s at each rate; prompts "
        f"of {prompt[0]} to {prompt[1]} tokens, outputs of {output[0]} to {output[1]}, both "
        f"uniform; temperature {settings.temperature:g}; at most {settings.max_num_seqs} requests "
        "run at a time.",
        "",
        *_table(*_summary(sweep, slo)),
        "",
        "Times are p50 / p90 / p99 in ms. A request that failed counts as ∞.",
    ]
    for name, points in sweep.points.items():
        lines += ["", f"## {label(name)}", "", *_table(*_rates(points, slo, settings.seconds))]
        lines += [*_notes(sweep.started[name], points)]
    if sweep.failures or sweep.absent:
        lines += ["", "## Not measured", ""]
        lines += [f"- {label(f.server)}: {f.reason}" for f in sweep.failures]
        lines += [
            f"- {label(a.server)} is not installed (pip install {a.install})" for a in sweep.absent
        ]
    lines += ["", "## Servers and machine", ""]
    for name, started in sweep.started.items():
        how = f"`{started.command}`" if started.command else f"ran already at {started.url}"
        took = f", answered after {started.start_s:g} s" if started.start_s is not None else ""
        version = f" {started.version}" if started.version else ""
        lines += [f"- {label(name)}{version}: {how}{took}"]
    told = [f"{key.replace('_', ' ')} {value}" for key, value in vars(machine).items() if value]
    lines += [f"- {', '.join(told)}", f"- client: {settings.clients} process(es)", ""]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _summary(sweep: Sweep, slo: Slo) -> tuple[list[str], list[list[str]]]:
    """One line a server: how far it goes."""
    head = ["", "highest rate kept up with", "TTFT there, ms", "ITL there, ms",
            "most output tok/s", f"best goodput ({slo}), req/s"]  # fmt: skip
    rows = []
    for name, points in sweep.points.items():
        kept = [p for p in points if not p.is_saturated]
        rows.append([
            label(name),
            f"{kept[-1].rate:g} req/s" if kept else "none",
            triple(kept[-1].ttft_ms) if kept else "",
            triple(kept[-1].itl_ms) if kept else "",
            number(max((p.output_tok_s for p in points), default=0.0)),
            number(max((goodput(p, slo, sweep.settings.seconds) for p in points), default=0.0)),
        ])  # fmt: skip
    return head, rows


def _rates(points: list[Point], slo: Slo, seconds: float) -> tuple[list[str], list[list[str]]]:
    """One line a rate."""
    head = ["req/s", "requests", "failed", "output tok/s", "TTFT", "TPOT", "ITL", "E2E",
            f"goodput ({slo})", "client late by, p99", ""]  # fmt: skip
    rows = [
        [
            f"{p.rate:g}", f"{len(p.ttft_ms)}", f"{sum(p.failures.values())}",
            number(p.output_tok_s), triple(p.ttft_ms), triple(p.tpot_ms), triple(p.itl_ms),
            triple(p.e2e_ms), number(goodput(p, slo, seconds)), f"{_late(p):.1f}",
            "saturated" if p.is_saturated else "",
        ]
        for p in points
    ]  # fmt: skip
    return head, rows


def _late(point: Point) -> float:
    """How late the client was, in ms: in sending, or in coming back to its streams."""
    return max(point.lag_ms["p99"] or 0.0, point.beat_ms["p99"] or 0.0)


def _notes(started: Started, points: list[Point]) -> list[str]:
    """What a reader has to know of a server's figures."""
    notes = [
        f"{p.rate:g} req/s: {count} failed: {reason}"
        for p in points
        for reason, count in p.failures.items()
    ]
    sizes = [p.tokens_a_chunk for p in points]
    if sizes and max(sizes) > 1.01:
        notes.append(
            f"chunks have {min(sizes):.2f} to {max(sizes):.2f} tokens on average: ITL is the time "
            "between chunks, TPOT the time a token"
        )
    if late := [p for p in points if _late(p) > LATE_MS]:
        rates = ", ".join(f"{p.rate:g}" for p in late)
        notes.append(
            f"the client itself was late by up to {max(map(_late, late)):.1f} ms (p99) at {rates} "
            f"req/s, its processor at most {max(p.cpu_share for p in late):.0%} busy"
        )
    if not started.takes_ids and points:
        notes.append(
            f"prompts were texts (mean {points[0].prompt_tokens:g} tokens), and an answer may end "
            "before its length"
        )
    return ["", *(f"- {note}" for note in notes)] if notes else []


def figure(sweep: Sweep, slo: Slo) -> Any:
    """Draw latencies, throughput and goodput against the rate."""
    plt = plots.pyplot()
    drawn = plt.figure(figsize=(10.4, 6.6), layout="constrained")
    axes = list(drawn.subplots(2, 3).flat)
    times = {"Time to the first token": "ttft_ms", "Time per output token": "tpot_ms",
             "Inter-token latency": "itl_ms", "End to end": "e2e_ms"}  # fmt: skip
    totals = {
        ("Throughput", "output tok/s"): lambda point: point.output_tok_s,
        ("Goodput", "req/s within limits"): lambda p: goodput(p, slo, sweep.settings.seconds),
    }
    colors = {name: servers.color(name, i) for i, name in enumerate(sweep.points)}
    styles = {99: "-", 50: ":"}
    for ax, (title, attribute) in zip(axes, times.items(), strict=False):
        for name, points in sweep.points.items():
            for percent, style in styles.items():
                found = {p.rate: _percentile(getattr(p, attribute), percent) for p in points}
                known = {rate: value for rate, value in found.items() if value}  # not infinite
                ax.plot([*known], [*known.values()], f"o{style}", ms=3.5, color=colors[name])
        ax.set(title=title, yscale="log", ylabel="ms")
        plots.logarithmic(ax.yaxis)
    for ax, ((title, unit), value) in zip(axes[len(times) :], totals.items(), strict=True):
        for name, points in sweep.points.items():
            rates = [point.rate for point in points]
            ax.plot(rates, [*map(value, points)], "o-", ms=3.5, color=colors[name])
        ax.set(title=title, ylabel=unit, ylim=(0, None))
    for ax in axes:
        rates = sweep.settings.rates
        ax.set(xscale="log", xlabel="requests a second")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        ax.xaxis.set_minor_locator(plt.NullLocator())
        ax.grid()
    line = partial(plt.Line2D, [], [])
    handles = [line(color=color, marker="o", label=label(name)) for name, color in colors.items()]
    handles += [line(color="#444444", ls=ls, label=f"p{percent}") for percent, ls in styles.items()]
    drawn.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    title = f"{sweep.title()}; limits of goodput: {slo}"
    drawn.suptitle(title, fontsize=11, x=0.01, ha="left")
    return drawn


def _percentile(values: list[float | None] | dict[str, float | None], percent: int) -> float | None:
    return values[f"p{percent}"] if isinstance(values, dict) else percentile(values, percent)


def write(sweep: Sweep, slo: Slo, base: Path) -> list[Path]:
    """Write NAME.md and NAME.png; returns them."""
    page, picture = Path(f"{base}.md"), Path(f"{base}.png")
    page.write_text(markdown(sweep, slo), encoding="utf-8")
    with plots.pyplot().style.context(plots.STYLE):
        drawn = figure(sweep, slo)
        drawn.savefig(picture, dpi=120)
        plots.pyplot().close(drawn)
    return [page, picture]


def read(path: Path) -> Sweep:
    """Read the sweep of a file; raises UsageError if it is none."""
    return Sweep(results.read(path, records.KINDS))
