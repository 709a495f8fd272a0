"""Plans that do not fit their scenario are refused before anything runs, each in one sentence with a remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from factories import pool, request_class, scenario

from llmopt.errors import PolicyError
from llmopt.plan import Plan, check_plan, index_router, split_router

QUESTION = scenario(
    [pool("big"), pool("small", kv_capacity=1_000)],
    [request_class("short", share=0.5), request_class("long", 2000, 51, share=0.5)],
)
INDEX = index_router(QUESTION, waiting=1.0)
SPLIT = np.array([[0.5, 0.5], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((2, 3))}, r"weights are float64 of shape \(2, 3\); give an array .* of shape \(2, 4\)"),
        ({"weights": [[0.0] * 4] * 2}, r"weights are list; give an array of numbers"),
        ({"weights": np.full((2, 4), np.nan)}, r"weights have NaN or infinite entries; give finite"),
        ({"spread": "even"}, r"spread = 'even' is not known; give one of \('random', 'cyclic'\)"),
        ({"choices": -1}, r"choices = -1; give a whole number"),
        ({"choices": 1.5}, r"choices = 1.5; give a whole number"),
        ({"fractions": np.ones((2, 1))}, r"fractions are float64 of shape \(2, 1\); give .* of shape \(2, 2\)"),
        ({"fractions": np.array([[0.5, 0.6], [1.0, 0.0]])}, r"every row must sum to 1; scale them"),
        ({"fractions": np.array([[1.5, -0.5], [1.0, 0.0]])}, r"must not be negative"),
        ({"fractions": np.full((2, 2), 0.5)}, r"class 'long' is sent to pool 'small', whose KV memory"),
        (
            {"mask": np.ones((1, 2), bool)},
            r"the mask is bool of shape \(1, 2\); give .* of shape \(2, 2\)",
        ),
        ({"mask": np.ones((2, 2))}, r"the mask is float64 of shape \(2, 2\); give a boolean array"),
        ({"mask": np.array([[True, True], [False, False]])}, r"the mask allows class 'long' no pool; allow at least"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match="policy 'mine': .*" + message):
        check_plan(Plan("mine", replace(INDEX, **change)), QUESTION)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(PolicyError, match="returned Router instead of a Plan"):
        check_plan(INDEX, QUESTION)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="neither a Router nor callable"):
        check_plan(Plan("mine", 3), QUESTION)  # type: ignore[arg-type]


def test_a_weight_of_an_unknown_feature_is_refused() -> None:
    with pytest.raises(PolicyError, match="a router sees no 'waitings'; did you mean 'waiting'"):
        index_router(QUESTION, waitings=1.0)


def test_routers_of_the_helpers_fit() -> None:
    for router in (INDEX, replace(INDEX, mask=None), split_router(QUESTION, SPLIT, "cyclic", running=2.0)):
        check_plan(Plan("mine", router), QUESTION)


def test_only_a_data_router_has_a_fixed_split() -> None:
    class Rule:
        fractions = SPLIT

        def __call__(self, request: object, replicas: object) -> int:
            return 0

    assert Plan("mine", Rule()).fractions is None
    assert Plan("mine", INDEX).fractions is None
    assert np.array_equal(np.asarray(Plan("mine", split_router(QUESTION, SPLIT)).fractions), SPLIT)
