"""The report on an A/F ratio: its numbers against their definitions, and sentences for every case they must tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest

from llmopt.errors import ScenarioError
from llmopt.output import to_json
from llmopt.ratio import best_ratio, cycle
from llmopt.ratio_report import RatioReport, ratio_report
from llmopt.reading import load_scenario
from llmopt.scenario import Scenario

BUNDLE: dict[str, Any] = {
    "batch": 256,
    "layers": 61,
    "attention": [{"base": 50e-6, "kv": 0.00165e-6}],
    "transfer": [{"base": 20e-6, "decode": 0.022e-6}],
    "ffn": [{"base": 100e-6, "decode": 0.083e-6}],
    "micro_batches": 2,
    "pipeline": "ideal",
    "kv_capacity": 1_269_000,
}


def scenario_of(
    evaluation: dict[str, Any] | None = None, fleet: dict[str, Any] | None = None, **bundle: Any
) -> Scenario:
    """Geometric prompts of mean 100 and outputs of mean 500."""
    return Scenario.model_validate(
        {
            "name": "t",
            "problem": "af-ratio",
            "workload": {
                "rate": 1.0,
                "classes": [
                    {
                        "name": "r",
                        "share": 1.0,
                        "prompt": {"law": "geometric", "mean": 100.0, "max": 4000},
                        "output": {"law": "geometric", "mean": 500.0, "max": 20_000},
                    }
                ],
            },
            "pools": [{"name": "b", "first_token": "decode", "bundle": BUNDLE | bundle}],
            "evaluation": evaluation or {},
            "fleet": fleet or {},
        }
    )


def published_sentence(report: RatioReport) -> str:
    return next(s for s in report.sentences if s.startswith("The published rule"))


def test_without_a_bundle_it_is_about_the_best_one_under_the_barrier() -> None:
    scenario = scenario_of()
    report = ratio_report(scenario)
    assert (report.ratio, report.barrier, report.whole) == (10.0, 10, 9)
    assert report.bundle == scenario.bundle.sized(10)
    assert report.optimum.ratio == pytest.approx(9.5547, abs=6e-5)
    given = ratio_report(scenario, scenario.bundle.sized(4, 2))
    assert (given.ratio, given.regime, given.bundle.ffn_servers) == (2.0, "Attention-bound", 2)
    assert given.curve[0].barrier < report.curve[0].barrier


def test_curve_and_numbers_by_definition() -> None:
    scenario = scenario_of(fleet={"most_attention": 14}, attention_price=2.0, ffn_price=3.0)
    report = ratio_report(scenario, scenario.bundle.sized(6, 1))
    assert [point.workers for point in report.curve] == list(range(1, 15))
    assert report.curve[5].barrier == pytest.approx(report.throughput)
    assert report.curve[5].mean_field == pytest.approx(report.throughput_mean_field)
    tau = cycle(scenario.bundle, scenario.slot_load, 6)
    assert report.throughput_mean_field == pytest.approx(6 * 256 / (7 * 61 * tau))
    assert report.throughput < report.throughput_mean_field
    assert report.tpot == pytest.approx(2 * 6 * 256 / (7 * report.throughput))
    assert report.per_dollar == pytest.approx(report.throughput * 7 * 3600 / (6 * 2.0 + 3.0))
    worth = np.array([p.barrier * (p.workers + 1) / (2 * p.workers + 3) for p in report.curve])
    assert [p.loss for p in report.curve] == pytest.approx(1 - worth / worth.max(), abs=1e-12)
    assert report.curve[report.barrier - 1].loss == 0
    assert math.isnan(ratio_report(scenario_of()).per_dollar)


def test_idle_shares_are_those_of_sampled_cycles() -> None:
    scenario = scenario_of()
    report, rng = ratio_report(scenario), np.random.default_rng(1)
    # Prompts and, being without memory, ages are geometric, so that their sums over 256 slots are negative binomial.
    prompts, ages = (rng.negative_binomial(256, 1 / mean, (50_000, 10)) for mean in (100, 500))
    kv = 256 + prompts + ages
    attention, ffn = scenario.bundle.attention_time(kv), scenario.bundle.ffn_time(10)
    whole = np.maximum(attention.max(axis=1), ffn).mean()
    assert report.idle_attention == pytest.approx(1 - attention.mean() / whole, abs=3e-4)
    assert report.idle_ffn == pytest.approx(1 - ffn / whole, abs=3e-4)
    assert report.imbalance == pytest.approx(kv.max(axis=1).mean() / kv.mean() - 1, abs=3e-4)


def test_semantics_are_the_optima_of_the_pipelines() -> None:
    report = ratio_report(scenario_of(pipeline="blocking"))
    assert len(report.semantics) == 13
    for pipeline, m in (("non-blocking", 1), ("non-blocking", 2), ("attention-blocking", 2), ("blocking", 4)):
        other = scenario_of(pipeline=pipeline, micro_batches=m)
        assert report.semantics[f"{pipeline} M={m}"] == best_ratio(other.bundle, other.slot_load).ratio
    assert report.semantics["ideal"] == pytest.approx(report.published.ratio) == pytest.approx(9.5547, abs=6e-5)
    attention, hop = 50 + 0.00165 * 256 * 599, 20 + 0.022 * 256
    assert report.semantics["non-blocking M=2"] == pytest.approx((attention - 2 * hop - 100) / (0.083 * 256), rel=1e-6)


def test_an_ideal_pipeline_says_what_it_leaves_out() -> None:
    report = ratio_report(scenario_of())
    assert report.published_loss == pytest.approx(0.0, abs=1e-12)
    assert "= 9.55 loses 0.00%" in published_sentence(report)
    overlap = next(s for s in report.sentences if "ideal pipeline" in s)
    assert "7.14 with 2 micro-batches" in overlap
    assert "|A - F| >= 2 C" in overlap
    assert "9.55 with 3" in overlap
    assert "Attention-bound and FFN-bound (A = 303.0, C = 25.6, F = 303.0 us" in report.sentences[0]
    assert "(exact law of the loads, workers independent), 10A-1F is best" in report.sentences[0]


def test_two_micro_batches_without_blocking_are_named_as_the_case_where_the_rule_fails() -> None:
    scenario = scenario_of(pipeline="non-blocking")
    report = ratio_report(scenario)
    text = published_sentence(report)
    assert "max{r_A, r_C, r_peak} = 9.55 assumes that a cycle lasts max{A, C, F}" in text
    assert (
        "communication is hidden only if |A - F| >= 2 C; the optimum is 7.14, and the rule loses 4.8% in the mean"
        in text
    )
    made = [r / ((r + 1) * cycle(scenario.bundle, scenario.slot_load, r)) for r in (9.5546687, report.optimum.ratio)]
    assert report.published_loss == pytest.approx(1 - made[0] / made[1], rel=1e-6)
    assert not any("ideal pipeline" in s for s in report.sentences)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline": "non-blocking", "micro_batches": 1}, "nothing overlaps, and it lasts A + F + 2 C"),
        ({"pipeline": "attention-blocking", "micro_batches": 3}, "hidden only if A + F + 2 C <= 3 max{A + C, F}"),
        ({"attention_price": 1.0, "ffn_price": 400.0}, "counts a worker like a server; here their prices differ"),
        ({"transfer_of": "bundle", "transfer": [{"decode": 0.2e-6}]}, "here it carries those of all workers"),
    ],
)
def test_other_reasons_why_the_rule_fails(changes: dict[str, Any], words: str) -> None:
    report = ratio_report(scenario_of(**changes))
    assert report.published_loss > 0.01
    assert words in published_sentence(report)
    assert f"the optimum is {report.optimum.ratio:.2f}" in published_sentence(report)


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "words"),
    [
        ("attention-blocking", 2, "hidden only if A >= F or F >= A + 2 C"),
        ("blocking", 2, "it lasts at least max{A, F} + C"),
    ],
)
def test_prices_are_a_reason_beside_the_pipeline(pipeline: str, micro_batches: int, words: str) -> None:
    prices = {"attention_price": 1.0, "ffn_price": 400.0}
    text = published_sentence(ratio_report(scenario_of(pipeline=pipeline, micro_batches=micro_batches, **prices)))
    assert words in text
    assert "; it counts a worker like a server" in text


@pytest.mark.parametrize("m", [3, 4])
def test_three_micro_batches_restore_the_rule(m: int) -> None:
    text = published_sentence(ratio_report(scenario_of(pipeline="non-blocking", micro_batches=m)))
    assert "loses 0.00%" in text


def test_a_cold_start_adds_the_horizon_form() -> None:
    cold = ratio_report(scenario_of(evaluation={"start": "cold"}))
    assert cold.horizon.ratio == pytest.approx(9.3007, abs=6e-5)
    assert any("10,000 requests" in s and "gives 9.30." in s for s in cold.sentences)
    assert not any("From empty slots" in s for s in ratio_report(scenario_of()).sentences)


def test_memory_is_compared_with_its_capacity() -> None:
    fits = ratio_report(scenario_of())
    nu = math.sqrt(100 * 99 + 500 * 499)
    assert fits.kv_mean == pytest.approx(2 * 256 * 599)
    assert fits.kv_need == pytest.approx(2 * 256 * 599 + 3 * math.sqrt(512) * nu)
    assert "27% of its capacity of 1,269,000" in fits.sentences[-1]
    tight = ratio_report(scenario_of(kv_capacity=310_000, fleet={"kv_sigmas": 2.0}))
    assert "at 2 standard deviations" in tight.sentences[-1]
    assert "too much; lower batch or micro_batches, or raise kv_capacity" in tight.sentences[-1]


def test_a_law_has_no_interval_and_a_trace_tells_where_its_own_comes_from(tmp_path: Path) -> None:
    law = ratio_report(scenario_of())
    assert law.interval == (law.optimum.ratio, law.optimum.ratio)
    assert "without error" in law.sentences[1]
    rng = np.random.default_rng(4)
    # Outputs that alternate in long runs drift; the same ones shuffled do not.
    runs = np.where(np.arange(2000) // 200 % 2 == 0, 100, 900) + rng.integers(1, 100, 2000)
    reports = []
    for name, outputs in (("drift", runs), ("shuffled", rng.permutation(runs))):
        rows = "\n".join(f"{i},100,{o}" for i, o in enumerate(outputs))
        (tmp_path / f"{name}.csv").write_text(f"arrival,prompt,output\n{rows}\n")
        (tmp_path / f"{name}.toml").write_text(f"""
