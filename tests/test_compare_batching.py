"""Comparisons whose open decision is batching: the bound, ratios, fairness, and what is printed of them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from factories import pool, request_class, scenario
from rich.console import Console

from llmopt.api import with_predictions
from llmopt.batcher import FIFO, Batcher
from llmopt.cli import main
from llmopt.errors import ScenarioError
from llmopt.evaluate.compare import certify, compare
from llmopt.evaluate.comparison import Comparison, Outcome
from llmopt.evaluate.report import jain_index
from llmopt.page import html_report
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.text import comparison_view


@dataclass(frozen=True)
class Rule:
    """Any batching rule as a policy, with a certificate if one is given (s of latency per request)."""

    name: str = "fifo"
    batcher: Batcher = FIFO
    certificate: float = 0.0

    def plan(self, scenario: Scenario) -> Plan:
        bound = (lambda requests: self.certificate * len(requests)) if self.certificate else None
        return Plan(self.name, batcher=self.batcher, bound=bound)


def question(rate: float = 1.0, **engine: object) -> Scenario:
    """One replica whose every step takes a second, whatever it does; each request runs alone."""
    changed = {"step_time": [{"base": 1.0}], "max_batch": 1, "token_budget": 4096, "preemption": "recompute"} | engine
    base = scenario([pool(**changed)], [request_class("x", 100, 1)])
    return base.replace(
        problem="batching", **{"workload.rate": rate, "evaluation.horizon": 400.0, "evaluation.warmup": 100.0}
    )


@pytest.fixture(scope="module")
def answer() -> Comparison:
    return compare(question(0.5), [Rule(), Rule("sure", certificate=1.05)], seeds=[1, 2])


def test_the_bound_is_the_best_argument_of_each_seed(answer: Comparison) -> None:
    assert answer.bound is not None
    # every request needs its second alone; the rule's certificate says more on a seed only if queueing is proven there
    assert len(answer.bound.by_seed) == 2
    assert all(value >= 1.05 for value in answer.bound.by_seed)
    for outcome in answer.outcomes:
        measured = outcome.simulated
        assert measured is not None
        means = np.mean([report.e2e.mean for report in measured.reports])
        assert answer.ratio(outcome) == pytest.approx(means / np.mean(answer.bound.by_seed))
        assert answer.ratio(outcome) >= 1


def test_one_server_without_choice_meets_its_bound() -> None:
    # requests of one step each, one at a time: every rule that never idles has the latency of the bound
    found = compare(question(0.5), [Rule()], seeds=[3])
    assert found.ratio(found["fifo"]) == pytest.approx(1.0, rel=0.02)


def test_a_latency_below_a_bound_is_an_error_of_the_program() -> None:
    with pytest.raises(RuntimeError, match="below the bound"):
        compare(question(0.5), [Rule(certificate=1e6)], seeds=[1])


def test_routing_has_no_bound() -> None:
    assert compare(question().replace(problem="routing"), [Rule()], seeds=[1]).bound is None


def test_a_failed_policy_keeps_its_row_beside_the_bound() -> None:
    class Broken:
        name = "broken"

        def plan(self, scenario: Scenario) -> Plan:
            raise ValueError("no")

    found = compare(question(0.5), [Rule(), Broken()], seeds=[1])
    assert np.isnan(found.ratio(found["broken"]))
    assert found["broken"].status == "raised ValueError: no"


@pytest.mark.parametrize(("shares", "index"), [([1.0, 1.0, 1.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 3.0], 0.8)])
def test_jain(shares: list[float], index: float) -> None:
    assert jain_index(np.array(shares)) == pytest.approx(index)
    assert np.isnan(jain_index(np.array([])))


def printed(found: Comparison) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    for part in comparison_view(found):
        console.print(part)
    return console.export_text()


def test_what_is_printed(answer: Comparison) -> None:
    text = printed(answer)
    assert "certified bound" in text and "x bound" in text and "Jain" in text
    row = next(line for line in text.splitlines() if line.startswith("fifo"))
    assert f"{answer.ratio(answer['fifo']):.3f}" in row
    page = html_report(answer, {})
    assert "certified bound" in page and "worst wait" in page


def test_tables_and_json_carry_bound_and_ratio(answer: Comparison, tmp_path: Path) -> None:
    table = answer.table()
    assert {"e2e_mean", "ratio", "jain", "starved", "queue_max"} <= set(table.columns)
    data = json.loads(answer.to_json())
    assert data["bound"]["mean"] == pytest.approx(answer.bound.mean if answer.bound else 0)
    assert data["policies"][0]["ratio"] == pytest.approx(answer.ratio(answer["fifo"]))
    assert "ratio" in answer.to_csv(tmp_path / "r.csv").read_text().split("\n")[0]


def test_a_rule_that_knows_the_future_is_marked_and_has_no_margin() -> None:
    far = Rule("far", Batcher(order=lambda seen: seen.arrival, clairvoyant=True))
    found = compare(question(0.5), [far], seeds=[1])
    assert np.isnan(found["far"].margin) and found["far"].verdict == "stable"
    assert "far †" in printed(found) and "no engine can run it" in printed(found)


def test_bounds_hold_for_measured_requests_only() -> None:
    case = question(0.5)
    arrivals = {1: case.workload.sample(400.0, 1)}
    assert certify(case, arrivals, [Outcome("none")]).mean == pytest.approx(compare(case, [Rule()], [1]).bound.mean)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "law"), [("oracle", "oracle"), ("noise:0.5", "noise"), ("quantile:0.9", "quantile"), ("none", "none")]
)
def test_predictions_by_name(text: str, law: str) -> None:
    assert with_predictions(question(), text).predictions.law == law  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("psychic", "is not known; give one of"),
        ("noise", "write noise:SIGMA"),
        ("none:3", "takes no number; drop it"),
        ("noise:much", "is not a number"),
        ("noise:-1", "must be at least 0"),
        ("interval:0.5", "must be at least 1"),
    ],
)
def test_predictions_that_cannot_be_used(text: str, sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        with_predictions(question(), text)


def test_the_command_refuses_unknown_predictions() -> None:
    result = CliRunner().invoke(main, ["compare", "quickstart", "--predictions", "psychic"])
    assert result.exit_code == 2 and "--predictions psychic is not known" in result.output
    assert "Traceback" not in result.output


def test_plan_and_stability_of_a_rule() -> None:
    said = CliRunner().invoke(main, ["plan", "lmsys-low"])
    assert said.exit_code == 0 and "mc-sf" in said.output and "lookahead" in said.output
    said = CliRunner().invoke(main, ["stability", "lmsys-low", "--policy", "fifo-lookahead"])
    assert said.exit_code == 0 and "critical rate" in said.output
    said = CliRunner().invoke(main, ["stability", "lmsys-low", "--policy", "orca"])
    assert said.exit_code == 2 and "lets running requests pause" in said.output
