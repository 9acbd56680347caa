"""The results of a comparison: typed records, one JSON line each, and what they add up to."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.options import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The options that one call of the command ran with."""

    date: str
    model: str  # its title in the report
    parameters: int
    dtype: str
    device: str  # "gpu" or "cpu"
    engines: list[str]
    rounds: int
    runs: int
    temperature: float
    bandwidth_tb_s: float | None
    peak_tflop_s: float | None
    scale: dict[str, Any]


class Added(Settings):
    """The options of a later call, which added engines to the results."""


@dataclass(frozen=True)
class Machine:
    """The machine that the engines ran on."""

    system: str
    python: str
    cpu: str
    cores: int
    gpu: str | None
    load_at_the_start: float  # processes that want to run, those of others included
    driver: str | None


@dataclass(frozen=True)
class Task:
    """What a workload asks of every engine, and the least that its main part moves and computes."""

    name: str
    title: str
    requests: int
    longest_output: int
    prompt_tokens: int
    output_tokens: int
    rate: float  # requests a second; 0: all at once
    bytes: float
    operations: float


@dataclass(frozen=True)
class _Event:
    engine: str
    round: int


@dataclass(frozen=True)
class Absent(_Event):
    """An engine that is not installed."""

    missing: list[str]  # modules
    install: str


@dataclass(frozen=True)
class Start(_Event):
    """An engine that has started in its process."""

    start_s: float
    versions: dict[str, str]
    note: str


@dataclass(frozen=True)
class Check(_Event):
    """An engine's greedy completions of a few prompts, before anything is timed."""

    tokens: list[list[int]]


@dataclass(frozen=True)
class Run(_Event):
    """One timed run of a workload."""

    workload: str
    run: int
    seconds: dict[str, float]  # each part's, the main one first
    digest: str
    joules: float | None
    ttft_s: list[float] = field(default_factory=list)  # each request's, if they arrived over time
    tpot_s: list[float] = field(default_factory=list)  # the same, of more than one output token


@dataclass(frozen=True)
class Profile(_Event):
    """Where the time of one more run of a workload went."""

    workload: str
    seconds: dict[str, float]  # by category
    idle: float | None  # seconds without a kernel; None on a CPU
    unit: str  # what was summed
    top: list[tuple[str, str, float]]  # name, category and seconds of what took longest


@dataclass(frozen=True)
class Skip(_Event):
    """A workload that an engine was not given."""

    workload: str
    reason: str


@dataclass(frozen=True)
class Failure(_Event):
    """A workload that failed; with None the engine."""

    workload: str | None
    reason: str


KINDS = {
    "settings": Settings, "added": Added, "machine": Machine, "workload": Task, "absent": Absent,
    "engine": Start, "check": Check, "run": Run, "profile": Profile, "skip": Skip,
    "failure": Failure,
}  # fmt: skip
Record = (
    Settings | Added | Machine | Task | Absent | Start | Check | Run | Profile | Skip | Failure
)  # fmt: skip


def append(path: Path, *records: Record) -> None:
    """Add records to a file, which is closed at once: they are kept whatever happens next."""
    names = {kind: name for name, kind in KINDS.items()}
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({"kind": names[type(record)], **asdict(record)}) + "\n")


def read(path: Path) -> list[Record]:
    """Read the records of a file, one a line.

    Raises:
        UsageError: a line is no record; the message names it.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = {key.replace(" ", "_"): value for key, value in json.loads(line).items()}
            records.append(KINDS[fields.pop("kind")](**fields))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path}, line {number} is no result: {line[:60]!r}") from None
    return records


def number(value: float) -> str:
    """Format a number with three digits or more, thousands separated."""
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def percentile(values: Iterable[float], p: float) -> float:
    """Return the p-th percentile, linear between the values around it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Row:
    """A row of the table of figures: one value a run, of the engines that have any."""

    title: str
    more_is_better: bool
    values: dict[str, list[float]]


