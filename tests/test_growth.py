from __future__ import annotations

import numpy as np
import pytest
from factories import pool, scenario
from hypothesis import given
from hypothesis import strategies as st

from llmopt.evaluate.growth import growth, pooled
from llmopt.evaluate.margin import backlog_growth
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router

TIMES = np.linspace(100.0, 700.0, 401)


def lindley(load: float, requests: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Waiting requests of a single-server queue with Poisson arrivals (1/s) and lognormal service, from empty."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1.0, requests))
    service = load * rng.lognormal(-np.log(2) / 2, np.sqrt(np.log(2)), requests)
    start, free = np.empty(requests), 0.0
    for i, (a, s) in enumerate(zip(arrival, service, strict=True)):
        start[i] = max(a, free)
        free = start[i] + s
    times = np.linspace(0.0, arrival[-1], 401)
    return times, (np.searchsorted(arrival, times, "right") - np.searchsorted(start, times, "right")).astype(float)


@given(st.floats(-5, 5), st.floats(0, 1e4), st.floats(0.1, 100))
def test_slope_of_a_straight_line_is_exact(slope: float, level: float, rate: float) -> None:
    g = growth(TIMES, level + slope * TIMES, rate)
    assert g.slope == pytest.approx(slope, abs=1e-8)
    assert g.relative == pytest.approx(slope / rate, abs=1e-7)
    assert g.noise == pytest.approx(0.0, abs=1e-8)


def test_threshold_is_relative_to_the_arrival_rate() -> None:
    line = 0.02 * TIMES
    assert not growth(TIMES, line, scale=10.0).stable
    assert growth(TIMES, line, scale=30.0).stable
    assert growth(TIMES, line, scale=10.0, threshold=0.01).stable


@given(st.integers(2, 40), st.floats(1, 500), st.integers(0, 5))
def test_chatter_and_bursts_that_drain_are_stable(cycles: int, height: float, shift: int) -> None:
    phase = np.linspace(0, cycles, len(TIMES)) + shift / 7
    chatter = height * (np.floor(2 * phase) % 2)
    bursts = height * np.maximum(np.sin(2 * np.pi * phase * max(4, cycles) / cycles), 0.0) ** 4
    assert growth(TIMES, chatter + 50.0, 1.0).slope <= 1e-9 or cycles < 4
    assert growth(TIMES, bursts, 1.0).stable


def test_growth_under_bursts_is_seen() -> None:
    saw = 40.0 * ((TIMES / 20.0) % 1.0)
    g = growth(TIMES, saw + 0.5 * TIMES, 10.0)
    assert g.slope == pytest.approx(0.5, rel=0.05)
    assert not g.stable


def test_a_backlog_that_drains_is_stable() -> None:
    peak = np.maximum(1000.0 - 5.0 * (TIMES - 100.0), 0.0)
    g = growth(TIMES, peak, 10.0)
    assert g.stable
    assert g.slope < 0


def test_a_transient_from_empty_does_not_count_as_noise_free_growth() -> None:
    settled = 30.0 * -np.expm1(-(TIMES - 100.0) / 40.0)
    assert growth(TIMES[200:], settled[200:], 10.0).stable


@pytest.mark.parametrize("load", [0.9, 0.95, 1.05, 1.1])
def test_verdicts_of_a_queue_away_from_its_critical_rate(load: float) -> None:
    runs = [growth(*lindley(load, 12_000, seed), scale=1.0) for seed in range(12)]
    verdicts = [pooled(runs[i : i + 3]).stable for i in range(0, 12, 3)]
    assert verdicts == [load < 1] * 4


def test_slope_of_an_overloaded_queue_is_the_overload() -> None:
    runs = [growth(*lindley(1.25, 12_000, seed), scale=1.0) for seed in range(3)]
    assert pooled(runs).relative == pytest.approx(1 - 1 / 1.25, abs=0.02)


def test_noise_is_that_of_a_random_walk() -> None:
    rng = np.random.default_rng(5)
    walks = 1000.0 + np.cumsum(rng.normal(0.0, 2.0, (300, 601)), axis=1)
    noise = [growth(np.arange(601.0), walk, 1.0).noise for walk in walks]
    assert np.mean(noise) == pytest.approx(2.0 / np.sqrt(600), rel=0.05)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 samples"):
        growth(TIMES[:3], TIMES[:3], 1.0)


def test_what_drains_after_the_last_arrival_is_no_sign_of_stability() -> None:
    question = scenario([pool()], rate=80.0, horizon=400.0)
    plan = Plan("any", index_router(question))
    run = simulate(question, plan, horizon=200.0)
    assert run.requests.arrival[-1] < 200
    assert not backlog_growth(question, [run]).stable
