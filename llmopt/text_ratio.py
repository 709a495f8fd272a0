"""What the commands print where the A/F ratio is open: rows of policies, what a wrong ratio costs, one plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.bundle import Bundle
from llmopt.plan import Plan
from llmopt.ratio import regime
from llmopt.scenario import Scenario
from llmopt.tables import duration, grid, number, pairs
from llmopt.text_ways import ways_view

if TYPE_CHECKING:
    from llmopt.evaluate.ratio_comparison import RatioComparison, RatioOutcome
    from llmopt.evaluate.ratio_curve import Curve
    from llmopt.evaluate.report import Estimate
    from llmopt.ratio_report import RatioReport

BAR = 24
"""Characters of the bar of the best ratio."""
NEAR = 0.01
"""Loss up to which a ratio is shown as near the best."""
MOST_LINES = 14
"""Ratios shown of a curve, at most about."""
PRICE = "USD/M tokens"
"""Column of what tokens cost, where losses are per dollar."""
LANDMARKS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Ratios that a long curve shows whatever happens; the published simulation's among them."""
NOTES = (
    "loss: share of the throughput per instance (per dollar where both prices are given) lost against the best "
    "simulated ratio at the same B; predicted: by theory, with the wait for the fullest worker",
    "every slot is always full; all policies are judged by the same loads; ±: half-width over seeds",
)


def ratio_headline(scenario: Scenario) -> str:
    """Name, digest, and what the slots hold."""
    load, bundle = scenario.run_load, scenario.bundle
    error = f" ± {number(load.error)}" if load.error else ""
    pipeline = f"{bundle.micro_batches} micro-batches in flight, {bundle.pipeline} pipeline"
    return (
        f"{scenario.name} [{scenario.digest}]: a slot holds {number(load.theta, 4)}{error} tokens on average, "
        f"deviation {number(load.deviation)}; {pipeline}"
    )


def ratio_comparison_view(comparison: RatioComparison) -> Iterator[RenderableType]:
    """Headline, one row per policy, what a wrong ratio costs, what follows, and notes."""
    scenario = comparison.scenario
    if scenario.question:
        yield Text(scenario.question, style="italic")
    evaluation = scenario.evaluation
    yield Text(
        f"{ratio_headline(scenario)}; {evaluation.requests:,} requests a micro-batch, {evaluation.start} start, seeds "
        + " ".join(str(s) for s in comparison.seeds)
    )
    yield policies_table(comparison)
    for outcome in comparison.outcomes:
        if not outcome.ok:
            yield Text(f"{outcome.policy}: {outcome.status}", style="red")
    for curve in comparison.curves:
        chosen = [o for o in comparison.outcomes if o.curve is curve]
        yield ""
        yield Text(curve_title(curve), style="bold")
        yield curve_table(curve, chosen)
    for sentence in comparison.sentences:
        yield Text(sentence)
    if isinstance(comparison.ways, str):
        yield Text(comparison.ways, style="dim")
    else:
        yield ""
        yield from ways_view(comparison.ways)
    for note in NOTES:
        yield Text(note, style="dim")
    for outcome in comparison.outcomes:
        if outcome.plan is not None and "note" in outcome.plan.figures:
            yield Text(f"{outcome.policy}: {outcome.plan.figures['note']}", style="dim")


def curve_title(curve: Curve) -> str:
    """What the curve is of."""
    return f"What a wrong ratio costs: Attention workers beside {servers_text(curve.bundle)}, B = {curve.bundle.batch}"


def policies_table(comparison: RatioComparison) -> Table:
    """One row per policy; columns that say nothing are left out."""
    outcomes = comparison.outcomes
    priced = any(o.bundle is not None and o.bundle.price > 0 for o in outcomes)
    devices = any(o.bundle is not None and o.bundle.devices > sum(sizes(o)) for o in outcomes)
    several = any(o.plan is not None and (o.plan.bundles > 1 or o.plan.others) for o in outcomes)
    uncertain = any(curve.report.interval[1] > curve.report.interval[0] for curve in comparison.curves)
    right = ["B", "ratio", *(["interval"] if uncertain else []), "regime"]
    right += ["predicted", "tokens/s per instance", "loss", "idle A", "idle F"]
    optional = {"tokens/s per device": devices, "USD/M tokens": priced, "tokens/s in all": several}
    right += ["TPOT mean / p99 (ms)", *(key for key, said in optional.items() if said), "gap", "plan (s)"]
    table = grid("policy", "bundle", right=right)
    for outcome in outcomes:
        more = zip(optional.values(), (outcome.per_device, outcome.cost, outcome.tokens), strict=True)
        cells = [number(x, 4) for said, x in more if said]
        table.add_row(*_row(comparison, outcome, uncertain), *cells, *_end(outcome))
    return table


