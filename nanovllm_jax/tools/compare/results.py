"""The results of a comparison: typed records, one JSON line each, and what they add up to."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
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
class Event:
    """What an engine's process reports."""

    engine: str
    round: int


@dataclass(frozen=True)
class Absent(Event):
    """An engine that is not installed."""

    missing: list[str]  # modules
    install: str


@dataclass(frozen=True)
class Start(Event):
    """An engine that has started in its process."""

    start_s: float
    versions: dict[str, str]
    note: str


@dataclass(frozen=True)
class Check(Event):
    """An engine's greedy completions of a few prompts, before anything is timed."""

    tokens: list[list[int]]


@dataclass(frozen=True)
class Run(Event):
    """One timed run of a workload."""

    workload: str
    run: int
    seconds: dict[str, float]  # each part's, the main one first
    digest: str
    joules: float | None
    ttft_s: list[float] = field(default_factory=list)  # each request's, if they arrived over time
    tpot_s: list[float] = field(default_factory=list)  # the same, of more than one output token

    @property
    def main_s(self) -> float:
        """Seconds of the main part."""
        return next(iter(self.seconds.values()))


@dataclass(frozen=True)
class Profile(Event):
    """Where the time of one more run of a workload went."""

    workload: str
    seconds: dict[str, float]  # by category
    idle: float | None  # seconds without a kernel; None on a CPU
    unit: str  # what was summed
    top: list[tuple[str, str, float]]  # name, category and seconds of what took longest


@dataclass(frozen=True)
class Skip(Event):
    """A workload that an engine was not given."""

    verdict = "not run"
    workload: str | None
    reason: str


class Failure(Skip):
    """A workload that failed; with None the engine."""

    verdict = "failed"


KINDS = {
    "settings": Settings, "added": Added, "machine": Machine, "workload": Task, "absent": Absent,
    "engine": Start, "check": Check, "run": Run, "profile": Profile, "skip": Skip,
    "failure": Failure,
}  # fmt: skip
Record = Settings | Machine | Task | Event


def append(path: Path, *records: Any, kinds: Mapping[str, type[Any]] = KINDS) -> None:
    """Add records to a file, which is closed at once: they are kept whatever happens next."""
    names = {kind: name for name, kind in kinds.items()}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"kind": names[type(r)], **asdict(r)}) + "\n" for r in records)


def read(path: Path, kinds: Mapping[str, type[Any]] = KINDS) -> list[Any]:
    """Read the records of a file; raises UsageError, which names the line that is none."""
    records = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = {key.replace(" ", "_"): value for key, value in json.loads(line).items()}
            records.append(kinds[fields.pop("kind")](**fields))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path}, line {i} is no result: {line[:60]!r}") from None
    return records


def number(value: float) -> str:
    """Format a number with three digits or more, thousands separated."""
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


# Functions that compute a figure from a run; None if it is not known.
METRICS: dict[str, Callable[[Run, Task], float | None]] = {
    "output tok/s": lambda run, task: task.output_tokens / run.main_s,
    "input tok/s": lambda run, task: task.prompt_tokens / run.main_s,
    "TB/s": lambda run, task: task.bytes / run.main_s / 1e12,
    "TFLOP/s": lambda run, task: task.operations / run.main_s / 1e12,
    "ms a token": lambda run, task: (
        1e3 * (run.seconds["whole"] - run.seconds["first"]) / (task.longest_output - 1)
    ),
    "ms to the first token": lambda run, task: 1e3 * run.seconds["first"],
    "s behind one prefix": lambda run, task: run.seconds["shared"],
    "s with a prefix each": lambda run, task: run.seconds["own"],
    "median ms to the first token": lambda run, task: 1e3 * median(run.ttft_s),
    "median ms a token": lambda run, task: 1e3 * median(run.tpot_s) if run.tpot_s else None,
    "joules an output token": lambda run, task: (  # the energy of short runs is not known well
        run.joules / task.output_tokens if run.joules and sum(run.seconds.values()) >= 0.5 else None
    ),
}
BATCH_METRICS = ("output tok/s", "ms a token", "ms to the first token", "joules an output token")
FIGURES = {  # metrics of each workload that is no batch
    "prefill": ("input tok/s",),
    "prefix": ("s behind one prefix", "s with a prefix each"),
    "stream": ("median ms to the first token", "median ms a token"),
    "bench": ("output tok/s", "joules an output token"),
}


class Results:
    """The records of one comparison, by what they are; raises UsageError if they are not of one."""

    def __init__(self, records: Sequence[Record]):
        def all_of(kind: type[T]) -> list[T]:
            return [r for r in records if type(r) is kind]

        for kind in (Settings, Machine):
            if (count := len(all_of(kind))) != 1:
                raise UsageError(f"the results have {count} lines of {kind.__name__}, not one")
        [self.settings], [self.machine] = all_of(Settings), all_of(Machine)
        self.added = all_of(Added)
        self.tasks = {task.name: task for task in all_of(Task)}
        self.batches = [int(n.removeprefix("batch")) for n in self.tasks if n.startswith("batch")]
        self.starts = {name: [s for s in all_of(Start) if s.engine == name] for name in ENGINES}
        self.engines = [name for name in ENGINES if self.starts[name]]
        self.absent = {a.engine: a for a in all_of(Absent) if a.engine not in self.engines}
        self.problems: list[Skip] = [*all_of(Skip), *all_of(Failure)]
        self.profiles = {p.engine: p for p in all_of(Profile)}
        checks = {c.engine: c.tokens for c in reversed(all_of(Check))}
        self.checks = {name: checks[name] for name in self.engines if name in checks}
        self._runs = all_of(Run)
        for name in self.tasks:
            if len({run.digest for run in self._runs if run.workload == name}) > 1:
                raise UsageError(f"{name}: the engines were given different work")

    def of(self, engine: str, workload: str) -> list[Run]:
        """Return the timed runs of one engine on one workload."""
        return [r for r in self._runs if (r.engine, r.workload) == (engine, workload)]

    def values(self, engine: str, workload: str, metric: str) -> list[float]:
        """Return a metric of each run for which it is known."""
        runs, task = self.of(engine, workload), self.tasks[workload]
        return [v for run in runs if (v := METRICS[metric](run, task)) is not None]

    def measured(self, *workloads: str) -> list[str]:
        """Return those workloads that an engine was timed on."""
        return [name for name in workloads if any(run.workload == name for run in self._runs)]

    def arrivals_ms(self, engine: str, what: str) -> list[float]:
        """Return `ttft_s` or `tpot_s` of all requests of all runs, in milliseconds."""
        return [1e3 * s for run in self.of(engine, "stream") for s in getattr(run, what)]

    def figures(self) -> dict[str, dict[str, list[float]]]:
        """Return title of a row -> engine -> a value of each run; in tok/s more is better."""
        found: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for name in self.tasks:
            for metric in FIGURES.get(name, BATCH_METRICS):
                for engine in self.engines:
                    if values := self.values(engine, name, metric):
                        found[f"{name}, {metric}"][engine] = values
        for engine in self.engines:
            found["start with imports, s"][engine] = [s.start_s for s in self.starts[engine]]
        return found
