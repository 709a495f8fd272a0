"""Catalog entries of Attention/FFN bundles: sourced, possible, and what the measurements give."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.afd_fits import ENTRIES, expert_side, ffn_a100, published, visited
from llmopt.bundle import Bundle
from llmopt.catalog import catalog_entry, catalog_names
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines import accelerator, model_shape
from llmopt.ratio import best_ratio
from llmopt.reading import load_scenario
from llmopt.scenario import Pool
from llmopt.slots import SlotLoad

NAMES = [name for name in catalog_names() if name.startswith("afd-")]
CHIPS = {"afd-qwen3-30b-h100-a100": ("H100 SXM", "A100 SXM 80GB")}
"""Entries whose two roles run on different accelerators."""
IMPLIED = ("step_time", "kv_capacity", "max_batch", "price", "token_budget")


def bundle(name: str) -> Bundle:
    return Bundle.model_validate(catalog_entry(name).pool["bundle"])


def chips(name: str) -> tuple[str, str]:
    chip = catalog_entry(name).pool["accelerator"]
    return CHIPS.get(name, (chip, chip))


def test_every_entry_is_made_by_the_script() -> None:
    assert set(NAMES) == set(ENTRIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_has_a_source(name: str) -> None:
    entry = catalog_entry(name)
    constants = {key for key in entry.pool if key != "bundle"} | {f"bundle.{key}" for key in entry.pool["bundle"]}
    assert set(entry.sources) == constants
    assert all(len(source) > 3 for source in entry.sources.values())
    for stage in ("attention", "transfer", "ffn"):
        told = entry.sources[f"bundle.{stage}"]
        assert ("largest" in told and "points" in told) or "stated, not measured" in told or "as told" in told
    assert "\n" not in entry.description
    pool = Pool.model_validate({"name": "p", **entry.pool})
    assert pool.bundle is not None
    assert pool.bundle.layers == model_shape(entry.pool["model"]).layers
    assert pool.bundle.micro_batches * pool.bundle.batch * 1024 < pool.bundle.kv_capacity, "room for usual contexts"


@pytest.mark.parametrize("name", NAMES)
def test_attention_reads_the_cache_no_faster_than_its_memory_allows(name: str) -> None:
    """Attention's own weights, if measured, and KV tokens of one layer, two bytes a number, at the full bandwidth."""
    one, shape, chip = bundle(name), model_shape(catalog_entry(name).pool["model"]), accelerator(chips(name)[0])
    per_token = 2.0 * shape.cached_width / chip.bandwidth
    weights = 2.0 * shape.attention_weights / chip.bandwidth if "deepseek" not in name else 0.0
    digits = 1 - 5e-4
    assert max(piece.kv for piece in one.attention) >= digits * per_token
    for kv in np.geomspace(1e3, one.kv_capacity, 12):
        assert one.attention_time(kv, 8) >= digits * (kv * per_token + weights)


def ffn_floor(name: str, tokens: float, devices: int) -> float:
    """All experts of a layer read once, or the products of all tokens, whichever takes longer."""
    shape, chip = model_shape(catalog_entry(name).pool["model"]), accelerator(chips(name)[1])
    width = shape.experts * shape.expert_intermediate or shape.intermediate
    active = shape.experts_per_token * shape.expert_intermediate or shape.intermediate
    read = 2.0 * shape.ffn_weights(width) / chip.bandwidth
    return max(read, 2.0 * tokens * shape.ffn_weights(active) / chip.peak("bf16")) / devices


@pytest.mark.parametrize("name", [name for name in NAMES if "deepseek" not in name])
def test_the_ffn_is_no_faster_than_its_devices_allow(name: str) -> None:
    one = bundle(name)
    for tokens in np.geomspace(128, 16_384, 12):
        assert one.ffn_time(tokens / one.batch) >= ffn_floor(name, tokens, one.ffn_devices)


def test_the_published_instances_are_no_single_devices_if_the_unit_is_a_microsecond() -> None:
    """In one byte a number a 910C reads a layer's experts in 3.5, not 0.1 ms, its Attention in 58, not 50 us."""
    one, shape, chip = bundle("afd-deepseek-v3-910c"), model_shape("DeepSeek-V3"), accelerator("Ascend 910C")
    experts = shape.experts * shape.ffn_weights(shape.expert_intermediate)
    assert (
        experts / chip.bandwidth == pytest.approx(256 * 3 * 7168 * 2048 / 3.2e12) == pytest.approx(3.523e-3, rel=1e-3)
    )
    assert 30 < experts / chip.bandwidth / one.ffn_time(0.0) < 40
    assert 1 < shape.attention_weights / chip.bandwidth / float(one.attention_time(0.0)) < 1.2


@pytest.mark.parametrize("name", NAMES)
def test_a_hop_is_no_faster_than_the_link(name: str) -> None:
    """One link carries the tokens of a server, or of one of its devices; the published hop fits one byte a number."""
    one, shape = bundle(name), model_shape(catalog_entry(name).pool["model"])
    link = min(accelerator(chip).link_bandwidth for chip in chips(name))
    share = visited(shape, one.ffn_devices) if one.ffn_devices > 1 else 1.0
    number = 1.0 if "deepseek" in name else 2.0
    for tokens in np.geomspace(128, 4096, 6):
        assert StepTime.from_pieces(one.transfer)(decode=tokens) >= share * number * tokens * shape.hidden / link


