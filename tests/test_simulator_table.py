"""Measured tables in the simulator: every step takes what the table says, however it is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle_engine
import pytest
from hypothesis import given, settings
from simulator_cases import LONGEST, assert_same, build, random_table, requests

from llmopt.evaluate.kernel_table import flatten, is_measured, table_seconds
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.steptable import StepTable
from llmopt.workload import Requests

POOL: dict[str, Any] = {"name": "p", "replicas": 1, "step_time": [{"base": 1.0}], "kv_capacity": 4000, "block_size": 4}


def flat(seconds: float) -> StepTable:
    """The same for every step."""
    axis = np.array([1.0, 2.0])
    return StepTable(
        tokens=axis,
        token_time=np.full(2, seconds),
        sequences=axis,
        sequence_time=np.zeros(2),
        decode_batch=axis,
        decode_context=axis,
        decode_time=np.zeros((2, 2)),
        chunk=axis,
        cached=axis,
        mixed_batch=np.array([0.0, 1.0]),
        mixed_context=axis,
        mixed_time=np.zeros((2, 2, 2, 2)),
    )


def features(rng: np.random.Generator, n: int) -> np.ndarray:
    """Steps with and without prefill and decode, inside and far outside the knots of `random_table`."""
    scale = 10.0 ** rng.uniform(0, 2, n)
    prefill, decode = np.floor(rng.uniform(0, 3, (2, n)) * scale)
    kv = np.floor(decode * rng.uniform(0, 60, n))
    pairs = prefill * (rng.choice([-0.2, 0.0, 1.0], n) * rng.uniform(0, 60, n) + 0.5 * prefill)
    pairs = np.where(prefill > 0, np.maximum(pairs, 0.5 * prefill), 0.0)
    return np.column_stack([prefill, decode, kv, pairs])[(prefill + decode) > 0]


@pytest.mark.parametrize("seed", range(30))
def test_step_times_and_ranges_are_those_of_the_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, monotone=seed % 2 == 0)
    costs = np.concatenate([rng.random(seed), flatten(table)])
    steps = features(rng, 60)
    ours = [table_seconds(costs, seed, *step) for step in steps.tolist()]
    # far outside the products of the extrapolation are large and cancel
    np.testing.assert_allclose(ours, table.many(steps), rtol=1e-9, atol=1e-9)
    inside = table.covers(steps)
    np.testing.assert_allclose(np.array(ours)[inside], table.many(steps)[inside], rtol=1e-12)
    assert [bool(is_measured(costs, seed, *step)) for step in steps.tolist()] == inside.tolist()
    for step, seconds in zip(steps[:10].tolist(), ours, strict=False):
        assert oracle_engine.table_seconds(table, *step) == pytest.approx(seconds, rel=1e-9, abs=1e-9)
        assert oracle_engine.is_measured(table, *step) == table.covers(np.array([step]))[0]


@pytest.mark.parametrize("core", ["compiled", "python"])
@pytest.mark.parametrize("seed", range(8))
def test_a_long_decode_sums_the_table_step_by_step(seed: int, core: Any) -> None:
    rng = np.random.default_rng(seed)
    table, n, host = random_table(rng, monotone=False), 3, 0.001
    scenario = build([{**POOL, "table": table, "host_overhead": host}])
    sample = Requests(np.zeros(n), np.array([5, 9, 2]), np.full(n, 200), np.zeros(n, np.int64), np.zeros(n))
    run = simulate(scenario, Plan("only", index_router(scenario)), requests=sample, core=core)
    pairs = 0.5 * (25 + 81 + 4)
    steps = np.array([[16, 0, 0, pairs], *([0, n, 16 + n * k, 0] for k in range(199))])
    ends = np.cumsum(table.many(steps) + host)
    np.testing.assert_allclose(run.first_token, ends[0], rtol=1e-12)
    np.testing.assert_allclose(run.finish, ends[-1], rtol=1e-12)
    assert run.replicas.steps[0] == 200 and run.replicas.busy[0] == pytest.approx(ends[-1])
    assert run.replicas.extrapolated[0] == np.count_nonzero(~table.covers(steps))
    used = np.concatenate([[16], 16 + n * np.arange(1, 200)])
    assert run.replicas.held_time[0] == pytest.approx(float(used @ (table.many(steps) + host)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sample=requests())
def test_a_flat_table_is_a_constant_step_time(sample: Requests) -> None:
    pool = {**POOL, "kv_capacity": 2 * LONGEST + 8, "step_time": [{"base": 0.25}], "token_budget": 30}
    scenario, same = build([pool]), build([{**pool, "step_time": [{"base": 9.0}], "table": flat(0.25)}])
    for core in ("compiled", "python"):
        truth = simulate(scenario, Plan("only", index_router(scenario)), requests=sample, core=core)  # type: ignore[arg-type]
        ours = simulate(same, Plan("only", index_router(same)), requests=sample, core=core)  # type: ignore[arg-type]
        assert_same(replace(ours, replicas=replace(ours.replicas, extrapolated=truth.replicas.extrapolated)), truth)


def test_pools_with_and_without_a_table_run_side_by_side() -> None:
    """Cyclic routing, so that every replica gets the same requests whatever the others are."""
    plain = {**POOL, "replicas": 2, "step_time": [{"base": 0.01, "kv": 1e-5}, {"base": 0.02}]}
    rng = np.random.default_rng(3)
    tables = [random_table(rng), random_table(rng)]
    mixed = build([plain, {**POOL, "name": "q", "table": tables[0]}, {**POOL, "name": "r", "table": tables[1]}])
    n = 400
    lengths = rng.integers(1, LONGEST, (2, n))
    sample = Requests(np.sort(rng.uniform(0, 20, n)), *lengths, np.zeros(n, np.int64), rng.random(n))
    run = simulate(mixed, Plan("rr", index_router(mixed)), requests=sample)
    assert run.replicas.extrapolated[:2].tolist() == [0, 0] and (run.replicas.extrapolated[2:] > 0).all()
    for pool, mine in zip(mixed.pools, (run.replica < 2, run.replica == 2, run.replica == 3), strict=True):
        alone = build([pool.model_dump() | {"table": pool.table}])
        columns = (sample.arrival, sample.prompt, sample.output, sample.cls, sample.u)
        some = Requests(*(column[mine] for column in columns))
        again = simulate(alone, Plan("rr", index_router(alone)), requests=some)
        assert again.finish.tolist() == run.finish[mine].tolist()
