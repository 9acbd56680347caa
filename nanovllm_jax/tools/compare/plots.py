"""Draw the plots of a report: matplotlib figures as SVG text, one color an engine."""

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.compare.results import Results, number
from nanovllm_jax.tools.options import UsageError

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "both",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # letters as curves: the same on every machine
}
KINDS = ("#d55e00", "#56b4e9", "#0072b2", "#f0e442", "#009e73", "#bbbbbb", "#cc79a7")
IDLE = "#ffffff"
WIDTH = 10.4  # inches

Plot = tuple[str, str, Any]  # title, explanation, matplotlib figure


def pyplot() -> Any:
    """Import matplotlib's pyplot, which draws without a display here.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UsageError(
            'the report needs matplotlib: install it with `pip install "nanovllm-jax[compare]"`'
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def all_plots(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield title, explanation and SVG of each plot that there are figures for."""
    plt = pyplot()
    for draw in (throughput, batches, arrivals, prefix, limits, profiles):
        with plt.rc_context(STYLE):
            if plot := draw(results):
                title, text, figure = plot
                yield title, text, _svg(figure, title)
                plt.close(figure)


def write_picture(results: Results, file: Path) -> None:
    """Write the plot of throughput as an image of the type that the file's name says.

    Raises:
        UsageError: matplotlib is not installed, or there is no throughput to draw.
    """
    with pyplot().rc_context(STYLE):
        if not (plot := throughput(results)):
            raise UsageError("these results have no throughput to draw")
        plot[2].savefig(file, dpi=120)


def _svg(figure: Any, title: str) -> str:
    """Return the figure as an SVG element whose ids are its own among several in one page."""
    buffer = io.StringIO()
    with pyplot().rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _subplots(columns: int, height: float, **options: Any) -> tuple[Any, Sequence[Any]]:
    figure, axes = pyplot().subplots(
        1, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )
    return figure, axes[0]


def _plain(value: float, _: int | None = None) -> str:
    """Label a tick without an exponent."""
    return f"{value:,.10g}"


