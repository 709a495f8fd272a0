"""Both cores against the naive oracle on random small cases, and what happens to plans that cannot be played."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from hypothesis import given, settings

from llmopt.errors import PolicyError, ScenarioError
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import STATE_FEATURES, Plan, Router, index_router, split_router
from llmopt.scenario import Scenario
from llmopt.workload import Requests

MODES = ("reserve", "lookahead", "recompute", "swap", "restart")
LONGEST = 24
# binary fractions: sums of step times are exact, so that simultaneous events stay simultaneous in every core
COEFFICIENTS = st.fixed_dictionaries(
    {
        "base": st.sampled_from([0.0, 0.015625, 0.25, 1.0]),
        "prefill": st.sampled_from([0.0, 0.00390625]),
        "decode": st.sampled_from([0.0, 0.0078125]),
        "kv": st.sampled_from([0.0, 0.0009765625]),
        "pairs": st.sampled_from([0.0, 0.00006103515625]),
    }
)


def piece(draw: st.DrawFn) -> dict[str, float]:
    drawn = draw(COEFFICIENTS)
    return drawn if any(drawn.values()) else {"base": 0.125}


@st.composite
def pools(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for j in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from([1, 2, 3, 16]))
        pool = {
            "name": f"p{j}",
            "replicas": draw(st.integers(1, 3)),
            "step_time": [piece(draw) for _ in range(draw(st.integers(1, 3)))],
            "kv_capacity": 2 * LONGEST + 3 + block + draw(st.integers(0, 120)),
            "block_size": block,
            "max_batch": draw(st.sampled_from([1, 2, 5, 100])),
            "token_budget": draw(st.sampled_from([1, 2, 3, 7, 40, 1000])),
            "preemption": draw(st.sampled_from(MODES)),
            "first_token": draw(st.sampled_from(["prefill", "decode"])),
            "lookahead_slots": draw(st.sampled_from([0, 0, 1, 3])),
        }
        if draw(st.booleans()):
            pool["prefill_chunk"] = draw(st.integers(1, 12))
        made.append(pool)
    return made


@st.composite
def requests(draw: st.DrawFn, most: int = 40) -> Requests:
    """Lengths and gaps from a drawn seed: hypothesis alone prefers few and short requests, which never meet."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, longest = draw(st.integers(1, most)), draw(st.sampled_from([3, LONGEST]))
    prompt, output = rng.integers(1, longest + 1, n), rng.integers(1, longest + 1, n)
    gap = rng.choice([0, 1, 3, draw(st.sampled_from([0, 2, 40]))], n)
    return Requests(np.cumsum(gap) / 64.0, prompt, output, rng.integers(0, 2, n), rng.random(n))


@st.composite
def routers(draw: st.DrawFn, scenario: Scenario) -> Router:
    count = len(scenario.pools)
    weight = st.sampled_from([0.0, 0.0, 1.0, 0.3])
    router = index_router(scenario, 0, **{name: [draw(weight) for _ in range(count)] for name in STATE_FEATURES})
    if draw(st.booleans()):
        shares = [[draw(st.integers(0, 3)) for _ in range(count)] for _ in range(2)]
        table = np.array(shares) + np.eye(count)[draw(st.integers(0, count - 1))]
        spread = draw(st.sampled_from(["random", "cyclic"]))
        router = replace(router, fractions=table / table.sum(axis=1, keepdims=True), spread=spread)
    elif draw(st.booleans()):
        router = replace(router, mask=np.eye(count, dtype=bool)[[0, -1]])
    return replace(router, choices=draw(st.sampled_from([0, 0, 1, 2, 3])))


def build(pool_rows: list[dict[str, Any]], horizon: float = 10.0) -> Scenario:
    law = {"law": "uniform", "low": 1, "high": LONGEST}
    classes = [{"name": name, "share": 0.5, "prompt": law, "output": law} for name in ("a", "b")]
    workload = {"rate": 4.0, "classes": classes}
    return Scenario.model_validate(
        {"name": "small", "workload": workload, "pools": pool_rows, "evaluation": {"horizon": horizon}}
    )


