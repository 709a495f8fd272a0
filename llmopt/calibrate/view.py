"""What `llmopt calibrate` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.calibrate.result import Calibration
from llmopt.hardware import Piece
from llmopt.tables import grid, number

if TYPE_CHECKING:
    import pandas as pd

UNITS = {
    "base": ("ms per step", 1e3),
    "prefill": ("µs per prefill token", 1e6),
    "decode": ("µs per decode sequence", 1e6),
    "kv": ("ns per KV token", 1e9),
    "pairs": ("ns per attention pair", 1e9),
}
TEXTS = ("kind", "batch", "context", "what", "region")
SHARES = ("bias", "median", "p95", "q90", "largest")
HEADERS = {"p95": "95 %", "q90": "90 %", "batch": "decode sequences", "context": "mean context (tokens)"}


def calibration_view(found: Calibration) -> Iterator[RenderableType]:
    """What was fitted, its pieces, its errors by region, and notes."""
    caps = found.caps
    yield Text(
        f"{found.machine.title}: max_batch {caps.max_batch}, token_budget {caps.token_budget:,}, kv_capacity "
        f"{caps.kv_capacity:,}; {found.method}"
    )
    yield pieces_table(found.pieces)
    yield errors_table(found.errors)
    if len(found.path) > 1:
        parts = (f"{d} decode and {m} mixed {error:.2%}" for d, m, error in found.path)
        yield Text(f"mean relative error by number of pieces: {', '.join(parts)}")
    for sentence in found.physics:
        yield Text(sentence, style="bold red" if sentence.startswith("WARNING") else "")
    for note in found.notes:
        yield Text(f"note: {note}", style="dim")


def pieces_table(pieces: tuple[Piece, ...]) -> Table:
    """The step time is the largest of these pieces."""
    table = grid("step time: largest of", right=[unit for unit, _ in UNITS.values()])
    for piece in pieces:
        values = (scale * getattr(piece, name) for name, (_, scale) in UNITS.items())
        table.add_row(piece.name, *(number(value, 4) if value else "·" for value in values))
    return table


def errors_table(errors: pd.DataFrame) -> Table:
    """One row for each region; the worst step in words."""
    texts = [name for name in TEXTS if name in errors]
    numbers = [name for name in errors if name in ("steps", "points", *SHARES)]
    worst = "prefill" in errors
    headers = [HEADERS.get(name, name) for name in numbers] + (["worst step", "measured", "predicted"] if worst else [])
    table = grid(*(HEADERS.get(name, name) for name in texts), right=headers)
    before = None
    for _, row in errors.iterrows():
        first = "" if row[texts[0]] == before else str(row[texts[0]])
        before = row[texts[0]]
        cells = [share(row[name]) if name in SHARES else f"{row[name]:,}" for name in numbers]
        table.add_row(first, *(str(row[name]) for name in texts[1:]), *cells, *(_worst(row) if worst else ()))
    return table


def share(value: float) -> str:
    """A relative number in percent; a dash where not known."""
    return "–" if value != value else f"{value:.1%}"


def _worst(row: Any) -> tuple[str, str, str]:
    step = f"{row['prefill']:.0f} + {row['decode']:.0f}, {row['kv']:,.0f} KV"
    return step, f"{number(1e3 * row['measured'])} ms", f"{number(1e3 * row['predicted'])} ms"
