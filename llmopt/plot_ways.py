"""The picture of the three ways of serving: throughput over the TPOT limit, and a map of who wins where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.drawing import PALETTE, figure_of
from llmopt.ways import WAYS
from llmopt.ways_report import TIE, WaysComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(WAYS, (PALETTE[4], PALETTE[0], PALETTE[2]), strict=True))
LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Advantages over the second best way at which the map has contours."""


def ways_figure(ways: WaysComparison) -> Figure:
    """Left: what each way makes under every TPOT limit. Right: the best way over TPOT limit and length of prompts."""
    figure = figure_of(10.4, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _curves(left, ways)
    _map(right, ways)
    return figure


def _curves(axis: Axes, ways: WaysComparison) -> None:
    x, scale, inside = 1e3 * ways.limits, 1e-6 if ways.priced else 1.0, ways.limit <= ways.limits[-1]
    for way, curve in zip(WAYS, ways.curves, strict=True):
        axis.plot(x, np.where(curve > 0, scale * curve, np.nan), color=COLOURS[way], lw=1.8, label=way)
    for served in ways.served:
        if served.bundle is not None:
            at = ways.limit if inside else ways.limits[-1]
            axis.plot(1e3 * at, scale * ways.figure(served), "o", ms=5, color=COLOURS[served.way])
    if inside:
        axis.axvline(1e3 * ways.limit, color="#333333", lw=0.9, ls="--")
    unit = f"million {ways.unit}" if ways.priced else ways.unit
    axis.set(xscale="log", xlim=(x[0], x[-1]), ylim=(0, None), xlabel="TPOT limit (ms)", ylabel=unit)
    _plain_ticks(axis, x)
    axis.legend(loc="upper left")
    axis.set_title("each way at its best batch; dots: whole batches at the scenario's limit", fontsize=8.5)


def _map(axis: Axes, ways: WaysComparison) -> None:
    from matplotlib.colors import to_rgb

    lead, tied, won = winners(ways)
    x, y = 1e3 * ways.limits, ways.contexts
    image = np.ones((*lead.shape, 3))
    for k, way in enumerate(WAYS):
        inside = won == k
        # The paler, the smaller the lead: a lead of 100 % and more has the full colour.
        depth = 0.25 + 0.65 * np.clip(np.where(np.isfinite(lead), lead, 1.0), 0.0, 1.0)
        image[inside] = 1 - depth[inside, None] * (1 - np.array(to_rgb(COLOURS[way])))
    image[tied] = (0.87, 0.87, 0.87)
    axis.pcolormesh(x, y, image, shading="nearest", rasterized=True)
    _contours(axis, x, y, np.where(won >= 0, lead, np.nan))
    for k, way in enumerate(WAYS):
        _label(axis, x, y, (won == k) & ~tied, way, COLOURS[way])
    _label(axis, x, y, won < 0, "none", "#777777")
    if ways.limit <= ways.limits[-1]:
        axis.plot(1e3 * ways.limit, 1.0, "k+", ms=10, mew=1.6)
    axis.set(xscale="log", yscale="log", xlabel="TPOT limit (ms)", ylabel="prompts, times the scenario's")
    axis.set_yticks([y[0], 0.25, 0.5, 1, 2, 4, y[-1]])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    _plain_ticks(axis, x)
    axis.grid(False)
    axis.set_title("the best way, and its lead over the second (grey: within 1 %; +: the scenario)", fontsize=8.5)


def winners(ways: WaysComparison) -> tuple[Floats, Bools, np.ndarray[Any, np.dtype[np.int64]]]:
    """Lead over the second best, whether that is a tie, and the number of the best way, -1: none serves; map shapes.

    The lead is infinite where only one way serves.
    """
    ordered = np.sort(ways.value, axis=0)
    best, second = ordered[-1], ordered[-2]
    with np.errstate(divide="ignore", invalid="ignore"):
        lead = np.where(best > 0, best / second - 1, 0.0)
    won = np.where(best > 0, ways.value.argmax(axis=0), -1)
    return np.asarray(lead), np.asarray((best > 0) & (lead < TIE)), won


def _contours(axis: Axes, x: Floats, y: Floats, lead: Floats) -> None:
    finite = np.ma.masked_invalid(np.where(np.isfinite(lead), lead, np.nan))
    levels = [level for level in LEVELS if finite.min() < level < finite.max()]
    if levels:
        lines = axis.contour(x, y, finite, levels=levels, colors="#222222", linewidths=0.7)
        axis.clabel(lines, fmt=lambda level: f"{level:.0%}", fontsize=7)


def _label(axis: Axes, x: Floats, y: Floats, inside: Bools, text: str, colour: str) -> None:
    """The name of a region at the cell that is farthest inside it."""
    if inside.sum() < 0.02 * inside.size:
        return
    depth, shrunk = np.zeros(inside.shape), inside.copy()
    while shrunk.any():
        depth += shrunk
        wide = np.pad(shrunk, 1, constant_values=False)
        shrunk = wide[1:-1, 1:-1] & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    white = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    axis.text(x[column], y[row], text, color=colour, weight="bold", ha="center", va="center", fontsize=9, bbox=white)


def _plain_ticks(axis: Axes, x: Floats) -> None:
    """Ticks at round numbers of milliseconds."""
    steps = [m * 10.0**e for e in range(-3, 6) for m in (1, 1.5, 2, 3, 5, 7)]
    axis.set_xticks([t for t in steps if x[0] <= t <= x[-1]])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(_none())


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
