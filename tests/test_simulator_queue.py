"""Batching rules in the simulator: order of the queue, beliefs, releases, victims and ranking anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulator_cases import assert_same, build

from formulations.batching_start import mc_sf
from llmopt.batcher import Batcher, Replan, Snapshot
from llmopt.errors import PolicyError
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan
from llmopt.predictions import Noise, PredictorBase
from llmopt.rounds import Rounds
from llmopt.scenario import Scenario
from llmopt.workload import Requests

ROUND = {"step_time": [{"base": 1.0}], "token_budget": 100_000, "block_size": 1, "lookahead_slots": 1}
MC_SF = Batcher(order="predicted", admission="lookahead")
CORES = ("compiled", "python")
SECTION_2 = {
    "A": (10, [(1, 3)] * 3 + [(1, 8)], 22),
    "B": (20, [(17, 1)] + [(1, 2)] * 6, 18),
    "C": (64, [(55, 4)] * 8 + [(1, 5)] * 16, 754),
}


class Fixed(PredictorBase):
    """Guesses given by hand."""

    law: str = "fixed"
    guesses: tuple[int, ...]

    def guess(self, requests: Requests, classes: Any) -> Any:
        values = np.resize(np.array(self.guesses, dtype=float), len(requests))
        return values, values, values


def rounds_pool(capacity: int, **changes: Any) -> Scenario:
    pool = {"name": "p", "replicas": 1, "kv_capacity": capacity, "preemption": "lookahead", **ROUND, **changes}
    return build([pool], longest=max(1, min(capacity // 2, 24)))


def together(pairs: list[tuple[int, int]], arrival: Any = 0.0) -> Requests:
    prompt, output = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    n = len(pairs)
    times = np.broadcast_to(np.asarray(arrival, float), (n,)).copy()
    return Requests(times, prompt, output, np.zeros(n, np.int64), np.random.default_rng(n).random(n))


def play(scenario: Scenario, batcher: Batcher, requests: Requests, core: Any = "compiled") -> SimRun:
    return simulate(scenario, Plan("mine", batcher=batcher), requests=requests, core=core)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", SECTION_2)
def test_mc_sf_on_the_hand_instances(name: str, core: Any) -> None:
    capacity, pairs, latency = SECTION_2[name]
    assert play(rounds_pool(capacity), MC_SF, together(pairs), core).e2e.sum() == latency


def test_mc_sf_starts_when_the_list_rule_says() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        n, capacity = int(rng.integers(1, 30)), int(rng.integers(12, 60))
        prompt = rng.integers(1, 6, n)
        output = rng.integers(1, capacity - prompt + 1)
        arrival = np.sort(rng.integers(0, 3 * n, n)) * int(rng.integers(0, 2))
        instance = Rounds(arrival, prompt, output, capacity)
        requests = together(list(zip(prompt.tolist(), output.tolist(), strict=True)), arrival)
        # a step that starts at t sees who arrived by t; the round model's slot p covers (p, p + 1]
        run = play(rounds_pool(capacity), MC_SF, requests)
        np.testing.assert_array_equal(run.scheduled, mc_sf(instance))
        assert run.preemptions.sum() == 0


RULES: dict[str, Batcher] = {
    "shortest guess": Batcher("predicted", admission="lookahead", predictor=Noise(law="noise", sigma=1.0)),
    "least, cancelled": Batcher(
        "predicted", admission="lookahead", victims="least", overflow="restart", predictor=Fixed(guesses=(1, 3, 2))
    ),
    "largest guess": Batcher("predicted", admission="lookahead", predictor=Noise(law="noise", sigma=1.0, factor=4.0)),
    "shortest prompt, skips": Batcher(lambda seen: seen.prompt.astype(float), skips=2, overflow="swap"),
    "protected": Batcher(admission="optimistic", protected=0.25, victims="all"),
    "cleared": Batcher(admission="optimistic", protected=0.1, victims="each", clearing=0.3),
    "last by key": Batcher(lambda seen: -seen.u, admission="optimistic", victims="last", skips=1),
    "released": Batcher(release=lambda seen: seen.arrival + 40 * seen.u, admission="optimistic", skips=3),
    "first come, skips": Batcher(skips=3, admission="optimistic", victims="last"),
    "look-ahead, protected": Batcher("predicted", admission="lookahead", protected=0.4, belief="low", skips=1),
    "ranked": Batcher(
        "predicted", admission="optimistic", replan=Replan(7.0, lambda seen: -seen.predicted.astype(float))
    ),
    "reserved": Batcher("predicted", protected=0.2),
}


def crowd(seed: int, n: int = 60, longest: int = 20) -> Requests:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, (2, n))
    gap = rng.choice([0, 1, 6], n) / 4.0
    return Requests(np.cumsum(gap), *lengths, rng.integers(0, 2, n), rng.random(n))


def engines(preemption: str, **changes: Any) -> Scenario:
    pool = {
        "name": "p",
        "replicas": 2,
        "kv_capacity": 96,
        "block_size": 4,
        "preemption": preemption,
        "token_budget": 50,
    }
    return build([{**pool, "step_time": [{"base": 0.25, "decode": 0.0078125}], **changes}])


@pytest.mark.parametrize("preemption", ["reserve", "lookahead", "recompute"])
@pytest.mark.parametrize("name", RULES)
def test_both_cores_agree_and_nothing_is_left_behind(name: str, preemption: str) -> None:
    from llmopt.evaluate.kernel import CompiledCore
    from llmopt.evaluate.kernel_route import build_routing
    from llmopt.evaluate.rules import rules_of
    from llmopt.plan import check_plan

    scenario = engines(preemption, prefix_caching=preemption == "recompute")
    for seed in range(3):
        requests = crowd(seed)
        ours, plain = (play(scenario, RULES[name], requests, core) for core in CORES)
        assert_same(ours, plain)
        assert np.isfinite(ours.finish).all() and (ours.finish > ours.scheduled).all()
        assert ours.replicas.peak.max() <= 96
        assert ours.replicas.preemptions.sum() == ours.preemptions.sum()
        batcher = RULES[name]
        if batcher.replan is None:
            plan = check_plan(Plan("mine", batcher=batcher), scenario)
            core = CompiledCore(scenario.pools, requests, rules_of(scenario, plan, requests))
            assert core.run(build_routing(scenario, plan.router)) == -1  # type: ignore[arg-type]
            for field in (
                "waiting",
                "running",
                "gliding",
                "used",
                "kv",
                "single_kv",
                "outstanding",
                "spent",
                "spent_tokens",
                "peaks",
            ):
                assert not core.world.reps[field].any(), field
            assert not core.world.classes[: core.world.reps["scratch"][0]].any()


def test_jumps_and_single_steps_are_the_same() -> None:
    """Looking at every replica four times a step ends all jumps early, and must change nothing but rounding."""
    from llmopt.evaluate.kernel import CompiledCore
    from llmopt.evaluate.rules import rules_of

    for name, batcher in RULES.items():
        if batcher.replan is not None:
            continue
        scenario = engines("recompute").replace(pools=[{**engines("recompute").pools[0].model_dump(), "replicas": 1}])
        requests = crowd(11, n=40)
        whole = play(scenario, batcher, requests)
        core = CompiledCore(scenario.pools, requests, rules_of(scenario, Plan("mine", batcher=batcher), requests))
        clock = 0.0
        for i, at in enumerate(requests.arrival.tolist()):
            while clock < at:
                core.look(clock)
                clock += 0.0625
            core.look(at)
            core.arrive(0, i, at)
        while clock <= whole.end:
            core.look(clock)
            clock += 0.0625
        core.drain()
        assert_same(core.result(), whole), name


@pytest.mark.parametrize("core", CORES)
def test_releases_skips_and_protection_by_hand(core: Any) -> None:
    """M = 10 and steps of 1 s; the numbers are the starts."""
    pool = rounds_pool(10, preemption="recompute")
    pairs = [(4, 3), (8, 1), (2, 2)]
    stopped = play(pool, Batcher(admission="optimistic"), together(pairs), core)
    assert stopped.scheduled.tolist() == [0, 3, 4]
    assert play(pool, Batcher(admission="optimistic", skips=1), together(pairs), core).scheduled.tolist() == [0, 3, 0]
    late = Batcher(release=lambda seen: np.array([2.5, 0.5, 2.5]), clairvoyant=True)
    assert play(pool, late, together(pairs), core).scheduled.tolist() == [2.5, 5.5, 6.5]
    assert play(
        pool, Batcher(release=late.release, skips=5, clairvoyant=True), together(pairs), core
    ).scheduled.tolist() == [
        2.5,
        0.5,
        2.5,
    ]
    kept = Batcher(admission="optimistic", protected=0.5)
    assert play(pool, kept, together([(8, 1), (2, 3), (2, 1)]), core).scheduled.tolist() == [0, 1, 4]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("victims", "preempted"), [("youngest", [0, 0, 1]), ("last", [0, 1, 0]), ("least", [1, 0, 0]), ("all", [1, 1, 1])]
)
def test_victims_by_hand(victims: Any, preempted: list[int], core: Any) -> None:
    """Three requests of (3, 3) fill 10 tokens at their second step; guesses and keys tell them apart."""
    pool = rounds_pool(13, preemption="recompute")
    guesses = Fixed(guesses=(1, 9, 5))
    keys = {"last": lambda seen: np.array([0.0, 2.0, 1.0])}.get(victims, "arrival")
    rule = Batcher(keys, admission="optimistic", victims=victims, predictor=guesses, clairvoyant=callable(keys))
    run = play(pool, rule, together([(3, 3)] * 3), core)
    assert run.preemptions.tolist() == preempted


@pytest.mark.parametrize("core", CORES)
def test_a_rule_that_clears_for_ever_ends_with_an_error(core: Any) -> None:
    rule = Batcher(admission="optimistic", victims="all", overflow="restart")
    with pytest.raises(PolicyError, match=r"'mine' preempted request . 10000 times"):
        play(rounds_pool(12, preemption="recompute"), rule, together([(3, 5)] * 3), core)


@pytest.mark.parametrize("core", CORES)
def test_ranking_anew_by_what_the_queue_knows_changes_nothing(core: Any) -> None:
    """Ranks that equal the keys leave every time as it was, on halted replicas too, with rules in Python or as data."""
    scenario = engines("recompute")
    for seed in range(3):
        requests = crowd(seed)
        plain = Batcher(lambda seen: seen.prompt.astype(float), admission="optimistic", overflow="swap")
        ranked = Batcher(
            plain.order,
            admission="optimistic",
            overflow="swap",
            replan=Replan(0.7, lambda seen: seen.prompt.astype(float)),
        )
        truth = play(scenario, plain, requests, core)
        assert_same(play(scenario, ranked, requests, core), truth)
        turns = Plan("mine", lambda request, replicas: request.number % 2, batcher=ranked)
        alike = Plan("mine", lambda request, replicas: request.number % 2, batcher=plain)
        ours, truth = (simulate(scenario, plan, requests=requests, core=core) for plan in (turns, alike))
        assert_same(ours, truth)


@pytest.mark.parametrize("core", CORES)
def test_a_snapshot_is_taken_between_two_steps(core: Any) -> None:
    """Steps of 1 s: at 1.5 s the step that started at 1 s is under way, and its tokens are not there yet."""
    seen: list[Snapshot] = []

    def rank(snapshot: Snapshot) -> Any:
        seen.append(snapshot)
        return -snapshot.waiting.astype(float)

    run = play(
        rounds_pool(100, max_batch=1),
        Batcher(replan=Replan(1.5, rank)),
        together([(3, 4), (2, 1), (2, 1), (1, 1)], [0.0, 0.0, 1.25, 1.5]),
        core,
    )
    first = seen[0]
    assert (first.time, first.waiting.tolist(), first.running_emitted.tolist()) == (1.5, [1, 2], [1])
    assert first.running_computed.tolist() == [3] and first.predicted.tolist() == [1, 1]
    assert run.scheduled.tolist() == [0.0, 6.0, 5.0, 4.0]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (lambda seen: 1 / 0, "its replan raised ZeroDivisionError: division by zero at 1 s; return one finite number"),
        (lambda seen: np.zeros(len(seen.waiting) + 1), "its replan at 1 s cannot be used"),
        (lambda seen: np.full(len(seen.waiting), np.nan), "its replan at 1 s cannot be used"),
    ],
)
def test_a_broken_ranking_is_named(rank: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        play(rounds_pool(20, max_batch=1), Batcher(replan=Replan(1.0, rank)), together([(3, 3)] * 3))


def test_a_long_queue_is_served_in_order() -> None:
    """100 000 requests wait at once: a queue that is searched from end to end would take hours."""
    rng = np.random.default_rng(2)
    n = 100_000
    pairs = np.stack([rng.integers(1, 9, n), rng.integers(1, 9, n)], axis=1)
    pool = rounds_pool(40, max_batch=1)
    run = play(pool, Batcher("predicted", admission="lookahead"), together([tuple(p) for p in pairs.tolist()]))
    np.testing.assert_array_equal(np.argsort(run.scheduled), np.argsort(pairs[:, 1], kind="stable"))
