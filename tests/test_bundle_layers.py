"""Leaps over layers in the bundle simulator: against the naive one, which plays all layers; and that they happen."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import oracle_bundle as oracle
import pytest

from llmopt.bundle import Bundle
from llmopt.evaluate import bundle_kernel
from llmopt.evaluate.bundle_run import play_bundle

PIPELINES = [*product(("non-blocking", "attention-blocking", "blocking"), (1, 2, 3, 4))]


def bundle_of(pipeline: str, micro_batches: int, layers: int, ffn: float, hop: float) -> Bundle:
    """Attention takes 1 ms, and as much again for 1000 KV tokens; FFN and hop take their parts of 1 ms."""
    stages = {
        "attention": [{"base": 1e-3, "kv": 1e-6}],
        "ffn": [{"base": 1e-3 * ffn}],
        "transfer": [{"base": 1e-3 * hop}],
    }
    known: dict[str, Any] = {"pipeline": pipeline, "micro_batches": micro_batches, "layers": layers, "batch": 1}
    return Bundle.model_validate({**stages, **known, "kv_capacity": 10_000})


@pytest.mark.parametrize(("pipeline", "micro_batches"), PIPELINES)
def test_many_layers_play_like_the_naive_simulator(pipeline: str, micro_batches: int) -> None:
    """Workers that are nearly tied or far apart, lead by turns, and need many layers to catch up with each other."""
    rng = np.random.default_rng(micro_batches)
    for spread in (0.0, 1e-10, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        stages = float(rng.choice([0.01, 0.2, 0.7, 1.2])), float(rng.choice([0.0, 0.01, 0.2, 0.5]))
        bundle = bundle_of(pipeline, micro_batches, int(rng.integers(20, 80)), *stages)
        shape = micro_batches, 4, int(rng.integers(2, 7))
        series = 1000 * spread * (rng.random(shape) if rng.random() < 0.5 else rng.choice([0.0, 0.3, 0.5, 1.0], shape))
        naive, run = oracle.play(bundle, series.tolist(), shape[2], 1), play_bundle(bundle, series)
        assert run.makespan[-1] == pytest.approx(naive.makespan, rel=1e-12)
        assert run.tpot_p99[-1] == pytest.approx(np.quantile(naive.gaps, 0.99), rel=1e-12)


@pytest.mark.parametrize(("pipeline", "micro_batches"), PIPELINES)
@pytest.mark.parametrize(("ffn", "most"), [(0.1, 15), (1.3, 15), (5.0, 5)])
def test_few_of_many_layers_are_played(
    pipeline: str, micro_batches: int, ffn: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 61 in each of 5 steps for each of 1..8 workers, though no worker's loads in two steps have to do with another.

    With one FFN server that is always busy, three layers, one after a leap, and a first one to settle.
    """
    bundle = bundle_of(pipeline, micro_batches, 61, ffn, 0.2)
    series = np.random.default_rng(1).normal(1000.0, 100.0, (micro_batches, 5, 8))
    space, played = bundle_kernel.plain().__globals__, []
    layer = space["play_layer"]
    monkeypatch.setitem(space, "play_layer", lambda *args: played.append(layer(*args)))
    play_bundle(bundle, series, core="python")
    assert len(played) < most * 5 * 8


def test_foresight_is_what_the_recurrence_comes_to_while_the_core_moves_evenly() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        micro_batches, workers, leap, send = *(int(n) for n in rng.integers(1, 6, 3)), float(rng.choice([0.0, 0.3]))
        times = bundle_kernel.Times(rng.random((micro_batches, 1, workers)), 0.0, 0.0, send, 0.0)
        state = bundle_kernel.State(3 * rng.random(workers), 2 * rng.random(micro_batches + 1))
        saved, move, spare = (
            bundle_kernel.State(*np.zeros((2, 1))),
            2 * rng.random(micro_batches + 1),
            np.zeros((2, workers)),
        )
        free = state.workers.tolist()
        core = state.core.copy()
        for layer, m, j in product(range(leap), range(micro_batches), range(workers)):
            free[j] = max(free[j], core[m] + layer * move[m]) + times.attention[m, 0, j] + send
        bundle_kernel.foresee(times, 0, leap, state, bundle_kernel.Space(saved, move, move, *spare))
        assert state.workers == pytest.approx(np.array(free), rel=1e-12)
        assert state.core == pytest.approx(core + leap * move, rel=1e-12)
