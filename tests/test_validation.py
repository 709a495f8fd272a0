"""Validation of runs that the simulator itself has made, where every error must vanish; and of the real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.errors import ScenarioError
from llmopt.evaluate.run import SimRun
from llmopt.runs import read_run
from llmopt.steptable import StepTable
from llmopt.validation import Validation, validate
from llmopt.validation.accuracy import STATISTICS, agreement, relative_errors, summary
from llmopt.validation.fitting import met_steps
from llmopt.validation.overhead import slope
from llmopt.validation.replay import play, recorded_scenario, states_at
from tests import recorded
from tests.profile_files import tables

HOST = 0.0015


@pytest.fixture(scope="module")
def run() -> SimRun:
    """A run of the small engine that preempts."""
    sim = recorded.played(recorded.engine(HOST), recorded.requests())
    assert sim.preemptions.sum() > 10
    return sim


@pytest.fixture
def folder(tmp_path: Path, run: SimRun) -> Path:
    """The run as a recorder would have left it."""
    return recorded.write_run(tmp_path / "RTX4090_Llama-3.1-8B", recorded.lines(run), recorded.settings())


def judged(folder: Path, **options: Any) -> Validation:
    return validate(folder, recorded.small_table(), **options)


def test_a_run_of_the_simulator_is_reproduced_to_rounding(folder: Path, run: SimRun):
    answer = judged(folder, host_overhead=HOST)
    assert np.abs(answer.errors).max() < 1e-9 and len(answer.errors) == 12
    assert answer.sim.finish == pytest.approx(run.finish, abs=1e-8)
    assert (answer.preemptions, answer.steps) == (run.preemptions.sum(), run.replicas.steps.sum())
    for one in answer.agreements.values():
        assert one.rank_correlation == pytest.approx(1.0) and one.median_error < 1e-9


@pytest.mark.parametrize("host", [0.0, 0.0004, 0.003])
def test_the_fit_finds_the_overhead_of_the_run(tmp_path: Path, host: float):
    sim = recorded.played(recorded.engine(host), recorded.requests(seed=5))
    folder = recorded.write_run(tmp_path / "RTX4090_x", recorded.lines(sim), recorded.settings())
    answer = judged(folder, host_overhead="fit", first=40)
    assert answer.host_overhead == pytest.approx(host, abs=2e-5)
    assert answer.skipped == 40 and answer.largest_error < 0.02


def test_the_fit_looks_only_at_the_first_requests_and_judges_only_the_others(folder: Path, run: SimRun):
    rows = recorded.lines(run)
    for row in rows[60:]:
        row["last_token_ts"] += 50.0
    spoilt = recorded.write_run(folder.parent / "RTX4090_later", rows, recorded.settings())
    before, after = (judged(f, host_overhead="fit", first=60) for f in (folder, spoilt))
    assert before.host_overhead == after.host_overhead
    assert len(after.measured_latencies["ttft"]) == len(run.requests) - 60
    assert after.relative_error["e2e"]["mean"] < -0.5 and after.relative_error["ttft"]["mean"] == pytest.approx(
        before.relative_error["ttft"]["mean"]
    )


def test_the_fit_does_not_mistake_a_warm_up_for_an_overhead(tmp_path: Path):
    """Every early request loses the same 0.8 s once, which an overhead a step could not explain."""
    sim = recorded.played(recorded.engine(0.001, kv_capacity=160_000), recorded.requests())
    rows = recorded.lines(sim)
    for row in rows:
        row["last_token_ts"] += 0.8
    folder = recorded.write_run(tmp_path / "RTX4090_slow", rows, recorded.settings(kv_cache__num_gpu_blocks=10_001))
    answer = judged(folder, host_overhead="fit")
    assert answer.estimate is not None
    assert answer.host_overhead == pytest.approx(0.001, abs=1e-5)
    assert answer.estimate.intercept == pytest.approx(0.8, abs=1e-3)


def test_the_slope_is_that_of_theil_and_sen():
    from scipy.stats import theilslopes

    rng = np.random.default_rng(1)
    steps = rng.integers(50, 900, 41).astype(float)
    delays = 0.3 + 0.0007 * steps + rng.normal(0, 0.05, 41)
    delays[:10] += 20.0
    assert slope(delays, steps) == (pytest.approx(theilslopes(delays, steps).slope), True)
    assert slope(np.full(9, 0.5), np.full(9, 250.0)) == (pytest.approx(0.002), False)


def test_a_faster_table_gives_negative_errors_and_a_slower_one_positive(folder: Path):
    assert judged(folder, host_overhead=0.0).relative_error["e2e"]["mean"] < -0.02
    assert judged(folder, host_overhead=0.01).relative_error["e2e"]["mean"] > 0.02


def test_data_parallel_engines_are_replicas_behind_vllms_balancer(tmp_path: Path):
    sim = recorded.played(recorded.engine(HOST, replicas=3), recorded.requests(200, rate=36.0))
    assert len(set(sim.replica.tolist())) == 3
    meta = recorded.settings(data_parallel_size=3, kv_cache__num_gpu_blocks=3 * (recorded.BLOCKS + 1))
    answer = judged(recorded.write_run(tmp_path / "RTX4090_dp", recorded.lines(sim), meta), host_overhead=HOST)
    assert answer.largest_error < 1e-9 and (answer.sim.replica == sim.replica).all()
    assert any("data-parallel" in note for note in answer.notes)
    assert {c.name for c in answer.constants} >= {"balancer_waiting_weight", "balancer_running_weight"}


def test_looking_at_the_engine_changes_nothing_and_counts_preempted_requests_as_waiting(run: SimRun):
    scenario = recorded.engine(HOST)
    times = np.random.default_rng(2).uniform(-1.0, run.end + 1.0, 400)
    states = states_at(scenario, run, times)
    arrived = (run.requests.arrival[:, None] <= times).sum(axis=0)
    finished = (run.finish[:, None] <= times).sum(axis=0)
    assert (states.waiting + states.running == arrived - finished).all()
    never = ((run.requests.arrival[:, None] <= times) & (run.scheduled[:, None] > times)).sum(axis=0)
    again = states.waiting - never
    assert again.min() >= 0 and again.max() > 0
    assert (np.diff(states.steps[np.argsort(times), 0]) >= 0).all()
    assert states.steps.max() == run.replicas.steps[0]


def test_running_requests_without_preemption_are_those_between_their_first_step_and_their_end():
    scenario = recorded.engine(HOST, kv_capacity=160_000, async_scheduling=False)
    sim = recorded.played(scenario, recorded.requests())
    times = np.random.default_rng(4).uniform(0.0, sim.end, 300)
    running = ((sim.scheduled[:, None] <= times) & (sim.finish[:, None] > times)).sum(axis=0)
    assert (states_at(scenario, sim, times).running == running).all()


def test_recorded_curves_of_the_simulators_own_state_agree(folder: Path, run: SimRun):
    times = np.arange(1.0, run.end, 0.5)
    states = states_at(recorded.engine(HOST), run, times)
    table = [f"{t},{r},{w}" for t, r, w in zip(times, states.running, states.waiting, strict=True)]
    (folder / "timeseries.csv").write_text("\n".join(["t,running,waiting", *table]))
    exact, off = judged(folder, host_overhead=HOST), judged(folder, host_overhead=0.02)
    assert exact.curve_errors == {"running": pytest.approx(0, abs=0.01), "waiting": pytest.approx(0, abs=0.01)}
    assert off.curve_errors["waiting"] > 0.1


def affine_table() -> StepTable:
    """A table of 5 ms, 30 us a token and 20 ns a KV token read by decode, which one affine piece describes exactly."""
    table = recorded.small_table()
    n, k = np.meshgrid(table.mixed_batch, table.mixed_context, indexing="ij")
    return replace(
        table,
        token_time=0.005 + 3e-5 * table.tokens,
        sequence_time=np.zeros(2),
        decode_time=2e-8 * np.outer(table.decode_batch, table.decode_context),
        mixed_time=np.broadcast_to(2e-8 * n * k, table.mixed_time.shape),
    )


def test_max_affine_pieces_of_an_affine_table_play_like_the_table(tmp_path: Path):
    table = affine_table()
    sim = recorded.played(recorded.engine(HOST, table=table), recorded.requests())
    folder = recorded.write_run(tmp_path / "RTX4090_a", recorded.lines(sim), recorded.settings())
    answer = validate(folder, table, step_time="max-affine", host_overhead=HOST)
    assert answer.scenario.pools[0].table is None and answer.largest_error < 1e-4


def test_steps_of_a_load_hold_every_prompt_once_and_only_batches_that_were_met():
    scenario = recorded.engine(HOST, kv_capacity=160_000)
    sim = recorded.played(scenario, recorded.requests(rate=3.0))
    steps, prompt = met_steps(scenario, sim), sim.requests.prompt
    mixed = steps[:, 0] > 0
    assert steps[mixed, 0].sum() == sim.replicas.prefill_tokens[0] == prompt.sum()
    assert steps[:, 3].sum() == (prompt**2 / 2).sum()
    context = steps[~mixed, 2] / steps[~mixed, 1]
    assert context.min() >= prompt.min() and context.max() <= (prompt + sim.requests.output).max()
    assert steps[:, 1].max() <= 64 and (steps[~mixed, 1] >= 1).all()


def test_statistics_and_errors_by_hand():
    measured = summary({"ttft": np.array([1.0, 2.0, 3.0, 10.0]), "tpot": np.array([np.nan, np.nan])})
    assert measured["ttft"]["mean"] == 4.0 and measured["ttft"]["p50"] == 2.5
    assert measured["ttft"]["p90"] == pytest.approx(3 + 0.7 * 7) and np.isnan(measured["tpot"]["p99"])
    predicted = summary({"ttft": np.array([2.0, 2.0, 2.0, 2.0]), "tpot": np.array([1.0, 1.0])})
    errors = relative_errors(measured, predicted)
    assert errors["ttft"]["mean"] == -0.5 and np.isnan(errors["tpot"]["mean"])
    assert tuple(errors["ttft"]) == STATISTICS


def test_agreement_is_that_of_scipy():
    from scipy.stats import ks_2samp, spearmanr

    rng = np.random.default_rng(0)
    x = rng.integers(1, 30, 80).astype(float)
    y = x + rng.integers(-3, 4, 80)
    one = agreement(x, y)
    assert one.rank_correlation == pytest.approx(spearmanr(x, y).statistic)
    assert one.distance == pytest.approx(ks_2samp(x, y).statistic)
    assert one.median_error == pytest.approx(np.median(np.abs(y / x - 1)))
    assert np.isnan(agreement(x[:1], y[:1]).rank_correlation)


def test_one_request_of_one_token_can_be_judged(tmp_path: Path):
    given = recorded.requests(1)
    given.output[:] = 1
    sim = recorded.played(recorded.engine(), given)
    answer = judged(
        recorded.write_run(tmp_path / "RTX4090_1", recorded.lines(sim), recorded.settings()), host_overhead=0.0
    )
    assert len(answer.errors) == 8 and answer.largest_error < 1e-9
    assert answer.as_dict()["relative_error"]["tpot"]["mean"] is None


def test_the_json_is_whole_and_only_its_seconds_differ(folder: Path):
    first, second = (judged(folder).as_dict() for _ in range(2))
    json.dumps(first, allow_nan=False)
    assert first.pop("seconds").keys() == second.pop("seconds").keys()
    assert first == second
    assert set(first["relative_error"]) == {"ttft", "tpot", "e2e"}
    assert first["settings"]["max_num_seqs"] == {
        "value": 64,
        "origin": "recorded",
        "note": "engine_kwargs.max_num_seqs",
    }
    assert first["settings"]["kv_blocks"]["value"] == recorded.BLOCKS
    assert {c["name"]: c["reason"] for c in first["constants"]}["host_overhead"]


def test_settings_reach_the_simulated_engine(tmp_path: Path, run: SimRun):
    meta = recorded.settings(
        async_scheduling=False, kv_cache__enable_prefix_caching=False, long_prefill_token_threshold=512
    )
    pool = judged(recorded.write_run(tmp_path / "RTX4090_s", recorded.lines(run), meta)).scenario.pools[0]
    assert (pool.async_scheduling, pool.prefix_caching, pool.prefill_chunk) == (False, False, 512)
    assert (pool.kv_blocks, pool.max_batch, pool.token_budget) == (recorded.BLOCKS, 64, 2048)


def test_memory_that_is_not_recorded_is_computed_from_model_and_gpu(tmp_path: Path, run: SimRun):
    from llmopt.machines import accelerator, kv_capacity, model_shape

    meta = recorded.settings(kv_cache__num_gpu_blocks=None)
    answer = judged(recorded.write_run(tmp_path / "RTX4090_m", recorded.lines(run), meta))
    tokens = kv_capacity(model_shape("Llama-3.1-8B"), accelerator("RTX 4090"), max_batch=64).tokens
    assert answer.settings["kv_blocks"].value == tokens // 16 - 1
    assert answer.settings["kv_blocks"].origin == "computed"
    assert any("num_gpu_blocks is not recorded" in note for note in answer.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2"),
        ({"speculative_config": {"method": "ngram"}}, "speculatively"),
        ({"kv_cache__num_gpu_blocks": 20}, "more than the KV memory"),
        ({"kv_cache__num_gpu_blocks": 1}, "too few for any request"),
        ({"max_num_seqs": 10**8}, "max_batch = 100000000 must be at most"),
        ({"kv_cache__num_gpu_blocks": None, "model": "Nonesuch-7B"}, "--model"),
        ({"kv_cache__num_gpu_blocks": None, "hardware__device_name": "Abacus"}, "--gpu"),
    ],
)
def test_runs_that_cannot_be_played_are_refused(tmp_path: Path, run: SimRun, changes: dict[str, Any], words: str):
    folder = recorded.write_run(tmp_path / "x", recorded.lines(run), recorded.settings(**changes))
    with pytest.raises(ScenarioError, match=words) as caught:
        judged(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_overhead_needs_requests_to_estimate_from_and_others_to_judge(tmp_path: Path, folder: Path, run: SimRun):
    with pytest.raises(ScenarioError, match="none is left to judge"):
        judged(folder, host_overhead="fit", first=len(run.requests))
    with pytest.raises(ScenarioError, match="too few"):
        judged(folder, host_overhead="fit", first=4)
    with pytest.raises(ScenarioError, match="neither common, fit"):
        judged(folder, host_overhead=-1.0)


def test_a_run_names_its_model_and_gpu_or_the_caller_does(tmp_path: Path, run: SimRun):
    meta = recorded.settings(kv_cache__num_gpu_blocks=None, hardware=None, model=None)
    folder = recorded.write_run(tmp_path / "nameless", recorded.lines(run), meta)
    with pytest.raises(ScenarioError, match="--model NAME"):
        judged(folder)
    with pytest.raises(ScenarioError, match="--gpu NAME"):
        judged(folder, model="Llama-3.1-8B")
    settings = judged(folder, model="Llama-3.1-8B", gpu="RTX4090").settings
    assert settings["gpu"].origin == settings["model"].origin == "given"


def test_a_step_time_that_physics_forbids_is_named(folder: Path):
    """41 ms for 2048 tokens is 5 times faster than an RTX 4090 multiplies Llama-3.1-8B."""
    assert any("times faster" in note for note in judged(folder).notes)
    assert not any("times faster" in note for note in judged(folder, gpu="unheard-of").notes)


def test_defaults_are_those_of_the_gpu_that_the_caller_names(tmp_path: Path, run: SimRun):
    meta = recorded.settings(max_num_seqs=None, hardware=None)
    folder = recorded.write_run(tmp_path / "nameless", recorded.lines(run), meta)
    assert judged(folder).settings["max_num_seqs"].value == 256
    assert judged(folder, gpu="H100").settings["max_num_seqs"].value == 1024


def test_what_the_table_did_not_measure_is_said(folder: Path):
    table = replace(recorded.small_table(), notes=("all-reduce: not measured",))
    assert "profile: all-reduce: not measured" in validate(folder, table).notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "meta-llama/Llama-3.1-8B-Instruct-FP8"}, "in bf16, not in fp8"),
        ({"quantization": "fp8"}, "in bf16, not in fp8"),
        ({"quantization": "compressed-tensors"}, "does not say in which format"),
    ],
)
def test_a_profile_in_half_precision_is_not_taken_for_quantised_weights(
    tmp_path: Path, run: SimRun, changes: dict[str, Any], words: str
):
    """vLLM's dtype is bfloat16 there too: it is the format of the activations."""
    tables().write(tmp_path / "profiles", "RTX4090_Llama-3.1-8B_tp1_")
    folder = recorded.write_run(tmp_path / "x", recorded.lines(run), recorded.settings(**changes))
    with pytest.raises(ScenarioError, match=words):
        validate(folder, tmp_path / "profiles")


