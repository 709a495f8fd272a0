"""Published profiles: that every one is read, and steps composed of them against independent measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import RegularGridInterpolator, interp1d

from llmopt.profiles import find_profile, load_step_table, operators, read_distserve, read_profile
from llmopt.profiles.grids import behind_context, pivot
from llmopt.steptable import StepTable

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture
def data(shared: Path) -> Path:
    return shared / "data"


def prefill(table: StepTable, tokens: int) -> float:
    return table(tokens, 0, 0, tokens**2 / 2)


def step_by_hand(data: Path, gpu: str, steps: np.ndarray) -> np.ndarray:
    """Seconds of steps (n, 4) of (chunk, cached, sequences, context), straight from the files with pandas and scipy."""
    stem = data / "vllm-runs" / "profiles" / f"{gpu}_Llama-3.1-8B_tp1_"
    chunk, _, batch, _ = steps.T
    total = np.zeros(len(steps))
    for name, times in pd.read_csv(f"{stem}dense.csv").groupby("layer"):
        count = {"embedding": 1, "final_layernorm": 1, "layernorm": 64}.get(str(name), 32)
        total += count * interp1d(times.tokens, times.time_us)(chunk + batch)
    for _, times in pd.read_csv(f"{stem}per_sequence.csv").groupby("layer"):
        total += interp1d(times.sequences, times.time_us)(batch + (chunk > 0))
    rows = pd.read_csv(f"{stem}attention.csv")
    pure = rows[rows.prefill_chunk == 0].pivot(index="n_decode", columns="kv_decode", values="time_us")
    alone = rows[rows.n_decode == 0].pivot(index="prefill_chunk", columns="kv_prefill", values="time_us")
    both = rows[(rows.n_decode > 0) & (rows.prefill_chunk > 0)]
    columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    axes = [np.sort(both[column].unique()) for column in columns]
    mixed = both.set_index(columns).time_us.reindex(pd.MultiIndex.from_product(axes)).to_numpy()
    mixed = mixed.reshape([len(axis) for axis in axes])
    fresh = np.repeat(alone.to_numpy()[:, :, None, None], len(axes[3]), axis=3)
    joint = RegularGridInterpolator(
        (axes[0], axes[1], np.append(0, axes[2]), axes[3]), np.concatenate([fresh, mixed], axis=2)
    )
    decode = RegularGridInterpolator((pure.index, pure.columns), pure.to_numpy())
    for i in range(len(steps)):
        total[i] += 32 * (joint(steps[i])[0] if chunk[i] else decode(steps[i, 2:])[0])
    return total * 1e-6


def test_the_rtx_4090_profile_against_a_program_written_by_hand(data: Path) -> None:
    rng = np.random.default_rng(11)
    steps = np.column_stack(
        [
            rng.integers(16, 1900, 200),
            rng.uniform(0, 16384, 200),
            rng.integers(1, 128, 200),
            rng.uniform(16, 16384, 200),
        ]
    )
    steps[::2, :2] = 0
    table = load_step_table(data / "vllm-runs", "NVIDIA GeForce RTX 4090", "meta-llama/Llama-3.1-8B")
    chunk, cached, batch, context = steps.T
    features = np.column_stack([chunk, batch, batch * context, chunk * (cached + chunk / 2)])
    assert table.many(features) == pytest.approx(step_by_hand(data, "RTX4090", steps), rel=1e-9)
    assert table.covers(features).all()
    assert table.notes == ()


def test_two_steps_of_the_rtx_4090(data: Path) -> None:
    table = load_step_table(data / "vllm-runs", "RTX4090", "Llama-3.1-8B")
    # a prefill of 2048 tokens and a decode step of one sequence at context 2370, from a prototype that met the run
    assert prefill(table, 2048) == pytest.approx(0.193, rel=0.01)
    assert table(decode=1, kv=2370) == pytest.approx(0.0170, rel=0.01)


def test_extrapolation_beyond_the_profile_is_no_cliff(data: Path) -> None:
    for gpu in ("RTX4090", "RTXPRO6000"):
        table = load_step_table(data / "vllm-runs", gpu, "Llama-3.1-8B")
        # twice the tokens: twice the products, and four times the pairs
        assert 2.0 < prefill(table, 4096) / prefill(table, 2048) < 2.2
        assert not table.covers(np.array([[4096.0, 0, 0, 4096**2 / 2]]))[0]


def test_the_holes_of_the_rtx_pro_6000_are_counted(data: Path) -> None:
    profile = find_profile(data / "vllm-runs", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "Llama-3.1-8B")
    assert profile.mixed is not None
    assert profile.mixed.filled == pytest.approx(0.67, abs=0.01)
    assert profile.mixed.extended == 0


# Llama-2-70B on two GPUs, measured end to end by splitwise-sim (perf_model.csv, medians at batch 1)
A100_MEASURED = {128: 0.081, 1024: 0.377, 4096: 1.485}
H100_MEASURED = {128: 0.048, 1024: 0.158, 4096: 0.643}


def test_llama_2_70b_on_two_a100_from_kernels_and_all_reduces(data: Path) -> None:
    table = load_step_table(data / "vidur", "A100-80GB", "meta-llama/Llama-2-70b-hf", tensor_parallel=2)
    off = {n: prefill(table, n) / seconds - 1 for n, seconds in A100_MEASURED.items()}
    assert off[128] == pytest.approx(-0.10, abs=0.02)  # the engine's host, which no kernel profile holds
    assert off[1024] == pytest.approx(0.04, abs=0.02)
    assert off[4096] == pytest.approx(0.02, abs=0.02)
    assert table(decode=1, kv=1024) == pytest.approx(0.0548, rel=0.03)
    assert not any("all-reduce" in note for note in table.notes)


def test_llama_2_70b_on_two_h100_with_attention_from_elsewhere(data: Path) -> None:
    pytest.importorskip("pyarrow")
    table = load_step_table(data, "H100", "Llama-2-70B", tensor_parallel=2)
    assert any(note.startswith("attention: not in these files") for note in table.notes)
    # the kernels are newer than the measured engine, which ran the H100 a fifth to a quarter slower
    for n, seconds in H100_MEASURED.items():
        assert -0.28 < prefill(table, n) / seconds - 1 < -0.15
    assert table(decode=1, kv=1024) == pytest.approx(0.0374 * 0.75, rel=0.03)


def test_kernel_tables_of_the_a100_are_within_a_quarter(data: Path) -> None:
    pytest.importorskip("pyarrow")
    table = load_step_table(data / "aiconfigurator", "A100", "Llama-2-70B", tensor_parallel=2)
    for n, seconds in A100_MEASURED.items():
        assert -0.28 < prefill(table, n) / seconds - 1 < -0.15
    assert table(decode=1, kv=1024) == pytest.approx(0.0548 * 0.90, rel=0.03)


def test_sizes_of_transfers_are_bytes(data: Path) -> None:
    for gpu, bandwidth in (("A100", 3e11), ("H100", 4.5e11)):
        for gpus in (2, 8):
            profile = find_profile(data / "vidur", gpu, "Llama-2-70B", tensor_parallel=gpus) if gpu == "H100" else None
            if profile is None:
                profile = find_profile(data / "vidur", gpu, "Llama-3-8B", tensor_parallel=gpus)
            assert profile.all_reduce is not None
            # NVLink's rate in one direction bounds a ring, and NCCL reaches more than a quarter of it
            moved = 2 * (gpus - 1) / gpus * 2**26 / float(profile.all_reduce(np.array([2.0**26]))[0])
            assert 0.25 < moved / bandwidth < 1


def test_frontiers_profiles_are_read_at_every_degree(data: Path) -> None:
    dense = find_profile(data / "frontier", "A800", "Llama-2-7B")
    assert "writing the KV cache" in dense.notes[0]
    assert load_step_table(data / "frontier", "A800", "Llama-2-7B")(decode=1, kv=512) > 0
    for degree in (1, 2, 4, 8):
        profile = read_profile(data / "frontier", model="Qwen3-30B-A3B", tensor_parallel=degree)
        names = {one.operator for one in operators(profile)}
        assert {"moe_grouped_gemm", "moe_gating_linear", "attention, prefill", "attention, decode"} <= names
    # in the few mixed steps measured, attention took more than the sum of its parts
    assert "0.59 to 0.78" in profile.notes[-1]


def test_vidurs_products_are_read_at_every_degree(data: Path) -> None:
    for gpu, model in (("A40", "Llama-2-7B"), ("A100", "Llama-3-8B"), ("A100", "Llama-2-70B"), ("H100", "Llama-2-70B")):
        for degree in (1, 2, 4, 8):
            if (gpu, model) != ("A100", "Llama-2-70B") or degree == 2:
                assert "gate_up_proj" in find_profile(data / "vidur", gpu, model, tensor_parallel=degree).tokens


def test_distserves_fits_are_read(data: Path) -> None:
    folder = data / "distserve"
    # OPT-13B on one A100: a prompt of 512 tokens in 18.1 + 52.2 + 1.9 ms, 64 decodes at 500 in 19.9 + 20.1 + 2.5 ms
    steps = read_distserve(folder / "profiler-a100-80g.distserve.json", "facebook/opt-13b")
    assert steps.prefill.base + 512 * steps.prefill.prefill + 512**2 / 2 * steps.prefill.pairs == pytest.approx(
        0.0721, rel=0.01
    )
    assert steps.small.base + 32_000 * steps.small.kv + 64 * steps.small.decode == pytest.approx(0.0425, rel=0.01)
    for degree in (2, 3, 4, 8):
        read_distserve(folder / "profiler-a100-80g.distserve.json", "OPT-66B", degree)
    assert "negative" in read_distserve(folder / "profiler-a100-80g.vllm.json", "OPT-66B", 2).notes[0]


def test_long_contexts_are_foretold_from_short_ones(data: Path) -> None:
    """Half of what was measured behind cached context, left out and extrapolated."""
    rows = pd.read_csv(data / "vidur" / "a100_llama2-70b_tp2_attention_2024-05.csv")
    rows = rows[rows.is_prefill]
    columns = [rows.prefill_chunk_size.to_numpy(dtype=float), rows.kv_cache_size.to_numpy(dtype=float)]
    axes, table = pivot(columns, rows["time_stats.attn_prefill.median"].to_numpy())
    chunk, cached = np.meshgrid(*axes, indexing="ij")
    hidden = (chunk + cached > 2048) & (cached > 0)
    grid = behind_context(axes, np.where(hidden, np.nan, table))
    off = (grid.seconds / table - 1)[hidden & np.isfinite(table)]
    assert np.abs(off).mean() < 0.03
    assert np.abs(np.percentile(off, [5, 95])).max() < 0.06


def last_alone(data: Path, gpu: str) -> tuple[float, float]:
    """Seconds between the end of the last but one request of a run and the last, and the last one's context then."""
    lines = (data / "vllm-runs" / f"{gpu}_Llama-3.1-8B" / "requests.jsonl").read_text().splitlines()
    ends = pd.DataFrame([json.loads(line) for line in lines]).sort_values("last_token_ts")
    alone, last = float(ends.last_token_ts.diff().iloc[-1]), ends.iloc[-1]
    return alone, float(last.input_toks + last.output_toks)


@pytest.mark.parametrize(("gpu", "count"), [("RTX4090", 25), ("RTXPRO6000", 151)])
def test_the_last_request_of_a_run_decodes_alone(data: Path, gpu: str, count: int) -> None:
    table = load_step_table(data / "vllm-runs", gpu, "Llama-3.1-8B")
    alone, context = last_alone(data, gpu)
    # each of its last steps gives one token; the count that is nearest is off by less than half a step
    steps = sum(table(decode=1, kv=context - k) for k in range(1, count + 1))
    assert steps == pytest.approx(alone, rel=0.01)
