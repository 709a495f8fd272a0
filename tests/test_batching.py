"""Batching with hindsight: published hand instances, brute force, bounds that never lie, schedules checked apart."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from batching_oracle import INSTANCES, checked, optimum, small_instance
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations.batching import TimeIndexed, windows
from formulations.batching_bounds import CoarseRelaxation, area_bound, fluid, round_down
from formulations.batching_chain import ChainRelaxation, Multipliers, ascend
from formulations.batching_exact import ExactHindsight, Stage, permitted
from formulations.batching_sawtooth import sawtooth
from formulations.batching_search import search
from formulations.batching_start import best_start, by_volume, mc_sf, sorted_f
from llmopt.errors import ScenarioError
from llmopt.rounds import Rounds, hand_instances, model_1, model_2
from llmopt.solution import SolveOptions
from llmopt.solve import solve

HAND = hand_instances()
QUICK = (Stage(0.4, 3, False, 40, 0.5), Stage(0.4, 3, True, 40, 0.1))
# Total latency by the sources, and the least one.
PUBLISHED = {"A": (22, 22, 22), "B": (18, 15, 15), "C": (754, 331, 316)}


@pytest.mark.parametrize("name", HAND)
def test_list_rules_reach_the_published_latencies(name) -> None:
    instance = HAND[name]
    assert checked(instance, mc_sf(instance)) == PUBLISHED[name][0]
    assert checked(instance, sorted_f(instance)) == PUBLISHED[name][1]
    assert checked(instance, by_volume(instance)) >= PUBLISHED[name][2]


@pytest.mark.parametrize(("name", "value"), [("A", 21.5), ("C", 287.39)])
def test_the_plain_relaxation_has_the_published_value(name, value) -> None:
    record = solve(TimeIndexed(cliques=False, relaxed=True).build(HAND[name]))
    assert record.objective == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize("name", HAND)
def test_the_program_proves_the_optimum_of_the_hand_instances(name) -> None:
    instance = HAND[name]
    model = TimeIndexed().build(instance, best_start(instance, 2000))
    record = solve(model, SolveOptions(time_limit=60, warm_start=True))
    assert record.bound == pytest.approx(PUBLISHED[name][2], abs=1e-4)
    assert checked(instance, TimeIndexed().extract(model, instance)) == PUBLISHED[name][2]


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_search_proves_the_optimum_of_the_hand_instances(name) -> None:
    found = ExactHindsight().solve(HAND[name])
    assert checked(HAND[name], found.start) == found.latency == found.bound == PUBLISHED[name][2]


def test_program_search_and_brute_force_agree() -> None:
    rng = np.random.default_rng(11)
    for case in range(200):
        instance = small_instance(rng)
        best = optimum(instance)
        found = ExactHindsight(climb=QUICK).solve(instance, mc_sf(instance))
        assert checked(instance, found.start) == found.latency == found.bound == best, case
        model = TimeIndexed(cliques=case % 2 == 0).build(instance, mc_sf(instance) if case % 3 else None)
        record = solve(model, SolveOptions(warm_start=case % 3 == 1))
        assert record.objective == pytest.approx(best, abs=1e-4), case
        assert checked(instance, TimeIndexed().extract(model, instance)) == best, case


@settings(deadline=None, max_examples=40)
@given(INSTANCES)
def test_bounds_are_in_order_and_never_above_the_optimum(instance) -> None:
    best = optimum(instance)
    plain = solve(TimeIndexed(cliques=False, relaxed=True).build(instance)).objective
    cliques = solve(TimeIndexed(relaxed=True).build(instance)).objective
    assert area_bound(instance) <= best + 1e-9
    assert area_bound(instance) <= plain + 1e-6
    assert plain <= cliques + 1e-6 <= best + 2e-6
    fine = solve(CoarseRelaxation().build(instance)).objective
    assert fine <= plain + 1e-6
    for block in (2, 5):
        coarse = solve(CoarseRelaxation(block=block).build(instance)).objective
        assert coarse - 1e-6 <= fine <= coarse + len(instance) * (2 * block - 1) + 1e-6
    assert solve(CoarseRelaxation(grid=0.3).build(instance)).objective <= fine + 1e-6


@settings(deadline=None, max_examples=80)
@given(
    INSTANCES,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.15, 0.25, 0.34, 0.5]),
    st.sampled_from([3, 4]),
    st.booleans(),
)
def test_chains_and_paths_bound_the_optimum_for_any_multipliers(instance, seed, threshold, length, whole) -> None:
    """Weak duality for random rewards and prices, also after the subgradient method has moved them."""
    rng = np.random.default_rng(seed)
    relaxation = ChainRelaxation(instance, permitted(instance, instance.horizon), threshold, length, whole)
    best = optimum(instance)
    first = relaxation.start()
    at = Multipliers(
        np.where(relaxation.large, rng.uniform(0, 2 * best, len(instance)), 0.0),
        rng.uniform(-whole, 2, relaxation.rounds) / instance.capacity * rng.integers(0, 2),
        rng.normal(size=relaxation.rounds) * whole,
        rng.normal(size=first.ending.shape) * whole * rng.integers(0, 5),
    )
    assert relaxation.evaluate(at).bound <= best + 1e-6
    value, at = ascend(relaxation, first, best, 40)
    assert value <= best + 1e-6
    assert relaxation.evaluate(at).bound == pytest.approx(value)


@settings(deadline=None, max_examples=40)
@given(INSTANCES, st.integers(0, 2**32 - 1))
def test_paths_pay_at_most_as_much_as_full_memory(instance, seed) -> None:
    """Prices of tokens alone: a path never holds more than M, so that it never makes the bound worse."""
    price = np.random.default_rng(seed).uniform(0, 1, instance.horizon + 1)
    whole, plain = (ChainRelaxation(instance, permitted(instance, instance.horizon), sawtooth=s) for s in (True, False))
    at = replace(whole.start(), price=price)
    value, tokens, requests, _ = whole.paths(at)
    assert value == pytest.approx(price @ tokens)
    assert (tokens <= instance.capacity).all()
    assert value <= plain.paths(at)[0] + 1e-9
    assert whole.evaluate(at).bound >= plain.evaluate(at).bound - 1e-6
    assert ((tokens > 0) == (requests > 0)).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_path_that_earns_most_is_that_of_a_plain_recursion(seed) -> None:
    rng = np.random.default_rng(seed)
    last, capacity = int(rng.integers(1, 7)), int(rng.integers(2, 9))
    price, number = rng.normal(size=(2, last))
    ending = rng.normal(size=(last, capacity + 1))
    starts, ends = rng.random((last, 3)) < 0.6, rng.random((last, capacity + 1)) < 0.7
    least = int(np.flatnonzero(starts.any(axis=0)).min(initial=2)) + 1 if starts.any() else 1

    @cache
    def most(t: int, n: int, u: int, ended: bool) -> float:
        """Earned after round t by n requests with u tokens: complete one, or then start one, or go on."""
        if t == last:
            return 0.0
        values = [-np.inf]
        if u + n <= capacity:
            more = price[t + 1] * (u + n) + number[t + 1] * n if t + 1 < last else 0.0
            values.append(more + most(t + 1, n, u + n, False))
        for peak in np.flatnonzero(ends[t]) if not ended and n else []:
            left = u - int(peak)
            if (left == 0 and n == 1) or (n > 1 and left >= (n - 1) * least):
                values.append(ending[t, peak] + most(t, n - 1, left, False))
        values += [most(t, n + 1, u + int(s), True) for s in np.flatnonzero(starts[t]) if u + s + n + 1 <= capacity]
        return max(values)

    value, tokens, requests, done = sawtooth(price, number, ending, starts, ends, capacity)
    assert value == pytest.approx(most(0, 0, 0, False))
    assert value == pytest.approx(price @ tokens + number @ requests + (ending * done).sum())


@settings(deadline=None, max_examples=25)
@given(INSTANCES, st.sampled_from([0.2, 0.4]), st.sampled_from([3, 4]), st.booleans())
def test_completion_bounds_are_below_the_best_schedule_with_that_completion(instance, threshold, length, whole) -> None:
    relaxation = ChainRelaxation(instance, permitted(instance, instance.horizon), threshold, length, whole)
    _, at = ascend(relaxation, relaxation.start(), optimum(instance), 20)
    bounds = relaxation.completion_bounds(at)
    model = TimeIndexed(cliques=False).build(instance)
    rng = np.random.default_rng(len(instance))
    for i, p in rng.permutation(list(model.x))[:4].tolist():
        model.x[i, p].fix(1)
        try:
            forced = solve(model).objective
        except Exception:
            forced = np.inf
        model.x[i, p].unfix()
        assert bounds[i, p + instance.output[i]] <= forced + 1e-5


@settings(deadline=None, max_examples=40)
@given(INSTANCES, st.integers(1, 30))
def test_a_narrow_search_still_proves_its_bound(instance, width) -> None:
    start, best = mc_sf(instance), optimum(instance)
    relaxation = ChainRelaxation(instance, permitted(instance, instance.horizon))
    found = search(relaxation, relaxation.start(), instance.latency(start), width)
    known = instance.latency(start) if found.start is None else checked(instance, found.start)
    assert min(found.bound, known) <= best + 1e-6 <= known + 1e-6


@given(INSTANCES)
@settings(deadline=None, max_examples=60)
def test_windows_hold_an_optimal_schedule(instance) -> None:
    start = mc_sf(instance)
    model = TimeIndexed().build(instance, start)
    assert solve(model).objective == pytest.approx(optimum(instance), abs=1e-4)
    assert (windows(instance, instance.latency(start)) <= windows(instance, None)).all()


def test_the_fluid_schedule_is_the_least_of_all_orders() -> None:
    """With all at round 0 the area bound is the best of all orders of serving whole volumes, M a round."""
    from itertools import permutations

    instance = model_1(4, 6)
    volume, capacity = instance.volume, instance.capacity
    least = np.inf
    for order in permutations(range(6)):
        rounds = np.repeat(order, volume[list(order)])
        mean = np.bincount(rounds, np.arange(len(rounds)) // capacity + 1) / volume
        least = min(least, mean.sum())
    assert fluid(instance).mean_round.sum() == pytest.approx(least)


def test_ten_thousand_requests_have_a_bound() -> None:
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(1, 200, 10_000), rng.integers(1, 400, 10_000)
    instance = Rounds(np.sort(rng.integers(0, 200, 10_000)), prompt, output, 16_492)
    bound = area_bound(instance)
    assert output.sum() < bound
    cls, members = round_down(instance, 0.5, 1)
    assert (members[cls, 0] <= prompt).all()
    assert (members[cls, 1] <= output).all()
    assert (1.5 * members[cls, 1] + 1 > output).all()


def test_memories_too_large_for_tables_leave_the_area_bound() -> None:
    rng = np.random.default_rng(5)
    instance = Rounds.together(np.stack([rng.integers(1, 90, 40), rng.integers(1, 200, 40)], axis=1).tolist(), 4_000)
    found = ExactHindsight(time_limit=1).solve(instance)
    assert checked(instance, found.start) == found.latency >= found.bound >= area_bound(instance) - 1e-6


@pytest.mark.parametrize("instance", [model_1(2, 12), model_2(2, 12)])
def test_schedules_of_every_method_keep_the_rules(instance) -> None:
    starts = [mc_sf(instance), by_volume(instance), best_start(instance, 2000)]
    starts += [] if instance.arrival.any() else [sorted_f(instance)]
    found = ExactHindsight(time_limit=5, widths=(100,)).solve(instance)
    latencies = [checked(instance, start) for start in starts]
    assert checked(instance, found.start) == found.latency <= min(latencies)
    assert found.bound <= found.latency
    assert 0 <= found.gap < 0.2


def test_nonsense_is_refused() -> None:
    for limit in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ScenarioError, match=rf"time_limit is {limit:g} s; give a positive number of seconds"):
            ExactHindsight(time_limit=limit)
    with pytest.raises(ScenarioError, match="request 1 needs 11 tokens when it completes and can never fit in 10"):
        ExactHindsight().solve(Rounds.together([(1, 3), (4, 7)], 10))
    many = model_1(0, 63)
    relaxation = ChainRelaxation(many, permitted(many, 200))
    with pytest.raises(ScenarioError, match="exact search takes at most 62 requests, not 63"):
        search(relaxation, relaxation.start(), 10**6, 1)
