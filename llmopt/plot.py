"""Pictures of comparisons and traces; matplotlib is imported when the first one is drawn.

Figures are built without pyplot, so that nothing global changes, and the same data give the same SVG bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.drawing import PALETTE, Kind, draw, figure_of
from llmopt.evaluate.comparison import QUANTILES, Comparison, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmopt.traces import Trace

VERDICT_COLOURS = {"stable": "#0072B2", "unstable": "#C8361D", "close": "#B07C00", "": "#777777"}


def backlog_figure(comparison: Comparison) -> Figure:
    """Waiting requests over time, one panel per policy: simulated (mean over seeds) and fluid (dashed)."""
    shown = [o for o in comparison.outcomes if o.simulated is not None or o.fluid is not None]
    columns = min(4, max(1, len(shown)))
    figure = figure_of(2.6 * columns + 0.6, 1.75 * -(-len(shown) // columns) + 0.6)
    axes = figure.subplots(-(-len(shown) // columns) or 1, columns, sharex=True, sharey=True, squeeze=False)
    for axis, outcome in zip(axes.flat, shown, strict=False):
        _backlog_panel(axis, outcome)
    most = max((o.simulated.waiting.sum(axis=1).max() for o in shown if o.simulated is not None), default=1.0)
    axes.flat[0].set_ylim(0, 1.04 * max(float(most), 1.0))
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    figure.supxlabel("time (minutes)")
    figure.supylabel("requests waiting")
    return figure


def load_figure(comparison: Comparison) -> Figure:
    """Estimated load of each pool under each policy; beyond 1 a pool cannot keep up."""
    shown = [o for o in comparison.outcomes if o.load is not None][::-1]
    figure = figure_of(6.6, 0.27 * len(shown) + 1.3)
    axis = figure.subplots()
    for j, pool in enumerate(comparison.scenario.pools):
        x = [float(o.load[j]) for o in shown if o.load is not None]
        axis.plot(x, range(len(shown)), "o", ms=6.5, alpha=0.9, color=_colour(j), label=pool.name, clip_on=False)
    axis.axvline(1.0, color="#333333", lw=1.0)
    axis.set_yticks(range(len(shown)), [o.policy for o in shown])
    axis.set_xlim(left=0.0)
    axis.set_xlabel("load (estimated; a pool beyond 1 cannot keep up)")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(4, len(comparison.scenario.pools)))
    return figure


def latency_figure(comparison: Comparison) -> Figure:
    """Distributions of TTFT and TPOT over the measured requests of all seeds; dashed where the backlog grew."""
    figure = figure_of(9.6, 3.6)
    for axis, key, name in zip(figure.subplots(1, 2, sharey=True), ("ttft", "tpot"), ("TTFT", "TPOT"), strict=True):
        for i, outcome in enumerate(comparison.outcomes):
            if outcome.simulated is not None:
                _ecdf(axis, getattr(outcome.simulated, key), i, outcome)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(f"{name} (s)")
        axis.set_ylim(0, 1)
    figure.axes[0].set_ylabel("fraction of requests")
    lines, names = figure.axes[0].get_legend_handles_labels()
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8.0}
    figure.axes[1].legend(lines, names, title="dashed: backlog grew", **beside)
    return figure


def trace_figure(trace: Trace) -> Figure:
    """Arrival rate over time, if the trace has times, and the distributions of prompt and output lengths."""
    timed = trace.timed and trace.arrival[-1] > 0
    figure = figure_of(9.6, 4.4 if timed else 2.4)
    grid = figure.add_gridspec(2 if timed else 1, 2)
    if timed:
        _rate_panel(figure.add_subplot(grid[0, :]), trace.arrival)
    for column, (name, lengths) in enumerate((("prompt", trace.prompt), ("output", trace.output))):
        _length_panel(figure.add_subplot(grid[-1, column]), name, np.asarray(lengths, dtype=float), PALETTE[column])
    return figure


def comparison_pictures(comparison: Comparison, kind: Kind = "svg") -> dict[str, bytes]:
    """All pictures of a comparison by name: backlog, load, latency; none if no policy could be run."""
    if not any(outcome.simulated for outcome in comparison.outcomes):
        return {}
    builders = {"backlog": backlog_figure, "load": load_figure, "latency": latency_figure}
    return {name: draw(build, comparison, kind=kind) for name, build in builders.items()}


def _backlog_panel(axis: Axes, outcome: Outcome) -> None:
    colour = VERDICT_COLOURS[outcome.verdict]
    if outcome.simulated is not None:
        total = outcome.simulated.waiting.sum(axis=1)
        axis.fill_between(outcome.simulated.times / 60, total, color=colour, alpha=0.25, lw=0)
        axis.plot(outcome.simulated.times / 60, total, color=colour, lw=1.2)
        axis.set_xlim(0, float(outcome.simulated.times[-1]) / 60)
    if outcome.fluid is not None:
        inside = outcome.fluid.times <= (np.inf if outcome.simulated is None else outcome.simulated.times[-1])
        axis.plot(outcome.fluid.times[inside] / 60, outcome.fluid.backlog[inside].sum(axis=1), "--", color="k", lw=0.9)
    axis.set_title(f"{outcome.policy}: {outcome.verdict or 'no verdict'}", color=colour)


def _ecdf(axis: Axes, values: Floats, i: int, outcome: Outcome) -> None:
    positive = values > 0
    if positive.any():
        dashed = (0, (4, 2)) if outcome.growing else "-"
        heavy = 1.9 if outcome.plan is not None and outcome.plan.solve is not None else 1.1
        axis.plot(values[positive], QUANTILES[positive], ls=dashed, color=_colour(i), lw=heavy, label=outcome.policy)


def _rate_panel(axis: Axes, arrival: Floats) -> None:
    span = float(arrival[-1])
    counts, edges = np.histogram(arrival, bins=min(240, max(10, len(arrival) // 20)), range=(0.0, span))
    unit, name = (3600.0, "hours") if span > 4 * 3600 else (60.0, "minutes") if span > 240 else (1.0, "s")
    width = float(edges[1])
    axis.stairs(counts / width, edges / unit, fill=True, color=PALETTE[0], alpha=0.35)
    axis.stairs(counts / width, edges / unit, color=PALETTE[0], lw=0.8)
    axis.axhline(len(arrival) / span, color="#333333", lw=0.9, ls="--")
    axis.set(xlim=(0, span / unit), xlabel=f"time ({name})", ylabel="requests/s")
    axis.set_title(f"arrivals in windows of {width:.3g} s; dashed: mean {len(arrival) / span:.3g} requests/s")


def _length_panel(axis: Axes, name: str, lengths: Floats, colour: str) -> None:
    low, high = float(max(lengths.min(), 1)), float(max(lengths.max(), 2))
    axis.hist(lengths, bins=np.geomspace(low, high * 1.001, 41).tolist(), color=colour, alpha=0.6)
    axis.axvline(float(np.median(lengths)), color="#333333", lw=0.9, ls="--")
    axis.set(xscale="log", xlabel=f"{name} tokens", ylabel="requests")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_title(f"{name}: mean {lengths.mean():.4g}, median {np.median(lengths):.4g} (dashed), max {high:.4g}")


def _colour(i: int) -> str:
    return PALETTE[i % len(PALETTE)]
