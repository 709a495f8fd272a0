"""The three ways of serving on the page of a comparison: the tables and sentences that the command prints, as HTML."""

from __future__ import annotations

from html import escape

from rich.table import Table

from llmopt.text_ways import ways_view
from llmopt.ways_report import WaysComparison

CAPTION = (
    "Ways of serving. Left: what colocated, prefill/decode-disaggregated (PD) and AFD serving make at their best batch "
    "under every TPOT limit. Right: which one wins over TPOT limit and length of prompts, and by how much."
)


def ways_notes(ways: WaysComparison) -> list[str]:
    """A heading, the tables and the sentences, each as one HTML element."""
    title, *parts = ways_view(ways)
    return [f"<h2>{escape(str(title))}</h2>", *(_element(part) for part in parts)]


def _element(part: object) -> str:
    return _table(part) if isinstance(part, Table) else f"<p>{escape(str(part))}</p>"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    lines = zip(*(column.cells for column in table.columns), strict=True)
    rows = ("".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
