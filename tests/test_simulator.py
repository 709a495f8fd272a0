"""Both cores against the naive oracle on random small cases, long outputs and a real trace."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from simulator_cases import LONGEST, MODES, assert_same, build, pools, requests, routers

from llmopt import load_scenario
from llmopt.evaluate.kernel import CompiledCore
from llmopt.evaluate.kernel_route import build_routing
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router, split_router
from llmopt.scenario import Scenario
from llmopt.workload import Requests


def check_cores(scenario: Scenario, plan: Plan, sample: Requests) -> SimRun:
    truth = oracle.simulate(scenario, plan, sample)
    for core in ("compiled", "python"):
        assert_same(simulate(scenario, plan, requests=sample, core=core), truth)
    return truth


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_both_cores_agree_with_the_oracle(data: st.DataObject) -> None:
    scenario = build(data.draw(pools()))
    plan = Plan("drawn", data.draw(routers(scenario)))
    truth = check_cores(scenario, plan, data.draw(requests()))
    assert (truth.finish > truth.requests.arrival).all() or any(
        p.stepper.coefficients.min() == 0 for p in scenario.pools
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_cores_agree_where_budget_and_memory_are_short(data: st.DataObject) -> None:
    """Requests that get no token in some steps, and are preempted in others or in the same."""
    pool = data.draw(pools())[0]
    pool |= {"replicas": 1, "max_batch": 100, "kv_capacity": 2 * LONGEST + 3 + pool["block_size"]}
    pool |= {"token_budget": data.draw(st.integers(1, 12)), "prefill_chunk": data.draw(st.sampled_from([1, 2, 5, 12]))}
    scenario = build([pool])
    check_cores(scenario, Plan("only", index_router(scenario)), data.draw(requests()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_cores_agree_under_memory_pressure_with_long_outputs(mode: str, seed: int) -> None:
    """Longer runs: several pieces whose order changes as the batch grows, and hundreds of preemptions."""
    rng = np.random.default_rng(seed)
    pieces = [
        {"base": 0.013, "kv": 1.7e-6},
        {"base": 0.009, "kv": 9.1e-6, "decode": 1e-4},
        {"base": 0.02, "pairs": 1e-7},
    ]
    pool = {
        "name": "p",
        "replicas": 2,
        "step_time": pieces[: 1 + seed],
        "kv_capacity": 2400,
        "block_size": (1, 16, 7, 16)[seed],
        "token_budget": (4000, 60, 256, 20)[seed],
        "preemption": mode,
        "first_token": ("decode", "prefill")[seed % 2],
    }
    n = 60
    sample = Requests(
        np.sort(rng.uniform(0, 10, n)),
        rng.integers(1, 200, n),
        rng.integers(1, 900, n),
        rng.integers(0, 2, n),
        rng.random(n),
    )
    scenario = build([pool])
    truth = check_cores(scenario, Plan("jsq", index_router(scenario, waiting=1.0, running=1.0)), sample)
    assert (truth.preemptions.sum() > 20) == (mode in ("recompute", "swap", "restart"))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_behind(mode: str) -> None:
    rng = np.random.default_rng(8)
    n = 500
    pool = {"name": "p", "replicas": 3, "kv_capacity": 700, "block_size": 8, "preemption": mode, "token_budget": 300}
    scenario = build([{**pool, "step_time": [{"base": 0.02, "kv": 1e-6}]}])
    lengths = rng.integers(1, 150, (2, n))
    core = CompiledCore(
        scenario.pools, Requests(np.sort(rng.uniform(0, 20, n)), *lengths, np.zeros(n, np.int64), rng.random(n))
    )
    assert core.run(build_routing(scenario, index_router(scenario, kv_tokens=1.0))) == -1
    for name in ("waiting", "running", "gliding", "used", "outstanding", "kv", "single_kv"):
        assert not core.world.reps[name].any(), name
    for name in ("queue_head", "batch_head", "batch_tail", "single_head", "single_tail"):
        assert (core.world.reps[name] == -1).all(), name
    assert (
        not core.world.classes[: core.world.reps["scratch"][0]].any()
        and not core.world.bits.any()
        and (core.world.ring == -1).all()
    )


def test_cores_agree_on_a_real_trace(shared: Path) -> None:
    """Six replicas of two kinds, the first minute of the Azure conversation trace."""
    scenario = load_scenario("azure-conv", shared / "data/azure-llm-2023/AzureLLMInferenceTrace_conv.csv")
    pools = [pool.model_copy(update={"replicas": 3}).model_dump() for pool in scenario.pools]
    scenario = scenario.replace(pools=pools)
    sample = scenario.workload.sample(60.0, 1)
    assert len(sample) == 191
    check_cores(scenario, Plan("least-kv", index_router(scenario, kv_tokens=1.0)), sample)


def conserved(scenario: Scenario, run: SimRun) -> bool:
    """held - wasted = sum of the lifetime areas g(s, o), with K = ceil(s / chunk) prefill steps."""
    pool = scenario.pools[0]
    s, o, e = run.requests.prompt, run.requests.output, pool.first_step
    full = -(-s // pool.chunk) - 1
    steps = o - e
    area = pool.chunk * full * (full + 1) // 2 + s + s * steps + steps * (steps + 1) // 2
    return int((run.replicas.held - run.replicas.wasted).sum()) == int(area.sum())


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("mode", MODES)
def test_memory_in_use_is_conserved(mode: str, first_token: str) -> None:
    pool = {
        "name": "p",
        "replicas": 3,
        "step_time": [{"base": 1.0}],
        "kv_capacity": 900,
        "block_size": 4,
        "token_budget": 100_000,
        "prefill_chunk": 64,
        "preemption": mode,
        "first_token": first_token,
    }
    rng = np.random.default_rng(5)
    n = 4000
    sample = Requests(
        np.sort(rng.uniform(0, 200, n)),
        rng.integers(1, 200, n),
        rng.integers(1, 200, n),
        rng.integers(0, 2, n),
        rng.random(n),
    )
    scenario = build([pool])
    run = simulate(scenario, Plan("random", split_router(scenario, np.ones((2, 1)))), requests=sample)
    assert conserved(scenario, run)
    assert (run.replicas.wasted.sum() > 0) == (mode in ("recompute", "restart"))
