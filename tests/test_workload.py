"""Workloads: expectations over laws and pairs, sampling, replay, and mixtures of rates and shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from llmopt.workload import Pairs, RequestClass, Requests, Workload, extent

UNIFORM = {"law": "uniform", "low": 10, "high": 1600}
CONSTANT = {"law": "constant", "value": 5}


def workload(**keys: Any) -> Workload:
    classes = keys.pop("classes", [{"name": "a", "share": 1.0, "prompt": UNIFORM, "output": UNIFORM}])
    return Workload.model_validate({"rate": 10.0, "classes": classes, **keys})


def replayed(arrival: list[float], **keys: Any) -> Workload:
    n = len(arrival)
    ones = np.ones(n, dtype=np.int64)
    replay = Requests(np.array(arrival), 7 * ones, 3 * ones, 0 * ones, np.zeros(n))
    return workload(arrivals={"law": "replay"}, replay=replay, **keys)


def test_expectation_of_a_product_over_independent_laws() -> None:
    """E[s o] = E[s] E[o] = 805^2 for two independent uniforms on 10..1600; E[s^2] from the textbook variance."""
    one = workload().classes[0]
    assert one.expect(lambda s: s, lambda o: o) == pytest.approx(805.0**2)
    assert one.expect(lambda s: s**2, np.ones_like) == pytest.approx(805.0**2 + (1591**2 - 1) / 12)


def test_critical_rate_of_nie_si_zhou() -> None:
    """mu = M / (b E[g]) with the paper's g = ((1 + s/512) s + 2 o s + (1 + o) o) / 2 is 3.263 for the 1:1 workload."""
    one = workload().classes[0]
    area = one.expect(lambda s: (1 + s / 512) * s / 2, np.ones_like)
    area += one.expect(lambda s: s, lambda o: o) + one.expect(np.ones_like, lambda o: (1 + o) * o / 2)
    lengths = np.arange(10, 1601)
    by_hand = np.mean((1 + lengths / 512) * lengths + (1 + lengths) * lengths) / 2 + lengths.mean() ** 2
    assert area == pytest.approx(by_hand, rel=1e-12)
    assert 131_000 / (0.0372 * area) == pytest.approx(3.263, abs=5e-4)


def test_pairs_keep_the_correlation() -> None:
    pairs = Pairs(np.array([1, 10]), np.array([100, 1]))
    one = RequestClass.model_validate(
        {"name": "a", "share": 1.0, "prompt": CONSTANT, "output": CONSTANT, "pairs": pairs}
    )
    assert one.expect(lambda s: s, lambda o: o) == (100 + 10) / 2
    assert one.largest == 101
    prompt, output = one.sample(np.random.default_rng(0), 500)
    assert set(zip(prompt.tolist(), output.tolist(), strict=True)) == {(1, 100), (10, 1)}


def test_requests_split_by_share_and_follow_their_laws() -> None:
    classes = [
        {"name": "a", "share": 0.25, "prompt": CONSTANT, "output": UNIFORM},
        {"name": "b", "share": 0.75, "prompt": UNIFORM, "output": CONSTANT},
    ]
    requests = workload(rate=100.0, classes=classes).sample(500.0, seed=3)
    share = (requests.cls == 0).mean()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / len(requests)))
    assert (requests.prompt[requests.cls == 0] == 5).all()
    assert requests.prompt[requests.cls == 1].mean() == pytest.approx(805, rel=0.02)
    assert len(requests) == pytest.approx(50_000, rel=0.03)


def test_rates_per_class_make_the_same_requests_as_shares() -> None:
    by_share = workload(rate=8.0, classes=[_class("a", share=0.25), _class("b", share=0.75)])
    by_rate = workload(rate=None, classes=[_class("a", rate=2.0), _class("b", rate=6.0)])
    assert by_rate.total_rate == by_share.total_rate == 8.0
    a, b = by_share.sample(50.0, 4), by_rate.sample(50.0, 4)
    assert (a.arrival == b.arrival).all()
    assert (a.cls == b.cls).all()


def _class(name: str, **rate: float) -> dict[str, Any]:
    return {"name": name, "prompt": UNIFORM, "output": CONSTANT, **rate}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    one = workload()
    first, again, other = one.sample(30.0, 1), one.sample(30.0, 1), one.sample(30.0, 2)
    for field in ("arrival", "prompt", "output", "cls", "u"):
        assert getattr(first, field).tobytes() == getattr(again, field).tobytes()
    assert first.arrival.tobytes() != other.arrival.tobytes()


def test_extent_counts_one_gap_more_than_the_span() -> None:
    assert extent(np.array([0.0, 1.0, 2.0, 3.0])) == 4.0


def test_replay_keeps_the_recorded_times_at_its_own_rate() -> None:
    one = replayed([0.0, 1.0, 3.0, 6.0], rate=0.5)
    requests = one.sample(100.0, 1)
    assert requests.arrival.tolist() == [0.0, 1.0, 3.0, 6.0]
    assert requests.prompt.tolist() == [7] * 4
    assert requests.u.tobytes() != one.sample(100.0, 2).u.tobytes()


def test_replay_at_another_rate_squeezes_time_and_the_horizon_cuts() -> None:
    one = replayed([0.0, 1.0, 3.0, 6.0], rate=1.0)
    assert one.sample(100.0, 1).arrival.tolist() == [0.0, 0.5, 1.5, 3.0]
    assert one.sample(1.5, 1).arrival.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"classes": [_class("a", share=0.5)]}, "shares that sum to 0.5, not 1"),
        ({"classes": [_class("a", share=0.5), _class("b", rate=1.0)]}, "use one kind for all"),
        ({"classes": [_class("a", share=0.5), _class("a", share=0.5)]}, "repeated class names"),
        ({"classes": [_class("a")]}, "exactly one of share and rate"),
        ({"classes": [_class("a", share=0.5, rate=1.0)]}, "exactly one of share and rate"),
        ({"classes": [_class("a", rate=1.0)]}, "has rate and its classes have rates"),
        ({"rate": None}, "has no rate"),
        ({"rate": -1.0}, "greater than 0"),
        ({"rate": float("nan")}, "finite"),
        ({"classes": []}, "at least 1"),
        ({"arrivals": {"law": "replay"}}, "no trace; add"),
    ],
)
def test_inconsistent_workloads_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        workload(**keys)
