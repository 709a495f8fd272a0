# mypy: disable-error-code="no-any-return"
"""Preemption: who leaves the batch when memory runs out, and what it keeps (compiled); see docs/simulator.md."""

from __future__ import annotations

import math
from typing import Any

from llmopt.evaluate.kernel_admit import demand
from llmopt.evaluate.kernel_cache import leave_blocks
from llmopt.evaluate.kernel_glide import blocks_of, held_by, peak_of, stop_gliding
from llmopt.evaluate.kernel_hold import deepest
from llmopt.evaluate.kernel_lists import leave_batch, leave_singles
from llmopt.evaluate.kernel_queue import rejoin_queue
from llmopt.evaluate.kernel_types import (
    ALL,
    ARRIVAL,
    BY_LEVEL,
    EACH,
    LEAST,
    LOOKAHEAD,
    NONE,
    PATIENCE,
    PREDICTED,
    RESERVE,
    RESTART,
    SWAP,
    YOUNGEST,
    World,
    compiled,
)

GOLDEN = 0.6180339887498949
"""Multiples of it, added to a random number, have fractional parts that spread evenly: one draw per round."""


@compiled
def make_room(world: World, rep: Any) -> None:
    """Preempt until the running requests that are left have the blocks for this step.

    The youngest are the last of the list, so that it does not matter how far down the list the shortage is found out.
    Other victims may have taken tokens and blocks already, which they give back.
    """
    if rep.victims == YOUNGEST:
        while rep.need > rep.blocks - rep.used - rep.late_blocks:
            preempt(world, rep, rep.batch_tail)
        return
    rep.need = 0
    left = rep.budget
    i = rep.batch_head
    while i != NONE:
        req, runs, preemptions = world.reqs[i], rep.running, world.reqs[i].preemptions
        req.taken = min(demand(rep, req), left)
        more = growth_of(rep, req)
        while req.preemptions == preemptions and rep.need + more > rep.blocks - rep.used:
            left += strike(world, rep)
        if req.preemptions == preemptions:
            rep.need += more
            left -= req.taken
            world.terms[i].served = rep.steps + 1
        i = req.next if rep.running == runs else first_unserved(world, rep)


@compiled
def growth_of(rep: Any, req: Any) -> int:
    """Blocks that a running request needs for its tokens of this step."""
    if rep.mode == RESERVE:
        return 0
    if req.gliding:
        return 1 if (req.offset + rep.slots + rep.steps) % rep.block == 0 else 0
    return blocks_of(rep, req.computed + req.taken) - blocks_of(rep, req.computed)


@compiled
def first_unserved(world: World, rep: Any) -> int:
    """The first running request that has no tokens of this step yet, NONE if all have."""
    i = rep.batch_head
    while i != NONE and world.terms[i].served == rep.steps + 1:
        i = world.reqs[i].next
    return i


@compiled
def strike(world: World, rep: Any) -> int:
    """Preempt once by the rule; returns the tokens of this step that are given back."""
    if rep.gating == BY_LEVEL:
        return evict(world, rep, deepest(world, rep))
    if rep.victims == YOUNGEST:
        return evict(world, rep, rep.batch_tail)
    if rep.victims != ALL and rep.victims != EACH:
        return evict(world, rep, chosen(world, rep))
    rep.rounds += 1
    tokens = 0
    i = rep.batch_tail
    while i != NONE:
        before = world.reqs[i].prev
        x = world.terms[i].u + rep.rounds * GOLDEN
        if rep.victims == ALL or x - math.floor(x) < rep.clearing:
            tokens += evict(world, rep, i)
        i = before
    return tokens


@compiled
def chosen(world: World, rep: Any) -> int:
    """The running request that is last in the order of the queue, or that has the least believed output."""
    best = rep.batch_head
    sign = 1.0 if rep.victims == LEAST else -1.0
    lowest = math.inf
    i = rep.batch_head
    while i != NONE:
        value = sign * (believed_of(world, rep, i) if rep.victims == LEAST else next_key(world, rep, i))
        if value < lowest or (value == lowest and sign * i < sign * best):
            best = i
            lowest = value
        i = world.reqs[i].next
    return best


@compiled
def next_key(world: World, rep: Any, i: int) -> float:
    """The key that a running request would rejoin the queue with; in order of arrival the same for all."""
    if rep.order == ARRIVAL:
        return 0.0
    return float(believed_of(world, rep, i)) if rep.order == PREDICTED else world.terms[i].key


@compiled
def believed_of(world: World, rep: Any, i: int) -> int:
    """Believed output of a running request, at least one token more than it has emitted."""
    req = world.reqs[i]
    emitted = req.output - req.due + rep.steps if req.gliding else req.emitted
    return max(world.terms[i].believed, emitted + 1)


@compiled
def evict(world: World, rep: Any, i: int) -> int:
    """Preempt while the running requests take their tokens; returns those that `i` gives back."""
    req, term = world.reqs[i], world.terms[i]
    served = term.served == rep.steps + 1
    tokens = req.taken if served else 0
    if served:
        # the blocks for this step were taken from the front of the free ones and go back behind the last
        rep.pushed += growth_of(rep, req)
    else:
        rep.need += growth_of(rep, req)
    term.served = 0
    preempt(world, rep, i)
    return tokens


@compiled
def preempt(world: World, rep: Any, i: int) -> None:
    """Move a running request to the queue, in a step that is being scheduled and counts its new blocks in `need`."""
    req = world.reqs[i]
    rep.need -= growth_of(rep, req)
    if req.gliding:
        stop_gliding(world, rep, i)
    else:
        leave_singles(world, rep, i)
        rep.single_kv -= req.computed
    leave_batch(world, rep, i)
    if rep.mode == LOOKAHEAD:
        rep.peaks -= peak_of(world, rep, i)
    blocks = held_by(rep, req, req.computed)
    rep.used -= blocks
    rep.pushed += blocks
    if rep.caching:
        leave_blocks(world, rep, i)
    if rep.ruled:
        world.terms[i].believed = max(world.terms[i].believed, req.emitted + 1)
    rejoin_queue(world, rep, i)
    rep.retry = 0
    req.preemptions += 1
    rep.preemptions += 1
    if rep.overflow != SWAP:
        forget(rep, req)
    if req.preemptions >= PATIENCE:
        # this ends the run: no step starts after the end of time
        rep.stuck = i
        rep.clock = math.inf


@compiled
def forget(rep: Any, req: Any) -> None:
    """Back to prefill: of its output too under restart, else of the tokens it has emitted."""
    rep.outstanding += req.computed if req.prefilling else req.prompt + req.emitted
    if rep.overflow == RESTART:
        rep.wasted += req.area
        req.emitted = 0
        req.prefilled = 0
    elif req.prefilling:
        rep.wasted += req.area
    req.computed = 0
    req.area = 0
    req.target = req.prompt + req.emitted
    req.prefilling = 1
