"""Every batching policy run: against published latencies and certificates, by the naive simulator and the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from factories import TWO_PIECES, pool, request_class, scenario

from llmopt import registry
from llmopt.errors import LLMOptError
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, check_plan
from llmopt.rounds import Rounds, hand_instances
from llmopt.scenario import Scenario
from llmopt.workload import Requests
from tests import oracle_batching

NAMES = registry.policy_names("batching")
KEEPS_TOKENS = "mlfq"
"""Runs only on pools that keep the tokens of whoever is preempted."""
CLEARING = ("alpha-greedy", "alpha-beta")
"""Admit and clear the same requests for ever where memory holds only a few; see the last test."""


def in_rounds(capacity: int, **settings: Any) -> Scenario:
    """One worker that works in rounds of half a second."""
    worker = {
        "step_time": [{"base": 0.5}], "kv_capacity": capacity, "block_size": 1, "lookahead_slots": 1,
        "preemption": "restart", "max_batch": 1000, "token_budget": 10_000, **settings,
    }  # fmt: skip
    return scenario([pool(**worker)], [request_class(prompt=1, output=1)])


def small(rng: np.random.Generator) -> Rounds:
    """Up to seven requests that get into each other's way."""
    n, capacity = int(rng.integers(3, 8)), int(rng.integers(8, 20))
    prompt = rng.integers(1, 4, n)
    return Rounds(np.sort(rng.integers(0, 9, n)), prompt, rng.integers(1, capacity - prompt + 1), capacity)


def arrived(instance: Rounds) -> Requests:
    nobody = np.zeros(len(instance), dtype=np.int64)
    return Requests(
        instance.arrival * 0.5, instance.prompt, instance.output, nobody, np.linspace(0.1, 0.9, len(nobody))
    )


def planned(name: str, at: Scenario) -> Plan:
    return check_plan(registry.get_policy(name).plan(at), at)


def latency(name: str, at: Scenario, requests: Requests) -> float:
    """Total latency in rounds."""
    return float((oracle.simulate(at, planned(name, at), requests).finish - requests.arrival).sum() / 0.5)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mc-sf", (22, 18, 754)),
        ("a-max", (22, 18, 754)),
        ("sorted-f", (22, 15, 331)),
        ("sorted-f-all", (22, 15, 331)),
        ("sorted-lp", (22, 15, 331)),
        ("lp-swap", (22, 15, 331)),
        ("rolling-horizon", (22, 15, 331)),
    ],
)
def test_rules_reach_the_published_latencies_step_by_step(name, published) -> None:
    for instance, value in zip(hand_instances().values(), published, strict=True):
        assert latency(name, in_rounds(instance.capacity), arrived(instance)) == pytest.approx(value)


@pytest.mark.parametrize(("name", "best"), [("A", 22), ("B", 15)])
def test_the_best_schedule_is_replayed_step_by_step(name, best) -> None:
    instance = hand_instances()[name]
    assert latency("hindsight", in_rounds(instance.capacity), arrived(instance)) == pytest.approx(best)


def test_the_best_schedule_is_replayed_with_arrivals_and_idle_rounds() -> None:
    instance = Rounds(np.array([0, 0, 5, 30, 31]), np.array([1, 3, 2, 4, 1]), np.array([6, 4, 5, 7, 2]), 12)
    at, requests = in_rounds(12), arrived(instance)
    plan = planned("hindsight", at)
    run = oracle.simulate(at, plan, requests)
    assert plan.bound is not None
    assert (run.finish - requests.arrival).sum() == pytest.approx(plan.bound(requests), rel=1e-5)
    late = Requests(requests.arrival + 0.2, requests.prompt, requests.output, requests.cls, requests.u)
    moved = oracle.simulate(at, planned("hindsight", at), late)
    bound = planned("hindsight", at).bound
    assert bound is not None
    assert bound(late) <= (moved.finish - late.arrival).sum() <= bound(late) + 0.5 * len(late) + 1e-4


def test_no_rule_beats_the_certificate_of_a_pool_that_restarts() -> None:
    rng = np.random.default_rng(31)
    for _ in range(3):
        instance = small(rng)
        at, requests = in_rounds(instance.capacity), arrived(instance)
        bound = planned("hindsight", at).bound
        assert bound is not None
        least = bound(requests) / 0.5
        for name in set(NAMES) - {KEEPS_TOKENS, *CLEARING}:
            assert latency(name, at, requests) >= least - 1e-4, name


def test_no_rule_beats_the_certificate_of_a_pool_that_computes_again() -> None:
    rng = np.random.default_rng(32)
    for _ in range(3):
        instance = small(rng)
        at, requests = in_rounds(instance.capacity, preemption="recompute"), arrived(instance)
        bound = planned("hindsight", at).bound
        assert bound is not None
        for name in set(NAMES) - {*CLEARING}:
            assert latency(name, at, requests) >= bound(requests) / 0.5 - 1e-4, name


def two_classes() -> Scenario:
    """Memory for a dozen requests on each of two replicas, so that some wait."""
    classes = [request_class("short", 80, 20, share=0.7), request_class("long", 600, 90, share=0.3)]
    worker = {"kv_capacity": 6_000, "max_batch": 24, "token_budget": 1024, "step_time": TWO_PIECES}
    return scenario([pool("only", 2, **worker)], classes, rate=60.0)


@pytest.mark.parametrize("core", ["naive", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_every_request_finishes_and_twice_at_the_same_time(name: str, core: str) -> None:
    at = two_classes()
    if name == "hindsight":
        with pytest.raises(LLMOptError, match="works in rounds of one length"):
            planned(name, at)
        return
    requests = at.workload.sample(1.5, 3)
    play = oracle.simulate if core == "naive" else simulate_given
    first, second = (play(at, planned(name, at), requests) for _ in range(2))
    assert np.isfinite(first.finish).all()
    assert (first.finish > requests.arrival).all()
    assert np.array_equal(first.finish, second.finish)


def simulate_given(at: Scenario, plan: Plan, requests: Requests) -> Any:
    return simulate(at, plan, seed=3, requests=requests)


def test_clearing_everybody_may_never_end(monkeypatch) -> None:
    monkeypatch.setattr(oracle_batching, "MOST_PREEMPTIONS", 50)
    instance = hand_instances()["A"]
    with pytest.raises(oracle_batching.EndlessLoop):
        latency("alpha-greedy", in_rounds(instance.capacity), arrived(instance))
