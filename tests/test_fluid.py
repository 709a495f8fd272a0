from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from factories import pool, request_class, scenario, slower, unlike_pools
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
from benchmarks.verdicts import verdicts
from llmopt.capacity import replica_capacity
from llmopt.errors import PolicyError
from llmopt.evaluate.fluid import _Tank, arriving, evaluate_fluid
from llmopt.evaluate.fluid_route import level, spread_of
from llmopt.evaluate.fluid_state import Cells
from llmopt.evaluate.margin import backlog_growth
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Incoming, Plan, ReplicaState, index_router, split_router
from llmopt.reading import load_scenario
from llmopt.registry import get_policy
from llmopt.scenario import Scenario
from llmopt.stability import equilibrium
from llmopt.workload import Requests

SLOW = {"step_time": [{"name": "step", "base": 0.02}]}
HEURISTICS = {policy.name: policy for policy in baselines.POLICIES["routing"]}
MU = 64 / (101 * 0.01)
"""Critical rate of one replica of `pool()`: 64 sequences, each 101 steps of 10 ms."""


def jsq(question: Scenario) -> Plan:
    return Plan("jsq", index_router(question, waiting=1.0, running=1.0))


def split(question: Scenario, *fractions: float) -> Plan:
    classes = len(question.workload.classes)
    return Plan("split", split_router(question, np.tile(fractions, (classes, 1))))


def test_the_hand_computed_rate_is_the_estimate() -> None:
    question = scenario([pool()])
    assert replica_capacity(question.pools[0], question.workload.classes, np.ones(1)).rate == pytest.approx(MU)


@pytest.mark.parametrize("replicas", [1, 3])
def test_overload_grows_by_the_excess(replicas: int) -> None:
    question = scenario([pool(replicas=replicas)], rate=1.2 * MU * replicas)
    run = evaluate_fluid(question, split(question, 1.0), horizon=200.0)
    late = run.times > 20
    slope = np.polyfit(run.times[late], run.backlog[late, 0], 1)[0]
    assert slope == pytest.approx(0.2 * MU * replicas, rel=1e-3)
    assert run.growth.slope == pytest.approx(0.2 * MU * replicas, rel=1e-3)
    assert run.growth.relative == pytest.approx(0.2 / 1.2, rel=1e-3)
    assert not run.stable
    assert run.drain_time == np.inf
    assert run.load[0] == pytest.approx(1.2)


def test_no_backlog_below_the_critical_rate() -> None:
    question = scenario([pool()], rate=0.99 * MU)
    run = evaluate_fluid(question, split(question, 1.0), horizon=100.0)
    assert run.stable
    assert run.backlog.max() < 1e-6
    assert run.drain_time == 0.0


@pytest.mark.parametrize(("load", "stable"), [(0.995, True), (1.005, False)])
def test_verdict_is_sharp(load: float, stable: bool) -> None:
    question = scenario([pool()], rate=load * MU)
    assert evaluate_fluid(question, split(question, 1.0), horizon=100.0).stable is stable


def test_a_burst_drains_at_the_spare_capacity() -> None:
    bursts = {"law": "piecewise", "times": [0.0, 100.0, 150.0], "factors": [0.75, 2.75, 0.75]}
    question = scenario([pool()], rate=0.6 * MU, arrivals=bursts)
    run = evaluate_fluid(question, split(question, 1.0), horizon=400.0)
    total = run.backlog.sum(axis=1)
    # The batch itself takes in what fills it, 64 - 0.45 x 64 requests, before anything waits.
    peak = 0.65 * MU * 50 - 0.55 * 64
    assert total.max() == pytest.approx(peak, rel=0.02)
    assert run.times[int(total.argmax())] == pytest.approx(150.0, abs=2.0)
    empty = run.times[(run.times > 150) & (total < 1e-6)][0]
    assert empty == pytest.approx(150 + peak / (0.55 * MU), abs=3.0)
    assert run.stable
    assert run.drain_time == 0.0


