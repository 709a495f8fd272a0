"""JSON data of what the commands answer: the fields of the Python objects, with version and scenario digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from llmopt import __version__
from llmopt.plan import Plan, Router
from llmopt.scenario import Scenario

if TYPE_CHECKING:
    from llmopt.assess import StabilityReport
    from llmopt.traces import Trace


def heading(scenario: Scenario) -> dict[str, Any]:
    """Version, scenario, digest and rate."""
    return {
        "llmopt": __version__,
        "scenario": scenario.name,
        "digest": scenario.digest,
        "rate": scenario.workload.total_rate,
    }


def plan_data(plan: Plan, scenario: Scenario) -> dict[str, Any]:
    """The rule, the proof with its duals, and the figures."""
    router = plan.router
    rule = vars(router) if isinstance(router, Router) else {"rule": getattr(router, "__name__", type(router).__name__)}
    proof = None if plan.solve is None else vars(plan.solve) | {"gap": plan.solve.gap, "label": plan.solve.label}
    head = heading(scenario) | {
        "classes": [c.name for c in scenario.workload.classes],
        "pools": [p.name for p in scenario.pools],
    }
    if scenario.problem == "af-ratio":
        decided = _bundles_data(plan, scenario)
        return {**head, "policy": plan.policy, **decided, "solve": proof, "figures": plan.figures}
    return head | {
        "policy": plan.policy,
        "router": rule,
        "batcher": plan.batcher.described(),
        "solve": proof,
        "figures": plan.figures,
    }


def _bundles_data(plan: Plan, scenario: Scenario) -> dict[str, Any]:
    """The bundles of a plan and what theory says of the first, its ratio, regime, throughput, idle shares and curve."""
    from llmopt.evaluate.ratio_curve import theory_data
    from llmopt.ratio import regime
    from llmopt.ratio_report import ratio_report

    assert plan.bundle is not None
    theory = theory_data(ratio_report(scenario, plan.bundle, scenario.evaluation.confidence))
    del theory["bundle"]
    load = scenario.load_at(plan.bundle.batch)
    return {
        "bundle": plan.bundle.model_dump(mode="json"),
        "bundles": plan.bundles,
        "others": [{"bundle": one.model_dump(mode="json"), "bundles": count} for one, count in plan.others],
        "load": load,
        "regime": regime(plan.bundle, load, plan.bundle.ratio),
        "theory": theory,
    }


def stability_data(report: StabilityReport, scenario: Scenario) -> dict[str, Any]:
    """The stability report."""
    return {**heading(scenario), **report.as_dict()}


def trace_data(trace: Trace) -> dict[str, Any]:
    """Statistics of a trace and every row that could not be used."""
    from llmopt.traces import trace_summary

    skipped = [{"line": row.line, "reason": row.reason} for row in trace.skipped]
    return {"llmopt": __version__, "file": trace.path} | trace_summary(trace).as_dict() | {"skipped_rows": skipped}


def catalogue() -> dict[str, dict[str, str]]:
    """Policies, scenarios, hardware, models and accelerators by name, one line each."""
    from llmopt.catalog import catalog_entry, catalog_names
    from llmopt.machines import accelerator, accelerator_names, model_names, model_shape
    from llmopt.reading import bundled_scenarios
    from llmopt.registry import get_policy, policy_names

    return {
        **{
            f"{problem} policies": {name: first_line(get_policy(name)) for name in policy_names(problem)}
            for problem in get_args(Scenario.model_fields["problem"].annotation)
        },
        "scenarios": {name: _question(path.read_text(encoding="utf-8")) for name, path in bundled_scenarios().items()},
        "hardware": {name: catalog_entry(name).description for name in catalog_names()},
        "models": {name: model_shape(name).summary for name in model_names()},
        "accelerators": {name: accelerator(name).summary for name in accelerator_names()},
    }


def first_line(policy: Any) -> str:
    """First line of the documentation of a policy, or of the formulation that it solves."""
    target = getattr(policy, "formulation", policy)
    return (type(target).__doc__ or "").strip().split("\n")[0]


def _question(text: str) -> str:
    """The question that the first comment of a scenario file asks."""
    return text.split("\n", 1)[0].lstrip("# ").strip()
