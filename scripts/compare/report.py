"""JSON lines of results into one self-contained HTML page with plots."""

import html
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from compare.adapters import ENGINES
from nanovllm_jax.__main__ import UsageError

Record = dict[str, Any]
PERCENTILES = (50, 90, 99)


def check() -> None:
    """Raise UsageError if the plots' library is not there."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            "the report needs matplotlib: install it with `pip install -e .[compare]`"
        ) from None


def read(path: Path) -> list[Record]:
    """The results of a file, one a line; raises UsageError naming a line that is none."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}, line {number} is no result: {line[:60]!r}") from None
        records.append(record)
    return records


def percentile(values: list[float], p: float) -> float:
    """The p-th percentile, linear between the values around it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Results:
    """The records of one comparison, by what they are."""

    def __init__(self, records: list[Record]):
        """Raises UsageError if the records are not of one comparison, or of unequal work."""
        kinds = defaultdict(list)
        for record in records:
            kinds[record["kind"]].append(record)
        for kind in ("settings", "machine"):
            if len(kinds[kind]) != 1:
                raise UsageError(f"the results have {len(kinds[kind])} lines of {kind!r}, not one")
        self.settings, self.machine = kinds["settings"][0], kinds["machine"][0]
        self.added = kinds["added"]  # the settings of later calls
        self.workloads = {r["name"]: r for r in kinds["workload"]}
        self.starts = _grouped(kinds["engine"], "engine")
        self.engines = [name for name in ENGINES if name in self.starts]
        absent = (r for r in kinds["absent"] if r["engine"] not in self.starts)
        self.absent = {r["engine"]: r for r in absent}
        self.problems = kinds["skip"] + kinds["failure"]
        self.profiles = {r["engine"]: r for r in kinds["profile"]}
        self.checks = {r["engine"]: r["tokens"] for r in reversed(kinds["check"])}
        self.runs = _grouped(kinds["run"], "workload", "engine")
        for workload in self.workloads:
            digests = {r["digest"] for name in self.engines for r in self.of(workload, name)}
            if len(digests) > 1:
                raise UsageError(f"{workload}: the engines were given different work")

    def of(self, workload: str, engine: str) -> list[Record]:
        """The timed runs of one engine on one workload."""
        return self.runs.get((workload, engine), [])

    def seconds(self, workload: str, engine: str, part: str | None = None) -> list[float]:
        """Seconds of each run: of one part, or of the main one."""
        runs = self.of(workload, engine)
        return [r["seconds"][part or next(iter(r["seconds"]))] for r in runs]

    def rates(self, workload: str, engine: str, what: str = "output_tokens") -> list[float]:
        """Tokens a second of each run."""
        tokens = self.workloads[workload][what] if workload in self.workloads else 0
        return [tokens / s for s in self.seconds(workload, engine)]

    def per_token(self, workload: str, engine: str) -> list[float]:
        """Milliseconds a token after the first, of each run of a batch."""
        tokens = self.workloads[workload]["longest_output"] - 1 if workload in self.workloads else 1
        both = zip(
            self.seconds(workload, engine),
            self.seconds(workload, engine, "first"),
            strict=True,
        )
        return [(whole - first) / tokens * 1e3 for whole, first in both]

    def pooled(self, engine: str, what: str) -> list[float]:
        """ttft_s or tpot_s of all requests of all runs of the stream, in ms."""
        return [v * 1e3 for r in self.of("stream", engine) for v in r[what]]

    def joules_per_token(self, workload: str, engine: str) -> list[float]:
        """Joules for each output token of all parts, of the runs whose energy is known."""
        counted = [r for r in self.of(workload, engine) if r["joules"] is not None]
        tokens = self.workloads[workload]["output_tokens"] if workload in self.workloads else 1
        return [r["joules"] / tokens for r in counted if sum(r["seconds"].values()) > 0.5]

    def batches(self) -> list[int]:
        """The sizes of the batch workloads."""
        return [int(n.removeprefix("batch")) for n in self.workloads if n.startswith("batch")]


def _grouped(records: list[Record], *keys: str) -> dict[Any, list[Record]]:
    groups = defaultdict(list)
    for record in records:
        key = tuple(record[k] for k in keys)
        groups[key if len(keys) > 1 else key[0]].append(record)
    return groups


def write(source: Path, page: Path) -> Path:
    """Make the page of a file of results; returns `page`."""
    check()
    page.write_text(render(Results(read(source))))
    return page


def render(results: Results) -> str:
    """The whole page."""
    from compare import plots

    settings, machine = results.settings, results.machine
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    sections = [
        _figures_table(results),
        *(
            f"<section><h2>{_text(title)}</h2><p>{_text(text)}</p>{svg}</section>"
            for title, text, svg in plots.all_plots(results)
        ),
        _stream_table(results),
        _profile_table(results),
        _protocol(results),
        _missing(results),
        _versions(results),
    ]
    title = f"{settings['model']} on {device}"
    facts = (
        f"{settings['parameters']:,} parameters, {settings['dtype']} &middot; "
        f"{_text(settings['date'][:10])} &middot; {settings['rounds']} rounds of "
        f"{settings['runs']} runs &middot; temperature {settings['temperature']:g}"
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{_text(title)}</h1><p>{facts}</p></header>"
        + "".join(sections)
        + "</body></html>\n"
    )


STYLE = """
:root{color-scheme:light}
body{max-width:1080px;margin:0 auto;padding:24px;background:#fff;color:#1a1a1a;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:36px 0 4px}
p{margin:4px 0 10px;max-width:75ch}header p{color:#555}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #999}
td small{color:#666;display:block;white-space:nowrap}
td.best{font-weight:600;background:#eef6ee}table.words td,table.words th{text-align:left}
svg{width:100%;height:auto;max-width:1032px}.dot{display:inline-block;width:10px;height:10px;
 border-radius:5px;margin-right:6px}code{font-size:13px}
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _engine(name: str) -> str:
    spec = ENGINES[name]
    return f"<span class='dot' style='background:{spec.color}'></span>{_text(spec.label)}"


def number(value: float) -> str:
    """Three digits or more, thousands separated."""
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]], words: bool = False) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>"
        for row in rows
    )
    attribute = " class='words'" if words else ""
    return f"<table{attribute}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def figures(results: Results) -> list[tuple[str, bool, dict[str, list[float]]]]:
    """The rows of the first table: (what, whether more is better, {engine: one value a run})."""
    rows = []

    def add(title: str, more: bool, values: Any) -> None:
        found = {name: values(name) for name in results.engines}
        if any(found.values()):
            rows.append((title, more, found))

    add("bench, output tok/s", True, lambda e: results.rates("bench", e))
    for size in results.batches():
        name = f"batch{size}"
        add(f"batch {size}, output tok/s", True, lambda e, n=name: results.rates(n, e))
        add(f"batch {size}, ms a token", False, lambda e, n=name: results.per_token(n, e))
        add(
            f"batch {size}, ms to the first token",
            False,
            lambda e, n=name: [1e3 * s for s in results.seconds(n, e, "first")],
        )
    add("prefill, input tok/s", True, lambda e: results.rates("prefill", e, "prompt_tokens"))
    for part, label in (("shared", "shared prefix, s"), ("own", "the same without sharing, s")):
        add(label, False, lambda e, p=part: results.seconds("prefix", e, p))
    for what, label in (("ttft_s", "time to first token"), ("tpot_s", "time per token")):
        add(
            f"arrivals, {label}, median ms",
            False,
            lambda e, w=what: [
                1e3 * statistics.median(r[w]) for r in results.of("stream", e) if r[w]
            ],
        )
    for name in ("bench", "batch64"):
        add(f"{name}, joules an output token", False, lambda e, n=name: _joules(results, n, e))
    add("start with imports, s", False, lambda e: [r["start_s"] for r in results.starts[e]])
    return rows


