"""The bundled scenarios and the catalog: complete, sourced, and true to the traces that they quote."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import llmopt.catalog
from formulations.batching_start import admitted
from llmopt.api import stability
from llmopt.batcher import Batcher
from llmopt.catalog import catalog_entry, catalog_names
from llmopt.errors import ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.reading import bundled_scenarios, load_scenario
from llmopt.rounds import Rounds
from llmopt.scenario import Pool
from llmopt.traces import Trace, read_trace, trace_summary

NAMES = ("azure-code", "azure-conv", "bursty-day", "nie-1to1", "nie-1to2", "nie-2to1", "quickstart")
BATCHING = {
    "rounds-model1": (50, 50),
    "rounds-model2": (25, 75),
    "lmsys-high": (9_700, 10_300),
    "lmsys-low": (9_700, 10_300),
    "chat-summaries": (2000, 2000),
    "adversarial": (240, 240),
    "batch-burst": (6000, 6000),
    "azure-conv-batching": (19_000, 21_000),
    "mooncake-batching": (12_240, 12_240),
}
"""Scenarios whose open decision is batching, and how many requests a run of them has."""
PUBLISHED = {
    "afd-256-100-500": (256, 100, 500, 9.30, 6e-4),
    "afd-256-500-500": (256, 500, 500, 17.25, 3e-4),
    "afd-256-100-100": (256, 100, 100, 2.17, 3e-3),
    "afd-128-100-500": (128, 100, 500, 7.08, 0.01),
    "afd-512-100-500": (512, 100, 500, 10.31, 0.01),
    "afd-two-micro-batches": (256, 100, 500, 9.30, 6e-4),
}
"""Scenarios with the published coefficients: B, mean prompt, mean output, the published ratio, and how close."""
AFD = (*PUBLISHED, "afd-qwen3-235b-h200")


def test_the_promised_scenarios_are_there() -> None:
    assert {*NAMES, *BATCHING, *AFD} <= set(bundled_scenarios())


@pytest.mark.parametrize("name", AFD)
def test_every_scenario_with_an_open_ratio_asks_one_question(name: str) -> None:
    scenario = load_scenario(name)
    assert (scenario.name, scenario.problem) == (name, "af-ratio")
    assert scenario.question.endswith("?")
    assert bundled_scenarios()[name].read_text().startswith(f"# {scenario.question}\n")
    bundle, load = scenario.bundle, scenario.slot_load
    slots = bundle.micro_batches * bundle.batch
    assert slots * load.theta + 3 * np.sqrt(slots) * load.deviation <= bundle.kv_capacity


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_ratio_follows_from_the_scenario(name: str) -> None:
    """Theorem 4.4 and Proposition 4.3 of v1, written out, on the numbers in the file."""
    b, prompt, output, published, within = PUBLISHED[name]
    scenario = load_scenario(name)
    bundle, cls = scenario.bundle, scenario.workload.classes[0]
    means = (bundle.batch, cls.prompt.mean, cls.output.mean)
    assert means == pytest.approx((b, prompt, output), rel=1e-6)
    (attention,), (transfer,), (ffn,) = bundle.attention, bundle.transfer, bundle.ffn
    p, steps = 1 / output, 10_000 * output / b
    held = prompt + (1 - p) / p * (1 - (1 - (1 - p) ** steps) / (steps * p))
    r_a = (attention.kv * b * held + attention.base - ffn.base) / (ffn.decode * b)
    r_c = (transfer.decode * b + transfer.base - ffn.base) / (ffn.decode * b)
    assert max(r_a, r_c, (ffn.base / (ffn.decode * b)) ** 0.5) == pytest.approx(published, rel=within)
    assert bundle.kv_capacity == (0.9 * 128e9 - 26e9) / (61 * 576 * 2) // 1000 * 1000


def test_the_qwen_scenario_gives_the_throughput_that_its_source_prints() -> None:
    """Tokens/s per GPU at 1, 2, 3, 4 and 6 nodes of Attention for one of FFN, from the stage times alone."""
    bundle = load_scenario("afd-qwen3-235b-h200").bundle
    assert bundle.ffn_table is not None
    a, c = bundle.attention[0].base, bundle.transfer[0].base
    for x, printed in ((1, 1193), (2, 1370), (3, 1232), (4, 1169), (6, 933)):
        f = bundle.ffn_table.seconds[bundle.ffn_table.tokens.index(341 * x)]
        cycle = max(a, f, (a + f + 2 * c) / 3)
        assert 341 * x / (94 * cycle * 8 * (x + 1)) == pytest.approx(printed, rel=0.004)


@pytest.mark.parametrize("name", [*NAMES, *BATCHING])
def test_every_scenario_loads_and_asks_one_question(name: str) -> None:
    scenario = load_scenario(name)
    text = bundled_scenarios()[name].read_text()
    assert scenario.name == name
    assert scenario.question.endswith("?")
    assert re.match(r"# .*\?\n", text), "the first comment asks the question"
    low, high = BATCHING.get(name, (5000, 10**6))
    assert low <= len(scenario.workload.sample(scenario.evaluation.horizon, 1)) <= high
    assert scenario.problem == ("batching" if name in BATCHING else "routing")


@pytest.mark.parametrize("name", BATCHING)
def test_batching_scenarios_open_nothing_but_batching(name: str) -> None:
    """One pool that takes any rule, its memory the scarce resource, and a load from which something follows."""
    scenario = load_scenario(name)
    (pool,) = scenario.pools
    assert not pool.async_scheduling
    assert scenario.predictions.law == "oracle"
    report = stability(scenario)
    assert report.resource == "kv"
    overloaded = name in ("rounds-model2", "lmsys-high")
    assert (3 < report.load < 13) if overloaded else (0.7 < report.load < 1.05)
    run = simulate(scenario, Plan("fifo"))
    assert np.isfinite(run.e2e).all()
    assert run.scheduled.max() > run.requests.arrival.max(), "somebody waits for others"


@pytest.mark.parametrize("name", ["rounds-model1", "adversarial"])
def test_an_engine_with_steps_of_a_second_plays_rounds(name: str) -> None:
    """All there at 0, first come first served with look-ahead: they start when the list rule starts them."""
    run = simulate(load_scenario(name), Plan("look", batcher=Batcher(admission="lookahead")))
    drawn = run.requests
    instance = Rounds.together(
        list(zip(drawn.prompt, drawn.output, strict=True)), load_scenario(name).pools[0].kv_capacity
    )
    start = admitted(instance, np.zeros(len(instance)))
    assert run.scheduled.tolist() == start.tolist()
    assert run.e2e.sum() == instance.latency(start)
    assert run.replicas.peak[0] <= instance.usage(start).max()


def test_lmsys_lengths_have_the_published_means_and_medians() -> None:
    high, low = load_scenario("lmsys-high"), load_scenario("lmsys-low")
    assert high.workload.classes == low.workload.classes
    assert high.pools == low.pools
    assert (high.workload.rate, low.workload.rate, high.pools[0].kv_capacity) == (50.0, 10.0, 16_492)
    for law, mean, median in (
        (high.workload.classes[0].prompt, 40.62, 11),
        (high.workload.classes[0].output, 85.32, 45),
    ):
        values, probs = law.pmf
        assert law.mean == pytest.approx(mean, rel=1e-3)
        assert values[np.searchsorted(np.cumsum(probs), 0.5)] == median


def test_mooncake_scenario_quotes_its_trace(shared: Path) -> None:
    file = shared / "data/mooncake-fast25/conversation_trace.jsonl"
    quoted, real = load_scenario("mooncake-batching"), load_scenario("mooncake-batching", file)
    assert quoted.workload.rates == pytest.approx(real.workload.rates, rel=0.02)
    assert len(real.workload.sample(real.evaluation.horizon, 1)) == 12_031
    for a, b in zip(quoted.workload.classes, real.workload.classes, strict=True):
        assert a.prompt.mean == pytest.approx(b.prompt.mean, rel=0.03)
        assert a.output.mean == pytest.approx(b.output.mean, rel=0.03)
        assert a.largest >= b.largest


@pytest.mark.parametrize("name", [*NAMES, *BATCHING, *AFD])
def test_every_number_in_a_scenario_has_a_unit(name: str) -> None:
    """A comment on the line, or, for a table or a list, on the line that opens it or closes it."""
    plain = ("name", "problem", "question", "law", "probs", "values", "seeds", "replicas", "horizon", "period")
    for line in bundled_scenarios()[name].read_text().splitlines():
        found = re.match(r"(\w+) = [\[{]?.*\d", line)
        if found and found[1] not in plain and '"' not in line.split("#")[0].split("=", 1)[1][:3]:
            assert "#" in line or line.rstrip().endswith("["), line


def test_quickstart_sets_its_main_keys_in_plain_lines() -> None:
    lines = bundled_scenarios()["quickstart"].read_text().splitlines()
    for key in ("rate", "replicas", "seeds"):
        assert any(re.match(rf"{key} = [\d\[]", line) for line in lines)


def test_quickstart_has_three_unlike_pools_and_two_classes() -> None:
    scenario = load_scenario("quickstart")
    assert (len(scenario.pools), len(scenario.workload.classes)) == (3, 2)
    speeds = [pool.stepper(prefill=1024, decode=32, kv=32_000) for pool in scenario.pools]
    assert max(speeds) > 3 * min(speeds)
    rooms = [pool.kv_capacity for pool in scenario.pools]
    assert max(rooms) > 10 * min(rooms)


@pytest.mark.parametrize("name", [name for name in catalog_names() if not name.startswith("afd-")])
def test_every_catalog_constant_has_a_source(name: str) -> None:
    entry = catalog_entry(name)
    assert set(entry.sources) == set(entry.pool)
    assert all(len(source) > 10 for source in entry.sources.values())
    pool = Pool.model_validate({"name": "p", "replicas": 1, **entry.pool})
    assert 1e-3 < pool.stepper() < 0.1
    assert "\n" not in entry.description
    assert pool.stepper(prefill=2048, decode=64, kv=100_000) < 1.0


def test_catalog_files_hold_nothing_but_pool_keys() -> None:
    for file in Path(llmopt.catalog.__file__).parent.glob("*.toml"):
        keys = tomllib.loads(file.read_text()).keys()
        assert keys <= {*Pool.model_fields, "description", "sources"} - {"name", "replicas", "source", "catalog"}


def test_an_unknown_entry_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ScenarioError, match="did you mean 'nie-a100-llama3-8b'"):
        catalog_entry("nie-a100-llama3")


def test_roofline_constants_follow_from_the_published_peaks() -> None:
    """15.0 GB of weights, 13.96 GFLOP and 131072 B of KV a token, 524288 FLOP a pair; efficiencies 0.8 and 0.6."""
    for name, flops, bandwidth in (("h100", 989.5e12, 3.35e12), ("a100", 312e12, 1.935e12)):
        memory, compute = catalog_entry(f"{name}-llama31-8b").pool["step_time"]
        assert memory["base"] == pytest.approx(15.0e9 / (0.8 * bandwidth), rel=2e-3)
        assert memory["kv"] == pytest.approx(131_072 / (0.8 * bandwidth), rel=2e-3)
        assert compute["prefill"] == pytest.approx(13.96e9 / (0.6 * flops), rel=2e-3)
        assert compute["decode"] == pytest.approx(15.01e9 / (0.6 * flops), rel=2e-3)
        assert compute["pairs"] == pytest.approx(524_288 / (0.6 * flops), rel=2e-3)


def test_nie_scenarios_have_the_published_batch_times() -> None:
    for name, batch in (("nie-1to1", 0.0372), ("nie-2to1", 0.0430), ("nie-1to2", 0.0337)):
        pool = load_scenario(name).pools[0]
        assert (pool.stepper(), pool.kv_capacity, pool.chunk) == (batch, 131_000, 512)


def test_fitted_step_times_are_close_to_measured_batches(shared: Path) -> None:
    """Per-layer kernel times of the RTX 4090 summed by hand for two batches: pure decode and a full prefill chunk."""
    import pandas as pd

    folder = shared / "data/vllm-runs/profiles"
    dense = pd.read_csv(folder / "RTX4090_Llama-3.1-8B_tp1_dense.csv").groupby(["layer", "tokens"]).time_us.median()
    attention = pd.read_csv(folder / "RTX4090_Llama-3.1-8B_tp1_attention.csv")
    heads = pd.read_csv(folder / "RTX4090_Llama-3.1-8B_tp1_per_sequence.csv")
    heads = heads.groupby(["layer", "sequences"]).time_us.median()
    keys = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    stepper = Pool.model_validate({"name": "p", "replicas": 1, **catalog_entry("rtx4090-llama31-8b").pool}).stepper
    for batch, features in (((0, 0, 32, 1024), (0, 32, 32_768, 0)), ((2048, 0, 0, 0), (2048, 0, 0, 2048**2 / 2))):
        tokens = batch[0] + batch[2]
        layer = sum(
            dense[n, tokens] for n in ("act_fn", "down_proj", "gate_up_proj", "o_proj", "qkv_proj", "rotary_emb")
        )
        layer += (
            2 * dense["layernorm", tokens] + attention[(attention[keys] == list(batch)).all(axis=1)].time_us.median()
        )
        ends = dense["embedding", tokens] + dense["final_layernorm", tokens]
        ends += heads["lm_head", max(batch[2], 1)] + heads["sampler", max(batch[2], 1)]
        kernels = stepper(*features) - catalog_entry("rtx4090-llama31-8b").pool["host_overhead"]
        assert kernels == pytest.approx((32 * layer + ends) * 1e-6, rel=0.07)


@pytest.mark.parametrize(("gpu", "entry", "within"), [("RTX4090", "rtx4090", 0.05), ("RTXPRO6000", "rtxpro6000", 0.03)])
def test_catalog_replays_a_measured_run(gpu: str, entry: str, within: float, shared: Path, tmp_path: Path) -> None:
    """Mean TTFT and TPOT of 300 requests on a real vLLM server that was overloaded for half a minute."""
    log = shared / f"data/vllm-runs/{gpu}_Llama-3.1-8B/requests.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    ttft = np.mean([row["first_token_ts"] - row["queued_ts"] for row in rows])
    tpot = np.mean([(r["last_token_ts"] - r["first_token_ts"]) / (r["output_toks"] - 1) for r in rows])
    (tmp_path / "run.toml").write_text(
        f"""
        workload = {{ classes = [{{ name = "all" }}] }}
        pools = [{{ name = "p", replicas = 1, catalog = "{entry}-llama31-8b" }}]
        """
    )
    scenario = load_scenario(tmp_path / "run.toml", log)
    run = simulate(scenario, Plan("only", index_router(scenario)), core="python")
    assert run.ttft.mean() == pytest.approx(ttft, rel=within)
    assert np.nanmean(run.tpot) == pytest.approx(tpot, rel=within)


@pytest.mark.parametrize("name", ["azure-conv", "azure-code", "azure-conv-batching"])
def test_azure_scenarios_quote_their_trace(name: str, shared: Path) -> None:
    """Rates within 3 %, mean lengths within 2 and 12 %, burstiness of the same kind as the file they stand for."""
    file = shared / f"data/azure-llm-2023/AzureLLMInferenceTrace_{name.split('-')[1]}.csv"
    quoted, real = load_scenario(name), load_scenario(name, file)
    assert quoted.workload.rates == pytest.approx(real.workload.rates, rel=0.03)
    for a, b in zip(quoted.workload.classes, real.workload.classes, strict=True):
        assert a.prompt.mean == pytest.approx(b.prompt.mean, rel=0.02)
        assert a.output.mean == pytest.approx(b.output.mean, rel=0.12)
        assert a.largest >= b.largest
    drawn = quoted.workload.sample(quoted.evaluation.horizon, 1)
    like = Trace(drawn.arrival - drawn.arrival[0], drawn.prompt, drawn.output, np.arange(len(drawn)), "", "")
    ours, theirs = trace_summary(like), trace_summary(read_trace(file))
    for window in ("1 s", "10 s", "60 s"):
        assert ours.dispersion[window] == pytest.approx(theirs.dispersion[window], rel=0.6)


def test_a_whole_azure_trace_is_replayed_with_one_option(shared: Path) -> None:
    scenario = load_scenario("azure-conv", shared / "data/azure-llm-2023/AzureLLMInferenceTrace_conv.csv")
    assert len(scenario.workload.sample(scenario.evaluation.horizon, 1)) == 19_366
    assert scenario.workload.total_rate == pytest.approx(5.530, abs=1e-3)
