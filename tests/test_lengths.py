"""Length laws against closed forms, and samples against the probabilities they are drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llmopt.lengths import Law, LawBase

LAW: TypeAdapter[Any] = TypeAdapter(Law)


def law(**keys: Any) -> LawBase:
    made: LawBase = LAW.validate_python(keys)
    return made


def variance(one: LawBase) -> float:
    values, probs = one.pmf
    return float(((values - one.mean) ** 2) @ probs)


def test_uniform_has_its_textbook_moments() -> None:
    one = law(law="uniform", low=10, high=1600)
    assert one.mean == pytest.approx(805.0, rel=1e-12)
    assert variance(one) == pytest.approx((1591**2 - 1) / 12, rel=1e-12)
    assert one.largest == 1600


def test_geometric_has_its_textbook_moments() -> None:
    one = law(law="geometric", mean=40.0, max=4000)
    assert one.mean == pytest.approx(40.0, rel=1e-9)
    assert variance(one) == pytest.approx(40.0 * 39.0, rel=1e-9)
    assert one.pmf[1][0] == pytest.approx(1 / 40)


@pytest.mark.parametrize(("name", "cv"), [("lognormal", 0.4), ("lognormal", 1.1), ("gamma", 0.5), ("gamma", 1.3)])
def test_rounding_costs_continuous_laws_little(name: str, cv: float) -> None:
    """Rounding to integers adds 1/12 to the variance; with a far maximum little else changes."""
    one = law(law=name, mean=500.0, cv=cv, max=60_000)
    assert one.mean == pytest.approx(500.0, rel=2e-4)
    assert variance(one) == pytest.approx((500.0 * cv) ** 2 + 1 / 12, rel=3e-3)


def test_gamma_with_cv_one_is_exponential() -> None:
    """P(k) = exp(-(k - 1/2)/m) - exp(-(k + 1/2)/m), the first token taking what is below it."""
    values, probs = law(law="gamma", mean=20.0, cv=1.0, max=5000).pmf
    expected = np.exp(-(values[1:] - 0.5) / 20) - np.exp(-(values[1:] + 0.5) / 20)
    assert probs[1:100] == pytest.approx(expected[:99], rel=1e-9)
    assert probs[0] == pytest.approx(1 - np.exp(-1.5 / 20))


def test_what_lies_outside_sits_on_the_ends() -> None:
    one = law(law="geometric", mean=100.0, min=50, max=120)
    values, probs = one.pmf
    assert (values[0], values[-1]) == (50, 120)
    assert probs[0] == pytest.approx(1 - 0.99**50)
    assert probs[-1] == pytest.approx(0.99**119)


def test_quantiles_are_linear_between_the_knots() -> None:
    """A straight line from 0 to 100 over tokens 1 to 101: half a token's mass at each end."""
    values, probs = law(law="quantiles", probs=[0.0, 1.0], values=[1, 101]).pmf
    assert len(values) == 101
    assert probs[1:-1] == pytest.approx(np.full(99, 0.01))
    assert probs[[0, -1]] == pytest.approx([0.005, 0.005])


def test_equal_quantiles_are_an_atom() -> None:
    values, probs = law(law="quantiles", probs=[0.0, 0.5, 0.8, 1.0], values=[10, 20, 20, 30]).pmf
    assert probs[values == 20][0] == pytest.approx(0.3 + 0.5 / 20 + 0.2 / 20)
    assert probs.sum() == pytest.approx(1.0)


def test_histogram_adds_weights_of_equal_values() -> None:
    values, probs = law(law="histogram", values=[7, 3, 7], weights=[1.0, 2.0, 1.0]).pmf
    assert values.tolist() == [3, 7]
    assert probs.tolist() == [0.5, 0.5]


def test_mixture_mixes_means() -> None:
    parts = [{"law": "constant", "value": 10}, {"law": "uniform", "low": 100, "high": 300}]
    assert law(law="mixture", parts=parts, weights=[3.0, 1.0]).mean == pytest.approx(0.75 * 10 + 0.25 * 200)