def test_the_published_set_is_the_published_one() -> None:
    one = published(Path()).parsed()
    assert one == bundle("afd-deepseek-v3-910c")
    assert float(one.attention_time(256 * 599)) == pytest.approx((0.00165 * 256 * 599 + 50) * 1e-6)
    assert one.ffn_time(9.3) == pytest.approx((0.083 * 256 * 9.3 + 100) * 1e-6)
    assert one.transfer_time(3.0) == pytest.approx((0.022 * 256 + 20) * 1e-6)
    ideal = one.model_copy(update={"pipeline": "ideal"})
    assert best_ratio(ideal, SlotLoad(599.0, 0.0, 100.0, 500.0)).ratio == pytest.approx(
        (0.00165 * 256 * 599 + 50 - 100) / (0.083 * 256)
    )


def test_a_device_receives_the_tokens_that_visit_its_experts() -> None:
    """Six experts on three devices, two a token: counted one by one."""
    shape = model_shape("Qwen3-30B-A3B").model_copy(update={"experts": 6, "experts_per_token": 2})
    pairs = list(combinations(range(6), 2))
    assert visited(shape, 3) == pytest.approx(sum(min(pair) < 2 for pair in pairs) / len(pairs))
    assert visited(shape, 1) == 1.0


def test_a_stage_is_fitted_again_to_the_printed_digits(shared: Path) -> None:
    """The experts on eight A100; kernel times are read here by hand as well."""
    import pandas as pd

    again, kept = ffn_a100(shared / "data", model_shape("Qwen3-30B-A3B"), 8), bundle("afd-qwen3-30b-a100-ep8")
    assert again.pieces == kept.ffn
    assert again.told == catalog_entry("afd-qwen3-30b-a100-ep8").sources["bundle.ffn"]
    table = pd.read_parquet(shared / "data/aiconfigurator/data/a100_sxm__moe__vllm__0.14.0__moe_perf.parquet")
    rows = table.query("hidden_size == 2048 and inter_size == 768 and num_experts == 128 and topk == 8")
    rows = rows.query("moe_ep_size == 8 and moe_tp_size == 1 and distribution == 'power_law_1.01'")
    rows = rows[(rows.num_tokens >= 128) & (rows.num_tokens <= 16_384)]
    ratio = np.array([kept.ffn_time(n / kept.batch) for n in rows.num_tokens]) / (rows.latency * 1e-3)
    assert len(rows) == 17
    assert (ratio > 1).sum() > 12, "norm and gate come on top of the experts"
    assert np.median(ratio) == pytest.approx(1.05, abs=0.05)


def test_few_tokens_visit_few_experts_which_no_convex_piece_follows(shared: Path) -> None:
    """Why fits begin at 128 tokens: below, the time of a layer is concave and far less than the pieces say."""
    from benchmarks.afd_points import experts

    shape = model_shape("Qwen3-30B-A3B")
    measured, kept = experts(shared / "data", shape, 1), bundle("afd-qwen3-30b-a100")
    slopes = np.diff(measured(np.array([1.0, 8.0, 32.0, 128.0, 512.0]))) / np.diff([1, 8, 32, 128, 512])
    assert slopes[0] > 1.5 * slopes[1] > 4 * slopes[2]
    few, many = (kept.ffn_time(n / kept.batch) / measured(np.array([n]))[0] for n in (16.0, 1024.0))
    assert few > 2.4
    assert many == pytest.approx(1.0, abs=0.1)
    assert len(expert_side(shared / "data", shape, 1).seconds) == 17


SCENARIO = """
problem = "af-ratio"
[workload]
rate = 1.0
[[workload.classes]]
name = "all"
share = 1.0
prompt = { law = "constant", value = 1000 }
output = { law = "constant", value = 100 }
[[pools]]
name = "p"
catalog = "afd-qwen3-30b-a100"
"""


def load(folder: Path, more: str) -> Bundle:
    (folder / "s.toml").write_text(SCENARIO + more)
    return load_scenario(folder / "s.toml").bundle


def test_a_scenario_changes_keys_of_an_entrys_bundle(tmp_path: Path) -> None:
    known = bundle("afd-qwen3-30b-a100")
    assert load(tmp_path, "") == known
    assert load(tmp_path, "[pools.bundle]\nbatch = 64\nmicro_batches = 2") == known.model_copy(
        update={"batch": 64, "micro_batches": 2}
    )


def test_measured_ffn_times_replace_fitted_ones(tmp_path: Path) -> None:
    found = load(tmp_path, "[pools.bundle]\nffn_table = { tokens = [1, 128], seconds = [62e-6, 730e-6] }")
    assert found.ffn == ()
    assert found.ffn_time(1.0) == pytest.approx(730e-6)
    assert found.attention == bundle("afd-qwen3-30b-a100").attention


def test_a_bundle_of_a_known_machine_is_not_guessed_from_it(tmp_path: Path) -> None:
    scenario = SCENARIO.replace('catalog = "afd-qwen3-30b-a100"', 'accelerator = "A100"\nmodel = "Qwen3-30B-A3B"')
    own = "[pools.bundle]\nbatch = 8\nkv_capacity = 100000\nattention = [{ base = 1e-4 }]\nffn = [{ base = 1e-4 }]"
    (tmp_path / "s.toml").write_text(scenario + own)
    assert load_scenario(tmp_path / "s.toml").pools[0].kv_capacity == 100_000


def test_a_key_that_is_none_of_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"pools\[0\]\.bundle.*batches"):
        load(tmp_path, "[pools.bundle]\nbatches = 64")
