from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from factories import pool, request_class, scenario, unlike_pools

import baselines
from baselines.routing import pool_capacity
from llmopt.evaluate.simulate import simulate
from llmopt.plan import STATE_FEATURES, Router
from llmopt.policy import Policy
from llmopt.scenario import Scenario
from llmopt.stability import stability_rows

BY_NAME = {policy.name: policy for policy in baselines.POLICIES["routing"]}
SMALL = {"kv_capacity": 1_000}


def router(name: str, question: Scenario) -> Router:
    answer = BY_NAME[name].plan(question).router
    assert isinstance(answer, Router)
    return answer


def one_tight_pool() -> Scenario:
    """A class that only the big pool can hold, and one that both can."""
    classes = [request_class("short", share=0.8), request_class("long", 2000, 51, share=0.2)]
    return scenario([pool("big"), pool("small", **SMALL)], classes)


@pytest.mark.parametrize(
    ("name", "weights", "choices"),
    [
        ("random", {}, 1),
        ("round-robin", {}, 0),
        ("jsq", {"waiting": 1, "running": 1}, 0),
        ("vllm-dp", {"waiting": 4, "running": 1}, 0),
        ("least-tokens", {"outstanding_tokens": 1}, 0),
        ("power-of-two", {"waiting": 1, "running": 1}, 2),
    ],
)
def test_rules_are_the_published_scores(name: str, weights: dict[str, float], choices: int) -> None:
    rule = router(name, unlike_pools())
    expected = [weights.get(feature, 0.0) for feature in STATE_FEATURES]
    assert rule.weights.tolist() == [expected] * 3
    assert rule.choices == choices
    assert rule.fractions is None


def test_least_kv_compares_used_fractions() -> None:
    question = unlike_pools()
    rule = router("least-kv", question)
    full = [float(rule.weights[j, 2] * p.kv_capacity) for j, p in enumerate(question.pools)]
    assert full == pytest.approx([1.0] * 3)


def test_capacity_weights_of_pools_that_differ_in_speed_only() -> None:
    """Constant steps of 10 and 20 ms: twice the capacity a replica, so three slow ones make one and a half fast."""
    slow = {"step_time": [{"name": "step", "base": 0.02}]}
    question = scenario([pool("fast"), pool("slow", 3, **slow)])
    assert pool_capacity(question)[1] == pytest.approx(1.5 * pool_capacity(question)[0])
    assert router("weighted-round-robin", question).fractions == pytest.approx(np.array([[0.4, 0.6]]))
    assert router("weighted-jsq", question).weights[:, :2] == pytest.approx(np.array([[1.0, 1.0], [2.0, 2.0]]))
    work = router("least-work", question).weights[:, 3]
    # One replica of the fast pool serves 64 / 1.01 requests of 201 tokens a second.
    assert work == pytest.approx(np.array([1.0, 2.0]) * 1.01 / 64 / 201)


def test_capacity_is_the_bound_of_the_rows() -> None:
    question = unlike_pools()
    mix = np.array([0.75, 0.25])
    for rate, rows in zip(pool_capacity(question), stability_rows(question), strict=True):
        assert rows.loads(rate * mix).max() == pytest.approx(1.0)


def test_affinity_sends_the_long_class_to_the_large_memory() -> None:
    """Equal pools but for memory, equal work: each class has a pool of its own."""
    classes = [request_class("short", share=0.5), request_class("alike", 101, 101, share=0.5)]
    question = scenario([pool("small", kv_capacity=40_000), pool("large", kv_capacity=90_000)], classes)
    fractions = router("class-affinity", question).fractions
    assert fractions is not None
    assert fractions == pytest.approx(np.array([[1.0, 0.0], [0.0, 1.0]]), abs=0.01)


def test_affinity_loads_all_pools_alike_by_its_own_measure() -> None:
    """Three classes of equal work on two equal pools: the middle one is shared half and half."""
    classes = [request_class(f"c{k}", 100 + k, share=1 / 3) for k in range(3)]
    question = scenario([pool("large", kv_capacity=90_000), pool("small", kv_capacity=80_000)], classes)
    fractions = router("class-affinity", question).fractions
    assert fractions is not None
    assert fractions == pytest.approx(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]), abs=0.01)


@pytest.mark.parametrize("policy", baselines.POLICIES["routing"], ids=lambda p: p.name)
def test_every_rule_keeps_long_requests_out_of_small_pools(policy: Policy) -> None:
    question = one_tight_pool()
    run = simulate(question, policy.plan(question), horizon=20.0)
    long = run.requests.cls == 1
    assert set(run.replicas.pool[run.replica[long]]) == {0}
    assert 1 in run.replicas.pool[run.replica[~long]] or policy.name in ("class-affinity", "least-kv")


def ids(run_of: str, question: Scenario, horizon: float) -> Iterator[int]:
    run = simulate(question, BY_NAME[run_of].plan(question), horizon=horizon)
    return iter(run.replica.tolist())


def test_round_robin_takes_turns_in_the_simulator() -> None:
    question = scenario([pool("a", 2), pool("b", 2)])
    sequence = list(ids("round-robin", question, 4.0))
    assert sequence == [k % 4 for k in range(len(sequence))]


def test_weighted_round_robin_is_as_even_as_whole_requests_allow() -> None:
    """Weights 5 to 1 give five, one, five, one: never six in a row (the smoothness that nginx promises)."""
    slow = {"step_time": [{"name": "step", "base": 0.05}]}
    question = scenario([pool("fast"), pool("slow", **slow)])
    sequence = list(ids("weighted-round-robin", question, 20.0))
    visits = [i for i, replica in enumerate(sequence) if replica == 1]
    assert {b - a for a, b in pairwise(visits)} == {6}


def test_random_is_uniform_over_replicas() -> None:
    question = scenario([pool("a", 1), pool("b", 3)], rate=200.0)
    counts = np.bincount(list(ids("random", question, 20.0)), minlength=4)
    assert counts == pytest.approx(np.full(4, counts.sum() / 4), rel=0.12)
