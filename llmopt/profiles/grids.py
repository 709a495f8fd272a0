"""From measured rows to full grids: pivoting, filling of holes, new axes, thinning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.profiles.data import Grid

ROUNDS = 3
"""How often holes are filled along all axes: one pass may open a row to another axis."""
THIN = 0.01
"""Relative error up to which knots are left out where a table would be too large."""


def pivot(columns: Sequence[Floats], seconds: Floats) -> tuple[tuple[Floats, ...], Floats]:
    """Axes and the array over their combinations, NaN where no row is; repeated rows give their median."""
    import pandas as pd

    frame = pd.DataFrame({str(d): column for d, column in enumerate(columns)} | {"seconds": seconds})
    medians = frame.groupby([str(d) for d in range(len(columns))], sort=True)["seconds"].median()
    keys = [medians.index.get_level_values(d).to_numpy(dtype=float) for d in range(len(columns))]
    axes = tuple(np.unique(key) for key in keys)
    table = np.full([len(axis) for axis in axes], np.nan)
    table[tuple(np.searchsorted(axis, key) for axis, key in zip(axes, keys, strict=True))] = medians.to_numpy()
    return axes, table


def full(axes: tuple[Floats, ...], table: Floats, order: Sequence[int]) -> Grid:
    """A grid without holes.

    Holes between measurements are interpolated linearly along one axis after the other, in `order`, again until
    nothing changes. What then is left lies beyond the measurements: it follows the last two known entries of its row
    along the axes in `order` (never below the last), or repeats the only one.
    """
    seconds, total = np.array(table, dtype=float), table.size
    measured = int(np.isfinite(seconds).sum())
    for _ in range(ROUNDS):
        for d in order:
            if np.isnan(seconds).any():
                seconds = _along(seconds, axes[d], d, _between)
    inside = int(np.isfinite(seconds).sum())
    for _ in range(len(axes)):
        for d in order:
            if np.isnan(seconds).any():
                seconds = _along(seconds, axes[d], d, _beyond)
    return Grid(axes, seconds, (inside - measured) / total, (total - inside) / total)


def _along(table: Floats, axis: Floats, d: int, change: object) -> Floats:
    moved = np.moveaxis(table, d, -1)
    rows = moved.reshape(-1, len(axis)).copy()
    known = np.isfinite(rows)
    for i in np.flatnonzero(known.any(axis=1) & ~known.all(axis=1)):
        change(axis, rows[i], known[i])  # type: ignore[operator]
    return np.moveaxis(rows.reshape(moved.shape), -1, d)


def _between(axis: Floats, row: Floats, known: Ints) -> None:
    at = axis[known]
    inside = ~known & (axis >= at[0]) & (axis <= at[-1])
    row[inside] = np.interp(axis[inside], at, row[known])


def _beyond(axis: Floats, row: Floats, known: Ints) -> None:
    at, values = axis[known], row[known]
    slope = max(0.0, (values[-1] - values[-2]) / (at[-1] - at[-2])) if len(at) > 1 else 0.0
    above, below = axis > at[-1], axis < at[0]
    row[above] = values[-1] + slope * (axis[above] - at[-1])
    row[below] = values[0]
    row[~known & ~above & ~below] = np.interp(axis[~known & ~above & ~below], at, values)


def on_cached(axes: tuple[Floats, ...], table: Floats) -> tuple[tuple[Floats, ...], Floats]:
    """A table over (chunk, mean keys of a query, ...) on a common axis of cached context instead.

    A chunk of c tokens behind h cached ones has h + c/2 keys per query, so that every chunk has cached contexts of its
    own; each is interpolated linearly at 0 and at the values of the old axis. What lies outside stays NaN. Below h = 0,
    where several short prompts are, `StepTable` scales by the pairs.
    """
    chunk, keys = axes[:2]
    table = _along(table, keys, 1, _between)
    cached = np.concatenate([[0.0], keys[keys > 0]])
    out = np.full((len(chunk), len(cached), *table.shape[2:]), np.nan)
    for i, c in enumerate(chunk):
        at = cached + 0.5 * c
        inside = (at >= keys[0]) & (at <= keys[-1])
        low = np.clip(np.searchsorted(keys, at, side="right") - 1, 0, max(0, len(keys) - 2))
        high = np.minimum(low + 1, len(keys) - 1)
        share = np.clip((at - keys[low]) / np.maximum(keys[high] - keys[low], 1e-9), 0.0, 1.0)
        share = share.reshape(-1, *[1] * (table.ndim - 2))
        one, two = table[i, low], table[i, high]
        value = np.where(share == 0, one, np.where(share == 1, two, one * (1 - share) + two * share))
        out[i, inside] = value[inside]
    some = np.isfinite(out).reshape(len(chunk), len(cached), -1).any(axis=(0, 2))
    return (chunk, cached[some], *axes[2:]), out[:, some]


def widened(prefill: Grid, mixed: Grid) -> tuple[Grid, Grid]:
    """Both on the union of their chunk and cached axes, by interpolation."""
    chunk, cached = (np.union1d(a, b) for a, b in zip(prefill.axes, mixed.axes, strict=False))
    return _spread(prefill, chunk, cached), _spread(mixed, chunk, cached)


def _spread(grid: Grid, chunk: Floats, cached: Floats) -> Grid:
    if len(chunk) == len(grid.axes[0]) and len(cached) == len(grid.axes[1]):
        return grid
    axes = (chunk, cached, *grid.axes[2:])
    points = [mesh.ravel() for mesh in np.meshgrid(*axes, indexing="ij")]
    seconds = np.maximum(grid(*points), grid.seconds.min())
    return Grid(axes, seconds.reshape([len(axis) for axis in axes]), grid.filled, grid.extended, grid.ends)


def thinned(grid: Grid, most: Sequence[int]) -> Grid:
    """At most `most[d]` knots on axis d: those whose absence would change the table most, until 1 % is held."""
    axes, seconds = list(grid.axes), grid.seconds
    for d, count in enumerate(most):
        keep = _knots(axes[d], np.moveaxis(seconds, d, 0).reshape(len(axes[d]), -1), count)
        axes[d], seconds = axes[d][keep], np.take(seconds, keep, axis=d)
    return Grid(tuple(axes), seconds, grid.filled, grid.extended, grid.ends)


def _knots(axis: Floats, table: Floats, most: int) -> Ints:
    """Knots to keep, added one by one where linear interpolation of `table` (len(axis), m) is most wrong."""
    keep = [0, len(axis) - 1] if len(axis) > 1 else [0]
    while len(keep) < min(most, len(axis)):
        at = axis[keep]
        low = np.clip(np.searchsorted(at, axis, side="right") - 1, 0, len(keep) - 2)
        share = ((axis - at[low]) / (at[low + 1] - at[low]))[:, None]
        guess = table[np.array(keep)[low]] * (1 - share) + table[np.array(keep)[low + 1]] * share
        error = (np.abs(guess / table - 1)).max(axis=1)
        if error.max() <= THIN:
            break
        keep = sorted([*keep, int(error.argmax())])
    return np.array(keep)


def behind_context(axes: tuple[Floats, ...], table: Floats) -> Grid:
    """A full grid of prefill attention over (chunk, cached context), of which long contexts are known for small chunks.

    Attention behind cached context reads one key more per query for each cached token: beyond the measured contexts of
    a chunk its time grows by chunk x rate per cached token, with the rate of that chunk if its contexts reach half its
    own length or half the axis, else of the nearest chunk whose do; if there is none, the seconds per pair of the
    largest fresh chunk.
    """
    ends = tuple(float(axis[-1]) for axis in axes)
    if len(axes[1]) == 1:
        # only fresh prompts: one more knot, as the time grows linearly with the cached context
        axes = (axes[0], np.append(axes[1], axes[0][-1]))
        table = np.column_stack([table, np.full(len(table), np.nan)])
    chunk, cached = axes
    total, measured = table.size, int(np.isfinite(table).sum())
    seconds = _along(table, cached, 1, _between)
    inside = int(np.isfinite(seconds).sum())
    rate = _rates(chunk, cached, seconds)
    for i, row in enumerate(seconds):
        known = np.flatnonzero(np.isfinite(row))
        if len(known):
            last = known[-1]
            row[last + 1 :] = row[last] + chunk[i] * rate[i] * (cached[last + 1 :] - cached[last])
    rest = full(axes, seconds, (0, 1))
    return Grid(axes, rest.seconds, (inside - measured) / total, (total - inside) / total, ends)


def _rates(chunk: Floats, cached: Floats, seconds: Floats) -> Floats:
    """Seconds per query and cached token, (len(chunk),)."""
    known = np.isfinite(seconds)
    own = np.full(len(chunk), np.nan)
    for i in range(len(chunk)):
        at = np.flatnonzero(known[i])
        span = cached[at[-1]] - cached[at[0]] if len(at) > 1 else 0.0
        if span > 0 and span >= 0.5 * min(chunk[i], cached[-1] - cached[0]):
            rise = (seconds[i, at[-1]] - seconds[i, at[0]]) / (cached[at[-1]] - cached[at[0]])
            own[i] = max(0.0, rise) / chunk[i]
    have = np.isfinite(own)
    if have.any():
        return np.asarray(np.interp(chunk, chunk[have], own[have]))
    fresh = np.flatnonzero(known[:, 0])
    rise = seconds[fresh[-1], 0] - seconds[fresh[0], 0]
    pairs = 0.5 * (chunk[fresh[-1]] ** 2 - chunk[fresh[0]] ** 2)
    return np.full(len(chunk), max(0.0, rise) / max(pairs, 1.0))
