"""The compiled core: the kernels of kernel_*.py, run by numba."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.batcher import Snapshot
from llmopt.evaluate.kernel_queue import list_waiting, rank_anew
from llmopt.evaluate.kernel_replan import halt, halt_at, list_beliefs, list_running
from llmopt.evaluate.kernel_route import Routing, drain, look, run
from llmopt.evaluate.kernel_step import advance, arrive
from llmopt.evaluate.kernel_types import Table, World, compiled
from llmopt.evaluate.kernel_world import build_world
from llmopt.evaluate.rules import Rules, first_come
from llmopt.evaluate.run import ReplicaTotals, SimRun
from llmopt.plan import STATE_FEATURES
from llmopt.scenario import Pool
from llmopt.workload import Requests

TOTALS = tuple(field.name for field in fields(ReplicaTotals))
RESULTS = {"replica", "queued", "scheduled", "first_token", "finish", "preemptions", *TOTALS}
"""Fields of the tables that are results."""


class Core(ABC):
    """All replicas and requests of one run, and the kernels that play them."""

    name: str
    kernels: Any
    world: Any
    requests: Requests

    @property
    @abstractmethod
    def stuck(self) -> int:
        """A request that was preempted too often, or -1."""

    @abstractmethod
    def route(self, routing: Routing, first: int, last: int) -> int:
        """Play the arrivals of requests `first` to `last - 1`; returns -1, or one that its replica can never hold."""

    def run(self, routing: Routing) -> int:
        """Play all requests; returns -1, or the number of a request that its replica can never hold."""
        lost = self.route(routing, 0, len(self.requests))
        self.drain()
        return lost

    def arrive(self, r: int, i: int, time: float) -> None:
        """Hand request `i` to replica `r`, which has been looked at at `time`."""
        self.kernels.arrive(self.world, r, i, time)

    def drain(self) -> None:
        """Play what is in the replicas to its end."""
        self.kernels.drain(self.world)

    def halt_at(self, time: float) -> None:
        """Let no replica end a step after `time` (s) until another time is said."""
        self.kernels.halt_at(self.world, time)

    def halt(self, time: float) -> Ints:
        """End every step that ends by `time` (s), leave those under way; how many wait and run, (n_replicas, 2)."""
        counts = np.zeros((len(self.world.reps), 2), np.int64)
        self.kernels.halt(self.world, time, counts)
        return counts

    def snapshot(self, r: int, time: float, pool: Pool, counts: Ints) -> Snapshot:
        """What a rule sees of replica `r`, halted at `time` with `counts` requests waiting and running."""
        numbers, beliefs, batch = (
            np.zeros(counts[0], np.int64),
            np.zeros((counts[0], 2), np.int64),
            np.zeros((counts[1], 4), np.int64),
        )
        self.kernels.list_waiting(self.world, r, numbers)
        numbers.sort()
        self.kernels.list_beliefs(self.world, numbers, beliefs)
        self.kernels.list_running(self.world, r, batch)
        arrival, prompt = self.requests.arrival[numbers], self.requests.prompt[numbers]
        return Snapshot(time, pool, numbers, arrival, prompt, *beliefs.T, *batch.T)

    def rank(self, r: int, numbers: Ints, keys: Floats, time: float) -> None:
        """New keys, from `time` (s) on, for all requests that wait at replica `r`."""
        self.kernels.rank_anew(self.world, r, numbers, keys, time)


class CompiledCore(Core):
    """As arrays, played by the compiled kernels."""

    name = "compiled"
    kernels = SimpleNamespace(
        arrive=arrive,
        drain=drain,
        halt=halt,
        halt_at=halt_at,
        list_beliefs=list_beliefs,
        list_running=list_running,
        list_waiting=list_waiting,
        rank_anew=rank_anew,
    )

    def __init__(self, pools: Sequence[Pool], requests: Requests, rules: Rules | None = None) -> None:
        self.requests = requests
        self.world = build_world(pools, requests, rules or first_come(requests))
        self._seen = np.zeros((len(self.world.reps), len(STATE_FEATURES)), np.int64)

    def route(self, routing: Routing, first: int, last: int) -> int:
        """Play the arrivals of requests `first` to `last - 1`; returns -1, or one that its replica can never hold."""
        return run(self.world, self.requests.cls, self.requests.u, routing, first, last)

    def look(self, time: float) -> list[list[int]]:
        """The state features of every replica at `time`, as in `STATE_FEATURES`."""
        look(self.world, time, self._seen)
        states: list[list[int]] = self._seen.tolist()
        return states

    @property
    def stuck(self) -> int:
        """A request that was preempted too often, or -1."""
        return int(self.world.reps["stuck"].max())

    def result(self) -> SimRun:
        """The run so far."""
        return collect(self.name, self.requests, self.world.reqs, self.world.reps)


def collect(core: str, requests: Requests, reqs: Table, reps: Table) -> SimRun:
    """The results in the tables."""
    return SimRun(
        requests,
        replica=reqs["replica"].astype(np.int64),
        queued=reqs["queued"].copy(),
        scheduled=reqs["scheduled"].copy(),
        first_token=reqs["first_token"].copy(),
        finish=reqs["finish"].copy(),
        preemptions=reqs["preemptions"].astype(np.int64),
        replicas=totals_of(reps),
        core=core,
    )


def totals_of(reps: Table) -> ReplicaTotals:
    """The totals of every replica."""
    return ReplicaTotals(**{name: reps[name].copy() for name in TOTALS})


class Backlog:
    """One replica that finds all its requests waiting at time 0."""

    def __init__(self, pool: Pool, prompt: Ints, output: Ints) -> None:
        zeros = np.zeros(len(prompt))
        requests = Requests(zeros, prompt, output, zeros.astype(np.int64), zeros)
        self._world = build_world([pool.model_copy(update={"replicas": 1})], requests, first_come(requests))
        submit(self._world)

    def play(self, until: float = np.inf) -> ReplicaTotals:
        """Make every step that starts before `until` (s); the totals so far, arrays of shape (1,)."""
        advance(self._world, 0, until)
        return totals_of(self._world.reps)

    @property
    def finish(self) -> Floats:
        """End of each request, s; NaN if it is not finished."""
        finish: Floats = self._world.reqs["finish"]
        return finish

    @property
    def drained(self) -> float:
        """When the queue was last emptied, s."""
        return float(self._world.reps["drained"][0])


@compiled
def submit(world: World) -> None:
    """Everything to replica 0 at time 0."""
    for i in range(len(world.reqs)):
        arrive(world, 0, i, 0.0)
