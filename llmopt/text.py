"""What the commands print: rich tables of comparisons, plans, stability reports and traces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.batcher import FIFO
from llmopt.plan import STATE_FEATURES, Plan, Router
from llmopt.scenario import Scenario
from llmopt.tables import counted, duration, grid, number, pairs
from llmopt.text_ratio import named_figures, ratio_comparison_view, ratio_plan_view

if TYPE_CHECKING:
    from llmopt.assess import StabilityReport
    from llmopt.evaluate.comparison import Comparison, Outcome
    from llmopt.evaluate.ratio_comparison import RatioComparison
    from llmopt.trace_summary import Spread
    from llmopt.traces import Trace

SHOWN_ROWS = 20
VERDICT_STYLES = {"stable": "green", "unstable": "bold red", "close": "yellow", "too close to call": "yellow"}


def verdict(word: str) -> Text:
    """A verdict in its colour."""
    return Text(word or "–", style=VERDICT_STYLES.get(word, "dim"))


def comparison_view(comparison: Comparison | RatioComparison) -> Iterator[RenderableType]:
    """Headline, one row per policy, and notes."""
    from llmopt.evaluate.ratio_comparison import RatioComparison

    if isinstance(comparison, RatioComparison):
        yield from ratio_comparison_view(comparison)
        return
    scenario = comparison.scenario
    if scenario.question:
        yield Text(scenario.question, style="italic")
    yield Text(headline(scenario) + f", seeds {' '.join(str(s) for s in comparison.seeds)}")
    if comparison.bound is not None:
        yield batching_table(comparison)
    else:
        table = grid("policy", "fluid", "simulated", right=COMPARISON_COLUMNS)
        for outcome in comparison.outcomes:
            table.add_row(*_comparison_row(comparison, outcome))
        yield table
    yield from _comparison_notes(comparison)


def headline(scenario: Scenario) -> str:
    """Name, digest, rate and horizon of a scenario."""
    evaluation = scenario.evaluation
    return (
        f"{scenario.name} [{scenario.digest}]: {number(scenario.workload.total_rate)} requests/s, "
        f"{number(evaluation.horizon)} s of arrivals, first {number(evaluation.warmup)} s not measured"
    )


COMPARISON_COLUMNS = (
    "margin (theory)",
    "TTFT p50 / p99 (s)",
    "TPOT p50 / p99 (ms)",
    "SLO met",
    "goodput (1/s)",
    "USD/M tokens",
    "gap",
    "plan (s)",
    "run (s)",
)


def _comparison_row(comparison: Comparison, outcome: Outcome) -> list[RenderableType]:
    head: list[RenderableType] = [outcome.policy, verdict(outcome.fluid_verdict), verdict(outcome.verdict)]
    plan, run = (duration(outcome.seconds.get(key, math.nan)) for key in ("plan", "run"))
    end: list[RenderableType] = [number(outcome.gap, 2), plan, run]
    if outcome.simulated is None:
        return [*head, *["–"] * 6, *end]
    mean = {key: value.mean for key, value in outcome.estimates(comparison.scenario.evaluation.confidence).items()}
    mark = "*" if outcome.growing else ""
    middle: list[RenderableType] = [
        margin_text(outcome),
        f"{number(mean['ttft_p50'])} / {number(mean['ttft_p99'])}{mark}",
        f"{number(1e3 * mean['tpot_p50'])} / {number(1e3 * mean['tpot_p99'])}{mark}",
        f"{mean['slo']:.1%}{mark}",
        number(mean["goodput"]),
        number(mean["cost"]),
    ]
    return [*head, *middle, *end]


BATCHING_COLUMNS = (
    "margin (theory)",
    "E2E mean / p99 (s)",
    "x bound",
    "TTFT p50 / p99 (s)",
    "TPOT p50 (ms)",
    "worst wait (s)",
    "Jain",
    "starved",
    "preempted",
    "plan (s)",
    "run (s)",
)


def batching_table(comparison: Comparison) -> Table:
    """One row for what no rule can beat, then one per policy."""
    assert comparison.bound is not None
    table = grid("policy", "simulated", right=BATCHING_COLUMNS)
    rest = ["·"] * (len(BATCHING_COLUMNS) - 3)
    table.add_row("certified bound", "", "·", number(comparison.bound.mean), "1", *rest, style="bold")
    for outcome in comparison.outcomes:
        table.add_row(*_batching_row(comparison, outcome))
    return table


def _batching_row(comparison: Comparison, outcome: Outcome) -> list[RenderableType]:
    name = f"{outcome.policy} †" if outcome.clairvoyant else outcome.policy
    plan, run = (duration(outcome.seconds.get(key, math.nan)) for key in ("plan", "run"))
    if outcome.simulated is None:
        return [name, verdict(outcome.verdict), *["–"] * 9, plan, run]
    mean = {key: value.mean for key, value in outcome.estimates(comparison.scenario.evaluation.confidence).items()}
    mark = "*" if outcome.growing else ""
    return [
        name,
        verdict(outcome.verdict),
        margin_text(outcome),
        f"{number(mean['e2e_mean'])} / {number(mean['e2e_p99'])}{mark}",
        "–" if math.isnan(comparison.ratio(outcome)) else f"{comparison.ratio(outcome):.3f}{mark}",
        f"{number(mean['ttft_p50'])} / {number(mean['ttft_p99'])}{mark}",
        number(1e3 * mean["tpot_p50"]),
        number(mean["queue_max"]),
        f"{mean['jain']:.3f}",
        f"{mean['starved']:.1%}",
        number(mean["preemptions"], 2),
        plan,
        run,
    ]


def margin_text(outcome: Outcome) -> str:
    """The simulated margin and, in brackets, the theory's where there is a split to assess."""
    theory = f" ({number(outcome.theory)})" if outcome.theory == outcome.theory else ""
    return number(outcome.margin) + theory