class Results:
    """The records of one comparison, by what they are.

    Raises:
        UsageError: the records are not of one comparison, or of unequal work.
    """

    def __init__(self, records: Sequence[Record]):
        def all_of(kind: type[T]) -> list[T]:
            return [r for r in records if type(r) is kind]

        for kind in (Settings, Machine):
            if (count := len(all_of(kind))) != 1:
                name = kind.__name__.lower()
                raise UsageError(f"the results have {count} lines of {name!r}, not one")
        [self.settings], [self.machine] = all_of(Settings), all_of(Machine)
        self.added = all_of(Added)
        self.tasks = {task.name: task for task in all_of(Task)}
        self.starts = {name: [s for s in all_of(Start) if s.engine == name] for name in ENGINES}
        self.engines = [name for name in ENGINES if self.starts[name]]
        self.absent = {a.engine: a for a in all_of(Absent) if a.engine not in self.engines}
        self.problems: list[Skip | Failure] = [*all_of(Skip), *all_of(Failure)]
        self.profiles = {p.engine: p for p in all_of(Profile)}
        self.checks = {c.engine: c.tokens for c in reversed(all_of(Check))}
        self._runs = all_of(Run)
        for name in self.tasks:
            if len({run.digest for run in self._runs if run.workload == name}) > 1:
                raise UsageError(f"{name}: the engines were given different work")

    def of(self, engine: str, workload: str) -> list[Run]:
        """Return the timed runs of one engine on one workload."""
        return [r for r in self._runs if (r.engine, r.workload) == (engine, workload)]

    def seconds(self, engine: str, workload: str, part: str | None = None) -> list[float]:
        """Return the seconds of each run: of one part, or of the main one."""
        runs = self.of(engine, workload)
        return [r.seconds[part or next(iter(r.seconds))] for r in runs]

    def output_rates(self, engine: str, workload: str) -> list[float]:
        """Return the output tokens a second of each run."""
        return [self.tasks[workload].output_tokens / s for s in self.seconds(engine, workload)]

    def input_rates(self, engine: str, workload: str) -> list[float]:
        """Return the prompt tokens a second of each run."""
        return [self.tasks[workload].prompt_tokens / s for s in self.seconds(engine, workload)]

    def first_ms(self, engine: str, workload: str) -> list[float]:
        """Return the milliseconds to the first token, of each run of a batch."""
        return [1e3 * s for s in self.seconds(engine, workload, "first")]

    def per_token_ms(self, engine: str, workload: str) -> list[float]:
        """Return the milliseconds a token after the first, of each run of a batch."""
        return [
            1e3
            * (r.seconds["whole"] - r.seconds["first"])
            / (self.tasks[workload].longest_output - 1)
            for r in self.of(engine, workload)
        ]

    def joules_per_token(self, engine: str, workload: str) -> list[float]:
        """Return the joules an output token, of the runs that took at least half a second."""
        return [
            r.joules / self.tasks[workload].output_tokens
            for r in self.of(engine, workload)
            if r.joules is not None and sum(r.seconds.values()) > 0.5
        ]

    def arrivals_ms(self, engine: str, what: str) -> list[float]:
        """Return `ttft_s` or `tpot_s` of all requests of all runs of the stream, in milliseconds."""
        return [1e3 * s for run in self.of(engine, "stream") for s in getattr(run, what)]

    def arrivals_median_ms(self, engine: str, what: str) -> list[float]:
        """Return the median of `ttft_s` or `tpot_s` of each run of the stream, in milliseconds."""
        runs = [getattr(run, what) for run in self.of(engine, "stream")]
        return [1e3 * statistics.median(seconds) for seconds in runs if seconds]

    def batches(self) -> list[int]:
        """Return the sizes of the batch workloads."""
        return [int(n.removeprefix("batch")) for n in self.tasks if n.startswith("batch")]

    def by_engine(self, values: Callable[..., list[float]], *where: str) -> dict[str, list[float]]:
        """Return `values(engine, *where)` of each engine that has any."""
        return {e: found for e in self.engines if (found := values(e, *where))}

    def figures(self) -> list[Row]:
        """Return the rows of the table of figures that have values."""
        rows = []

        def add(title: str, more: bool, values: Callable[..., list[float]], *where: str) -> None:
            if found := self.by_engine(values, *where):
                rows.append(Row(title, more, found))

        add("bench, output tok/s", True, self.output_rates, "bench")
        for size in self.batches():
            name = f"batch{size}"
            add(f"batch {size}, output tok/s", True, self.output_rates, name)
            add(f"batch {size}, ms a token", False, self.per_token_ms, name)
            add(f"batch {size}, ms to the first token", False, self.first_ms, name)
        add("prefill, input tok/s", True, self.input_rates, "prefill")
        add("shared prefix, s", False, self.seconds, "prefix", "shared")
        add("the same without sharing, s", False, self.seconds, "prefix", "own")
        add("arrivals, median ms to the first token", False, self.arrivals_median_ms, "ttft_s")
        add("arrivals, median ms a token", False, self.arrivals_median_ms, "tpot_s")
        for name in ("bench", "batch64"):
            add(f"{name}, joules an output token", False, self.joules_per_token, name)
        add("start with imports, s", False, lambda e: [s.start_s for s in self.starts[e]])
        return rows
