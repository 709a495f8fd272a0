"""The iteration-level simulator: plays a plan against a scenario; semantics in docs/simulator.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmopt.errors import PolicyError, ScenarioError
from llmopt.evaluate.replan import play_in_turns
from llmopt.evaluate.rules import Rules, rules_of
from llmopt.evaluate.run import SimRun
from llmopt.plan import Incoming, Plan, ReplicaState, Router, RouterRule, ask, check_plan
from llmopt.scenario import Scenario
from llmopt.workload import Requests

if TYPE_CHECKING:
    from llmopt.evaluate.kernel import CompiledCore
    from llmopt.evaluate.kernel_route import Routing
    from llmopt.evaluate.python_core import PythonCore

Core = Literal["compiled", "python"]


def simulate(
    scenario: Scenario,
    plan: Plan,
    seed: int = 1,
    *,
    core: Core = "compiled",
    requests: Requests | None = None,
    horizon: float | None = None,
) -> SimRun:
    """Simulate every engine step of every replica until the last request is done.

    Parameters
    ----------
    seed
        Seed of the sampled requests; the same seed gives the same requests under every plan.
    core
        ``compiled`` by numba, or ``python``, the same program in the interpreter: no compilation, but much slower
        (`python -m benchmarks.simulator` says by how much). Either runs data routers and Python rules.
    requests
        Play these instead of sampling the scenario's workload.
    horizon
        Arrivals end here (s); the evaluation's horizon if absent.

    Raises
    ------
    PolicyError
        If the plan does not fit, sends a request where it can never run, or its rule fails.
    ScenarioError
        If a request is malformed or fits into no replica at all.
    """
    plan = check_plan(plan, scenario)
    if requests is None:
        requests = scenario.workload.sample(scenario.evaluation.horizon if horizon is None else horizon, seed)
    _check_requests(scenario, requests)
    engine = _core(core, scenario, requests, rules_of(scenario, plan, requests))
    feed = _feeder(engine, scenario, plan)
    if plan.batcher.replan is None:
        feed(0, len(requests))
    else:
        play_in_turns(engine, scenario, plan.policy, plan.batcher.replan, feed)
    engine.drain()
    if engine.stuck >= 0:
        raise _stuck(plan.policy, engine.stuck)
    return engine.result()


def _core(core: Core, scenario: Scenario, requests: Requests, rules: Rules) -> CompiledCore | PythonCore:
    if core == "python":
        from llmopt.evaluate.python_core import PythonCore

        return PythonCore(scenario.pools, requests, rules)
    if core != "compiled":
        raise ValueError(f"core = {core!r} is not known; give 'compiled' or 'python'")
    from llmopt.evaluate.kernel import CompiledCore

    return CompiledCore(scenario.pools, requests, rules)


def _feeder(engine: CompiledCore | PythonCore, scenario: Scenario, plan: Plan) -> Callable[[int, int], None]:
    """What plays the arrivals of requests `first` to `last - 1`."""
    assert plan.router is not None
    if not isinstance(plan.router, Router):
        return partial(_run_rule, engine, scenario, plan.policy, plan.router)
    from llmopt.evaluate.kernel_route import build_routing

    return partial(_run_router, engine, plan.policy, build_routing(scenario, plan.router))


def _run_router(engine: CompiledCore | PythonCore, policy: str, routing: Routing, first: int, last: int) -> None:
    lost = engine.route(routing, first, last)
    if lost >= 0:
        raise _too_large(engine.requests, policy, lost)


def _run_rule(
    engine: CompiledCore | PythonCore, scenario: Scenario, policy: str, rule: RouterRule, first: int, last: int
) -> None:
    """Ask the rule at every arrival; the engine is told afterwards."""
    requests = engine.requests
    pools = [j for j, pool in enumerate(scenario.pools) for _ in range(pool.replicas)]
    room = [pool.largest for pool in scenario.pools]
    columns = (requests.arrival, requests.prompt, requests.output, requests.cls, requests.u)
    rows = zip(*(c[first:last].tolist() for c in columns), strict=True)
    for i, (time, prompt, output, cls, u) in enumerate(rows, first):
        states = [ReplicaState(r, pools[r], *state) for r, state in enumerate(engine.look(time))]
        r = ask(rule, policy, Incoming(i, time, prompt, output, cls, u), states)
        if prompt + output > room[pools[r]]:
            raise _too_large(requests, policy, i)
        engine.arrive(r, i, time)


def _stuck(policy: str, i: int) -> PolicyError:
    from llmopt.evaluate.kernel_types import PATIENCE

    return PolicyError(
        f"policy {policy!r} preempted request {i} {PATIENCE} times, which may go on for ever; "
        "admit less at once (protected, admission), clear fewer (clearing, victims) or keep tokens (overflow)"
    )


def _too_large(requests: Requests, policy: str, i: int) -> PolicyError:
    tokens = requests.prompt[i] + requests.output[i]
    return PolicyError(
        f"policy {policy!r} sent request {i} ({tokens} tokens) to a replica whose KV memory it exceeds; "
        "send large requests only to pools that can hold them"
    )


def _check_requests(scenario: Scenario, requests: Requests) -> None:
    total, room = requests.prompt + requests.output, max(pool.largest for pool in scenario.pools)
    if len(requests) == 0:
        return
    if not np.isfinite(requests.arrival).all() or (np.diff(requests.arrival) < 0).any() or requests.arrival[0] < 0:
        raise ScenarioError("requests: arrival times must be finite, at least 0 and in increasing order; sort them")
    if min(requests.prompt.min(), requests.output.min()) < 1:
        raise ScenarioError("requests: every prompt and every output needs at least 1 token; drop empty requests")
    if total.max() > room:
        i = int(np.argmax(total > room))
        raise ScenarioError(
            f"request {i} needs KV memory for {total[i]} tokens, but no replica of any pool holds more than {room}; "
            "drop the request or raise kv_capacity"
        )