def _comparison_notes(comparison: Comparison) -> Iterator[RenderableType]:
    yield Text(
        "margin: factor by which all arrivals could grow, about ± 2 %, by long runs (by theory, for a fixed split)",
        style="dim",
    )
    if comparison.bound is not None:
        by = "; ".join(dict.fromkeys(comparison.bound.by))
        yield Text(
            f"certified bound: no rule has a smaller mean E2E on these requests ({by}); x bound: mean E2E over it; "
            "Jain: 1 if all requests get their tokens equally fast; starved: waited longer than ten mean E2E",
            style="dim",
        )
    if any(o.clairvoyant for o in comparison.outcomes):
        yield Text(
            "† knows more than the predictions say: outputs, or all requests before they come; no engine can run it",
            style="dim",
        )
    if any(o.ok and math.isnan(o.margin) for o in comparison.outcomes):
        yield Text("– as margin: no long run of this rule; its verdict is that of the measured window", style="dim")
    for outcome in comparison.outcomes:
        if outcome.plan is not None and "note" in outcome.plan.figures:
            yield Text(f"{outcome.policy}: {outcome.plan.figures['note']}", style="dim")
    if any(o.growing for o in comparison.outcomes):
        yield Text("* the backlog grew in these runs, so this number depends on how long they were", style="dim")
    for note in comparison.notes:
        yield Text(f"note: {note}", style="dim")
    for outcome in comparison.outcomes:
        if not outcome.ok:
            yield Text(f"{outcome.policy}: {outcome.status}", style="red")


def plan_view(plan: Plan, scenario: Scenario) -> Iterator[RenderableType]:
    """The rule, or where the A/F ratio is open the bundle, the proof, the figures and the prices."""
    if scenario.problem == "af-ratio":
        yield from ratio_plan_view(plan, scenario)
    else:
        yield Text(headline(scenario))
        yield from _rule_view(plan, scenario)
    if plan.batcher != FIFO:
        yield pairs("batching rule", "", plan.batcher.described())
    if plan.solve is not None:
        yield _proof_view(plan)
    simple = {key: value for key, value in plan.figures.items() if isinstance(value, int | float)}
    if simple:
        yield pairs("figure", "value", named_figures(simple, plan) if scenario.problem == "af-ratio" else simple)
    if "note" in plan.figures:
        yield Text(str(plan.figures["note"]))
    by_pool = {key: plan.figures[key] for key in ("load", "replicas_used") if plan.figures.get(key)}
    if by_pool:
        table = grid("pool", right=["replicas", *(key.replace("_", " ") for key in by_pool)])
        for pool in scenario.pools:
            table.add_row(pool.name, str(pool.replicas), *(number(row[pool.name]) for row in by_pool.values()))
        yield table
    if plan.figures.get("prices"):
        yield prices_view(plan.figures["prices"], str(plan.figures.get("price_unit", "the objective")))


def _rule_view(plan: Plan, scenario: Scenario) -> Iterator[RenderableType]:
    pools, router = [p.name for p in scenario.pools], plan.router
    if not isinstance(router, Router):
        yield f"{plan.policy}: a Python rule, {type(router).__name__}"
        return
    if router.fractions is not None:
        table = grid(f"{plan.policy}: fraction of", right=[f"to {name}" for name in pools])
        for cls, row in zip(scenario.workload.classes, router.fractions, strict=True):
            table.add_row(cls.name, *(f"{x:.4f}" if x > 0 else "·" for x in row))
        yield table
    if router.weights.any():
        where = "in its pool" if router.fractions is not None else "of all"
        drawn = f"{router.choices} drawn replicas" if router.choices else f"replica {where}"
        table = grid(f"{plan.policy}: smallest score of {drawn}", right=[name for name in pools])
        for feature, column in zip(STATE_FEATURES, router.weights.T, strict=True):
            if column.any():
                table.add_row(f"weight of {feature}", *(number(float(w), 4) for w in column))
        yield table
    elif router.fractions is None:
        drawn = f"one of {router.choices} drawn replicas" if router.choices else "the replicas in turn"
        yield f"{plan.policy}: {drawn}"


