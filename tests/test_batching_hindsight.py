"""The best schedule as a policy: rounds of a replica, certificates below every schedule, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from batching_oracle import optimum, small_instance
from factories import TWO_PIECES, pool, request_class, scenario

from formulations import batching_hindsight
from formulations.batching_exact import Hindsight
from formulations.batching_hindsight import HindsightReplay, Replica, best_known, preemptive_bound, unit_rounds
from formulations.batching_start import by_volume, mc_sf
from llmopt.batcher import Candidates
from llmopt.errors import PolicyError, ScenarioError
from llmopt.plan import check_plan
from llmopt.rounds import Rounds, hand_instances
from llmopt.scenario import Scenario
from llmopt.workload import Requests


def in_rounds(capacity: int = 64, seconds: float = 0.5, prompt: int = 2, **settings: Any) -> Scenario:
    worker = pool(**{
        "step_time": [{"base": seconds}], "kv_capacity": capacity, "block_size": 1, "lookahead_slots": 1,
        "preemption": "restart", "max_batch": 1000, "token_budget": 10_000, **settings,
    })  # fmt: skip
    return scenario([worker], [request_class(prompt=prompt, output=1)])


def requests_of(instance: Rounds, seconds: float, late: float = 0.0) -> Requests:
    n, nobody = len(instance), np.zeros(len(instance), dtype=np.int64)
    return Requests(instance.arrival * seconds + late, instance.prompt, instance.output, nobody, np.zeros(n))


def candidates_of(requests: Requests) -> Candidates:
    o = requests.output
    return Candidates(requests.arrival, requests.prompt, requests.cls, requests.u, o, o, o)


@pytest.mark.parametrize(("name", "best"), [("A", 22), ("B", 15)])
def test_the_hand_instances_are_solved_and_certified(name, best) -> None:
    instance = hand_instances()[name]
    plan = HindsightReplay().plan(in_rounds(instance.capacity))
    requests = requests_of(instance, 0.5)
    start = plan.batcher.order(candidates_of(requests)).astype(int)
    assert instance.feasible(start)
    assert instance.latency(start) == best
    assert plan.bound(requests) == pytest.approx(best * 0.5)
    release = plan.batcher.release(candidates_of(requests))
    assert (np.ceil(release / 0.5) == start).all()
    assert plan.batcher.clairvoyant


def test_certificates_are_optimal_on_small_instances_with_arrivals() -> None:
    rng = np.random.default_rng(21)
    for _ in range(3):
        instance = small_instance(rng)
        plan = HindsightReplay().plan(in_rounds(instance.capacity))
        requests = requests_of(instance, 0.5)
        best = optimum(instance)
        assert plan.bound(requests) == pytest.approx(0.5 * best)
        assert instance.latency(plan.batcher.order(candidates_of(requests)).astype(int)) == best


def test_the_program_closes_what_the_search_leaves_open(monkeypatch) -> None:
    class Hasty:
        def __init__(self, time_limit: float) -> None:
            assert time_limit == 5.0

        def solve(self, instance: Rounds) -> Hindsight:
            start = mc_sf(instance)
            return Hindsight(start, instance.latency(start), 0)

    monkeypatch.setattr(batching_hindsight, "ExactHindsight", Hasty)
    rng = np.random.default_rng(22)
    for _ in range(4):
        instance = small_instance(rng)
        found = best_known(instance, 10.0)
        assert found.latency == found.bound == instance.latency(found.start) == optimum(instance)
        assert instance.feasible(found.start)


def test_arrivals_inside_a_round_are_served_in_the_next_and_bounded_from_the_last() -> None:
    instance = Rounds(np.array([0, 2]), np.array([3, 3]), np.array([4, 4]), 64)
    plan = HindsightReplay().plan(in_rounds())
    requests = requests_of(instance, 0.5, late=0.2)
    start = plan.batcher.order(candidates_of(requests))
    assert start.tolist() == [1, 3]
    assert (start * 0.5 >= requests.arrival).all()
    # each takes 4 rounds from the beginning of the round it arrives in, 0.2 s of which are over
    assert plan.bound(requests) == pytest.approx(2 * (2.0 - 0.2))


def test_the_first_token_of_decode_makes_prefill_a_round_of_its_own() -> None:
    replica = unit_rounds("hindsight", in_rounds(lookahead_slots=0, first_token="decode"))
    rounds = replica.rounds(np.zeros(1), np.array([5]), np.array([3]))
    # steps hold 5 (prefill), 6, 7 and 8 tokens
    assert rounds.usage(np.zeros(1, dtype=np.int64)).tolist() == [0, 5, 6, 7, 8]
    one = unit_rounds("hindsight", in_rounds())
    held = one.rounds(np.zeros(1), np.array([5]), np.array([3])).usage(np.zeros(1, dtype=np.int64))
    # the first token comes with prefill; every step keeps a slot more than its tokens
    assert held.tolist() == [0, 6, 7, 8]


def preemptive_optimum(instance: Rounds) -> int:
    """Least total latency when a request may lose its memory for a round and go on as if nothing had happened."""
    from functools import cache

    a, s, o = (x.tolist() for x in (instance.arrival, instance.prompt, instance.output))

    @cache
    def best(now: int, made: tuple[int, ...]) -> float:
        live = [i for i in range(len(a)) if made[i] < o[i]]
        if not live:
            return 0
        if now > instance.horizon:
            return float("inf")
        ready = [i for i in live if a[i] <= now]
        value = float("inf")
        for mask in range(1 << len(ready)):
            run = [i for k, i in enumerate(ready) if mask >> k & 1]
            if sum(s[i] + made[i] + 1 for i in run) > instance.capacity or (ready and not run):
                continue
            after = tuple(m + (i in run) for i, m in enumerate(made))
            ended = sum(now + 1 - a[i] for i in run if after[i] == o[i])
            value = min(value, ended + best(now + 1, after))
        return value

    return int(best(0, (0,) * len(a)))


def test_where_memory_can_be_taken_the_bound_holds_for_rules_that_do() -> None:
    rng = np.random.default_rng(5)
    saved = 0
    for _ in range(25):
        n = int(rng.integers(2, 5))
        capacity = int(rng.integers(8, 13))
        prompt = rng.integers(1, 4, n)
        output = rng.integers(1, np.minimum(6, capacity - prompt) + 1)
        instance = Rounds(rng.integers(0, 4, n), prompt, output, capacity)
        free, best = preemptive_optimum(instance), optimum(instance)
        assert preemptive_bound(instance, 5.0) <= free <= best
        saved += free < best
        plan = HindsightReplay().plan(in_rounds(capacity, preemption="recompute"))
        assert plan.bound(requests_of(instance, 0.5)) == pytest.approx(0.5 * preemptive_bound(instance, 5.0))
        assert not plan.figures["exact_bound"]
    # taking memory away does pay, so that the bound of the search would be wrong there
    assert saved > 0


def test_the_bound_is_below_list_schedules_where_nothing_is_proven() -> None:
    rng = np.random.default_rng(6)
    instance = Rounds(np.sort(rng.integers(0, 60, 40)), rng.integers(1, 6, 40), rng.integers(1, 30, 40), 60)
    plan = HindsightReplay(time_limit=0.5).plan(in_rounds(60))
    requests = requests_of(instance, 0.5)
    bound = plan.bound(requests)
    found = instance.latency(plan.batcher.order(candidates_of(requests)).astype(int))
    assert 0 < bound <= 0.5 * found
    assert found <= min(instance.latency(mc_sf(instance)), instance.latency(by_volume(instance)))
    assert 0.5 * preemptive_bound(instance, 5.0) <= 0.5 * found


def test_no_requests_cost_nothing() -> None:
    nobody = Rounds.together([], 64)
    plan = HindsightReplay().plan(in_rounds())
    assert plan.bound(requests_of(nobody, 0.5)) == 0
    assert plan.batcher.order(candidates_of(requests_of(nobody, 0.5))).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"replicas": 2}, "several replicas"),
        ({"step_time": TWO_PIECES}, "steps that last longer"),
        ({"block_size": 4}, "block_size = 1"),
        ({"prefill_chunk": 1}, "longest prompt"),
        ({"token_budget": 32}, "whole memory"),
    ],
)
def test_other_replicas_are_refused_in_a_sentence(settings, what) -> None:
    with pytest.raises(PolicyError, match=what):
        HindsightReplay().plan(in_rounds(**settings))


def test_no_time_is_refused() -> None:
    with pytest.raises(ScenarioError, match="time_limit is 0 s; give a positive number"):
        HindsightReplay(time_limit=0.0)


def test_too_many_requests_are_refused_before_memory_is_taken() -> None:
    many = Rounds.together([(3, 40)] * 2000, 64)
    plan = HindsightReplay().plan(in_rounds())
    with pytest.raises(PolicyError, match="2000 requests over 80000 rounds are too many to search"):
        plan.bound(requests_of(many, 0.5))


def test_a_batch_that_is_too_small_for_the_best_schedule_is_refused() -> None:
    at = in_rounds(max_batch=1)
    check_plan(HindsightReplay().plan(at), at)
    plan = HindsightReplay().plan(at)
    with pytest.raises(PolicyError, match="serves more than 1 requests"):
        plan.batcher.order(candidates_of(requests_of(Rounds.together([(3, 4)] * 2, 64), 0.5)))


def test_a_replica_is_data() -> None:
    replica = unit_rounds("hindsight", in_rounds())
    assert replica == Replica(0.5, 64, 1000, 0, 0, restarts=True)
    assert replace(replica, before=1).rounds(np.zeros(1), np.array([5]), np.array([3])).prompt.tolist() == [6]