def test_what_is_left_at_the_horizon_drains_at_the_mean_rate() -> None:
    rising = {"law": "piecewise", "times": [0.0, 50.0], "factors": [0.6, 1.4]}
    question = scenario([pool()], rate=0.9 * MU, arrivals=rising)
    run = evaluate_fluid(question, split(question, 1.0), horizon=100.0)
    left = run.backlog[-1, 0]
    assert left == pytest.approx(0.26 * MU * 50 - 0.46 * 64, rel=0.03)
    assert run.drain_time == pytest.approx(left / (0.1 * MU), rel=0.05)
    assert run.stable


def test_shortest_queue_below_saturation_equalises_what_runs() -> None:
    question = scenario([pool("one"), pool("two", **SLOW)], rate=0.5 * MU)
    run = evaluate_fluid(question, jsq(question), horizon=200.0)
    # lambda_j tau_j is the same in both pools, and tau is 10 and 20 ms.
    assert run.fractions[0] == pytest.approx([2 / 3, 1 / 3], abs=0.01)
    assert run.stable


def test_shortest_queue_in_overload_lifts_all_queues_alike() -> None:
    question = scenario([pool("one"), pool("two", **SLOW)], rate=2.0 * MU)
    run = evaluate_fluid(question, jsq(question), horizon=400.0)
    late = run.times > 100
    slopes = np.polyfit(run.times[late], run.backlog[late], 1)[0]
    assert slopes == pytest.approx([0.25 * MU, 0.25 * MU], rel=0.01)
    # mu_j + a quarter of mu each, out of 2 mu, at the end; the load is that over mu_j.
    assert run.load == pytest.approx([1.25, 1.5], rel=0.01)


def test_shortest_queue_uses_the_capacity_of_all() -> None:
    question = scenario([pool("one"), pool("two", **SLOW)], rate=1.49 * MU)
    run = evaluate_fluid(question, jsq(question), horizon=400.0)
    assert run.stable
    assert run.load == pytest.approx([1.49 / 1.5] * 2, abs=0.01)


def test_random_overloads_the_slow_pool_alone() -> None:
    question = scenario([pool("one"), pool("two", **SLOW)], rate=1.2 * MU)
    plan = Plan("random", index_router(question, choices=1))
    run = evaluate_fluid(question, plan, horizon=200.0)
    assert run.fractions[0] == pytest.approx([0.5, 0.5])
    assert run.load == pytest.approx([0.6, 1.2])
    assert run.growth.slope == pytest.approx(0.1 * MU, rel=0.01)


def test_two_choices_cannot_spare_an_overloaded_pool() -> None:
    """Both draws fall on the one slow of five replicas with probability 1/25, whatever the scores."""
    question = scenario([pool("fast", 4), pool("slow", 1, step_time=[{"name": "step", "base": 0.1}])], rate=3.0 * MU)
    run = evaluate_fluid(question, Plan("p2c", index_router(question, choices=2, waiting=1.0, running=1.0)), 600.0)
    assert run.load == pytest.approx([3.0 * 24 / 25 / 4, 3.0 / 25 / 0.1], rel=1e-3)
    assert run.growth.slope == pytest.approx((3.0 / 25 - 0.1) * MU, rel=1e-2)


def test_a_sink_takes_everything() -> None:
    """Scores that never rise with the queue: least KV use sends all to the pool that cannot use its memory."""
    small_batch = pool("memory", kv_capacity=10_000_000, max_batch=8)
    question = scenario([small_batch, pool("batch", kv_capacity=9_000)], rate=0.9 * MU)
    weights = [1.0 / p.kv_capacity for p in question.pools]
    run = evaluate_fluid(question, Plan("kv", index_router(question, kv_tokens=weights)), 200.0)
    assert not run.stable
    assert run.fractions[0, 0] > 0.99


