"""Draw the plots of a report with matplotlib, in one color an engine."""

import io
from pathlib import Path
from statistics import median
from typing import Any

from nanovllm_jax.tools.compare.adapters import ENGINES
from nanovllm_jax.tools.compare.results import Results, number
from nanovllm_jax.tools.options import UsageError

STYLE = Path(__file__).with_name("report.mplstyle")
WIDTH = 10.4  # inches


def pyplot() -> Any:
    """Import matplotlib's pyplot, to draw without a display; raises UsageError without it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        hint = 'pip install "nanovllm-jax[compare]"'
        raise UsageError(f"the report needs matplotlib: {hint}") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def all_plots(results: Results) -> dict[str, str]:
    """Return the SVG element of each plot that there are figures for, by the plot's name."""
    plots, plt = {}, pyplot()
    for draw in (throughput, batches, arrivals, prefix, limits, profiles):
        # The salt makes the ids of an element its own among several in one page.
        with plt.style.context([STYLE, {"svg.hashsalt": draw.__name__}]):
            if figure := draw(results):
                figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
                plots[draw.__name__] = "<svg" + file.getvalue().split("<svg")[1]
                plt.close(figure)
    return plots


def write_picture(results: Results, file: Path) -> None:
    """Write the plot of throughput; raises UsageError if there is none."""
    with pyplot().style.context(STYLE):
        if not (figure := throughput(results)):
            raise UsageError("these results have no throughput to draw")
        figure.savefig(file, dpi=120)  # of the type that the file's name says


def throughput(results: Results) -> Any:
    """Draw tokens a second of the batches, of bench and of prefill."""
    outputs = [*(f"batch{n}" for n in results.batches), "bench"]
    if not (names := results.measured(*outputs, "prefill")):
        return None
    figure, axes = _subplots(results, len(names), 3.0)
    for ax, name in zip(axes, names, strict=True):
        metric = "output tok/s" if name in outputs else "input tok/s"
        _columns(ax, results, [name], metric, xlabel=metric)
    machine, settings = results.machine, results.settings
    title = f"{settings.model}, {settings.dtype}, {machine.gpu or machine.cpu} (more is better)"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def batches(results: Results) -> Any:
    """Draw the times a token and to the first token over the size of the batch."""
    sizes = results.batches
    if not results.measured(*(f"batch{n}" for n in sizes)):
        return None
    figure, axes = _subplots(results, 2, 3.8)
    for ax, metric in zip(axes, ("ms a token", "ms to the first token"), strict=True):
        for name in results.engines:
            color = ENGINES[name].color
            rows = {n: v for n in sizes if (v := results.values(name, f"batch{n}", metric))}
            ax.plot([*rows], [*map(median, rows.values())], "o-", color=color)
            for n, found in rows.items():
                ax.plot([n, n], [min(found), max(found)], "_-", color=color)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [*map(str, sizes)])
        ax.set(yscale="log", xlabel="requests in the batch", ylabel=f"{metric} (less is better)")
        logarithmic(ax.yaxis)
        ax.grid(which="both")
    return figure


def arrivals(results: Results) -> Any:
    """Draw the distributions of the time to the first token and of the time a token."""
    if not results.measured("stream"):
        return None
    figure, axes = _subplots(results, 2, 3.6, sharey=True)
    panels = (("Time to the first token", "ttft_s"), ("Time per output token", "tpot_s"))
    for ax, (title, what) in zip(axes, panels, strict=True):
        for name in results.engines:
            values = sorted(results.arrivals_ms(name, what))
            share = [100 * (i + 1) / len(values) for i in range(len(values))]
            ax.step(values, share, where="post", color=ENGINES[name].color, lw=1.8)
        ax.set(title=title, xscale="log", xlabel="ms, logarithmic (further left is better)")
        logarithmic(ax.xaxis)
        ax.set_yticks([0, 25, 50, 75, 90, 99])
        ax.grid(which="both")
    axes[0].set_ylabel("requests at most this long, %")
    return figure


