"""Verdicts and their words."""

from __future__ import annotations

import json
from typing import Any

import factories
import numpy as np
import pytest

from llmopt.assess import assess, peak_factor, plain_split
from llmopt.errors import ScenarioError
from llmopt.scenario import Scenario
from llmopt.workload import Requests

ONE = np.ones((1, 1))
CRITICAL = 64 / 1.01
"""64 slots, requests of 101 steps of 10 ms, one replica."""


def at(load: float, **settings: Any) -> Scenario:
    return factories.scenario([factories.pool(**settings)], rate=load * CRITICAL)


@pytest.mark.parametrize(
    ("load", "verdict"),
    [(0.5, "stable"), (0.97, "stable"), (0.99, "too close to call"), (1.01, "unstable"), (2.0, "unstable")],
)
def test_the_verdict_follows_the_load_and_its_error(load: float, verdict: str) -> None:
    report = assess(at(load), ONE)
    assert report.verdict == verdict
    assert report.load == pytest.approx(load, rel=0.005)
    assert report.critical_rate == pytest.approx(CRITICAL, rel=0.005)
    assert report.outer_rate == pytest.approx(CRITICAL)
    assert report.critical_rate <= report.outer_rate * (1 + 1e-9)
    assert report.sentences[0].lower().startswith(verdict)


def test_what_binds_is_named_and_every_row_listed() -> None:
    report = assess(at(0.5), ONE, router="by hand")
    assert (report.pool, report.piece, report.resource) == ("only", "step", "batch")
    rows = report.pools[0].rows
    assert [(r.piece, r.resource) for r in rows] == [("step", "kv"), ("step", "batch"), ("step", "tokens")]
    assert max(r.load for r in rows) == report.pools[0].outer_load == pytest.approx(0.5)
    assert "the batch slots (max_batch) of pool 'only'" in report.sentences[1]
    assert "Routed by hand, the critical rate is 63.3" in report.sentences[2]


@pytest.mark.parametrize(("load", "needed"), [(0.5, 1), (0.89, 1), (0.95, 2), (2.0, 3)])
def test_replicas_for_a_load_of_at_most_nine_tenths(load: float, needed: int) -> None:
    """N = ceil(lambda / (0.9 mu))."""
    report = assess(at(load), ONE)
    assert report.pools[0].replicas_needed == needed
    assert f"needs {needed} replica{'s' * (needed > 1)} for" in " ".join(report.sentences)


def test_an_outer_bound_above_one_is_said_to_be_beyond_help() -> None:
    assert "no engine policy helps" in assess(at(1.5), ONE).sentences[0]


def test_without_a_split_classes_follow_what_pools_could_serve_of_them() -> None:
    pools = [factories.pool("one"), factories.pool("three", 3)]
    case = factories.scenario(pools, rate=0.5 * CRITICAL)
    assert plain_split(case).tolist() == [pytest.approx([0.25, 0.75])]
    report = assess(case)
    assert [p.load for p in report.pools] == [pytest.approx(0.125, rel=0.01)] * 2
    assert "in proportion to what the pools could serve of each class alone" in report.sentences[2]


def test_a_class_never_goes_where_it_does_not_fit() -> None:
    pools = [factories.pool("small", kv_capacity=160), factories.pool("large")]
    assert plain_split(factories.scenario(pools)).tolist() == [[0.0, 1.0]]
    report = assess(factories.scenario(pools))
    assert "Pool 'small' gets no requests." in report.sentences
    assert report.pools[0].capacity is None


def test_a_split_that_sends_requests_where_they_do_not_fit_is_unstable() -> None:
    pools = [factories.pool("small", kv_capacity=160), factories.pool("large")]
    report = assess(factories.scenario(pools), np.array([[0.5, 0.5]]))
    assert report.verdict == "unstable"
    assert report.critical_rate == 0.0
    assert any("with any number of replicas" in said for said in report.sentences)
    assert report.as_dict()["pools"][0]["load"] is None


