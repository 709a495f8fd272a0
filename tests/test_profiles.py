"""Profiles in LLMServingSim's layouts: what is read, what a step composed of it takes, and every bad file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_files import (
    CHUNKS,
    DENSE,
    Tables,
    attention,
    decode_us,
    mixed_us,
    newer_attention,
    prefill_us,
    step_us,
    tables,
)

from llmopt.errors import ScenarioError
from llmopt.machines import ModelShape, accelerator, model_shape
from llmopt.machines.roofline import LINK_EFFICIENCY
from llmopt.profiles import compose, find_profile, load_step_table, operators, read_profile
from llmopt.profiles.estimates import expert_curve
from llmopt.profiles.grids import full, on_cached
from llmopt.profiles.names import accelerator_key, model_key, same_accelerator, same_model, same_precision

MODEL, GPU = "Llama-3.1-8B", "RTX4090"
NATIVE = f"{GPU}/meta-llama/{MODEL}/bf16/tp1"


def flat(folder: Path, some: Tables | None = None, prefix: str = f"{GPU}_{MODEL}_tp1_") -> Path:
    return (some or tables()).write(folder, prefix)


def seconds(folder: Path, chunk: float, cached: float, batch: float, context: float, **names: str) -> float:
    table = load_step_table(folder, names.get("accelerator", GPU), names.get("model", MODEL))
    return table(chunk, batch, batch * context, chunk * (cached + chunk / 2))


@pytest.mark.parametrize(
    ("chunk", "cached", "batch", "context"),
    [(0, 0, 1, 700), (0, 0, 37, 3000), (2048, 0, 0, 0), (256, 777, 0, 0), (1024, 100, 7, 900), (64, 4000, 64, 4096)],
)
@pytest.mark.parametrize("layout", ["flat", "native"])
def test_a_composed_step_is_the_sum_of_its_operators(
    tmp_path: Path, layout: str, chunk: int, cached: int, batch: int, context: int
) -> None:
    folder = flat(tmp_path) if layout == "flat" else tables().write(tmp_path / NATIVE).parents[4]
    expected = step_us(32, chunk, cached, batch, context) * 1e-6
    assert seconds(folder, chunk, cached, batch, context) == pytest.approx(expected, rel=1e-9)


def test_the_newer_columns_say_the_same(tmp_path: Path) -> None:
    new = flat(tmp_path / "new", replace(tables(), attention=newer_attention()))
    for step in [(0, 0, 37, 3000), (256, 300, 16, 256), (2048, 256, 0, 0), (1024, 900, 7, 1024)]:
        assert seconds(new, *step) == pytest.approx(step_us(32, *step) * 1e-6, rel=1e-9)
    profile = find_profile(new, GPU, MODEL)
    assert "indexer" in " ".join(profile.notes)
    assert profile.decode is not None and profile.decode.seconds.max() == pytest.approx(1e-6 * decode_us(256, 4096))


def test_a_fresh_chunk_between_two_measured_key_lengths_is_interpolated() -> None:
    keys, chunk = np.array([16.0, 64, 256, 1024]), np.array([64.0, 256])
    table = 3.0 + 0.5 * chunk[:, None] * keys
    (_, cached), values = on_cached((chunk, keys), table)
    assert cached[0] == 0
    # a fresh chunk of 64 has 32 keys per query, one of 256 has 128
    assert values[:, 0] == pytest.approx([3 + 0.5 * 64 * 32, 3 + 0.5 * 256 * 128])


def test_where_no_mixed_steps_were_measured_they_are_the_sum(tmp_path: Path) -> None:
    some = attention()
    pure = some[(some.prefill_chunk == 0) | (some.n_decode == 0)]
    folder = flat(tmp_path, replace(tables(), attention=pure))
    table = load_step_table(folder, GPU, MODEL)
    assert not table.separate
    assert any("sum of prefill and decode" in note for note in table.notes)
    alone = table.attention(
        np.array([[256.0, 0, 0, 256 * 128], [0, 16, 16 * 1024, 0], [256, 16, 16 * 1024, 256 * 128]])
    )
    assert alone[2] == pytest.approx(alone[0] + alone[1])
    assert load_step_table(flat(tmp_path / "mixed"), GPU, MODEL).separate


def test_holes_are_filled_between_measurements_and_counted(tmp_path: Path) -> None:
    some = attention()
    inner = (some.n_decode > 0) & (some.prefill_chunk == 256) & (some.kv_decode == 256)
    folder = flat(tmp_path, replace(tables(), attention=some[~inner]))
    profile = find_profile(folder, GPU, MODEL)
    assert profile.mixed is not None
    assert profile.mixed.filled == pytest.approx(inner.sum() / profile.mixed.seconds.size)
    # mixed attention is linear in the context, along which holes are filled first
    expected = step_us(32, 256, 256, 16, 256) * 1e-6
    assert seconds(folder, 256, 256, 16, 256) == pytest.approx(expected, rel=1e-9)
    assert "interpolated between measurements" in " ".join(load_step_table(folder, GPU, MODEL).notes)


@given(st.lists(st.booleans(), min_size=20, max_size=20), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_filling_keeps_what_was_measured_and_leaves_no_hole(known: list[bool], first: int) -> None:
    axes = (np.arange(4.0), np.array([0.0, 1, 4, 16, 64]))
    table = np.where(np.array(known).reshape(4, 5), 1.0 + axes[0][:, None] + axes[1], np.nan)
    if not np.isfinite(table).any():
        return
    grid = full(axes, table, (first, 1 - first))
    assert np.isfinite(grid.seconds).all()
    assert (grid.seconds > 0).all()
    assert grid.seconds[np.isfinite(table)] == pytest.approx(table[np.isfinite(table)])
    assert grid.filled + grid.extended == pytest.approx(1 - np.isfinite(table).mean())


def test_extrapolation_follows_the_trend_and_not_the_last_two_knots(tmp_path: Path) -> None:
    some = tables()
    # two more knots at the end with hardly any rise, as profilers leave them
    last = some.dense[some.dense.tokens == 2048]
    more = [last.assign(tokens=2040, time_us=last.time_us * 0.9999)]
    folder = flat(tmp_path, replace(some, dense=pd.concat([some.dense, *more])))
    table = load_step_table(folder, GPU, MODEL)
    expected = step_us(32, 4096, 0, 0, 0) * 1e-6
    assert table(4096, 0, 0, 4096**2 / 2) == pytest.approx(expected, rel=0.01)
    assert not table.covers(np.array([[4096.0, 0, 0, 4096**2 / 2]]))[0]
    assert table.covers(np.array([[2048.0, 0, 0, 2048**2 / 2]]))[0]
    assert table.ends[0] == 2048


def test_a_longer_chunk_costs_what_its_parts_cost(tmp_path: Path) -> None:
    table = load_step_table(flat(tmp_path), GPU, MODEL)
    attention_of = table.attention(np.array([[4096.0, 0, 0, 4096**2 / 2]]))[0]
    parts = 32e-6 * (prefill_us(2048, 0) + prefill_us(2048, 2048))
    assert attention_of == pytest.approx(parts, rel=1e-6)


NAMES = [
    ("RTX4090", "NVIDIA GeForce RTX 4090"),
    ("RTX 4090 24GB", "rtx4090"),
    ("RTXPRO6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
    ("a100_sxm", "NVIDIA A100-SXM4-80GB"),
    ("A100-80GB", "a100"),
    ("NVIDIA H100 80GB HBM3", "h100"),
]


@pytest.mark.parametrize(("one", "other"), NAMES)
def test_accelerators_are_compared_by_what_they_are(one: str, other: str) -> None:
    assert same_accelerator(one, other)


def test_unlike_accelerators_stay_apart() -> None:
    names = ["A100", "A800", "A40", "H100", "H200", "B200", "L4", "L40S", "RTX 4090", "RTX 6000 Ada", "RTX PRO 6000"]
    assert len({accelerator_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("/data/model/Qwen3-32B", "Qwen/Qwen3-32B"),
        ("Qwen3-30B-A3B-Instruct-2507", "qwen3-a3b-30b-moe"),
        ("Llama-2-70b-hf", "llama2-70b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("Meta-Llama-3-8B", "Llama-3-8B"),
    ],
)
def test_models_are_compared_by_their_shape(one: str, other: str) -> None:
    assert same_model(one, other)


def test_unlike_models_stay_apart() -> None:
    names = ["Llama-3.1-8B", "Llama-3-8B", "Llama-2-7B", "Llama-3.1-70B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-8B"]
    names += ["Qwen2.5-7B", "DeepSeek-V3", "DeepSeek-V2", "Mixtral-8x7B", "Mixtral-8x22B"]
    assert len({model_key(name) for name in names}) == len(names)


def test_half_precisions_are_one_and_others_are_not() -> None:
    assert same_precision("bfloat16", "fp16")
    assert not same_precision("fp8", "bf16")


def test_a_profile_is_found_by_any_spelling(tmp_path: Path) -> None:
    folder = flat(tmp_path / "deep" / "er").parent
    expected = seconds(folder, 256, 0, 4, 256)
    found = seconds(
        folder, 256, 0, 4, 256, accelerator="NVIDIA GeForce RTX 4090", model="meta-llama/Llama-3.1-8B-Instruct"
    )
    assert found == expected
    assert read_profile(folder).files == find_profile(folder, GPU, MODEL).files


@pytest.mark.parametrize(
    ("accelerator", "model", "settings", "words"),
    [
        ("H100", MODEL, {}, ["no profile of Llama-3.1-8B on H100", "it holds Llama-3.1-8B on RTX4090"]),
        (GPU, "Qwen3-32B", {}, ["no profile of Qwen3-32B on RTX4090"]),
        (GPU, MODEL, {"tensor_parallel": 4}, ["tensor_parallel = 4 was not profiled", "profiled are 1"]),
        (GPU, MODEL, {"precision": "fp8"}, ["in bf16, not in fp8"]),
        (GPU, "Llama-3.1-8B-FP8", {}, ["in bf16, not in fp8"]),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    tmp_path: Path, accelerator: str, model: str, settings: dict[str, str], words: list[str]
) -> None:
    flat(tmp_path)
    with pytest.raises(ScenarioError) as error:
        load_step_table(tmp_path, accelerator, model, **settings)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), error.value


def test_variants_of_one_precision_are_told_apart(tmp_path: Path) -> None:
    home = tmp_path / GPU / "meta-llama" / MODEL
    for variant in ("bf16", "bf16-kvfp8", "fp8"):
        tables().write(home / variant / "tp1")
    assert Path(find_profile(tmp_path, GPU, MODEL, precision="bf16").files[0]).parts[-3] == "bf16"
    assert find_profile(tmp_path, GPU, MODEL, precision="fp8").precision == "fp8"
    with pytest.raises(ScenarioError, match="name the precision"):
        find_profile(tmp_path, GPU, MODEL)
    # the model's own precision chooses
    assert load_step_table(tmp_path, GPU, MODEL)(decode=1, kv=100) > 0


def test_two_profiles_of_the_same_thing_are_refused(tmp_path: Path) -> None:
    flat(tmp_path / "a")
    flat(tmp_path / "b", prefix="rtx-4090_Llama-3.1-8B-hf_tp1_")
    with pytest.raises(ScenarioError, match=r"holds what .* holds too"):
        find_profile(tmp_path, GPU, MODEL)
    tables().write(tmp_path / "c" / NATIVE.replace("RTX4090", "RTX5090"))
    with pytest.raises(ScenarioError, match="holds several profiles"):
        read_profile(tmp_path)


def change(table: str, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Tables:
    some = tables()
    return replace(some, **{table: edit(getattr(some, table))})


def put(frame: pd.DataFrame, row: int, column: str, value: object) -> pd.DataFrame:
    out = frame.astype({column: object}) if isinstance(value, str) else frame.copy()
    out.loc[row, column] = value
    return out


def slow_then_fast(frame: pd.DataFrame, layer: str = "gate_up_proj") -> pd.DataFrame:
    out = frame.copy()
    out.loc[(out.layer == layer) & (out.tokens == 1024), "time_us"] /= 8
    return out


BAD = {
    "negative": (change("dense", lambda d: put(d, 3, "time_us", -5.0)), ["line 5", "time_us = -5.0"]),
    "zero": (change("attention", lambda d: put(d, 0, "time_us", 0.0)), ["line 2", "no positive time"]),
    "not a number": (change("dense", lambda d: put(d, 7, "time_us", np.nan)), ["line 9", "time_us = nan"]),
    "text": (change("per_sequence", lambda d: put(d, 1, "time_us", "fast")), ["line 3", "time_us = fast"]),
    "no tokens": (change("dense", lambda d: put(d, 2, "tokens", -1)), ["line 4", "tokens = -1"]),
    "duplicate": (change("dense", lambda d: pd.concat([d, d.iloc[[4]]])), ["line 74", "duplicate of line 6", "layer"]),
    "duplicate attention": (
        change("attention", lambda d: pd.concat([d, d.iloc[[4]]])),
        ["duplicate of line 6", "prefill_chunk = 0"],
    ),
    "falls": (change("dense", slow_then_fast), ["line", "gate_up_proj takes", "at 1024 tokens", "fall"]),
    "falls a little one": (change("dense", lambda d: put(d, 7, "time_us", 0.01)), ["embedding takes", "at 2048"]),
    "context falls": (
        change("attention", lambda d: put(d, 19, "time_us", 9.0)),
        ["attention at kv_decode 4096, n_decode 256 takes 9 us"],
    ),
    "column": (change("dense", lambda d: d.drop(columns="tokens")), ["no column 'tokens'", "found 'layer', 'time_us'"]),
    "attention column": (change("attention", lambda d: d.drop(columns="n_decode")), ["no column 'n_decode'"]),
    "no layout": (change("dense", lambda d: d.rename(columns={"time_us": "t"})), ["layout is unknown", "time_us"]),
    "no rows": (change("dense", lambda d: d.iloc[:0]), ["is empty"]),
    "no decode": (change("attention", lambda d: d[d.prefill_chunk > 0]), ["no row of decode-only steps"]),
    "no prefill": (change("attention", lambda d: d[d.prefill_chunk == 0]), ["no row of steps without decode"]),
    "no operator": (tables(without=("o_proj",)), ["lacks the operator o_proj", "dense.csv"]),
    "two operators": (tables(without=("act_fn", "lm_head")), ["lacks the operators act_fn, lm_head"]),
}


@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD)
def test_bad_tables_are_refused_in_one_sentence(tmp_path: Path, bad: Tables, words: list[str]) -> None:
    flat(tmp_path, bad)
    with pytest.raises(ScenarioError) as error:
        load_step_table(tmp_path, GPU, MODEL)
    message = str(error.value)
    assert all(word in message for word in [str(tmp_path), *words]), message
    assert "\n" not in message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (flat(tmp_path) / f"{GPU}_{MODEL}_tp1_dense.csv").write_text("")
    with pytest.raises(ScenarioError, match=r"dense\.csv: is empty"):
        load_step_table(tmp_path, GPU, MODEL)


@pytest.mark.parametrize("kind", ["dense", "per_sequence", "attention"])
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    name = f"{GPU}_{MODEL}_tp1_{kind}.csv"
    (flat(tmp_path) / name).unlink()
    with pytest.raises(ScenarioError, match=f"has no {kind} table .* add {name}"):
        load_step_table(tmp_path, GPU, MODEL)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no such folder"):
        find_profile(tmp_path / "nowhere", GPU, MODEL)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ScenarioError, match=r"notes\.csv: is no profile in any layout"):
        read_profile(tmp_path / "notes.csv")
    with pytest.raises(ScenarioError, match="it holds none at all"):
        read_profile(tmp_path)


def test_noise_is_kept(tmp_path: Path) -> None:
    noisy = change("dense", lambda d: d.assign(time_us=d.time_us * np.where(np.arange(len(d)) % 3 == 1, 0.85, 1.0)))
    profile = find_profile(flat(tmp_path, noisy), GPU, MODEL)
    kept = noisy.dense[noisy.dense.layer == "qkv_proj"].time_us.to_numpy() * 1e-6
    assert profile.tokens["qkv_proj"].seconds == pytest.approx(kept)


def test_one_spike_upwards_is_kept_too(tmp_path: Path) -> None:
    spike = change("attention", lambda d: put(d, 0, "time_us", d.time_us[0] * 5))
    profile = find_profile(flat(tmp_path, spike), GPU, MODEL)
    assert profile.decode is not None
    assert profile.decode.seconds[0, 0] == pytest.approx(5e-6 * decode_us(1, 16))


def qwen(folder: Path, tensor_parallel: int = 2, extra: dict[str, tuple[float, float]] | None = None) -> Path:
    some = tables(extra={"qk_norm": (3.0, 0.02)} | (extra or {}))
    return some.write(folder / "RTXPRO6000" / "Qwen" / "Qwen3-32B" / "bf16" / f"tp{tensor_parallel}")


def test_query_and_key_norms_count_once_a_layer(tmp_path: Path) -> None:
    qwen(tmp_path, 1)
    table = load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B")
    expected = step_us(64, 0, 0, 16, 256) + 64 * (3.0 + 0.02 * 16)
    assert table(0, 16, 16 * 256) == pytest.approx(expected * 1e-6, rel=1e-9)


def test_a_model_with_query_norms_needs_them(tmp_path: Path) -> None:
    tables().write(tmp_path / "RTXPRO6000" / "Qwen" / "Qwen3-32B" / "bf16" / "tp1")
    with pytest.raises(ScenarioError, match="lacks the operator qk_norm"):
        load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B")


def test_two_gpus_add_two_all_reduces_a_layer_from_the_link(tmp_path: Path) -> None:
    qwen(tmp_path)
    table = load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B", tensor_parallel=2)
    chip = accelerator("RTX PRO 6000")
    size = 256 * 5120 * 2
    ring = 2 * (chip.link_latency + size / 2 / (LINK_EFFICIENCY * chip.link_bandwidth))
    alone = step_us(64, 256, 0, 0, 0) + 64 * (3.0 + 0.02 * 256)
    assert table(256, 0, 0, 256 * 128) == pytest.approx(alone * 1e-6 + 2 * 64 * ring, rel=1e-9)
    assert any(note.startswith("all-reduce: not measured") for note in table.notes)


def hardware(gpus: int = 2, slope: float = 3e-5) -> dict[str, object]:
    sizes = [4096, 65536, 1048576, 16777216]
    samples = [{"collective": "all_reduce", "bytes": n, "us": 12.0 + slope * n} for n in sizes]
    samples += [{"collective": "all_gather", "bytes": n, "us": 1.0} for n in sizes]
    link = {"link_bw": {"value": 20.0, "unit": "GiB/s"}, "link_latency": {"value": 5000, "unit": "ns"}}
    return {
        "hardware": "RTXPRO6000",
        "measured": {"interconnect": {"npus": gpus, "samples": samples}},
        "defaults": link,
    }


def test_a_measured_all_reduce_comes_before_the_link(tmp_path: Path) -> None:
    qwen(tmp_path)
    (tmp_path / "RTXPRO6000" / "hardware.yaml").write_text(yaml.safe_dump(hardware()))
    table = load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B", tensor_parallel=2)
    alone = step_us(64, 256, 0, 0, 0) + 64 * (3.0 + 0.02 * 256)
    reduces = 2 * 64 * (12.0 + 3e-5 * 256 * 5120 * 2)
    assert table(256, 0, 0, 256 * 128) == pytest.approx((alone + reduces) * 1e-6, rel=1e-9)
    assert not any("all-reduce" in note for note in table.notes)


def test_among_another_number_of_gpus_the_link_of_the_file_counts(tmp_path: Path) -> None:
    qwen(tmp_path, 4)
    (tmp_path / "RTXPRO6000" / "hardware.yaml").write_text(yaml.safe_dump(hardware()))
    table = load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B", tensor_parallel=4)
    ring = 6 * (5e-6 + 64 * 5120 * 2 / 4 / (20 * 2**30))
    alone = step_us(64, 64, 0, 0, 0) + 64 * (3.0 + 0.02 * 64)
    assert table(64, 0, 0, 64 * 32) == pytest.approx(alone * 1e-6 + 2 * 64 * ring, rel=1e-9)
    assert any("hardware.yaml" in note for note in table.notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not valid YAML"), ("measured: {interconnect: {npus: 2, samples: [{us: 1}]}}", "bytes")],
)
def test_a_bad_hardware_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    qwen(tmp_path)
    (tmp_path / "RTXPRO6000" / "hardware.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=f"hardware.yaml: .*{words}"):
        load_step_table(tmp_path, "RTX PRO 6000", "Qwen3-32B", tensor_parallel=2)


def test_without_link_or_table_an_all_reduce_is_missed(tmp_path: Path) -> None:
    qwen(tmp_path)
    profile = find_profile(tmp_path, "RTX PRO 6000", "Qwen3-32B", tensor_parallel=2)
    with pytest.raises(ScenarioError, match="no all-reduce among 2 GPUs"):
        compose(profile, model_shape("Qwen3-32B"))


EXPERTS = ("Qwen3-30B-A3B", 128, 8)


def moe_us(tokens: float, active: float) -> float:
    return 20.0 + 6.5 * active + 0.4 * tokens


def moe(ep: tuple[int, ...] | None = None) -> pd.DataFrame:
    """Whole expert block; the columns of a profile with expert-parallel degrees, or without."""
    rows = [
        (degree, t, a, moe_us(t, a))
        for degree in ep or (1,)
        for t in (1, 2, 4, 16, 64, 256, 2048)
        for a in (8 // degree, 16, 32, 64, 128)
        if 8 / degree <= a <= min(128, 8 * t) / degree
    ]
    frame = pd.DataFrame(rows, columns=["ep", "tokens", "activated_experts", "time_us"])
    return frame if ep else frame.drop(columns="ep")


def experts(folder: Path, frame: pd.DataFrame | None, tensor_parallel: int = 1) -> Path:
    some = tables(extra={"qk_norm": (3.0, 0.02)}, without=("gate_up_proj", "act_fn", "down_proj"))
    name = f"RTXPRO6000_Qwen3-30B-A3B-Instruct-2507_tp{tensor_parallel}_"
    return replace(some, moe=frame).write(folder, name)


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_the_expert_block_is_taken_at_the_expected_number_of_experts(tmp_path: Path, tokens: int) -> None:
    experts(tmp_path, moe())
    table = load_step_table(tmp_path, "RTXPRO6000", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    rng = np.random.default_rng(1)
    # uniform routing drawn: each token visits 8 different experts of 128
    drawn = [len({int(e) for t in range(tokens) for e in rng.choice(128, 8, replace=False)}) for _ in range(300)]
    skipped = {"gate_up_proj", "act_fn", "down_proj"}
    ffn = sum(a + b * tokens for name, (a, b) in DENSE.items() if name in skipped)
    alone = step_us(48, 0, 0, tokens, 256) - 48 * ffn + 48 * (3.0 + 0.02 * tokens)
    expected = alone + 48 * moe_us(tokens, float(np.mean(drawn)))
    assert table(0, tokens, tokens * 256) == pytest.approx(expected * 1e-6, rel=0.01)


def test_layers_without_experts_keep_their_dense_ffn(tmp_path: Path) -> None:
    shape = model_shape("Qwen3-30B-A3B").model_copy(update={"dense_layers": 8, "intermediate": 6144})
    some = replace(tables(extra={"qk_norm": (3.0, 0.02)}), moe=moe())
    some.write(tmp_path, "RTXPRO6000_Qwen3-30B-A3B_tp1_")
    profile = find_profile(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B")
    curve = expert_curve(profile.experts, shape) if profile.experts else None
    assert curve is not None
    dense = sum(DENSE[name][0] + 16 * DENSE[name][1] for name in ("gate_up_proj", "act_fn", "down_proj"))
    block = float(curve(np.array([16.0]))[0]) * 1e6
    expected = step_us(48, 0, 0, 16, 256) - 40 * dense + 40 * block + 48 * (3.0 + 0.02 * 16)
    assert compose(profile, shape)(0, 16, 16 * 256) == pytest.approx(expected * 1e-6, rel=1e-6)


def test_expert_parallel_degrees_are_chosen_by_their_column(tmp_path: Path) -> None:
    experts(tmp_path, moe((1, 2)))
    both = [find_profile(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B", expert_parallel=ep) for ep in (1, 2)]
    assert [p.experts.blocks[0].at.tolist() for p in both if p.experts] == [[8.0], [4.0]]
    shape = model_shape("Qwen3-30B-A3B")
    one, two = (float(expert_curve(p.experts, shape)(np.array([2048.0]))[0]) for p in both if p.experts)
    assert (one, two) == pytest.approx((moe_us(2048, 128) * 1e-6, moe_us(2048, 64) * 1e-6), rel=1e-6)
    with pytest.raises(ScenarioError, match=r"no rows with ep = 4 \(it has 1, 2\)"):
        find_profile(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B", expert_parallel=4)


def test_experts_of_one_gpu_serve_expert_parallel_groups(tmp_path: Path) -> None:
    experts(tmp_path, moe((1, 2)))
    experts(tmp_path, None, 2)
    profile = find_profile(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B", tensor_parallel=2, expert_parallel=2)
    assert profile.experts is not None and profile.experts.expert_parallel == 2
    with pytest.raises(ScenarioError, match="lacks the operator moe"):
        load_step_table(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B", tensor_parallel=2)


def test_a_model_that_contradicts_the_profile_is_refused(tmp_path: Path) -> None:
    experts(tmp_path, moe())
    profile = find_profile(tmp_path, "RTXPRO6000", "Qwen3-30B-A3B")
    with pytest.raises(ScenarioError, match=r"holds experts, but Llama-3\.1-8B has none"):
        compose(profile, model_shape(MODEL))
    dense = find_profile(flat(tmp_path / "dense"), GPU, MODEL)
    odd: ModelShape = model_shape(MODEL).model_copy(update={"heads": 25})
    with pytest.raises(ScenarioError, match=r"25 heads of Llama-3\.1-8B do not divide by tensor parallel 2"):
        compose(replace(dense, tensor_parallel=2), odd)
    with pytest.raises(ScenarioError, match="was measured in bf16, not in the fp8"):
        compose(dense, model_shape(MODEL), precision="fp8")


def test_the_summary_says_what_was_measured(tmp_path: Path) -> None:
    found = {one.operator: one for one in operators(find_profile(flat(tmp_path), GPU, MODEL))}
    assert found["qkv_proj"].part == "attention"
    assert found["qkv_proj"].ranges == (("tokens", 1.0, 2048.0, 8),)
    assert found["qkv_proj"].seconds == pytest.approx((50.3e-6, 664.4e-6))
    assert found["down_proj"].part == "ffn"
    assert found["lm_head"].ranges == (("sequences", 1.0, 256.0, 5),)
    assert [r[0] for r in found["attention, mixed"].ranges] == ["chunk", "cached", "sequences", "context"]
    assert found["attention, mixed"].holes == 0
    assert found["attention, prefill"].ranges[0] == ("chunk", 16.0, 2048.0, len(CHUNKS))
    assert found["attention, mixed"].seconds[1] == pytest.approx(1e-6 * mixed_us(2048, 4096, 64, 4096))