def _joules(results: Results, workload: str, engine: str) -> list[float]:
    return results.joules_per_token(workload, engine)


def _figures_table(results: Results) -> str:
    rows = []
    for title, more, values in figures(results):
        medians = {e: statistics.median(v) for e, v in values.items() if v}
        best = (max if more else min)(medians.values())
        arrow = "&uarr;" if more else "&darr;"
        row = [f"{_text(title)} {arrow}"]
        for engine in results.engines:
            if not (found := values[engine]):
                row.append("&ndash;")
                continue
            mark = " class='best'" if medians[engine] == best and len(medians) > 1 else ""
            spread = f"{number(min(found))} to {number(max(found))}" if len(found) > 1 else "1 run"
            row.append(f"<td{mark}>{number(medians[engine])}<small>{spread}</small></td>")
        rows.append(row)
    return (
        "<section><h2>Figures</h2><p>Medians over all runs of all rounds, the range below; the "
        "best of a row is marked. &uarr; more is better, &darr; less is better.</p>"
        + _table(["", *map(_engine, results.engines)], rows)
        + "</section>"
    )


def _stream_table(results: Results) -> str:
    rows = []
    for engine in results.engines:
        for what, label in (("ttft_s", "time to first token"), ("tpot_s", "time per output token")):
            if values := results.pooled(engine, what):
                cells = [number(percentile(values, p)) for p in PERCENTILES]
                rows.append([f"{_engine(engine)}, {label}", *cells, str(len(values))])
    if not rows:
        return ""
    head = ["ms", *(f"p{p}" for p in PERCENTILES), "requests"]
    return f"<section><h2>Arrivals: percentiles</h2>{_table(head, rows)}</section>"


