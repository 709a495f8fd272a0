"""Bundles under real lengths: scenarios that quote their traces and ask what they say; the document's tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llmopt.barrier import barrier_cycle, best_barrier
from llmopt.bundle import Bundle
from llmopt.catalog import catalog_entry, catalog_names
from llmopt.ratio import best_ratio, best_whole, stage_times
from llmopt.reading import bundled_scenarios, load_scenario

SCENARIOS = {
    "afd-azure-conv": "azure-conv",
    "afd-qwen3-30b-a100": "azure-conv",
    "afd-qwen3-30b-h100-a100": "azure-conv",
    "afd-mooncake": "mooncake-batching",
}
"""Scenarios on real lengths, and those whose length laws they share."""
DOCUMENT = (Path(__file__).parents[1] / "docs/afd_coefficients.md").read_text()
ERRORS = re.compile(
    r"(?:; |: )(?:(prompts|both): )?(\d+) points, ([^:]+): median ([\d.]+%), 95 % within ([\d.]+%), largest (\d+%)"
)


def tpot(bundle: Bundle, cycle: float) -> float:
    return bundle.micro_batches * bundle.layers * cycle


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_asks_one_question_in_units(name: str) -> None:
    scenario, text = load_scenario(name), bundled_scenarios()[name].read_text()
    assert scenario.question.endswith("?")
    assert text.startswith(f"# {scenario.question}\n")
    for line in text.splitlines():
        if re.match(r"(?!name|problem|question|law|probs|values|seeds)\w+ = [\[{]?.*\d", line):
            assert "# " in line, line


@pytest.mark.parametrize(("name", "source"), SCENARIOS.items())
def test_a_scenario_has_the_lengths_of_its_source(name: str, source: str) -> None:
    scenario, quoted = load_scenario(name), load_scenario(source)
    for ours, theirs in zip(scenario.workload.classes, quoted.workload.classes, strict=True):
        assert (ours.prompt, ours.output, ours.share) == (theirs.prompt, theirs.output, theirs.share)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_batch_fits_into_memory(name: str) -> None:
    scenario = load_scenario(name)
    load, bundle, sigmas = scenario.slot_load, scenario.bundle, scenario.fleet.kv_sigmas
    for batch in scenario.fleet.batches or (bundle.batch,):
        slots = bundle.micro_batches * batch
        assert slots * load.theta + sigmas * np.sqrt(slots) * load.deviation < bundle.kv_capacity
    assert best_whole(bundle, load, scenario.fleet.most_attention) < scenario.fleet.most_attention


@pytest.mark.parametrize(
    ("name", "file", "more"),
    [
        ("afd-azure-conv", "azure-llm-2023/AzureLLMInferenceTrace_conv.csv", 1.124),
        ("afd-mooncake", "mooncake-fast25/conversation_trace.jsonl", 1.005),
    ],
)
def test_the_joint_lengths_of_a_trace_load_a_slot_as_the_comment_says(
    name: str, file: str, more: float, shared: Path
) -> None:
    quoted, real = load_scenario(name), load_scenario(name, shared / "data" / file)
    assert real.slot_load.theta / quoted.slot_load.theta == pytest.approx(more, abs=0.005)
    assert real.slot_load.requests > 12_000


def test_long_prompts_make_the_fullest_worker_decide() -> None:
    """The mean field asks for hundreds of workers, the barrier for a tenth: a slot's deviation exceeds its mean."""
    scenario = load_scenario("afd-mooncake")
    load, bundle = scenario.slot_load, scenario.bundle.sized(1, 1, 22)
    assert load.deviation > load.theta
    mean = best_whole(bundle, load, scenario.fleet.most_attention)
    few = best_barrier(bundle, load, scenario.fleet.most_attention)
    assert (mean, few) == (232, 19)


def test_the_requirement_of_50_ms_decides_the_micro_batch() -> None:
    scenario = load_scenario("afd-qwen3-30b-a100")
    assert {cls.tpot for cls in scenario.workload.classes} == {0.05}
    times = []
    for batch in (128, 192):
        bundle = scenario.bundle.sized(1, 1, batch)
        workers = best_barrier(bundle, scenario.slot_load, 56)
        times.append(tpot(bundle, barrier_cycle(bundle, scenario.slot_load, workers)))
    assert times[0] < 0.05 < times[1]


def test_the_document_lists_every_fit() -> None:
    rows = []
    for name in catalog_names():
        for stage in ("attention", "transfer", "ffn") if name.startswith("afd-") else ():
            for kind, *figures in ERRORS.findall(catalog_entry(name).sources[f"bundle.{stage}"]):
                rows.append(f"| `{name}` | {stage}{', ' + kind if kind else ''} | {' | '.join(figures)} |")
    assert len(rows) > 15
    assert [line for line in DOCUMENT.splitlines() if re.match(r"\| `afd-.*% \|$", line)] == rows


def test_the_document_compares_the_entries_as_computed() -> None:
    load, rows = load_scenario("afd-azure-conv").slot_load, []
    for name in catalog_names():
        if not name.startswith("afd-"):
            continue
        bundle = Bundle.model_validate(catalog_entry(name).pool["bundle"])
        workers = best_barrier(bundle, load, 64)
        cycle = barrier_cycle(bundle, load, workers)
        devices = workers * bundle.attention_devices + bundle.ffn_devices
        times = ", ".join(f"{x * 1e6:.0f}" for x in stage_times(bundle, load, workers))
        speed = workers * bundle.batch / (bundle.layers * cycle * devices)
        rows.append(
            f"| `{name}` | {bundle.batch} | {best_ratio(bundle, load).ratio:.2f} | {workers} | {times} "
            f"| {tpot(bundle, cycle) * 1e3:.0f} | {speed:,.0f} |"
        )
    assert all(row in DOCUMENT for row in rows)


def test_the_document_shows_how_a_table_replaces_the_pieces(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "few.toml").write_text(block)
    bundle = load_scenario(tmp_path / "few.toml").bundle
    assert bundle.ffn_table is not None
    for line, entry in (("one A100, measured", None), ("`afd-qwen3-30b-a100`, us", "afd-qwen3-30b-a100")):
        (row,) = [row for row in DOCUMENT.splitlines() if row.startswith(f"| {line}")]
        shown = [float(cell.replace(",", "")) for cell in row.split(" | ")[1:-1]] + [
            float(row.split(" | ")[-1][:-2].replace(",", ""))
        ]
        one = bundle if entry is None else Bundle.model_validate(catalog_entry(entry).pool["bundle"])
        found = [one.ffn_time(tokens / one.batch) * 1e6 for tokens in bundle.ffn_table.tokens]
        assert found == pytest.approx(shown, abs=0.6)
    few = Bundle.model_validate(bundle.model_dump()).table_hull
    assert max(piece.base + 16 * piece.decode for piece in few) < bundle.ffn_time(1.0) / 3