BURSTS = {"law": "bursts", "on": 10.0, "off": 30.0}


@pytest.mark.parametrize(
    ("arrivals", "peak"),
    [
        ({"law": "poisson"}, 1.0),
        (BURSTS, 4.0),
        ({"law": "piecewise", "times": [0, 50], "factors": [0.5, 2.0], "period": 100.0}, 1.6),
    ],
)
def test_peak_of_a_rate_profile(arrivals: dict[str, Any], peak: float) -> None:
    assert peak_factor(factories.scenario([factories.pool()], arrivals=arrivals, horizon=100.0)) == pytest.approx(peak)


def test_peak_of_a_replay_is_its_busiest_minute() -> None:
    """One request a second for ten minutes, and 60 more in the third."""
    arrival = np.sort(np.concatenate([np.arange(600.0), 120 + np.arange(60.0)]))
    ones = np.ones(len(arrival), dtype=np.int64)
    data = factories.scenario([factories.pool()], rate=1.1, horizon=600.0).model_dump(by_alias=True, exclude_none=True)
    data["workload"]["arrivals"] = {"law": "replay"}
    data["workload"]["replay"] = Requests(arrival, ones, ones, 0 * ones, 0.0 * arrival)
    assert peak_factor(Scenario.model_validate(data)) == pytest.approx(120 / 66)


def test_peaks_are_told_apart_from_the_mean() -> None:
    calm = factories.scenario([factories.pool()], arrivals=BURSTS, rate=0.2 * CRITICAL)
    assert "at the peak it is 0.8" in " ".join(assess(calm, ONE).sentences)
    busy = assess(factories.scenario([factories.pool()], arrivals=BURSTS, rate=0.5 * CRITICAL), ONE)
    assert busy.verdict == "stable"
    assert busy.pools[0].peak_load == pytest.approx(4 * busy.load)
    assert "a backlog builds up, which drains after the peak" in " ".join(busy.sentences)
    lost = assess(factories.scenario([factories.pool()], arrivals=BURSTS, rate=1.5 * CRITICAL), ONE)
    assert "a backlog builds up, which never drains" in " ".join(lost.sentences)


def test_caveats_of_the_estimate_reach_the_report() -> None:
    settings = {"preemption": "lookahead", "kv_capacity": 3000, "block_size": 1}
    report = assess(at(0.2, **settings), ONE)
    assert any("fall into step" in said for said in report.sentences)


def test_the_report_is_json() -> None:
    data = json.loads(json.dumps(assess(factories.unlike_pools()).as_dict(), allow_nan=False))
    assert data["verdict"] in ("stable", "unstable", "too close to call")
    assert len(data["pools"]) == 3
    assert data["pools"][0]["capacity"]["rate"] > 0
    assert np.sum(data["fractions"], axis=1) == pytest.approx(1.0)


def test_the_error_of_the_critical_rate_covers_every_pool_near_it() -> None:
    """Two pools carry the same load, but in one of them a request takes an eighth of the memory."""
    pools = [factories.pool("roomy"), factories.pool("tight", kv_capacity=1600)]
    sketch = factories.scenario(pools)
    roomy, tight = (assess(sketch, np.array([x])).critical_rate for x in ([1.0, 0.0], [0.0, 1.0]))
    share = 1.001 * roomy / (1.001 * roomy + tight)
    report = assess(sketch, np.array([[share, 1 - share]]))
    (first, second), error = report.pools, report.error
    assert report.pool == "roomy" and second.error > 1.5 * first.error
    assert report.load * (1 + error) == pytest.approx(second.load * (1 + second.error))
    assert f"to within {error:.1%}" in " ".join(report.sentences)


def test_fractions_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ScenarioError, match=r"fractions have shape \(1, 2\), not \(1, 1\)"):
        assess(at(0.5), np.ones((1, 2)))
