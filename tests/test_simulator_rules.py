"""Python rules, routers and refusals of the simulator, and its figures on a case worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulator_cases import assert_same, build

from llmopt.errors import PolicyError, ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router, split_router
from llmopt.workload import Requests

SMALL = {"step_time": [{"base": 0.25}], "token_budget": 64, "block_size": 1}
TWO_POOLS = [
    {"name": "big", "replicas": 2, "kv_capacity": 100, **SMALL},
    {"name": "tiny", "replicas": 1, "kv_capacity": 20, **SMALL},
]


def sample_of(prompt: list[int], output: list[int], gap: float = 1.0) -> Requests:
    n = len(prompt)
    return Requests(gap * np.arange(n), np.array(prompt), np.array(output), np.zeros(n, np.int64), np.full(n, 0.5))


@pytest.mark.parametrize("core", ["compiled", "python"])
def test_a_python_rule_sees_what_a_data_router_sees(core: Any) -> None:
    scenario = build([*TWO_POOLS[:1], {**TWO_POOLS[1], "kv_capacity": 60}], horizon=60.0)
    weights = {"waiting": 2.0, "running": 1.0, "kv_tokens": 0.5, "outstanding_tokens": 0.25}
    last = [-1, -1, -1]

    def rule(request: Any, replicas: Any) -> int:
        def key(r: Any) -> tuple[float, int, int]:
            return sum(w * getattr(r, name) for name, w in weights.items()), last[r.replica], r.replica

        best = min(replicas, key=key).replica
        last[best] = request.number
        return int(best)

    data = simulate(scenario, Plan("data", index_router(scenario, **weights)), seed=3, core=core)
    assert len(data.requests) > 100
    assert_same(simulate(scenario, Plan("rule", rule), seed=3, core=core), data)


@pytest.mark.parametrize("core", ["compiled", "python"])
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lambda request, replicas: 1 / 0,
            r"'mine': its rule raised ZeroDivisionError: division by zero at request 0; return",
        ),
        (
            lambda request, replicas: 1.5,
            r"returned 1.5, not an integer, at request 0; return a replica index from 0 to 2",
        ),
        (lambda request, replicas: None, r"returned None, not an integer"),
        (lambda request, replicas: True, r"returned True, not an integer"),
        (lambda request, replicas: request.number * 3, r"returned 3 at request 1; return a replica index from 0 to 2"),
        (lambda request, replicas: -1, r"returned -1 at request 0"),
        (lambda request, replicas: 2, r"'mine' sent request 1 \(40 tokens\) to a replica whose KV memory it exceeds"),
    ],
)
def test_a_broken_rule_is_named(core: Any, rule: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        simulate(build(TWO_POOLS), Plan("mine", rule), requests=sample_of([5, 20], [5, 20]), core=core)


@pytest.mark.parametrize("core", ["compiled", "python"])
def test_a_router_that_sends_a_request_where_it_cannot_fit_is_refused(core: Any) -> None:
    scenario = build([TWO_POOLS[0], {**TWO_POOLS[1], "kv_capacity": 60}])
    plan = Plan("mine", split_router(scenario, np.array([[0.0, 1.0], [0.0, 1.0]])))
    with pytest.raises(PolicyError, match="sent request 1"):
        simulate(scenario, plan, requests=sample_of([5, 40], [5, 40]), core=core)
    nowhere = replace(index_router(scenario), mask=np.zeros((2, 2), bool))
    with pytest.raises(PolicyError, match="allows class 'a' no pool"):
        simulate(scenario, Plan("mine", nowhere), requests=sample_of([5], [5]), core=core)


def test_a_request_that_fits_nowhere_is_refused() -> None:
    scenario = build(TWO_POOLS)
    plan = Plan("jsq", index_router(scenario))
    assert simulate(scenario, plan, requests=sample_of([51], [50])).finish[0] == pytest.approx(0.25 * 50)
    with pytest.raises(
        ScenarioError, match=r"request 1 needs KV memory for 102 tokens, but no replica .* more than 101"
    ):
        simulate(scenario, plan, requests=sample_of([51, 51], [50, 51]))
    with pytest.raises(ScenarioError, match="at least 1 token"):
        simulate(scenario, plan, requests=sample_of([0], [5]))
    with pytest.raises(ScenarioError, match="arrival times"):
        simulate(scenario, plan, requests=sample_of([5, 5], [5, 5], gap=-1.0))


def test_an_empty_sample_gives_an_empty_run() -> None:
    run = simulate(build(TWO_POOLS), Plan("jsq", index_router(build(TWO_POOLS))), requests=sample_of([], []))
    assert run.end == 0.0 and run.utilisation.tolist() == [0.0, 0.0, 0.0] and len(run.ttft) == 0


def test_zero_weights_are_round_robin_within_every_pool() -> None:
    scenario = build([{**TWO_POOLS[0], "replicas": 3}, {**TWO_POOLS[0], "name": "other"}])
    n = 20
    sample = sample_of([3] * n, [3] * n)
    turns = simulate(scenario, Plan("rr", index_router(scenario)), requests=sample).replica
    assert turns.tolist() == [i % 5 for i in range(n)]
    split = split_router(scenario, np.array([[0.5, 0.5]] * 2), "cyclic")
    turns = simulate(scenario, Plan("cyclic", split), requests=sample).replica
    assert turns[:12].tolist() == [0, 3, 1, 4, 2, 3, 0, 4, 1, 3, 2, 4]


def test_run_figures_on_a_case_worked_by_hand() -> None:
    """Requests of 3 prefill and 2 decode steps, one at a time, the third after a rest."""
    one = {"name": "p", "replicas": 1, "kv_capacity": 100, **SMALL, "max_batch": 1, "prefill_chunk": 2}
    scenario = build([one])
    sample = replace(sample_of([6, 6, 6], [3, 3, 3]), arrival=np.array([0.0, 0.5, 4.0]))
    run = simulate(scenario, Plan("only", index_router(scenario)), requests=sample)
    assert run.scheduled.tolist() == [0.0, 1.25, 4.0]
    assert run.finish.tolist() == [1.25, 2.5, 5.25]
    assert run.ttft.tolist() == [0.75, 1.5, 0.75]
    assert run.tpot.tolist() == [0.25] * 3
    assert run.queue_time.tolist() == [0.0, 0.75, 0.0]
    assert run.e2e.tolist() == [1.25, 2.0, 1.25]
    assert run.in_system(np.array([0.0, 0.5, 1.25, 2.5, 4.5])).ravel().tolist() == [1, 2, 1, 0, 1]
    assert run.waiting(np.array([0.0, 0.5, 1.25, 2.5, 4.5])).ravel().tolist() == [0, 1, 0, 0, 0]
    assert run.throughput(0.0, 2.5) == 0.8
    assert run.utilisation.tolist() == [3.75 / 5.25]
    # tokens in use: 2, 4, 6, 7, 8 in the five steps of each request
    assert run.replicas.held.tolist() == [81] and run.replicas.peak.tolist() == [8]
    assert run.mean_kv == pytest.approx([0.25 * 81 / 5.25])
