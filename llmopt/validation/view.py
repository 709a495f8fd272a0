"""What `llmopt validate` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.tables import grid, number
from llmopt.validation.accuracy import JUDGED, METRICS, STATISTICS
from llmopt.validation.result import Validation

UNITS = {"ttft": ("TTFT", "s", 1.0), "tpot": ("TPOT", "ms", 1e3), "e2e": ("E2E", "s", 1.0)}
"""Name, unit and units in a second of each metric."""
LARGE, CLOSE = 0.1, 0.05
"""Relative errors from which one is shown in red, and up to which in green."""


def validation_view(validation: Validation) -> Iterator[RenderableType]:
    """The table of errors, how single requests and the curves agree, and notes."""
    yield Text(headline(validation))
    yield _errors_table(validation)
    yield Text(summary_sentence(validation))
    yield Text(requests_sentence(validation))
    if validation.curve_errors:
        yield Text(curves_sentence(validation))
    for note in remarks(validation):
        yield Text(f"note: {note}", style="dim")


def headline(validation: Validation) -> str:
    """Run, scenario and how it was played."""
    v = validation
    return (
        f"{v.run.name} [{v.scenario.digest}]: {len(v.run.records)} requests, {v.steps} steps, "
        f"{v.preemptions} preemptions; step time: {v.step_time}; host overhead: {1e3 * v.host_overhead:.2f} ms a step "
        f"({v.overhead})"
    )


def summary_sentence(validation: Validation) -> str:
    """Mean and largest error, and over which requests."""
    v = validation
    judged = len(v.run.records) - v.skipped
    close = int((abs(v.errors) <= CLOSE).sum())
    over = f"requests {v.skipped + 1} to {len(v.run.records)}" if v.skipped else f"all {judged} requests"
    return (
        f"{', '.join(JUDGED)}: mean absolute error {percent(v.mean_absolute_error)}, largest "
        f"{percent(v.largest_error)}, {close} of {len(v.errors)} within {CLOSE:.0%}; over {over}"
    )


def requests_sentence(validation: Validation) -> str:
    """Agreement request by request."""
    parts = [
        f"{UNITS[name][0]} {percent(one.median_error)} (rank correlation {one.rank_correlation:.3f}, "
        f"distance of distributions {one.distance:.3f})"
        for name, one in validation.agreements.items()
    ]
    return f"median error of a single request: {'; '.join(parts)}"


def curves_sentence(validation: Validation) -> str:
    """How far the curves over time are apart."""
    parts = [f"{name} {percent(error)}" for name, error in validation.curve_errors.items()]
    return f"curves over time, mean difference as a share of the peak: {', '.join(parts)}"


def remarks(validation: Validation) -> Iterator[str]:
    """Notes on the prediction."""
    yield from validation.notes
    if validation.extrapolated:
        share = validation.extrapolated / max(validation.steps, 1)
        yield f"{validation.extrapolated} steps ({share:.1%}) lie outside the measured ranges and were extrapolated"
    for constant in validation.constants:
        yield f"{constant.name} = {constant.value:.4g} {constant.unit}: {constant.reason}"


def percent(value: float) -> str:
    """A relative number in percent, a dash where not known."""
    return "–" if math.isnan(value) else f"{value:.1%}"


def rows(validation: Validation) -> Iterator[tuple[str, str, list[str], list[float]]]:
    """Metric, kind, cells and, for the row of errors, the errors themselves."""
    for name in METRICS:
        label, unit, scale = UNITS[name]
        for kind, data in (("measured", validation.measured), ("predicted", validation.predicted)):
            yield f"{label} ({unit})", kind, [number(scale * data[name][key], 4) for key in STATISTICS], []
        errors = [validation.relative_error[name][key] for key in STATISTICS]
        yield f"{label} ({unit})", "error", ["–" if math.isnan(e) else f"{e:+.1%}" for e in errors], errors


def colour(error: float) -> str:
    """Green, yellow or red."""
    return "green" if abs(error) <= CLOSE else "red" if abs(error) > LARGE else "yellow"


def _errors_table(validation: Validation) -> Table:
    table = grid("", " ", right=STATISTICS)
    for label, kind, cells, errors in rows(validation):
        shown: list[RenderableType] = list(cells)
        if errors:
            shown = [Text(c, style=colour(e)) for c, e in zip(cells, errors, strict=True)]
        table.add_row(label if kind == "measured" else "", kind, *shown)
    return table