def test_masked_pools_get_nothing() -> None:
    question = scenario(
        [pool("big"), pool("small", kv_capacity=1_000)],
        [request_class("short", share=0.5), request_class("long", 2000, 50, share=0.5)],
        rate=5.0,
    )
    assert question.allowed == ((True, True), (True, False))
    run = evaluate_fluid(question, jsq(question), 100.0)
    assert run.fractions[1].tolist() == [1.0, 0.0]


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=3), st.floats(0.2, 2.0))
@settings(max_examples=15, deadline=None)
def test_static_splits_are_kept_and_judged_by_their_load(parts: list[float], load: float) -> None:
    question = scenario([pool(n) for n in ("a", "b", "c")], rate=load * MU)
    fractions = np.array(parts) / sum(parts)
    run = evaluate_fluid(question, split(question, *fractions), 100.0)
    assert run.fractions[0] == pytest.approx(fractions)
    assert run.load == pytest.approx(load * fractions)
    if abs(run.load.max() - 1) > 0.01:
        assert run.stable == (run.load.max() < 1)


@pytest.mark.parametrize("rate", [5.0, 40.0])
@pytest.mark.parametrize("choices", [0, 2])
def test_mass_is_conserved(rate: float, choices: int) -> None:
    question = unlike_pools(rate)
    plan = Plan("x", index_router(question, choices=choices, waiting=4.0, running=1.0))
    cells = Cells.of(question, one_by_one=False)
    tank = _Tank(cells, spread_of(plan, question, cells))
    dt, came, inside, out = 0.5, np.zeros(2), np.zeros(2), np.zeros(2)
    for _ in range(200):
        before = tank.waiting + tank.running
        amount = question.workload.rates * dt
        flows = tank.step(amount, dt)
        after = tank.waiting + tank.running
        assert flows.min() >= -1e-9
        assert min(tank.waiting.min(), tank.running.min()) >= -1e-12
        assert cells.use(tank.running).max() <= 1 + 1e-9
        gone = (before - after) * cells.replicas + flows
        assert gone.min() >= -1e-9
        came, out, inside = came + amount, out + gone.sum(axis=1), (after * cells.replicas).sum(axis=1)
    assert came == pytest.approx(inside + out)


def test_equilibrium_is_that_of_the_theory() -> None:
    """Below saturation and with one piece, steps are as long and batches as large as the closed form says."""
    piece = [{"name": "p", "base": 0.01, "kv": 1e-7, "decode": 1e-5, "prefill": 2e-5}]
    question = scenario([pool(step_time=piece, max_batch=1000, kv_capacity=1_000_000)], rate=50.0)
    cells = Cells.of(question, one_by_one=False)
    tank = _Tank(cells, spread_of(split(question, 1.0), question, cells))
    tank.fill(np.full((600, 1), 25.0), 0.5)
    theory = equilibrium(question.pools[0], question.workload.classes, question.workload.rates)
    assert cells.step_time(tank.running)[0] == pytest.approx(theory.step_time, rel=5e-3)
    assert tank.running.sum() == pytest.approx(theory.batch, rel=5e-3)
    seen = cells.features(tank.waiting, tank.running)[0]
    assert seen[2] == pytest.approx(theory.kv_tokens, rel=5e-3)


def test_outstanding_tokens_of_running_requests() -> None:
    """By brute force over the life of one request: 300 prompt tokens in chunks of 128, 50 output tokens."""
    question = scenario([pool(prefill_chunk=128)], [request_class(prompt=300, output=50)])
    cells = Cells.of(question, one_by_one=False)
    left = [300 - 128 * k + 50 for k in range(3)] + [49 - i for i in range(49)]
    assert cells.steps[0, 0] == len(left)
    assert cells.running[0, 0, 3] == pytest.approx(np.mean(left))
    assert cells.waiting[0, 0, 3] == 350


