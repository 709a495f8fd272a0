"""Thresholds: the fluid equilibrium by its published numbers and by iteration, least thresholds by enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from factories import pool, request_class, scenario, unlike_pools
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations.batching_wait import (
    Flow,
    NestedWait,
    Wait,
    buffer,
    flow_of,
    fluid,
    least_thresholds,
    merged,
    nested_counts,
    outputs,
    survivors,
    thresholds,
)
from llmopt.batcher import Hold
from llmopt.errors import ScenarioError
from llmopt.plan import check_plan
from llmopt.policy import solved
from llmopt.solution import SolveOptions


def stages(prompt: int, output: int) -> int:
    """Token-steps of a request over stages 0, ..., l', stage k holding l + k tokens."""
    return sum(prompt + k for k in range(output + 1))


def linear(rates, types, base: float, per_token: float, memory: float) -> Flow:
    """Steps of base + per_token x tokens held, and memory alone for a cap."""
    area = np.array([[float(stages(*one))] for one in types])
    return Flow(np.array(rates), np.array([base]), per_token * area, area, np.array([memory]))


PUBLISHED = linear([0.8, 0.2], [(20, 100), (20, 300)], 0.003, 3.2e-5, 1e6)


def test_the_published_equilibrium() -> None:
    at = fluid(PUBLISHED)
    assert float(PUBLISHED.rates @ PUBLISHED.held[:, 0]) == pytest.approx(15890)
    assert at.step_time == pytest.approx(0.0061035, abs=5e-8)
    assert at.held == pytest.approx([96.985], abs=5e-4)
    assert at.counts == pytest.approx([0.8 * 0.0061035, 0.2 * 0.0061035], abs=5e-8)


def test_the_equilibrium_is_where_iterating_ends() -> None:
    step = 0.0
    for _ in range(500):
        step = 0.003 + 3.2e-5 * float(PUBLISHED.rates @ PUBLISHED.held[:, 0]) * step
    assert fluid(PUBLISHED).step_time == pytest.approx(step, rel=1e-9)


def test_no_equilibrium_where_the_work_alone_takes_the_time() -> None:
    flow = PUBLISHED.scaled(1 / (3.2e-5 * 15890) + 0.01)
    assert fluid(flow).step_time == np.inf
    assert least_thresholds(flow) is None
    counts, share = thresholds(flow)
    assert 0 < share < 1
    assert flow.scaled(share).feasible(counts.astype(float))
    assert least_thresholds(flow.scaled(share * 1.001)) is None


flows = st.builds(
    lambda rates, base, work, held, cap: Flow(
        np.array(rates), np.array(base), np.array(work), np.array(held), np.array([cap])
    ),
    st.lists(st.floats(0.1, 30), min_size=2, max_size=2),
    st.lists(st.floats(0.01, 0.2), min_size=2, max_size=2),
    st.lists(st.lists(st.floats(0.0, 0.02), min_size=2, max_size=2), min_size=2, max_size=2),
    st.lists(st.lists(st.floats(1, 20), min_size=1, max_size=1), min_size=2, max_size=2),
    st.floats(10, 200),
)


@settings(max_examples=200, deadline=None)
@given(flows)
def test_least_thresholds_are_feasible_and_minimal_in_every_component(flow) -> None:
    found = least_thresholds(flow)
    grid = [np.array(n, dtype=float) for n in product(range(1, 13), repeat=2)]
    feasible = [n for n in grid if flow.feasible(n)]
    if found is None or found.max() > 12:
        assert not feasible
        return
    assert flow.feasible(found.astype(float))
    assert feasible
    assert found.tolist() == np.min(feasible, axis=0).tolist()


def test_least_thresholds_are_what_an_integer_program_finds() -> None:
    import cvxpy as cp

    flow = Flow(
        np.array([12.0, 3.0, 30.0]),
        np.array([0.05, 0.02]),
        np.array([[0.01, 0.02], [0.03, 0.01], [0.004, 0.009]]),
        np.array([[900.0], [4000.0], [500.0]]),
        np.array([60_000.0]),
    )
    n = cp.Variable(3, integer=True)
    rows = [n >= 1, n @ flow.held <= flow.caps]
    rows += [flow.rates[j] * (flow.base[i] + n @ flow.work[:, i]) <= n[j] for i in range(2) for j in range(3)]
    record = solved(cp.Problem(cp.Minimize(n @ flow.held[:, 0]), rows), SolveOptions(gap=0.0))
    found = least_thresholds(flow)
    assert found is not None
    assert found.max() > 1
    assert found @ flow.held[:, 0] == pytest.approx(record.objective)


def test_thresholds_are_one_and_nothing_is_said_where_one_of_each_does_not_fit() -> None:
    flow = linear([1.0, 1.0], [(20, 100), (20, 300)], 0.003, 3.2e-5, 500.0)
    counts, share = thresholds(flow)
    assert counts.tolist() == [1, 1]
    assert share is None


