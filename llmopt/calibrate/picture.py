"""The picture of a calibration: fit against measurement, and relative errors by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.calibrate.result import Calibration, Points
from llmopt.drawing import KINDS, PALETTE, draw, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE = 0.1
"""Relative error up to which the plane is shaded."""


def fit_figure(found: Calibration) -> Figure:
    """Predicted against measured seconds, coloured by kind, and the distribution of the relative error of each kind."""
    points = found.points
    figure = figure_of(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    shown = [k for k in range(len(points.kinds)) if (points.kind == k).any()]
    _against(left, points, shown)
    _distributions(right, points, shown)
    figure.suptitle(found.machine.title, x=0.01, ha="left", fontsize=10)
    return figure


def calibration_pictures(found: Calibration) -> dict[str, bytes]:
    """``fit.svg`` and ``fit.png``; the same calibration gives the same bytes."""
    return {f"fit.{kind}": draw(fit_figure, found, kind=kind) for kind in KINDS}


def _against(axis: Axes, points: Points, shown: list[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ends = np.array([0.9, 1.1]) * _range(np.concatenate([points.measured, points.predicted]))
    axis.fill_between(ends, (1 - CLOSE) * ends, (1 + CLOSE) * ends, color="#EEEEEE", lw=0)
    axis.plot(ends, ends, color="#666666", lw=0.8)
    for k in shown:
        mine = points.kind == k
        style: dict[str, Any] = {"ms": 3.0, "alpha": 0.55, "mew": 0.0}
        axis.plot(points.measured[mine], points.predicted[mine], "o", color=PALETTE[k], label=points.kinds[k], **style)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter("{x:g}")
        side.set_minor_locator(NullLocator())
    axis.set(xlabel=f"measured {points.what} (s)", ylabel=f"predicted {points.what} (s)")
    axis.set_title(f"shaded: within {CLOSE:.0%}")
    axis.legend(loc="upper left", markerscale=1.6)


def _distributions(axis: Axes, points: Points, shown: list[int]) -> None:
    """Share of the points by relative error, one step line for each kind."""
    error = 100.0 * (points.predicted / points.measured - 1.0)
    axis.axvspan(-100 * CLOSE, 100 * CLOSE, color="#EEEEEE", lw=0)
    axis.axvline(0.0, color="#666666", lw=0.8)
    for k in shown:
        mine = np.sort(error[points.kind == k])
        axis.step(mine, (np.arange(len(mine)) + 1) / len(mine), color=PALETTE[k], lw=1.4, label=points.kinds[k])
    widest = max(20.0, float(np.quantile(np.abs(error), 0.995)))
    axis.set(xlim=(-1.1 * widest, 1.1 * widest), ylim=(0, 1), xlabel="relative error (%)", ylabel="fraction of points")
    axis.set_title("too short to the left, too long to the right")


def _range(values: Floats) -> Floats:
    return np.array([values.min(), values.max()])
