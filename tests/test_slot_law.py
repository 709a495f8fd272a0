"""The law of a slot's load and of sums of slots: by counting, by plain convolution, and against moments and samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.evaluate.bundle_load import load_series
from llmopt.scenario import Scenario
from llmopt.slot_law import SlotLaw, slot_law
from llmopt.slots import slot_load
from llmopt.workload import Pairs, RequestClass


def some(prompt: dict[str, Any], output: dict[str, Any], **more: Any) -> RequestClass:
    return RequestClass.model_validate({"name": "r", "share": 1.0, "prompt": prompt, "output": output, **more})


def paired(prompt: list[int], output: list[int]) -> RequestClass:
    laws = [{"law": "histogram", "values": v, "weights": [1.0] * len(v)} for v in (prompt, output)]
    return some(*laws, pairs=Pairs(np.array(prompt), np.array(output)))


def counted(classes: list[RequestClass], rates: list[float], first_step: int) -> dict[int, float]:
    """Every request by itself: where it is in each of its steps."""
    met: dict[int, float] = {}
    for cls, rate in zip(classes, rates, strict=True):
        if cls.pairs is not None:
            joint = [(p, o, 1 / len(cls.pairs.prompt)) for p, o in zip(cls.pairs.prompt, cls.pairs.output, strict=True)]
        else:
            laws = (list(zip(*law.pmf, strict=True)) for law in (cls.prompt, cls.output))
            joint = [(p, o, a * b) for (p, a), (o, b) in itertools.product(*laws)]
        for p, o, weight in joint:
            for k in range(int(o) - first_step):
                met[int(p) + k] = met.get(int(p) + k, 0.0) + rate * weight
    total = sum(met.values())
    return {value: met[value] / total for value in sorted(met)}


SHORT_LAW = some(
    {"law": "histogram", "values": [3, 50, 7], "weights": [1, 2, 1]}, {"law": "uniform", "low": 1, "high": 6}
)
LONG_LAW = some({"law": "constant", "value": 90}, {"law": "geometric", "mean": 8.0, "max": 40})
TRACED = paired([5, 90, 5, 30], [1, 9, 60, 1])


@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize(
    ("classes", "rates"),
    [([SHORT_LAW], [2.0]), ([TRACED], [1.0]), ([SHORT_LAW, LONG_LAW, TRACED], [3.0, 0.5, 1.0])],
)
def test_the_law_is_where_requests_are_in_their_steps(
    classes: list[RequestClass], rates: list[float], first_step: int
) -> None:
    law, by_hand = slot_law(classes, np.array(rates), first_step), counted(classes, rates, first_step)
    found = dict(zip(law.values.tolist(), law.probabilities, strict=True))
    assert all(found.get(value, 0.0) == pytest.approx(p, abs=1e-14) for value, p in by_hand.items())
    assert sum(p for value, p in found.items() if value not in by_hand) < 1e-13
    assert list(found) == sorted(found)


LAWS = st.one_of(
    st.builds(lambda v: {"law": "constant", "value": v}, st.integers(2, 3000)),
    st.builds(lambda v, w: {"law": "uniform", "low": v, "high": v + w}, st.integers(1, 500), st.integers(1, 500)),
    st.builds(lambda m: {"law": "geometric", "mean": m, "max": 5000}, st.floats(2.0, 400.0)),
    st.builds(
        lambda m, cv: {"law": "lognormal", "mean": m, "cv": cv, "max": 9000}, st.floats(9.0, 900.0), st.floats(0.2, 2.0)
    ),
)


@settings(max_examples=30, deadline=None)
@given(LAWS, LAWS, LAWS, st.floats(0.1, 3.0), st.integers(0, 1), st.integers(1, 300))
def test_moments_are_those_of_renewal_reward(
    prompt: dict[str, Any], output: dict[str, Any], other: dict[str, Any], rate: float, first_step: int, n: int
) -> None:
    rng = np.random.default_rng(n)
    traced = paired(rng.integers(1, 2000, 50).tolist(), (2 + rng.geometric(0.01, 50)).tolist())
    classes, rates = [some(prompt, output), some(other, prompt), traced], np.array([1.0, rate, 0.3])
    law, load = slot_law(classes, rates, first_step), slot_load(classes, rates, first_step)
    assert law.probabilities.sum() == pytest.approx(1.0, rel=1e-12)
    assert law.mean == pytest.approx(load.theta, rel=1e-11)
    assert law.variance == pytest.approx(load.variance, rel=1e-8, abs=1e-8)
    together = law.sums(n)
    mass = np.diff(np.exp(together.log_below), prepend=0.0)
    mean = float(mass @ together.points)
    assert mean == pytest.approx(n * load.theta, rel=1e-9)
    assert float(mass @ (together.points - mean) ** 2) == pytest.approx(n * load.variance, rel=1e-6)


def convolved(law: SlotLaw, n: int) -> tuple[int, np.ndarray]:
    """The lowest sum of n loads, and the probabilities of it and all above, token by token."""
    one = np.zeros(int(law.values[-1] - law.values[0]) + 1)
    one[law.values - law.values[0]] = law.probabilities
    mass = np.ones(1)
    for _ in range(n):
        mass = np.convolve(mass, one)
    return n * int(law.values[0]), mass


@pytest.mark.parametrize("n", [1, 2, 7])
def test_short_sums_are_convolved_token_by_token(n: int) -> None:
    law = slot_law([SHORT_LAW, TRACED], np.ones(2))
    low, mass = convolved(law, n)
    together, tokens = law.sums(n), low + np.arange(len(mass))
    assert together.step == 1
    assert np.exp(together.log_cdf(tokens.astype(float))) == pytest.approx(np.cumsum(mass), abs=1e-11)
    assert np.exp(together.log_cdf(tokens + 0.5)) == pytest.approx(np.cumsum(mass), abs=1e-11)
    assert together.log_cdf(np.array([low - 0.5, 1e9])).tolist() == [-math.inf, 0.0]
    half = together.shared(2)
    assert half.log_cdf(tokens / 2) == pytest.approx(together.log_cdf(tokens.astype(float)))


def fullest(log_below: np.ndarray, points: np.ndarray, many: int) -> float:
    """Mean of the largest of `many` loads."""
    return float(points @ np.diff(np.exp(many * log_below), prepend=0.0))


@pytest.mark.parametrize(("n", "cv"), [(2, 1.3), (3, 2.0), (12, 1.3)])
def test_a_coarse_lattice_meets_the_largest_of_many_sums(n: int, cv: float) -> None:
    """Heavy tails on a lattice of many tokens against all tokens, convolved by squaring."""
    wide = {"law": "lognormal", "mean": 600.0, "cv": cv, "max": 30_000}
    law = slot_law([some(wide, wide)], np.ones(1))
    together = law.sums(n)
    assert together.step > 1
    spread = math.sqrt(n * law.variance)
    size = 2 ** math.ceil(math.log2(n * int(law.values[-1]) + 1))
    one = np.zeros(size)
    one[law.values] = law.probabilities
    mass = np.maximum(np.fft.irfft(np.fft.rfft(one) ** n, size), 0.0)
    exact = np.log(np.minimum(np.cumsum(mass) + 1e-300, 1.0))
    for many in (1, 8, 512):
        found = fullest(together.log_below, together.points, many)
        assert abs(found - fullest(exact, np.arange(size), many)) < 5e-6 * spread


@pytest.mark.parametrize("n", [1, 17, 59, 1000])
def test_a_few_loads_far_apart_keep_mean_and_variance(n: int) -> None:
    law = SlotLaw(np.array([1, 60, 3600]), np.array([0.5, 0.3, 0.2]))
    together = law.sums(n)
    mass = np.diff(np.exp(together.log_below), prepend=0.0)
    assert mass @ together.points == pytest.approx(n * law.mean, rel=1e-11)
    assert mass @ (together.points - n * law.mean) ** 2 == pytest.approx(n * law.variance, rel=1e-6)


def test_many_slots_are_normal_whatever_their_tails() -> None:
    """A million slots of a range of millions do not need a lattice of all their tokens."""
    from scipy.stats import norm

    law = slot_law([SHORT_LAW], np.ones(1))
    together = law.sums(1_000_000)
    spread = 1000 * math.sqrt(law.variance)
    assert len(together.points) < 100_000
    at = together.points[np.abs(together.points - 1e6 * law.mean) < 4 * spread]
    z = (at + together.step / 2 - 1e6 * law.mean) / spread
    assert np.exp(together.log_cdf(at)) == pytest.approx(norm.cdf(z), abs=3e-4)


def test_simulated_loads_have_the_law() -> None:
    """Kolmogorov's distance of 4000 independent micro-batches of three slots, at a random time."""
    bundle = Bundle.model_validate(
        {"attention": [{"kv": 1e-9}], "ffn": [{"base": 1e-4}], "batch": 3, "pipeline": "ideal", "kv_capacity": 10**6}
    )
    classes, rates = [SHORT_LAW, LONG_LAW, TRACED], np.array([3.0, 0.5, 1.0])
    met = np.sort(load_series(classes, rates, 1, bundle, 4000, 1, seed=5)[0, 0])
    below = np.exp(slot_law(classes, rates, 1).sums(3).log_cdf(met))
    assert np.abs(below - np.searchsorted(met, met, side="right") / 4000).max() < 1.63 / math.sqrt(4000)


