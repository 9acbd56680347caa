"""Make one self-contained HTML page of the results of a comparison."""

from html import escape
from statistics import median

from nanovllm_jax.tools.compare import plots
from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.compare.results import Results, Skip, number, percentile

PERCENTILES = (50, 90, 99)

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


def render(results: Results) -> str:
    """Return the whole page.

    Raises:
        UsageError: the plots' library is not installed.
    """
    settings, machine = results.settings, results.machine
    title = escape(f"{settings.model} on {machine.gpu or f'{machine.cpu}, {machine.cores} cores'}")
    drawn = plots.all_plots(results)
    sections = [
        _figures(results),
        *(_section(name, f"<p>{escape(text)}</p>{svg}") for name, text, svg in drawn),
        _arrivals(results),
        _profiles(results),
        _protocol(results),
        _problems(results),
        _versions(results),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><header><h1>{title}</h1>"
        f"<p>{settings.parameters:,} parameters, {settings.dtype} &middot; {settings.date[:10]} "
        f"&middot; {settings.rounds} rounds of {settings.runs} runs &middot; temperature "
        f"{settings.temperature:g}</p></header>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _engine(name: str) -> str:
    spec = ENGINES[name]
    return f"<span class='dot' style='background:{spec.color}'></span>{escape(spec.label)}"


def _table(head: list[str], rows: list[list[str]], words: bool = False) -> str:
    """Return a table of HTML cells; `words` aligns them to the left."""
    if not rows:
        return ""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>"
        for row in rows
    )
    kind = " class='words'" * words
    return f"<table{kind}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _figures(results: Results) -> str:
    rows = []
    for row in results.figures():
        medians = {engine: median(values) for engine, values in row.values.items()}
        best = (max if row.more_is_better else min)(medians.values())
        cells = [f"{escape(row.title)} {'&uarr;' if row.more_is_better else '&darr;'}"]
        for engine in results.engines:
            if not (values := row.values.get(engine)):
                cells.append("&ndash;")
                continue
            mark = " class='best'" * (medians[engine] == best and len(medians) > 1)
            low, high = number(min(values)), number(max(values))
            spread = f"{low} to {high}" if len(values) > 1 else "1 run"
            cells.append(f"<td{mark}>{number(medians[engine])}<small>{spread}</small></td>")
        rows.append(cells)
    text = (
        "<p>Medians over all runs of all rounds, with the range below; the best of a row is "
        "marked. &uarr; more is better, &darr; less is better.</p>"
    )
    return _section("Figures", text + _table(["", *map(_engine, results.engines)], rows))


def _arrivals(results: Results) -> str:
    rows = []
    for engine in results.engines:
        for what, label in (("ttft_s", "time to first token"), ("tpot_s", "time per output token")):
            if values := results.arrivals_ms(engine, what):
                cells = [number(percentile(values, p)) for p in PERCENTILES]
                rows.append([f"{_engine(engine)}, {label}", *cells, str(len(values))])
    head = ["ms", *(f"p{p}" for p in PERCENTILES), "requests"]
    return _section("Arrivals: percentiles", _table(head, rows))


def _profiles(results: Results) -> str:
    parts = []
    for engine, profile in results.profiles.items():
        total = sum(profile.seconds.values()) or 1.0
        rows = [
            [f"<code>{escape(name)}</code>", escape(kind), f"{1e3 * s:,.2f}", f"{s / total:.1%}"]
            for name, kind, s in profile.top
        ]
        summary = f"<summary>{_engine(engine)} ({escape(profile.unit)})</summary>"
        table = _table(["name", "category", "ms", "share"], rows)
        parts.append(f"<details>{summary}{table}</details>")
    return _section("What took longest in the profiled run", "".join(parts))


def _protocol(results: Results) -> str:
    tasks = "".join(f"<li><b>{t.name}</b>: {escape(t.title)}</li>" for t in results.tasks.values())
    notes = "".join(
        f"<li>{_engine(e)}: {escape(results.starts[e][0].note)}</li>" for e in results.engines
    )
    later = "".join(
        " A later call on a machine of the same description added "
        f"{', '.join(map(_engine, a.engines))} (rounds: {a.rounds}, runs in each: {a.runs})."
        for a in results.added
    )
    return _section(
        "How it was measured",
        "<ul><li>Each engine ran in a process of its own, one process at a time; the order of the "
        f"engines alternated from round to round.{later}</li>"
        "<li>All engines got the same token ids and output lengths (a digest proves it). Every "
        "completion has exactly its length (checked), the end of a sequence is ignored, and "
        "nothing is detokenized except where noted.</li>"
        "<li>One whole warm-up run with other prompts went before the timed runs of a workload, "
        "and each timed part began with an empty prefix cache.</li>"
        "<li>The time a token is (whole run - run of one output token) / (output tokens - 1).</li>"
        f"{_agreement(results)}</ul><h3>Workloads</h3><ul>{tasks}</ul>"
        "<h3>What the engines do</h3><p>transformers' generate works on whole batches: where "
        "lengths differ, as in bench, short prompts are padded and wait for the longest of "
        "their batch, and only the tokens that were asked for are counted. It cannot take "
        f"requests as they arrive.</p><ul>{notes}</ul>",
    )


def _agreement(results: Results) -> str:
    """Say how far the engines' greedy tokens agree on a few prompts."""
    first, *others = [e for e in results.engines if e in results.checks] or [""]
    parts = []
    for engine in others:
        pairs = list(zip(results.checks[engine], results.checks[first], strict=True))
        begin, whole = sum(a[0] == b[0] for a, b in pairs), sum(a == b for a, b in pairs)
        parts.append(
            f"{escape(ENGINES[engine].label)}: first token {begin} of {len(pairs)}, "
            f"all {len(pairs[0][0])} tokens {whole} of {len(pairs)}"
        )
    if not parts:
        return ""
    return (
        f"<li>Greedy completions equal to {escape(ENGINES[first].label)}'s, before timing "
        f"({results.settings.dtype}): {'; '.join(parts)}.</li>"
    )


def _problems(results: Results) -> str:
    rows = [
        [_engine(e), "", f"absent; to include it: <code>{escape(a.install)}</code>"]
        for e, a in results.absent.items()
    ]
    for p in {(p.engine, p.workload, p.reason): p for p in results.problems}.values():
        where = f"{p.workload or 'engine'}, round {p.round + 1}"
        word = "not run" if isinstance(p, Skip) else "failed"
        rows.append([_engine(p.engine), where, f"{word}: {escape(p.reason)}"])
    return _section("Not measured", _table(["engine", "workload", "what and why"], rows, True))


def _versions(results: Results) -> str:
    facts = vars(results.machine) | {
        "memory limit, TB/s": results.settings.bandwidth_tb_s,
        "compute limit, TFLOP/s": results.settings.peak_tflop_s,
    }
    rows = [[name.replace("_", " "), escape(str(v))] for name, v in facts.items() if v]
    for engine in results.engines:
        versions = results.starts[engine][0].versions
        rows.append([_engine(engine), escape(", ".join(f"{k} {v}" for k, v in versions.items()))])
    return _section("Machine and versions", _table(["", ""], rows, True))
