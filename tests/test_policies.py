"""What every policy promises, whoever wrote it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from factories import pool, request_class, scenario, unlike_pools

from llmopt import api, registry
from llmopt.evaluate.fluid import evaluate_fluid
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Router, check_plan
from llmopt.policy import Optimized, Policy
from llmopt.scenario import Scenario

NAMES = registry.policy_names("routing")


def tight() -> Scenario:
    """The long class fits into the big pool only."""
    classes = [request_class("short", share=0.8), request_class("long", 2000, 51, share=0.2)]
    return scenario([pool("big", 2), pool("small", 2, kv_capacity=1_000)], classes)


QUESTIONS = {
    "one pool": lambda: scenario([pool(replicas=2)]),
    "unlike pools": lambda: unlike_pools(12.0),
    "tight memory": tight,
    "one class twice": lambda: scenario(
        [pool("a"), pool("b")], [request_class("x", rate=4.0), request_class("y", rate=6.0)]
    ),
}


@pytest.fixture(params=QUESTIONS, scope="module")
def question(request: pytest.FixtureRequest) -> Scenario:
    return QUESTIONS[request.param]()


@pytest.fixture(params=NAMES, scope="module")
def policy(request: pytest.FixtureRequest) -> Policy:
    return registry.get_policy(request.param)


@pytest.mark.parametrize("name", registry.policy_names())
def test_is_a_frozen_dataclass_with_a_usable_name(name: str) -> None:
    policy = registry.get_policy(name)
    assert isinstance(policy, Policy)
    assert dataclasses.is_dataclass(policy)
    inner = policy.formulation if isinstance(policy, Optimized) else policy
    for one in (policy, inner):
        field = dataclasses.fields(one)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field, None)
    assert policy.name == policy.name.lower().strip()
    assert " " not in policy.name
    assert hash(inner) == hash(inner)


def test_says_its_rule_and_its_source(policy: Policy) -> None:
    kind = type(policy.formulation) if isinstance(policy, Optimized) else type(policy)
    assert kind.__doc__
    assert len(kind.__doc__) > 60
    if not isinstance(policy, Optimized):
        assert "Source:" in kind.__doc__


def test_plan_is_valid_deterministic_and_leaves_the_scenario_alone(policy: Policy, question: Scenario) -> None:
    before = question.model_dump_json()
    first, second = (policy.plan(question) for _ in range(2))
    assert question.model_dump_json() == before
    check_plan(first, question)
    assert first.policy == policy.name
    assert isinstance(first.router, Router)
    assert isinstance(second.router, Router)
    for field in dataclasses.fields(Router):
        assert np.array_equal(getattr(first.router, field.name), getattr(second.router, field.name))
    assert json.dumps(dict(first.figures), sort_keys=True) == json.dumps(dict(second.figures), sort_keys=True)
    assert (first.solve is not None) == isinstance(policy, Optimized)


def test_runs_in_the_fluid_model_and_respects_memory(policy: Policy, question: Scenario) -> None:
    run = evaluate_fluid(question, policy.plan(question), horizon=30.0)
    assert run.fractions.sum(axis=1) == pytest.approx(np.ones(len(question.workload.classes)))
    assert not (run.fractions > 1e-9)[~np.array(question.allowed)].any()
    assert np.isfinite(run.load).all()
    assert run.backlog.min() >= -1e-9
    assert run.backlog.sum(axis=1) == pytest.approx(run.by_class.sum(axis=1))


def test_runs_in_the_simulator_and_respects_memory(policy: Policy, question: Scenario) -> None:
    run = simulate(question, policy.plan(question), seed=3, horizon=10.0)
    assert len(run.finish) > 10
    assert (run.finish > run.requests.arrival).all()
    allowed = np.array(question.allowed)
    assert allowed[run.requests.cls, run.replicas.pool[run.replica]].all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("max-margin", "min-delay", "few-pools", "min-cost")])
def test_baselines_have_a_plan_even_in_overload(name: str) -> None:
    api.plan(unlike_pools(1000.0), name)
