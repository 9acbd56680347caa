"""Make one self-contained HTML page of the results of a comparison.

The text of the page is in `report.html.j2`; this file computes the tables.
"""

from pathlib import Path
from statistics import median
from typing import NamedTuple

import jinja2
import numpy as np

from nanovllm_jax.tools.compare import plots
from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.compare.results import Results, Skip, number

TEMPLATE = Path(__file__).with_name("report.html.j2")
PERCENTILES = (50, 90, 99)


class Cell(NamedTuple):
    """One engine's figure: the median over all runs, and the range."""

    median: str
    spread: str
    best: bool


def render(results: Results) -> str:
    """Return the whole page.

    Raises:
        UsageError: the plots' library is not installed.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    limits = {
        "memory limit, TB/s": results.settings.bandwidth_tb_s,
        "compute limit, TFLOP/s": results.settings.peak_tflop_s,
    }
    problems = {
        (p.engine, p.workload, p.reason): (p, "not run" if isinstance(p, Skip) else "failed")
        for p in results.problems
    }
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        engines=ENGINES,
        plots=plots.all_plots(results),
        figures=figures(results),
        percentiles=PERCENTILES,
        arrivals=arrivals(results),
        agreement=agreement(results),
        problems=problems.values(),
        facts=vars(results.machine) | limits,
    )


def figures(results: Results) -> dict[str, list[Cell | None]]:
    """Return the table of figures: title of a row -> each engine's cell, None if it has none."""
    rows = {}
    for title, values in results.figures().items():
        medians = {engine: median(found) for engine, found in values.items()}
        best = (max if title.endswith("tok/s") else min)(medians.values())
        cells = {}
        for engine, found in values.items():
            spread = f"{number(min(found))} to {number(max(found))}"
            cells[engine] = Cell(
                median=number(medians[engine]),
                spread=spread if len(found) > 1 else "1 run",
                best=medians[engine] == best and len(medians) > 1,
            )
        rows[title] = [cells.get(engine) for engine in results.engines]
    return rows


def arrivals(results: Results) -> list[tuple[str, str, list[str], int]]:
    """Return engine, what was timed, its percentiles in ms, and the number of requests."""
    rows = []
    for engine in results.engines:
        for what, label in (("ttft_s", "time to first token"), ("tpot_s", "time per output token")):
            if values := results.arrivals_ms(engine, what):
                cells = [number(value) for value in np.percentile(values, PERCENTILES)]
                rows.append((engine, label, cells, len(values)))
    return rows


def agreement(results: Results) -> str:
    """Return a sentence on how far the engines' greedy tokens agree; empty if none compare."""
    first, *others = [e for e in results.engines if e in results.checks] or [""]
    parts = []
    for engine in others:
        pairs = list(zip(results.checks[engine], results.checks[first], strict=True))
        begin, whole = sum(a[0] == b[0] for a, b in pairs), sum(a == b for a, b in pairs)
        parts.append(
            f"{ENGINES[engine].label}: first token {begin} of {len(pairs)}, "
            f"all {len(pairs[0][0])} tokens {whole} of {len(pairs)}"
        )
    if not parts:
        return ""
    return (
        f"Greedy completions equal to {ENGINES[first].label}'s, before timing "
        f"({results.settings.dtype}): {'; '.join(parts)}."
    )
