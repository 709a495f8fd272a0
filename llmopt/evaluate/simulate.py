"""The iteration-level simulator: plays a plan against a scenario; semantics in docs/simulator.md."""

from __future__ import annotations

from typing import Literal

import numpy as np

from llmopt.errors import PolicyError, ScenarioError
from llmopt.evaluate.run import SimRun
from llmopt.plan import Plan, Router, check_plan
from llmopt.scenario import Scenario
from llmopt.workload import Requests

Core = Literal["auto", "compiled", "python"]


def simulate(
    scenario: Scenario,
    plan: Plan,
    seed: int = 1,
    *,
    core: Core = "auto",
    requests: Requests | None = None,
    horizon: float | None = None,
) -> SimRun:
    """Simulate every engine step of every replica until the last request is done.

    Parameters
    ----------
    seed
        Seed of the sampled requests; the same seed gives the same requests under every plan.
    core
        ``compiled`` (numba) runs data routers, ``python`` any rule; ``auto`` takes the fastest that can run the plan.
    requests
        Play these instead of sampling the scenario's workload.
    horizon
        Arrivals end here (s); the evaluation's horizon if absent.

    Raises
    ------
    PolicyError
        If the plan does not fit, sends a request where it can never run, or its rule fails.
    ScenarioError
        If a request fits into no replica at all.
    """
    check_plan(plan, scenario)
    if requests is None:
        requests = scenario.workload.sample(horizon or scenario.evaluation.horizon, seed)
    fit = fitting_pools(scenario, requests)
    if not isinstance(plan.router, Router):
        raise PolicyError(f"policy {plan.policy!r}: only data routers run so far; return a Router")
    from llmopt.evaluate.kernel import run_compiled

    run = run_compiled(scenario, plan.router, requests)
    lost = np.flatnonzero(~fit[np.arange(len(requests)), run.replicas.pool[run.replica]])
    if len(lost):
        raise PolicyError(f"policy {plan.policy!r} sent request {lost[0]} to a pool whose KV memory it exceeds")
    return run


def fitting_pools(scenario: Scenario, requests: Requests) -> np.ndarray:
    """fits[i, j]: request i fits into an empty replica of pool j; refuses a request that fits nowhere."""
    total = requests.prompt + requests.output
    fits = np.column_stack(
        [-(-(total - p.first_step + p.lookahead_slots) // p.block_size) <= p.kv_blocks for p in scenario.pools]
    )
    lost = np.flatnonzero(~fits.any(axis=1))
    if len(lost):
        i = int(lost[0])
        raise ScenarioError(
            f"request {i} needs KV memory for {total[i]} tokens, more than a replica of any pool holds "
            f"(at most {max(p.kv_capacity for p in scenario.pools)}); drop it from the trace or raise kv_capacity"
        )
    return fits
