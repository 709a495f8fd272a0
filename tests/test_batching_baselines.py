"""Batching policies as data: valid on their scenarios, deterministic, causal; each heuristic does what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from factories import TWO_PIECES, pool, request_class, scenario, unlike_pools

from baselines import batching
from formulations.batching_start import admitted
from llmopt import registry
from llmopt.batcher import FIFO, Batcher, Candidates
from llmopt.errors import PolicyError
from llmopt.plan import check_plan
from llmopt.policy import Policy
from llmopt.predictions import ORACLE, Noise
from llmopt.rounds import hand_instances
from llmopt.scenario import Scenario

NAMES = registry.policy_names("batching")


def rounds_scenario() -> Scenario:
    worker = pool(
        step_time=[{"base": 1.0}], kv_capacity=64, block_size=1, lookahead_slots=1, preemption="restart",
        max_batch=1000, token_budget=10_000,
    )  # fmt: skip
    return scenario([worker], [request_class("a", 3, 8, share=0.5), request_class("b", 5, 12, share=0.5)], rate=0.1)


def two_classes(rate: float = 12.0, **settings: object) -> Scenario:
    classes = [request_class("short", 80, 20, share=0.7), request_class("long", 600, 90, share=0.3)]
    worker = {"kv_capacity": 6_000, "max_batch": 24, "step_time": TWO_PIECES, **settings}
    return scenario([pool("only", 2, **worker)], classes, rate=rate)


QUESTIONS = {
    "rounds": rounds_scenario,
    "two classes": two_classes,
    "unlike pools": lambda: unlike_pools(12.0),
    "overload": lambda: two_classes(500.0),
}


def usable(policy: Policy, name: str) -> bool:
    """Hindsight takes pools that work in rounds, and feedback pools that keep tokens."""
    return not (policy.name == "hindsight" and name != "rounds") and not (policy.name == "mlfq" and name == "rounds")


@pytest.fixture(params=NAMES, scope="module")
def policy(request: pytest.FixtureRequest) -> Policy:
    return registry.get_policy(request.param)


def test_says_its_source(policy: Policy) -> None:
    assert "Source:" in (type(policy).__doc__ or "")


@pytest.mark.parametrize("name", QUESTIONS)
def test_plans_are_valid_deterministic_and_leave_the_router_open(policy: Policy, name: str) -> None:
    at = QUESTIONS[name]()
    if not usable(policy, name):
        with pytest.raises(PolicyError, match=policy.name):
            policy.plan(at)
        return
    before = at.model_dump_json()
    first, second = policy.plan(at), policy.plan(at)
    assert at.model_dump_json() == before
    assert first.policy == policy.name
    assert first.router is None
    check_plan(first, at)
    assert json.dumps(dict(first.figures), sort_keys=True) == json.dumps(dict(second.figures), sort_keys=True)
    data = [f.name for f in dataclasses.fields(Batcher) if f.name not in ("order", "release", "replan")]
    assert all(getattr(first.batcher, f) == getattr(second.batcher, f) for f in data)


def some_candidates(rng: np.random.Generator, n: int) -> Candidates:
    p = rng.integers(1, 50, n)
    whole = rng.integers(1, 50, n)
    return Candidates(np.sort(rng.random(n)), whole, rng.integers(0, 2, n), rng.random(n), p, p, p)


def test_keys_of_rules_that_know_no_future_depend_on_their_own_row_only(policy: Policy) -> None:
    name = "rounds" if usable(policy, "rounds") else "two classes"
    rule = policy.plan(QUESTIONS[name]()).batcher
    if rule.clairvoyant:
        assert callable(rule.order)
        return
    rng = np.random.default_rng(1)
    one, other = some_candidates(rng, 20), some_candidates(rng, 20)
    mixed = Candidates(*(np.where(np.arange(20) < 10, x, y) for x, y in zip(one, other, strict=True)))
    for function in (rule.order, rule.release):
        if callable(function):
            assert np.array_equal(function(one)[:10], function(mixed)[:10])


def rule_of(policy: Policy, at: Scenario | None = None) -> Batcher:
    return policy.plan(at or two_classes()).batcher


def test_fifo_is_the_engine_and_so_is_sarathi() -> None:
    assert rule_of(batching.Fifo()) == FIFO
    assert rule_of(batching.Sarathi()) == FIFO
    assert rule_of(batching.FifoLookahead()) == Batcher(admission="lookahead")


def test_shortest_first_by_what_is_known() -> None:
    by_prompt = rule_of(batching.ShortestPrompt())
    seen = some_candidates(np.random.default_rng(2), 9)
    assert callable(by_prompt.order)
    assert np.array_equal(by_prompt.order(seen), seen.prompt)
    assert rule_of(batching.ShortestOutput()).predictor == ORACLE
    noisy = rule_of(batching.ShortestOutputNoisy(sigma=0.7))
    assert noisy.predictor == Noise(law="noise", sigma=0.7)
    assert {noisy.order, rule_of(batching.VllmPriority()).order} == {"predicted"}
    assert rule_of(batching.VllmPriority()).victims == "last"
    # the scenario's predictions, whatever they are
    assert rule_of(batching.VllmPriority()).predictor is None


def test_protection_and_clearing() -> None:
    greedy, clearing = rule_of(batching.AlphaGreedy()), rule_of(batching.AlphaBeta(0.1, 0.3))
    assert (greedy.protected, greedy.victims, greedy.overflow) == (0.3, "all", "restart")
    assert (clearing.protected, clearing.victims, clearing.clearing) == (0.1, "each", 0.3)


@pytest.mark.parametrize(
    ("policy", "mixing"),
    [
        (batching.Sarathi(), "decode-first"),
        (batching.Orca(), "prefill-first"),
        (batching.VllmV0(), "prefill-only"),
        (batching.FasterTransformer(), "decode-only"),
    ],
)
def test_whom_a_step_serves(policy, mixing) -> None:
    assert rule_of(policy).mixing == mixing


def test_quanta_double_from_a_quarter_of_the_mean_output() -> None:
    # mean output 0.7 x 20 + 0.3 x 90 = 41 tokens
    assert rule_of(batching.MultiLevelFeedback()).levels == (10, 30, 70, 150)
    assert batching.quanta(rounds_scenario(), 3) == (2, 6)
    with pytest.raises(PolicyError, match="never finish"):
        batching.MultiLevelFeedback().plan(two_classes(preemption="restart"))


def test_fifo_with_look_ahead_is_no_better_than_shortest_first_on_the_first_hand_instance() -> None:
    instance = hand_instances()["A"]
    assert instance.latency(admitted(instance, instance.output.astype(float))) == 22
    assert instance.latency(admitted(instance, -instance.output.astype(float))) > 22
