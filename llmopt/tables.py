"""Numbers and tables as every command prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
