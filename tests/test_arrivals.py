"""Arrival processes against the moments of their gaps and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llmopt.api import at_rate
from llmopt.arrays import Floats
from llmopt.arrivals import Arrivals, ArrivalsBase, sample_arrivals
from llmopt.evaluate.fluid import arriving
from tests import factories

ADAPTER: TypeAdapter[Any] = TypeAdapter(Arrivals)


def process(**keys: Any) -> ArrivalsBase:
    made: ArrivalsBase = ADAPTER.validate_python(keys)
    return made


def sample(one: ArrivalsBase, rate: float, horizon: float, seed: int = 0) -> Floats:
    return sample_arrivals(one, rate, horizon, np.random.default_rng(seed))


@pytest.mark.parametrize("cv", [0.2, 0.7, 1.0, 2.5])
def test_gamma_gaps_have_the_mean_and_cv_asked_for(cv: float) -> None:
    gaps = np.diff(sample(process(law="gamma", cv=cv), 50.0, 4000.0))
    assert gaps.mean() == pytest.approx(0.02, rel=5 * cv / np.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_counts_scatter_as_much_as_their_mean() -> None:
    counts = np.array([len(sample(process(law="poisson"), 20.0, 10.0, seed)) for seed in range(400)])
    assert counts.mean() == pytest.approx(200, rel=0.02)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.25)


def test_bursty_gaps_start_in_the_middle_of_one() -> None:
    """A renewal process started at an arrival would count (cv^2 - 1) / 2 = 12 too many; a stationary one does not."""
    counts = np.array([len(sample(process(law="gamma", cv=5.0), 1.0, 100.0, seed)) for seed in range(1500)])
    assert abs(counts.mean() - 100.0) < 4 * counts.std() / np.sqrt(1500)


def test_deterministic_gaps_are_equal() -> None:
    times = sample(process(law="deterministic"), 4.0, 10.0)
    assert len(times) == 40
    assert np.diff(times) == pytest.approx(np.full(39, 0.25))


def test_piecewise_rates_follow_their_factors() -> None:
    one = process(law="piecewise", times=[0.0, 10.0, 30.0], factors=[1.0, 4.0, 0.0], period=40.0)
    times = sample(one, 100.0, 400.0) % 40.0
    counts = np.histogram(times, [0, 10, 30, 40])[0]
    assert counts[2] == 0
    assert counts[1] / counts[0] == pytest.approx(8.0, rel=0.1)


def test_only_ratios_of_factors_matter() -> None:
    a = process(law="piecewise", times=[0.0, 5.0], factors=[1.0, 3.0], period=10.0)
    b = process(law="piecewise", times=[0.0, 5.0], factors=[10.0, 30.0], period=10.0)
    assert (sample(a, 7.0, 100.0) == sample(b, 7.0, 100.0)).all()


def test_bursts_keep_the_mean_and_start_calm() -> None:
    one = process(law="bursts", on=10.0, off=40.0, floor=0.25)
    times = sample(one, 40.0, 5000.0)
    assert len(times) == pytest.approx(200_000, rel=0.01)
    calm = np.sum(times % 50.0 < 40.0) / 4000.0
    assert calm == pytest.approx(10.0, rel=0.05)
    assert np.sum(times % 50.0 >= 40.0) / 1000.0 == pytest.approx(160.0, rel=0.05)


@pytest.mark.parametrize(("cv", "seeds"), [(0.0, 1), (1.0, 400)])
def test_batches_come_whole_and_keep_the_mean_rate(cv: float, seeds: int) -> None:
    """Equal gaps start in the middle of one; counts of Poisson batches have variance size x mean."""
    one = process(law="batches", size=8, cv=cv)
    samples = [sample(one, 4.0, 50.0, seed) for seed in range(seeds)]
    for times in samples:
        assert (np.unique(times, return_counts=True)[1] == 8).all()
    counts = np.array([len(times) for times in samples])
    assert abs(counts.mean() - 200.0) <= 4 * np.sqrt(8 * 200.0 / seeds) * cv
    if cv == 0:
        assert np.unique(samples[0]) == pytest.approx(1.0 + 2.0 * np.arange(25))
    else:
        assert counts.var() / counts.mean() == pytest.approx(8.0, rel=0.3)


@pytest.mark.parametrize(("rate", "horizon", "count"), [(1.0, 50.0, 50), (0.3, 50.0, 15), (12.5, 4.0, 50)])
def test_together_brings_all_of_a_run_at_time_0(rate: float, horizon: float, count: int) -> None:
    times = sample(process(law="together"), rate, horizon)
    assert times.tolist() == [0.0] * count


def test_the_fluid_model_sees_a_crowd_that_has_come_together_at_once() -> None:
    scenario = factories.scenario([factories.pool()], rate=3.0, arrivals={"law": "together"}, horizon=100.0)
    table = arriving(scenario, 100.0)
    assert table.sum() == pytest.approx(300.0)
    assert table[: len(table) // 500].sum() == pytest.approx(300.0)
    assert at_rate(scenario, 6.0).workload.sample(100.0, 1).arrival.tolist() == [0.0] * 600


PROCESSES = st.one_of(
    st.just({"law": "poisson"}),
    st.just({"law": "together"}),
    st.builds(lambda size, cv: {"law": "batches", "size": size, "cv": cv}, st.integers(1, 40), st.floats(0, 3)),
    st.just({"law": "deterministic"}),
    st.builds(lambda cv: {"law": "gamma", "cv": cv}, st.floats(0.05, 4.0)),
    st.builds(
        lambda on, off, floor, cv: {"law": "bursts", "on": on, "off": off, "floor": floor, "cv": cv},
        st.floats(0.5, 20),
        st.floats(0.5, 20),
        st.floats(0, 1),
        st.floats(0, 3),
    ),
    st.builds(
        lambda f, cv, period: {
            "law": "piecewise",
            "times": [7.0 * i for i in range(len(f))],
            "factors": f,
            "cv": cv,
            "period": 7.0 * len(f) if period else None,
        },
        st.lists(st.just(0.0) | st.floats(1e-6, 5.0), min_size=1, max_size=5).filter(lambda f: max(f) > 0.01),
        st.floats(0, 3),
        st.booleans(),
    ),
)


@given(keys=PROCESSES, rate=st.floats(0.5, 30.0), horizon=st.floats(1.0, 60.0), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_samples_are_sorted_inside_the_horizon_and_repeatable(
    keys: dict[str, Any], rate: float, horizon: float, seed: int
) -> None:
    one = process(**keys)
    times = sample(one, rate, horizon, seed)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < horizon)).all()
    assert times.tobytes() == sample(one, rate, horizon, seed).tobytes()


@given(keys=PROCESSES, horizon=st.sampled_from([35.0, 70.0]))
@settings(max_examples=60, deadline=None)
def test_profiles_average_to_one_over_whole_periods(keys: dict[str, Any], horizon: float) -> None:
    one = process(**keys)
    period = keys.get("period") or (keys["on"] + keys["off"] if keys["law"] == "bursts" else None)
    end = 10 * period if period else horizon
    starts, factors = one.profile(end)
    stay = np.diff(np.append(np.minimum(starts, end), end))
    assert starts[0] == 0
    assert factors @ stay / end == pytest.approx(1.0) or not factors @ stay


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"law": "gamma", "cv": 0.0}, "greater than 0"),
        ({"law": "piecewise", "times": [0.0, 5.0], "factors": [1.0]}, "2 times but 1 factors"),
        ({"law": "piecewise", "times": [1.0], "factors": [1.0]}, "start at 0"),
        ({"law": "piecewise", "times": [0.0, 0.0], "factors": [1.0, 1.0]}, "increase strictly"),
        ({"law": "piecewise", "times": [0.0, 5.0], "factors": [1.0, 1.0], "period": 5.0}, "before the last time"),
        ({"law": "piecewise", "times": [0.0], "factors": [0.0]}, "all zero"),
        ({"law": "bursts", "on": 0.0, "off": 5.0}, "greater than 0"),
        ({"law": "batches", "size": 0}, "greater than or equal to 1"),
        ({"law": "replay", "time_scale": -1.0}, "greater than 0"),
    ],
)
def test_impossible_processes_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        process(**keys)


def test_a_factor_that_scaling_would_blow_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a factor of 1e-300 beside one of 1; write 0 for none at all"):
        process(law="piecewise", times=[0.0, 7.0, 14.0], factors=[0.0, 1e-300, 1.0])