@st.composite
def spreads(draw: st.DrawFn) -> tuple[float, list[float], list[float], list[float], int]:
    n = draw(st.integers(1, 5))
    scores = draw(st.lists(st.floats(0, 100), min_size=n, max_size=n))
    gains = draw(st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=n, max_size=n))
    replicas = draw(st.lists(st.integers(1, 6).map(float), min_size=n, max_size=n))
    return draw(st.floats(0.1, 500)), scores, gains, replicas, draw(st.sampled_from([0, 1, 2, 3]))


@given(spreads())
@settings(max_examples=300, deadline=None)
def test_levels_are_optimal(case: tuple[float, list[float], list[float], list[float], int]) -> None:
    """A point of the base polytope is optimal if and only if the cells above a level get as little as can be."""
    amount, score, gain, replicas, choices = case
    flows = level(*case)
    final = [s + g * f / n for s, g, f, n in zip(score, gain, flows, replicas, strict=True)]
    cells, total = range(len(score)), sum(replicas)

    def owed(some: tuple[int, ...]) -> float:
        if not choices:
            return amount if len(some) == len(score) else 0.0
        return amount * (sum(replicas[j] for j in some) / total) ** choices

    assert sum(flows) == pytest.approx(amount)
    for some in chain.from_iterable(combinations(cells, k) for k in range(1, len(score) + 1)):
        assert sum(flows[j] for j in some) >= owed(some) - 1e-6 * amount
    for threshold in final:
        above = tuple(j for j in cells if final[j] > threshold + 1e-6 * (1 + abs(threshold)))
        if above:
            assert sum(flows[j] for j in above) == pytest.approx(owed(above), abs=1e-5 * amount)


def test_levels_without_feedback_are_uniform() -> None:
    assert level(10.0, [0.0] * 3, [0.0] * 3, [1.0, 2.0, 2.0]) == pytest.approx([2.0, 4.0, 4.0])


def test_arrivals_follow_the_profile_and_the_trace() -> None:
    factors = {"law": "bursts", "on": 10.0, "off": 30.0, "floor": 0.25}
    question = scenario([pool()], rate=8.0, arrivals=factors)
    table = arriving(question, 400.0)
    assert table.sum() == pytest.approx(3200.0)
    assert table.max() * len(table) / 400.0 == pytest.approx(8.0 * 3.25)
    assert table.min() * len(table) / 400.0 == pytest.approx(2.0)
    arrival = np.array([0.0, 1.0, 1.5, 7.0])
    replay = Requests(arrival, *(np.full(4, 10) for _ in range(2)), np.array([0, 1, 0, 0]), np.full(4, 0.5))
    classes = [request_class(n, share=s) for n, s in (("a", 0.75), ("b", 0.25))]
    workload = {"rate": 0.4, "arrivals": {"law": "replay"}, "classes": classes, "replay": replay}
    traced = Scenario.model_validate({"name": "t", "workload": workload, "pools": [pool()]})
    assert arriving(traced, 1000.0).sum(axis=0).tolist() == [3.0, 1.0]


def ask_like_jsq(request: Incoming, replicas: list[ReplicaState]) -> int:
    return min(range(len(replicas)), key=lambda k: replicas[k].waiting + replicas[k].running)


def test_a_python_rule_behaves_like_its_data_twin() -> None:
    question = scenario([pool("one", 2), pool("two", 2, **SLOW)], rate=3.6 * MU)
    data, called = (evaluate_fluid(question, plan, 300.0) for plan in (jsq(question), Plan("own", ask_like_jsq)))
    assert called.load == pytest.approx(data.load, abs=0.02)
    assert called.fractions == pytest.approx(data.fractions, abs=0.02)
    assert called.stable == data.stable


