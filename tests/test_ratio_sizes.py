"""Micro-batch sizes other than the bundle's own from a cold start, and sizes that no bundle can have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from formulations.af_ratio import FleetRatio
from llmopt import api
from llmopt.errors import PolicyError
from llmopt.evaluate.bundle_run import simulate_bundle
from llmopt.plan import Plan, check_plan
from llmopt.policy import Optimized
from llmopt.ratio import horizon_load
from llmopt.ratio_report import ratio_report
from llmopt.scenario import Scenario


def cold(batch: int, requests: int = 500, **fleet: Any) -> Scenario:
    """The published bundle with geometric lengths, judged over a run from new requests in all slots."""
    lengths = {key: {"law": "geometric", "mean": m, "max": 20_000} for key, m in (("prompt", 100.0), ("output", 500.0))}
    bundle = {
        "attention": [{"base": 50e-6, "kv": 1.65e-9}],
        "transfer": [{"base": 20e-6, "decode": 2.2e-8}],
        "ffn": [{"base": 100e-6, "decode": 8.3e-8}],
        "pipeline": "ideal",
        "batch": batch,
        "kv_capacity": 2_000_000,
    }
    return Scenario.model_validate(
        {
            "name": "t",
            "problem": "af-ratio",
            "workload": {"rate": 1.0, "classes": [{"name": "r", "share": 1.0, **lengths}]},
            "pools": [{"name": "b", "first_token": "decode", "bundle": bundle}],
            "fleet": {"most_attention": 12, **fleet},
            "evaluation": {"requests": requests, "start": "cold", "seeds": [1]},
        }
    )


@pytest.mark.parametrize("batch", [64, 256, 512])
def test_the_load_of_a_cold_run_is_that_of_as_many_steps_as_its_batch_takes(batch: int) -> None:
    """Proposition 4.3 in closed form, whatever batch the bundle itself has."""
    load = cold(256).load_at(batch)
    assert load.theta == pytest.approx(horizon_load(100.0, 500.0, batch, 500), rel=2e-3)
    assert load == cold(batch).run_load


def test_what_a_cold_fleet_chooses_does_not_depend_on_the_batch_given() -> None:
    sizes = [64, 512]
    small, large = (check_plan(Optimized(FleetRatio()).plan(q), q) for q in (cold(b, batches=sizes) for b in sizes))
    assert small.bundle is not None
    assert small.bundle == large.bundle
    assert small.figures["cycle"] == pytest.approx(large.figures["cycle"], rel=1e-12)


def test_another_batch_from_a_cold_start_is_predicted_as_it_is_simulated() -> None:
    """Loads grow during so short a run, which theory averages; the load of the other batch would be 15 % off."""
    question = cold(64)
    other = question.bundle.sized(2, 1, 512)
    simulated = simulate_bundle(question, 1, bundle=other).throughput[1]
    assert ratio_report(question, other).throughput == pytest.approx(simulated, rel=0.03)


def test_a_pool_runs_on_however_the_bundle_of_the_question_starts() -> None:
    short = cold(256, requests=20)
    ongoing = short.replace(**{"evaluation.start": "stationary"})
    three = SimpleNamespace(name="three", plan=lambda s: Plan("three", bundle=s.bundle.sized(3)))
    loads = [api.stability(question, three).pools[0].load for question in (short, ongoing)]
    assert loads[0] == loads[1]


@pytest.mark.parametrize(
    ("change", "others", "message"),
    [
        ({"attention_workers": -1}, (), "attention_workers = -1; give a whole number of at least 1"),
        ({"attention_workers": 2.0}, (), "attention_workers = 2.0; give a whole number"),
        ({"ffn_servers": "1"}, (), "ffn_servers = '1'; give a whole number"),
        ({"batch": 0}, (), "batch = 0; give a whole number"),
        ({}, (3,), "others are not pairs of a bundle and its number"),
    ],
)
def test_sizes_that_no_bundle_can_have_are_refused(change: dict[str, Any], others: Any, message: str) -> None:
    question = cold(256)
    plan = Plan("mine", bundle=question.bundle.model_copy(update=change), others=others)
    with pytest.raises(PolicyError, match=f"policy 'mine': {message}"):
        check_plan(plan, question)
