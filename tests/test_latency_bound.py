"""The bound against every schedule of a small engine written here, against the simulator, and against closed forms."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from batching_oracle import INSTANCES, optimum
from hypothesis import assume, given, settings
from simulator_cases import build, exact_table, pools, requests

from formulations.batching_bounds import area_bound
from llmopt.batcher import Batcher
from llmopt.errors import ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.latency_bound import LatencyBound, latency_bound
from llmopt.plan import Plan, index_router
from llmopt.rounds import Rounds, model_1, model_2
from llmopt.scenario import Pool, Scenario
from llmopt.stability import equilibrium
from llmopt.workload import Requests

PIECES: list[dict[str, float]] = [
    {"base": 1.0},
    {"base": 1.0, "kv": 0.25},
    {"base": 0.5, "prefill": 0.25, "decode": 0.5, "kv": 0.125},
    {"prefill": 0.5, "decode": 0.25, "pairs": 0.125},
]


def pool_of(**settings: Any) -> Pool:
    basic = {"name": "p", "replicas": 1, "step_time": [{"base": 1.0}], "kv_capacity": 1000, "block_size": 1}
    return Pool.model_validate({**basic, **settings})


def sample_of(arrival: Any, prompt: Any, output: Any) -> Requests:
    n = len(arrival)
    zero = np.zeros(n)
    return Requests(np.array(arrival, dtype=float), np.array(prompt), np.array(output), zero.astype(np.int64), zero)


def bounded(where: list[Pool] | tuple[Pool, ...], sample: Requests) -> LatencyBound:
    return latency_bound(where, sample.arrival, sample.prompt, sample.output)


def least_latency(pool: Pool, sample: Requests) -> float:
    """The least total latency over every batch of every step: any tokens for anybody, who pauses keeps everything.

    A request whose first token is out may also emit the next by prefilling all its tokens again.
    """
    n, e = len(sample.arrival), pool.first_step
    arrival, prompt, output = (x.tolist() for x in (sample.arrival, sample.prompt, sample.output))
    ends = [s + o - e for s, o in zip(prompt, output, strict=True)]

    def moves(i: int, c: int) -> list[tuple[int, int, int, int, float, int]]:
        """What may happen to a request with c tokens: (gain, P, D, K, Q, tokens held)."""
        if c < prompt[i]:
            sizes = range(1, min(pool.chunk, prompt[i] - c) + 1)
            return [(m, m, 0, 0, m * c + m * m / 2, c + m) for m in sizes]
        again = [(1, c + 1, 0, 0, (c + 1) ** 2 / 2, c + 1)] if e and c + 1 <= pool.chunk else []
        return [(1, 0, 1, c, 0.0, c + 1), *again]

    @cache
    def best(now: float, done: tuple[int, ...]) -> float:
        if all(c == end for c, end in zip(done, ends, strict=True)):
            return 0.0
        later = [a for a in arrival if a > now]
        value = best(min(later), done) if later else np.inf
        here = [i for i in range(n) if arrival[i] <= now and done[i] < ends[i]]
        for chosen in product(*([None, *moves(i, done[i])] for i in here)):
            value = min(value, step(now, done, here, chosen))
        return value

    def step(now: float, done: tuple[int, ...], here: list[int], chosen: tuple[Any, ...]) -> float:
        taken = [(i, m) for i, m in zip(here, chosen, strict=True) if m]
        _, p, d, k, q, held = (sum(m[f] for _, m in taken) for f in range(6))
        held += len(taken) * pool.lookahead_slots
        if not taken or len(taken) > pool.max_batch or p + d > pool.token_budget or held > pool.kv_capacity:
            return np.inf
        end, after = now + pool.stepper(p, d, k, q), list(done)
        for i, m in taken:
            after[i] += m[0]
        completed = sum(end - arrival[i] for i, _ in taken if after[i] == ends[i])
        return float(completed + best(end, tuple(after)))

    return best(0.0, (0,) * n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_schedule_of_a_small_engine_is_below_the_bound(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    prompt = np.array([data.draw(st.integers(1, 2)) for _ in range(n)])
    output = np.array([data.draw(st.integers(1, 3)) for _ in range(n)])
    arrival = np.sort([data.draw(st.sampled_from([0.0, 0.0, 0.75, 2.0])) for _ in range(n)])
    pool = pool_of(
        step_time=data.draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=2)),
        kv_capacity=data.draw(st.integers(6, 12)),
        max_batch=data.draw(st.sampled_from([1, 2, 9])),
        token_budget=data.draw(st.sampled_from([1, 3, 20])),
        lookahead_slots=data.draw(st.sampled_from([0, 1])),
        first_token=data.draw(st.sampled_from(["prefill", "decode"])),
    )
    sample = sample_of(arrival, prompt, output)
    bound, best = bounded([pool], sample), least_latency(pool, sample)
    assert bound.total <= best + 1e-9
    assert bound.total >= 0.3 * best
    if n == 1 and pool.chunk >= prompt[0]:
        assert bound.total == pytest.approx(best)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_run_of_the_simulator_is_below_the_bound(data: st.DataObject) -> None:
    drawn = [{**pool, "table": None} for pool in data.draw(pools())]
    scenario, sample = build(drawn), data.draw(requests())
    plan = Plan("drawn", index_router(scenario, waiting=data.draw(st.sampled_from([0.0, 1.0])), kv_tokens=1.0))
    run = simulate(scenario, plan, requests=sample, core="python")
    assert bounded(scenario.pools, sample).mean <= run.e2e.mean() + 1e-9
    lengths = (sample.prompt, sample.output)
    if not run.preemptions.any():
        assert latency_bound(scenario.pools, sample.arrival, *lengths, preemptive=False).mean <= run.e2e.mean() + 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_nor_is_one_that_prefills_again_and_again(data: st.DataObject) -> None:
    """Pieces that charge reads but no prefill, and memory for few: preempted requests emit tokens without reading."""
    caching = data.draw(st.booleans())
    pool = {
        "name": "p",
        "replicas": 1,
        "step_time": [{"base": 0.015625, "kv": 0.25}, {"prefill": data.draw(st.sampled_from([0.0, 0.0078125]))}],
        "kv_capacity": 60,
        "block_size": 2,
        "token_budget": 100,
        "preemption": "recompute",
        "prefix_caching": caching,
    }
    scenario, sample = build([pool]), data.draw(requests())
    run = simulate(scenario, Plan("only", index_router(scenario)), requests=sample, core="python")
    assume(run.preemptions.sum() > 0)
    assert bounded(scenario.pools, sample).mean <= run.e2e.mean() + 1e-9


def test_rules_that_never_preempt_have_a_higher_bound() -> None:
    """Found in a cache, a preempted request emits for a token of prefill on a piece that charges only for reading."""
    pool = pool_of(step_time=[{"base": 0.01, "kv": 1e-5}], prefix_caching=True)
    sample = sample_of(np.zeros(50), np.full(50, 20), np.full(50, 40))
    kept = latency_bound([pool], sample.arrival, sample.prompt, sample.output, preemptive=False)
    swapped = pool_of(step_time=[{"base": 0.01, "kv": 1e-5}], preemption="swap")
    assert bounded([pool], sample).total < 0.95 * kept.total
    never = latency_bound([swapped], sample.arrival, sample.prompt, sample.output, preemptive=False)
    assert kept.total == pytest.approx(never.total)
    # a rule may drop caches where the engine would park them
    assert bounded([swapped], sample).total < kept.total


@pytest.mark.parametrize("mode", ["reserve", "swap"])
def test_one_request_has_its_own_latency(mode: str) -> None:
    rows = [{"base": 0.03, "kv": 1e-6}, {"base": 0.02, "prefill": 1e-4, "decode": 2e-4, "kv": 2e-5, "pairs": 1e-8}]
    pool = pool_of(step_time=rows, kv_capacity=5000, preemption=mode, first_token="prefill")
    sample = sample_of([3.0], [700], [900])
    run = simulate(build([pool.model_dump()]), Plan("only", index_router(build([pool.model_dump()]))), requests=sample)
    assert bounded([pool], sample).total == pytest.approx(run.e2e[0], rel=1e-8)


def test_prefills_one_by_one_are_a_single_machine() -> None:
    """Step time linear in prefill tokens alone, one output token: the bound is the shortest-first schedule, exactly."""
    prompt = np.random.default_rng(0).permutation(np.arange(1, 200))
    pool = pool_of(step_time=[{"prefill": 0.01}], kv_capacity=100_000, token_budget=1000, max_batch=100)
    bound = bounded([pool], sample_of(np.zeros(199), prompt, np.ones(199, dtype=int)))
    assert bound.argument == "order"
    assert bound.counted == 199
    assert bound.total == pytest.approx(0.01 * np.cumsum(np.sort(prompt)).sum(), rel=1e-8)


def shortest_remaining(arrival: np.ndarray, work: np.ndarray) -> float:
    """Total latency when the least remaining work is always served, in steps of 1 / 64 s."""
    left, total, now = np.round(work * 64).astype(int), 0.0, 0
    while left.any():
        here = np.flatnonzero((left > 0) & (np.round(arrival * 64) <= now))
        now += 1
        if len(here):
            i = here[np.argmin(left[here])]
            left[i] -= 1
            total += now / 64 - arrival[i] if not left[i] else 0.0
    return total


def test_a_queue_of_prefills_stays_below_shortest_remaining_first() -> None:
    """M/G/1: preemption by remaining work is best there, and the bound, by whole work, is not far below."""
    rng = np.random.default_rng(1)
    arrival = np.sort(np.round(rng.uniform(0, 60, 100) * 64) / 64)
    prompt = rng.integers(1, 80, 100)
    pool = pool_of(step_time=[{"prefill": 1 / 64}], kv_capacity=100_000, token_budget=1000)
    best = shortest_remaining(arrival, prompt / 64)
    bound = bounded([pool], sample_of(arrival, prompt, np.ones(100, dtype=int)))
    assert 0.9 * best <= bound.total <= best + 1e-9


@pytest.mark.parametrize(("load", "share"), [(0.3, 0.99), (0.8, 0.88)])
def test_a_steady_stream_has_the_latency_of_the_fluid_equilibrium(load: float, share: float) -> None:
    """Alike requests at even gaps: a request takes o steps of T* = a / (1 - W), which no rule can shorten for long."""
    rows = [{"base": 0.02, "decode": 2e-4, "kv": 1e-7}]
    pool = pool_of(name="p0", step_time=rows, kv_capacity=10**7, max_batch=10_000, first_token="decode")
    law = {"law": "constant", "value": 100}
    alike = [{"name": "alike", "share": 1.0, "prompt": law, "output": law}]
    rate = load / (100 * (2e-4 + 1e-7 * 149.5))
    scenario = Scenario.model_validate(
        {"name": "steady", "workload": {"rate": rate, "classes": alike}, "pools": [pool.model_dump()]}
    )
    sample = sample_of(np.arange(20_000) / rate, np.full(20_000, 100), np.full(20_000, 100))
    step = equilibrium(pool, scenario.workload.classes, scenario.workload.rates).step_time
    bound, run = bounded([pool], sample), simulate(scenario, Plan("all", index_router(scenario)), requests=sample)
    assert bound.argument == "price"
    assert share * 100 * step < bound.mean < 101 * step
    assert share * run.e2e.mean() < bound.mean <= run.e2e.mean()


def rounds_pool(instance: Rounds) -> Pool:
    return pool_of(
        kv_capacity=instance.capacity, lookahead_slots=1, token_budget=10**8, max_batch=10**6, preemption="reserve"
    )


def of_rounds(instance: Rounds) -> LatencyBound:
    order = np.argsort(instance.arrival, kind="stable")
    return bounded(
        [rounds_pool(instance)], sample_of(*(x[order] for x in (instance.arrival, instance.prompt, instance.output)))
    )


@given(INSTANCES)
@settings(deadline=None, max_examples=25)
def test_in_rounds_it_lies_between_the_area_bound_and_the_optimum(instance: Rounds) -> None:
    assume(instance.prompt.min(initial=1) > 0)
    assert area_bound(instance) * (1 - 1e-8) <= of_rounds(instance).total <= optimum(instance) + 1e-9


@pytest.mark.parametrize("instance", [model_1(3, 50), model_2(3, 50), model_1(0, 2000)])
def test_it_is_no_weaker_than_the_area_bound(instance: Rounds) -> None:
    assert of_rounds(instance).total >= area_bound(instance) * (1 - 1e-8)


def test_replicas_of_one_pool_or_of_two_are_the_same() -> None:
    rng = np.random.default_rng(3)
    sample = sample_of(np.sort(rng.uniform(0, 5, 300)), rng.integers(1, 90, 300), rng.integers(1, 90, 300))
    rows = [{"base": 0.02, "decode": 1e-3, "kv": 1e-5}]
    one = [pool_of(step_time=rows, replicas=2)]
    two = [pool_of(name=name, step_time=rows) for name in "ab"]
    assert bounded(two, sample).total == pytest.approx(bounded(one, sample).total, rel=0.02)
    assert bounded([*one, pool_of(name="c", step_time=[{"base": 0.001}])], sample).total < bounded(one, sample).total


def test_a_measured_table_has_no_bound() -> None:
    pool = pool_of(table=exact_table(np.random.default_rng(0)))
    bound = bounded([pool], sample_of([0.0], [3], [3]))
    assert np.isnan(bound.mean)
    assert "plays a measured table" in bound.reason


def test_nothing_to_serve_takes_no_time() -> None:
    assert bounded([pool_of()], sample_of([], np.zeros(0, int), np.zeros(0, int))).total == 0


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "said"),
    [
        ([1.0, 0.0], [3, 3], [3, 3], "ascending order; sort the requests"),
        ([0.0, 0.0], [3, 0], [3, 3], "at least 1 token; drop empty requests"),
        ([0.0, 0.0], [3, 900], [3, 300], "request 1 needs 1200 tokens and can never fit"),
        ([0.0], [3, 3], [3, 3], "differ in shape"),
    ],
)
def test_nonsense_is_refused(arrival: Any, prompt: Any, output: Any, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        latency_bound([pool_of()], np.array(arrival), np.array(prompt), np.array(output))


def test_no_pool_is_refused() -> None:
    with pytest.raises(ScenarioError, match="there is no pool; give at least one"):
        latency_bound([], np.zeros(1), np.ones(1, dtype=int), np.ones(1, dtype=int))


def test_rules_that_prefill_whole_prompts_ignore_chunks() -> None:
    pool = pool_of(step_time=[{"base": 1.0}], prefill_chunk=100, token_budget=4096, kv_capacity=2000)
    sample = sample_of(np.zeros(1), np.array([1000]), np.array([2]))
    run = simulate(build([pool.model_dump()]), Plan("whole", batcher=Batcher(mixing="prefill-only")), requests=sample)
    assert run.e2e.mean() == 2.0
    assert bounded([pool], sample).mean <= 2.0


@pytest.mark.parametrize("mode", ["reserve", "swap", "restart"])
def test_rules_may_drop_caches_where_the_engine_would_not(mode: str) -> None:
    """A piece that charges for reading only: to prefill again costs nothing and emits a token."""
    pool = pool_of(step_time=[{"base": 0.001, "kv": 0.01}], preemption=mode, kv_capacity=400, max_batch=1)
    sample = sample_of(np.zeros(6), np.full(6, 20), np.full(6, 12))
    rule = Batcher(admission="optimistic", overflow="recompute", levels=(1, 2, 3, 4, 5, 6, 7, 8))
    run = simulate(build([pool.model_dump()]), Plan("levels", batcher=rule), requests=sample)
    assert bounded([pool], sample).total <= run.e2e.sum() * (1 + 1e-9)


def test_nothing_is_lost_by_cancellation_in_a_long_run() -> None:
    """Short requests that never meet, over ten days: each takes its solo latency, and the bound says no more."""
    pool = pool_of(step_time=[{"base": 0.001}], kv_capacity=100_000)
    arrival = np.sort(np.random.default_rng(1).random(2000)) * 1e6
    sample = sample_of(arrival, np.full(2000, 10), np.full(2000, 7))
    found = bounded([pool], sample)
    assert found.mean == pytest.approx(0.007, rel=1e-6)
