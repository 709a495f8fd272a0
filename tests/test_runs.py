"""Readers of recorded runs: the real ones where they are at hand, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.errors import ScenarioError
from llmopt.runs import read_run
from tests import recorded

Row = dict[str, Any]
ROWS: list[Row] = [
    {
        "request_id": f"r{i}",
        "input_toks": 10 + i,
        "output_toks": 5,
        "arrival_time": 100.0 + i,
        "queued_ts": 7.25 + i + 0.125 * (i % 2),
        "scheduled_ts": 7.5 + i,
        "first_token_ts": 7.75 + i,
        "last_token_ts": 9.0 + i,
    }
    for i in range(4)
]


def folder(tmp_path: Path, rows: list[Row] | None = None, **changes: Any) -> Path:
    return recorded.write_run(tmp_path / "RTX4090_Llama-3.1-8B", rows or ROWS, recorded.settings(**changes))


def changed(i: int, **values: Any) -> list[Row]:
    return [row | values if k == i else row for k, row in enumerate(ROWS)]


def without(i: int, name: str) -> list[Row]:
    return [{key: v for key, v in row.items() if k != i or key != name} for k, row in enumerate(ROWS)]


def refused(path: Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        read_run(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_arrivals_move_to_the_engines_clock_so_that_none_is_queued_before_it_arrived(tmp_path: Path):
    records = read_run(folder(tmp_path)).records
    assert records.arrival == pytest.approx([0, 1, 2, 3])
    assert records.queued - records.arrival == pytest.approx([0, 0.125, 0, 0.125])
    assert records.first_token - records.queued == pytest.approx([0.5, 0.375, 0.5, 0.375])
    assert records.finish - records.first_token == pytest.approx([1.25] * 4)
    assert records.start == 100.0


def test_requests_come_in_order_of_arrival(tmp_path: Path):
    records = read_run(folder(tmp_path, ROWS[::-1])).records
    assert records.ids == ("r0", "r1", "r2", "r3")
    assert records.prompt.tolist() == [10, 11, 12, 13] and (np.diff(records.arrival) > 0).all()


def test_ids_may_be_absent_from_all_lines_but_not_from_one(tmp_path: Path):
    rows = [{key: v for key, v in row.items() if key != "request_id"} for row in ROWS]
    assert read_run(folder(tmp_path, rows)).records.ids == ("0", "1", "2", "3")
    assert "line 3 has no request_id" in refused(folder(tmp_path, without(2, "request_id")))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (without(2, "queued_ts"), "line 3 has no queued_ts"),
        (changed(1, output_toks=0), "request 2 has output_toks = 0"),
        (changed(1, input_toks=2.5), "input_toks = 2.5"),
        (changed(0, input_toks=10**9), "from 1 to 10000000"),
        (changed(1, first_token_ts=float("nan")), "line 2 has first_token_ts = nan"),
        (changed(1, first_token_ts="soon"), "first_token_ts = 'soon'"),
        (changed(1, last_token_ts=True), "last_token_ts = True"),
        (changed(3, scheduled_ts=7.0), "request 4 has scheduled_ts = 7.000000 before queued_ts"),
        (changed(3, first_token_ts=7.0), "queued_ts <= scheduled_ts <= first_token_ts <= last_token_ts"),
        (changed(0, last_token_ts=7.6), "before first_token_ts"),
        (changed(2, request_id="r0"), "lines 1 and 3 both have request_id = 'r0'"),
    ],
)
def test_bad_requests_are_named_in_one_sentence(tmp_path: Path, rows: list[Row], words: str):
    assert words in refused(folder(tmp_path, rows))


def spoil(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("requests.jsonl"), "no such file"),
        (drop("meta.json"), "no such file"),
        (spoil("requests.jsonl", "\n \n"), "is empty"),
        (spoil("requests.jsonl", "{}\n{"), "line 2 is not valid JSON"),
        (spoil("requests.jsonl", "[1]"), "line 1 is not a JSON object"),
        (spoil("meta.json", "{"), "is not valid JSON"),
        (spoil("meta.json", "[]"), "is not a JSON object"),
        (lambda path: (path / "meta.json").write_bytes(b"\xff\xfe\x00") and None, "is not a text file"),
        (spoil("config.json", "nothing"), "is not valid JSON"),
        (spoil("timeseries.csv", "t,running\n1,2\n2,3\n"), "line 2 has no waiting"),
        (spoil("timeseries.csv", "t,running,waiting\n1,2,0\n1,2,0\n"), "not after the line above"),
        (spoil("timeseries.csv", "t,running,waiting\n1,2,0\n2,x,0\n"), "running = 'x'"),
        (spoil("timeseries.csv", "t,running,waiting\n"), "two or more"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, damage: Callable[[Path], None], words: str):
    path = folder(tmp_path)
    damage(path)
    assert words in refused(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_num_seqs", 0, "max_num_seqs = 0 must be a whole number of at least 1"),
        ("max_num_batched_tokens", "many", "max_num_batched_tokens = 'many'"),
        ("async_scheduling", "yes", "must be true or false"),
        ("kv_cache__gpu_memory_utilization", 90, "must be a number above 0 and at most 1"),
        ("kv_cache__num_gpu_blocks", 2.5, "must be a whole number"),
        ("hardware__device_name", " ", "must be a text"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, key: str, value: Any, words: str):
    assert words in refused(folder(tmp_path, **{key: value}))


def test_no_folder_and_a_file_instead_of_one(tmp_path: Path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(tmp_path / "file")


def test_absent_settings_are_vllms_defaults_for_the_version_and_say_so(tmp_path: Path):
    run = read_run(folder(tmp_path))
    for name, value in {
        "async_scheduling": True,
        "gpu_memory_utilization": 0.9,
        "enable_chunked_prefill": True,
    }.items():
        assert (run.value(name), run.settings[name].origin) == (value, "assumed")
    assert run.settings["max_num_seqs"].origin == "recorded" and run.value("num_gpu_blocks") == recorded.BLOCKS + 1
    old = read_run(folder(tmp_path / "old", vllm_version="0.13.2"))
    assert not old.value("async_scheduling")
    new = read_run(folder(tmp_path / "new", vllm_version="0.28.0"))
    assert new.value("gpu_memory_utilization") == 0.92


def test_large_gpus_have_larger_default_batches(tmp_path: Path):
    absent: dict[str, Any] = {"max_num_seqs": None, "max_num_batched_tokens": None}
    small = read_run(folder(tmp_path, **absent))
    assert (small.value("max_num_seqs"), small.value("max_num_batched_tokens")) == (256, 2048)
    large = {"hardware__device_name": "NVIDIA H100 80GB HBM3", "hardware__device_total_memory_bytes": 85_000_000_000}
    run = read_run(folder(tmp_path / "large", **absent, **large))
    assert (run.value("max_num_seqs"), run.value("max_num_batched_tokens")) == (1024, 8192)
    unsized = read_run(folder(tmp_path / "unsized", **absent, hardware__device_name="NVIDIA H100 80GB HBM3"))
    assert (unsized.value("max_num_seqs"), unsized.value("max_num_batched_tokens")) == (1024, 8192)


def test_what_the_engine_resolved_counts_more_than_what_it_was_asked(tmp_path: Path):
    run = read_run(folder(tmp_path, resolved_config__scheduler_config={"max_num_seqs": 32, "async_scheduling": False}))
    assert run.value("max_num_seqs") == 32 and run.value("async_scheduling") is False
    assert run.settings["max_num_seqs"].note == "resolved_config.scheduler_config.max_num_seqs"


def test_the_gpu_is_the_device_else_the_config_else_the_folders_name(tmp_path: Path):
    path = folder(tmp_path, hardware=None)
    assert read_run(path).value("gpu") == "RTX4090"
    (path / "config.json").write_text(json.dumps({"nodes": [{"instances": [{"hardware": "A40", "tp_size": 2}]}]}))
    run = read_run(path)
    assert (run.value("gpu"), run.value("tensor_parallel_size")) == ("A40", 2)
    assert read_run(folder(tmp_path / "named")).value("gpu") == "NVIDIA GeForce RTX 4090"
    bare = recorded.write_run(tmp_path / "bare", ROWS, recorded.settings(hardware=None))
    assert read_run(bare).value("gpu") is None


def test_files_may_lie_in_a_subfolder_named_after_the_engine(tmp_path: Path):
    recorded.write_run(tmp_path / "run" / "vllm", ROWS, recorded.settings())
    assert len(read_run(tmp_path / "run").records) == 4


def test_curves_count_from_the_start_of_the_recorder(tmp_path: Path):
    path = folder(tmp_path, started_at="1970-01-01T00:01:39.500000Z")
    (path / "timeseries.csv").write_text("t,running,waiting\n1.0,3,2\n2.0,4,0\n")
    curves = read_run(path).curves
    assert curves is not None
    assert curves.times.tolist() == [0.5, 1.5] and curves.waiting.tolist() == [2, 0] and np.isnan(curves.memory).all()


@pytest.mark.parametrize(("name", "ttft", "e2e"), [("RTX4090", 65.4566, 86.5783), ("RTXPRO6000", 7.0971, 28.2007)])
def test_real_runs_have_the_means_of_their_summaries(shared: Path, name: str, ttft: float, e2e: float):
    """llmservingsim_summary.txt in each folder prints the means that its author took from the same file."""
    run = read_run(shared / f"data/vllm-runs/{name}_Llama-3.1-8B")
    records = run.records
    assert len(records) == 300 and run.curves is not None
    assert (records.first_token - records.queued).mean() == pytest.approx(ttft, rel=1e-5)
    assert (records.finish - records.queued).mean() == pytest.approx(e2e, rel=1e-5)
    assert (records.queued >= records.arrival - 1e-6).all()
    assert run.value("max_num_batched_tokens") == 2048