name = "t"
problem = "af-ratio"
[workload]
arrivals = {{ law = "replay" }}
[workload.trace]
file = "{name}.csv"
columns = {{ arrival = "arrival", prompt = "prompt", output = "output" }}
[[workload.classes]]
name = "r"
[[pools]]
name = "b"
first_token = "decode"
[pools.bundle]
batch = 256
attention = [{{ base = 50e-6, kv = 0.00165e-6 }}]
transfer = [{{ base = 20e-6 }}]
ffn = [{{ base = 100e-6, decode = 0.083e-6 }}]
pipeline = "ideal"
kv_capacity = 2000000
""")
        scenario = load_scenario(tmp_path / f"{name}.toml")
        reports.append((ratio_report(scenario, confidence=0.9), scenario.slot_load))
    (drift, load), (shuffled, other) = reports
    assert load.error > 3 * other.error
    assert "from 2,000 requests" in drift.sentences[1]
    assert "from sums over 20 blocks of them, since lengths drift; the 90% interval" in drift.sentences[1]
    low, high = drift.interval
    assert high - low == pytest.approx(2 * 1.644854 * load.error * 0.00165 / 0.083, rel=1e-6)
    assert low < drift.optimum.ratio < high
    assert shuffled.interval[1] - shuffled.interval[0] < (high - low) / 3


def test_a_report_is_plain_data() -> None:
    data = json.loads(to_json(ratio_report(scenario_of(fleet={"most_attention": 3}))))
    assert data["per_dollar"] is None
    assert data["bundle"]
    assert len(data["curve"]) == 3


def test_bad_questions_are_one_sentence() -> None:
    with pytest.raises(ScenarioError, match="asks for no A/F ratio"):
        ratio_report(factories.scenario([factories.pool()]))
    with pytest.raises(ScenarioError, match="give ffn a decode coefficient"):
        ratio_report(scenario_of(ffn=[{"base": 1e-3}]))
    with pytest.raises(ScenarioError, match="confidence = 95; give a number between 0 and 1"):
        ratio_report(scenario_of(), confidence=95)


def test_more_servers_than_the_fleet_allows_are_refused() -> None:
    with pytest.raises(ScenarioError, match=r"has ffn_servers = 2, more than fleet.most_ffn = 1; raise most_ffn"):
        load_scenario("afd-256-100-500").replace(**{"pools.0.bundle.ffn_servers": 2})


@pytest.mark.parametrize(
    ("name", "ratio"), [("256-100-500", 9.3007), ("256-500-500", 17.2525), ("256-100-100", 2.1694)]
)
def test_the_published_ratios_are_mean_field_optima_of_a_run_from_new_requests(name: str, ratio: float) -> None:
    assert ratio_report(load_scenario(f"afd-{name}")).optimum.ratio == pytest.approx(ratio, abs=5e-5)