ANY_LAW = st.one_of(
    st.builds(lambda v: law(law="constant", value=v), st.integers(1, 5000)),
    st.builds(lambda a, n: law(law="uniform", low=a, high=a + n), st.integers(1, 900), st.integers(0, 900)),
    st.builds(lambda m, x: law(law="geometric", mean=m, max=x), st.floats(1, 300), st.integers(1, 3000)),
    st.builds(
        lambda name, m, c, x: law(law=name, mean=m, cv=c, max=x),
        st.sampled_from(["lognormal", "gamma"]),
        st.floats(0.5, 800),
        st.floats(0.05, 5),
        st.integers(1, 4000),
    ),
    st.builds(
        lambda v: law(law="quantiles", probs=np.linspace(0, 1, len(v)).tolist(), values=sorted(v)),
        st.lists(st.integers(1, 3000), min_size=2, max_size=8),
    ),
)


@given(one=ANY_LAW)
@settings(max_examples=80, deadline=None)
def test_every_law_is_a_distribution_on_positive_integers(one: LawBase) -> None:
    values, probs = one.pmf
    assert probs.sum() == pytest.approx(1.0)
    assert (probs > 0).all()
    assert (np.diff(values) > 0).all()
    assert values[0] >= 1
    assert values[0] <= one.mean <= values[-1] + 1e-9


@given(one=ANY_LAW, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sampling_inverts_the_distribution_function(one: LawBase, seed: int) -> None:
    """u in the interval of a value gives that value, for every value; beyond that of u near 1 there is no mass."""
    values, probs = one.pmf
    middle = np.cumsum(probs) - probs / 2
    big = probs > 1e-9
    assert (one.sample(middle[big]) == values[big]).all()
    low, high = one.sample(np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert low == values[0] and probs[values > high].sum() < 1e-14 * len(values)
    drawn = one.sample(np.random.default_rng(seed).random(4000))
    assert abs(drawn.mean() - one.mean) <= 6 * np.sqrt(variance(one) / 4000) + 1e-9


def test_a_context_of_ten_million_tokens_stays_exact() -> None:
    one = law(law="lognormal", mean=1000.0, cv=1.0, max=10_000_000)
    assert one.mean == pytest.approx(1000.0, rel=2e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"law": "uniform", "low": 5, "high": 4}, "has low = 5 above high = 4; swap them"),
        ({"law": "geometric", "mean": 0.5, "max": 9}, "at least 1 token; raise it"),
        ({"law": "gamma", "mean": 5.0, "cv": 1.0, "min": 9, "max": 8}, "has min = 9 above max = 8"),
        ({"law": "quantiles", "probs": [0.0, 0.5], "values": [1, 2]}, "do not start at 0"),
        ({"law": "quantiles", "probs": [0.0, 0.5, 0.5, 1.0], "values": [1, 2, 3, 4]}, "do not increase strictly"),
        ({"law": "quantiles", "probs": [0.0, 1.0], "values": [2, 1]}, "values that decrease"),
        ({"law": "quantiles", "probs": [0.0, 1.0], "values": [1, 2, 3]}, "2 probs but 3 values"),
        ({"law": "histogram", "values": [1, 2], "weights": [0.0, 0.0]}, "all zero"),
        ({"law": "histogram", "values": [1, 2], "weights": [1.0]}, "2 values but 1 weights"),
        ({"law": "mixture", "parts": [{"law": "constant", "value": 1}], "weights": []}, "at least 1"),
        ({"law": "lognormal", "mean": float("nan"), "cv": 1.0, "max": 9}, "finite"),
        ({"law": "lognormal", "mean": -1.0, "cv": 1.0, "max": 9}, "greater than 0"),
        ({"law": "constant", "value": True}, "valid integer"),
        ({"law": "constant", "value": 20_000_000}, "less than or equal"),
    ],
)
def test_impossible_laws_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("(", r"\(")):
        law(**keys)
