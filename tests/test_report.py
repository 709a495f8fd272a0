"""Metrics of hand-made runs, by arithmetic that fits on paper."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.evaluate.report import (
    Latency,
    estimate,
    measure,
    meets_slos,
    paired_difference,
    realised_split,
    summarise,
)
from llmopt.evaluate.run import ReplicaTotals, SimRun
from llmopt.output import to_json
from llmopt.scenario import Scenario
from llmopt.workload import Requests


def scenario(**classes: dict[str, float]) -> Scenario:
    constant = {"law": "constant", "value": 10}
    pool = {"step_time": [{"base": 0.01}], "kv_capacity": 1000, "price": 3.6}
    return Scenario.model_validate(
        {
            "name": "paper",
            "workload": {
                "rate": 1.0,
                "classes": [
                    {"name": name, "share": 1 / len(classes), "prompt": constant, "output": constant, **slo}
                    for name, slo in classes.items()
                ],
            },
            "pools": [{"name": "small", "replicas": 1, **pool}, {"name": "large", "replicas": 2, **pool}],
            "evaluation": {"horizon": 10.0, "warmup": 2.0},
        }
    )


def run(
    arrival: list[float],
    scheduled: list[float],
    first: list[float],
    finish: list[float],
    output: list[int],
    replica: list[int] | None = None,
    cls: list[int] | None = None,
) -> SimRun:
    n = len(arrival)
    zeros = np.zeros(n, np.int64)
    requests = Requests(
        np.array(arrival), zeros + 10, np.array(output), zeros if cls is None else np.array(cls), np.zeros(n)
    )
    totals = ReplicaTotals(
        pool=np.array([0, 1, 1]),
        steps=np.array([5, 5, 5]),
        busy=np.array([5.0, 2.0, 4.0]),
        prefill_tokens=np.zeros(3, np.int64),
        decode_tokens=np.zeros(3, np.int64),
        preemptions=np.array([2, 0, 1]),
        held=np.array([100, 50, 50]),
        wasted=np.array([10, 0, 25]),
        held_time=np.array([4000.0, 1000.0, 1000.0]),
        peak=np.array([900, 100, 500]),
        extrapolated=np.zeros(3, np.int64),
    )
    where = zeros if replica is None else np.array(replica)
    times = (requests.arrival, np.array(scheduled), np.array(first), np.array(finish))
    return SimRun(requests, where, *times, zeros + 1, totals, "hand")


def test_only_requests_that_arrive_after_the_warmup_and_before_the_horizon_are_measured_to_their_end():
    hand = run([1.0, 2.0, 9.9, 10.0], [1, 2, 11, 10], [2, 3, 12, 11], [3, 6, 40, 12], [2, 4, 29, 2])
    report = measure(scenario(all={}), hand, seed=7)
    assert report.requests == 2
    assert report.ttft.p50 == pytest.approx((1.0 + 2.1) / 2)
    assert report.e2e.mean == pytest.approx((4.0 + 30.1) / 2)
    assert report.queue.mean == pytest.approx((0.0 + 1.1) / 2)
    assert report.tpot.mean == pytest.approx((1.0 + 1.0) / 2)
    assert report.seed == 7


def test_rates_count_what_completes_in_the_window_of_eight_seconds():
    hand = run([0.0, 1.0, 3.0, 9.0], [0, 1, 3, 9], [1, 2, 4, 10], [1.5, 3.0, 5.0, 11.0], [5, 6, 10, 1000])
    report = measure(scenario(all={}), hand, 1)
    assert report.throughput == report.goodput == pytest.approx(2 / 8)
    assert report.tokens == pytest.approx((6 + 10) / 8)
    # Three replicas at 3.6 USD/hour are 0.003 USD/s, for 2 tokens/s.
    assert report.cost == pytest.approx(0.003 / 2 * 1e6)


def test_goodput_needs_every_requirement_and_a_request_of_one_token_has_no_tpot():
    demanding = scenario(both={"ttft": 1.0, "tpot": 0.1})
    hand = run(
        arrival=[3.0, 3.0, 3.0, 3.0],
        scheduled=[3.0, 3.0, 3.0, 3.0],
        first=[3.5, 4.5, 3.5, 3.5],
        finish=[4.0, 5.0, 3.5, 6.5],
        output=[11, 11, 1, 11],
    )
    assert meets_slos(demanding, hand).tolist() == [True, False, True, False]
    report = measure(demanding, hand, 1)
    assert (report.slo, report.goodput) == (0.5, 2 / 8)
    assert report.tpot.count == 3


def test_a_class_without_requirements_always_meets_them():
    mixed = scenario(strict={"ttft": 0.1}, free={})
    hand = run([3.0, 3.0], [3, 3], [5.0, 5.0], [6.0, 6.0], [2, 2], cls=[0, 1])
    assert meets_slos(mixed, hand).tolist() == [False, True]


def test_requests_of_one_token_only_leave_tpot_undefined_and_json_null():
    report = measure(scenario(all={}), run([3.0], [3.0], [4.0], [4.0], [1]), 1)
    assert math.isnan(report.tpot.p99) and report.tpot.count == 0
    assert json.loads(to_json(report.as_dict()))["tpot"]["p99"] is None


def test_a_run_without_requests_has_no_latency_no_cost_and_no_throughput():
    report = measure(scenario(all={}), run([], [], [], [], []), 1)
    assert report.requests == 0 and report.throughput == 0.0 and report.cost == math.inf
    assert math.isnan(report.ttft.mean) and math.isnan(report.slo)


def test_pool_use_is_an_average_over_replicas_and_time():
    hand = run([3.0, 3.0, 3.0, 3.0], [3] * 4, [4] * 4, [5, 5, 5, 20.0], [2] * 4, replica=[0, 1, 2, 2])
    small, large = measure(scenario(all={}), hand, 1).pools
    assert (small.share, large.share) == (0.25, 0.75)
    assert small.utilisation == pytest.approx(5 / 20) and large.utilisation == pytest.approx(6 / 40)
    assert small.kv_use == pytest.approx(4000 / 20 / 1000) and large.kv_use == pytest.approx(2000 / 40 / 1000)
    assert (small.kv_peak, large.kv_peak) == (0.9, 0.5)
    assert (small.preemptions, large.preemptions) == (2, 1)
    assert small.wasted == pytest.approx(0.1) and large.wasted == pytest.approx(0.25)


def test_waiting_counts_arrived_and_not_yet_admitted_requests_of_each_pool():
    hand = run([1.0, 1.0, 2.0], [1.0, 4.0, 3.0], [5] * 3, [6] * 3, [2] * 3, replica=[0, 0, 2])
    counts = hand.waiting(np.array([0.0, 1.0, 2.5, 3.0, 4.0]))
    assert counts.tolist() == [[0, 0], [1, 0], [1, 1], [1, 0], [0, 0]]


def test_the_realised_split_pools_all_runs_and_spreads_an_empty_class_evenly():
    a = run([1.0, 1.0], [1, 1], [2, 2], [3, 3], [2, 2], replica=[0, 1])
    b = run([1.0, 1.0], [1, 1], [2, 2], [3, 3], [2, 2], replica=[2, 2])
    split = realised_split(scenario(one={}, none={}), [a, b])
    assert split.tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_student_interval_of_three_known_numbers():
    # Mean 2, standard deviation 1, t(0.975; 2) = 4.302653 from any table: 4.302653 / sqrt(3) = 2.484138.
    interval = estimate([1.0, 2.0, 3.0], 0.95)
    assert interval.mean == 2.0 and interval.half == pytest.approx(2.484138, abs=1e-6)
    assert math.isnan(estimate([5.0], 0.95).half)


def test_pairs_cancel_what_two_policies_share():
    noisy = [run([3.0], [3.0], [3.0 + x], [9.0], [2]) for x in (1.0, 4.0, 2.0)]
    better = [run([3.0], [3.0], [3.0 + x - 0.5], [9.0], [2]) for x in (1.0, 4.0, 2.0)]
    a, b = ([measure(scenario(all={}), one, 1) for one in runs] for runs in (noisy, better))
    difference = paired_difference(a, b, "ttft_p50", 0.95)
    assert difference.mean == pytest.approx(0.5) and difference.half == pytest.approx(0.0, abs=1e-12)
    assert summarise(a, 0.95)["ttft_p50"].half > 1.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_quantiles_are_ordered_and_agree_with_a_sorted_list(values: list[float]):
    latency = Latency.of(np.array([*values, math.nan]))
    ordered = sorted(values)
    assert latency.count == len(values)
    assert ordered[0] <= latency.p50 <= latency.p90 <= latency.p99 <= ordered[-1]
    place = 0.5 * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    assert latency.p50 == pytest.approx(low + (place % 1) * (high - low), rel=1e-9, abs=1e-9)
