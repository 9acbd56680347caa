"""The report's plots: matplotlib figures as SVG text, one color an engine."""

import io
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl

from compare.adapters import ENGINES
from compare.profiling import CATEGORIES
from compare.report import Results, number

mpl.use("svg")
from matplotlib import patches, ticker
from matplotlib import pyplot as plt

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
    "svg.fonttype": "path",  # the same on every machine
}
KINDS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#bbbbbb")  # of profile categories
IDLE = "#ffffff"

Plot = tuple[str, str, str]  # title, explanation, SVG


def all_plots(results: Results) -> Iterator[Plot]:
    """Those plots for which there are figures."""
    with plt.rc_context(STYLE):
        for plot in (throughput, batches, arrivals, prefix, limits, profiles):
            if found := plot(results):
                title, text, figure = found
                yield title, text, _svg(figure, title)


def _svg(figure: Any, title: str) -> str:
    """The figure as an SVG element whose ids are its own among several in one page."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _bars(axes: Any, names: list[str], values: dict[str, list[float]], what: str) -> None:
    """A horizontal bar an engine: its median, its range as a line, its runs as dots."""
    for row, name in enumerate(names):
        if not (found := values.get(name)):
            continue
        middle = statistics.median(found)
        axes.barh(row, middle, color=ENGINES[name].color, height=0.62)
        axes.plot([min(found), max(found)], [row, row], color="black", lw=1.2)
        axes.plot(found, [row] * len(found), "o", color="black", ms=3)
        axes.annotate(
            number(middle), (max(found), row), (6, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.24)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(3))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(what)
    axes.grid(axis="x")


def _of_all(results: Results, values: Callable[[str], list[float]]) -> dict[str, list[float]]:
    return {name: found for name in results.engines if (found := values(name))}


def throughput(results: Results) -> Any:
    """Tokens a second of bench and of prefill; energy where it is known."""
    panels = [
        ("The bench workload", "output tok/s (more is better)",
         _of_all(results, lambda e: results.rates("bench", e))),
        ("Prefill", "input tok/s (more is better)",
         _of_all(results, lambda e: results.rates("prefill", e, "prompt_tokens"))),
        ("Energy in bench", "J an output token (less is better)",
         _of_all(results, lambda e: results.joules_per_token("bench", e))),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        return None
    names = [name for name in results.engines if any(name in values for *_, values in panels)]
    size = (10.4, 1.3 + 0.45 * len(names))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True
    )
    for ax, (title, what, values) in zip(axes[0], panels, strict=True):
        ax.set_title(title)
        _bars(ax, names, values, what)
    axes[0][0].set_yticks(range(len(names)), [ENGINES[name].label for name in names])
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    text = "Bars: medians. Dots: single runs, and the line their range."
    return "Throughput", text, figure


def batches(results: Results) -> Any:
    """Tokens a second and time a token over the size of the batch."""
    sizes = results.batches()
    if not any(results.of(f"batch{n}", e) for n in sizes for e in results.engines):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    panels = (
        ("Throughput", "output tok/s (more is better)", results.rates),
        ("Time a token, after the first", "ms (less is better)", results.per_token),
    )
    for ax, (title, label, values) in zip(axes, panels, strict=True):
        for name in results.engines:
            rows = [(n, found) for n in sizes if (found := values(f"batch{n}", name))]
            if not rows:
                continue
            x = [n for n, _ in rows]
            middle = [statistics.median(found) for _, found in rows]
            low = [m - min(found) for m, (_, found) in zip(middle, rows, strict=True)]
            high = [max(found) - m for m, (_, found) in zip(middle, rows, strict=True)]
            spec = ENGINES[name]
            ax.errorbar(
                x, middle, (low, high), color=spec.color, label=spec.label, marker="o", capsize=4
            )
        ax.set_title(title)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
        ax.set_xlabel("requests in the batch")
        ax.set_ylabel(label)
        ax.grid(which="both")
    axes[0].legend(frameon=False)
    first = results.workloads[f"batch{sizes[0]}"]
    text = (
        f"{first['prompt_tokens']} prompt and {first['output_tokens']} output tokens a request. "
        "Points: medians; bars: the range over all runs. Both axes are logarithmic."
    )
    return "Batch sizes", text, figure


def arrivals(results: Results) -> Any:
    """Distributions of the time to the first token and of the time per token."""
    if not any(results.of("stream", e) for e in results.engines):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained", sharey=True)
    panels = (("Time to the first token", "ttft_s"), ("Time per output token", "tpot_s"))
    for ax, (title, what) in zip(axes, panels, strict=True):
        for name in results.engines:
            if values := sorted(results.pooled(name, what)):
                share = [100 * (i + 1) / len(values) for i in range(len(values))]
                spec = ENGINES[name]
                ax.step(values, share, where="post", color=spec.color, label=spec.label, lw=1.8)
        for p in (50, 90, 99):
            ax.axhline(p, color="#999999", lw=0.8, ls=":")
        ax.set_title(title)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        ax.xaxis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if _minor(value) else "")
        ax.set_xlabel("ms, logarithmic (further left is better)")
        ax.grid(which="both")
    axes[0].set_ylabel("requests at most so long, %")
    axes[0].set_yticks([0, 25, 50, 75, 90, 99])
    axes[0].legend(frameon=False, loc="lower right")
    work = results.workloads["stream"]
    text = (
        f"{work['title']}; each submitted at its time through add_request, while the engine steps. "
        "All requests of all runs; the time to the first token counts from the arrival."
    )
    return "A stream of arrivals", text, figure


def _minor(value: float) -> bool:
    """Whether a logarithmic axis' minor tick is labelled: 2 and 5 times a power of ten."""
    return f"{value:.0e}"[0] in "25"


