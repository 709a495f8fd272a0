"""The compiled simulator: routes every request at its arrival and advances the replicas it looks at to that instant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmopt.evaluate.kernel_route import draw, draw_pool, next_pool, smallest
from llmopt.evaluate.kernel_step import advance, arrive
from llmopt.evaluate.kernel_types import NONE, Table, World, build_world, compiled
from llmopt.evaluate.run import ReplicaTotals, SimRun
from llmopt.lengths import Floats, Ints
from llmopt.plan import Router
from llmopt.scenario import Pool, Scenario
from llmopt.workload import Requests


class Routing(NamedTuple):
    """A data router as arrays: candidate set k is members[bounds[k]:bounds[k + 1]], one set per pool or per class.

    sent: requests of each class that went to each pool; last: number of the last request sent to each replica; drawn:
    room for the d choices; dependent: whether the weights look at the state at all.
    """

    weights: Floats
    fractions: Floats
    cyclic: bool
    drawn: Ints
    members: Ints
    bounds: Ints
    sent: Ints
    last: Ints
    dependent: bool


@compiled
def run(world: World, cls: Ints, u: Floats, routing: Routing) -> None:
    """Play all requests to their end; `routing.last` remembers the number of the last request of each replica."""
    for i in range(len(world.reqs)):
        time = world.reqs[i].arrival
        r = route(world, time, cls[i], u[i], routing)
        advance(world, r, time)
        routing.last[r] = i
        arrive(world, r, i, time)
    for r in range(len(world.reps)):
        advance(world, r, np.inf)


@compiled
def route(world: World, time: float, cls: int, u: float, routing: Routing) -> int:
    """The replica for one request."""
    which = cls
    if len(routing.fractions) > 0 and routing.cyclic:
        which = next_pool(routing.fractions, routing.sent, cls)
    elif len(routing.fractions) > 0:
        which, u = draw_pool(routing.fractions, cls, u)
    members = routing.members[routing.bounds[which] : routing.bounds[which + 1]]
    if len(routing.drawn) > 0:
        draw(members, u, routing.drawn)
        members = routing.drawn
    if routing.dependent:
        for r in members:
            advance(world, r, time)
    return smallest(world.reps, members, routing.weights, routing.last, time)


def run_compiled(scenario: Scenario, router: Router, requests: Requests) -> SimRun:
    """Run a data router through the compiled core."""
    world = build_world(scenario.pools, requests)
    run(world, requests.cls, requests.u, routing_of(scenario, router, world.reps))
    reqs = world.reqs
    return SimRun(
        requests,
        replica=reqs["replica"].astype(np.int64),
        scheduled=reqs["scheduled"].copy(),
        first_token=reqs["first_token"].copy(),
        finish=reqs["finish"].copy(),
        preemptions=reqs["preemptions"].astype(np.int64),
        replicas=totals_of(world.reps),
        core="compiled",
    )


def routing_of(scenario: Scenario, router: Router, reps: Table) -> Routing:
    """The router as arrays."""
    classes, pools = len(scenario.workload.classes), len(scenario.pools)
    mask = np.ones((classes, pools), bool) if router.mask is None else np.asarray(router.mask, bool)
    chosen = mask if router.fractions is None else np.eye(pools, dtype=bool)
    sets = [np.flatnonzero(row[reps["pool"]]) for row in chosen]
    fractions = np.zeros((0, pools)) if router.fractions is None else np.asarray(router.fractions, float)
    return Routing(
        weights=np.ascontiguousarray(router.weights, float),
        fractions=np.ascontiguousarray(fractions),
        cyclic=router.spread == "cyclic",
        drawn=np.zeros(router.choices, np.int64),
        members=np.concatenate(sets),
        bounds=np.cumsum([0, *(len(s) for s in sets)]),
        sent=np.zeros((classes, pools), np.int64),
        last=np.full(len(reps), NONE, np.int64),
        dependent=bool(np.any(router.weights)),
    )


def totals_of(reps: Table) -> ReplicaTotals:
    """The totals of every replica."""
    names = ("pool", "steps", "busy", "prefill_tokens", "decode_tokens", "preemptions", "held", "wasted")
    return ReplicaTotals(**{name: reps[name].copy() for name in (*names, "held_time", "peak")})


def play_backlog(pool: Pool, prompt: Ints, output: Ints, stops: Sequence[float]) -> tuple[Table, list[ReplicaTotals]]:
    """One replica with all requests waiting at time 0: requests at the end, totals at the times `stops`."""
    zeros = np.zeros(len(prompt))
    requests = Requests(zeros, prompt, output, zeros.astype(np.int64), zeros)
    world = build_world([pool.model_copy(update={"replicas": 1})], requests)
    snapshots = []
    submit(world)
    for stop in stops:
        advance(world, 0, stop)
        snapshots.append(totals_of(world.reps))
    advance(world, 0, np.inf)
    return world.reqs, snapshots


@compiled
def submit(world: World) -> None:
    """Everything to replica 0 at time 0."""
    for i in range(len(world.reqs)):
        arrive(world, 0, i, 0.0)
