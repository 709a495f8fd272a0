"""Step times fitted to Splitwise's and DistServe's files: against the files, published references and the peaks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmopt.calibrate.bench import fit_benchmarks
from llmopt.calibrate.bench_entries import distserve_entry, splitwise_entry, splitwise_fit
from llmopt.calibrate.bench_fit import BenchOptions, physical_floor
from llmopt.calibrate.bench_table import read_benchmarks
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines import accelerator, floor, model_shape

SHARED = Path(__file__).parents[2] / "shared/data"
NEEDS_DATA = pytest.mark.skipif(
    not SHARED.exists(), reason="the measured points lie outside the repository, in ../shared"
)
SPLITWISE = SHARED / "splitwise-sim/perf_model.csv"


@NEEDS_DATA
@pytest.mark.parametrize("hardware", ["a100-80gb", "h100-80gb"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_splitwise_steps_are_met(hardware: str, degree: int) -> None:
    entry = splitwise_entry(SPLITWISE, "llama2-70b", hardware, degree)
    errors = {e.what: e for e in entry.errors if e.region == "all"}
    assert errors["TPOT"].median < 0.035
    assert errors["TPOT"].q90 < 0.08
    assert errors["TTFT"].median < 0.04
    assert f"decode: median {errors['TPOT'].median:.1%}" in entry.sources["step_time"]
    assert set(entry.sources) == {"accelerator", "model", "step_time"}


@NEEDS_DATA
@pytest.mark.parametrize(
    ("hardware", "prompts", "decode"), [("a100-80gb", (377, 1485), 54.8), ("h100-80gb", (158, 643), 37.4)]
)
def test_the_published_references_are_met(hardware: str, prompts: tuple[float, float], decode: float) -> None:
    """Llama-2-70B on two GPUs: prompts of 1024 and 4096 tokens, the latter in two chunks, and a decode step."""
    step = StepTime.from_pieces(splitwise_entry(SPLITWISE, "llama2-70b", hardware, 2).pieces)
    whole = step(prefill=1024, pairs=1024**2 / 2)
    chunks = step(prefill=2048, pairs=2048**2 / 2) + step(prefill=2048, pairs=2048 * 3072)
    assert (1e3 * whole, 1e3 * chunks) == pytest.approx(prompts, rel=0.06)
    assert 1e3 * step(decode=1, kv=1087) == pytest.approx(decode, rel=0.07)


@NEEDS_DATA
def test_no_fitted_step_is_faster_than_the_peaks() -> None:
    """With the peaks as lower bounds even a server whose prefill cannot be seen stays possible."""
    table = read_benchmarks(SHARED / "aiconfigurator/silicon_sample.csv").choose(
        {"model": "Qwen3-32B", "backend": "sglang", "version": "0.5.8.post1"}
    )
    least = floor(model_shape("Qwen3-32B"), accelerator("h100_sxm"))
    rng = np.random.default_rng(0)
    chunk, decode = rng.integers(0, 4096, 500), rng.integers(1, 128, 500)
    steps = np.column_stack([chunk, decode, decode * rng.integers(100, 4000, 500), chunk * chunk / 2]).astype(float)
    free, bounded = (
        fit_benchmarks(table, BenchOptions(floor=bound)).step_time.many(steps)
        for bound in (None, physical_floor(least))
    )
    assert (free < least.many(steps)).any()
    assert (bounded >= least.many(steps) * (1 - 1e-9)).all()
    fit = splitwise_fit(SPLITWISE, "llama2-70b", "a100-80gb", 2, 2048.0)
    assert (
        fit.step_time.many(steps)
        >= floor(model_shape("llama2-70b"), accelerator("a100"), tensor_parallel=2).many(steps)
    ).all()


@NEEDS_DATA
def test_an_unknown_server_is_named() -> None:
    with pytest.raises(ScenarioError, match="has no points with model = llama2-70b, system = a100-80gb, tp = 16"):
        splitwise_entry(SPLITWISE, tensor_parallel=16)


def distserve_file(tmp_path: Path, prefill: list[float], small: list[float], large: list[float]) -> Path:
    entry = {
        "decoding_large_small_bs_threshold": 95,
        "prefill": prefill,
        "decoding_smallbs": small,
        "decoding_largebs": large,
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": entry}}))
    return path


def test_distserve_formulas_become_one_step_time(tmp_path: Path) -> None:
    """Where the pieces cross at the threshold and prefill has the smaller base, nothing is lost."""
    path = distserve_file(tmp_path, [15.0, 0.1, 1e-5], [20.0, 6e-4, 0.04], [10.5, 6e-4, 0.14])
    entry = distserve_entry(path, "opt-13b")
    step = StepTime.from_pieces(entry.pieces)
    assert step(prefill=1000, pairs=1000**2 / 2) == pytest.approx(15e-3 + 0.1 + 10e-3)
    for batch, base, each in ((8, 20.0, 0.04), (128, 10.5, 0.14)):
        assert step(decode=batch, kv=batch * 500) == pytest.approx(1e-3 * (base + 6e-4 * batch * 500 + each * batch))
    assert all(e.largest < 1e-6 for e in entry.errors)


def test_a_long_base_of_prefill_is_not_charged_to_decode(tmp_path: Path) -> None:
    path = distserve_file(tmp_path, [30.0, 0.1, -1e-6], [20.0, 6e-4, 0.04], [10.5, 6e-4, 0.14])
    entry = distserve_entry(path, "opt-13b")
    step = StepTime.from_pieces(entry.pieces)
    assert step(decode=8, kv=4000) == pytest.approx(1e-3 * (20.0 + 6e-4 * 4000 + 0.04 * 8))
    assert "prefill: base 30.0 ms lowered to 20.0 ms" in entry.sources["step_time"]
    assert "is taken as 0" in entry.sources["step_time"]


@NEEDS_DATA
@pytest.mark.parametrize("name", ["profiler-a100-80g.distserve.json", "profiler-a100-80g.vllm.json"])
def test_distserve_coefficients_are_kept(name: str) -> None:
    entry = distserve_entry(SHARED / "distserve" / name, "facebook/opt-66b", 4, kv_capacity=78_496)
    decode, prefill = entry.errors
    assert decode.median < 0.02
    assert prefill.largest < 0.1
