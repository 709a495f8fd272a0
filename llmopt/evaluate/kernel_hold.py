# mypy: disable-error-code="no-any-return"
"""Thresholds and levels: who is held back until enough of a kind are together, and who sinks (compiled).

A replica's numbers, in `classes` from `gates` on, are five rows: the counts; in each step, how many of each class or
segment may still move; whether it is open; how many requests of each class wait; and the marks, which are numbers of
output tokens: the edges between segments, or where a request sinks to the next level.
"""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_types import BY_CLASS, BY_LEVEL, BY_STAGE, NEVER, NONE, World, compiled


@compiled
def rank(world: World, rep: Any, emitted: int) -> int:
    """Number of the segment or level, from 0 on, of a request that has emitted so many tokens."""
    first = rep.gates + 4 * rep.counts
    k = 0
    while k < rep.marks and world.classes[first + k] <= emitted:
        k += 1
    return k


@compiled
def at_first_stage(world: World, rep: Any, k: int, emitted: int) -> bool:
    """Whether a decode request of segment k has just entered it; the first segment is entered from the queue."""
    return k > 0 and world.classes[rep.gates + 4 * rep.counts + k - 1] == emitted


@compiled
def count_in(world: World, rep: Any, i: int, more: int) -> None:
    """Count a request that joins the waiting ones of its class, or (-1) leaves them."""
    if rep.gating == BY_CLASS:
        world.classes[rep.gates + 3 * rep.counts + world.terms[i].cls] += more


@compiled
def open_gates(world: World, rep: Any) -> None:
    """Decide which classes or segments move in the step that starts."""
    gates, n = world.classes, rep.counts
    room, is_open, waits = rep.gates + n, rep.gates + 2 * n, rep.gates + 3 * n
    if rep.gating == BY_STAGE:
        count_stages(world, rep)
    before = True
    for k in range(n):
        count = gates[rep.gates + k]
        ready = gates[waits + k] >= count and (before or rep.gating == BY_CLASS)
        before = ready
        gates[is_open + k] = 1 if ready or rep.flush else 0
        gates[room + k] = NEVER if rep.flush else count if ready else 0


@compiled
def count_stages(world: World, rep: Any) -> None:
    """Count the requests that wait before each segment: in the queue before the first, else at its first stage."""
    gates, n = world.classes, rep.counts
    waits = rep.gates + 3 * n
    gates[waits] = rep.waiting
    for k in range(1, n):
        gates[waits + k] = 0
    i = rep.single_head
    while i != NONE:
        req = world.reqs[i]
        if not req.prefilling:
            k = rank(world, rep, req.emitted)
            if at_first_stage(world, rep, k, req.emitted):
                gates[waits + k] += 1
        i = req.link_next


@compiled
def moves(world: World, rep: Any, i: int) -> bool:
    """Whether running request `i` may have tokens; asked once per request and step, in the order of the batch."""
    req = world.reqs[i]
    is_open = rep.gates + 2 * rep.counts
    if rep.gating == BY_CLASS:
        return world.classes[is_open + world.terms[i].cls] == 1
    if rep.gating == BY_LEVEL or req.prefilling:
        return True
    k = rank(world, rep, req.emitted)
    if at_first_stage(world, rep, k, req.emitted):
        return take_turn(world, rep, k)
    return world.classes[is_open + k] == 1


@compiled
def called(world: World, rep: Any, i: int) -> bool:
    """Whether waiting request `i` is tried; asked once per request and step, in the order of the queue."""
    if rep.gating == BY_LEVEL:
        # whoever was preempted in this very step waits for the next one
        return world.terms[i].served != rep.steps + 1
    return take_turn(world, rep, world.terms[i].cls if rep.gating == BY_CLASS else 0)


@compiled
def take_turn(world: World, rep: Any, k: int) -> bool:
    """Use one of the moves that are left to a class or segment in this step."""
    if world.classes[rep.gates + rep.counts + k] == 0:
        return False
    world.classes[rep.gates + rep.counts + k] -= 1
    return True


@compiled
def anybody_called(world: World, rep: Any) -> bool:
    """Whether any waiting request may still be tried."""
    if rep.gating == BY_LEVEL:
        return True
    left = 0
    for k in range(rep.counts if rep.gating == BY_CLASS else 1):
        left = max(left, world.classes[rep.gates + rep.counts + k])
    return left > 0


@compiled
def deepest(world: World, rep: Any) -> int:
    """The running request on the highest level, of several the last of the batch; NONE if nobody runs."""
    reqs = world.reqs
    found = rep.batch_tail
    highest = -1
    i = found
    while i != NONE:
        level = rank(world, rep, reqs[i].emitted)
        if level > highest:
            found = i
            highest = level
        i = reqs[i].prev
    return found
