"""The compiled simulator: routes every request at its arrival and advances the replicas it looks at to that instant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmopt.evaluate.kernel_route import draw, draw_pool, next_pool, smallest
from llmopt.evaluate.kernel_step import advance, arrive
from llmopt.evaluate.kernel_types import MODES, NONE, REPLICA, REQUEST, Table, compiled
from llmopt.evaluate.run import ReplicaTotals, SimRun
from llmopt.lengths import Floats, Ints
from llmopt.plan import Router
from llmopt.scenario import Pool, Scenario
from llmopt.workload import Requests


class Routing(NamedTuple):
    """A data router as arrays: candidate set k is members[bounds[k]:bounds[k + 1]], one set per pool or per class."""

    weights: Floats
    fractions: Floats
    cyclic: bool
    choices: int
    members: Ints
    bounds: Ints
    sent: Ints
    last: Ints
    dependent: bool


@compiled
def run(reqs: Table, reps: Table, pieces: Floats, cls: Ints, u: Floats, routing: Routing) -> None:
    """Play all requests to their end."""
    for i in range(len(reqs)):
        time = reqs[i].arrival
        r = route(reqs, reps, pieces, time, cls[i], u[i], routing)
        advance(reqs, reps[r], pieces, time)
        routing.last[r] = i
        arrive(reqs, reps[r], i, r, time)
    for r in range(len(reps)):
        advance(reqs, reps[r], pieces, np.inf)


@compiled
def route(reqs: Table, reps: Table, pieces: Floats, time: float, cls: int, u: float, routing: Routing) -> int:
    """The replica for one request."""
    which = cls
    if len(routing.fractions) > 0 and routing.cyclic:
        which = next_pool(routing.fractions, routing.sent, cls)
    elif len(routing.fractions) > 0:
        which, u = draw_pool(routing.fractions, cls, u)
    members = routing.members[routing.bounds[which] : routing.bounds[which + 1]]
    if routing.choices > 0:
        members = draw(members, routing.choices, u)
    if routing.dependent:
        for r in members:
            advance(reqs, reps[r], pieces, time)
    return smallest(reps, members, routing.weights, routing.last)


def run_compiled(scenario: Scenario, router: Router, requests: Requests) -> SimRun:
    """Run a data router through the compiled core."""
    reqs, (reps, pieces) = request_table(requests), replica_table(scenario.pools)
    run(reqs, reps, pieces, requests.cls, requests.u, routing_of(scenario, router, reps))
    return SimRun(
        requests,
        replica=reqs["replica"].copy(),
        scheduled=reqs["scheduled"].copy(),
        first_token=reqs["first_token"].copy(),
        finish=reqs["finish"].copy(),
        preemptions=reqs["preemptions"].copy(),
        replicas=totals_of(reps),
        core="compiled",
    )


def request_table(requests: Requests) -> Table:
    """One record per request, before its arrival."""
    table = np.zeros(len(requests), REQUEST)
    table["arrival"], table["prompt"], table["output"] = requests.arrival, requests.prompt, requests.output
    table["target"], table["prefilling"] = requests.prompt, 1
    for name in ("scheduled", "first_token", "finish"):
        table[name] = np.nan
    return table


def replica_table(pools: Sequence[Pool]) -> tuple[Table, Floats]:
    """One record per replica, empty, and the stacked step-time pieces of all pools."""
    table = np.zeros(sum(pool.replicas for pool in pools), REPLICA)
    for name in ("queue_head", "queue_tail", "batch_head", "batch_tail"):
        table[name] = NONE
    row = piece = 0
    for j, pool in enumerate(pools):
        mine = table[row : row + pool.replicas]
        mine["pool"], mine["mode"], mine["first_step"] = j, MODES.index(pool.preemption), pool.first_step
        mine["block"], mine["slots"], mine["blocks"] = pool.block_size, pool.lookahead_slots, pool.kv_blocks
        mine["chunk"], mine["budget"], mine["max_batch"] = pool.chunk, pool.token_budget, pool.max_batch
        mine["piece"], mine["pieces"] = piece, len(pool.step_time)
        row, piece = row + pool.replicas, piece + len(pool.step_time)
    return table, np.concatenate([pool.stepper.coefficients for pool in pools])


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
        choices=router.choices,
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
    reqs = request_table(Requests(zeros, prompt, output, zeros.astype(np.int64), zeros))
    reps, pieces = replica_table([pool.model_copy(update={"replicas": 1})])
    submit(reqs, reps)
    snapshots = []
    for stop in stops:
        advance(reqs, reps[0], pieces, stop)
        snapshots.append(totals_of(reps))
    advance(reqs, reps[0], pieces, np.inf)
    return reqs, snapshots


@compiled
def submit(reqs: Table, reps: Table) -> None:
    """Everything to replica 0 at time 0."""
    for i in range(len(reqs)):
        arrive(reqs, reps[0], i, 0, 0.0)
