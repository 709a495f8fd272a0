"""From profile files to a step time that a scenario uses: sampled steps, errors by region, physics, the command."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from llmopt.arrays import Floats
from llmopt.calibrate.entry import entry_text
from llmopt.calibrate.fit import FitOptions
from llmopt.calibrate.from_profile import calibrate_profile
from llmopt.calibrate.picture import calibration_pictures
from llmopt.calibrate.regions import error_table
from llmopt.calibrate.result import Calibration, Caps, Machine, physics, rounded
from llmopt.calibrate.sample import beyond, sample_steps
from llmopt.cli import main
from llmopt.errors import ScenarioError
from llmopt.hardware import Piece, StepTime
from llmopt.profiles import load_step_table
from llmopt.reading import load_scenario
from llmopt.scenario import Pool
from llmopt.steptable import StepTable
from llmopt.validation.load import load_steps
from tests.profile_files import step_us, tables

QUICK = FitOptions(kicks=0)
NAMES = {"accelerator": "B200", "model": "Llama-3.1-8B"}

LAWS = 'prompt = { law = "constant", value = 800 }, output = { law = "constant", value = 100 }'
SCENARIO = f'workload = {{ rate = 1.0, classes = [{{ name = "all", share = 1.0, {LAWS} }}] }}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profile files with known formulas."""
    return tables().write(tmp_path_factory.mktemp("profiles"), "B200_Llama-3.1-8B_tp1_")


@pytest.fixture(scope="module")
def table(folder: Path) -> StepTable:
    return load_step_table(folder, **NAMES)


@pytest.fixture(scope="module")
def found(folder: Path) -> Calibration:
    return calibrate_profile([folder], max_batch=64, kv_capacity=41_408, count=128, options=QUICK)


@pytest.mark.parametrize("caps", [Caps(), Caps(256, 512, 30_000), Caps(4, 2048, 6000), Caps(128, 8192, 900_000)])
@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_steps_are_within_the_engine_and_the_measurements(table: StepTable, caps: Caps, seed: int) -> None:
    features, weights = sample_steps(table, caps, count=512, seed=seed)
    prefill, decode, kv, pairs = features.T
    assert table.covers(features).all()
    assert (decode <= caps.max_batch).all()
    assert (prefill + decode <= caps.token_budget).all()
    assert (kv + prefill <= caps.kv_capacity).all()
    assert (pairs >= prefill / 6 * prefill - 1e-6).all()
    assert (kv >= decode).all()
    assert ((prefill > 0) | (decode >= 1)).all()
    assert weights[prefill == 0].sum() == pytest.approx(0.5)
    assert weights.sum() == pytest.approx(1.0)
    assert len(features) > 400


def test_sampled_steps_reach_from_small_to_full(table: StepTable) -> None:
    """A tenth of the batches is above 80 % of the limit, a tenth below 3 %; prefill fills from 5 to 100 %."""
    features, _ = sample_steps(table, Caps(256, 2048, 500_000), count=1024)
    pure, mixed = features[features[:, 0] == 0], features[features[:, 0] > 0]
    for part, most in ((pure, 256), (mixed, 64)):
        assert (part[:, 1] > 0.8 * most).mean() > 0.1
        assert (part[:, 1] <= max(1, 0.03 * most)).mean() > 0.1
    assert mixed[:, 0].min() < 0.1 * 2048
    assert mixed[:, 0].max() > 0.95 * 2048
    cached = mixed[:, 3] / mixed[:, 0] - mixed[:, 0] / 2
    assert (cached < 0).any()
    assert (cached > 2000).any()


