"""Ages of requests in busy slots over a finite run, against recursion, closed form and limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.ratio import horizon_load
from llmopt.renewal import age_weights, renewals


def recursion(masses: list[float], steps: int) -> list[float]:
    """u_s = sum_d f_d u_{s-d}, term by term."""
    law = [x / sum(masses[1:]) for x in masses]
    u = [1.0]
    for s in range(1, steps):
        u.append(sum(law[d] * u[s - d] for d in range(1, min(s, len(masses) - 1) + 1)))
    return u


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 70))
def test_renewals_follow_their_recursion(tail: list[float], steps: int) -> None:
    masses = [0.3, *tail, 0.5]
    assert renewals(np.array(masses), steps) == pytest.approx(recursion(masses, steps), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 300, 19_532])
def test_geometric_stays_give_the_published_horizon_form(steps: int) -> None:
    mean, prompt = 500.0, 100.0
    d = np.arange(60_000)
    masses = np.where(d > 0, (1 / mean) * (1 - 1 / mean) ** (d - 1.0), 0.0)
    longer = np.cumsum(masses[::-1])[::-1][1 : steps + 1]
    weights = age_weights(masses, steps) * longer
    assert weights.sum() == pytest.approx(1.0), "the slot is never empty"
    load = float(weights @ (prompt + np.arange(steps)))
    # the closed form takes K = requests * mean / batch steps
    assert load == pytest.approx(horizon_load(prompt, mean, 500, steps), rel=1e-9)


def test_a_long_run_forgets_its_start() -> None:
    masses = np.array([0.0, 0.2, 0.0, 0.5, 0.3])
    weights = age_weights(masses, 100_000)
    assert weights[:4] == pytest.approx(np.full(4, 1 / (np.arange(5) @ masses)), rel=1e-4)


def test_constant_stays_renew_like_a_clock() -> None:
    assert renewals(np.array([0.0, 0.0, 0.0, 1.0]), 7).tolist() == pytest.approx([1, 0, 0, 1, 0, 0, 1], abs=1e-12)
