"""Numbers and tables as every command prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table


def number(value: float, digits: int = 3) -> str:
    """A number for a table: `digits` significant ones, no exponent up to a million, a dash where not defined."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}g}" if abs(value) < 1e-4 else f"{value:,.{min(decimals, 6)}f}"


def counted(n: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """Wall-clock seconds, to a hundredth."""
    return "<0.01" if seconds < 0.01 else number(seconds, 2)


def grid(*left: str, right: Sequence[str] = ()) -> Table:
    """A plain table with left- and right-aligned columns."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table


def pairs(name: str, value: str, rows: dict[str, Any]) -> Table:
    """A table of two columns; numbers with four digits."""
    table = grid(name, value)
    for key, item in rows.items():
        number_like = isinstance(item, float | int) and not isinstance(item, bool)
        table.add_row(key, number(float(item), 4) if number_like else str(item))
    return table


def fitted(part: RenderableType, width: int) -> list[RenderableType]:
    """A table too wide for `width` characters as several below each other, the first column in each; else as it is."""
    if not isinstance(part, Table):
        return [part]
    groups: list[list[int]] = [[]]
    used = first = 0
    for k, column in enumerate(part.columns):
        need = 2 + max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        if k == 0:
            used = first = need
            continue
        if groups[-1] and used + need - 2 > width:
            groups.append([])
            used = first
        groups[-1].append(k)
        used += need
    return [part] if len(groups) == 1 else [_columns_of(part, [0, *group]) for group in groups]


def _columns_of(table: Table, chosen: Sequence[int]) -> Table:
    some = grid()
    columns = [table.columns[k] for k in chosen]
    for column in columns:
        some.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
    for row in zip(*(column.cells for column in columns), strict=True):
        some.add_row(*row)
    return some
