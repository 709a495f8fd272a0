"""The capacity estimate: closed forms, saturated simulation, and the regimes it must warn about."""

from __future__ import annotations

from typing import Any

import factories
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from benchmarks.capacity_study import MODES, drawn, simulate
from llmopt.arrays import Floats
from llmopt.capacity import estimated_load, load_gradient, replica_capacity
from llmopt.evaluate.saturate import saturated_throughput
from llmopt.lengths import Histogram
from llmopt.mix import Mix, blend
from llmopt.moments import Engine, moments
from llmopt.saturation import _fed, _smaller, saturate
from llmopt.scenario import Pool, Scenario
from llmopt.walk import walk
from llmopt.waves import _held, locked_rate, unstable_modes
from llmopt.workload import Pairs, RequestClass

TOLERANCE = 0.02
UNIT: dict[str, Any] = {
    "step_time": ({"base": 1.0},),
    "token_budget": 10**6,
    "max_batch": 10**5,
    "block_size": 1,
    "first_token": "decode",
}


def classes(*laws: tuple[Any, Any]) -> list[RequestClass]:
    def law(x: Any) -> dict[str, Any]:
        return {"law": "constant", "value": x} if isinstance(x, int) else {"law": "uniform", "low": x[0], "high": x[1]}

    data = {"share": 1 / len(laws)}
    return [
        RequestClass.model_validate({"name": f"c{i}", "prompt": law(s), "output": law(o), **data})
        for i, (s, o) in enumerate(laws)
    ]


def unit_pool(memory: int, chunk: int, mode: str) -> Pool:
    return Pool.model_validate(factories.pool(kv_capacity=memory, prefill_chunk=chunk, preemption=mode, **UNIT))


PAPER = (131_000, 512, ((10, 1600), (10, 1600)))
LONG = (131_000, 512, ((10, 1066), (10, 2133)))
TENTH = (3200, 64, ((10, 160), (10, 160)))
THIRD = (1000, 64, ((10, 160), (10, 160)))
TABLE = [
    (PAPER, {"reserve": 0.707, "lookahead": 0.983, "restart": 0.983, "recompute": 0.990, "swap": 0.991}),
    (LONG, {"reserve": 0.630, "lookahead": 0.977, "restart": 0.977, "recompute": 0.991, "swap": 0.991}),
    (TENTH, {"reserve": 0.698, "lookahead": 0.960, "restart": 0.958, "recompute": 0.977, "swap": 0.987}),
    (THIRD, {"reserve": 0.644, "lookahead": 0.875, "restart": 0.862, "recompute": 0.931, "swap": 0.945}),
]


@pytest.mark.parametrize(
    ("case", "mode", "simulated"), [(case, mode, x) for case, row in TABLE for mode, x in row.items()]
)
def test_throughput_over_mu_of_five_preemption_modes(case: Any, mode: str, simulated: float) -> None:
    """Saturated throughput over mu = M / (b E[g]), as simulated step by step by an independent program."""
    memory, chunk, laws = case
    cls = classes(laws)
    mu = memory / moments(Engine.of(unit_pool(memory, chunk, "swap")), cls).held[0]
    assert replica_capacity(unit_pool(memory, chunk, mode), cls, np.ones(1)).rate / mu == pytest.approx(
        simulated, abs=TOLERANCE
    )


@pytest.mark.parametrize("mode", ["lookahead", "restart"])
def test_equal_lengths_lock_into_waves_and_both_figures_are_said(mode: str) -> None:
    """FIXED (100, 100), M = 20 000: 0.751 of mu after a burst, near mu from empty (simulated step by step)."""
    cls = classes((100, 100))
    mu = 20_000 / moments(Engine.of(unit_pool(20_000, 512, "swap")), cls).held[0]
    found = replica_capacity(unit_pool(20_000, 512, mode), cls, np.ones(1))
    assert found.locked is not None
    assert found.locked / mu == pytest.approx(0.751, abs=TOLERANCE)
    assert found.rate * (1 - found.error) <= 0.751 * mu
    assert found.rate * (1 + found.error) >= 0.99 * mu
    assert "mu (1 - delta)" in found.caveats[0]
    assert f"{found.locked:.4g}" in found.caveats[0]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_equal_lengths_cost_no_memory_where_progress_is_kept(mode: str) -> None:
    cls = classes((100, 100))
    mu = 20_000 / moments(Engine.of(unit_pool(20_000, 512, "swap")), cls).held[0]
    found = replica_capacity(unit_pool(20_000, 512, mode), cls, np.ones(1))
    assert found.locked is None
    assert found.rate / mu == pytest.approx({"recompute": 0.991, "swap": 0.996}[mode], abs=TOLERANCE)