def _label_rows(axes: Any, names: Sequence[str]) -> None:
    """Name the engines beside their rows of horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), [ENGINES[name].label for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")


def _bar(axes: Any, y: float, engine: str, values: Sequence[float], note: str, **bar: Any) -> None:
    """Draw a horizontal bar: the median, the range as a line, and a note behind it."""
    axes.barh(y, statistics.median(values), color=ENGINES[engine].color, **bar)
    axes.plot([min(values), max(values)], [y, y], color="black", lw=1.2)
    axes.annotate(
        note, (max(values), y), (6, 0), textcoords="offset points", va="center", fontsize=9
    )


def _legend(figure: Any, results: Results) -> None:
    plt = pyplot()
    handles = [plt.Rectangle((0, 0), 1, 1, color=ENGINES[e].color) for e in results.engines]
    labels = [ENGINES[e].label for e in results.engines]
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center")


def _columns(
    axes: Any, engines: Sequence[str], names: Sequence[str],
    values: Callable[[str, str], Sequence[float]], numbered: bool = False,
) -> None:  # fmt: skip
    """Draw a group of vertical bars for each name, one an engine, with ranges as lines."""
    width = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        for x, name in enumerate(names):
            if found := values(engine, name):
                middle, place = statistics.median(found), x - 0.4 + width * (i + 0.5)
                axes.bar(place, middle, width * 0.92, color=ENGINES[engine].color)
                axes.plot([place] * 2, [min(found), max(found)], color="black", lw=1)
                if numbered:
                    text = number(middle) if middle < 1e5 else f"{middle / 1e3:,.0f}k"
                    axes.annotate(text, (place, max(found)), (0, 2), fontsize=7.5, ha="center",
                                  textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.yaxis.set_major_formatter(_plain)
    axes.grid(axis="y")


def _measured(results: Results, names: Sequence[str]) -> list[str]:
    return [n for n in names if any(results.of(e, n) for e in results.engines)]


def throughput(results: Results) -> Plot | None:
    """Draw tokens a second of the batches, of bench and of prefill."""
    outputs = [*(f"batch{n}" for n in results.batches()), "bench"]
    if not (names := _measured(results, [*outputs, "prefill"])):
        return None
    figure, axes = _subplots(len(names), 3.0)
    for ax, name in zip(axes, names, strict=True):
        rates = results.output_rates if name in outputs else results.input_rates
        _columns(ax, results.engines, [name], rates, numbered=True)
        ax.set_xlabel(f"{'output' if name in outputs else 'input'} tok/s")
        ax.set_xlim(-0.5, 0.5)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    machine, settings = results.machine, results.settings
    title = f"{settings.model}, {settings.dtype}, {machine.gpu or machine.cpu} (more is better)"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _legend(figure, results)
    return "Throughput", "Bars: medians. Lines: the range over all runs.", figure


def batches(results: Results) -> Plot | None:
    """Draw the times a token and to the first token over the size of the batch."""
    sizes = results.batches()
    if not _measured(results, [f"batch{n}" for n in sizes]):
        return None
    figure, axes = _subplots(2, 3.8)
    panels = (
        ("Time a token, after the first", results.per_token_ms),
        ("Time to the first token", results.first_ms),
    )
    for ax, (title, values) in zip(axes, panels, strict=True):
        for name in results.engines:
            rows = [(n, found) for n in sizes if (found := values(name, f"batch{n}"))]
            middle = [statistics.median(found) for _, found in rows]
            low = [m - min(found) for m, (_, found) in zip(middle, rows, strict=True)]
            high = [max(found) - m for m, (_, found) in zip(middle, rows, strict=True)]
            spec, x = ENGINES[name], [n for n, _ in rows]
            ax.errorbar(
                x, middle, (low, high), color=spec.color, label=spec.label, marker="o", capsize=4
            )
        ax.set_title(title)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sizes, map(str, sizes))
        ax.yaxis.set_major_formatter(_plain)
        ax.yaxis.set_minor_formatter("")
        ax.set_xlabel("requests in the batch")
        ax.set_ylabel("ms (less is better)")
        ax.grid(which="both")
    axes[0].legend(frameon=False)
    first = results.tasks[f"batch{sizes[0]}"]
    text = (
        f"{first.prompt_tokens} prompt and {first.output_tokens} output tokens a request. "
        "Points: medians; bars: the range over all runs. Both axes are logarithmic."
    )
    return "Batch sizes", text, figure


def arrivals(results: Results) -> Plot | None:
    """Draw the distributions of the time to the first token and of the time a token."""
    if not _measured(results, ["stream"]):
        return None
    figure, axes = _subplots(2, 3.6, sharey=True)
    panels = (("Time to the first token", "ttft_s"), ("Time per output token", "tpot_s"))
    for ax, (title, what) in zip(axes, panels, strict=True):
        for name in results.engines:
            if values := sorted(results.arrivals_ms(name, what)):
                share = [100 * (i + 1) / len(values) for i in range(len(values))]
                spec = ENGINES[name]
                ax.step(values, share, where="post", color=spec.color, label=spec.label, lw=1.8)
        for p in (50, 90, 99):
            ax.axhline(p, color="#999999", lw=0.8, ls=":")
        ax.set_title(title)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(_plain)
        ax.xaxis.set_minor_formatter(lambda v, _: _plain(v) if f"{v:.0e}"[0] in "25" else "")
        ax.set_xlabel("ms, logarithmic (further left is better)")
        ax.grid(which="both")
    axes[0].set_ylabel("requests at most this long, %")
    axes[0].set_yticks([0, 25, 50, 75, 90, 99])
    axes[0].legend(frameon=False, loc="lower right")
    text = (
        f"{results.tasks['stream'].title}; each is submitted at its time through add_request, "
        "while the engine steps. All requests of all runs; the time to the first token counts "
        "from the arrival."
    )
    return "A stream of arrivals", text, figure


def prefix(results: Results) -> Plot | None:
    """Draw the times of a long prefix that all prompts share, and of prompts that share nothing."""
    if not (names := [e for e in results.engines if results.of(e, "prefix")]):
        return None
    figure, [ax] = _subplots(1, 1.4 + 0.7 * len(names))
    for row, name in enumerate(names):
        shared, own = (results.seconds(name, "prefix", part) for part in ("shared", "own"))
        middle, other = statistics.median(shared), statistics.median(own)
        note = f"{number(middle)} s shared: {other / middle:.1f} times as fast"
        _bar(ax, row - 0.19, name, shared, note, height=0.36)
        _bar(ax, row + 0.19, name, own, f"{number(other)} s not shared", height=0.36, alpha=0.45)
    _label_rows(ax, names)
    ax.margins(x=0.28)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds (less is better)")
    text = (
        f"{results.tasks['prefix'].title}. Solid: one prefix, the first prompt completed ahead of "
        "the others. Faint: the same lengths with prefixes of their own."
    )
    return "A long shared prefix", text, figure


def limits(results: Results) -> Plot | None:
    """Draw the share of the memory's and of the products' limit that each workload reaches."""
    settings = results.settings
    panels = [
        ("Memory", settings.bandwidth_tb_s, "TB/s", "bytes"),
        ("Compute", settings.peak_tflop_s, "TFLOP/s", "operations"),
    ]
    panels = [(title, rate, unit, need) for title, rate, unit, need in panels if rate]
    names = _measured(results, [name for name in results.tasks if name != "stream"])
    if not panels or not names:
        return None
    figure, axes = _subplots(len(panels), 3.8)
    for ax, (title, rate, unit, need) in zip(axes, panels, strict=True):

        def share(engine: str, name: str, rate=rate, need=need) -> list[float]:
            least = getattr(results.tasks[name], need) / (rate * 1e12)
            return [100 * least / s for s in results.seconds(engine, name)]

        _columns(ax, results.engines, names, share)
        ax.set_title(f"{title}: {rate:.3g} {unit}")
        ax.set_ylabel("% of the limit (more is better)")
    _legend(figure, results)
    text = (
        "What the workload must move and compute at the very least, over what the machine can in "
        "the time that was taken. Decoding reads every weight once a step and every key and value "
        "once a token; prefill is bound by products, and its bytes are left out."
    )
    return "Share of the machine's limits", text, figure


def profiles(results: Results) -> Plot | None:
    """Draw the time by category, from each framework's own profiler."""
    if not (found := results.profiles):
        return None
    on_gpu = any(profile.idle is not None for profile in found.values())
    kinds = dict.fromkeys(k for p in found.values() for k, s in p.seconds.items() if s)
    figure, [ax] = _subplots(1, 2.0 + 0.55 * len(found))
    for row, profile in enumerate(found.values()):
        scale, left = 1e3 if on_gpu else 100 / sum(profile.seconds.values()), 0.0
        parts = [(k, c, profile.seconds.get(k, 0.0)) for k, c in zip(kinds, KINDS, strict=False)]
        parts.append(("GPU idle", IDLE, profile.idle or 0.0))
        for kind, color, seconds in parts[: len(parts) - (not on_gpu)]:
            label = kind if row == 0 else None
            ax.barh(row, seconds * scale, left=left, color=color, edgecolor="#666666", lw=0.5,
                    label=label)  # fmt: skip
            left += seconds * scale
    _label_rows(ax, list(found))
    if on_gpu:
        ax.set_xlabel("ms of the whole run (less is better)")
        text = "Kernels on the GPU; a kernel counts from the end of the one before it."
    else:
        ax.set_xlabel("% of the profiled time")
        text = (
            "Operators without what they call: of all threads for XLA, of the calling thread for "
            "PyTorch, so that shares can be compared and times cannot."
        )
    figure.legend(frameon=False, ncols=3, loc="outside lower left")
    text = (
        f"{results.tasks[next(iter(found.values())).workload].title}. {text} Profilers slow the "
        "host down. Categories go by names: code that a compiler fused counts by what its name "
        "says first, or as the rest."
    )
    return "Where the time goes", text, figure