def sizes(outcome: RatioOutcome) -> tuple[int, int]:
    """Workers and servers of the outcome's bundle, zeros without one."""
    bundle = outcome.bundle
    return (0, 0) if bundle is None else (bundle.attention_workers, bundle.ffn_servers)


def bundles_text(plan: Plan | None) -> str:
    """`9A-1F`, or `3 x 9A-1F + 2A-1F` where there are several."""
    if plan is None or plan.bundle is None:
        return "–"
    shapes = [(plan.bundle, plan.bundles), *plan.others]
    return " + ".join(f"{n} x {shape(bundle)}" if n > 1 else shape(bundle) for bundle, n in shapes)


def shape(bundle: Bundle) -> str:
    """`9A-1F`."""
    return f"{bundle.attention_workers}A-{bundle.ffn_servers}F"


def interval_text(outcome: RatioOutcome) -> str:
    """The interval of the best ratio at the outcome's B, of an estimated load."""
    low, high = outcome.curve.report.interval if outcome.curve else (math.nan, math.nan)
    return f"{number(low)} to {number(high)}" if high > low else "–"


def _row(comparison: RatioComparison, outcome: RatioOutcome, uncertain: bool) -> list[RenderableType]:
    bundle = outcome.bundle
    head: list[RenderableType] = [outcome.policy, bundles_text(outcome.plan)]
    if bundle is None:
        return [*head, *["–"] * (9 + uncertain)]
    tpot = [number(1e3 * outcome.at(key).mean) for key in ("tpot", "tpot_p99")]
    return [
        *head,
        str(bundle.batch),
        number(outcome.ratio),
        *([interval_text(outcome)] if uncertain else []),
        comparison.regime(outcome),
        number(outcome.predicted, 4),
        plus_minus(outcome.at("throughput")),
        share(outcome.loss, 2),
        share(outcome.at("idle_attention").mean),
        share(outcome.at("idle_ffn").mean),
        " / ".join(tpot),
    ]


def _end(outcome: RatioOutcome) -> list[str]:
    seconds = outcome.seconds.get("plan", math.nan)
    return [number(outcome.gap, 2), "–" if math.isnan(seconds) else duration(seconds)]


def plus_minus(value: Estimate, digits: int = 4) -> str:
    """Mean and half-width, the latter left out where there is none."""
    half = value.half if value.half > 1e-6 * abs(value.mean) else 0.0  # less is rounding
    return number(value.mean, digits) + ("" if math.isnan(value.half) else f" ± {number(half, 2)}")


def share(value: float, decimals: int = 1) -> str:
    """A share in percent, a dash where not defined."""
    return "–" if math.isnan(value) else f"{value:.{decimals}%}".replace("-0.0%", "0.0%")


def shown_ratios(most: int, wanted: Sequence[int]) -> list[int]:
    """Every x up to `most` if these are few; else landmarks and those `wanted`."""
    if most <= MOST_LINES:
        return list(range(1, most + 1))
    return sorted({x for x in (*LANDMARKS, *wanted, most) if 1 <= x <= most})


def curve_table(curve: Curve, outcomes: Sequence[RatioOutcome]) -> Table:
    """A line for each ratio shown, with a bar, the optimum and its plateau marked, and who chose it."""
    chosen = {x: [o.policy for o in outcomes if sizes(o)[0] == x] for x in range(1, curve.workers + 1)}
    first, last = curve.plateau
    wanted = [first, curve.best, last, *(x for x, names in chosen.items() if names)]
    worth = 1 - curve.loss
    mean_field, barrier = curve.theory()
    priced = curve.bundle.weights != (1.0, 1.0)
    right = ["tokens/s per instance", "predicted", "mean field", *([PRICE] if priced else [])]
    table = grid("bundle", right=[*right, "loss", "idle A", "idle F"])
    table.add_column("")
    table.add_column("chosen by")
    y = curve.bundle.ffn_servers
    for x in shown_ratios(curve.workers, wanted):
        k = x - 1
        idle = [share(curve.at(x, key).mean) for key in ("idle_attention", "idle_ffn")]
        theory = [number(barrier[k], 4), number(mean_field[k], 4)]
        throughput = curve.at(x, "throughput")
        cost = [dollars(curve.bundle.sized(x, y), throughput.mean)] if priced else []
        said = [plus_minus(throughput), *theory, *cost, share(curve.loss[k], 2), *idle]
        style = "bold green" if x == curve.best else "green" if first <= x <= last else ""
        mark = Text(bar(worth[k]) + (" optimum" if x == curve.best else ""), style=style)
        table.add_row(f"{x}A-{y}F", *said, mark, Text(listed(chosen[x]), style=style))
    return table


