"""Experts divided among data-parallel engines: the block at the tokens of all of them, and the exchange around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from profile_files import DENSE, step_us, tables

from llmopt.errors import ScenarioError
from llmopt.machines import accelerator, model_shape
from llmopt.machines.roofline import LINK_EFFICIENCY
from llmopt.profiles import compose, find_profile, load_step_table
from llmopt.steptable import StepTable

GPU, MODEL = "RTXPRO6000", "Qwen3-30B-A3B"
FFN = ("gate_up_proj", "act_fn", "down_proj")
OWN = 2048 * 2
"""Bytes of a token: the hidden size in half precision."""


def block_us(tokens: float) -> float:
    """The expert block whatever the experts that are activated."""
    return 120.0 + 0.4 * tokens


def folder(path: Path, last: int = 4096, tensor_parallel: int = 1) -> Path:
    rows = [(2 * tensor_parallel, t, a, block_us(t)) for t in (1, 2, 8, 64, 512, last) for a in (4, 64)]
    rows += [(1, t, a, block_us(t)) for t in (1, 2, 8, 64, 512, last) for a in (8, 128)]
    moe = pd.DataFrame(rows, columns=["ep", "tokens", "activated_experts", "time_us"])
    some = tables(extra={"qk_norm": (3.0, 0.02)}, without=FFN)
    return replace(some, moe=moe).write(path, f"{GPU}_{MODEL}_tp{tensor_parallel}_")


def load(path: Path, engines: int = 2, tensor_parallel: int = 1) -> StepTable:
    degree = tensor_parallel * engines
    settings = {"tensor_parallel": tensor_parallel, "data_parallel": engines, "expert_parallel": degree}
    return load_step_table(path, GPU, MODEL, **settings)  # type: ignore[arg-type]


def expected_us(tokens: int, engines: int) -> float:
    """Everything but transfers of a decode step, in closed form."""
    dense = step_us(48, 0, 0, tokens, 256) - 48 * sum(DENSE[n][0] + DENSE[n][1] * tokens for n in FFN)
    return dense + 48 * (3.0 + 0.02 * tokens) + 48 * block_us(engines * tokens)


def ring_us(size: float, gpus: int) -> float:
    """All-gather and reduce-scatter of `size` bytes in all, by the link of the catalog."""
    chip = accelerator(GPU)
    return 2 * (gpus - 1) * (chip.link_latency + size / gpus / (LINK_EFFICIENCY * chip.link_bandwidth)) * 1e6


@pytest.mark.parametrize("tokens", [1, 3, 16, 200, 256])
def test_the_experts_serve_the_tokens_of_all_engines(tmp_path: Path, tokens: int) -> None:
    table = load(folder(tmp_path))
    expected = expected_us(tokens, 2) + 48 * ring_us(2 * tokens * OWN, 2)
    assert table(0, tokens, tokens * 256) == pytest.approx(expected * 1e-6, rel=1e-9)
    assert table.ends[0] == 2048
    notes = " ".join(table.notes)
    assert "lockstep" in notes and "reduce-scatter around the experts: not measured" in notes
    assert "extrapolated beyond" not in notes


def test_with_tensor_parallelism_all_gpus_exchange(tmp_path: Path) -> None:
    table = load(folder(tmp_path, tensor_parallel=2), tensor_parallel=2)
    transfers = 48 * (2 * ring_us(64 * OWN, 2) + ring_us(128 * OWN, 4))
    assert table(0, 64, 64 * 256) == pytest.approx((expected_us(64, 2) + transfers) * 1e-6, rel=1e-9)


@pytest.mark.parametrize("engines", [2, 16])
def test_a_short_expert_table_cuts_off_no_step(tmp_path: Path, engines: int) -> None:
    """The block goes on along its trend, and the table says from where on."""
    path = folder(tmp_path, last=1024)
    profile = find_profile(path, GPU, MODEL, expert_parallel=2)
    shape = model_shape(MODEL)
    table = compose(profile, shape, accelerator(GPU), data_parallel=engines)
    expected = expected_us(200, engines) + 48 * ring_us(engines * 200 * OWN, engines)
    assert table(0, 200, 200 * 256) == pytest.approx(expected * 1e-6, rel=1e-9)
    assert table.ends[0] == 1024 / engines and table.tokens[-2] == 2048
    assert "extrapolated beyond 1024 tokens of all engines" in " ".join(table.notes)


def test_a_measured_exchange_comes_before_the_link(tmp_path: Path) -> None:
    sizes = [4096, 65536, 1048576]
    samples = [{"collective": "all_gather", "bytes": n, "us": 10.0 + 3e-5 * n} for n in sizes]
    samples += [{"collective": "reduce_scatter", "bytes": n, "us": 8.0 + 4e-5 * n} for n in sizes]
    data = {"hardware": GPU, "measured": {"interconnect": {"npus": 2, "samples": samples}}}
    folder(tmp_path)
    (tmp_path / GPU).mkdir()
    (tmp_path / GPU / "hardware.yaml").write_text(yaml.safe_dump(data))
    table = load(tmp_path)
    expected = expected_us(64, 2) + 48 * (18.0 + 7e-5 * 64 * OWN)
    assert table(0, 64, 64 * 256) == pytest.approx(expected * 1e-6, rel=1e-9)
    assert "lockstep" in " ".join(table.notes) and "reduce-scatter" not in " ".join(table.notes)


def test_engines_that_share_no_experts_are_as_one(tmp_path: Path) -> None:
    path = folder(tmp_path)
    alone = load_step_table(path, GPU, MODEL)
    assert load_step_table(path, GPU, MODEL, data_parallel=4).content() == alone.content()
    assert load(path, engines=1).content() == alone.content()
    tables().write(tmp_path / "dense", "RTX4090_Llama-3.1-8B_tp1_")
    dense = load_step_table(tmp_path / "dense", "RTX4090", "Llama-3.1-8B")
    many = load_step_table(tmp_path / "dense", "RTX4090", "Llama-3.1-8B", data_parallel=2, expert_parallel=2)
    assert many.content() == dense.content()


def test_what_cannot_be_exchanged_is_refused(tmp_path: Path) -> None:
    profile = find_profile(folder(tmp_path), GPU, MODEL, expert_parallel=2)
    with pytest.raises(ScenarioError, match="no all-gather and reduce-scatter among 2 GPUs and no link"):
        compose(profile, model_shape(MODEL), data_parallel=2)
    with pytest.raises(ScenarioError, match="data_parallel = 0 is no number of engines"):
        compose(profile, model_shape(MODEL), data_parallel=0)
    assert np.isfinite(compose(profile, model_shape(MODEL)).token_time).all()
