"""The polytope: published critical rates, brute-force moments, and what must hold for all inputs."""

from __future__ import annotations

from itertools import product
from typing import Any

import factories
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.arrays import Floats
from llmopt.lengths import Histogram
from llmopt.moments import Engine, moments
from llmopt.scenario import Pool
from llmopt.stability import RESOURCES, equilibrium, outer_factor, outer_rate, pool_loads, stability_rows
from llmopt.workload import Pairs, RequestClass

PAPER: dict[str, Any] = {
    "kv_capacity": 131_000,
    "prefill_chunk": 512,
    "token_budget": 10**6,
    "max_batch": 10**5,
    "block_size": 1,
    "first_token": "decode",
}
ONE = np.ones((1, 1))


def uniform(low: int, high: int) -> dict[str, Any]:
    return {"law": "uniform", "low": low, "high": high}


def critical_rate(prompt: dict[str, Any], output: dict[str, Any], seconds: float) -> float:
    cls = factories.request_class(prompt=1, output=1) | {"prompt": prompt, "output": output}
    case = factories.scenario([factories.pool(step_time=({"base": seconds},), **PAPER)], [cls], rate=1.0)
    return outer_factor(case, ONE)


@pytest.mark.parametrize(
    ("prompt", "output", "seconds", "published"),
    [
        ((10, 1600), (10, 1600), 0.0372, 3.263),
        ((10, 2133), (10, 1066), 0.0430, 3.956),
        ((10, 1066), (10, 2133), 0.0337, 2.902),
    ],
)
def test_critical_rates_of_nie_si_and_zhou_to_three_decimals(
    prompt: tuple[int, int], output: tuple[int, int], seconds: float, published: float
) -> None:
    assert round(critical_rate(uniform(*prompt), uniform(*output), seconds), 3) == published


def test_mixed_classes_combine_harmonically() -> None:
    """mu_mix = 1 / sum(q_l / mu_l) for shares of requests."""
    laws = [(uniform(10, 2133), uniform(10, 1066)), (uniform(10, 1066), uniform(10, 2133))]
    alone = [critical_rate(p, o, 0.04) for p, o in laws]
    classes = [
        factories.request_class(f"c{i}") | {"prompt": p, "output": o, "share": q}
        for i, ((p, o), q) in enumerate(zip(laws, (0.3, 0.7), strict=True))
    ]
    case = factories.scenario([factories.pool(step_time=({"base": 0.04},), **PAPER)], classes, rate=1.0)
    assert outer_factor(case, np.ones((2, 1))) == pytest.approx(1 / (0.3 / alone[0] + 0.7 / alone[1]))


def test_token_budget_row_is_the_throughput_of_dai_et_al() -> None:
    """512 tokens in 153.16 ms, 100 + 100 tokens a request: 16.71 requests/s."""
    engine = {**PAPER, "token_budget": 512, "kv_capacity": 10**8, "step_time": ({"base": 0.15316},)}
    case = factories.scenario([factories.pool(**engine)], [factories.request_class(prompt=100, output=100)], rate=1.0)
    assert outer_factor(case, ONE) == pytest.approx(16.7145, abs=1e-4)
    rows = stability_rows(case)[0]
    assert rows.resources[int(pool_loads(case, ONE)[0].argmax())] == "tokens"


def test_unit_slots_without_prefill_step_are_dong_and_cao() -> None:
    """The prefill step emits token 1 and holds l + 1: areas 410, 1220, 2430 and lambda* = 16492 / 4060 per class."""
    engine = {**PAPER, "first_token": "prefill", "lookahead_slots": 1, "kv_capacity": 16_492}
    classes = [factories.request_class(f"c{o}", 10, o, rate=1.0) for o in (20, 40, 60)]
    case = factories.scenario([factories.pool(step_time=({"base": 1.0},), **engine)], classes)
    assert stability_rows(case)[0].occupancy[:, 0].tolist() == [410, 1220, 2430]
    assert outer_factor(case, np.ones((3, 1))) == pytest.approx(4.0621, abs=5e-5)


def test_fluid_equilibrium_of_ao_et_al() -> None:
    """d0 = 3 ms, d1 = 32 us per token in memory, which a request of the batch grows by one: G = 15 890."""
    d1 = 3.2e-5
    step = ({"base": 0.003, "prefill": d1, "decode": d1, "kv": d1},)
    case = factories.scenario(
        [factories.pool(step_time=step, **PAPER)],
        [factories.request_class("short", 20, 100, rate=0.8), factories.request_class("long", 20, 300, rate=0.2)],
    )
    found = equilibrium(case.pools[0], case.workload.classes, case.workload.rates)
    assert found.step_time == pytest.approx(0.0061035, abs=5e-8)
    assert found.kv_tokens == pytest.approx(96.985, abs=5e-4)
    assert found.within(case.pools[0])
    assert equilibrium(case.pools[0], case.workload.classes, 3 * case.workload.rates).step_time == float("inf")


def test_batch_slots_bind_with_few_sequences() -> None:
    """64 slots, 101 steps of 10 ms: 64 / 1.01 requests/s."""
    case = factories.scenario([factories.pool()], rate=1.0)
    rows, loads = stability_rows(case)[0], pool_loads(case, ONE)[0]
    assert rows.resources[int(loads.argmax())] == "batch"
    assert outer_factor(case, ONE) == pytest.approx(64 / 1.01)
    assert (rows.pieces, rows.resources) == (("step",) * 3, RESOURCES)