def test_sampling_is_repeatable_and_seeds_differ(table: StepTable) -> None:
    first, again, other = (sample_steps(table, Caps(), count=64, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert first.shape != other.shape or (first != other).any()


def test_limits_beyond_the_measurements_are_named(table: StepTable) -> None:
    assert list(beyond(table, Caps(64, 2048, 4000))) == []
    said = list(beyond(table, Caps(512, 4096, 100_000)))
    assert "token_budget = 4096 is beyond the 2048 tokens of a step that were measured" in said[0]
    assert any("64 decode sequences beside prefill" in sentence for sentence in said)
    assert "contexts were measured to 4096 tokens" in said[-1]


def test_the_smallest_engine_has_steps_and_one_without_is_refused(table: StepTable) -> None:
    with pytest.raises(ScenarioError, match="max_batch = 0 leaves no step to fit"):
        Caps(max_batch=0)
    features, _ = sample_steps(table, Caps(token_budget=1, kv_capacity=16), count=16)
    assert set(features[:, 0] + features[:, 1]) == {1.0}


def test_the_errors_are_those_of_the_printed_pieces(found: Calibration) -> None:
    """Against the closed form of the files, at steps that were not fitted."""
    step_time = StepTime.from_pieces(found.pieces)
    assert found.pieces == rounded(found.pieces)
    for chunk, cached, batch, context in ((0, 0, 16, 1024), (0, 0, 60, 400), (1024, 0, 16, 1024), (2000, 1024, 8, 256)):
        features = (chunk, batch, batch * context, chunk * (cached + chunk / 2))
        assert step_time(*features) == pytest.approx(1e-6 * step_us(32, chunk, cached, batch, context), rel=0.1)
    everything = found.errors.iloc[0]
    assert everything["steps"] == len(found.points.measured)
    errors = np.abs(found.points.predicted / found.points.measured - 1.0)
    assert everything["median"] == pytest.approx(float(np.median(errors)))
    assert everything["largest"] == pytest.approx(float(errors.max()))
    assert everything["largest"] < 0.2
    assert [m for _, m, _ in found.path] == [1, 2]


def test_errors_by_region_add_up() -> None:
    features = np.array([[0, 4, 400, 0], [0, 100, 9e5, 0], [100, 0, 0, 5e3], [2000, 10, 1e4, 2e6]], dtype=float)
    measured, predicted = np.array([0.01, 0.02, 0.02, 0.1]), np.array([0.011, 0.02, 0.015, 0.1])
    rows = error_table(features, measured, predicted, 2048)
    totals = rows[rows["batch"] == "all"].set_index("kind")
    assert totals["steps"].to_dict() == {"all": 4, "decode only": 2, "small prefill": 1, "large prefill": 1}
    bands = rows[rows["batch"] != "all"]
    assert list(zip(bands["kind"], bands["batch"], bands["context"], strict=True)) == [
        ("decode only", "1 to 8", "to 1,024"),
        ("decode only", "over 64", "over 8,192"),
        ("small prefill", "none", "none"),
        ("large prefill", "9 to 64", "to 1,024"),
    ]
    assert totals.loc["all", "largest"] == pytest.approx(0.25)
    assert totals.loc["all", "prefill"] == 100
    assert totals.loc["decode only", "bias"] == pytest.approx(0.05)


def test_what_peaks_do_not_allow_is_refused_with_the_figure(found: Calibration) -> None:
    """A prefill ten times too fast for an RTX 4090."""
    fast = StepTime.from_pieces((Piece(base=0.017, prefill=1e-5),))
    machine, step = Machine.named("RTX 4090", "Llama-3.1-8B"), np.array([[2048.0, 0.0, 0.0, 2048**2 / 2]])
    with pytest.raises(ScenarioError, match=r"times faster than the .* that the 165.2 TFLOP/s of RTX 4090 allow"):
        list(physics(machine, {"the fit": (fast, step)}, allow=False))
    assert "WARNING, impossible: the fit" in next(physics(machine, {"the fit": (fast, step)}, allow=True))
    unknown = Machine.named("abacus", "Llama-3.1-8B")
    assert "'abacus' is in no catalog" in next(physics(unknown, {"the fit": (fast, step)}, allow=False))
    assert len(found.physics) == 2


def test_pictures_are_the_same_bytes_every_time(found: Calibration) -> None:
    first, second = calibration_pictures(found), calibration_pictures(found)
    assert first == second
    assert first["fit.svg"].startswith(b"<?xml")
    assert b"decode only" in first["fit.svg"]
    assert first["fit.png"].startswith(b"\x89PNG")


def test_an_entry_has_a_source_for_every_constant(found: Calibration) -> None:
    text = entry_text(found, date="2026-11-24", command="llmopt calibrate x")
    data = tomllib.loads(text)
    assert set(data["sources"]) == set(data) - {"description", "sources"}
    assert [Piece.model_validate(piece) for piece in data["step_time"]] == list(found.pieces)
    assert "2026-11-24 by llmopt calibrate x" in data["sources"]["step_time"]
    assert found.summary in data["sources"]["step_time"]
    assert (data["kv_capacity"], data["max_batch"], data["token_budget"]) == (41_408, 64, 2048)


def test_a_load_is_followed_where_it_goes(folder: Path, table: StepTable, found: Calibration) -> None:
    """A corner in which decode beside prefill costs twice as much, which pieces for everything cannot follow."""
    batch = np.linspace(32.0, 64.0, 40)
    corner = np.column_stack([np.full(40, 256.0), batch, 600.0 * batch, np.full(40, 256.0**2 / 2)])
    asked: list[StepTable | None] = []

    def load(replica: Pool) -> tuple[Floats, Floats]:
        asked.append(replica.table)
        return corner, table.many(corner)

    loaded = calibrate_profile([folder], max_batch=64, kv_capacity=41_408, count=128, load=load, options=QUICK)
    assert [known.source for known in asked if known is not None] == [table.source]

    def error(pieces: tuple[Piece, ...]) -> float:
        return float(np.abs(StepTime.from_pieces(pieces).many(corner) / table.many(corner) - 1.0).mean())

    assert error(loaded.pieces) < 0.5 * error(found.pieces)
    assert loaded.errors["kind"].iloc[-1] == "the load"
    assert loaded.errors["steps"].iloc[0] == found.errors["steps"].iloc[0]
    assert "40 that the load makes" in loaded.method


def test_the_load_of_a_scenario_fills_a_replica(table: StepTable, tmp_path: Path) -> None:
    """800 waiting requests of 800 and 100 tokens: batches up to the limit, prompts in the budget, all of the time."""
    pool = "step_time = [{ base = 0.01 }], kv_capacity = 41408"
    (tmp_path / "s.toml").write_text(SCENARIO + f'pools = [{{ name = "p", replicas = 1, {pool} }}]')
    one = Pool(
        name="r",
        replicas=1,
        step_time=(Piece(base=0.01),),
        table=table,
        max_batch=16,
        kv_capacity=41_408,
        block_size=16,
    )
    features, seconds = load_steps(load_scenario(tmp_path / "s.toml"), one)
    assert features[:, 1].max() == 16
    assert (features[:, 0] + features[:, 1]).max() <= 2048
    assert features[:, 0].max() >= 800
    assert (features[:, 2] <= 41_408).all()
    assert 800 / 16 * 100 * 0.02 < seconds.sum() < 800 * 100 * 0.03


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


def test_the_command_writes_an_entry_that_a_scenario_uses(folder: Path, tmp_path: Path) -> None:
    options: list[Any] = ["--kv-capacity", 41_408, "--max-batch", 64, "--mixed-pieces", 1, "--host-overhead", 0.0006]
    result = run(folder, *options, "-o", tmp_path / "own.toml", "--json", tmp_path / "a.json", "--report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "ms per step" in result.stdout
    assert "decode only" in result.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"own.toml", "a.json", "fit.svg", "fit.png", "errors.csv"}
    (tmp_path / "s.toml").write_text(
        SCENARIO + 'pools = [{ name = "p", replicas = 1, catalog = "own.toml", max_batch = 32 }]'
    )
    pool = load_scenario(tmp_path / "s.toml").pools[0]
    data = json.loads((tmp_path / "a.json").read_text())
    assert [piece.model_dump() for piece in pool.step_time] == data["pieces"]
    assert (pool.kv_capacity, pool.max_batch, pool.host_overhead) == (41_408, 32, 0.0006)
    assert pool.source == "B200, Llama-3.1-8B in bf16: fitted to measured kernel times"
    again = run(folder, *options, "--scenario", tmp_path / "s.toml")
    assert again.exit_code == 0, again.output
    assert "the load" in again.stdout
    assert pd.read_csv(tmp_path / "errors.csv")["steps"].iloc[0] == data["errors"][0]["steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("kv_capacity = [", "is not valid TOML"),
        ("[[pools]]\nname = 'p'", "is no catalog entry, since it has pools"),
        ("description = 3", "description must be a text"),
        ("max_bach = 3", "did you mean 'max_batch'"),
    ],
)
def test_a_bad_entry_file_is_named_in_one_sentence(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.toml").write_text(text)
    own = 'kv_capacity = 999, step_time = [{ base = 0.01 }], catalog = "own.toml"'
    (tmp_path / "s.toml").write_text(SCENARIO + f'pools = [{{ name = "p", replicas = 1, {own} }}]')
    with pytest.raises(ScenarioError, match=message):
        load_scenario(tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "entry.txt"], "name one that ends in .toml"),
        (["--scenario", "nowhere.toml"], "no such file"),
        (["--select", "backend=vllm"], "--select means nothing for a profile"),
        (["--kv-capacity", "0"], "kv_capacity = 0 leaves no step to fit"),
        (["--max-batch", "-3"], "max_batch = -3 leaves no step to fit"),
        (["--decode-pieces", "0", "--mixed-pieces", "0"], "make no step time"),
        (["--host-overhead", "5"], "host_overhead = 5 s is not 0 to 1 s; give seconds"),
        (["--model", "Qwen3-32B"], "holds no profile"),
        (["--precision", "fp8"], "fp8"),
        (["--tp", "4"], "tensor_parallel = 4 was not profiled"),
    ],
)
def test_bad_options_are_one_sentence_and_nothing_is_written(
    options: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in options else ["-o", "own.toml"]
    result = run(folder, *options, *output)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_profile_needs_a_word(tmp_path: Path) -> None:
    """Matrix products a hundred times too fast."""
    broken = tables()
    broken.dense.loc[broken.dense["layer"].str.endswith("proj"), "time_us"] /= 100
    folder = broken.write(tmp_path / "p", "B200_Llama-3.1-8B_tp1_")
    options = ["--kv-capacity", "41408", "--mixed-pieces", "1"]
    refused = run(folder, *options)
    assert refused.exit_code == 2
    assert "the profile is impossible" in refused.stderr
    assert "pass --allow-unphysical" in refused.stderr
    allowed = run(folder, *options, "--allow-unphysical")
    assert allowed.exit_code == 0
    assert "WARNING, impossible" in allowed.stdout


def test_a_benchmark_log_is_told_from_a_profile(tmp_path: Path) -> None:
    """Points of one constant-rate server: TPOT 10 ms + 0.1 ms a sequence, prefill at 50 us a token."""
    rows = ["concurrency,isl,osl,ttft_ms,tpot_ms"]
    for c in (1, 2, 4, 8, 16, 32):
        rows += [f"{c},{isl},200,{10 + 0.05 * isl:g},{10 + 0.1 * c:g}" for isl in (256, 1024)]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(rows) + "\n")
    result = run(log, "--kv-capacity", "100000", "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kind"] == "fitted to a benchmark log"
    assert {row["what"] for row in data["errors"]} == {"TPOT", "TTFT"}
    refused = run(log, "--mixed-pieces", "3")
    assert refused.exit_code == 2
    assert "--mixed-pieces means nothing for a benchmark log" in refused.stderr
    assert run(log, log).exit_code == 2
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert run(other).exit_code == 2