def prefix(results: Results) -> Any:
    """Draw the times of a long prefix that all prompts share, and of prompts that share nothing."""
    if not results.measured("prefix"):
        return None
    figure, axes = _subplots(results, 2, 3.0, sharey=True)
    for ax, metric in zip(axes, ("s behind one prefix", "s with a prefix each"), strict=True):
        _columns(ax, results, ["prefix"], metric, xlabel=f"{metric} (less is better)")
    return figure


def limits(results: Results) -> Any:
    """Draw the share of the memory's and of the products' limit that each workload reaches."""
    settings = results.settings
    rates = {"TB/s": settings.bandwidth_tb_s, "TFLOP/s": settings.peak_tflop_s}
    rates = {metric: rate for metric, rate in rates.items() if rate}
    names = results.measured(*(name for name in results.tasks if name != "stream"))
    if not rates or not names:
        return None
    figure, axes = _subplots(results, len(rates), 3.8)
    for ax, (metric, rate) in zip(axes, rates.items(), strict=True):
        title = f"{'Memory' if metric == 'TB/s' else 'Compute'}: {rate:.3g} {metric}"
        label = "% of the limit (more is better)"
        _columns(ax, results, names, metric, 100 / rate, title=title, ylabel=label)
    return figure


def profiles(results: Results) -> Any:
    """Draw the time by category, from each framework's own profiler."""
    if not (found := list(results.profiles.values())):
        return None
    on_gpu = results.settings.device == "gpu"
    kinds = list(dict.fromkeys(k for p in found for k, s in p.seconds.items() if s))
    times = [profile.seconds | {"GPU idle": profile.idle or 0.0} for profile in found]
    scales = [1e3 if on_gpu else 100 / sum(row.values()) for row in times]
    rows, left = range(len(found)), [0.0] * len(found)
    figure, ax = pyplot().subplots(figsize=(WIDTH, 2.0 + 0.55 * len(found)), layout="constrained")
    for kind in [*kinds, "GPU idle"] if on_gpu else kinds:
        widths = [s * row.get(kind, 0.0) for s, row in zip(scales, times, strict=True)]
        color = "white" if kind == "GPU idle" else None  # the style's next one
        ax.barh(rows, widths, left=left, color=color, ec="#666666", lw=0.5, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.set_yticks(rows, [ENGINES[name].label for name in results.profiles])
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.set_xlabel("ms of the whole run (less is better)" if on_gpu else "% of the profiled time")
    figure.legend(frameon=False, ncols=3, loc="outside lower left")
    return figure


def _subplots(results: Results, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure with a legend of the engines, and its axes, which lie side by side."""
    plt = pyplot()
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
    [axes] = figure.subplots(1, columns, squeeze=False, **options)
    engines = [ENGINES[name] for name in results.engines]
    handles = [plt.Rectangle((0, 0), 1, 1, color=e.color, label=e.label) for e in engines]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    return figure, axes


def _columns(
    ax: Any, results: Results, names: list[str], metric: str, scale: float = 1.0, **labels: str
) -> None:
    """Draw each workload's bars, medians with the range as a line; with numbers if it is one."""
    width, numbered = 0.8 / len(results.engines), len(names) == 1
    for i, engine in enumerate(results.engines):
        for x, name in enumerate(names):
            if found := [scale * value for value in results.values(engine, name, metric)]:
                middle, place = median(found), x - 0.4 + width * (i + 0.5)
                ax.bar(place, middle, width * 0.92, color=ENGINES[engine].color)
                ax.plot([place] * 2, [min(found), max(found)], color="black", lw=1)
                if numbered:
                    text = number(middle) if middle < 1e5 else f"{middle / 1e3:,.0f}k"
                    ax.annotate(text, (place, max(found)), (0, 2), fontsize=7.5, ha="center",
                                textcoords="offset points")  # fmt: skip
    ax.set_xticks(range(len(names)), names)
    ax.set(xlim=(-0.5, len(names) - 0.5), **labels)
    if numbered:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    else:
        ax.grid(axis="y")


def logarithmic(axis: Any) -> None:
    """Label powers of ten, and between them 2 and 5, without exponents."""
    plain = "{:,.10g}".format
    axis.set_major_formatter(lambda value, _: plain(value))
    axis.set_minor_formatter(lambda value, _: plain(value) if f"{value:.0e}"[0] in "25" else "")
