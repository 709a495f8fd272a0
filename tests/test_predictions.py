"""Predictions of output lengths, each against what its law says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import pool, request_class, scenario
from hypothesis import given
from hypothesis import strategies as st

from llmopt import load_scenario
from llmopt.errors import PolicyError, ScenarioError
from llmopt.predictions import (
    ORACLE,
    Buckets,
    ClassMean,
    Interval,
    Noise,
    Predicted,
    PredictorBase,
    Quantile,
    Unknown,
    check_predicted,
    luck,
)
from llmopt.workload import Pairs, Requests

SHORT = request_class("short", share=0.5) | {"output": {"law": "uniform", "low": 1, "high": 60}}
LONG = request_class("long", share=0.5) | {"output": {"law": "geometric", "mean": 80.0, "max": 900}}
CLASSES = scenario([pool()], [SHORT, LONG]).workload.classes
ROOM = 4000


def drawn(n: int, seed: int = 1) -> Requests:
    rng = np.random.default_rng(seed)
    cls = rng.integers(0, 2, n)
    output = np.where(cls == 0, CLASSES[0].output.sample(rng.random(n)), CLASSES[1].output.sample(rng.random(n)))
    prompt = rng.integers(1, 200, n)
    return Requests(np.arange(n) * 0.1, prompt, output.astype(np.int64), cls, rng.random(n))


MANY = drawn(40_000)
PREDICTORS = st.one_of(
    st.just(ORACLE),
    st.builds(Noise, law=st.just("noise"), sigma=st.floats(0, 10), factor=st.floats(0.001, 1000)),
    st.builds(Interval, law=st.just("interval"), factor=st.floats(1, 1e6)),
    st.builds(Quantile, law=st.just("quantile"), q=st.floats(0, 1)),
    st.sets(st.integers(1, 1000), min_size=1).map(lambda edges: Buckets(law="buckets", edges=tuple(sorted(edges)))),
    st.just(ClassMean(law="class-mean")),
    st.just(Unknown(law="none")),
)


@given(predictor=PREDICTORS, room=st.integers(260, 5000), seed=st.integers(0, 1000))
def test_predictions_are_whole_and_fit_beside_the_prompt(predictor: PredictorBase, room: int, seed: int) -> None:
    requests = drawn(50, seed)
    predicted = predictor.predict(requests, CLASSES, room)
    check_predicted(predicted, requests, room, "any")
    point, low, high = predicted
    assert (
        (low >= 1).all() and (low <= point).all() and (point <= high).all() and (high <= room - requests.prompt).all()
    )


def test_an_oracle_predicts_the_truth() -> None:
    for values in ORACLE.predict(MANY, CLASSES, ROOM):
        assert np.array_equal(values, MANY.output)


@given(factor=st.floats(1, 1e6))
def test_an_interval_holds_the_truth_and_is_no_wider_than_it_says(factor: float) -> None:
    point, low, high = Interval(law="interval", factor=factor).predict(MANY, CLASSES, ROOM)
    assert (low <= MANY.output).all() and (MANY.output <= high).all()
    assert (high <= np.maximum(factor * low, MANY.output) * (1 + 1e-9)).all()
    free = high < ROOM - MANY.prompt
    assert (np.abs(point - np.sqrt(low * high))[free] <= 0.5 + 1e-9).all()


def test_the_truth_lies_anywhere_in_its_interval() -> None:
    """log(o / low) / log(factor) is the uniform place, but for whole tokens."""
    _, low, _ = Interval(law="interval", factor=8.0).predict(MANY, CLASSES, ROOM)
    large = MANY.output > 200
    place = np.log(MANY.output[large] / low[large]) / np.log(8.0)
    assert np.quantile(place, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.04)


@pytest.mark.parametrize(("sigma", "factor"), [(0.5, 1.0), (1.0, 0.5)])
def test_noise_is_lognormal(sigma: float, factor: float) -> None:
    """Quantiles of the normal at 2.5, 16, 50, 84 and 97.5 per cent, on large outputs."""
    big = Requests(MANY.arrival, MANY.prompt, np.full(len(MANY), 10**6), MANY.cls, MANY.u)
    point, low, high = Noise(law="noise", sigma=sigma, factor=factor).predict(big, CLASSES, 10**9)
    error = (np.log(point / 10**6) - np.log(factor)) / sigma
    quantiles = np.quantile(error, [0.025, 0.158655, 0.5, 0.841345, 0.975])
    assert quantiles == pytest.approx([-1.96, -1.0, 0.0, 1.0, 1.96], abs=0.04)
    assert np.log(high / point) == pytest.approx(2 * sigma, abs=1e-3)
    assert np.log(point / low) == pytest.approx(2 * sigma, abs=1e-3)


def test_every_error_level_sees_the_same_luck() -> None:
    """Who is over-estimated at one sigma is at every other, by more where sigma is larger."""
    points = [Noise(law="noise", sigma=s).predict(MANY, CLASSES, 10**9).point for s in (0.0, 0.3, 0.9, 2.0)]
    assert np.array_equal(points[0], MANY.output)
    for below, above in pairwise(points):
        over = points[-1] > MANY.output
        assert (above[over] >= below[over]).all()
        assert (above[~over] <= below[~over]).all()
    again = Noise(law="noise", sigma=0.9).predict(drawn(40_000), CLASSES, 10**9).point
    assert np.array_equal(again, points[2])


def test_buckets_end_where_the_next_begins() -> None:
    outputs = np.array([1, 9, 10, 49, 50, 60, 60])
    requests = Requests(np.zeros(7), np.ones(7, np.int64), outputs, np.array([0, 0, 0, 0, 0, 0, 1]), np.full(7, 0.5))
    point, low, high = Buckets(law="buckets", edges=(10, 50)).predict(requests, CLASSES, ROOM)
    assert low.tolist() == [1, 1, 10, 10, 50, 50, 50]
    assert high.tolist() == [9, 9, 49, 49, 60, 60, 900]
    assert point.tolist() == [5, 5, 30, 30, 55, 55, 475]
    from_one = Buckets(law="buckets", edges=(1, 2)).predict(requests, CLASSES, ROOM)
    assert (from_one.low[0], from_one.high[0]) == (1, 1)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_a_quantile_is_that_of_the_class(q: float) -> None:
    """The least whole number whose probability to be exceeded is at most 1 - q, from the laws themselves."""
    point = Quantile(law="quantile", q=q).predict(MANY, CLASSES, ROOM).point
    for number, cls in enumerate(CLASSES):
        values, chances = cls.output.pmf
        exact = values[np.searchsorted(np.cumsum(chances), q - 1e-12)]
        (found,) = set(point[MANY.cls == number].tolist())
        assert abs(found - exact) <= 1


def test_quantiles_of_a_trace_are_those_of_its_requests() -> None:
    """Of 10, 20, 30, 40: the inverted distribution jumps at 1/4, 1/2, 3/4."""
    pairs = Pairs(np.ones(4, np.int64), np.array([40, 10, 30, 20]))
    traced = [c.model_copy(update={"pairs": pairs}) for c in CLASSES]
    for q, value in ((0.0, 10), (0.25, 10), (0.26, 20), (0.5, 20), (0.75, 30), (0.76, 40), (1.0, 40)):
        assert set(Quantile(law="quantile", q=q).predict(MANY, traced, ROOM).point.tolist()) == {value}


def test_class_means_and_the_unknown() -> None:
    point, low, high = ClassMean(law="class-mean").predict(MANY, CLASSES, ROOM)
    means = np.array([30.5, CLASSES[1].mean_output])
    assert (np.abs(point - means[MANY.cls]) <= 0.5).all()
    assert set(low.tolist()) == {1} and np.array_equal(high, np.array([60, 900])[MANY.cls])
    point, low, high = Unknown(law="none").predict(MANY, CLASSES, ROOM)
    assert set(point.tolist()) == {900} == set(high.tolist()) and set(low.tolist()) == {1}
    assert np.array_equal(Unknown(law="none").predict(MANY, CLASSES, 500).point, 500 - MANY.prompt)


def test_luck_is_uniform_and_streams_are_independent() -> None:
    first, second = luck(MANY.u, 1), luck(MANY.u, 2)
    for values in (first, second):
        assert values.min() > 0 and values.max() < 1
        assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(4000, abs=300)
    for a, b in ((first, second), (first, MANY.u), (second, MANY.u)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"point": np.array([1.0, 2.0])}, r"point predictions must be whole numbers of shape \(2,\)"),
        ({"low": np.array([1])}, r"low predictions must be whole numbers of shape \(2,\)"),
        ({"high": [3, 3]}, r"high predictions must be whole numbers of shape \(2,\)"),
        ({"low": np.array([1, 0])}, r"request 1 predicts low = 0 output tokens; give at least 1"),
        ({"point": np.array([2, 92])}, r"request 1 predicts point = 92 output tokens, more than fit in memory; cap"),
        ({"low": np.array([5, 1])}, r"request 0 predicts low = 5 above high; swap them"),
    ],
)
def test_wrong_predictions_are_refused(change: dict[str, Any], sentence: str) -> None:
    requests = Requests(np.zeros(2), np.array([5, 9]), np.array([3, 3]), np.zeros(2, np.int64), np.full(2, 0.5))
    fine = Predicted(np.array([2, 2]), np.array([1, 1]), np.array([4, 91]))
    check_predicted(fine, requests, 100, "mine")
    with pytest.raises(PolicyError, match=r"^policy 'mine': " + sentence):
        check_predicted(fine._replace(**change), requests, 100, "mine")


TEXT = """
name = "guess"
[workload]
rate = 2.0
[[workload.classes]]
name = "chat"
share = 1.0
prompt = {law = "constant", value = 100}
output = {law = "constant", value = 50}
[[pools]]
name = "p"
replicas = 1
kv_capacity = 1000
step_time = [{base = 0.01}]
"""


def loaded(folder: Path, predictions: str) -> Any:
    file = folder / "guess.toml"
    file.write_text(TEXT + (f"[predictions]\n{predictions}\n" if predictions else ""))
    return load_scenario(str(file))


@pytest.mark.parametrize(
    ("lines", "predictor"),
    [
        ('law = "oracle"', ORACLE),
        ('law = "noise"\nsigma = 0.5', Noise(law="noise", sigma=0.5)),
        ('law = "interval"\nfactor = 4', Interval(law="interval", factor=4)),
        ('law = "buckets"\nedges = [10, 100]', Buckets(law="buckets", edges=(10, 100))),
        ('law = "quantile"\nq = 0.9', Quantile(law="quantile", q=0.9)),
        ('law = "class-mean"', ClassMean(law="class-mean")),
        ('law = "none"', Unknown(law="none")),
    ],
)
def test_scenarios_carry_predictions(tmp_path: Path, lines: str, predictor: PredictorBase) -> None:
    asked, plain = loaded(tmp_path, lines), loaded(tmp_path, "")
    assert asked.predictions == predictor
    assert (asked.digest == plain.digest) == (predictor == ORACLE)
    assert asked.replace(**{"pools.0.replicas": 2}).predictions == predictor


def test_a_scenario_without_predictions_keeps_its_digest(tmp_path: Path) -> None:
    """As recorded before scenarios could say anything of predictions."""
    assert loaded(tmp_path, "").digest == "84e862aac0ff"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('law = "psychic"', "psychic"),
        ('law = "noise"\nsigma = -1', "sigma"),
        ('law = "noise"', "sigma"),
        ('law = "interval"\nfactor = 0.5', "factor"),
        ('law = "buckets"\nedges = [100, 10]', "do not increase; sort them and drop repeats"),
        ('law = "buckets"\nedges = []', "edges"),
        ('law = "quantile"\nq = 1.5', "q"),
        ('law = "none"\nq = 1', "q"),
    ],
)
def test_wrong_predictions_of_a_scenario_are_one_sentence(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        loaded(tmp_path, lines)
    said = str(refused.value)
    assert "predictions" in said and words in said and "\n" not in said
