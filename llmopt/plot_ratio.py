"""Pictures of comparisons of A/F ratios; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.drawing import PALETTE, Kind, draw, figure_of
from llmopt.evaluate.bundle_load import load_series
from llmopt.evaluate.gantt import Bar, bars
from llmopt.evaluate.ratio_comparison import RatioComparison, RatioOutcome
from llmopt.evaluate.ratio_curve import Curve, shape
from llmopt.plot_ways import ways_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTENTION, FFN, FLAT = PALETTE[0], PALETTE[1], "#009E73"
CYCLES = 3
"""Cycles of every micro-batch in the picture of a pipeline."""
MOST_ROWS = 16
"""Attention workers shown in it."""


def ratio_figure(comparison: RatioComparison) -> Figure:
    """Throughput per instance over the ratio: simulated with its interval, by theory, and where the policies are."""
    unit = "USD/hour" if comparison.scenario.bundle.weights != (1.0, 1.0) else "instance"

    def panel(axis: Axes, curve: Curve) -> None:
        _plateau(axis, curve)
        _throughput(axis, curve)
        _policies(axis, curve, [o for o in comparison.outcomes if o.curve is curve])
        axis.set_ylabel(f"tokens/s per {unit}")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.0)

    return _panels(comparison, panel, 8.4, 3.6)


def idle_figure(comparison: RatioComparison) -> Figure:
    """Idle shares of both roles over the ratio: FFN servers idle with few workers, Attention workers with many."""

    def panel(axis: Axes, curve: Curve) -> None:
        _plateau(axis, curve)
        x = np.arange(1, curve.workers + 1)
        for metric, name, colour in (("idle_attention", "Attention", ATTENTION), ("idle_ffn", "FFN", FFN)):
            values = 100 * curve.values(metric)
            axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.25, lw=0)
            axis.plot(x, values.mean(axis=0), color=colour, lw=1.6, label=name)
        axis.axvline(curve.best, color=FLAT, lw=1.0, ls="--", label=f"best: {curve.best}")
        axis.set_ylabel("idle (% of the time)")
        axis.set_ylim(-1, 100)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.0)

    return _panels(comparison, panel, 7.0, 3.0)


def gantt_figure(comparison: RatioComparison) -> Figure:
    """Some cycles at the best ratio: who computes, sends and waits; a colour for each micro-batch, grey where idle."""
    curve = comparison.curves[0]
    workers, micro_batches = curve.best, curve.bundle.micro_batches
    shown = min(workers, MOST_ROWS)
    found, start, end = _window(comparison, curve)
    figure = figure_of(9.6, 0.19 * (shown + 3) + 1.3)
    axis = figure.subplots()
    ideal = curve.bundle.pipeline == "ideal"
    names = [*(f"A{j + 1}" for j in range(shown)), *(("link", "FFN") if ideal else ("to FFN", "FFN", "back"))]
    for row in range(len(names)):
        axis.barh(row, 1e3 * (end - start), left=0, height=0.72, color="#EDEDED", lw=0)
    for one in found:
        at = _row_of(one, shown)
        if at is not None and one.end > start and one.start < end:
            left, right = (1e3 * (min(max(t, start), end) - start) for t in (one.start, one.end))
            axis.barh(at, right - left, left=left, height=0.72, color=PALETTE[one.micro_batch], lw=0.4, edgecolor="w")
    for m in range(micro_batches):
        # In an ideal cycle every stage is busy with another micro-batch, so that a colour is a cycle.
        label = f"cycles {m + 1}, {m + 1 + micro_batches}, ..." if ideal else f"micro-batch {m + 1}"
        axis.barh(0, 0, color=PALETTE[m], label=label)
    axis.set_yticks(range(len(names)), names, fontsize=7.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1e3 * (end - start))
    axis.grid(visible=False)
    axis.set_xlabel("time (ms)")
    hidden = f", {shown} of {workers} workers shown" if shown < workers else ""
    axis.set_title(f"{shape(curve.bundle.sized(workers))}, {curve.bundle.pipeline} pipeline{hidden}; grey: idle")
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=micro_batches, fontsize=8.0)
    return figure


def ratio_pictures(comparison: RatioComparison, kind: Kind = "svg") -> dict[str, bytes]:
    """All pictures of a comparison by name: ratio, idle, gantt, ways if compared; none if no policy has a result."""
    if not comparison.curves:
        return {}
    builders = {"ratio": ratio_figure, "idle": idle_figure, "gantt": gantt_figure}
    pictures = {name: draw(build, comparison, kind=kind) for name, build in builders.items()}
    if not isinstance(comparison.ways, str):
        pictures["ways"] = draw(ways_figure, comparison.ways, kind=kind)
    return pictures


def _panels(
    comparison: RatioComparison, draw_one: Callable[[Axes, Curve], None], width: float, height: float
) -> Figure:
    """One panel below the other for each curve."""
    curves = comparison.curves
    figure = figure_of(width, height * len(curves))
    for axis, curve in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves, strict=True):
        draw_one(axis, curve)
        axis.set_xlim(0.5 if curve.workers < 12 else 0, curve.workers + 0.5)
        y = curve.bundle.ffn_servers
        axis.set_xlabel(f"Attention workers beside {'an FFN server' if y == 1 else f'{y} FFN servers'}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{comparison.scenario.name}, B = {curve.bundle.batch}")
    return figure


def _plateau(axis: Axes, curve: Curve) -> None:
    first, last = curve.plateau
    axis.axvspan(first - 0.4, last + 0.4, color=FLAT, alpha=0.12, lw=0, label=f"within 1 %: {_span(first, last)}")


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _throughput(axis: Axes, curve: Curve) -> None:
    """Both theories as lines, the simulation as a line in its interval, and its best."""
    x = np.arange(1, curve.workers + 1)
    middle, half = _with_half(curve)
    for values, name, style in zip(
        curve.theory(), ("mean field", "with the barrier"), ((0, (1, 1.5)), (0, (5, 2))), strict=True
    ):
        axis.plot(x, values * curve.per_weight, color="#555555", lw=1.1, ls=style, label=f"theory, {name}")
    axis.fill_between(x, middle - half, middle + half, color=ATTENTION, alpha=0.25, lw=0)
    axis.plot(x, middle, color=ATTENTION, lw=1.8, label="simulated")
    if (rule := curve.rule * curve.bundle.ffn_servers) <= curve.workers:
        axis.axvline(rule, color=FFN, lw=1.0, ls=":", label=f"published rule: {rule:.2f}")
    star: dict[str, Any] = {"ms": 18, "color": FLAT, "mec": "w", "zorder": 5}
    axis.plot(curve.best, middle[curve.best - 1], "*", label=f"best: {curve.best}", **star)


def _with_half(curve: Curve) -> tuple[Floats, Floats]:
    points = [curve.at(x, "per_weight") for x in range(1, curve.workers + 1)]
    return np.array([p.mean for p in points]), np.nan_to_num(np.array([p.half for p in points]))


def _policies(axis: Axes, curve: Curve, outcomes: Sequence[RatioOutcome]) -> None:
    """A marker for each ratio that somebody chose, named in the legend."""
    middle = curve.mean("per_weight")
    chosen: dict[int, list[str]] = {}
    for outcome in outcomes:
        if outcome.bundle is not None:
            chosen.setdefault(outcome.bundle.attention_workers, []).append(outcome.policy)
    for i, (x, names) in enumerate(sorted(chosen.items())):
        colour = PALETTE[(i + 3) % len(PALETTE)]
        label = f"{x}: " + ",\n     ".join(", ".join(names[k : k + 2]) for k in range(0, len(names), 2))
        axis.plot(x, middle[x - 1], "o", ms=5.5, color=colour, mec="w", mew=0.8, zorder=6, label=label)


def _window(comparison: RatioComparison, curve: Curve) -> tuple[list[Bar], float, float]:
    """Bars of some cycles in steady state, with neighbours at both ends, and the span of time to show."""
    scenario, bundle = comparison.scenario, curve.bundle
    parts = 1 if bundle.pipeline == "ideal" else bundle.micro_batches
    each = CYCLES * bundle.micro_batches
    steps = ceil(4 * each / (parts * bundle.layers)) + 1
    workload, first_step = scenario.workload, scenario.pools[0].first_step
    seed = comparison.seeds[0]
    series = load_series(
        workload.classes, workload.rates, first_step, bundle, curve.best, steps, seed, start="stationary"
    )
    found = bars(bundle, series, curve.best, bundle.ffn_servers, each, 3 * each)
    starts = sorted({(b.step, b.layer, b.micro_batch): b.start for b in found if b.role == "attention"}.values())
    return found, starts[each], starts[2 * each]


def _row_of(one: Bar, shown: int) -> int | None:
    if one.role == "attention":
        return one.index if one.index < shown else None
    return shown + 1 if one.role == "ffn" else shown + 2 * one.index
