"""Replays of a run: its arrivals as a scenario, the simulator on it, and the engine's state on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.runs import Curves, EngineRun
from llmopt.scenario import Pool, Scenario
from llmopt.validation.constants import RUNNING_WEIGHT, WAITING_WEIGHT
from llmopt.workload import Pairs, Requests

if TYPE_CHECKING:
    from llmopt.evaluate.kernel import CompiledCore

BALANCER = "vllm-data-parallel"
SEED = 1
"""The replay draws nothing; a seed is asked for by the simulator and named in results."""
CLASS = "recorded"


def recorded_requests(run: EngineRun) -> Requests:
    """The run's requests as the simulator takes them; nothing is drawn, so that `u` is zero."""
    records = run.records
    none = np.zeros(len(records))
    return Requests(records.arrival, records.prompt, records.output, none.astype(np.int64), none)


def recorded_scenario(run: EngineRun, pool: Pool) -> Scenario:
    """One pool that gets the recorded requests at their recorded times.

    Raises
    ------
    ScenarioError
        If the pool's memory does not hold one of the requests, or something else in it cannot be.
    """
    requests = recorded_requests(run)
    span = float(requests.arrival[-1]) or 1.0
    laws = {name: {"law": "histogram", **_histogram(getattr(requests, name))} for name in ("prompt", "output")}
    one = {"name": CLASS, "share": 1.0, "pairs": Pairs(requests.prompt, requests.output), **laws}
    data = {
        "name": f"replay-of-{_word(run.name)}",
        "workload": {
            "rate": len(requests) / span,
            "arrivals": {"law": "replay"},
            "classes": [one],
            "replay": requests,
        },
        "pools": [pool.model_dump(exclude_none=True) | {"table": pool.table}],
        "evaluation": {"horizon": span * (1 + 1e-9) + 1.0, "seeds": [SEED]},
    }
    return Scenario.checked(data, f"{run.path}: the replay")


def _histogram(values: Ints) -> dict[str, list[float]]:
    different, counts = np.unique(values, return_counts=True)
    return {"values": different.tolist(), "weights": counts.astype(float).tolist()}


def _word(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name) or "run"


def play(scenario: Scenario) -> SimRun:
    """The recorded requests through the simulator, behind vLLM's balancer if there are several replicas."""
    router = index_router(scenario, waiting=WAITING_WEIGHT, running=RUNNING_WEIGHT)
    assert scenario.workload.replay is not None
    return simulate(scenario, Plan(BALANCER, router), SEED, requests=scenario.workload.replay)


class States(NamedTuple):
    """The engine at given times, summed over the replicas; arrays of shape (n_times,).

    waiting, running: requests; kv_tokens: KV tokens allocated; steps: steps begun by then, shape (n_times, n_replicas).
    """

    waiting: Ints
    running: Ints
    kv_tokens: Ints
    steps: Ints


def driven(scenario: Scenario, sim: SimRun, times: Floats) -> Iterator[tuple[int, CompiledCore]]:
    """The number of each of `times` (s, in any order), earliest first, with the engine as it is then.

    The compiled core is driven through the requests of `sim` again, each to the replica that it went to; looking at it
    changes nothing.
    """
    from llmopt.evaluate.kernel import CompiledCore

    core = CompiledCore(scenario.pools, sim.requests)
    arrivals, i = sim.requests.arrival, 0
    for k in np.argsort(times, kind="stable").tolist():
        while i < len(arrivals) and arrivals[i] <= times[k]:
            core.look(arrivals[i])
            core.arrive(int(sim.replica[i]), i, arrivals[i])
            i += 1
        core.look(times[k])
        yield k, core


def states_at(scenario: Scenario, sim: SimRun, times: Floats) -> States:
    """What the engine of a simulated run holds at `times` (s)."""
    waiting, running, kv_tokens = (np.zeros(len(times), np.int64) for _ in range(3))
    steps = np.zeros((len(times), len(sim.replicas.pool)), np.int64)
    for k, core in driven(scenario, sim, times):
        waiting[k], running[k], kv_tokens[k], _ = np.sum(core.look(times[k]), axis=0)
        steps[k] = core.world.reps["steps"]
    return States(waiting, running, kv_tokens, steps)


def predicted_curves(scenario: Scenario, sim: SimRun, times: Floats) -> Curves:
    """Running, waiting and memory in use at `times` (s); preempted requests wait again."""
    states = states_at(scenario, sim, times)
    pool = scenario.pools[0]
    room = pool.replicas * pool.kv_blocks * pool.block_size
    return Curves(times, states.running.astype(float), states.waiting.astype(float), 100.0 * states.kv_tokens / room)
