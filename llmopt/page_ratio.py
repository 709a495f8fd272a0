"""The page of a comparison of A/F ratios: the same results folder as other comparisons have, another table."""

from __future__ import annotations

from html import escape

from llmopt.evaluate.ratio_comparison import RatioComparison, RatioOutcome
from llmopt.evaluate.ratio_curve import Curve
from llmopt.page_ways import CAPTION, ways_notes
from llmopt.tables import number
from llmopt.text_ratio import NOTES, bundles_text, curve_title, interval_text, plus_minus, ratio_headline, share, sizes

CAPTIONS = {
    "ratio": "Throughput over the number of Attention workers. Line: simulated, in the band of its interval over "
    "seeds; dashed: theory that waits for the fullest worker; dotted: mean field. Shaded: loses at most 1 %.",
    "idle": "Idle shares of both roles. Few workers leave the FFN servers idle, many leave the workers idle; the best "
    "ratio lies near the crossing.",
    "gantt": "Some cycles at the best simulated ratio. A row is a device or a link, grey where it is idle: all wait "
    "for the fullest worker.",
    "ways": CAPTION,
}
HEADS = (
    *(
        ("policy", ""),
        ("bundle", ""),
        ("B", "sequences"),
        ("ratio", "continuous"),
        ("interval", "of the best ratio"),
        ("regime", ""),
    ),
    *(("predicted", "tokens/s per instance"), ("simulated", "tokens/s per instance"), ("loss", "%")),
    *(("idle A", "%"), ("idle F", "%"), ("TPOT mean", "ms"), ("TPOT p99", "ms")),
    *(("all bundles", "tokens/s"), ("cost", "USD per million tokens"), ("gap", "")),
)


def ratio_table(comparison: RatioComparison) -> tuple[str, str]:
    """Head and rows of the table of policies as HTML."""
    heads = "".join(f"<th>{name}<br><span>{unit}</span></th>" for name, unit in HEADS)
    return heads, "\n".join(_row(comparison, outcome) for outcome in comparison.outcomes)


def ratio_meta(comparison: RatioComparison) -> str:
    """What was simulated, in one line."""
    evaluation = comparison.scenario.evaluation
    seeds = " ".join(str(s) for s in comparison.seeds)
    run = f"{evaluation.requests:,} requests a micro-batch, {evaluation.start} start"
    return f"{ratio_headline(comparison.scenario)}; {run}, seeds {seeds}"


def ratio_notes(comparison: RatioComparison) -> list[str]:
    """Sentences and tables below the table of policies as HTML: what failed, what follows, what a wrong ratio costs."""
    failed = [f"{o.policy}: {o.status}" for o in comparison.outcomes if not o.ok]
    said = [f"<p>{escape(text)}</p>" for text in (*failed, *comparison.sentences)]
    tables = [_curve(curve, comparison) for curve in comparison.curves]
    ways = [f"<p>{escape(comparison.ways)}</p>"] if isinstance(comparison.ways, str) else ways_notes(comparison.ways)
    return [*said, *(f'<p class="meta">{escape(text)}</p>' for text in NOTES), *tables, *ways]


def _row(comparison: RatioComparison, outcome: RatioOutcome) -> str:
    cells = [escape(outcome.policy), bundles_text(outcome.plan)]
    if outcome.bundle is not None:
        cells += [str(outcome.bundle.batch), number(outcome.ratio), interval_text(outcome), comparison.regime(outcome)]
        cells += [number(outcome.predicted, 4), plus_minus(outcome.at("throughput")), share(outcome.loss, 2)]
        cells += [share(outcome.at(key).mean) for key in ("idle_attention", "idle_ffn")]
        cells += [number(1e3 * outcome.at(key).mean) for key in ("tpot", "tpot_p99")]
        cells += [number(outcome.tokens, 4), number(outcome.cost), number(outcome.gap, 2)]
    return _line(cells + ["–"] * (len(HEADS) - len(cells)))


def _curve(curve: Curve, comparison: RatioComparison) -> str:
    """Every ratio of a curve, the best one in bold."""
    names = ("bundle", "tokens/s per instance", "loss", "idle A", "idle F", "chosen by")
    heads = "".join(f"<th>{name}</th>" for name in names)
    y, rows = curve.bundle.ffn_servers, []
    for x in range(1, curve.workers + 1):
        by = ", ".join(o.policy for o in comparison.outcomes if o.curve is curve and sizes(o)[0] == x)
        cells = [f"{x}A-{y}F", plus_minus(curve.at(x, "throughput")), share(float(curve.loss[x - 1]), 2)]
        cells += [share(curve.at(x, key).mean) for key in ("idle_attention", "idle_ffn")]
        cells.append(escape(by))
        rows.append(_line([f"<b>{cell}</b>" for cell in cells] if x == curve.best else cells))
    body = "\n".join(rows)
    head = f"<table><thead><tr>{heads}</tr></thead><tbody>"
    return f"<details><summary>{escape(curve_title(curve))}</summary>{head}\n{body}\n</tbody></table></details>"


def _line(cells: list[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
