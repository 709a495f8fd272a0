"""What a calibration is told and tells: precisions, degrees that no engine has, prompts that continue, what to name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmopt.calibrate.from_benchmarks import calibrate_benchmarks
from llmopt.calibrate.from_profile import calibrate_profile
from llmopt.calibrate.result import Caps
from llmopt.calibrate.sample import sample_steps
from llmopt.catalog import catalog_entry
from llmopt.cli import main
from llmopt.errors import ScenarioError
from llmopt.hardware import Piece, StepTime
from llmopt.machines import accelerator, kv_capacity, model_shape, roofline
from llmopt.profiles import load_step_table, read_profile
from tests.test_profiles_layouts import aiconfigurator, vidur

POINTS = (
    *((1, 512, 60, 7.0), (2, 512, 90, 7.6), (4, 512, 130, 8.8), (8, 512, 200, 11.0), (16, 512, 380, 16.0)),
    *((8, 1024, 390, 15.0), (16, 1024, 700, 25.0)),
)
"""Concurrency, prompt, TTFT and TPOT (ms) that four-bit weights on an RTX 4090 can have and half precision cannot."""


def log(folder: Path, precision: str, model: str = "Llama-3.1-8B", gpu: str = "RTX 4090") -> Path:
    path = folder / "log.csv"
    rows = [f"{model},{gpu},{precision},{c},{s},128,{ttft},{tpot}" for c, s, ttft, tpot in POINTS]
    path.write_text("\n".join(["model,gpu,precision,concurrency,isl,osl,ttft_ms,tpot_ms", *rows]) + "\n")
    return path


@pytest.mark.parametrize("stated", ["awq", "int4", "W4A16", "fp8"])
def test_a_log_of_quantised_weights_is_held_against_their_bytes(tmp_path: Path, stated: str) -> None:
    found = calibrate_benchmarks(log(tmp_path, stated), allow_unphysical=stated == "fp8")
    assert found.machine.precision == ("fp8" if stated == "fp8" else "int4")
    assert found.caps.kv_capacity > (90_000 if stated == "fp8" else 110_000)
    assert all("WARNING" not in sentence for sentence in found.physics) or stated == "fp8"


@pytest.mark.parametrize("stated", ["bf16", ""])
def test_half_precision_is_refused_where_its_bytes_take_longer(tmp_path: Path, stated: str) -> None:
    with pytest.raises(ScenarioError, match=r"times faster than the 14\.9 ms"):
        calibrate_benchmarks(log(tmp_path, stated))


def test_four_bits_of_a_model_published_so_are_its_own_format(tmp_path: Path) -> None:
    found = calibrate_benchmarks(log(tmp_path, "fp4", "gpt-oss-20b", "H100"))
    assert (found.machine.shape.precision if found.machine.shape else "", found.machine.precision) == ("mxfp4", "")


def test_what_is_left_of_a_base_is_not_round_off(tmp_path: Path) -> None:
    pieces = calibrate_benchmarks(log(tmp_path, "int4")).pieces
    assert all(piece.base == 0 or piece.base > 1e-9 for piece in pieces)


@pytest.mark.parametrize(
    ("model", "degree", "known"),
    [("Llama-3.1-8B", 3, "1, 2, 4, 8, 16"), ("Qwen2.5-7B", 7, "1, 2, 4"), ("gpt-oss-20b", 6, "1, 2")],
)
def test_heads_that_a_degree_does_not_divide_are_refused(model: str, degree: int, known: str) -> None:
    shape, chip = model_shape(model), accelerator("H100")
    for use in (kv_capacity, roofline):
        with pytest.raises(
            ScenarioError, match=f"tensor_parallel = {degree} does not divide evenly; take one of {known}"
        ):
            use(shape, chip, tensor_parallel=degree)


def test_latent_attention_is_divided_by_its_heads_alone() -> None:
    assert model_shape("DeepSeek-V3").kv_shards(16) == 1
    with pytest.raises(ScenarioError, match="128 heads"):
        model_shape("DeepSeek-V3").kv_shards(12)


def test_continued_prompts_are_sampled_where_none_was_measured(tmp_path: Path) -> None:
    table = load_step_table(aiconfigurator(tmp_path), "A100", "Llama-3.1-8B")
    assert table.ends[5] == 0
    steps = sample_steps(table, Caps(64, 2048, 200_000), count=256)[0]
    alone = steps[:, 0] ** 2 / 2
    assert (steps[:, 3] > 2 * alone)[steps[:, 0] > 0].mean() > 0.3


@pytest.mark.parametrize(("name", "seconds"), [("a100-llama3-8b", 1.58), ("a100-sxm-llama31-8b", 1.34)])
def test_a_long_prompt_takes_as_long_as_the_table_says(name: str, seconds: float) -> None:
    """16,384 tokens in eight chunks; the seconds are those of the tables that the entries are fitted to."""
    step = StepTime.from_pieces(tuple(Piece.model_validate(piece) for piece in catalog_entry(name).pool["step_time"]))
    cached = 2048.0 * np.arange(8)
    assert sum(step(prefill=2048, pairs=2048 * (c + 1024)) for c in cached) == pytest.approx(seconds, rel=0.05)


def test_vidurs_profiles_are_of_half_precision_floats(tmp_path: Path) -> None:
    assert read_profile(vidur(tmp_path), tensor_parallel=2).precision == "fp16"


def test_kernel_tables_ask_for_what_they_need(tmp_path: Path) -> None:
    aiconfigurator(tmp_path)
    with pytest.raises(ScenarioError, match=r"any model \(kernel tables\) on a100_sxm; name the model"):
        calibrate_profile([tmp_path])
    with pytest.raises(ScenarioError, match="any tensor-parallel degree; name one, 1 for a single GPU"):
        calibrate_profile([tmp_path], model="Llama-3.1-8B")


def test_a_report_that_is_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    words = ["calibrate", str(tmp_path), "-o", str(tmp_path / "x.toml"), "--report", str(tmp_path / "afile")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "name a folder" in result.stderr
    assert not (tmp_path / "x.toml").exists()
