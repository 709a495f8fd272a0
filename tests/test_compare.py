"""Comparisons on systems whose answer is known, and what is written about them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import unlike_pools

from baselines.routing import WeightedRoundRobin
from llmopt.errors import Infeasible, PolicyError
from llmopt.evaluate.compare import compare
from llmopt.evaluate.comparison import Comparison
from llmopt.evaluate.margin import LARGEST, RESOLUTION, long_run, search
from llmopt.page import html_report, write_report
from llmopt.plan import Incoming, Plan, ReplicaState, Router, index_router, split_router
from llmopt.plot import comparison_pictures
from llmopt.scenario import Scenario
from llmopt.workload import Requests

SERVICE = 0.1


def server(load: float, horizon: float = 4000.0, replicas: tuple[int, ...] = (1,)) -> Scenario:
    """Pools of M/D/1 servers: every request is one step of `SERVICE` seconds, one at a time."""
    pools = [
        {"name": f"pool{j}", "replicas": n, "step_time": [{"base": SERVICE}], "kv_capacity": 160, "max_batch": 1}
        for j, n in enumerate(replicas)
    ]
    one = {"law": "constant", "value": 1}
    return Scenario.model_validate(
        {
            "name": "md1",
            "workload": {
                "rate": load * sum(replicas) / SERVICE,
                "classes": [{"name": "unit", "share": 1.0, "prompt": one, "output": one, "ttft": 0.3}],
            },
            "pools": [pool | {"price": 1.0} for pool in pools],
            "evaluation": {"horizon": horizon, "warmup": horizon / 10, "seeds": [1, 2, 3]},
        }
    )


@dataclass(frozen=True)
class Turns:
    name: str = "turns"

    def plan(self, scenario: Scenario) -> Plan:
        return Plan(self.name, index_router(scenario))


@dataclass(frozen=True)
class Split:
    first: float
    name: str = "split"

    def plan(self, scenario: Scenario) -> Plan:
        return Plan(self.name, split_router(scenario, np.array([[self.first, 1 - self.first]])))


@dataclass(frozen=True)
class Fails:
    error: Exception
    name: str = "fails"

    def plan(self, scenario: Scenario) -> Plan:
        raise self.error


@dataclass(frozen=True)
class FailsLate:
    name: str = "late"

    def plan(self, scenario: Scenario) -> Plan:
        def rule(request: Incoming, replicas: list[ReplicaState]) -> int:
            if request.number >= 5:
                raise ZeroDivisionError("no replica\nleft")
            return 0

        return Plan(self.name, rule)


@pytest.fixture(scope="module")
def calm() -> Comparison:
    return compare(server(0.8, horizon=400.0, replicas=(1, 2)), [Turns(), Split(0.5), Fails(ValueError("boom"))])


def test_an_md1_queue_waits_as_pollaczek_and_khinchine_say():
    result = compare(server(0.7), [Turns()])["turns"]
    # M/D/1: mean wait = rho s / (2 (1 - rho)), service s; TTFT adds the service.
    queue = result.estimates(0.95)["queue_mean"]
    assert queue.mean == pytest.approx(0.7 * SERVICE / (2 * 0.3), rel=0.06)
    assert result.estimates(0.95)["ttft_mean"].mean == pytest.approx(queue.mean + SERVICE)
    assert math.isnan(result.theory) and result.margin == pytest.approx(1 / 0.7, rel=0.02)
    assert (result.fluid_verdict, result.verdict) == ("stable", "stable")


def test_an_overloaded_server_is_unstable_for_both_evaluators_and_delivers_its_capacity():
    result = compare(server(1.2), [Turns()])["turns"]
    assert (result.fluid_verdict, result.verdict) == ("unstable", "unstable")
    assert result.margin == pytest.approx(1 / 1.2, rel=0.02)
    assert result.estimates(0.95)["throughput"].mean == pytest.approx(1 / SERVICE, rel=0.01)
    assert result.simulated is not None
    assert result.simulated.growth.relative == pytest.approx(1 - 1 / 1.2, rel=0.1)
    # 1 USD/hour over 10 output tokens/s.
    assert result.estimates(0.95)["cost"].mean == pytest.approx(1e6 / 3600 / 10, rel=0.01)


def test_one_overloaded_pool_makes_a_policy_unstable_however_idle_the_other_is():
    outcomes = compare(server(0.7, 1500.0, (1, 1)), [Split(0.5, "even"), Split(0.9, "skewed")])
    assert (outcomes["even"].verdict, outcomes["skewed"].verdict) == ("stable", "unstable")
    skewed = outcomes["skewed"]
    assert skewed.load is not None
    assert skewed.load.tolist() == pytest.approx([1.26, 0.14], rel=0.03)
    assert skewed.outer == pytest.approx(1 / 1.26, rel=1e-9)
    assert skewed.theory == pytest.approx(1 / 1.26, rel=0.02) and skewed.margin == pytest.approx(1 / 1.26, rel=0.02)
    assert skewed.simulated is not None
    assert skewed.simulated.fractions[0, 0] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("critical", [0.004, 0.3, 0.99, 1.0, 1.7, 40.0, 5000.0])
@pytest.mark.parametrize("guess", [0.5, 1.0, 3.0, math.inf])
def test_the_search_finds_the_critical_factor_within_its_resolution(critical: float, guess: float):
    asked: list[float] = []

    def holds(factor: float) -> bool:
        asked.append(factor)
        return factor <= critical

    low, high = search(holds, guess)
    assert low <= critical < high or critical > LARGEST <= low
    assert high == math.inf or high <= low * RESOLUTION * (1 + 1e-12)
    assert len(asked) < 50


def test_a_searched_margin_meets_the_theory_of_a_split_and_bursts_do_not_move_it():
    bursts = {"law": "bursts", "on": 30.0, "off": 90.0}
    bursty = unlike_pools(rate=20.0, horizon=1200.0, seeds=[1, 2], arrivals=bursts)
    calm = unlike_pools(rate=20.0, horizon=300.0, seeds=[1])
    outcomes = [compare(given, [WeightedRoundRobin()])["weighted-round-robin"] for given in (bursty, calm)]
    for outcome in outcomes:
        assert outcome.margin == pytest.approx(outcome.theory, rel=outcome.error + 0.01)
    assert outcomes[0].margin == outcomes[1].margin


def test_a_queue_that_only_fills_up_is_not_called_unstable_but_its_latencies_are_marked():
    # At load 0.95 an M/D/1 queue takes about 1 / 0.05^2 services to fill, here 400 s of a window of 200 s.
    outcome = compare(server(0.95, 200.0), [Turns()], seeds=[1])["turns"]
    assert outcome.verdict == "stable" and outcome.margin == pytest.approx(1 / 0.95, rel=0.011)
    grew = replace(
        outcome, simulated=replace(outcome.simulated, growth=replace(outcome.simulated.growth, stable=False))
    )
    assert grew.growing and grew.verdict == "stable"


@pytest.mark.parametrize(
    ("bracket", "verdict"), [((1.0, 1.02), "stable"), ((0.99, 1.01), "close"), ((0.9, 1.0), "unstable")]
)
def test_the_verdict_follows_from_the_bracket(calm: Comparison, bracket: tuple[float, float], verdict: str):
    assert replace(calm["turns"], bracket=bracket).verdict == verdict


def test_a_long_run_repeats_a_trace_as_a_whole_each_time_in_another_order():
    arrival, ones = np.arange(50.0), np.ones(50, np.int64)
    data = unlike_pools(horizon=60.0).model_dump(by_alias=True, exclude_none=True)
    data["workload"]["arrivals"] = {"law": "replay"}
    data["workload"]["replay"] = Requests(arrival, 1 + np.arange(50), ones, 0 * ones, 0.0 * arrival)
    data["workload"]["rate"] = 1.0
    laps = long_run(Scenario.model_validate(data), 1, 150).prompt.reshape(3, 50)
    assert (np.sort(laps, axis=1) == 1 + np.arange(50)).all()
    assert len(np.unique(laps, axis=0)) == 3


def test_a_long_run_of_a_synthetic_workload_keeps_its_mix():
    given = unlike_pools(rate=20.0, horizon=60.0, seeds=[1])
    fresh = long_run(given, 1, 5000)
    assert len(fresh) == 5000 and np.bincount(fresh.cls) / 5000 == pytest.approx(
        given.workload.rates / given.workload.total_rate, abs=0.03
    )


def test_policies_see_the_same_arrivals_and_the_same_luck():
    twins = compare(server(0.9, 200.0, (1, 1)), [Split(0.4, "one"), Split(0.4, "two")], seeds=[3, 5])
    one, two = twins["one"].simulated, twins["two"].simulated
    assert one is not None and two is not None and repr(one.reports) == repr(two.reports)  # NaN has no equal
    difference = twins.difference("one", "two", "ttft_mean")
    assert (difference.mean, difference.half) == (0.0, 0.0)
    assert [report.seed for report in one.reports] == [3, 5] and one.reports[0] != replace(one.reports[1], seed=3)


def test_a_policy_that_raises_keeps_its_row_with_the_reason(calm: Comparison):
    assert calm["fails"].status == "raised ValueError: boom"
    assert calm["turns"].ok and calm["split"].ok
    row = calm.table().loc["fails"]
    assert row["status"] == "raised ValueError: boom" and math.isnan(row["ttft_p99"])
    assert row["simulated"] == "" and math.isnan(row["margin"])


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (Fails(Infeasible("class 'unit' cannot be served")), "infeasible: class 'unit' cannot be served"),
        (Split(math.nan), "policy 'split': fractions are float64 of shape (1, 2); give an array"),
        (FailsLate(), "no replica left"),
    ],
)
def test_reasons_stand_in_one_line(policy: Fails | Split | FailsLate, status: str):
    outcome = compare(server(0.5, 50.0), [policy]).outcomes[0]
    assert not outcome.ok and status in outcome.status and "\n" not in outcome.status


def test_what_worked_before_the_failure_is_kept():
    outcome = compare(server(0.5, 50.0), [FailsLate()])["late"]
    assert outcome.plan is not None and outcome.simulated is None


@pytest.mark.parametrize(("policies", "words"), [([], "no policy; name"), ([Turns(), Turns()], "different names")])
def test_names_must_tell_policies_apart(policies: list[Turns], words: str):
    with pytest.raises(PolicyError, match=words):
        compare(server(0.5, 50.0), policies)


def test_progress_counts_every_job_once():
    told: list[tuple[int, int, str]] = []
    compare(server(0.5, 50.0), [Turns(), Fails(OSError("disk"))], seeds=[1, 2], progress=lambda *x: told.append(x))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {8} and told[-1] == (8, 8, "done")
    assert (1, 8, "turns: fluid model") in told and (3, 8, "turns: simulate seed 2") in told


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(calm: Comparison):
    again = compare(calm.scenario, [Turns(), Split(0.5), Fails(ValueError("boom"))])
    assert again.to_json(timings=False) == calm.to_json(timings=False)
    other = compare(calm.scenario, [Turns(), Split(0.5), Fails(ValueError("boom"))], seeds=[4])
    assert other.to_json(timings=False) != calm.to_json(timings=False)


def test_json_says_what_was_computed_from_what(calm: Comparison):
    data = json.loads(calm.to_json())
    assert list(data)[-1] == "timings" and set(data["timings"]) == {"turns", "split", "fails"}
    assert data["digest"] == calm.scenario.digest and data["seeds"] == [1, 2, 3] and data["llmopt"]
    split = data["policies"][1]
    assert split["fractions"] == [[0.5, 0.5]] and split["simulated"]["verdict"] == calm["split"].verdict
    assert len(split["simulated"]["seeds"]) == 3
    assert data["policies"][2]["simulated"] is None


def test_the_folder_holds_the_same_numbers_in_every_format(calm: Comparison, tmp_path: Path):
    written = {path.name for path in write_report(calm, tmp_path)}
    pictures = {f"{name}.{kind}" for name in ("backlog", "load", "latency") for kind in ("svg", "png")}
    assert written == pictures | {"results.json", "results.csv", "results.parquet", "timings.json", "report.html"}
    csv, parquet = pd.read_csv(tmp_path / "results.csv"), pd.read_parquet(tmp_path / "results.parquet")
    assert csv["policy"].tolist() == parquet["policy"].tolist() == ["turns", "split", "fails"]
    assert csv["ttft_p99"].to_numpy() == pytest.approx(parquet["ttft_p99"].to_numpy(), nan_ok=True)
    assert csv["ttft_p99"][0] == pytest.approx(calm.table()["ttft_p99"].iloc[0])
    assert not list(tmp_path.glob(".*"))


def test_parquet_is_left_out_where_pyarrow_is_missing(
    calm: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert calm.to_parquet(tmp_path / "results.parquet") is None and not list(tmp_path.iterdir())


def test_pictures_are_the_same_bytes_and_the_page_needs_nothing_else(calm: Comparison):
    pictures = comparison_pictures(calm)
    assert pictures == comparison_pictures(calm)
    page = html_report(calm, pictures)
    assert all(f">{name}<" in page for name in ("turns", "split", "fails")) and "boom" in page
    assert page.count("<svg ") == 3
    assert not any(word in page for word in ('src="', "<script", "<link", "url(http"))


def test_a_comparison_without_any_result_draws_nothing(tmp_path: Path):
    failed = compare(server(0.5, 50.0), [Fails(OSError("disk"))])
    assert comparison_pictures(failed) == {}
    assert {path.name for path in write_report(failed, tmp_path)} >= {"results.json", "report.html"}


def test_an_unknown_row_is_named(calm: Comparison):
    with pytest.raises(KeyError, match="was not compared"):
        calm["jsq"]


def test_a_python_rule_runs_beside_data_rules():
    @dataclass(frozen=True)
    class Second:
        name: str = "second"

        def plan(self, scenario: Scenario) -> Plan:
            return Plan(self.name, lambda request, replicas: 1)

    outcome = compare(server(0.4, 100.0, (1, 1)), [Second(), Turns()])["second"]
    assert outcome.ok and outcome.fractions is not None and outcome.fractions.tolist() == [[0.0, 1.0]]
    assert outcome.plan is not None and not isinstance(outcome.plan.router, Router)


def test_an_idle_day_is_compared_and_drawn(tmp_path: Path):
    idle = compare(server(1e-7, 50.0), [Turns()], seeds=[1])
    assert idle["turns"].ok and idle["turns"].verdict == "stable" and idle["turns"].margin >= LARGEST
    assert write_report(idle, tmp_path)
