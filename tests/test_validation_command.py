"""`llmopt validate` on the real runs with their profiles: the promised errors, the output, exit codes, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llmopt.cli import main
from llmopt.validation import Validation, validate
from llmopt.validation.page import write_report
from llmopt.validation.picture import pictures
from tests import recorded

RUNS = ("RTX4090_Llama-3.1-8B", "RTXPRO6000_Llama-3.1-8B")


def judged(shared: Path, name: str, **options: Any) -> Validation:
    folder = shared / "data/vllm-runs"
    return validate(folder / name, folder / "profiles", **options)


def llmopt(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


@pytest.fixture
def run(shared: Path) -> tuple[Path, ...]:
    """Arguments for the run that preempts."""
    folder = shared / "data/vllm-runs"
    return folder / RUNS[0], Path("--profiles"), folder / "profiles"


def test_one_set_of_constants_predicts_both_real_runs(shared: Path):
    """Each of mean, p50, p90, p99 of TTFT, TPOT, E2E within 10 %, and their mean absolute error within 4 %."""
    answers = [judged(shared, name) for name in RUNS]
    assert answers[0].constants == answers[1].constants
    for answer in answers:
        assert len(answer.errors) == 12
        assert answer.largest_error < 0.10 and answer.mean_absolute_error < 0.04
        assert answer.extrapolated == 0


@pytest.mark.parametrize("name", RUNS)
def test_an_overhead_from_the_first_50_requests_predicts_the_others(shared: Path, name: str):
    answer = judged(shared, name, host_overhead="fit")
    assert answer.largest_error < 0.05 and answer.mean_absolute_error < 0.02
    assert len(answer.measured_latencies["e2e"]) == 250


@pytest.mark.parametrize("name", RUNS)
def test_the_max_affine_fit_predicts_the_real_runs(shared: Path, name: str):
    answer = judged(shared, name, step_time="max-affine")
    pool = answer.scenario.pools[0]
    assert pool.table is None and len(pool.step_time) >= 2
    assert answer.largest_error < 0.10


def test_the_documents_print_these_errors(shared: Path):
    text = (Path(__file__).parents[1] / "docs/validation.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| table |" in line]
    printed = {(i // 3, row[2].split()[-1]): row for i, row in enumerate(rows)}
    for i, name in enumerate(RUNS):
        for choice in ("common", "fit"):
            answer, row = judged(shared, name, host_overhead=choice), printed[i, f"({choice})"]
            shown = [float(x) for cell in row[3:6] for x in cell.split()]
            assert shown == pytest.approx(100 * answer.errors, abs=0.3)
            assert [float(x) for x in row[6:]] == pytest.approx(
                [100 * answer.mean_absolute_error, 100 * answer.largest_error], abs=0.3
            )


def test_the_curves_of_the_real_runs_are_met(shared: Path):
    for name in RUNS:
        answer = judged(shared, name)
        assert max(answer.curve_errors.values()) < 0.06
        assert answer.run.curves is not None
        assert answer.curves.waiting.max() == pytest.approx(answer.run.curves.waiting.max(), rel=0.05)


def test_the_memory_and_the_preemptions_of_the_real_run_are_met(shared: Path):
    """41 408 tokens were recorded; the curve of memory in use stays near its end for 160 s."""
    answer = judged(shared, RUNS[0])
    assert answer.settings["kv_blocks"].value * 16 == 41_408 - 16
    assert 150 < answer.preemptions < 260
    assert answer.run.curves is not None
    n = len(answer.run.curves.times)
    assert np.abs(answer.run.curves.memory - answer.curves.memory[:n])[5:160].mean() < 2.0


def test_the_command_prints_measured_predicted_and_error(run: tuple[Path, ...]):
    result = llmopt(*run)
    assert result.exit_code == 0, result.output
    for words in (
        "TTFT (s)",
        "TPOT (ms)",
        "E2E (s)",
        "measured",
        "predicted",
        "error",
        "p95",
        "65.46",
        "curves over time",
    ):
        assert words in result.stdout
    assert "host_overhead = 0.0006" in result.stdout


def test_the_json_has_the_same_numbers_on_standard_output_and_in_a_file(run: tuple[Path, ...], tmp_path: Path):
    shown = json.loads(llmopt(*run, "--json", "-").stdout)
    assert llmopt(*run, "--json", tmp_path / "v.json").exit_code == 0
    filed = json.loads((tmp_path / "v.json").read_text())
    del shown["seconds"], filed["seconds"]
    assert shown == filed
    assert {len(row) for row in shown["relative_error"].values()} == {5}
    assert shown["measured"]["ttft"]["mean"] == pytest.approx(65.4566, rel=1e-5)


def test_check_exits_with_one_if_an_error_is_larger(run: tuple[Path, ...]):
    assert llmopt(*run, "--check", "10").exit_code == 0
    assert llmopt(*run, "--check", "5").exit_code == 1
    assert llmopt(*run, "--check", "5", "--host-overhead", "fit").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host-overhead", "0.6ms"), "neither common, fit nor"),
        (("--host-overhead", "2"), "in seconds, not milliseconds"),
        (("--host-overhead", "nan"), "neither common, fit nor"),
        (("--first", "0"), "--first 0"),
        (("--host-overhead", "fit", "--first", "300"), "none is left to judge"),
        (("--check", "0"), "--check 0"),
        (("--gpu", "Abacus 3000"), "Abacus 3000"),
        (("--model", "Nonesuch-7B"), "Nonesuch-7B"),
    ],
)
def test_bad_options_are_one_sentence(run: tuple[Path, ...], options: tuple[str, ...], words: str):
    result = llmopt(*run, *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_missing_folders_are_one_sentence(shared: Path, tmp_path: Path):
    for arguments in (
        (tmp_path / "no", "--profiles", shared),
        (shared / "data/vllm-runs" / RUNS[0], "--profiles", "no"),
    ):
        result = llmopt(*arguments)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.output


def made_up(tmp_path: Path) -> Validation:
    sim = recorded.played(recorded.engine(0.001), recorded.requests(40))
    folder = recorded.write_run(tmp_path / "RTX4090_x", recorded.lines(sim), recorded.settings())
    return validate(folder, recorded.small_table())


def test_the_report_is_one_page_with_its_pictures_inline(tmp_path: Path):
    written = write_report(made_up(tmp_path), tmp_path / "out")
    assert {p.suffix for p in written} == {".json", ".svg", ".png", ".html"} and all(p.stat().st_size for p in written)
    page = written[-1].read_text()
    assert page.count("<svg") == 3 and "TTFT (s)" in page and "max_num_seqs" in page and "$" not in page


def test_equal_validations_give_equal_pictures(tmp_path: Path):
    first, second = made_up(tmp_path / "a"), made_up(tmp_path / "b")
    assert pictures(first) == pictures(second) and set(pictures(first)) == {"state", "distributions", "requests"}
