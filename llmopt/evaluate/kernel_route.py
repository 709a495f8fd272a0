# mypy: disable-error-code="no-any-return"
"""Routing by data (compiled): pool, draws, smallest score; see docs/simulator.md."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.evaluate.kernel_glide import blocks_of
from llmopt.evaluate.kernel_step import advance, arrive
from llmopt.evaluate.kernel_types import NONE, Table, World, compiled
from llmopt.plan import Router
from llmopt.scenario import Scenario


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


def build_routing(scenario: Scenario, router: Router) -> Routing:
    """The router as arrays."""
    classes, pools = len(scenario.workload.classes), len(scenario.pools)
    replicas = np.repeat(np.arange(pools), [pool.replicas for pool in scenario.pools])
    mask = np.ones((classes, pools), bool) if router.mask is None else np.asarray(router.mask, bool)
    chosen = mask if router.fractions is None else np.eye(pools, dtype=bool)
    sets = [np.flatnonzero(row[replicas]) for row in chosen]
    fractions = np.zeros((0, pools)) if router.fractions is None else np.asarray(router.fractions, float)
    return Routing(
        weights=np.ascontiguousarray(router.weights, float),
        fractions=np.ascontiguousarray(fractions),
        cyclic=router.spread == "cyclic",
        drawn=np.zeros(router.choices, np.int64),
        members=np.concatenate(sets),
        bounds=np.cumsum([0, *(len(s) for s in sets)]),
        sent=np.zeros((classes, pools), np.int64),
        last=np.full(len(replicas), NONE, np.int64),
        dependent=bool(np.any(router.weights)),
    )


@compiled
def run(world: World, cls: Ints, u: Floats, routing: Routing, first: int, last: int) -> int:
    """Route requests `first` to `last - 1` at their arrival; returns NONE, or one that its replica can never hold."""
    for i in range(first, last):
        time = world.reqs[i].arrival
        r = route(world, time, cls[i], u[i], routing)
        if not can_hold(world, r, i):
            return i
        advance(world, r, time)
        routing.last[r] = i
        arrive(world, r, i, time)
    return NONE


@compiled
def drain(world: World) -> None:
    """Play what is in the replicas to its end; from the last arrival on nobody is held back."""
    for r in range(len(world.reps)):
        rep = world.reps[r]
        if rep.counts > 0 and len(world.reqs) > 0:
            advance(world, r, world.reqs[len(world.reqs) - 1].arrival)
        rep.flush = 1
        advance(world, r, math.inf)


@compiled
def can_hold(world: World, r: int, i: int) -> bool:
    """Whether request `i` fits into an empty replica `r`; otherwise it would block the queue for ever."""
    rep, req = world.reps[r], world.reqs[i]
    return blocks_of(rep, req.prompt + req.output - rep.first_step) <= rep.blocks


@compiled
def route(world: World, time: float, cls: int, u: float, routing: Routing) -> int:
    """The replica for one request."""
    which = cls
    if len(routing.fractions) > 0 and routing.cyclic:
        which = next_pool(routing.fractions[cls], routing.sent[cls])
    elif len(routing.fractions) > 0:
        which, u = draw_pool(routing.fractions[cls], u)
    members = routing.members[routing.bounds[which] : routing.bounds[which + 1]]
    if len(routing.drawn) > 0:
        draw(members, u, routing.drawn)
        members = routing.drawn
    if not routing.dependent:
        return least_recent(members, routing.last)
    for r in members:
        advance(world, r, time)
    return smallest(world.reps, members, routing.weights, routing.last, time)


@compiled
def draw_pool(fractions: Floats, u: float) -> tuple[int, float]:
    """The pool by inversion of the fractions, and what is left of the random number."""
    pool = 0
    start = 0.0
    below = 0.0
    for j in range(len(fractions)):
        if fractions[j] > 0:
            pool = j
            start = below
            below += fractions[j]
            if u < below:
                break
    return pool, min(max((u - start) / fractions[pool], 0.0), 1.0)


@compiled
def next_pool(fractions: Floats, sent: Ints) -> int:
    """The pool with the largest deficit, in whole requests, behind its fraction."""
    total = 1
    for count in sent:
        total += count
    pool = 0
    for j in range(1, len(sent)):
        if fractions[j] * total - sent[j] > fractions[pool] * total - sent[pool]:
            pool = j
    sent[pool] += 1
    return pool


@compiled
def draw(members: Ints, u: float, drawn: Ints) -> None:
    """Fill `drawn` with members drawn with replacement from the digits of `u`."""
    for d in range(len(drawn)):
        k = min(int(u * len(members)), len(members) - 1)
        u = u * len(members) - k
        drawn[d] = members[k]


@compiled
def least_recent(members: Ints, last: Ints) -> int:
    """The member chosen least recently, the first of them if several never were."""
    best = members[0]
    for r in members[1:]:
        if last[r] < last[best] or (last[r] == last[best] and r < best):
            best = r
    return best


@compiled
def smallest(reps: Table, members: Ints, weights: Floats, last: Ints, time: float) -> int:
    """The member with the smallest score; ties go to the one chosen least recently, then to the first."""
    best = members[0]
    lowest = score(reps[best], weights, time)
    for r in members[1:]:
        value = score(reps[r], weights, time)
        if value < lowest or (value == lowest and (last[r] < last[best] or (last[r] == last[best] and r < best))):
            best = r
            lowest = value
    return best


@compiled
def score(rep: Any, weights: Floats, time: float) -> float:
    """Weighted sum of the state features."""
    w = weights[rep.pool]
    waiting, running, kv_tokens, outstanding = observe(rep, time)
    return w[0] * waiting + w[1] * running + w[2] * kv_tokens + w[3] * outstanding


@compiled
def observe(rep: Any, time: float) -> tuple[int, int, int, int]:
    """The state features at `time`, which is before the clock while a step is under way."""
    if time < rep.clock or rep.pending >= 0.0:
        return rep.seen_waiting, rep.seen_running, rep.seen_used * rep.block, rep.seen_outstanding
    return rep.waiting, rep.running, rep.used * rep.block, rep.outstanding


@compiled
def look(world: World, time: float, seen: Ints) -> None:
    """Advance every replica to `time` and write its state features to `seen`, shape (n_replicas, 4)."""
    for r in range(len(world.reps)):
        advance(world, r, time)
        seen[r, 0], seen[r, 1], seen[r, 2], seen[r, 3] = observe(world.reps[r], time)