def prefix(results: Results) -> Any:
    """A long prefix that all prompts share, beside prompts that share nothing."""
    if not (names := [e for e in results.engines if results.of("prefix", e)]):
        return None
    figure, ax = plt.subplots(figsize=(10.4, 1.4 + 0.7 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        times = {p: results.seconds("prefix", name, p) for p in ("shared", "own")}
        gain = statistics.median(times["own"]) / statistics.median(times["shared"])
        for offset, (part, found) in zip((-0.19, 0.19), times.items(), strict=True):
            middle, y = statistics.median(found), row + offset
            faint = 1.0 if part == "shared" else 0.45
            ax.barh(y, middle, color=ENGINES[name].color, height=0.36, alpha=faint)
            ax.plot([min(found), max(found)], [y, y], color="black", lw=1.2)
            note = f"{number(middle)} s " + (
                f"shared: {gain:.1f} times as fast" if part == "shared" else "not shared"
            )
            ax.annotate(
                note, (max(found), y), (6, 0), textcoords="offset points", va="center", fontsize=9
            )
    ax.set_yticks(range(len(names)), [ENGINES[name].label for name in names])
    ax.invert_yaxis()
    ax.margins(x=0.28)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds (less is better)")
    ax.grid(axis="x")
    work = results.workloads["prefix"]
    text = (
        f"{work['title']}. Solid: one prefix, the first prompt completed ahead of the others. "
        "Faint: the same lengths with prefixes of their own."
    )
    return "A long shared prefix", text, figure


def limits(results: Results) -> Any:
    """Share of the memory's and of the products' limit that each workload reaches."""
    kinds = [("bandwidth_tb_s", "bytes", "Memory"), ("peak_tflop_s", "operations", "Compute")]
    kinds = [kind for kind in kinds if results.settings.get(kind[0])]
    names = [w for w in results.workloads if w != "stream"]
    names = [w for w in names if any(results.of(w, e) for e in results.engines)]
    if not kinds or not names:
        return None
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(10.4, 3.8), squeeze=False, layout="constrained"
    )
    for ax, (limit, need, title) in zip(axes[0], kinds, strict=True):
        width = 0.8 / max(len(results.engines), 1)
        for i, engine in enumerate(results.engines):
            spec = ENGINES[engine]
            for x, name in enumerate(names):
                if not (seconds := results.seconds(name, engine)):
                    continue
                least = results.workloads[name][need] / (results.settings[limit] * 1e12)
                share = [100 * least / s for s in seconds]
                middle, place = statistics.median(share), x - 0.4 + width * (i + 0.5)
                ax.bar(place, middle, width * 0.92, color=spec.color)
                ax.plot([place] * 2, [min(share), max(share)], color="black", lw=1)
        ax.set_xticks(range(len(names)), names)
        ax.set_title(f"{title}: {results.settings[limit]:.3g} {_unit(limit)}")
        ax.set_ylabel("% of the limit (more is better)")
        ax.grid(axis="y")
    handles = [patches.Patch(color=ENGINES[e].color) for e in results.engines]
    labels = [ENGINES[e].label for e in results.engines]
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center")
    text = (
        "What the workload must move and compute at the very least, over what the machine can in "
        "the time that was taken. Decoding reads every weight once a step and every key and value "
        "once a token; prefill is bound by products, and its bytes are left out."
    )
    return "Share of the machine's limits", text, figure


def _unit(limit: str) -> str:
    return "TB/s" if limit.startswith("bandwidth") else "TFLOP/s"


def profiles(results: Results) -> Any:
    """Time by category, from each framework's own profiler."""
    names = [e for e in results.engines if e in results.profiles]
    if not names:
        return None
    on_gpu = any(results.profiles[e]["idle"] is not None for e in names)
    seen = {k for e in names for k, s in results.profiles[e]["seconds"].items() if s}
    figure, ax = plt.subplots(figsize=(10.4, 2.0 + 0.55 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        profile, left = results.profiles[name], 0.0
        total = sum(profile["seconds"].values())
        parts = [part for part in zip(CATEGORIES, KINDS, strict=True) if part[0] in seen]
        parts = [(kind, color, profile["seconds"].get(kind, 0.0)) for kind, color in parts]
        if profile["idle"] is not None:
            parts.append(("GPU idle", IDLE, profile["idle"]))
        scale = 1e3 if on_gpu else 100 / total
        for kind, color, seconds in parts:
            width = seconds * scale
            label = kind if row == 0 else None
            ax.barh(row, width, left=left, color=color, edgecolor="#666666", lw=0.5, label=label)
            left += width
    ax.set_yticks(range(len(names)), [ENGINES[name].label for name in names])
    ax.invert_yaxis()
    workload = results.workloads[results.profiles[names[0]]["workload"]]
    if on_gpu:
        ax.set_xlabel("ms of the whole run (less is better)")
        text = "Kernels on the GPU; a kernel counts from the end of the one before it."
    else:
        ax.set_xlabel("% of the profiled time")
        text = (
            "Operators without what they call: of all threads for XLA, of the calling thread for "
            "PyTorch, so that shares can be compared and times cannot."
        )
    ax.grid(axis="x")
    figure.legend(frameon=False, ncols=3, loc="outside lower left")
    text = (
        f"{workload['title']}. {text} Profilers slow the "
        "host down. Categories go by names: code that a compiler fused counts by what its name "
        "says first, or as the rest."
    )
    return "Where the time goes", text, figure
