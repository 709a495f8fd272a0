"""The report of a comparison as one HTML file that needs no other file and no network, and the results folder."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from llmopt import __version__
from llmopt.drawing import KINDS, Kind
from llmopt.evaluate.comparison import Comparison, Outcome
from llmopt.evaluate.ratio_comparison import RatioComparison
from llmopt.evaluate.report import Estimate
from llmopt.output import to_json, write
from llmopt.page_ratio import CAPTIONS as RATIO_CAPTIONS
from llmopt.page_ratio import ratio_meta, ratio_notes, ratio_table
from llmopt.plot import VERDICT_COLOURS, comparison_pictures
from llmopt.plot_ratio import ratio_pictures
from llmopt.tables import number
from llmopt.text import headline, margin_text

CAPTIONS = {
    "backlog": "Requests waiting over time. Filled: simulated, mean over seeds. Dashed: fluid model.",
    "load": "Estimated load of each pool. Beyond 1 a pool cannot keep up, whatever the order of service.",
    "latency": "Distributions over the measured requests of all seeds. Dashed where the backlog grew in the run: these "
    "latencies grow with its length.",
    **RATIO_CAPTIONS,
}
COLUMNS = {
    "ttft_p50": ("TTFT p50", "s", 1.0),
    "ttft_p99": ("TTFT p99", "s", 1.0),
    "tpot_p50": ("TPOT p50", "ms", 1e3),
    "tpot_p99": ("TPOT p99", "ms", 1e3),
    "slo": ("SLO met", "%", 100.0),
    "goodput": ("goodput", "requests/s", 1.0),
    "cost": ("cost", "USD per million output tokens", 1.0),
}
BATCHING = {
    "e2e_mean": ("E2E mean", "s", 1.0),
    "e2e_p99": ("E2E p99", "s", 1.0),
    "queue_max": ("worst wait", "s", 1.0),
    "jain": ("Jain", "1: equally fast", 1.0),
    "starved": ("starved", "%", 100.0),
    "preemptions": ("preempted", "times", 1.0),
}
DURATIONS = ("ttft", "tpot", "slo", "e2e", "queue")
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } .meta, figcaption, .half { color: #666; font-size: 0.87em; }
table { border-collapse: collapse; font-size: 0.87em; } .wide { overflow-x: auto; }
th, td { padding: 0.3em 0.7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th span { font-weight: normal; color: #666; }
figure { margin: 2em 0; } figure svg { max-width: 100%; height: auto; }
</style></head><body>
<h1>$title</h1><p>$question</p><p class="meta">$meta</p>
<div class="wide"><table><thead><tr>$head</tr></thead><tbody>
$rows
</tbody></table></div>
<p class="meta">Means over seeds with the half-width of their $confidence intervals. $legend</p>
$notes
$figures
<p class="meta">llmopt $version. The same numbers, and more, are in results.json and results.csv beside this file.</p>
</body></html>
""")


LEGEND = (
    "Margin: the factor by which all arrivals could grow, to within 2 %, found by long simulated runs, from which the "
    "verdict follows; in brackets by the step-mean estimate, where the policy decides a fixed split. * depends on how "
    "long was simulated: the backlog grew."
)


def html_report(comparison: Comparison | RatioComparison, pictures: dict[str, bytes]) -> str:
    """The page; `pictures` are SVG files by name, put inline."""
    scenario = comparison.scenario
    if isinstance(comparison, RatioComparison):
        head, rows = ratio_table(comparison)
        meta, legend, notes = ratio_meta(comparison), "", ratio_notes(comparison)
    else:
        lines = [*_bound_row(comparison), *(_row(comparison, outcome) for outcome in comparison.outcomes)]
        head, rows = _head(comparison), "\n".join(lines)
        meta = f"{headline(scenario)}, seeds {' '.join(str(s) for s in comparison.seeds)}"
        failed = [f"{o.policy}: {o.status}" for o in comparison.outcomes if not o.ok]
        legend, notes = LEGEND, [f'<p class="meta">{escape(text)}</p>' for text in [*failed, *comparison.notes]]
    return PAGE.substitute(
        title=f"{escape(scenario.name)}: policies compared",
        question=escape(scenario.question),
        meta=escape(meta),
        head=head,
        rows=rows,
        confidence=f"{scenario.evaluation.confidence:.0%}",
        legend=legend,
        notes="\n".join(notes),
        figures="\n".join(_figure(name, svg) for name, svg in pictures.items()),
        version=__version__,
    )


def write_report(comparison: Comparison | RatioComparison, folder: str | Path) -> list[Path]:
    """Fill a results folder: results (JSON, CSV, Parquet), timings, pictures (SVG, PNG) and the page.

    Everything is computed before the first file is written. Files of other names in the folder stay.
    """
    target = Path(folder)
    vector, bitmap = (_pictures(comparison, kind) for kind in KINDS)
    page = html_report(comparison, vector)
    written = [
        write(target / "results.json", comparison.to_json(timings=False)),
        write(target / "timings.json", to_json(comparison.timings())),
        comparison.to_csv(target / "results.csv"),
        comparison.to_parquet(target / "results.parquet"),
        *(write(target / f"{name}.svg", data) for name, data in vector.items()),
        *(write(target / f"{name}.png", data) for name, data in bitmap.items()),
        write(target / "report.html", page),
    ]
    return [path for path in written if path is not None]


def _pictures(comparison: Comparison | RatioComparison, kind: Kind) -> dict[str, bytes]:
    if isinstance(comparison, RatioComparison):
        return ratio_pictures(comparison, kind)
    return comparison_pictures(comparison, kind)


def _head(comparison: Comparison) -> str:
    names = ["policy", "fluid", "simulated", "margin (theory)"]
    heads = [f"<th>{name}</th>" for name in names]
    heads += ["<th>E2E<br><span>x bound</span></th>"] if comparison.bound is not None else []
    heads += [f"<th>{name}<br><span>{unit}</span></th>" for name, unit, _ in _columns(comparison).values()]
    return "".join([*heads, "<th>gap</th>"])


def _columns(comparison: Comparison) -> dict[str, tuple[str, str, float]]:
    """The figures shown, by metric: heading, unit and scale."""
    return COLUMNS if comparison.bound is None else BATCHING | COLUMNS


def _bound_row(comparison: Comparison) -> list[str]:
    if comparison.bound is None:
        return []
    cells = ["<b>certified bound</b>", "", "", "", "1", number(comparison.bound.mean)]
    cells += [""] * len(_columns(comparison))
    return ["<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"]


def _row(comparison: Comparison, outcome: Outcome) -> str:
    estimates = outcome.estimates(comparison.scenario.evaluation.confidence)
    mark = "*" if outcome.growing else ""
    cells = [escape(outcome.policy), _verdict(outcome.fluid_verdict), _verdict(outcome.verdict)]
    cells += [margin_text(outcome)]
    cells += [f"{comparison.ratio(outcome):.3f}"] if comparison.bound is not None else []
    for key, (_, _, scale) in _columns(comparison).items():
        starred = mark if key.startswith(DURATIONS) else ""
        cells.append(_estimate(estimates[key], scale) + starred if key in estimates else "–")
    cells.append(number(outcome.gap, 2))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _verdict(word: str) -> str:
    return f'<span style="color: {VERDICT_COLOURS.get(word, "#777")}">{word or "–"}</span>'


def _estimate(value: Estimate, scale: float) -> str:
    half = "" if value.half != value.half else f' <span class="half">± {number(value.half * scale, 2)}</span>'
    return number(value.mean * scale) + half


def _figure(name: str, svg: bytes) -> str:
    text = svg.decode()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
