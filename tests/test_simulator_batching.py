"""Batching rules: both cores against the naive oracle, and the oracle against papers and cases worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import BATCHERS, assert_same, build, random_batcher, random_pool, random_requests

from formulations.batching_start import admitted, mc_sf, sorted_f
from llmopt.batcher import FIFO, Batcher, Hold, Replan
from llmopt.errors import LLMOptError
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, check_plan, index_router
from llmopt.predictions import PredictorBase
from llmopt.rounds import Rounds, hand_instances, model_1, model_2
from llmopt.scenario import Scenario
from llmopt.workload import Requests
from tests import oracle_batching


def plan_of(scenario: Scenario, batcher: Batcher) -> Plan:
    return check_plan(Plan("drawn", index_router(scenario), batcher=batcher), scenario)


def check_cores(scenario: Scenario, batcher: Batcher, sample: Requests) -> SimRun:
    """The oracle's run, which both cores repeat."""
    plan = plan_of(scenario, batcher)
    truth = oracle.simulate(scenario, plan, sample)
    assert not np.isnan(truth.finish).any()
    for core in ("compiled", "python"):
        assert_same(simulate(scenario, plan, requests=sample, core=core), truth)
    return truth


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that gives a loop up early."""
    monkeypatch.setattr(oracle_batching, "MOST_PREEMPTIONS", 100)


@pytest.mark.parametrize("kind", BATCHERS)
@pytest.mark.parametrize("block", range(6))
def test_both_cores_agree_with_the_oracle(kind: str, block: int, impatient: None) -> None:
    """Random pools, rules and requests; those that admit and clear the same requests for ever are left out."""
    ran, preempted = 0, 0
    for case in range(20):
        rng = np.random.default_rng([BATCHERS.index(kind), block, case])
        scenario = build([random_pool(rng, f"p{j}", kind) for j in range(rng.integers(1, 3))])
        batcher, sample = random_batcher(rng, kind), random_requests(rng)
        try:
            truth = check_cores(scenario, batcher, sample)
        except oracle_batching.EndlessLoop:
            continue
        except AssertionError as error:
            raise AssertionError(f"case {case}: {batcher}\n{scenario.pools}\n{error}") from error
        ran, preempted = ran + 1, preempted + int(truth.preemptions.sum())
    assert ran >= 15 and preempted > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_rule_that_says_what_the_engine_does_is_the_engines_own(seed: int) -> None:
    """Two schedulers of the oracle, and so the kernels with and without a rule."""
    rng = np.random.default_rng(seed)
    scenario, sample = build([random_pool(rng, "p", "queue")]), random_requests(rng)
    own = oracle.simulate(scenario, plan_of(scenario, FIFO), sample)
    said = Batcher(clearing=0.5)
    assert_same(oracle.simulate(scenario, plan_of(scenario, said), sample), own)
    for core in ("compiled", "python"):
        assert_same(simulate(scenario, plan_of(scenario, said), requests=sample, core=core), own)
    if scenario.pools[0].preemption in ("recompute", "swap", "restart"):
        everybody = Batcher(
            admission="optimistic", overflow=scenario.pools[0].preemption, order=lambda c: c.arrival * 0
        )
        if own.preemptions.sum() == 0:
            assert_same(check_cores(scenario, everybody, sample), own)


# The round model: steps of 1 s, blocks of one token, and the token of a step held while it runs.


class Told(PredictorBase):
    """Predictions as given."""

    point: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]

    def guess(self, requests: Requests, classes: Any) -> Any:
        return tuple(np.array(values, dtype=float) for values in (self.point, self.low, self.high))


def round_pool(capacity: int, **settings: Any) -> Scenario:
    basics = {"step_time": [{"base": 1.0}], "kv_capacity": capacity, "block_size": 1, "lookahead_slots": 1}
    pool = {"name": "p", "replicas": 1, "token_budget": 10**6, "max_batch": 10**6, "preemption": "lookahead", **basics}
    return build([pool | settings], longest=1)


def together(*pairs: tuple[int, int], arrival: Any = 0.0, u: Any = 0.5, cls: Any = 0) -> Requests:
    prompt, output = np.array(pairs, dtype=np.int64).T
    n = len(prompt)
    return Requests(
        np.broadcast_to(np.asarray(arrival, float), n).copy(),
        prompt,
        output,
        np.broadcast_to(np.asarray(cls, np.int64), n).copy(),
        np.broadcast_to(np.asarray(u, float), n).copy(),
    )


def played(instance: Rounds, batcher: Batcher) -> SimRun:
    n = len(instance)
    sample = Requests(
        instance.arrival.astype(float), instance.prompt, instance.output, np.zeros(n, np.int64), np.full(n, 0.5)
    )
    return check_cores(round_pool(instance.capacity), batcher, sample)


SHORTEST = Batcher(order="predicted", admission="lookahead")


@pytest.mark.parametrize(("name", "latency"), [("A", 22), ("B", 18), ("C", 754)])
def test_mc_sf_has_the_published_latency(name: str, latency: int) -> None:
    assert played(hand_instances()[name], SHORTEST).e2e.sum() == latency


@pytest.mark.parametrize(("name", "latency"), [("A", 22), ("B", 15), ("C", 331)])
def test_sorted_f_has_the_published_latency(name: str, latency: int) -> None:
    """The order of Sorted-F, ranked in Python, and the exact check."""
    instance = hand_instances()[name]
    start = sorted_f(instance)
    place = np.lexsort((instance.output, start)).argsort()
    assert (
        played(instance, Batcher(order=lambda c: place, admission="lookahead", clairvoyant=True)).e2e.sum() == latency
    )


@pytest.mark.parametrize("model", [model_1, model_2])
@pytest.mark.parametrize("seed", range(4))
def test_list_schedules_in_rounds_are_runs(model: Any, seed: int) -> None:
    """Shortest first and first come first served, against the list schedules of the round model."""
    instance = model(seed)
    assert played(instance, SHORTEST).scheduled.tolist() == mc_sf(instance).tolist()
    fifo = admitted(instance, instance.arrival.astype(float))
    assert played(instance, Batcher(admission="lookahead")).scheduled.tolist() == fifo.tolist()


def test_a_max_admits_by_the_upper_end() -> None:
    """M = 8, (1, 2) three times: believed to take 4 tokens, two would reach 2 x 5 > 8, so that one runs at a time.

    Believed to take 2, two start at once, and the third joins at t = 1: 3 + 3 + 2.
    """
    told = Told(point=(3, 3, 3), low=(2, 2, 2), high=(4, 4, 4))
    sample, scenario = together((1, 2), (1, 2), (1, 2)), round_pool(8)
    run = check_cores(scenario, replace(SHORTEST, belief="high", predictor=told), sample)
    assert run.finish.tolist() == [2, 4, 6]
    run = check_cores(scenario, replace(SHORTEST, belief="low", predictor=told), sample)
    assert run.finish.tolist() == [2, 2, 3] and run.preemptions.sum() == 0


def test_a_min_cancels_the_least_believed_and_remembers() -> None:
    """M = 4, (1, 3) twice, believed 1: both start, 2 x 3 > 4 in the second step, and the first of equals is cancelled.

    The other takes 3 and 4 of 4 blocks and ends at t = 3; then the first starts anew.
    """
    told = Told(point=(1, 1), low=(1, 1), high=(3, 3))
    a_min = replace(SHORTEST, belief="low", predictor=told, victims="least", overflow="restart")
    run = check_cores(round_pool(4), a_min, together((1, 3), (1, 3)))
    assert run.finish.tolist() == [6, 3] and run.preemptions.tolist() == [1, 0]
    assert run.replicas.wasted.tolist() == [1] and run.replicas.steps.tolist() == [6]


def test_a_preempted_request_keeps_its_belief() -> None:
    """M = 8, (1, 4) believed 1 beside (1, 6) believed 6: 2 x 5 > 8 at t = 3, the first is cancelled, by now believed 4.

    At t = 4 the other holds 6 and will hold 7. Believed 1 the first would join again (2 + 6 <= 8), and be cancelled
    again; believed 4 (3 + 7 > 8) it waits until t = 6.
    """
    told = Told(point=(1, 6), low=(1, 6), high=(6, 6))
    a_min = replace(SHORTEST, belief="low", predictor=told, victims="least", overflow="restart")
    run = check_cores(round_pool(8), a_min, together((1, 4), (1, 6)))
    assert run.finish.tolist() == [10, 6] and run.preemptions.tolist() == [1, 0]


CLEARED = Batcher(admission="optimistic", overflow="restart", victims="all")
THREE = together((2, 3), (2, 5), (2, 3), arrival=[0, 0, 1], u=[0.5, 0.5, 0.9])


def test_clear_all_restarts_everybody() -> None:
    """M = 10. t = 3: the third joins (6 + 3). t = 4: 7 + 4 > 10, both are cleared and admitted anew, oldest first."""
    run = check_cores(round_pool(10), CLEARED, THREE)
    assert run.finish.tolist() == [3, 9, 7] and run.preemptions.tolist() == [0, 1, 1]
    assert run.scheduled.tolist() == [0, 0, 3] and run.replicas.wasted.tolist() == [2 + 3 + 4 + 5 + 2]


def test_protection_keeps_the_third_out() -> None:
    """As above with 2 of 10 tokens protected: 3 + 2 > 10 - 6 at t = 3, and at t = 4 again; alone it may."""
    run = check_cores(round_pool(10), replace(CLEARED, protected=0.2), THREE)
    assert run.finish.tolist() == [3, 5, 8] and run.preemptions.sum() == 0


def test_clearing_draws_by_the_requests_luck() -> None:
    """At t = 4 the second has x = 0.5 + 0.618, fraction 0.118 < 0.2, and goes; the third has 0.518 and stays.

    The second comes back at t = 5, since a step that preempts admits nobody.
    """
    run = check_cores(round_pool(10), replace(CLEARED, victims="each", clearing=0.2), THREE)
    assert run.finish.tolist() == [3, 10, 6] and run.preemptions.tolist() == [0, 1, 0]


def test_the_last_by_order_is_preempted() -> None:
    """Shortest believed first: at t = 4 the second (5) goes, not the youngest of the batch."""
    run = check_cores(round_pool(10), replace(CLEARED, order="predicted", victims="last"), THREE)
    assert run.finish.tolist() == [3, 10, 6] and run.preemptions.tolist() == [0, 1, 0]


def test_skips_pass_over_what_does_not_fit() -> None:
    """M = 10: beside (2, 5) the second (7, 1) does not fit for 5 rounds, the third (1, 2) does, if it may pass."""
    sample = together((2, 5), (7, 1), (1, 2))
    for skips, finish in ((0, [5, 6, 7]), (1, [5, 6, 2])):
        assert (
            check_cores(round_pool(10), Batcher(admission="optimistic", skips=skips), sample).finish.tolist() == finish
        )


def test_release_holds_back_and_the_replica_sleeps_until_then() -> None:
    """Head released at 4.5, the next at once: without skips both wait for the head, with one skip it is passed over."""
    rule = Batcher(release=lambda c: np.where(c.prompt == 1, 4.5, 0.0))
    sample = together((1, 2), (2, 2), arrival=[0, 1])
    assert check_cores(round_pool(100), rule, sample).finish.tolist() == [6.5, 6.5]
    assert check_cores(round_pool(100), replace(rule, skips=1), sample).finish.tolist() == [6.5, 3]


def test_a_queue_is_ranked_anew() -> None:
    """One at a time, 2 s each; at t = 3 the order of those that wait is turned around."""
    rule = Batcher(replan=Replan(3.0, lambda s: -s.waiting))
    run = check_cores(round_pool(100, max_batch=1), rule, together(*[(1, 2)] * 4))
    assert run.finish.tolist() == [2, 4, 8, 6]


def test_a_snapshot_is_what_the_replica_is_between_steps() -> None:
    """At t = 2.5 the step from 2 to 3 is under way: its admission shows, its tokens do not, nor who arrives."""
    seen: list[Any] = []

    def rank(snapshot: Any) -> Any:
        seen.append(snapshot)
        return snapshot.waiting

    rule = Batcher(replan=Replan(2.5, rank), predictor=Told(point=(2, 3, 3), low=(1, 1, 1), high=(9, 9, 9)))
    sample = together((4, 9), (5, 2), (6, 2), arrival=[0, 2, 2.5])
    scenario = round_pool(100, max_batch=1)
    oracle.simulate(scenario, plan_of(scenario, rule), sample)
    first = seen[0]
    assert first.time == 2.5 and first.pool.name == "p" and first.waiting.tolist() == [1]
    assert (first.arrival.tolist(), first.prompt.tolist(), first.predicted.tolist()) == ([2.0], [5], [3])
    assert (first.emitted.tolist(), first.running_prompt.tolist(), first.running_predicted.tolist()) == ([0], [4], [3])
    assert (first.running_computed.tolist(), first.running_emitted.tolist()) == ([5], [2])
    assert [s.time for s in seen] == [2.5, 5.0, 7.5, 10.0] and sorted(seen[1].waiting) == [1, 2]
    truth = list(seen)
    for core in ("compiled", "python"):
        seen.clear()
        simulate(scenario, plan_of(scenario, rule), requests=sample, core=core)
        for ours, theirs in zip(seen, truth, strict=True):
            assert ours[:2] == theirs[:2]
            for name, column in ours._asdict().items():
                if name not in ("time", "pool"):
                    assert sorted(column) == sorted(getattr(theirs, name)), name


# Dai, Deng, Li, Peng, arXiv 2504.07347, figure 8: A, B, C decode 2, 4 and 3 times; D and E arrive in the first batch.
STRINGS = {
    "prefill-only": (4, "ABC|DpEp|ABCD|BCE|B"),
    "prefill-first": (5, "ABC|ABC+DpEp|BCDE|B"),
    "decode-only": (4, "ABC|ABC|BC|B|DpEp|DE"),
    "decode-first": (4, "ABC|ABC+Dp|BCD+Ep|BE"),
}


@pytest.mark.parametrize("mixing", STRINGS)
def test_steps_are_composed_as_published(mixing: Any) -> None:
    """vLLM, FasterTransformer and Sarathi with batches of 4, Orca of 5; the first prefills are not in the figure."""
    budget, published = STRINGS[mixing]
    scenario = round_pool(1000, token_budget=budget, first_token="decode", preemption="recompute")
    sample = together((1, 2), (1, 4), (1, 3), (1, 1), (1, 1), arrival=[0, 0, 0, 1.5, 1.5])
    batcher = Batcher(mixing=mixing, clearing=0.5)
    run = check_cores(scenario, batcher, sample)
    _, (replica,) = oracle.play(scenario, plan_of(scenario, batcher), sample)
    assert "|".join(written(step) for step in replica.log[1:]) == published
    last = [
        max(k for k, step in enumerate(published.split("|")) if letter in step.replace("p", "")) for letter in "ABCDE"
    ]
    assert run.finish.tolist() == [k + 2 for k in last]


def written(step: oracle.Logged) -> str:
    decodes = "".join(sorted("ABCDE"[i] for i in step.decode))
    return "+".join(part for part in (decodes, "".join("ABCDE"[i] + "p" for i in step.prefill)) if part)


def test_orca_overflows_where_sarathi_keeps_up() -> None:
    """(290, 990) every 10 steps, budget 128, at most 100 requests: Sarathi settles at 29 + 99 tokens a step.

    While Orca prefills 290 tokens, its decodes get what is left of 128 in every step, so that its queue grows.
    """
    n = 1000
    sample = together(*[(290, 990)] * n, arrival=10.0 * np.arange(n))
    scenario = round_pool(10**7, token_budget=128, max_batch=100, first_token="decode", preemption="recompute")
    for mixing, fewest, most in (("decode-first", 0, 0), ("prefill-first", 10, 40)):
        run = simulate(scenario, plan_of(scenario, Batcher(mixing=mixing, clearing=0.5)), requests=sample)
        grown = np.diff(run.in_system(np.arange(1500.0, 10_000.0, 1400.0)).ravel())
        assert fewest <= grown.min() <= grown.max() <= most


@pytest.mark.parametrize("mixing", ["prefill-only", "decode-only"])
def test_whole_prompts_beyond_the_budget_are_refused(mixing: Any) -> None:
    """FasterTransformer and vLLM at 128 tokens a step never run (290, 990)."""
    scenario = round_pool(10**7, token_budget=128, preemption="swap")
    sample = together((5, 5), (290, 990))
    for core in ("compiled", "python"):
        with pytest.raises(LLMOptError, match="request 1 "):
            simulate(scenario, plan_of(scenario, Batcher(mixing=mixing)), requests=sample, core=core)


def test_wait_fills_every_stage_with_its_threshold() -> None:
    """Outputs of 4 tokens, a threshold of 8: every step with a full pipeline serves 8 prefills and 3 x 8 decodes."""
    n = 8 * 12
    sample = together(*[(3, 4)] * n, arrival=np.arange(n) * 0.25)
    scenario, batcher = round_pool(10_000), Batcher(hold=Hold("class", (8, 1)))
    check_cores(scenario, batcher, sample)
    _, (replica,) = oracle.play(scenario, plan_of(scenario, batcher), sample)
    assert [(len(step.prefill), len(step.decode)) for step in replica.log[:12]] == [
        (8, 8 * min(k, 3)) for k in range(12)
    ]
    # 8 requests arrive in 2 s, a step takes 1 s: the server sleeps until the eighth is there, at 1.75, 3.75, ...
    assert [step.start for step in replica.log[:12]] == [1.75 + 2 * k for k in range(12)]


def test_segments_move_if_all_before_them_do() -> None:
    """Two to start, one to enter the second segment (from 2 tokens on); the last arrival sets everybody free.

    t = 0: A, B start. t = 5: A, B go on to 2 tokens, C, D start. t = 8: A alone may pass, C, D go on, E, F start.
    """
    sample = together(*[(2, 3)] * 7, arrival=[0, 0, 3, 5, 8, 8, 20])
    run = check_cores(round_pool(1000), Batcher(hold=Hold("stage", (2, 1), (2,))), sample)
    assert run.finish.tolist() == [9, 21, 21, 21, 22, 22, 23]
    assert run.scheduled.tolist() == [0, 0, 5, 5, 8, 8, 20]


@pytest.mark.parametrize("overflow", ["swap", "recompute"])
def test_a_new_request_preempts_one_that_sank(overflow: Any) -> None:
    """One place: A sinks with its second token, at t = 2 B takes its place for one step."""
    rule = Batcher(levels=(2,), overflow=overflow)
    run = check_cores(
        round_pool(100, max_batch=1, preemption="recompute"), rule, together((1, 4), (1, 1), arrival=[0, 1])
    )
    assert run.finish.tolist() == [5, 3] and run.preemptions.tolist() == [1, 0]


def test_a_rule_that_clears_the_same_requests_for_ever_is_stopped() -> None:
    """Three of (2, 5) start, overflow 10 tokens in the second step, are cleared and start again."""
    scenario, sample = round_pool(10), together(*[(2, 5)] * 3)
    with pytest.raises(oracle_batching.EndlessLoop, match="request 2 was preempted 10000 times"):
        oracle.simulate(scenario, plan_of(scenario, CLEARED), sample)
    for core in ("compiled", "python"):
        with pytest.raises(LLMOptError, match="preempt"):
            simulate(scenario, plan_of(scenario, CLEARED), requests=sample, core=core)
