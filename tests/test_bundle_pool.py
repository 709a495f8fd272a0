"""A bundle of Attention workers and FFN servers as a pool: theory, simulator and routing take it like any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import pool, request_class, scenario

from llmopt import api
from llmopt.barrier import barrier_cycle, imbalance
from llmopt.bundle import Bundle
from llmopt.capacity import replica_capacity
from llmopt.errors import ScenarioError
from llmopt.evaluate.saturate import saturated_throughput
from llmopt.evaluate.simulate import simulate
from llmopt.ratio import cycle
from llmopt.reading import load_scenario
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad, slot_load

PIPELINES = ("ideal", "non-blocking", "attention-blocking", "blocking")
GEOMETRIC: dict[str, Any] = {
    "prompt": {"law": "geometric", "mean": 100.0, "max": 1000},
    "output": {"law": "geometric", "mean": 200.0, "max": 3000},
}
DIGESTS = {"quickstart": "4f9bac44fb99", "nie-1to1": "74f516e9e77e"}


def stages(**more: Any) -> dict[str, Any]:
    """A bundle of eight workers and a server, four layers, times in the range of published ones."""
    return {
        "attention": [{"base": 50e-6, "kv": 1.65e-9}],
        "transfer": [{"base": 20e-6, "decode": 2.2e-8}],
        "ffn": [{"base": 100e-6, "decode": 8.3e-8}],
        "layers": 4,
        "batch": 64,
        "micro_batches": 3,
        "attention_workers": 8,
        "kv_capacity": 1_000_000,
        **more,
    }


def bundle_pool(name: str = "afd", replicas: int = 1, pool: dict[str, Any] | None = None, **of: Any) -> dict[str, Any]:
    return {"name": name, "replicas": replicas, "block_size": 1, "bundle": stages(**of), **(pool or {})}


def one(**of: Any) -> Scenario:
    return scenario([bundle_pool(**of)], [{"name": "chat", "share": 1.0, **GEOMETRIC}], rate=100.0)


def load_of(known: Scenario) -> SlotLoad:
    return slot_load(known.workload.classes, known.workload.rates, known.pools[0].first_step)


def always_full(known: Scenario) -> float:
    """Requests/s of a bundle whose slots decode without a pause: x B / (L tau) / E[D]."""
    bundle, load = known.pools[0].bundle, load_of(known)
    assert bundle is not None
    tau = cycle(bundle, load, bundle.ratio)
    return bundle.attention_workers * bundle.batch / (bundle.layers * tau) / load.mean_decode


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_capacity_of_the_pool_is_the_closed_form_of_the_cycle(pipeline: str, micro_batches: int) -> None:
    """A prefilled request takes its slot one step before it decodes, so E[D] / (E[D] + 1) of the slots do."""
    known = one(pipeline=pipeline, micro_batches=micro_batches)
    bundle, load = known.pools[0].bundle, load_of(known)
    assert bundle is not None
    decoding = load.mean_decode / (load.mean_decode + 1)
    a, f = 50e-6 + 1.65e-9 * 64 * decoding * load.theta, 100e-6 + 8.3e-8 * 512 * decoding
    c = 20e-6 + 2.2e-8 * 64 * decoding
    sends_a, sends_f = pipeline in ("attention-blocking", "blocking"), pipeline == "blocking"
    tau = max(a + sends_a * c, f + sends_f * c, (a + f + 2 * c) / micro_batches)
    tau = max(a, c, f) if pipeline == "ideal" else tau
    expected = 512 * decoding / (4 * tau) / load.mean_decode
    capacity = replica_capacity(known.pools[0], known.workload.classes, np.ones(1))
    assert capacity.rate == pytest.approx(expected, rel=1e-3)
    assert capacity.rate == pytest.approx(always_full(known), rel=1.2 / load.mean_decode)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_always_full_the_simulated_bundle_makes_the_tokens_of_the_cycle(pipeline: str) -> None:
    known = one(pipeline=pipeline)
    prompt, output = known.workload.classes[0].sample(np.random.default_rng(3), 60_000)
    run = saturated_throughput(known.pools[0], prompt, output)
    tokens = run.totals.decode_tokens[0] / (run.end - run.start)
    load = load_of(known)
    assert tokens == pytest.approx(always_full(known) * load.mean_decode, rel=0.01)
    assert run.rate == pytest.approx(always_full(known), rel=0.03)


@pytest.mark.parametrize("batch", [2, 6, 20])
def test_a_pool_with_a_measured_table_has_the_capacity_of_the_table_and_not_of_its_hull(batch: int) -> None:
    """Concave times of experts, whose hull is a fraction of them."""
    table = {"tokens": [1, 10, 50, 100, 1000], "seconds": [7e-5, 3e-4, 6.5e-4, 8e-4, 1.4e-3]}
    known = one(ffn=[], ffn_table=table, batch=batch)
    bundle, load = known.pools[0].bundle, load_of(known)
    assert bundle is not None
    f, hull = (bundle.ffn_time(8), max(p.base + 8 * p.decode for p in bundle.table_hull))
    assert hull < 0.7 * f
    capacity = replica_capacity(known.pools[0], known.workload.classes, np.ones(1))
    assert capacity.rate == pytest.approx(always_full(known), rel=0.01 + 1.2 / load.mean_decode)
    full = 3 * 8 * batch
    cycle_s = cycle(bundle, load, bundle.ratio)
    assert known.pools[0].stepper(decode=full, kv=full * load.theta) == pytest.approx(3 * 4 * cycle_s)


def test_replicas_and_shape_of_a_bundle_become_those_of_its_pool() -> None:
    priced = {"attention_price": 2.0, "ffn_price": 5.0, "ffn_servers": 2}
    made = scenario([bundle_pool(**priced)], [request_class()]).pools[0]
    assert (made.max_batch, made.kv_capacity, made.price) == (3 * 8 * 64, 8_000_000, 26.0)
    assert made.replicas == 1
    assert scenario([{**bundle_pool(), "replicas": 7}]).pools[0].replicas == 7


def test_step_of_a_bundle_is_written_out_by_hand() -> None:
    """M L cycles, each worker with 1/(M x) and each server with 1/(M y) of what the bundle holds."""
    made = scenario([bundle_pool(ffn_servers=2, pipeline="non-blocking")]).pools[0]
    decode, kv = 900.0, 300_000.0
    a = 50e-6 + 1.65e-9 * kv / (3 * 8)
    c = 20e-6 + 2.2e-8 * decode / (3 * 8)
    f = 100e-6 + 8.3e-8 * decode / (3 * 2)
    assert made.stepper(decode=decode, kv=kv) == pytest.approx(3 * 4 * max(a, f, (a + f + 2 * c) / 3))


def test_imbalance_raises_what_kv_tokens_cost_and_nothing_else() -> None:
    plain, skewed = (scenario([bundle_pool(imbalance=i)]).pools[0].stepper for i in (0.0, 0.25))
    factor = np.array([1, 1, 1, 1.25, 1])
    assert skewed.coefficients == pytest.approx(plain.coefficients * factor)
    assert plain.coefficients[0, 3] > 0


def test_prompts_are_charged_only_where_they_are_computed() -> None:
    charged = {
        "attention": [{"base": 50e-6, "kv": 1.65e-9, "prefill": 1e-7, "pairs": 1e-11}],
        "ffn": [{"base": 100e-6, "decode": 8.3e-8, "prefill": 8.3e-8}],
    }
    away, here = (scenario([bundle_pool(prompts=word, **charged)]).pools[0] for word in ("elsewhere", "here"))
    assert away.stepper.coefficients[:, [1, 4]].max() == 0
    a, f = 50e-6 + 1e-7 * 2400 / 24 + 1e-11 * 1e6 / 24, 100e-6 + 8.3e-8 * 2400 / 3
    assert here.stepper(prefill=2400, pairs=1e6) == pytest.approx(3 * 4 * max(a, f, (a + f + 2 * 20e-6) / 3))
    assert here.token_budget == here.max_batch + 8192
    assert away.token_budget > 1_000_000


def test_a_bundle_that_computes_prompts_spends_the_cycle_on_them_too() -> None:
    charged = {
        "attention": [{"base": 50e-6, "kv": 1.65e-9, "prefill": 1e-6}],
        "ffn": [{"base": 100e-6, "decode": 8.3e-8, "prefill": 8.3e-8}],
    }
    known = one(prompts="here", **charged)
    load = load_of(known)
    decode = 64 * load.mean_decode / (load.mean_decode + 1)
    prompt = 64 / (load.mean_decode + 1) * load.mean_prompt
    a = 50e-6 + 1.65e-9 * decode * load.theta + 1e-6 * prompt
    f = 100e-6 + 8.3e-8 * 8 * (decode + prompt)
    tau = max(a, f, (a + f + 2 * (20e-6 + 2.2e-8 * decode)) / 3)
    prompts, outputs = known.workload.classes[0].sample(np.random.default_rng(4), 60_000)
    run = saturated_throughput(known.pools[0], prompts, outputs)
    assert run.totals.decode_tokens[0] / (run.end - run.start) == pytest.approx(8 * decode / (4 * tau), rel=0.02)
    away = one(**charged)
    assert replica_capacity(known.pools[0], known.workload.classes, np.ones(1)).rate < always_full(away)


def mixed(rate: float) -> Scenario:
    """A colocated pool and a bundle, short and long requests."""
    classes = [
        {"name": "short", "share": 0.7, **GEOMETRIC},
        request_class("long", 3000, 60, share=0.3),
    ]
    colocated = pool("colocated", 2, step_time=[{"base": 4e-3, "decode": 2e-5, "prefill": 4e-5, "kv": 1e-8}])
    return scenario([colocated, bundle_pool(batch=16, attention_workers=2)], classes, rate=rate, horizon=40.0)


def test_the_exact_program_routes_over_a_colocated_pool_and_a_bundle() -> None:
    known = mixed(100.0)
    plan = api.plan(known, "max-margin")
    assert plan.fractions is not None
    report = api.stability(known)
    assert report.critical_rate > 100.0
    tight = known.replace(**{"workload.rate": 0.9 * report.critical_rate})
    (row,) = api.compare(tight, ["max-margin"], seeds=1).outcomes
    assert row.verdict == "stable"
    assert row.margin == pytest.approx(1 / 0.9, rel=0.05)


def test_both_cores_play_a_bundle_alike() -> None:
    known = mixed(60.0).replace(**{"evaluation.horizon": 3.0})
    plan = api.plan(known, "max-margin")
    fast, slow = (simulate(known, plan, 1, core=core) for core in ("compiled", "python"))
    assert np.array_equal(fast.finish, slow.finish)
    assert len(fast.finish) > 100


def test_copies_follow_their_bundle() -> None:
    known = one(prompts="here", attention=[{"base": 5e-5, "prefill": 1e-7}], ffn=[{"base": 1e-4, "prefill": 1e-7}])
    assert known.replace().digest == known.digest
    wider = known.replace(**{"pools.0.bundle.attention_workers": 40}).pools[0]
    assert (wider.max_batch, wider.token_budget) == (3 * 40 * 64, 3 * 40 * 64 + 8192)
    kept = known.replace(**{"pools.0.token_budget": 3000, "pools.0.bundle.batch": 8}).pools[0]
    assert (kept.max_batch, kept.token_budget) == (3 * 8 * 8, 3000)


def test_digests_of_scenarios_without_bundles_stay() -> None:
    """As of before there were bundles: results of earlier runs keep their names."""
    assert {name: load_scenario(name).digest for name in DIGESTS} == DIGESTS


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bundle_pool(pool={"step_time": [{"base": 1.0}]}), "has a bundle, which determines step_time; drop step_time"),
        (bundle_pool(pool={"kv_capacity": 5, "price": 1.0}), "determines kv_capacity, price; drop"),
        (bundle_pool(ffn=[]), "needs exactly one of ffn and ffn_table"),
        (bundle_pool(batch=0), "batch"),
        (bundle_pool(prompts="here"), "computes prompts here, but its stages charge nothing for them; set prompts"),
        (bundle_pool(ffn_devices=3, attention_devices=2, colocated={"kv_capacity": 9}), "give colocated.workers"),
        (bundle_pool(ffn_devices=4, colocated={"kv_capacity": 9, "workers": 8}), "give colocated.ffn"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(data: dict[str, Any], said: str) -> None:
    plain = {"name": "t", "workload": {"rate": 1.0, "classes": [request_class()]}, "pools": [data]}
    with pytest.raises(ScenarioError, match="pools") as error:
        Scenario.checked(plain, "t.toml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_request_larger_than_one_worker_is_refused_though_the_bundle_holds_it() -> None:
    known = scenario([bundle_pool(kv_capacity=250)])
    assert known.pools[0].kv_capacity == 2000
    workload = {"rate": 1.0, "classes": [request_class(prompt=200)]}
    plain = {"name": "t", "workload": workload, "pools": [bundle_pool(kv_capacity=250)]}
    with pytest.raises(ScenarioError, match=r"301 tokens, more than the KV memory of every pool .at most 251"):
        Scenario.checked(plain, "t")


def test_a_ratio_is_asked_of_bundles_that_decode_only() -> None:
    charged = {"attention": [{"base": 5e-5, "prefill": 1e-7}], "ffn": [{"base": 1e-4, "prefill": 1e-7}]}
    known = one(prompts="here", **charged)
    with pytest.raises(ScenarioError, match="an A/F ratio is one of decode"):
        known.replace(problem="af-ratio")
    assert isinstance(known.replace(problem="af-ratio", **{"pools.0.bundle.prompts": "elsewhere"}).bundle, Bundle)


def test_layers_of_a_bundle_add_up_to_its_step() -> None:
    thin = one()
    whole = {
        key: [{name: 4 * value for name, value in piece.items()} for piece in stages()[key]]
        for key in ("attention", "transfer", "ffn")
    }
    thick = one(layers=1, **whole)
    runs = [simulate(known, api.plan(known, "max-margin"), 1, horizon=2.0) for known in (thin, thick)]
    assert np.allclose(runs[0].finish, runs[1].finish, rtol=1e-9)


@pytest.mark.parametrize("policy", ["afd-gaussian", "afd-fleet", "afd-one"])
def test_stability_of_a_planned_bundle_is_the_throughput_behind_its_barrier(policy: str) -> None:
    """Critical rate x E[D] = x B / (L E[tau]) up to the arrival step and to where the fullest worker waits for FFN."""
    known = load_scenario("afd-256-100-500")
    bundle, load = api.plan(known, policy).bundle, known.slot_load
    assert bundle is not None
    x = bundle.attention_workers
    tokens = x * bundle.batch / (bundle.layers * barrier_cycle(bundle, load, x))
    report = api.stability(known, policy)
    assert report.critical_rate * load.mean_decode == pytest.approx(tokens, rel=0.04)
    assert x == 1 or imbalance(bundle, load, x) > 0.05
    given = known.replace(**{"pools.0.bundle.imbalance": 1.0})
    assert api.stability(given, policy).critical_rate <= report.critical_rate


def test_physics_of_one_device_is_not_asked_of_a_bundle() -> None:
    named = {"accelerator": "A100 SXM 80GB", "model": "Qwen3-30B-A3B"}
    fast = scenario([bundle_pool(pool=named, attention=[{"base": 1e-9}], ffn=[{"base": 1e-9}], transfer=[{}])])
    assert api.stability(fast).pools[0].physics is None
    single = scenario([pool(step_time=[{"base": 1e-9}], **named)])
    assert api.stability(single).pools[0].physics is not None