def test_a_model_that_no_profile_has_names_the_options(tmp_path: Path, run: SimRun):
    tables().write(tmp_path / "profiles", "RTX4090_Llama-3.1-8B_tp1_")
    folder = recorded.write_run(tmp_path / "x", recorded.lines(run), recorded.settings(model="org/Unheard-7B"))
    with pytest.raises(ScenarioError, match=r"Unheard-7B.* not in the catalog.*--gpu and --model name others"):
        validate(folder, tmp_path / "profiles")


def test_a_cache_in_another_format_and_experts_of_several_engines_are_said(tmp_path: Path, run: SimRun):
    meta = recorded.settings(kv_cache_dtype="fp8", data_parallel_size=2, enable_expert_parallel=True)
    meta["kv_cache"]["num_gpu_blocks"] *= 2
    notes = judged(recorded.write_run(tmp_path / "RTX4090_k", recorded.lines(run), meta)).notes
    assert any("KV cache in fp8" in note for note in notes) and any("equally loaded" in n for n in notes)


def test_the_replay_is_a_scenario_like_any_other(folder: Path):
    recording = read_run(folder)
    scenario = recorded_scenario(recording, recorded.engine(HOST).pools[0])
    assert len(scenario.digest) == 12 and len(play(scenario).finish) == len(recording.records)
    assert scenario.workload.classes[0].mean_prompt == pytest.approx(recording.records.prompt.mean())