def test_equal_loads_have_a_law_of_one_point() -> None:
    law = slot_law([some({"law": "constant", "value": 40}, {"law": "constant", "value": 2})], np.ones(1), 1)
    assert (law.values.tolist(), law.probabilities.tolist(), law.variance) == ([40], [1.0], 0.0)
    assert law.sums(9).points.tolist() == [360.0]
    assert law.sums(9) is law.sums(9)


@pytest.mark.parametrize("n", [0, -2, 1.5, True])
def test_sums_of_no_number_are_one_sentence(n: Any) -> None:
    with pytest.raises(ScenarioError, match="give a whole number of at least 1"):
        slot_law([SHORT_LAW], np.ones(1)).sums(n)


def test_slots_without_a_step_are_one_sentence() -> None:
    never = some({"law": "constant", "value": 40}, {"law": "constant", "value": 1})
    for classes in ([never], [paired([3, 4], [1, 1]), never]):
        with pytest.raises(ScenarioError, match="no request stays a single decode step"):
            slot_law(classes, np.ones(len(classes)), 1)


def test_a_scenario_has_the_law_of_its_load_and_the_same_digest() -> None:
    bundle = {"attention": [{"kv": 1e-9}], "ffn": [{"base": 1e-4}], "batch": 3, "kv_capacity": 10**6}
    data = {
        "name": "t",
        "problem": "af-ratio",
        "workload": {
            "classes": [c.model_copy(update={"share": 0.5, "name": n}) for c, n in ((LONG_LAW, "a"), (SHORT_LAW, "b"))],
            "rate": 2.0,
        },
        "pools": [{"name": "b", "first_token": "prefill", "bundle": bundle}],
    }
    scenario = Scenario.model_validate(data)
    digest = scenario.digest
    assert scenario.slot_law.mean == pytest.approx(scenario.slot_load.theta, rel=1e-12)
    assert scenario.slot_law.variance == pytest.approx(scenario.slot_load.variance, rel=1e-9)
    assert scenario.slot_law is scenario.slot_law
    assert scenario.digest == digest == Scenario.model_validate(data).digest


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_a_cold_run_is_what_slots_hold_on_average_from_new_requests_on(joint: bool, steps: int) -> None:
    """Every path of requests in one slot is followed by recursion, weighted by its probability."""
    rng = np.random.default_rng(3)
    prompt, output = rng.integers(1, 9, 12), rng.integers(1, 7, 12)
    laws = {
        key: {"law": "histogram", "values": values.tolist(), "weights": counts.astype(float).tolist()}
        for key, drawn in (("prompt", prompt), ("output", output))
        for values, counts in [np.unique(drawn, return_counts=True)]
    }
    cls = RequestClass.model_validate(
        {"name": "x", "share": 1.0, **laws, **({"pairs": Pairs(prompt, output)} if joint else {})}
    )
    if joint:
        cases = [(p, o - 1, 1 / 12) for p, o in zip(prompt.tolist(), output.tolist(), strict=True)]
    else:
        cases = [(p, o - 1, 1 / 144) for p in prompt.tolist() for o in output.tolist()]
    stays = sum(w for _, d, w in cases if d > 0)
    starts, held = np.zeros(steps), dict[int, float]()
    starts[0] = 1.0
    for s in range(steps):
        for p, d, w in cases:
            for k in range(min(d, steps - s)):
                held[p + k] = held.get(p + k, 0.0) + starts[s] * w / stays / steps
            if 0 < d < steps - s:
                starts[s + d] += starts[s] * w / stays
    law = slot_law([cls], np.ones(1), 1, steps)
    assert law.values.tolist() == sorted(held)
    assert law.probabilities == pytest.approx([held[v] for v in sorted(held)], abs=1e-12)
