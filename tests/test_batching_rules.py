"""Rules that rank a queue: batches of smallest F by brute force, the grid program by a second one, orders by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from batching_oracle import checked, small_instance
from factories import pool, request_class, scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations.batching import TimeIndexed
from formulations.batching_grid import GridRelaxation, kinds, mean_starts
from formulations.batching_queue import all_rounds, full_step, keys_of, period, running_rounds, volumes, waiting_rounds
from formulations.batching_rolling import RollingHorizon, best_order, by_start, queue_latency
from formulations.batching_rules import AMax, AMin, McSf
from formulations.batching_sorted import LpSwap, SortedF, SortedLp, order_by_f, order_by_start, order_by_swaps
from formulations.batching_start import admitted
from llmopt.batcher import Batcher, Candidates, Snapshot
from llmopt.policy import solved
from llmopt.rounds import Rounds, hand_instances
from llmopt.scenario import Scenario

FINE = GridRelaxation(blocks=10**6, kinds=10**6)


def together(requests: list[tuple[int, int]], batch: tuple[int, ...], capacity: int) -> bool:
    """Whether a batch can start together, round by round."""
    last = max(requests[i][1] for i in batch)
    return all(sum(requests[i][0] + t for i in batch if requests[i][1] >= t) <= capacity for t in range(1, last + 1))


def least_f(requests: list[tuple[int, int]], left: list[int], capacity: int, most: int) -> tuple[float, int]:
    """Smallest F over all subsets and the largest size that has it."""
    values = [
        (sum(requests[i][1] for i in batch) / size**2, -size)
        for size in range(1, min(most, len(left)) + 1)
        for batch in combinations(left, size)
        if together(requests, batch, capacity)
    ]
    f, size = min(values)
    return f, -size


instances = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(instances, st.integers(24, 60), st.integers(1, 8))
def test_batches_of_sorted_f_have_the_smallest_f_of_all_subsets(requests, capacity, most) -> None:
    order = order_by_f(Rounds.together(requests, capacity), most).tolist()
    assert sorted(order) == list(range(len(requests)))
    while order:
        f, size = least_f(requests, order, capacity, most)
        batch, order = order[:size], order[size:]
        assert together(requests, tuple(batch), capacity)
        assert sum(requests[i][1] for i in batch) / len(batch) ** 2 == pytest.approx(f)
        assert [requests[i][1] for i in batch] == sorted(requests[i][1] for i in batch)


@settings(max_examples=60, deadline=None)
@given(instances, st.integers(24, 60))
def test_prefixes_alone_give_batches_that_can_start_together(requests, capacity) -> None:
    instance = Rounds.together(requests, capacity)
    order = order_by_f(instance, 8, exact=0).tolist()
    assert sorted(order) == list(range(len(requests)))
    exact = order_by_f(instance, 8).tolist()
    f, size = least_f(requests, list(range(len(requests))), capacity, 8)
    prefixes = [order[:k] for k in range(1, len(order) + 1) if together(requests, tuple(order[:k]), capacity)]
    reached = min(sum(requests[i][1] for i in batch) / len(batch) ** 2 for batch in prefixes)
    assert reached >= f - 1e-9
    assert sum(requests[i][1] for i in exact[:size]) / size**2 == pytest.approx(f)


def test_a_prompt_that_fits_with_nobody_still_gets_its_batch() -> None:
    instance = Rounds.together([(50, 10), (1, 1), (1, 2)], 60)
    assert order_by_f(instance, 8, exact=0).tolist() == [1, 2, 0]


def test_sorted_f_forms_the_batches_of_the_third_hand_instance() -> None:
    instance = hand_instances()["C"]
    order = order_by_f(instance, len(instance))
    assert instance.output[order].tolist() == [5] * 16 + [4] * 8
    assert instance.usage(np.zeros(24, dtype=np.int64)).max() > 64
    ten, six = instance.part(np.isin(np.arange(24), order[:10])), instance.part(np.isin(np.arange(24), order[10:16]))
    assert ten.usage(np.zeros(10, dtype=np.int64)).max() == 60
    assert (ten.output.sum() / 100, six.output.sum() / 36) == (0.5, pytest.approx(0.8333, abs=1e-4))


def rounds_scenario(capacity: int) -> Scenario:
    """One worker that works in rounds of a second."""
    worker = pool(
        step_time=[{"base": 1.0}], kv_capacity=capacity, block_size=1, lookahead_slots=1, preemption="restart",
        max_batch=1000, token_budget=10_000,
    )  # fmt: skip
    return scenario([worker], [request_class(prompt=3, output=4)])


def candidates(instance: Rounds, predicted=None) -> Candidates:
    n, p = len(instance), instance.output if predicted is None else predicted
    nobody = np.zeros(n, dtype=np.int64)
    return Candidates(instance.arrival.astype(float), instance.prompt, nobody, nobody / 1.0, p, p, p)


@pytest.mark.parametrize(("name", "latency"), [("A", 22), ("B", 15), ("C", 331)])
@pytest.mark.parametrize("policy", [SortedF(at_once=True), SortedLp(at_once=True), LpSwap(at_once=True)])
def test_orders_made_beforehand_reach_the_published_latencies(policy, name, latency) -> None:
    instance = hand_instances()[name]
    rule = policy.plan(rounds_scenario(instance.capacity)).batcher
    assert rule.clairvoyant
    assert policy.name.endswith("-all")
    keys = rule.order(candidates(instance))
    assert checked(instance, admitted(instance, keys)) == latency


def test_shortest_first_is_data() -> None:
    at = rounds_scenario(20)
    assert McSf().plan(at).batcher == Batcher("predicted", admission="lookahead")
    assert AMax().plan(at).batcher == Batcher("predicted", admission="lookahead", belief="high")
    low = AMin().plan(at).batcher
    assert (low.belief, low.victims, low.overflow, low.order) == ("low", "least", "restart", "predicted")


@pytest.mark.parametrize(("name", "value"), [("A", 21.5), ("C", 287.39)])
def test_the_grid_of_single_rounds_is_the_published_relaxation(name, value) -> None:
    instance = hand_instances()[name]
    assert solved(FINE.build(instance)).objective + instance.output.sum() == pytest.approx(value, abs=0.005)


def test_the_grid_of_single_rounds_is_the_relaxed_program() -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        one = small_instance(rng)
        instance = Rounds(np.zeros(len(one), dtype=np.int64), one.prompt, one.output, one.capacity)
        second = solved(TimeIndexed(cliques=False, relaxed=True).build(instance)).objective
        assert solved(FINE.build(instance)).objective + instance.output.sum() == pytest.approx(second, rel=1e-6)


def test_a_coarse_grid_keeps_its_size() -> None:
    rng = np.random.default_rng(5)
    prompt, output = rng.integers(1, 900, 1000), rng.integers(1, 1000, 1000)
    instance = Rounds(np.zeros(1000, dtype=np.int64), prompt, output, 20_000)
    grid = GridRelaxation(blocks=30, kinds=50).grid(instance)
    assert grid.blocks <= 30
    assert len(grid.count) <= 50
    assert grid.count.sum() == 1000
    whole = grid.area @ np.repeat(np.eye(grid.blocks)[:1], len(grid.count), axis=0).reshape(-1)
    cls, kind = kinds(instance, 50)
    volume = kind[:, 0] * kind[:, 1] + kind[:, 1] * (kind[:, 1] + 1) / 2
    assert whole.sum() == pytest.approx(volume.sum())
    mean = np.array([prompt[cls == k].mean() for k in range(len(kind))])
    assert kind[:, 0] == pytest.approx(mean)


def test_mean_starts_wait_for_memory_that_others_hold() -> None:
    instance = Rounds.together([(4, 2)], 10)
    assert mean_starts(FINE, instance) == pytest.approx([0.0])
    assert mean_starts(FINE, instance, np.array([10.0, 10.0, 10.0])) == pytest.approx([3.0])
    assert mean_starts(FINE, Rounds.together([], 10)).shape == (0,)


def cut(requests: list[tuple[int, int]], order: list[int], capacity: int, most: int) -> list[list[int]]:
    """The order in batches, each as long as it can start together."""
    batches: list[list[int]] = []
    for i in order:
        if batches and len(batches[-1]) < most and together(requests, (*batches[-1], i), capacity):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def test_swaps_end_where_none_is_left() -> None:
    rng = np.random.default_rng(8)
    moved = 0
    for _ in range(30):
        n = int(rng.integers(2, 14))
        requests = [(int(s), int(o)) for s, o in zip(rng.integers(1, 20, n), rng.integers(1, 20, n), strict=True)]
        instance = Rounds.together(requests, 45)
        order = order_by_swaps(instance, 4).tolist()
        assert sorted(order) == list(range(n))
        before = cut(requests, order_by_start(instance, 4).tolist(), 45, 4)
        moved += order != [i for batch in before for i in sorted(batch, key=lambda i: requests[i][1])]
        ends = np.cumsum([len(batch) for batch in before])
        batches = [order[e - len(batch) : e] for e, batch in zip(ends, before, strict=True)]
        assert all(together(requests, tuple(batch), 45) for batch in batches)
        for here, there in pairwise(batches):
            one, other = here[:-1] + there[:1], here[-1:] + there[1:]
            better = requests[there[0]][1] < requests[here[-1]][1]
            assert not (better and together(requests, tuple(one), 45) and together(requests, tuple(other), 45))
    assert moved > 0


def test_a_swap_moves_the_longest_of_a_batch_behind_the_shortest_of_the_next() -> None:
    from formulations.batching_sorted_kernel import swapped

    prompt, output = np.array([2, 2, 2, 2]), np.array([9, 3, 4, 8])
    # batches of two, {9, 3} and {4, 8}, become {3, 4} and {8, 9}
    assert output[swapped(np.arange(4), prompt, output, 100, 2)].tolist() == [3, 4, 8, 9]
    # with 12 tokens {3, 9} can start together but {8, 9} cannot, so nothing moves
    prompt = np.array([1, 1, 1, 1])
    assert output[swapped(np.arange(4), prompt, output, 15, 2)].tolist() == [3, 9, 4, 8]


def snapshot(waiting, running=(), capacity: int = 40, **settings) -> Snapshot:
    """Waiting (prompt, predicted, emitted) and running (prompt, predicted, computed, emitted) on one replica."""
    worker = rounds_scenario(capacity).pools[0].model_copy(update=settings)
    w = np.array(waiting, dtype=np.int64).reshape(-1, 3).T
    r = np.array(running, dtype=np.int64).reshape(-1, 4).T
    return Snapshot(5.0, worker, np.arange(w.shape[1]), np.zeros(w.shape[1]), w[0], w[1], w[2], *r)


def test_a_queue_in_rounds_counts_kept_tokens_as_prompt_and_chunks_as_output() -> None:
    now = snapshot([(3, 10, 0), (3, 10, 4), (9, 5, 0)], [(3, 10, 7, 4), (8, 6, 4, 0)], token_budget=4)
    waits = waiting_rounds(now)
    assert waits.prompt.tolist() == [3, 7, 9]
    assert waits.output.tolist() == [10, 6 + 1, 5 + 2]
    runs = running_rounds(now)
    assert runs.prompt.tolist() == [7, 4]
    assert runs.output.tolist() == [6, 6 + 1]


def test_beliefs_that_cannot_fit_are_cut_to_what_does() -> None:
    waits = waiting_rounds(snapshot([(38, 30, 0), (60, 5, 0)]))
    assert (waits.peak <= waits.capacity).all()
    assert (waits.output >= 1).all()


def test_keys_keep_the_order_and_let_newcomers_in_by_their_volume() -> None:
    volume = np.array([30, 5, 5, 80])
    keys = keys_of(np.array([3, 0, 2, 1]), volume)
    assert np.argsort(keys).tolist() == [3, 0, 2, 1]
    assert sorted(np.floor(keys)) == [5, 5, 30, 80]
    instance = Rounds.together([(3, 4), (1, 1)], 40)
    newcomers = volumes(candidates(instance))
    assert newcomers.tolist() == instance.volume.tolist() == [3 * 4 + 10, 2]
    assert [(keys < v).sum() for v in newcomers] == [2, 0]


def test_an_order_beforehand_takes_the_smallest_pool() -> None:
    small, large = pool("small", kv_capacity=500), pool("large", kv_capacity=5000)
    at = scenario([large, small], [request_class(prompt=10, output=10)])
    rounds = all_rounds(at, candidates(Rounds.together([(3, 4), (5, 6)], 500)))
    assert rounds.capacity == at.pools[1].largest
    assert rounds.output.tolist() == [4, 6]


def test_the_period_follows_the_step_and_the_horizon() -> None:
    at = scenario([pool(step_time=[{"base": 0.01, "decode": 1e-4, "kv": 1e-6}])], horizon=600.0)
    # 64 sequences of 100 + 101 / 2 tokens each
    step = 0.01 + 64 * 1e-4 + 64 * 150.5 * 1e-6
    assert full_step(at.pools[0], at) == pytest.approx(step)
    assert period(at, 5) == pytest.approx(5 * step)
    assert period(at, 5, 100) == pytest.approx(6.0)
    assert SortedF().plan(at).batcher.replan.every == pytest.approx(5 * step)


def latency_by_hand(waiting: Rounds, running: Rounds, order) -> int:
    """Latency of a queue that stops at the first that does not fit, with memory counted round by round."""
    tokens: dict[int, int] = {}
    total = now = 0
    queue = [(running, i) for i in range(len(running))] + [(waiting, int(i)) for i in order]
    for instance, i in queue:
        s, o = int(instance.prompt[i]), int(instance.output[i])
        while any(tokens.get(now + k, 0) + s + k > waiting.capacity for k in range(1, o + 1)):
            now += 1
        for k in range(1, o + 1):
            tokens[now + k] = tokens.get(now + k, 0) + s + k
        total += now + o
    return total


def test_a_few_waiting_requests_get_the_best_of_all_orders() -> None:
    rng = np.random.default_rng(2)
    for _ in range(8):
        waiting = Rounds.together(list(zip(rng.integers(1, 12, 5), rng.integers(1, 12, 5), strict=True)), 26)
        running = Rounds.together([(6, int(rng.integers(1, 8)))], 26)
        best = min(latency_by_hand(waiting, running, order) for order in permutations(range(5)))
        assert latency_by_hand(waiting, running, best_order(waiting, running, 8)) == best


def test_many_waiting_requests_are_never_ranked_worse_than_by_the_simple_rules() -> None:
    rng = np.random.default_rng(4)
    for _ in range(5):
        waiting = Rounds.together(list(zip(rng.integers(1, 60, 30), rng.integers(1, 40, 30), strict=True)), 120)
        running = Rounds.together([(20, 9), (30, 4)], 120)
        found = latency_by_hand(waiting, running, best_order(waiting, running, 30))
        assert queue_latency(waiting, running)(np.arange(30)) == latency_by_hand(waiting, running, range(30))
        for order in (np.argsort(waiting.output, kind="stable"), order_by_f(waiting, 30), by_start(waiting, running)):
            assert found <= latency_by_hand(waiting, running, order)


def test_the_rolling_horizon_puts_the_long_prompt_of_the_second_hand_instance_last() -> None:
    # shortest first would serve the prompt of 17 tokens first and make six others wait
    rank = RollingHorizon().plan(rounds_scenario(40)).batcher.replan.rank
    keys = rank(snapshot([(17, 1, 0)] + [(1, 2, 0)] * 5, capacity=20))
    assert keys.argmax() == 0
    assert rank(snapshot([])).shape == (0,)


@pytest.mark.parametrize("policy", [SortedF(), SortedLp(), LpSwap(), RollingHorizon()])
def test_equal_requests_are_ranked_in_order_of_arrival(policy) -> None:
    rank = policy.plan(rounds_scenario(40)).batcher.replan.rank
    now = snapshot([(3, 4, 0), (3, 4, 0), (9, 2, 1), (3, 4, 0), (1, 9, 0), (3, 4, 0), (2, 2, 0), (2, 2, 0)])
    keys = rank(now)
    assert np.unique(keys).size == 8
    assert (np.diff(keys[[0, 1, 3, 5]]) > 0).all()


@pytest.mark.parametrize("policy", [SortedF(), SortedLp(), LpSwap(), RollingHorizon()])
def test_rankings_take_a_queue_of_any_length(policy) -> None:
    rank = policy.plan(rounds_scenario(40)).batcher.replan.rank
    assert rank(snapshot([])).shape == (0,)
    assert rank(snapshot([(3, 4, 0)])).shape == (1,)
    keys = rank(snapshot([(17, 1, 0)] + [(1, 2, 0)] * 6, capacity=20))
    assert keys.argmax() == 0
    assert replace(policy, steps=9).steps == 9
