"""Timed schedules against all start vectors, a plain second scorer and the simulator."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from batching_oracle import held, small_instance
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import build

from formulations.batching_bounds import area_bound
from formulations.batching_start import admitted, best_start, mc_sf
from formulations.batching_timed import TimedInstance, TimedSchedule, evaluated
from llmopt.errors import ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.hardware import StepTime
from llmopt.latency_bound import latency_bound
from llmopt.plan import Plan, index_router
from llmopt.rounds import Rounds, model_1
from llmopt.scenario import Pool
from llmopt.solve import solve
from llmopt.workload import Requests

STEPPERS = [
    StepTime(np.array([[1.0, 0, 0, 0, 0]])),
    StepTime(np.array([[1.0, 0.5, 0.25, 0.125, 0.0625]])),
    StepTime(np.array([[1.0, 0, 0, 0.25, 0], [0.25, 0.5, 0.5, 0.125, 0.25]])),
    StepTime(np.array([[0.0, 1.0, 0.125, 0, 0.5], [0.5, 0, 0, 0.0625, 0]])),
]


def drawn(seed: int, most: int = 3) -> TimedInstance:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, most + 1))
    output = rng.integers(1, 4 if n < 4 else 3, n)
    rounds = Rounds(np.zeros(n, int), rng.integers(0, 4, n), output, int(rng.integers(6, 10)))
    arrival = rng.choice([0.0, 0.5, 3.0], n) if rng.random() < 0.5 else np.zeros(n)
    return TimedInstance(rounds, STEPPERS[int(rng.integers(len(STEPPERS)))], arrival)


def played(instance: TimedInstance, start: tuple[int, ...]) -> float:
    """Total latency, step by step and request by request."""
    rounds, clock, total = instance.rounds, 0.0, 0.0
    sizes = list(zip(rounds.prompt.tolist(), rounds.output.tolist(), start, instance.arrival.tolist(), strict=True))
    for t in range(1, max(p + o for _, o, p, _ in sizes) + 1):
        p_, d, k, q, ends, busy = 0, 0, 0, 0.0, [], False
        for s, o, p, a in sizes:
            if p + 1 == t:
                clock, p_, q, busy = max(clock, a), p_ + s, q + s * s / 2, True
            elif p + 1 < t <= p + o:
                d, k, busy = d + 1, k + s + (t - p - 2), True
            ends += [a] if t == p + o else []
        rows = instance.stepper.coefficients.tolist()
        clock += max(r[0] + r[1] * p_ + r[2] * d + r[3] * k + r[4] * q for r in rows) if busy else 0.0
        total += sum(clock - a for a in ends)
    return total


def least(instance: TimedInstance) -> float:
    """The least latency over all start vectors that fit into memory."""
    rounds = instance.rounds
    choices = [range(instance.steps - o + 1) for o in rounds.output.tolist()]
    fitting = (s for s in product(*choices) if max(held(rounds, s).values()) <= rounds.capacity)
    return min(played(instance, start) for start in fitting)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_the_score_is_that_of_a_plain_replay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rounds = small_instance(rng)
    instance = TimedInstance(rounds, STEPPERS[seed % 4], rng.choice([0.0, 2.5, 4.0], len(rounds)))
    start = tuple(rng.integers(0, 9, len(rounds)).tolist())
    assert evaluated(instance, np.array(start)).latency == pytest.approx(played(instance, start))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_the_program_finds_the_least_of_all_start_vectors(seed: int) -> None:
    instance = drawn(seed)
    model = TimedSchedule().build(instance)
    record = solve(model)
    best = least(instance)
    assert record.objective == pytest.approx(best, abs=1e-4)
    start = TimedSchedule().extract(model, instance)
    assert instance.rounds.feasible(start)
    assert evaluated(instance, start).latency == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_four_requests_too(stepper: StepTime) -> None:
    rounds = Rounds.together([(2, 2), (0, 2), (3, 1), (1, 2)], 7)
    instance = TimedInstance.together(rounds, stepper)
    model = TimedSchedule().build(instance, mc_sf(rounds))
    assert solve(model).objective == pytest.approx(least(instance), abs=1e-4)


def pool_of(instance: TimedInstance) -> Pool:
    names = ("base", "prefill", "decode", "kv", "pairs")
    pool = {
        "name": "p",
        "replicas": 1,
        "step_time": [dict(zip(names, row, strict=True)) for row in instance.stepper.coefficients.tolist()],
        "kv_capacity": instance.rounds.capacity,
        "block_size": 1,
        "lookahead_slots": 1,
        "max_batch": 1000,
        "token_budget": 10**6,
        "preemption": "lookahead",
    }
    return Pool.model_validate(pool)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_the_simulator_takes_the_times_of_the_score(stepper: StepTime) -> None:
    """First come, first served with the exact look-ahead check, all at 0."""
    rounds = model_1(5, 40)
    instance, n = TimedInstance.together(rounds, stepper), len(rounds)
    zero = np.zeros(n)
    sample = Requests(zero, rounds.prompt, rounds.output, zero.astype(np.int64), zero)
    scenario = build([pool_of(instance).model_dump()], longest=rounds.capacity // 2)
    run = simulate(scenario, Plan("fifo", index_router(scenario)), requests=sample)
    ours = evaluated(instance, admitted(rounds, np.arange(n, dtype=float)))
    np.testing.assert_allclose(run.finish, ours.finish)
    bound = latency_bound([pool_of(instance)], zero, rounds.prompt, rounds.output)
    assert bound.total <= ours.latency


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_in_seconds_is_below_the_timed_optimum(seed: int) -> None:
    instance = drawn(seed)
    prompt = np.maximum(instance.rounds.prompt, 1)
    rounds = Rounds(instance.rounds.arrival, prompt, instance.rounds.output, instance.rounds.capacity)
    order = np.argsort(instance.arrival, kind="stable")
    instance = TimedInstance(rounds, instance.stepper, instance.arrival)
    bound = latency_bound([pool_of(instance)], instance.arrival[order], prompt[order], rounds.output[order])
    assert bound.total <= least(instance) + 1e-9


def test_what_is_best_in_rounds_need_not_be_in_seconds() -> None:
    """A long prompt delays those that decode: in rounds it starts with them, in seconds after them."""
    rounds = Rounds.together([(1, 3), (1, 3), (6, 1)], 20)
    instance = TimedInstance.together(rounds, StepTime(np.array([[1.0, 2.0, 0.0, 0.0, 0.0]])))
    in_rounds = best_start(rounds, 1000)
    assert rounds.latency(in_rounds) == 7 >= area_bound(rounds)
    model = TimedSchedule().build(instance)
    solve(model)
    timed = evaluated(instance, TimedSchedule().extract(model, instance)).latency
    assert timed == pytest.approx(least(instance))
    assert evaluated(instance, in_rounds).latency > 1.2 * timed


def test_a_thousand_requests_are_scored() -> None:
    rounds = model_1(0, 1000)
    unit = evaluated(TimedInstance.together(rounds, STEPPERS[0]), mc_sf(rounds))
    assert unit.latency == rounds.latency(mc_sf(rounds))


def test_nonsense_is_refused() -> None:
    with pytest.raises(ScenarioError, match="one finite arrival in s, at least 0"):
        TimedInstance(model_1(0, 3), STEPPERS[0], np.array([0.0, -1.0, 2.0]))
