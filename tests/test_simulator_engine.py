"""Scheduling ahead and blocks found again, as in vLLM: cases worked by hand, long runs, and what they conserve."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from simulator_cases import MODES, assert_same, build, random_table

from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.workload import Requests

SECOND: dict[str, Any] = {"name": "p", "replicas": 1, "step_time": [{"base": 1.0}], "kv_capacity": 1000}
SECOND |= {"block_size": 2}


def play(pool: dict[str, Any], arrival: list[float], prompt: list[int], output: list[int]) -> SimRun:
    """One replica; both cores and the oracle must agree."""
    n, scenario = len(arrival), build([pool], longest=2)
    sample = Requests(np.array(arrival), np.array(prompt), np.array(output), np.zeros(n, np.int64), np.zeros(n))
    plan = Plan("only", index_router(scenario))
    run = simulate(scenario, plan, requests=sample)
    assert_same(simulate(scenario, plan, requests=sample, core="python"), run)
    assert_same(oracle.simulate(scenario, plan, sample), run)
    return run


def test_a_schedule_formed_ahead_does_not_see_who_arrives_meanwhile() -> None:
    """Steps of 1 s from 0 on. Who arrives during a step is seen at its end and runs one step later."""
    arrival, prompt, output = [0.0, 0.0, 0.5, 1.0, 20.0], [4, 4, 4, 4, 4], [6, 6, 2, 2, 1]
    plain = play(SECOND, arrival, prompt, output)
    assert plain.queued.tolist() == [0.0, 0.0, 1.0, 1.0, 20.0]
    assert plain.scheduled.tolist() == [0.0, 0.0, 1.0, 1.0, 20.0]
    ahead = play({**SECOND, "async_scheduling": True}, arrival, prompt, output)
    assert ahead.queued.tolist() == plain.queued.tolist()
    assert ahead.scheduled.tolist() == [0.0, 0.0, 2.0, 2.0, 20.0]
    assert ahead.first_token.tolist() == [1.0, 1.0, 3.0, 3.0, 21.0]
    assert ahead.finish.tolist() == [6.0, 6.0, 4.0, 4.0, 21.0]


def test_a_place_in_the_batch_is_taken_one_step_after_it_is_free() -> None:
    pool = {**SECOND, "max_batch": 2}
    arrival, prompt, output = [0.0, 0.0, 0.0, 0.0], [4, 4, 4, 4], [3, 9, 2, 1]
    assert play(pool, arrival, prompt, output).scheduled.tolist() == [0.0, 0.0, 3.0, 5.0]
    ahead = play({**pool, "async_scheduling": True}, arrival, prompt, output)
    assert ahead.scheduled.tolist() == [0.0, 0.0, 4.0, 7.0]
    alone = play({**pool, "async_scheduling": True, "max_batch": 1}, arrival, prompt, output)
    # nothing can run before the place is free: then the engine waits and loses no step
    assert alone.scheduled.tolist() == [0.0, 3.0, 12.0, 14.0]


@pytest.mark.parametrize("mode", ["recompute", "reserve", "swap", "restart", "lookahead"])
def test_blocks_are_free_one_step_late(mode: str) -> None:
    """18 blocks: 5 + 8 at first and 6 + 12 to the end for the first two, so that the 6 of the third must wait."""
    pool = {**SECOND, "kv_capacity": 36, "preemption": mode}
    arrival, prompt, output = [0.0, 0.0, 0.0], [10, 16, 12], [3, 9, 1]
    assert play(pool, arrival, prompt, output).scheduled.tolist() == [0.0, 0.0, 3.0]
    ahead = play({**pool, "async_scheduling": True}, arrival, prompt, output)
    assert ahead.scheduled.tolist() == [0.0, 0.0, 4.0] and not ahead.preemptions.any()


def test_a_preempted_request_finds_its_first_blocks() -> None:
    """8 blocks of 2. After 5 steps both hold 4; then the second is preempted with 8 tokens computed and 5 emitted.

    It leaves its blocks 4, 3, 2, 1 in the queue. The first one needs 6 blocks for its 12 tokens, so it takes 4 and 3.
    When it has ended, the second must compute 9 tokens and finds two blocks of them.
    """
    pool = {**SECOND, "kv_capacity": 16}
    plain = play(pool, [0.0, 0.0], [4, 4], [9, 9])
    found = play({**pool, "prefix_caching": True}, [0.0, 0.0], [4, 4], [9, 9])
    for run in (plain, found):
        assert run.finish.tolist() == [9.0, 13.0] and run.preemptions.tolist() == [0, 1]
    assert plain.replicas.prefill_tokens.tolist() == [4 + 4 + 9]
    assert found.replicas.prefill_tokens.tolist() == [4 + 4 + 9 - 4]
    assert found.replicas.held.tolist() == plain.replicas.held.tolist()


def test_at_least_one_token_is_computed() -> None:
    """5 blocks of 2, and a prefill that gives no token. In step 2 the first request takes the block that is left.

    The second one is preempted with both its blocks full and finds them untouched in step 3, but takes up only one.
    """
    pool = {**SECOND, "kv_capacity": 10, "prefix_caching": True, "first_token": "decode"}
    run = play(pool, [0.0, 0.0], [4, 4], [2, 1])
    assert run.preemptions.tolist() == [0, 1] and run.finish.tolist() == [3.0, 4.0]
    assert run.replicas.prefill_tokens.tolist() == [4 + 4 + 2]


def pressed(rng: np.random.Generator, mode: str, cached: bool) -> SimRun:
    """A replica with a table and a schedule ahead, short of memory, with long outputs."""
    table = random_table(rng)
    pool = {
        **SECOND,
        "table": table,
        "host_overhead": 0.001,
        "kv_capacity": 2400,
        "block_size": int(rng.choice([1, 7, 16])),
        "token_budget": int(rng.choice([60, 256, 4000])),
        "prefill_chunk": int(rng.choice([16, 100, 4000])),
        "preemption": mode,
        "async_scheduling": True,
        "prefix_caching": cached,
    }
    n = 36
    arrival = np.sort(rng.uniform(0, 100.0 * table(0, 10, 2000, 0), n))
    return play(pool, arrival.tolist(), rng.integers(1, 200, n).tolist(), rng.integers(1, 900, n).tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_cores_agree_with_everything_on(mode: str, seed: int) -> None:
    run = pressed(np.random.default_rng(seed), mode, mode == "recompute")
    assert mode in ("reserve", "lookahead") or run.preemptions.sum() > 10


@pytest.mark.parametrize("seed", range(40))
def test_cores_agree_on_what_is_found(seed: int) -> None:
    """Tight memory, so that requests are preempted again and again, some of them amid their prefill."""
    rng = np.random.default_rng(seed)
    longest, block, n = int(rng.choice([10, 30, 80])), int(rng.choice([1, 2, 3, 5])), 40
    pool = {
        **SECOND,
        "step_time": [{"base": 0.015625, "decode": 0.0078125, "prefill": 0.00390625}],
        "block_size": block,
        "kv_capacity": 2 * longest + 3 + block + int(rng.integers(0, 2 * longest)),
        "token_budget": int(rng.choice([3, 12, 40, 1000])),
        "prefill_chunk": int(rng.choice([4, 9, 1000])),
        "first_token": str(rng.choice(["prefill", "decode"])),
        "lookahead_slots": int(rng.choice([0, 0, 1, 3])),
        "async_scheduling": bool(seed % 2),
    }
    arrival = np.cumsum(rng.choice([0, 1, 3, 40], n)) / 64.0
    lengths = rng.integers(1, longest + 1, (2, n))
    sample = Requests(arrival, *lengths, np.zeros(n, np.int64), np.zeros(n))
    runs = []
    for cached in (False, True):
        scenario = build([{**pool, "prefix_caching": cached}], longest=2)
        plan = Plan("only", index_router(scenario))
        runs.append(simulate(scenario, plan, requests=sample, core="python"))
        assert_same(runs[-1], oracle.simulate(scenario, plan, sample))
    plain, found = (run.replicas for run in runs)
    assert found.prefill_tokens[0] < plain.prefill_tokens[0] or plain.preemptions[0] < 5


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_memory_in_use_is_conserved_with_every_option(mode: str, ahead: bool) -> None:
    """held - wasted = the areas s + s d + d (d + 1) / 2, with d = o - 1 decode steps after a prefill of one step."""
    rng = np.random.default_rng(5)
    n = 1500
    options = {"preemption": mode, "async_scheduling": ahead, "prefix_caching": mode == "recompute"}
    scenario = build([{**SECOND, "kv_capacity": 900, "block_size": 4, "token_budget": 100_000, **options}])
    s, o = rng.integers(1, 200, (2, n))
    sample = Requests(np.sort(rng.uniform(0, 200, n)), s, o, np.zeros(n, np.int64), np.zeros(n))
    run = simulate(scenario, Plan("only", index_router(scenario)), requests=sample)
    decode = o - 1
    area = s + s * decode + decode * (decode + 1) // 2
    assert int(run.replicas.held[0] - run.replicas.wasted[0]) == int(area.sum())
    assert run.preemptions.sum() > 300 or mode in ("reserve", "lookahead")