def _proof_view(plan: Plan) -> Table:
    solve = plan.solve
    assert solve is not None
    facts = {
        "status": solve.label,
        f"objective ({solve.sense})": number(solve.objective, 6),
        "proven bound": number(solve.bound, 6),
        "relative gap": number(solve.gap, 2),
        "size": f"{counted(solve.variables, 'variable')}, {counted(solve.constraints, 'constraint')}",
        "solved": "once" if solve.rounds == 1 else f"{solve.rounds} times, refined in between",
        "seconds": f"{number(solve.build_seconds, 2)} to build, {number(solve.solve_seconds, 2)} to solve",
        "solver": f"{solve.solver} {solve.version}",
    }
    return pairs("proof", "", facts)


def prices_view(prices: Mapping[str, Any], unit: str) -> Table:
    """What one more unit of each resource is worth, of each pool or of all; a column without any price is left out."""
    if not any(isinstance(row, Mapping) for row in prices.values()):
        return pairs("one more", f"is worth, {unit}", dict(prices))
    kinds = [kind for kind in next(iter(prices.values())) if any(row[kind] for row in prices.values())]
    table = grid(f"price in {unit} of one more", right=[kind.replace("_", " ") for kind in kinds])
    for pool, row in prices.items():
        table.add_row(pool, *(number(row[kind], 4) if row[kind] else "·" for kind in kinds))
    return table


def stability_view(report: StabilityReport, scenario: Scenario) -> Iterator[RenderableType]:
    """Verdict and reasons, pools, and the load of every row of the stability polytope."""
    yield Text(headline(scenario))
    table = grid("pool", right=["replicas", "requests/s", "load", "±", "outer bound", "critical rate", "needed"])
    for pool in report.pools:
        critical = pool.rate / pool.load if pool.load > 0 else math.nan
        loads = [number(x) for x in (pool.load, pool.load * pool.error, pool.outer_load, critical)]
        table.add_row(pool.pool, str(pool.replicas), number(pool.rate), *loads, str(pool.replicas_needed))
    yield table
    yield _rows_table(report)
    for sentence in report.sentences:
        yield Text(sentence)


def _rows_table(report: StabilityReport) -> Table:
    """Loads by the outer bound: one line per pool and piece, one column per resource."""
    resources = list(dict.fromkeys(row.resource for row in report.pools[0].rows))
    table = grid("outer bound: load of", "piece", right=resources)
    for pool in report.pools:
        for piece in dict.fromkeys(row.piece for row in pool.rows):
            loads = {row.resource: row.load for row in pool.rows if row.piece == piece}
            table.add_row(pool.pool, piece, *(number(loads[resource]) for resource in resources))
    return table


def trace_view(trace: Trace) -> Iterator[RenderableType]:
    """Statistics of a trace and its unusable rows."""
    from llmopt.traces import trace_summary

    s = trace_summary(trace)
    counts = f"{counted(s.requests, 'request')}, {counted(s.skipped, 'row')} skipped, {s.reordered} out of order"
    yield Text(f"{trace.path}: {s.format} layout, {counts}")
    facts = {
        "span (s)": s.span,
        "rate (requests/s)": s.rate,
        "peak rate over 60 s (requests/s)": s.peak_rate,
        "burstiness of gaps (0: Poisson)": s.burstiness,
        **{f"dispersion of counts in {window} (1: Poisson)": value for window, value in s.dispersion.items()},
        "correlation of prompt and output": s.correlation,
        "rank correlation": s.rank_correlation,
        "KV tokens in a busy batch slot": s.slot_load,
        "their standard deviation": s.slot_deviation,
        "standard error of their mean": s.slot_error,
    }
    if s.prefix_blocks:
        facts["prompt blocks seen before"] = s.prefix_hits
    yield pairs("figure", "value", {key: value for key, value in facts.items() if not math.isnan(value)})
    yield _spreads({"gap (s)": s.gaps, "prompt (tokens)": s.prompt, "output (tokens)": s.output})
    for row in trace.skipped[:SHOWN_ROWS]:
        yield Text(f"skipped {trace.unit} {row.line}: {row.reason}", style="yellow")
    if len(trace.skipped) > SHOWN_ROWS:
        yield Text(f"and {len(trace.skipped) - SHOWN_ROWS} more; --json lists them all", style="yellow")


def _spreads(spreads: Mapping[str, Spread]) -> Table:
    quantiles = list(next(iter(spreads.values())).quantiles)
    table = grid("", right=["mean", "cv", "min", *quantiles, "max"])
    for name, spread in spreads.items():
        if not math.isnan(spread.mean):
            inner = [spread.quantiles[q] for q in quantiles]
            table.add_row(name, *(number(x) for x in (spread.mean, spread.cv, spread.min, *inner, spread.max)))
    return table


def catalogue_view(data: Mapping[str, Mapping[str, str]]) -> Iterator[RenderableType]:
    """One table for each kind of thing."""
    for kind, lines in data.items():
        table = grid(kind)
        table.add_column("")
        for name, line in lines.items():
            table.add_row(name, Text(line))
        yield table
        yield ""