def blended(pool: Pool, cls: list[RequestClass]) -> Mix:
    return blend(pool, cls, np.full(len(cls), 1 / len(cls)), 0)


@pytest.mark.parametrize(
    ("laws", "locks"),
    [
        (((10, 160), (10, 160)), False),
        (((10, 1066), (10, 2133)), False),
        ((100, 100), True),
        ((2, 200), True),
    ],
)
def test_waves_grow_exactly_where_simulation_locks(laws: Any, locks: bool) -> None:
    mix = blended(unit_pool(20_000, 512, "lookahead"), classes(laws))
    assert (unstable_modes(mix) > 0) == locks


def test_two_kinds_of_lengths_lock_too() -> None:
    mix = blended(unit_pool(20_000, 128, "lookahead"), classes((40, 400), (400, 40)))
    assert unstable_modes(mix) > 0
    assert locked_rate(mix) < saturate(mix).rate


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True))
def test_growing_waves_are_the_roots_inside_the_unit_circle(prompt: int, outputs: list[int]) -> None:
    law = Histogram(law="histogram", values=tuple(outputs), weights=(1.0,) * len(outputs))
    cls = RequestClass.model_validate(
        {"name": "c", "share": 1.0, "prompt": {"law": "constant", "value": prompt}, "output": law}
    )
    mix = blended(unit_pool(10_000, 512, "restart"), [cls])
    roots = np.roots(np.trim_zeros(_held(mix), "b")[::-1])
    if np.all(np.abs(np.abs(roots) - 1) > 0.01):
        assert unstable_modes(mix) == (np.abs(roots) < 1).sum()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 100), st.floats(0.01, 100), st.floats(-5, 5))
def test_prefill_that_feeds_a_full_replica_is_a_truncated_normal(mean: float, sd: float, z: float) -> None:
    assert _fed(mean, sd**2, mean + z * sd) == pytest.approx(stats.truncnorm(-50, z, mean, sd).mean(), abs=1e-6 * sd)


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 100), st.floats(0.01, 2), st.floats(1, 150))
def test_the_smaller_of_memory_and_slots(mean: float, spread: float, cap: float) -> None:
    normal = stats.norm(mean, np.sqrt(mean * spread))
    below = (
        integrate.quad(lambda x: x * normal.pdf(x), normal.ppf(1e-12), cap, limit=200)[0]
        if cap > normal.ppf(1e-12)
        else 0
    )
    assert _smaller(mean, spread, cap)[0] == pytest.approx(below + cap * normal.sf(cap), rel=1e-4, abs=1e-4)


def test_a_blocked_head_leaves_the_age_of_a_renewal_process() -> None:
    """Mean free memory E[p^2] / (2 E[p]) - 1/2 for needs p on the integers."""
    mix = blended(unit_pool(10**6, 512, "reserve"), classes(((10, 90), (10, 190))))
    need = mix.s + mix.d
    free = walk(mix, 0.5, 1e9, need, need, "stay").free.mean()
    assert free == pytest.approx((need**2).mean() / (2 * need.mean()) - 0.5, rel=0.03)


def test_a_walk_prefills_what_is_offered_and_never_more_than_the_room() -> None:
    mix = blended(unit_pool(10**6, 512, "reserve"), classes(((10, 90), (10, 190))))
    one = np.ones(len(mix.s))
    plenty = walk(mix, 0.5, 1e9, one, one, "stay")
    assert plenty.prefill.mean() == pytest.approx(0.5 * mix.prompt, rel=0.02)
    assert plenty.pairs.mean() == pytest.approx(0.5 * mix.pairs, rel=0.03)
    tight = walk(mix, 0.5, 0.6 * mix.prompt, one, one, "stay")
    assert tight.prefill.max() <= 0.6 * mix.prompt * (1 + 1e-9)
    assert tight.prefill.mean() == pytest.approx(0.5 * mix.prompt, rel=0.02)


def test_preemptions_match_the_net_leak() -> None:
    """A boundary that moves back by x crosses x / E[need] requests: E[(N - sum X)^+] / (n E[s]) per completion."""
    mix = blended(unit_pool(10**5, 512, "recompute"), classes(((150, 250), (300, 500))))
    rate = 0.2
    peak, need = mix.s + mix.d, mix.s
    rng = np.random.default_rng(5)
    freed = np.array([peak[rng.integers(0, len(peak), k)].sum() for k in rng.poisson(rate, 100_000)])
    back = np.maximum(rate * mix.d.mean() - freed, 0).mean() / rate
    found = walk(mix, rate, 1e9, peak, need, "back")
    assert found.back == pytest.approx(back / need.mean(), rel=0.06)
    assert found.again == pytest.approx(rate * back, rel=0.06)


