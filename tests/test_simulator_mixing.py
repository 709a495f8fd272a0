"""Rules in which running requests may pause: mixing, thresholds and levels, against published dynamics and by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from simulator_cases import assert_same, build

from llmopt.batcher import Batcher, Hold
from llmopt.errors import PolicyError
from llmopt.evaluate.kernel import CompiledCore
from llmopt.evaluate.python_core import PythonCore
from llmopt.evaluate.rules import rules_of
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.predictions import Noise
from llmopt.steptable import StepTable
from llmopt.workload import Requests

RULES = {
    "Sarathi": Batcher(),
    "Orca": Batcher(mixing="prefill-first"),
    "vLLM": Batcher(mixing="prefill-only"),
    "FasterTransformer": Batcher(mixing="decode-only"),
}
WITHOUT_END = {"kv_capacity": 10_000_000, "max_batch": 1_000_000, "token_budget": 1_000_000, "block_size": 1}
SECOND: dict[str, Any] = {"name": "p", "replicas": 1, "step_time": [{"base": 1.0}], **WITHOUT_END}


def sample_of(arrival: Any, prompt: Any, output: Any, cls: Any = 0) -> Requests:
    n = len(arrival)
    whole = [np.broadcast_to(np.asarray(x, np.int64), n).copy() for x in (prompt, output, cls)]
    return Requests(np.asarray(arrival, float), *whole, np.random.default_rng(0).random(n))


def play(pool: dict[str, Any], batcher: Batcher, sample: Requests, core: Any = "compiled") -> SimRun:
    scenario = build([pool], longest=2)
    return simulate(scenario, Plan("rule", index_router(scenario), batcher=batcher), requests=sample, core=core)


def steps_of(pool: dict[str, Any], batcher: Batcher, sample: Requests) -> Iterator[tuple[float, Any, dict[int, int]]]:
    """Play steps of 1 s in the plain-Python core: end of each, the core, and the tokens that requests took in it.

    Every second is looked at in the middle, when the step that started last counts as done.
    """
    scenario = build([pool], longest=2)
    core = PythonCore(scenario.pools, sample, rules_of(scenario, Plan("rule", None, batcher=batcher), sample))
    waiting = list(range(len(sample)))
    before = np.zeros(len(sample), np.int64)
    time, rep = 0.0, core.world.reps[0]
    while np.isnan([req.finish for req in core.world.reqs]).any():
        while waiting and sample.arrival[waiting[0]] <= time:
            core.look(sample.arrival[waiting[0]])
            core.arrive(0, waiting.pop(0), time)
        rep.flush = int(not waiting)
        core.look(time + 0.5)
        after = np.array([computed_of(rep, req) for req in core.world.reqs])
        taken = after - before
        yield time + 1.0, core, {int(i): int(taken[i]) for i in np.flatnonzero(taken)}
        before = after
        time += 1.0


def computed_of(rep: Any, req: Any) -> int:
    """Computed tokens, of requests that have ended too."""
    if not np.isnan(req.finish):
        return int(req.prompt + req.output - rep.first_step)
    return int(req.offset + rep.steps if req.gliding else req.computed)


DECODING = (2, 4, 3)


def figure_8(rule: str, budget: int) -> str:
    """Composition of every step once A, B and C decode and D and E, of one prompt and one output token, are there."""
    pool = {**SECOND, "token_budget": budget, "first_token": "decode"}
    # A, B and C have prefilled one token each in a step of their own
    arrival = [0.0, 0.0, 0.0, 1.5, 1.5]
    text = []
    prefilled: set[int] = set()
    for end, _, taken in steps_of(pool, RULES[rule], sample_of(arrival, 1, [*DECODING, 1, 1])):
        decodes = "".join("ABCDE"[i] for i in sorted(set(taken) & prefilled))
        prefills = "".join(f"{'ABCDE'[i]}p" for i in sorted(set(taken) - prefilled))
        prefilled |= set(taken)
        if end > 1.0:
            text.append("+".join(part for part in (decodes, prefills) if part))
    return "|".join(text)


@pytest.mark.parametrize(
    ("rule", "budget", "published"),
    [
        # the first step starts before D and E are there
        ("vLLM", 4, "ABC|DpEp|ABCD|BCE|B"),
        ("Orca", 5, "ABC|ABC+DpEp|BCDE|B"),
        ("FasterTransformer", 4, "ABC|ABC|BC|B|DpEp|DE"),
        ("Sarathi", 4, "ABC|ABC+Dp|BCD+Ep|BE"),
    ],
)
def test_compositions_of_the_published_figure(rule: str, budget: int, published: str) -> None:
    """Dai et al. 2504.07347, figure 8 (theory/batching.md 6)."""
    assert figure_8(rule, budget) == published


def staircase(tokens: int) -> StepTable:
    """Dai et al.: a step of b tokens takes 11.28 + 35.47 ceil(b / 128) ms (CodeLlama-34B on an A100)."""
    stairs = 128 * np.arange(1, tokens // 128 + 1)
    zero, one = np.zeros(1), np.ones(1)
    return StepTable(
        tokens=np.ravel([stairs - 127.0, stairs], order="F"),
        token_time=np.repeat(11.28 + 35.47 * np.arange(1, len(stairs) + 1), 2) / 1000.0,
        sequences=one,
        sequence_time=zero,
        decode_batch=one,
        decode_context=one,
        decode_time=np.zeros((1, 1)),
        chunk=one,
        cached=zero,
        mixed_batch=zero,
        mixed_context=zero,
        mixed_time=np.zeros((1, 1, 1, 1)),
    )


def on_the_stairs(rule: str, budget: int, sample: Requests, **settings: Any) -> CompiledCore:
    pool = {**SECOND, "first_token": "decode", "token_budget": budget, "table": staircase(budget), **settings}
    scenario = build([pool], longest=2)
    return CompiledCore(scenario.pools, sample, rules_of(scenario, Plan("rule", None, batcher=RULES[rule]), sample))


def backlog(core: CompiledCore, times: Any) -> list[int]:
    """Tokens still to be computed for the requests that have arrived, at each of the times (s)."""
    seen = []
    i, arrival = 0, core.requests.arrival
    for time in times:
        while i < len(arrival) and arrival[i] <= time:
            core.look(float(arrival[i]))
            core.arrive(0, i, float(arrival[i]))
            i += 1
        seen.append(int(core.look(float(time))[0][3]))
    return seen


@pytest.mark.parametrize("rule", ["Sarathi", "Orca"])
@pytest.mark.parametrize(("load", "slope"), [(0.9, 0.0), (1.1, 0.334), (1.2, 0.669)])
def test_backlog_at_and_above_the_critical_rate(rule: str, load: float, slope: float) -> None:
    """Theorem 2 of Dai et al.: work-conserving rules are stable up to 512 / 153.16 ms of tokens, 16.71 requests/s."""
    table = staircase(512)
    assert table(512) == pytest.approx(0.15316)
    critical = 512 / table(512) / 200
    assert critical == pytest.approx(16.71, abs=0.005)
    arrival = np.arange(1, 6001) / (load * critical)
    times = arrival[-1] * np.array([0.4, 1.0])
    first, last = backlog(on_the_stairs(rule, 512, sample_of(arrival, 100, 100)), times)
    assert (last - first) / (times[1] - times[0]) / 1000.0 == pytest.approx(slope, abs=0.003)
    assert (last < 20_000) == (load < 1)


VERTEX = sample_of(0.4675 * np.arange(1000), 290, 990)
"""Vertex C of Dai et al.: at most 100 requests at once."""


def test_budgets_and_rules_that_diverge_where_sarathi_128_is_locked() -> None:
    """Steps of 128 tokens carry the whole load, 1280 tokens every ten steps; 100 decodes alone in a step do not.

    theory/batching.md 6: the backlog of Sarathi-1024 goes from 68.6k to 103.4k tokens, here in the second 70 s.
    """
    times = [70.0, 140.0, 210.0, 280.0]
    large = on_the_stairs("Sarathi", 1024, VERTEX, max_batch=100)
    assert backlog(large, times)[:2] == pytest.approx([68_600, 103_400], rel=0.01)
    states = []
    for time in np.arange(280.0, 300.0, 0.02):
        large.look(time)
        states.append((int(large.world.reps["prefill"][0]), int(large.world.reps["decode"][0])))
    assert Counter(states).most_common(1)[0][0] == (0, 100) and states.count((0, 100)) > 0.6 * len(states)
    locked = backlog(on_the_stairs("Sarathi", 128, VERTEX, max_batch=100), times)
    assert max(locked) < 52_000
    orca = np.diff(backlog(on_the_stairs("Orca", 128, VERTEX, max_batch=100), times))
    assert (orca > 0.4 * 70_000).all() and orca[1:] == pytest.approx(orca[0], rel=0.1)


@pytest.mark.parametrize("rule", ["vLLM", "FasterTransformer"])
def test_rules_that_never_cut_a_prompt_refuse_one_above_the_budget(rule: str) -> None:
    """Dai et al.: at vertex C with a budget of 128 they freeze for ever."""
    pool = {**SECOND, "token_budget": 128}
    with pytest.raises(
        PolicyError, match=r"request 1 prefills 290 tokens in one step, but pool 'p' has a token_budget"
    ):
        play({**pool, "preemption": "swap"}, RULES[rule], sample_of([0.0, 1.0], [128, 290], 9))
    with pytest.raises(PolicyError, match="request 0 prefills 129 tokens in one step if it is preempted late"):
        play(pool, RULES[rule], sample_of([0.0], 120, 10))
    run = play(pool, RULES[rule], sample_of([0.0], 119, 10))
    assert run.finish.tolist() == [10.0]


def test_thresholds_admit_and_advance_a_whole_wave() -> None:
    """WAIT, Ao et al. 2504.11320: 4 stages and a threshold of 8 keep exactly 8 requests in every stage."""
    rng = np.random.default_rng(1)
    arrival = np.repeat(np.arange(200.0), rng.poisson(5, 200))
    pool = {**SECOND, "first_token": "decode"}
    rule = Batcher(hold=Hold("class", (8,)))
    steps = idle = 0
    for end, core, taken in steps_of(pool, rule, sample_of(arrival, 10, 3)):
        if end > arrival[-1]:
            break
        stages = np.bincount([computed_of(core.world.reps[0], core.world.reqs[i]) - 10 for i in taken], minlength=4)
        idle += not taken
        steps += bool(taken)
        if taken:
            assert stages.tolist() == [8 if k < steps else 0 for k in range(4)]
    assert steps == pytest.approx(125, abs=10) and idle > 60


def test_thresholds_of_the_fluid_equilibrium_keep_its_step_time_and_memory() -> None:
    """theory/batching.md 5: d0 = .003, d1 = 3.2e-5, types (20, 100, .8/s), (20, 300, .2/s): T* .0061035, M* 96.985.

    All rates are raised, and d1 lowered, by the factor that makes the counts of requests per stage 4 and 1.
    """
    period = 0.003 / (1.0 - 3.2e-5 * (0.8 * 101 * 70 + 0.2 * 301 * 170))
    assert period == pytest.approx(0.0061035, abs=5e-8)
    factor = 1.0 / (0.2 * period)
    token = 3.2e-5 / factor
    pool = {**SECOND, "first_token": "decode"}
    pool["step_time"] = [{"base": 0.003, "prefill": token, "decode": token, "kv": token}]
    waves = 600
    arrival, cls = np.repeat(period * np.arange(waves), 5), np.tile([0, 0, 0, 0, 1], waves)
    sample = sample_of(arrival, 20, np.where(cls == 0, 100, 300), cls)
    run = play(pool, Batcher(hold=Hold("class", (4, 1))), sample)
    assert run.replicas.peak[0] / factor == pytest.approx(96.985, abs=5e-4)
    late = (arrival > period * 320) & (arrival < period * 500)
    assert run.e2e[late & (cls == 0)] == pytest.approx(101 * period, rel=0.02)
    assert run.queue_time[late].max() <= 1.01 * period
    # from the 301st step on all steps take T*, until the last arrival
    assert run.finish[5 * 450] - run.finish[5 * 350] == pytest.approx(100 * period, rel=1e-6)


def test_no_segment_moves_before_enough_are_at_its_first_stage() -> None:
    """Nested WAIT: segments 0-3, 4-8 and 9-... with thresholds 3, 2 and 4, recounted from outside in every step."""
    rng = np.random.default_rng(5)
    edges, counts = (4, 9), (3, 2, 4)
    arrival = np.sort(rng.integers(0, 300, 500)).astype(float)
    sample = sample_of(arrival, 5, rng.integers(1, 16, 500))
    pool = {**SECOND, "first_token": "decode"}
    emitted = np.full(500, -1)
    moved = np.zeros(3, int)
    for end, core, taken in steps_of(pool, Batcher(hold=Hold("stage", counts, edges)), sample):
        if end > arrival[-1]:
            break
        reqs = core.world.reqs
        arrived = np.flatnonzero(arrival < end)
        waiting = [i for i in arrived if emitted[i] < 0]
        alive = [i for i in arrived if 0 <= emitted[i] < sample.output[i]]
        entering = [waiting] + [[i for i in alive if emitted[i] == edge] for edge in edges]
        ready = np.cumprod([len(group) >= count for group, count in zip(entering, counts, strict=True)])
        segment = {i: int(np.searchsorted(edges, emitted[i], side="right")) for i in alive}
        expected = {i for i in alive if ready[segment[i]] and i not in entering[segment[i]]}
        for k in range(3):
            expected |= set(sorted(entering[k])[: counts[k]]) if ready[k] and k == 0 else set()
        by_admission = sorted((reqs[i].scheduled, i) for i in alive)
        for k in (1, 2):
            if ready[k]:
                expected |= set([i for _, i in by_admission if i in entering[k]][: counts[k]])
        assert set(taken) == expected
        moved += ready
        for i in taken:
            emitted[i] += 1
    assert (moved > 10).all() and moved[0] > moved[1] > moved[2]


def test_levels_are_first_come_where_nothing_is_short() -> None:
    rng = np.random.default_rng(3)
    pool = {**SECOND, "token_budget": 50, "step_time": [{"base": 0.25, "decode": 0.0078125}]}
    sample = sample_of(np.sort(rng.integers(0, 100, 300)) / 2.0, rng.integers(1, 90, 300), rng.integers(1, 60, 300))
    expected = play(pool, Batcher(), sample)
    for levels in ((5,), (1, 20), (1000,)):
        assert_same(play(pool, Batcher(levels=levels), sample), expected)


@pytest.mark.parametrize(("overflow", "end"), [("recompute", 105.0), ("swap", 105.0)])
def test_a_short_request_overtakes_a_long_one_that_has_used_its_quantum(overflow: Any, end: float) -> None:
    """One place in the batch. The long one has 10 tokens at 10 s, and the short one that came at 3 s its 5 s then."""
    pool = {**SECOND, "max_batch": 1}
    sample = sample_of([0.0, 3.0, 11.0], 4, [100, 5, 1])
    run = play(pool, Batcher(levels=(10,), overflow=overflow), sample)
    # who came at 11 s is on the same level as the short one, and waits for it
    assert run.finish.tolist() == [end + 1.0, 15.0, 16.0]
    assert run.preemptions.tolist() == [1, 0, 0]
    assert run.replicas.prefill_tokens[0] == (4 + 4 + 4 if overflow == "swap" else 4 + 4 + 4 + 14)
    assert play(pool, Batcher(), sample).finish.tolist() == [100.0, 105.0, 106.0]


def some_rule(rng: np.random.Generator) -> Batcher:
    kind = rng.choice(["prefill-first", "prefill-only", "decode-only", "class", "stage", "levels"])
    common: dict[str, Any] = {
        "admission": str(rng.choice(["pool", "lookahead", "optimistic"])),
        "overflow": str(rng.choice(["recompute", "swap"])),
        "victims": str(rng.choice(["youngest", "last", "least"])),
        "skips": int(rng.choice([0, 0, 2])),
        "protected": float(rng.choice([0.0, 0.0, 0.2])),
        "predictor": Noise(law="noise", sigma=1.0) if rng.random() < 0.5 else None,
    }
    if kind == "class":
        return Batcher(hold=Hold("class", (int(rng.integers(1, 4)), 2)), **common)
    if kind == "stage":
        return Batcher(hold=Hold("stage", (2, 1, int(rng.integers(1, 4))), (3, 9)), **common)
    if kind == "levels":
        return Batcher(levels=(3, 9), **common)
    return Batcher(mixing=str(kind), order=str(rng.choice(["arrival", "predicted"])), **common)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(60))
def test_both_cores_and_the_oracle_end_every_request_and_keep_within_memory(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block, n = int(rng.choice([1, 2, 3])), 40
    pool = {
        **SECOND,
        "step_time": [{"base": 0.015625, "decode": 0.0078125, "prefill": 0.00390625}],
        "block_size": block,
        "kv_capacity": 52 + block + int(rng.integers(0, 60)),
        "max_batch": int(rng.choice([2, 5, 100])),
        "token_budget": int(rng.choice([48, 100])),
        "preemption": str(rng.choice(["reserve", "lookahead", "recompute", "swap"])),
        "first_token": str(rng.choice(["prefill", "decode"])),
    }
    arrival = np.cumsum(rng.choice([0, 1, 3, 20], n)) / 64.0
    sample = sample_of(arrival, rng.integers(1, 25, n), rng.integers(1, 25, n), rng.integers(0, 2, n))
    scenario = build([pool], longest=2)
    plan = Plan("rule", index_router(scenario), batcher=some_rule(rng))
    core = PythonCore(scenario.pools, sample, rules_of(scenario, plan, sample))
    rep = core.world.reps[0]
    for i, time in enumerate(arrival):
        core.look(time)
        core.arrive(0, i, time)
        assert rep.used <= rep.blocks
    core.drain()
    assert (rep.used, rep.running, rep.waiting, rep.single_kv, rep.outstanding) == (0, 0, 0, 0, 0)
    run = simulate(scenario, plan, requests=sample)
    assert_same(core.result(), run)
    assert_same(oracle.simulate(scenario, plan, sample), run)
    assert not np.isnan(run.finish).any() and run.replicas.peak[0] <= rep.blocks * block
