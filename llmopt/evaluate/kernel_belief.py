# mypy: disable-error-code="no-any-return"
"""Believed ends of the gliding requests, where beliefs may err (compiled); see docs/simulator.md, "Batching rules".

A second ring holds the gliding requests by the step count at which they will have emitted what is believed. Those that
outlive it are believed to end with the next step, whichever that is; sums over them say what they hold. The ring is
swept when it is used, so that jumps over many steps need not know of it.
"""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_lists import next_due
from llmopt.evaluate.kernel_types import NONE, WORD, World, compiled


@compiled
def output_of(world: World, rep: Any, i: int) -> int:
    """Output tokens that a request is believed to emit, at least one more than it has."""
    if rep.guess:
        return max(world.terms[i].believed, world.reqs[i].emitted + 1)
    return world.reqs[i].output


@compiled
def believed_due(world: World, i: int) -> int:
    """Step count at which a gliding request will have emitted what is believed."""
    return world.reqs[i].due - world.reqs[i].output + world.terms[i].believed


@compiled
def join_believed(world: World, rep: Any, i: int) -> None:
    """Put a request that starts to glide into the ring, or among those that outlived their belief."""
    sweep(world, rep)
    terms = world.terms
    due = believed_due(world, i)
    if due <= rep.steps:
        outlive(world, rep, i)
        return
    slot = due & rep.near_mask
    head = world.ring[rep.near_ring + slot]
    terms[i].outlived = 0
    terms[i].near_prev = NONE
    terms[i].near_next = head
    if head == NONE:
        world.bits[rep.near_bits + slot // WORD] |= 1 << (slot % WORD)
    else:
        terms[head].near_prev = i
    world.ring[rep.near_ring + slot] = i


@compiled
def leave_believed(world: World, rep: Any, i: int) -> None:
    """Undo `join_believed`."""
    term = world.terms[i]
    if term.outlived:
        tokens = world.reqs[i].offset + rep.slots
        rep.spent -= 1
        rep.spent_tokens -= tokens
        world.classes[rep.spent_classes + tokens % rep.block] -= 1
        return
    before, after = term.near_prev, term.near_next
    if after != NONE:
        world.terms[after].near_prev = before
    if before != NONE:
        world.terms[before].near_next = after
        return
    slot = believed_due(world, i) & rep.near_mask
    world.ring[rep.near_ring + slot] = after
    if after == NONE:
        world.bits[rep.near_bits + slot // WORD] ^= 1 << (slot % WORD)


@compiled
def outlive(world: World, rep: Any, i: int) -> None:
    """Count a gliding request among those that outlived their belief."""
    tokens = world.reqs[i].offset + rep.slots
    world.terms[i].outlived = 1
    rep.spent += 1
    rep.spent_tokens += tokens
    world.classes[rep.spent_classes + tokens % rep.block] += 1


@compiled
def sweep(world: World, rep: Any) -> None:
    """Take out of the ring whoever has emitted what was believed."""
    due = next_due(world, rep.near_bits, rep.near_mask, rep.swept)
    while due <= rep.steps:
        slot = due & rep.near_mask
        i = world.ring[rep.near_ring + slot]
        world.ring[rep.near_ring + slot] = NONE
        world.bits[rep.near_bits + slot // WORD] ^= 1 << (slot % WORD)
        while i != NONE:
            outlive(world, rep, i)
            i = world.terms[i].near_next
        due = next_due(world, rep.near_bits, rep.near_mask, due)
    rep.swept = rep.steps