FIXED_DRAWS = (0, 1, 2, 3, 4, 10, 11, 12, 18, 19, 35, 46, 62, 64, 155)


@pytest.mark.parametrize("number", FIXED_DRAWS)
def test_estimate_meets_saturated_simulation(number: int) -> None:
    pool, cls, shares = drawn(number, 1 + number % 2)
    assert pool.preemption == MODES[number % 5]
    capacity = replica_capacity(pool, cls, shares)
    simulated, noise = simulate(pool, cls, shares, capacity, number, 2)
    assert capacity.rate == pytest.approx(simulated, rel=0.03)
    assert abs(capacity.rate / simulated - 1) <= capacity.error + 3 * noise
    assert capacity.outer >= simulated * 0.99


def test_estimate_meets_simulation_of_several_classes() -> None:
    case = factories.unlike_pools()
    pool, shares = case.pools[2], case.workload.rates / case.workload.total_rate
    rng = np.random.default_rng(3)
    cls = rng.choice(2, 12_000, p=shares)
    prompt, output = np.zeros(len(cls), np.int64), np.zeros(len(cls), np.int64)
    for c, one in enumerate(case.workload.classes):
        prompt[cls == c], output[cls == c] = one.sample(rng, int((cls == c).sum()))
    capacity = replica_capacity(pool, case.workload.classes, shares)
    assert capacity.rate == pytest.approx(saturated_throughput(pool, prompt, output).rate, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_estimate_never_exceeds_the_outer_bound(number: int) -> None:
    pool, cls, shares = drawn(number, 1 + number % 3)
    capacity = replica_capacity(pool, cls, shares)
    assert 0 < capacity.rate <= capacity.outer
    assert 0 < capacity.error < 0.5


def both(case: Scenario) -> tuple[Pool, tuple[RequestClass, ...], Floats]:
    return case.pools[1], case.workload.classes, case.workload.rates


def test_estimated_load_is_homogeneous_deterministic_and_zero_for_nothing() -> None:
    pool, cls, rates = both(factories.unlike_pools())
    load = estimated_load(pool, cls, rates)
    assert estimated_load(pool, cls, 2 * rates) == pytest.approx(2 * load)
    assert estimated_load(pool, cls, rates) == load
    assert estimated_load(pool, cls, 0 * rates) == 0.0


def test_the_seed_moves_the_estimate_by_less_than_its_error() -> None:
    pool, cls, rates = both(factories.unlike_pools())
    found = [replica_capacity(pool, cls, rates, seed) for seed in range(5)]
    assert np.ptp([c.rate for c in found]) < found[0].error * found[0].rate


def test_gradient_is_a_tangent() -> None:
    pool, cls, rates = both(factories.unlike_pools())
    slope = load_gradient(pool, cls, rates)
    assert slope @ rates == pytest.approx(estimated_load(pool, cls, rates))
    for factor in ((1.3, 0.8), (0.7, 1.4)):
        other = rates * factor
        assert slope @ other == pytest.approx(estimated_load(pool, cls, other), rel=0.03)
    assert load_gradient(pool, cls, 0 * rates).tolist() == [0.0, 0.0]


def test_a_class_that_does_not_fit_makes_the_capacity_zero() -> None:
    pool = Pool.model_validate(factories.pool(kv_capacity=160))
    cls = [RequestClass.model_validate(factories.request_class(prompt=100, output=101))]
    found = replica_capacity(pool, cls, np.ones(1))
    assert found.rate == 0.0
    assert "'chat' can exceed" in found.caveats[0]
    assert estimated_load(pool, cls, np.ones(1)) == float("inf")


def test_pairs_of_a_trace_count_like_the_law_they_come_from() -> None:
    pool, (law,), _ = drawn(12)
    rng = np.random.default_rng(0)
    prompt, output = law.sample(rng, 40_000)
    pairs = law.model_copy(update={"pairs": Pairs(prompt, output)})
    assert replica_capacity(pool, [pairs], np.ones(1)).rate == pytest.approx(
        replica_capacity(pool, [law], np.ones(1)).rate, rel=0.02
    )


def test_what_makes_an_estimate_rough_is_said() -> None:
    cls = [RequestClass.model_validate(factories.request_class(prompt=3000, output=101))]
    tight = Pool.model_validate(factories.pool(kv_capacity=12_800, step_time=factories.TWO_PIECES))
    found = replica_capacity(tight, cls, np.ones(1))
    assert any("24% of the KV memory" in said for said in found.caveats)
    roomy = Pool.model_validate(factories.pool(kv_capacity=1_280_000, step_time=factories.TWO_PIECES))
    assert replica_capacity(roomy, cls, np.ones(1)).error < found.error
