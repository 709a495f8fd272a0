"""How every picture is drawn: house style, no pyplot, and equal bytes for equal data.

matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["svg", "png"]
KINDS: tuple[Kind, Kind] = ("svg", "png")
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8B5A2B", "#6A3D9A", "#9A9A00", "#444444", "#F781BF", "#00CED1", "#A50026", "#7FBF3F", "#B0B0B0", "#001F8B"),
)
"""The first six stay apart for colour-blind readers (Okabe & Ito 2008); the others for comparisons of many policies."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "legend.frameon": False,
    "figure.dpi": 100.0,
}


def draw(build: Callable[..., Figure], *data: Any, kind: Kind = "svg") -> bytes:
    """The picture that `build(*data)` makes, as the bytes of a file; equal data give equal bytes."""
    with _style(salt=build.__name__):
        buffer = io.BytesIO()
        compact: dict[str, Any] = {"pil_kwargs": {"optimize": True}, "metadata": {"Software": None}}
        settings = compact if kind == "png" else {"metadata": {"Date": None}}
        build(*data).savefig(buffer, format=kind, dpi=130, **settings)
        return buffer.getvalue()


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that makes room for its labels by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """House style, with ids in the SVG that differ between pictures and never between runs."""
    from matplotlib import rc_context

    with rc_context({**STYLE, "svg.hashsalt": salt}):
        yield