def test_reserved_peaks_give_the_reserve_formula() -> None:
    """mu_res = M / (b E[(s + o)(K + o)])."""
    laws = ((10, 160), (10, 160))
    engine = {**PAPER, "kv_capacity": 3200, "prefill_chunk": 64, "preemption": "reserve"}
    cls = factories.request_class() | {"prompt": uniform(*laws[0]), "output": uniform(*laws[1])}
    case = factories.scenario([factories.pool(step_time=({"base": 1.0},), **engine)], [cls], rate=1.0)
    area = np.mean([(s + o) * (-(-s // 64) + o) for s, o in product(range(10, 161), repeat=2)])
    assert outer_factor(case, ONE) == pytest.approx(3200 / area)


def test_tpot_rows_hold_the_mean_step_below_the_target() -> None:
    case = factories.scenario([factories.pool(step_time=({"base": 0.01, "decode": 1e-4},))], rate=5.0)
    rows = stability_rows(case)[0]
    rates = np.array([5.0])
    target = equilibrium(case.pools[0], case.workload.classes, rates).step_time
    assert rows.tpot_loads(rates, target).max() == pytest.approx(1.0)
    assert rows.tpot_loads(rates, 2 * target).max() < 1


def lifes(engine: Engine, s: int, o: int) -> tuple[list[int], int]:
    """Tokens after each prefill step, the last of them full where it can be, and the decode steps."""
    return list(range(s, 0, -engine.chunk))[::-1], o - engine.first_step


def by_hand(engine: Engine, s: int, o: int) -> list[float]:
    """The moments of one request, step by step."""
    prefill, decode = lifes(engine, s, o)
    read = [s + j for j in range(decode)]
    after = prefill + [s + j + 1 for j in range(decode)]

    def blocks(tokens: int) -> int:
        return -(-(tokens + engine.slots) // engine.block) * engine.block

    held = len(after) * blocks(after[-1]) if engine.reserve else sum(blocks(t) for t in after)
    return [s, decode, len(prefill), sum(read), s * s / 2, held]


ENGINES = st.builds(
    Engine,
    chunk=st.integers(1, 40),
    block=st.sampled_from([1, 3, 8, 16]),
    slots=st.integers(0, 3),
    first_step=st.integers(0, 1),
    reserve=st.booleans(),
)
LAWS = st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True).map(
    lambda v: Histogram(law="histogram", values=tuple(v), weights=tuple(1.0 + i for i in range(len(v))))
)


@settings(max_examples=60, deadline=None)
@given(ENGINES, LAWS, LAWS)
def test_moments_equal_enumeration(engine: Engine, prompt: Histogram, output: Histogram) -> None:
    cls = RequestClass(name="c", share=1.0, prompt=prompt, output=output)
    (v, p), (w, q) = prompt.pmf, output.pmf
    want = sum(
        a * b * np.array(by_hand(engine, int(s), int(o)))
        for s, a in zip(v, p, strict=True)
        for o, b in zip(w, q, strict=True)
    )
    assert np.concatenate(moments(engine, [cls])) == pytest.approx(want)


@settings(max_examples=30, deadline=None)
@given(ENGINES, st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5))
def test_moments_of_joint_pairs_equal_enumeration(engine: Engine, rows: list[tuple[int, int]]) -> None:
    prompt, output = np.array(rows).T
    any_law = Histogram(law="histogram", values=(1,), weights=(1.0,))
    cls = RequestClass(name="c", share=1.0, prompt=any_law, output=any_law, pairs=Pairs(prompt, output))
    want = np.mean([by_hand(engine, s, o) for s, o in rows], axis=0)
    assert np.concatenate(moments(engine, [cls])) == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 60), st.data())
def test_no_way_of_cutting_the_prefill_holds_less(s: int, chunk: int, data: st.DataObject) -> None:
    engine = Engine(chunk, 4, 1, 1, False)
    held, steps = 0, 0
    done = 0
    while done < s:
        done += data.draw(st.integers(1, min(chunk, s - done)))
        held, steps = held + -(-(done + 1) // 4) * 4, steps + 1
    cls = RequestClass(
        name="c", share=1.0, prompt={"law": "constant", "value": s}, output={"law": "constant", "value": 1}
    )  # type: ignore[arg-type]
    m = moments(engine, [cls])
    assert m.held[0] <= held + 1e-9
    assert m.prefills[0] <= steps


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=4, max_size=4), st.floats(0.1, 10))
def test_rows_are_linear_in_rates_and_in_one_over_replicas(rates: list[float], scale: float) -> None:
    rows = stability_rows(factories.unlike_pools())[1]
    a, b = np.array(rates[:2]), np.array(rates[2:])
    assert rows.loads(a + scale * b) == pytest.approx(rows.loads(a) + scale * rows.loads(b))


def test_loads_of_a_split_add_up_and_the_factor_fills_the_worst_row() -> None:
    case = factories.unlike_pools()
    split: Floats = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    worst = max(loads.max() for loads in pool_loads(case, split))
    factor = outer_factor(case, split)
    assert factor == pytest.approx(1 / worst)
    full = case.replace(**{"workload.rate": case.workload.total_rate * factor})
    assert max(loads.max() for loads in pool_loads(full, split)) == pytest.approx(1.0)


def test_nothing_routed_is_no_load() -> None:
    case = factories.unlike_pools()
    assert outer_factor(case, np.zeros((2, 3))) == float("inf")


@pytest.mark.parametrize(("capacity", "block"), [(1000, 16), (1007, 16)])
def test_only_whole_blocks_count(capacity: int, block: int) -> None:
    pool = Pool.model_validate(factories.pool(kv_capacity=capacity, block_size=block))
    cls = RequestClass.model_validate(factories.request_class(prompt=16, output=1))
    whole = Pool.model_validate(factories.pool(kv_capacity=992, block_size=block))
    assert outer_rate(pool, [cls], np.ones(1)) == outer_rate(whole, [cls], np.ones(1))