def assert_same(ours: SimRun, truth: SimRun) -> None:
    for name in ("replica", "preemptions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(truth, name), name)
    for name in ("scheduled", "first_token", "finish"):
        np.testing.assert_allclose(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for name in ("pool", "steps", "prefill_tokens", "decode_tokens", "preemptions", "held", "wasted", "peak"):
        np.testing.assert_array_equal(getattr(ours.replicas, name), getattr(truth.replicas, name), name)
    for name in ("busy", "held_time"):
        np.testing.assert_allclose(getattr(ours.replicas, name), getattr(truth.replicas, name), rtol=1e-9, err_msg=name)


def check_cores(scenario: Scenario, plan: Plan, sample: Requests) -> SimRun:
    truth = oracle.simulate(scenario, plan, sample)
    for core in ("compiled", "python"):
        assert_same(simulate(scenario, plan, requests=sample, core=core), truth)
    return truth


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_both_cores_agree_with_the_oracle(data: st.DataObject) -> None:
    scenario = build(data.draw(pools()))
    plan = Plan("drawn", data.draw(routers(scenario)))
    truth = check_cores(scenario, plan, data.draw(requests()))
    assert (truth.finish > truth.requests.arrival).all() or any(
        p.stepper.coefficients.min() == 0 for p in scenario.pools
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_cores_agree_where_budget_and_memory_are_short(data: st.DataObject) -> None:
    """Requests that get no token in some steps, and are preempted in others or in the same."""
    pool = data.draw(pools())[0]
    pool |= {"replicas": 1, "max_batch": 100, "kv_capacity": 2 * LONGEST + 3 + pool["block_size"]}
    pool |= {"token_budget": data.draw(st.integers(1, 12)), "prefill_chunk": data.draw(st.sampled_from([1, 2, 5, 12]))}
    scenario = build([pool])
    check_cores(scenario, Plan("only", index_router(scenario)), data.draw(requests()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_cores_agree_under_memory_pressure_with_long_outputs(mode: str, seed: int) -> None:
    """Longer runs: several pieces whose order changes as the batch grows, and hundreds of preemptions."""
    rng = np.random.default_rng(seed)
    pieces = [
        {"base": 0.013, "kv": 1.7e-6},
        {"base": 0.009, "kv": 9.1e-6, "decode": 1e-4},
        {"base": 0.02, "pairs": 1e-7},
    ]
    pool = {
        "name": "p",
        "replicas": 2,
        "step_time": pieces[: 1 + seed],
        "kv_capacity": 2400,
        "block_size": (1, 16, 7, 16)[seed],
        "token_budget": (4000, 60, 256, 20)[seed],
        "preemption": mode,
        "first_token": ("decode", "prefill")[seed % 2],
    }
    n = 60
    sample = Requests(
        np.sort(rng.uniform(0, 10, n)),
        rng.integers(1, 200, n),
        rng.integers(1, 900, n),
        rng.integers(0, 2, n),
        rng.random(n),
    )
    scenario = build([pool])
    truth = check_cores(scenario, Plan("jsq", index_router(scenario, waiting=1.0, running=1.0)), sample)
    assert (truth.preemptions.sum() > 20) == (mode in ("recompute", "swap", "restart"))


def conserved(scenario: Scenario, run: SimRun) -> bool:
    """held - wasted = sum of the lifetime areas g(s, o), with K = ceil(s / chunk) prefill steps."""
    pool = scenario.pools[0]
    s, o, e = run.requests.prompt, run.requests.output, pool.first_step
    full = -(-s // pool.chunk) - 1
    steps = o - e
    area = pool.chunk * full * (full + 1) // 2 + s + s * steps + steps * (steps + 1) // 2
    return int((run.replicas.held - run.replicas.wasted).sum()) == int(area.sum())


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("mode", MODES)
def test_memory_in_use_is_conserved(mode: str, first_token: str) -> None:
    pool = {
        "name": "p",
        "replicas": 3,
        "step_time": [{"base": 1.0}],
        "kv_capacity": 900,
        "block_size": 4,
        "token_budget": 100_000,
        "prefill_chunk": 64,
        "preemption": mode,
        "first_token": first_token,
    }
    rng = np.random.default_rng(5)
    n = 4000
    sample = Requests(
        np.sort(rng.uniform(0, 200, n)),
        rng.integers(1, 200, n),
        rng.integers(1, 200, n),
        rng.integers(0, 2, n),
        rng.random(n),
    )
    scenario = build([pool])
    run = simulate(scenario, Plan("random", split_router(scenario, np.ones((2, 1)))), requests=sample)
    assert conserved(scenario, run)
    assert (run.replicas.wasted.sum() > 0) == (mode in ("recompute", "restart"))


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