def test_classes_cost_what_their_stages_do() -> None:
    # a decode-first-token pool with blocks of one token holds l + k tokens at stage k, as the paper counts
    worker = pool(
        replicas=2, first_token="decode", block_size=1, kv_capacity=30_000, max_batch=500,
        step_time=[{"base": 0.003, "kv": 3.2e-5}],
    )  # fmt: skip
    classes = [request_class("short", 20, 100, rate=1.6), request_class("long", 20, 300, rate=0.4)]
    flow = flow_of(scenario([worker], classes))
    assert flow.rates == pytest.approx([0.8, 0.2])
    assert flow.held[:, 0] == pytest.approx([stages(20, 100), stages(20, 300)])
    assert flow.held[:, 1] == pytest.approx([101, 301])
    assert flow.work[:, 0] == pytest.approx([3.2e-5 * sum(20 + k for k in range(o)) for o in (100, 300)])


def test_a_class_costs_nothing_where_it_may_not_go() -> None:
    classes = [request_class("short", rate=4.0), request_class("long", 2000, 51, rate=1.0)]
    at = scenario([pool("big", 2), pool("small", 2, kv_capacity=1_000)], classes)
    flow = flow_of(at)
    assert flow.rates == pytest.approx([1.0, 0.5])
    assert (flow.held[1] > 0).tolist() == [True] * 3 + [False] * 3
    assert len(flow.base) == flow.work.shape[1] == 2


def busy(rate: float) -> object:
    """Steps of 10 ms and room for some four thousand mean requests."""
    worker = pool(kv_capacity=40_000_000, max_batch=100_000, token_budget=1_000_000)
    classes = [request_class("short", 50, 21, share=0.75), request_class("long", 100, 61, share=0.25)]
    return scenario([worker], classes, rate=rate)


def test_wait_holds_classes_by_thresholds_that_fill_as_fast_as_steps_use_them() -> None:
    at = busy(2000.0)
    plan = check_plan(Wait().plan(at), at)
    # a constant step of 10 ms sees 15 short and 5 long requests arrive
    assert plan.batcher.hold == Hold("class", (15, 5))
    assert plan.figures["sustained"] == 1.0
    assert plan.figures["thresholds"] == {"short": 15, "long": 5}


@pytest.mark.parametrize("policy", [Wait(), NestedWait()], ids=lambda p: p.name)
def test_nobody_is_held_where_one_request_at_every_stage_is_too_much(policy: Wait | NestedWait) -> None:
    at = unlike_pools(12.0)
    plan = check_plan(policy.plan(at), at)
    # requests of many tokens in small memories: the fluid starts far less than one of them in a step
    assert (fluid(flow_of(at)).counts < 1).all()
    assert plan.figures["sustained"] is None
    assert plan.batcher.hold is None


def test_nested_wait_cuts_lives_at_quantiles_of_the_outputs() -> None:
    at = busy(2000.0)
    plan = check_plan(NestedWait(segments=4).plan(at), at)
    # three quarters of the outputs are 21 tokens and the rest are 61, so that all quantiles but the last are 21
    assert plan.batcher.hold == Hold("stage", (20, 6), (21,))
    assert plan.batcher.protected == pytest.approx(plan.figures["buffer_tokens"] / 40_000_000)
    assert plan.figures["buffer_tokens"] == plan.figures["buffer_requests"][0] * (62.5 + 21)


def test_outputs_of_all_classes_are_mixed_by_their_rates() -> None:
    at = busy(10.0)
    _, shares = merged(flow_of(at))
    values, probs = outputs(at, shares)
    assert values.tolist() == [21, 61]
    assert probs == pytest.approx([0.75, 0.25])
    assert survivors(at, shares, (20, 21)) == pytest.approx([1.0, 0.25])


def test_thresholds_of_later_segments_exceed_their_inflow() -> None:
    assert nested_counts(8, (0.5, 0.5)) == (8, 5, 3)
    assert nested_counts(1, (0.9, 0.1)) == (1, 1, 1)
    # exactly full would gather without end
    assert nested_counts(10, (0.4,)) == (10, 5)


@pytest.mark.parametrize(("inflow", "reach", "served"), [(8, 0.5, 5), (20, 0.25, 6), (3, 0.5, 2)])
def test_a_buffer_is_exceeded_no_more_often_than_its_risk(inflow, reach, served) -> None:
    rng = np.random.default_rng(1)
    size = buffer(inflow, reach, served, 0.02)
    gained = rng.binomial(inflow, reach, 400_000) - served
    walk = np.cumsum(gained)
    level = walk - np.minimum.accumulate(np.minimum(walk, 0))
    assert (level > size).mean() <= 0.02
    # within an order of magnitude, so that it is no bound by size alone
    assert (level > size / 4).mean() > 0.02 / 4


def test_nobody_gathers_where_all_can_go_on() -> None:
    assert buffer(5, 0.9, 5, 0.01) == 0


@pytest.mark.parametrize("settings", [{"segments": 0}, {"risk": 0.0}, {"risk": 1.0}])
def test_settings_without_meaning_are_refused(settings) -> None:
    with pytest.raises(ScenarioError, match="nested-wait has"):
        NestedWait(**settings)
