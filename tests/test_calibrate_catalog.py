"""Fitted catalog entries: what the published files give, and what others measured on the same machines."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from benchmarks.catalog_fits import ENTRIES, catalog_file
from llmopt.catalog import catalog_entry, catalog_names
from llmopt.hardware import Piece, StepTime
from llmopt.reading import load_scenario

STATED = {"a100-llama31-8b", "h100-llama31-8b", "nie-a100-llama3-8b"}
"""Entries that rest on data sheets or on a publication, not on measurements at hand."""


def stepper(name: str) -> StepTime:
    return StepTime.from_pieces(tuple(Piece.model_validate(piece) for piece in catalog_entry(name).pool["step_time"]))


def test_every_entry_is_fitted_by_the_script_or_stated() -> None:
    assert {name for name in catalog_names() if not name.startswith("afd-")} == {*ENTRIES, *STATED}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_what_the_script_gives(name: str, shared: Path) -> None:
    """All constants and errors to the printed digits."""
    text = ENTRIES[name](shared / "data")
    assert tomllib.loads(text) == tomllib.loads(catalog_file(name).read_text())
    assert text == catalog_file(name).read_text()


def test_two_a100_run_llama_70b_as_splitwise_measured_it() -> None:
    """The entry is fitted to Vidur's kernels; Splitwise timed whole requests on two A100: 81, 377, 1485 and 54.8 ms."""
    step = stepper("a100-tp2-llama2-70b")
    assert step(prefill=128, pairs=128**2 / 2) == pytest.approx(0.081, rel=0.06)
    assert step(prefill=1024, pairs=1024**2 / 2) == pytest.approx(0.377, rel=0.04)
    halves = sum(step(prefill=2048, pairs=2048 * (cached + 1024)) for cached in (0, 2048))
    assert halves == pytest.approx(1.485, rel=0.06)
    assert step(decode=1, kv=1024 + 64) == pytest.approx(0.0548, rel=0.03)


def test_two_h100_run_llama_70b_as_splitwise_measured_it() -> None:
    """Measured: 48, 158 and 643 ms for prompts of 128, 1024 and 4096, and 37.4 ms a token."""
    step = stepper("h100-tp2-llama2-70b")
    assert step(prefill=1024, pairs=1024**2 / 2) == pytest.approx(0.158, rel=0.03)
    halves = sum(step(prefill=2048, pairs=2048 * (cached + 1024)) for cached in (0, 2048))
    assert halves == pytest.approx(0.643, rel=0.06)
    assert step(decode=1, kv=1024 + 64) == pytest.approx(0.0374, rel=0.02)


def test_two_measurements_of_one_a100_agree_on_decode_and_not_on_prefill() -> None:
    """Vidur's and aiconfigurator's kernels of the same shapes: decode within 15 %, prefill 15 to 45 % apart."""
    one, other = stepper("a100-llama3-8b"), stepper("a100-sxm-llama31-8b")
    for batch in (1, 32, 128):
        assert one(decode=batch, kv=1000 * batch) == pytest.approx(other(decode=batch, kv=1000 * batch), rel=0.15)
    ratio = one(prefill=2048, pairs=2048**2 / 2) / other(prefill=2048, pairs=2048**2 / 2)
    assert 1.15 < ratio < 1.45


def test_another_preemption_mode_takes_the_constants_without_the_cache(tmp_path: Path) -> None:
    laws = 'prompt = { law = "constant", value = 800 }, output = { law = "constant", value = 100 }'
    text = f'workload = {{ rate = 1.0, classes = [{{ name = "all", share = 1.0, {laws} }}] }}\n'
    for mode, cached in (("recompute", True), ("swap", False)):
        own = f'catalog = "rtx4090-llama31-8b", preemption = "{mode}"'
        (tmp_path / "s.toml").write_text(text + f'pools = [{{ name = "p", replicas = 1, {own} }}]')
        pool = load_scenario(tmp_path / "s.toml").pools[0]
        assert (pool.preemption, pool.prefix_caching, pool.async_scheduling) == (mode, cached, True)
