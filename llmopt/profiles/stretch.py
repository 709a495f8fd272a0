"""Knots beyond the measurements, so that extrapolation follows a trend and not the noise of two neighbours.

`StepTable` continues along the last two knots. Profilers end with knots so close that their slope means nothing: an RTX
4090 takes 7 microseconds more for each of the last 16 of 2048 tokens, where a token costs 88. So each axis gets one
more knot at four times its end, on the chord of its upper half; `StepTable.limits` keeps where the measurements end.
"""

from __future__ import annotations

import numpy as np

from llmopt.arrays import Floats

FACTOR = 4.0


def stretched(axes: tuple[Floats, ...], table: Floats, first: int = 0) -> tuple[tuple[Floats, ...], Floats]:
    """Axes and table with a knot more on every axis from `first` on that has at least two."""
    out = list(axes)
    for d in range(first, len(axes)):
        out[d], table = _longer(out[d], table, d)
    return tuple(out), table


def _longer(axis: Floats, table: Floats, d: int) -> tuple[Floats, Floats]:
    if len(axis) < 2:
        return axis, table
    last, values = axis[-1], np.moveaxis(table, d, 0)
    middle = max(0.5 * last, axis[0])
    slope = np.maximum(0.0, (values[-1] - _at(axis, values, middle)) / (last - middle))
    longer = np.concatenate([values, (values[-1] + slope * (FACTOR - 1.0) * last)[None]])
    return np.append(axis, FACTOR * last), np.moveaxis(longer, 0, d)


def _at(axis: Floats, values: Floats, point: float) -> Floats:
    """Linear interpolation of `values` (len(axis), ...) along their first axis."""
    if len(axis) == 1:
        return np.asarray(values[0])
    low = int(np.clip(np.searchsorted(axis, point, side="right") - 1, 0, len(axis) - 2))
    share = max(0.0, (point - axis[low]) / (axis[low + 1] - axis[low]))
    return np.asarray(values[low] * (1.0 - share) + values[low + 1] * share)


def by_chunks(axes: tuple[Floats, ...], table: Floats) -> tuple[tuple[Floats, ...], Floats]:
    """The table over (chunk, cached, sequences, context), stretched; a longer chunk is several of the longest.

    m chunks of L tokens one after the other read what one of m L tokens reads, in the mean behind (m - 1) L / 2 more
    cached tokens; the decode sequences run with one of them.
    """
    (chunk, *rest), table = stretched(axes, table, 1)
    last, cached, more = chunk[-1], rest[0], []
    for m in (2.0, FACTOR):
        behind = cached + 0.5 * (m - 1.0) * last
        shifted = np.array([_at(cached, table[-1], point) for point in behind])
        more.append(shifted + (m - 1.0) * shifted[:, :1, :1])
    return (np.append(chunk, [2.0 * last, FACTOR * last]), *rest), np.concatenate([table, np.array(more)])
