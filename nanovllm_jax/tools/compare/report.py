"""Compute the tables of a report; the page around them is the template `report.html.j2`."""

from pathlib import Path
from statistics import median

import jinja2
import numpy as np

from nanovllm_jax.tools.compare import plots
from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.compare.results import Results, number

TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(results: Results) -> str:
    """Return the whole page; raises UsageError if the plots' library is not installed."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    problems = {(p.engine, p.workload, p.reason): p for p in results.problems}
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        results=results,
        engines=ENGINES,
        plots=plots.all_plots(results),
        figures={title: cells(title, row) for title, row in results.figures().items()},
        percents=(50, 90, 99),
        percentiles=lambda values, percents: [*map(number, np.percentile(values, percents))],
        agreement=agreement(results),
        problems=problems.values(),
    )


def cells(title: str, row: dict[str, list[float]]) -> dict[str, tuple[str, str, bool]]:
    """Return each engine's median and range in a row of figures, and whether it is the best."""
    medians = {engine: median(values) for engine, values in row.items()}
    best = (max if title.endswith("tok/s") else min)(medians.values())
    found = {}
    for engine, values in row.items():
        spread = f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else "1 run"
        is_best = medians[engine] == best and len(medians) > 1
        found[engine] = number(medians[engine]), spread, is_best
    return found


def agreement(results: Results) -> list[str]:
    """Describe how far each engine's greedy tokens agree with those of the first engine."""
    first, *others = [*results.checks] or [""]
    texts = []
    for engine in others:
        pairs = list(zip(results.checks[engine], results.checks[first], strict=True))
        begin, whole = sum(a[0] == b[0] for a, b in pairs), sum(a == b for a, b in pairs)
        told = f"first token {begin} of {len(pairs)}, all {len(pairs[0][0])} tokens {whole}"
        texts.append(f"{ENGINES[engine].label}: {told} of {len(pairs)}")
    return texts