def _profile_table(results: Results) -> str:
    parts = []
    for engine in results.engines:
        if profile := results.profiles.get(engine):
            total = sum(profile["seconds"].values()) or 1.0
            rows = [
                [f"<code>{_text(name)}</code>", _text(kind), f"{1e3 * s:,.2f}", f"{s / total:.1%}"]
                for name, kind, s in profile["top"]
            ]
            parts.append(
                f"<details><summary>{_engine(engine)} ({_text(profile['unit'])})</summary>"
                + _table(["name", "category", "ms", "share"], rows)
                + "</details>"
            )
    if not parts:
        return ""
    return (
        "<section><h2>What took longest</h2><p>By name, of the profiled run.</p>"
        + "".join(parts)
        + "</section>"
    )


def _protocol(results: Results) -> str:
    works = "".join(
        f"<li><b>{_text(w['name'])}</b>: {_text(w['title'])}</li>"
        for w in results.workloads.values()
    )
    notes = "".join(
        f"<li>{_engine(e)}: {_text(results.starts[e][0]['note'])}</li>" for e in results.engines
    )
    later = "".join(
        " A later call on a machine of the same description added "
        f"{', '.join(map(_engine, a['engines']))} "
        f"(rounds: {a['rounds']}, runs in each: {a['runs']})."
        for a in results.added
    )
    return (
        "<section><h2>How it was measured</h2><ul>"
        "<li>Each engine ran in a process of its own, one process at a time; the order of the "
        f"engines alternated from round to round.{later}</li>"
        "<li>All got the same token ids and output lengths (checked by a digest); every completion "
        "has exactly its length (checked), ends of sequence are ignored, nothing is "
        "detokenized except where noted.</li>"
        "<li>Before the timed runs of a workload there was one whole warm-up run with other "
        "prompts; each timed part began with an empty prefix cache.</li>"
        "<li>Time a token is (whole run - run of one output token) / (output tokens - 1).</li>"
        f"{_agreement(results)}</ul><h3>Workloads</h3><ul>{works}</ul>"
        "<h3>What the engines do</h3><p>transformers' generate works on whole batches: where "
        "lengths differ, as in bench, short prompts are padded and wait for the longest of "
        "their batch, and only the tokens that were asked for are counted. It cannot take "
        "requests as they arrive.</p>"
        f"<ul>{notes}</ul></section>"
    )


def _agreement(results: Results) -> str:
    """How far the engines' greedy tokens agree on a few prompts."""
    if len(results.checks) < 2:
        return ""
    reference = next(e for e in results.engines if e in results.checks)
    lines = []
    for engine, tokens in results.checks.items():
        if engine != reference:
            pairs = list(zip(tokens, results.checks[reference], strict=True))
            same = sum(a == b for a, b in pairs)
            first = sum(a[0] == b[0] for a, b in pairs)
            lines.append(
                f"{_text(ENGINES[engine].label)}: first token {first} of {len(pairs)}, "
                f"all {len(tokens[0])} tokens {same} of {len(pairs)}"
            )
    return (
        f"<li>Greedy completions equal to {_text(ENGINES[reference].label)}'s, before timing "
        f"({_text(results.settings['dtype'])}): {'; '.join(lines)}.</li>"
    )


def _missing(results: Results) -> str:
    rows = [
        [_engine(e), "", f"absent; to include it: <code>{_text(r['install'])}</code>"]
        for e, r in results.absent.items()
    ]
    seen = set()
    for r in results.problems:
        row = (r["engine"], r["workload"], r["reason"])
        if row not in seen:
            seen.add(row)
            where = f"{_text(r['workload'] or 'engine')}, round {r['round'] + 1}"
            word = "not run" if r["kind"] == "skip" else "failed"
            rows.append([_engine(r["engine"]), where, f"{word}: {_text(r['reason'])}"])
    if not rows:
        return ""
    table = _table(["engine", "workload", "what and why"], rows, words=True)
    return f"<section><h2>Not measured</h2>{table}</section>"


def _versions(results: Results) -> str:
    rows = [[_text(k), _text(v)] for k, v in results.machine.items() if k != "kind" and v]
    for engine in results.engines:
        versions = results.starts[engine][0]["versions"]
        rows.append([_engine(engine), _text(", ".join(f"{k} {v}" for k, v in versions.items()))])
    limits = [("bandwidth_tb_s", "memory limit, TB/s"), ("peak_tflop_s", "compute limit, TFLOP/s")]
    rows += [[t, number(results.settings[k])] for k, t in limits if results.settings.get(k)]
    table = _table(["", ""], rows, words=True)
    return f"<section><h2>Machine and versions</h2>{table}</section>"