def dollars(bundle: Bundle, per_instance: float) -> str:
    """USD for a million tokens at so many tokens/s per instance."""
    instances = bundle.attention_workers + bundle.ffn_servers
    return number(1e6 * bundle.price / 3600 / (per_instance * instances), 4)


def bar(part: float, width: int = BAR) -> str:
    """A bar for `part` of the best, to an eighth of a character."""
    if not 0 <= part < math.inf:
        return ""
    eighths = round(8 * width * part)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names, the last ones counted where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ratio_plan_view(plan: Plan, scenario: Scenario) -> Iterator[RenderableType]:
    """The bundle, what theory says of it, the curve over ratios, and what follows."""
    from llmopt.ratio_report import ratio_report

    bundle = plan.bundle
    assert bundle is not None
    report = ratio_report(scenario, bundle, scenario.evaluation.confidence)
    yield Text(ratio_headline(scenario))
    yield pairs(f"{plan.policy}: bundle", bundles_text(plan), _facts(plan, scenario, report))
    yield ""
    yield Text(f"Ratios beside {servers_text(bundle)}, B = {bundle.batch}, by theory", style="bold")
    yield theory_table(bundle, report)
    yield semantics_table(report)
    for sentence in report.sentences:
        yield Text(sentence)


def _facts(plan: Plan, scenario: Scenario, report: RatioReport) -> dict[str, str]:
    bundle = plan.bundle
    assert bundle is not None
    (low, high), of_mean_field = report.interval, number(report.throughput_mean_field, 4)
    facts = {
        "micro-batch B": f"{bundle.batch:,} sequences",
        "A/F ratio": number(bundle.ratio, 4),
        "best ratio, mean field": number(report.optimum.ratio, 4),
        "its interval": f"{number(low, 4)} to {number(high, 4)}" if high > low else "a point: the lengths are given",
        "best with the barrier": f"{report.barrier}A-{bundle.ffn_servers}F",
        "published rule": number(report.published.ratio, 4),
        "regime": regime(bundle, scenario.load_at(bundle.batch), bundle.ratio),
        "tokens/s per instance": f"{number(report.throughput, 4)} (mean field {of_mean_field})",
        "idle": f"Attention {share(report.idle_attention)}, FFN {share(report.idle_ffn)}",
        "TPOT": f"{number(1e3 * report.tpot)} ms",
    }
    if report.per_dollar == report.per_dollar and report.per_dollar:
        facts["per dollar"] = f"{number(report.per_dollar, 4)} tokens"
    return facts


def named_figures(figures: Mapping[str, float], plan: Plan) -> dict[str, float]:
    """The figures of a plan with units to their names."""
    units = {"cycle": "s in a layer", "tpot": "s", "tokens": "tokens/s in all", "devices": "accelerators in all"}
    units["cost"] = units["least_cost"] = str(plan.figures.get("cost_unit", ""))
    return {f"{key} ({units[key]})" if units.get(key) else key: value for key, value in figures.items()}


def theory_table(bundle: Bundle, report: RatioReport) -> Table:
    """As `curve_table`, by theory alone: the optimum and the plan's own ratio are marked."""
    best, own = min(report.curve, key=lambda point: point.loss).workers, bundle.attention_workers
    shown = shown_ratios(report.curve[-1].workers, [best, own, best - 1, best + 1])
    priced, y = bundle.weights != (1.0, 1.0), bundle.ffn_servers
    table = grid("bundle", right=["tokens/s per instance", "mean field", *([PRICE] if priced else []), "loss"])
    table.add_column("")
    for x, mean_field, barrier, loss in (point for point in report.curve if point.workers in shown):
        words = [" optimum"] * (x == best) + [" this plan"] * (x == own)
        style = "bold green" if x == best else "green" if loss <= NEAR else ""
        mark = Text(bar(1 - loss) + ",".join(words), style=style)
        cost = [dollars(bundle.sized(x, y), barrier)] if priced else []
        table.add_row(f"{x}A-{y}F", number(barrier, 4), number(mean_field, 4), *cost, share(loss, 2), mark)
    return table


def semantics_table(report: RatioReport) -> Table:
    """Best mean-field ratio under every pipeline (rows) and number of micro-batches (columns)."""
    numbers = [f"M={m}" for m in (1, 2, 3, 4)]
    table = grid("best ratio, mean field", right=["any M", *numbers])
    for pipeline in dict.fromkeys(key.split()[0] for key in report.semantics):
        found = [report.semantics.get(key) for key in (pipeline, *(f"{pipeline} {m}" for m in numbers))]
        table.add_row(pipeline, *("·" if ratio is None else number(ratio, 4) for ratio in found))
    return table


def servers_text(bundle: Bundle) -> str:
    """`an FFN server`, `3 FFN servers`."""
    return "an FFN server" if bundle.ffn_servers == 1 else f"{bundle.ffn_servers} FFN servers"
