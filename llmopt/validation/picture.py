"""Pictures of a validation: the engine over time, distributions, and request against request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.drawing import PALETTE, Kind, draw, figure_of
from llmopt.validation.accuracy import METRICS
from llmopt.validation.result import Validation
from llmopt.validation.view import UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED, PREDICTED = "#444444", PALETTE[1]
"""Grey for what was, a colour for what was predicted."""


def state_figure(validation: Validation) -> Figure:
    """Running and waiting requests over time, and memory in use if it was recorded."""
    recorded, predicted = validation.run.curves, validation.curves
    names = {"running": "requests running", "waiting": "requests waiting"}
    if recorded is not None and np.nan_to_num(recorded.memory).any():
        names["memory"] = "KV memory in use (%)"
    figure = figure_of(8.2, 1.7 * len(names) + 0.6)
    axes = figure.subplots(len(names), 1, sharex=True)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        if recorded is not None:
            axis.plot(recorded.times, getattr(recorded, name), color=MEASURED, lw=2.0, alpha=0.6, label="measured")
        axis.plot(predicted.times, getattr(predicted, name), color=PREDICTED, lw=1.1, label="predicted")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    axes[-1].set_xlabel("time since the first arrival (s)")
    return figure


def distribution_figure(validation: Validation) -> Figure:
    """Distributions of TTFT, TPOT and E2E over the judged requests."""
    figure = figure_of(9.6, 2.9)
    for axis, name in zip(figure.subplots(1, 3, sharey=True), METRICS, strict=True):
        label, unit, scale = UNITS[name]
        for data, colour, width, who in _both(validation):
            values = np.sort(scale * data[name][np.isfinite(data[name])])
            if len(values):
                axis.step(values, np.arange(1, len(values) + 1) / len(values), color=colour, lw=width, label=who)
        axis.set_xlabel(f"{label} ({unit})")
        axis.set_ylim(0, 1)
    figure.axes[0].set_ylabel("fraction of requests")
    figure.axes[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return figure


def request_figure(validation: Validation) -> Figure:
    """Predicted against measured, one point per judged request."""
    figure = figure_of(9.6, 3.3)
    for axis, name in zip(figure.subplots(1, 3), METRICS, strict=True):
        label, unit, scale = UNITS[name]
        x, y = (scale * data[name] for data, *_ in _both(validation))
        _identity(axis, np.concatenate([x, y]))
        axis.plot(x, y, ".", color=PREDICTED, ms=4, alpha=0.6)
        axis.set(xlabel=f"measured {label} ({unit})", ylabel=f"predicted {label} ({unit})")
    return figure


FIGURES: dict[str, Callable[[Validation], Figure]] = {
    "state": state_figure,
    "distributions": distribution_figure,
    "requests": request_figure,
}


def pictures(validation: Validation, kind: Kind = "svg") -> dict[str, bytes]:
    """All pictures by name; equal validations give equal bytes."""
    return {name: draw(build, validation, kind=kind) for name, build in FIGURES.items()}


def _both(validation: Validation) -> tuple[tuple[Any, str, float, str], ...]:
    return (
        (validation.measured_latencies, MEASURED, 2.4, "measured"),
        (validation.predicted_latencies, PREDICTED, 1.1, "predicted"),
    )


def _identity(axis: Axes, values: Floats) -> None:
    """The line of perfect prediction and, dashed, 10 % to both sides."""
    known = values[np.isfinite(values)]
    ends = np.array([0.0, 1.03 * float(known.max(initial=1e-9))])
    for factor, style in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
        axis.plot(ends, factor * ends, style, color="#999999", lw=0.9)
    axis.set_xlim(0, ends[1])
    axis.set_ylim(0, ends[1])
