"""The convex fit of max-affine step times, against functions that are known, brute force and another solver."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from llmopt.arrays import Floats
from llmopt.calibrate.fit import DEFAULT_FIT, Fit, FitOptions, fit_step_time
from llmopt.errors import ScenarioError
from llmopt.hardware import FEATURES

QUICK = FitOptions(kicks=0, thin=80)
DECODE = [0.012, 0.0, 4e-5, 1.5e-7, 0.0]
MIXED = [[0.011, 3e-5, 3.5e-5, 1.6e-7, 6e-9], [0.0, 8e-5, 9e-5, 1.8e-7, 4e-9]]


def steps(n: int, seed: int = 0) -> Floats:
    """Random steps (n, 4), about half of them without prefill."""
    rng = np.random.default_rng(seed)
    decode = np.round(256 ** rng.random(n))
    prefill = np.where(rng.random(n) < 0.5, 0.0, np.round(2047 * rng.random(n)) + 1.0)
    kv = np.round(decode * 64.0 * 64.0 ** rng.random(n))
    return np.column_stack([prefill, decode, kv, prefill * (prefill / 2 + 2000 * rng.random(n))])


def maximum(rows: list[list[float]], features: Floats) -> Floats:
    """A max-affine function at steps (n, 4), written out."""
    return np.array([max(sum(c * x for c, x in zip(row, (1.0, *f), strict=True)) for row in rows) for f in features])


def rows_of(fit: Fit) -> Floats:
    """Fitted coefficients (m, 5), sorted."""
    return np.array(sorted([getattr(piece, name) for name in FEATURES] for piece in fit.pieces))


@pytest.mark.parametrize("rows", [[DECODE], [DECODE, MIXED[0]], [DECODE, *MIXED]])
def test_a_known_max_affine_function_is_recovered(rows: list[list[float]]) -> None:
    features = steps(200)
    fit = fit_step_time(features, maximum(rows, features), decode_pieces=1, mixed_pieces=len(rows) - 1)
    assert fit.error < 1e-6
    assert rows_of(fit) == pytest.approx(np.array(sorted(rows)), rel=1e-6, abs=1e-15)
    unseen = steps(500, seed=1)
    assert fit.step_time.many(unseen) == pytest.approx(maximum(rows, unseen), rel=1e-6)
    assert fit.pieces[0].name == "decode"


def relative_errors(rows: Floats, features: Floats, seconds: Floats) -> float:
    return float(np.mean(np.abs(maximum(rows.tolist(), features) / seconds - 1.0)))


def one_program(features: Floats, seconds: Floats, assigned: tuple[int, ...], free: Floats) -> float:
    """The error (1) at the optimum of (2) for one assignment, by scipy and without the code under test.

    Variables are the coefficients of all pieces, then one error for each step; free (m, 5) says which may be positive.
    """
    n, m = len(seconds), len(free)
    shares = np.column_stack([np.ones(n), features]) / seconds[:, None]
    scale = shares.max(axis=0)
    upper, right = [], []
    for i, mine in enumerate(assigned):
        for j in range(m):
            row = np.zeros(5 * m + n)
            row[5 * j : 5 * j + 5], row[5 * m + i] = shares[i] / scale, -1.0
            upper.append(row)
            right.append(1.0)
        row = np.zeros(5 * m + n)
        row[5 * mine : 5 * mine + 5], row[5 * m + i] = -shares[i] / scale, -1.0
        upper.append(row)
        right.append(-1.0)
    bounds = [(0, None if can else 0.0) for can in free.ravel()] + [(None, None)] * n
    costs = np.concatenate([np.zeros(5 * m), np.full(n, 1.0 / n)])
    found = linprog(costs, np.array(upper), right, bounds=bounds)
    return relative_errors(found.x[: 5 * m].reshape(m, 5) / scale, features, seconds)


@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_fit_is_the_best_over_all_assignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = steps(7, seed)
    seconds = maximum([DECODE, MIXED[1]], features) * np.exp(0.2 * rng.standard_normal(7))
    free = np.ones((2, 5))
    free[0, [1, 4]] = 0.0
    best = min(one_program(features, seconds, a, free) for a in itertools.product((0, 1), repeat=7))
    fit = fit_step_time(features, seconds, mixed_pieces=1, options=FitOptions(kicks=2, random_starts=6))
    assert fit.error == pytest.approx(best, abs=1e-9)


def test_a_single_piece_is_the_least_absolute_regression() -> None:
    rng = np.random.default_rng(3)
    features = steps(60)
    seconds = maximum([DECODE, *MIXED], features) * np.exp(0.1 * rng.standard_normal(60))
    best = one_program(features, seconds, (0,) * 60, np.ones((1, 5)))
    fit = fit_step_time(features, seconds, decode_pieces=0, mixed_pieces=1)
    assert fit.error == pytest.approx(best, rel=1e-9)
    assert (fit.status, fit.solves, len(fit.pieces)) == ("optimal", fit.solves, 1)


def noisy(n: int, seed: int) -> tuple[Floats, Floats]:
    features = steps(n, seed)
    rng = np.random.default_rng(seed)
    return features, maximum([DECODE, *MIXED], features) * np.exp(0.1 * rng.standard_normal(n))


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), scales=st.lists(st.integers(-4, 4), min_size=5, max_size=5))
def test_units_of_time_and_features_do_not_matter(seed: int, scales: list[int]) -> None:
    """Powers of two, so that rounding is the same: coefficients scale, the error does not change."""
    features, seconds = noisy(30, seed)
    time, *factors = 2.0 ** np.array(scales)
    plain = fit_step_time(features, seconds, mixed_pieces=1, options=QUICK)
    scaled = fit_step_time(features * factors, seconds * time / 16, mixed_pieces=1, options=QUICK)
    assert scaled.error == pytest.approx(plain.error, rel=1e-9)
    expected = rows_of(plain) * time / 16 / np.array([1.0, *factors])
    assert rows_of(scaled) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_coefficients_are_not_negative_and_more_pieces_never_fit_worse(seed: int) -> None:
    features, seconds = noisy(40, seed)
    fit = fit_step_time(features, seconds, decode_pieces=2, mixed_pieces=2, options=QUICK)
    assert (fit.step_time.coefficients >= 0).all()
    numbers, errors = [(d, m) for d, m, _ in fit.path], [error for _, _, error in fit.path]
    assert numbers == [(1, 1), (1, 2), (2, 2)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert fit.error == pytest.approx(errors[-1], rel=1e-9)
    assert fit.error == pytest.approx(relative_errors(fit.step_time.coefficients, features, seconds), rel=1e-9)
    assert np.abs(fit.relative).mean() == pytest.approx(fit.error, rel=1e-9)


def test_decode_pieces_have_no_prefill_terms_and_idle_pieces_are_dropped() -> None:
    features = steps(120)
    pure = features[features[:, 0] == 0]
    fit = fit_step_time(pure, maximum([DECODE], pure), decode_pieces=2, mixed_pieces=2, options=QUICK)
    assert fit.error < 1e-9
    assert all(piece.prefill == 0 and piece.pairs == 0 for piece in fit.pieces)
    assert rows_of(fit)[0] == pytest.approx(DECODE, rel=1e-6)


def test_weights_say_what_counts() -> None:
    """Two kinds of steps that no single piece can follow: the fit follows the heavy one."""
    features, seconds = noisy(80, 5)
    pure = features[:, 0] == 0
    errors = []
    for heavy in (pure, ~pure):
        fit = fit_step_time(
            features, seconds, decode_pieces=0, mixed_pieces=1, weights=np.where(heavy, 1.0, 1e-6), options=QUICK
        )
        assert fit.weights.sum() == pytest.approx(1.0)
        errors.append([float(np.abs(fit.relative)[kind].mean()) for kind in (pure, ~pure)])
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]


def test_the_same_call_gives_the_same_fit() -> None:
    features, seconds = noisy(70, 6)
    first, second = (fit_step_time(features, seconds, options=FitOptions(random_starts=1, thin=40)) for _ in range(2))
    assert first.pieces == second.pieces
    assert replace(first, spent=0.0).path == second.path


def test_kicks_and_random_starts_never_hurt_on_the_steps_they_see() -> None:
    features, seconds = noisy(40, 7)
    plain = fit_step_time(features, seconds, options=FitOptions(kicks=0))
    more = fit_step_time(features, seconds, options=FitOptions(kicks=1, random_starts=1))
    assert more.error <= plain.error + 1e-12
    assert more.solves > plain.solves


def _broken(change: Callable[[Floats, Floats], None]) -> tuple[Floats, Floats]:
    features, seconds = noisy(20, 8)
    change(features, seconds)
    return features, seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y: y.__setitem__(3, -0.01), "step 3 has an impossible time"),
        (lambda f, y: y.__setitem__(2, np.nan), "step 2 has an impossible time"),
        (lambda f, y: f.__setitem__((4, 1), -1.0), "step 4 has an impossible feature"),
        (lambda f, y: y.__imul__(1e6), "give times in seconds"),
    ],
)
def test_impossible_steps_are_refused(change: Callable[[Floats, Floats], None], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        fit_step_time(*_broken(change), options=QUICK)


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    features, seconds = noisy(20, 9)
    for given_features, given_seconds, weights, message in (
        (features, seconds[:-1], None, "do not fit together"),
        (features[:, :3], seconds, None, "do not fit together"),
        (features[:0], seconds[:0], None, "no steps to fit"),
        (features, seconds, np.zeros(20), "all steps have weight 0"),
        (features, seconds, np.full(20, -1.0), "impossible weight"),
    ):
        with pytest.raises(ScenarioError, match=message):
            fit_step_time(given_features, given_seconds, weights=weights, options=DEFAULT_FIT)
    with pytest.raises(ScenarioError, match="make no step time"):
        fit_step_time(features, seconds, decode_pieces=0, mixed_pieces=0)
