"""Step times from benchmark points: the forward model against the simulator, the fit against truth and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.arrays import Floats
from llmopt.calibrate.bench import LEAST, fit_benchmarks
from llmopt.calibrate.bench_fit import BenchOptions, least_absolute
from llmopt.calibrate.bench_model import Harness, Load, Model, decode_share, predict
from llmopt.calibrate.bench_out import leave_out
from llmopt.calibrate.bench_table import BenchTable, read_benchmarks
from llmopt.errors import ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.hardware import Piece, StepTime
from llmopt.plan import Plan, index_router
from llmopt.solution import DEFAULT_OPTIONS
from llmopt.workload import Requests
from tests import factories

SILICON = Path(__file__).parents[2] / "shared/data/aiconfigurator/silicon_sample.csv"
VALUES = np.array([0.010, 3e-5, 2e-8, 4e-5, 4e-10, 0.006])
TRUTH = (
    Piece(name="decode", base=0.010, decode=3e-5, kv=2e-8),
    Piece(name="mixed", base=0.004, decode=3e-5, kv=2e-8, prefill=4e-5, pairs=4e-10),
)
GRID = [(c, s, o) for c in (4, 16, 64) for s in (512, 2048) for o in (128, 384)]


def load(points: list[tuple[int, int, int]], **settings: Any) -> Load:
    return Load(*np.array(points, dtype=float).T, **settings)


def table(conditions: Load, ttft: Floats, tpot: Floats, **setting: str) -> BenchTable:
    return BenchTable(setting, conditions, ttft, tpot, np.ones(len(tpot), dtype=np.int64), "here")


def predicted(model: Model, conditions: Load) -> BenchTable:
    """Points as the forward model gives them."""
    return table(conditions, *predict(model, conditions)[:2])


def measured(concurrency: int, prompt: int, output: int, *, rounds: int = 10, spread: float = 0.2, **settings: Any):
    """Mean TTFT and TPOT of a simulated server that keeps requests in flight: all wait, and `max_batch` of them run.

    A request is sent when the one whose place it takes ends. Lengths are uniform within `spread` of their means.
    """
    n, rng = rounds * concurrency, np.random.default_rng(1)
    engine = {"max_batch": concurrency, "kv_capacity": 10_000_000, "token_budget": 8192, "block_size": 1, **settings}
    scenario = factories.scenario([factories.pool(step_time=[p.model_dump() for p in TRUTH], **engine)])
    lengths = [
        np.maximum(np.rint(mean * (1 + spread * (2 * rng.random(n) - 1))), 2).astype(np.int64)
        for mean in (prompt, output)
    ]
    requests = Requests(np.zeros(n), *lengths, np.zeros(n, dtype=np.int64), rng.random(n))
    run = simulate(scenario, Plan("t", index_router(scenario)), requests=requests)
    sent = np.concatenate([np.zeros(concurrency), np.sort(run.finish)[: n - concurrency]])
    return (run.first_token - sent).mean(), ((run.finish - run.first_token) / (requests.output - 1)).mean()


def simulated(points: list[tuple[int, int, int]], **settings: Any) -> BenchTable:
    times = np.array([measured(*point, **settings) for point in points])
    return table(load(points), times[:, 0], times[:, 1])


# the forward model


@pytest.mark.parametrize("output", [2, 3, 128])
def test_one_request_at_a_time_is_exact(output: int) -> None:
    ttft, tpot = measured(1, 700, output, rounds=3, spread=0.0)
    here = load([(1, 700, output)])
    said = predict(Model(VALUES, budget=8192.0), here)
    assert np.allclose([said[0][0], said[1][0]], [ttft, tpot], rtol=1e-9)
    step = StepTime.from_pieces(TRUTH)
    assert ttft == pytest.approx(step(prefill=700, pairs=700**2 / 2))
    assert tpot == pytest.approx(np.mean([step(decode=1, kv=700 + j) for j in range(output - 1)]))


def test_a_prompt_beyond_the_budget_takes_a_step_for_each_chunk() -> None:
    said = predict(Model(VALUES, budget=350.0), load([(1, 700, 16)]))
    assert said[0][0] == pytest.approx(measured(1, 700, 16, rounds=2, spread=0.0, token_budget=350)[0])


def test_prefill_that_hides_costs_a_decode_step() -> None:
    ttft, _, _ = predict(Model(VALUES), load([(1, 100, 16)]))
    assert ttft[0] == pytest.approx(VALUES[0])  # 100 tokens take 4 ms and hide behind the 6 ms


def test_the_share_of_life_spent_decoding_is_a_fixed_point() -> None:
    model, here = Model(VALUES, Harness(0.01, 1.0, 1.5, 0.05)), load(GRID)
    ttft, tpot, full = predict(model, here)
    share = decode_share(here, ttft, tpot)
    assert not full.any()
    others = (here.concurrency - 1) * share
    base = VALUES[0] + VALUES[1] * (1 + others) + VALUES[2] * (1 + others) * here.context
    rate = others / (here.output - 1)
    work = VALUES[3] * here.prompt + VALUES[4] * here.prompt**2 / 2
    assert np.allclose(tpot, base - (1 - np.exp(-rate)) * VALUES[5] + rate * work, rtol=1e-8)


def test_memory_bounds_who_decodes_and_the_rest_wait() -> None:
    here = load([(64, 1000, 101)])
    ttft, tpot, full = predict(Model(VALUES, capacity=16 * 1049.5), here)
    decoding = 64 * decode_share(here, ttft, tpot)
    assert full.all()
    assert decoding[0] == pytest.approx(16, rel=1e-6)


def test_the_forward_model_predicts_the_simulated_server() -> None:
    """Lengths vary by 20 %, so that requests do not fall into step."""
    points = simulated(GRID)
    ttft, tpot, _ = predict(Model(VALUES, Harness(burst=0.05), budget=8192.0), points.load)
    assert np.abs(tpot / points.tpot - 1).max() < 0.02
    assert np.median(np.abs(ttft / points.ttft - 1)) < 0.2


# the fit


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.data())
def test_the_least_absolute_deviation_is_a_weighted_median(values: list[float], data: st.DataObject) -> None:
    weights = np.array(data.draw(st.lists(st.floats(0.1, 5), min_size=len(values), max_size=len(values))))
    x, status = least_absolute(np.ones((len(values), 1)), np.array(values), weights, None, DEFAULT_OPTIONS)
    best = min(float(weights @ np.abs(v - np.array(values))) for v in values)
    assert status == "optimal"
    assert float(weights @ np.abs(x[0] - np.array(values))) == pytest.approx(best, rel=1e-6)


def test_an_ordered_pair_and_an_empty_column() -> None:
    x, _ = least_absolute(
        np.diag([1.0, 1.0, 0.0]), np.array([1.0, 3.0, 0.0]), np.array([1.0, 2.0, 1.0]), (0, 1, 0.0), DEFAULT_OPTIONS
    )
    assert x == pytest.approx([3.0, 3.0, 0.0])


def test_points_of_the_model_give_its_step_time_back() -> None:
    """With the harness that the search starts from, one linear program is exact."""
    fit = fit_benchmarks(predicted(Model(VALUES, Harness(fixed=0.02, burst=0.05), budget=8192.0), load(GRID)))
    assert fit.pieces[0].name == "decode"
    assert fit.model.values == pytest.approx(VALUES, rel=1e-4)
    assert (fit.harness.fixed, fit.harness.rounds) == pytest.approx((0.02, 10), rel=1e-4)
    assert all(e.largest < 1e-5 for e in fit.errors)
    assert fit.kv_capacity == np.inf
    assert not fit.queueing.any()


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(0.3, 3), min_size=6, max_size=6),
    st.tuples(st.floats(0, 0.1), st.floats(0, 3), st.floats(1, 2), st.floats(0.01, 0.3)),
)
def test_any_model_is_predicted_by_the_fit_to_its_points(factors: list[float], harness: tuple[float, ...]) -> None:
    values = VALUES * np.array(factors)
    values[5] = min(values[5], values[0])
    model = Model(values, Harness(*harness), budget=8192.0)
    fit = fit_benchmarks(predicted(model, load(GRID)))
    here = load([(32, 1024, 256), (8, 3000, 200)])
    for said, true in zip(fit.predict(here), predict(model, here)[:2], strict=True):
        assert np.abs(said / true - 1).max() < 0.15
    assert fit.errors[0].median < 0.02


def test_a_simulated_server_gives_its_step_time_back() -> None:
    """Ten requests a place: the first, simultaneous ones explain a burst of 1 / 20 and nothing else does."""
    points = simulated(GRID)
    fit = fit_benchmarks(points)
    assert {e.what: e.median < 0.05 for e in fit.errors if e.region == "all"} == {"TPOT": True, "TTFT": True}
    assert 7 < fit.harness.rounds < 14
    rng = np.random.default_rng(0)
    decode, chunk = rng.integers(4, 64, 200), np.where(rng.random(200) < 0.5, 0, rng.integers(512, 2048, 200))
    steps = np.column_stack([chunk, decode, decode * rng.integers(600, 2200, 200), chunk**2 / 2]).astype(float)
    off = fit.step_time.many(steps) / StepTime.from_pieces(TRUTH).many(steps) - 1
    assert np.median(np.abs(off)) < 0.03
    assert np.abs(off).max() < 0.1


def test_constant_lengths_keep_requests_in_step() -> None:
    """Then prompts are prefilled together, which the harness says and TPOT hardly shows."""
    fit = fit_benchmarks(simulated(GRID, spread=0.0))
    assert fit.harness.together > 1.5
    assert fit.errors[0].median < 0.03


def test_memory_that_is_full_is_found() -> None:
    fit = fit_benchmarks(simulated(GRID, kv_capacity=60_000))
    assert fit.kv_capacity == pytest.approx(60_000, rel=0.1)
    assert fit.queueing.sum() >= 2
    known = fit_benchmarks(simulated(GRID, kv_capacity=60_000), BenchOptions(kv_capacity=60_000))
    assert known.kv_capacity == 60_000


def test_static_batches_are_steps() -> None:
    here = load([(b, s, 65) for b in (1, 2, 4, 8) for s in (128, 512, 1024)], static=True)
    step = StepTime.from_pieces(TRUTH)
    ttft = np.array(
        [step(prefill=b * s, pairs=b * s * s / 2) for b, s in zip(here.concurrency, here.prompt, strict=True)]
    )
    tpot = np.array([step(decode=b, kv=b * (s + 31.5)) for b, s in zip(here.concurrency, here.prompt, strict=True)])
    fit = fit_benchmarks(table(here, ttft, tpot), BenchOptions(token_budget=4096))
    assert fit.model.values == pytest.approx(VALUES, rel=1e-3)
    assert fit.judged.sum() == 11  # 8 x 1024 tokens are beyond the budget


@settings(max_examples=8, deadline=None)
@given(st.floats(0.01, 50), st.permutations(range(len(GRID))))
def test_units_and_order_do_not_matter(factor: float, order: list[int]) -> None:
    model = Model(VALUES, Harness(0.01, 1.0, 1.2, 0.06), budget=8192.0)
    points = predicted(model, load(GRID))
    other = points.some(np.array(order))
    other = table(other.load, factor * other.ttft, factor * other.tpot)
    options = BenchOptions(rounds=3)
    a, b = fit_benchmarks(points, options), fit_benchmarks(other, options)
    assert b.tpot == pytest.approx(factor * a.tpot[order], rel=2e-2)


def test_a_focus_wins_where_one_convex_function_cannot() -> None:
    """A step time that is concave in the batch, as a mixture of experts has it."""
    here = load([(c, s, 1024) for c in (4, 8, 16, 32, 64, 128, 256) for s in (1024, 4096)])
    tpot = 0.004 + 0.004 * np.log2(here.concurrency) + here.concurrency * here.prompt * 2e-8
    points = table(here, 0.03 + here.prompt * 1e-5 + tpot, tpot)
    plain, near = leave_out(points), leave_out(points, focused=True)
    assert near.errors()[0].median < 0.7 * plain.errors()[0].median


def test_what_cannot_be_fitted_is_said() -> None:
    points = predicted(Model(VALUES), load(GRID))
    with pytest.raises(ScenarioError, match=f"has 4 benchmark points; give at least {LEAST}"):
        fit_benchmarks(points.some(np.arange(4)))
    with pytest.raises(ScenarioError, match="leaving one out needs at least 6"):
        leave_out(points.some(np.arange(5)))
    slow = table(points.load, 1e4 * points.ttft, 1e4 * points.tpot, model="m")
    with pytest.raises(ScenarioError, match=r"m: the fit gives base .* s; check the unit of its times"):
        fit_benchmarks(slow)


# points left out


def test_what_is_left_out_and_what_lies_beyond() -> None:
    points = predicted(Model(VALUES, Harness(burst=0.05), budget=8192.0), load(GRID))
    out = leave_out(points)
    assert out.beyond.tolist() == (points.load.concurrency != 16).tolist()
    assert [e.points for e in out.errors(among=out.beyond)] == [8, 8]
    assert out.errors()[0].largest < 0.05
    whole = leave_out(points, fold="concurrency")
    assert whole.predicted.all()
    assert leave_out(points, fold="lengths").beyond.all()
    assert not np.array_equal(whole.tpot, out.tpot)


@pytest.mark.skipif(not SILICON.exists(), reason="the measured points lie outside the repository, in ../shared")
def test_measured_points_left_out_are_predicted() -> None:
    """Six servers; benchmarks/benchmark_points.py does all."""
    file = read_benchmarks(SILICON)
    tables = [t for t in file.tables if len(t.load) >= 6]
    assert (len(file.tables), len(tables), sum(len(t.load) for t in tables)) == (73, 47, 1000)
    small = [i for i, t in enumerate(tables) if len(t.load) <= 30]
    chosen = np.random.default_rng(3).choice(small, 6, replace=False)
    outs = [leave_out(tables[i]) for i in chosen]
    tpot = np.concatenate([np.abs(o.tpot / o.table.tpot - 1) for o in outs])
    ttft = np.concatenate([np.abs(o.ttft / o.table.ttft - 1) for o in outs])
    assert np.median(tpot) < 0.10
    assert np.median(ttft) < 0.25
