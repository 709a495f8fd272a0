"""What the layouts have in common: operators and attention grids out of the rows of one file, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.profiles.checks import check_grid, check_operators
from llmopt.profiles.data import Curve
from llmopt.profiles.files import Rows
from llmopt.profiles.grids import pivot


def operator_curves(
    rows: Rows, names: Sequence[str], axis: Floats, code: Floats, seconds: Floats, tolerance: float, unit: str
) -> dict[str, Curve]:
    """One curve per name; row i times operator `names[code[i]]` at `axis[i]`; repeated rows give their median."""
    (at, codes), table = pivot([axis, code], seconds)
    _, lines = pivot([axis, code], rows.line.astype(float))
    found = [names[int(c)] for c in codes]
    check_operators(rows, found, at, table, lines, tolerance, unit)
    known = np.isfinite(table)
    return {name: Curve(at[known[:, j]], table[known[:, j], j]) for j, name in enumerate(found)}


def attention_table(
    rows: Rows,
    keep: Bools,
    columns: dict[str, Floats],
    seconds: Floats,
    what: str = "attention",
    checked: Floats | None = None,
    quorum: float = 0.0,
) -> tuple[tuple[Floats, ...], Floats]:
    """Axes and table, NaN in the holes, of the rows for which `keep` holds, against `columns` by their names.

    What must not fall (see `llmopt.profiles.checks.falls`) is `checked`, by default the seconds themselves.
    """
    chosen = [column[keep] for column in columns.values()]
    axes, table = pivot(chosen, seconds[keep])
    _, lines = pivot(chosen, rows.line[keep].astype(float))
    kernel = table if checked is None else pivot(chosen, checked[keep])[1]
    check_grid(rows, what, axes, list(columns), kernel, lines, quorum)
    return axes, table
