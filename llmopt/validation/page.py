"""The results folder of a validation: JSON, pictures, and one HTML file that needs no other file and no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from llmopt import __version__
from llmopt.output import to_json, write
from llmopt.validation.accuracy import STATISTICS
from llmopt.validation.picture import pictures
from llmopt.validation.result import Validation
from llmopt.validation.view import (
    colour,
    curves_sentence,
    headline,
    remarks,
    requests_sentence,
    rows,
    summary_sentence,
)

CAPTIONS = {
    "state": "The engine over time: requests running and waiting (preempted ones wait again).",
    "distributions": "Distributions over the judged requests, by the engine's clock.",
    "requests": "Each point is one request. Dotted: 10 % to both sides.",
}
COLOURS = {"green": "#0072B2", "yellow": "#B07C00", "red": "#C8361D"}
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } .meta, figcaption { color: #666; font-size: 0.87em; }
table { border-collapse: collapse; font-size: 0.87em; } .wide { overflow-x: auto; }
th, td { padding: 0.3em 0.7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child, td:nth-child(2) { text-align: left; }
figure { margin: 2em 0; } figure svg { max-width: 100%; height: auto; }
</style></head><body>
<h1>$title</h1><p class="meta">$meta</p>
<div class="wide"><table><thead><tr><th></th><th></th>$head</tr></thead><tbody>
$rows
</tbody></table></div>
$sentences
$figures
<div class="wide"><table><thead><tr><th>setting</th><th>value</th><th>origin</th><th></th></tr></thead><tbody>
$settings
</tbody></table></div>
<p class="meta">llmopt $version. The same numbers, and more, are in validation.json beside this file.</p>
</body></html>
""")


def html_page(validation: Validation, vector: dict[str, bytes]) -> str:
    """The page; `vector` are the SVG pictures by name, put inline."""
    said = [summary_sentence(validation), requests_sentence(validation)]
    said += [curves_sentence(validation)] if validation.curve_errors else []
    lines = [f"<p>{escape(text)}</p>" for text in said]
    lines += [f'<p class="meta">{escape(text)}</p>' for text in remarks(validation)]
    return PAGE.substitute(
        title=f"{escape(validation.run.name)}: predicted against measured",
        meta=escape(headline(validation)),
        head="".join(f"<th>{name}</th>" for name in STATISTICS),
        rows="\n".join(_row(*row) for row in rows(validation)),
        sentences="\n".join(lines),
        figures="\n".join(_figure(name, svg) for name, svg in vector.items()),
        settings="\n".join(_setting(validation, name) for name in validation.settings),
        version=__version__,
    )


def write_report(validation: Validation, folder: str | Path) -> list[Path]:
    """Write validation.json, the pictures (SVG, PNG) and report.html; all are made before the first is written."""
    target = Path(folder)
    vector, bitmap = pictures(validation, "svg"), pictures(validation, "png")
    page = html_page(validation, vector)
    return [
        write(target / "validation.json", to_json(validation.as_dict())),
        *(write(target / f"{name}.svg", data) for name, data in vector.items()),
        *(write(target / f"{name}.png", data) for name, data in bitmap.items()),
        write(target / "report.html", page),
    ]


def _row(label: str, kind: str, cells: list[str], errors: list[float]) -> str:
    shown = [escape(cell) for cell in cells]
    if errors:
        marks = [COLOURS[colour(error)] for error in errors]
        shown = [f'<span style="color: {mark}">{cell}</span>' for mark, cell in zip(marks, shown, strict=True)]
    columns = [escape(label) if kind == "measured" else "", kind, *shown]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in columns) + "</tr>"


def _setting(validation: Validation, name: str) -> str:
    setting = validation.settings[name]
    cells = (name, str(setting.value), setting.origin, setting.note)
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _figure(name: str, svg: bytes) -> str:
    text = svg.decode()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