def test_a_python_rule_that_overloads_one_replica_of_many_is_found_out() -> None:
    question = scenario([pool(replicas=4)], rate=2.0 * MU)
    run = evaluate_fluid(question, Plan("first", lambda request, replicas: 0), 100.0)
    assert run.load[0] == pytest.approx(0.5)
    assert not run.stable
    assert run.growth.slope == pytest.approx(MU, rel=0.01)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(7, "its rule returned 7"), (1.5, "returned 1.5, not an integer"), (1, "sent a request of 2050 tokens")],
)
def test_wrong_answers_of_a_python_rule_are_refused(answer: int, message: str) -> None:
    pools = [pool("big"), pool("small", kv_capacity=1_000)]
    question = scenario(pools, [request_class("long", 2000, 50)], rate=5.0)
    with pytest.raises(PolicyError, match=message):
        evaluate_fluid(question, Plan("own", lambda request, replicas: answer), 10.0)


def test_results_do_not_depend_on_the_time_step(monkeypatch: pytest.MonkeyPatch) -> None:
    question = unlike_pools(30.0)
    coarse = evaluate_fluid(question, jsq(question), 300.0)
    monkeypatch.setattr("llmopt.evaluate.fluid.STEPS", 2400)
    fine = evaluate_fluid(question, jsq(question), 300.0)
    assert fine.fractions == pytest.approx(coarse.fractions, abs=0.01)
    assert fine.load == pytest.approx(coarse.load, abs=0.01)
    assert fine.growth.relative == pytest.approx(coarse.growth.relative, abs=1e-3)


def test_slower_pools_carry_less_under_least_work() -> None:
    pools = [pool(n, step_time=slower(s)) for n, s in (("one", 1.0), ("half", 2.0))]
    question = scenario(pools, rate=20.0)
    run = evaluate_fluid(question, Plan("work", index_router(question, outstanding_tokens=[1.0, 2.0])), 200.0)
    assert run.fractions[0, 0] > run.fractions[0, 1]


BURST = {"law": "piecewise", "times": [0.0, 100.0, 150.0], "factors": [0.75, 2.75, 0.75]}


@pytest.mark.parametrize(("name", "rate"), [("jsq", 1.2), ("random", 1.2), ("power-of-two", 1.2), ("jsq", 1.8)])
def test_backlog_through_a_burst_is_that_of_the_simulator(name: str, rate: float) -> None:
    question = scenario([pool("one"), pool("two", **SLOW)], rate=rate * MU, arrivals=BURST, horizon=300.0)
    plan = HEURISTICS[name].plan(question)
    run = evaluate_fluid(question, plan)
    at = np.linspace(0.0, 300.0, 61)
    fluid = np.column_stack([np.interp(at, run.times, column) for column in run.backlog.T])
    played = np.mean([simulate(question, plan, seed).waiting(at) for seed in (1, 2, 3)], axis=0)
    assert fluid == pytest.approx(played, abs=0.04 * played.max())
    assert played.max() > 500


def critical_rate(name: str, low: float, high: float) -> float:
    """The rate at which the fluid verdict on `unlike_pools` turns, by bisection."""
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        question = unlike_pools(middle, horizon=900.0)
        stable = evaluate_fluid(question, HEURISTICS[name].plan(question)).stable
        low, high = (middle, high) if stable else (low, middle)
    return low


@pytest.mark.parametrize("name", ["weighted-round-robin", "class-affinity", "jsq", "least-work", "power-of-two"])
def test_simulator_agrees_on_both_sides_of_the_fluid_critical_rate(name: str) -> None:
    critical = critical_rate(name, 25.0, 60.0)
    for factor in (0.96, 1.04):
        question = unlike_pools(critical * factor, horizon=1800.0)
        plan = HEURISTICS[name].plan(question)
        played = backlog_growth(question, [simulate(question, plan, seed) for seed in (1, 2, 3)])
        assert played.stable == (factor < 1)


@pytest.mark.parametrize("name", ["max-margin", "power-of-two", "jsq"])
def test_both_evaluators_agree_three_percent_off_the_critical_rate_of_the_quickstart(name: str) -> None:
    question = load_scenario("quickstart")
    _, below, above = verdicts(question, get_policy(name).plan(question), 0.03)
    assert (below, above) == (True, False)
