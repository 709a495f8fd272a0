# mypy: disable-error-code="no-any-return"
"""Look-ahead admission: would the batch and one more request fit at every later step (compiled)."""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_belief import output_of, sweep
from llmopt.evaluate.kernel_glide import blocks_of, peak_of
from llmopt.evaluate.kernel_lists import next_due
from llmopt.evaluate.kernel_types import NEVER, NONE, World, compiled


@compiled
def steps_to_wait(world: World, rep: Any, i: int) -> int:
    """0 if candidate `i` fits to the end, as believed, else a number of steps before which it cannot fit.

    Memory in use grows between two ends, so it is enough to look at the steps in which some request ends, and at the
    next one if blocks are freed too late for it. What a schedule projects for a step count, every later one projects
    too, unless a request ends earlier than believed. NEVER stands for the next end: who does not fit into the next
    step beside requests that outlived their belief will not until one ends. If the batch alone is `sound`, nothing
    after the candidate's own end matters. If even the sum of all peaks fits, nothing does.
    """
    classes, own = world.classes, rep.scratch
    for k in range(rep.block):
        classes[own + k] = classes[rep.classes + k]
    blocks = rep.blocks - (rep.kept if rep.running > 0 else 0)
    if rep.running == 0:
        rep.sound = rep.steady
    last = end_of(world, rep, i) if rep.sound else NEVER - 1
    active = rep.gliding
    total = rep.kv + (rep.slots - rep.steps) * active
    t = rep.steps
    if rep.late_blocks > 0:
        room = blocks - rep.late_blocks - singles_at(world, rep, t + 1)
        if room - gliders_at(world, rep, active, total, t + 1) < candidate_at(world, rep, i, t + 1):
            return 1
    ring, mask, bits = rep.ring, rep.mask, rep.bits
    if rep.guess:
        sweep(world, rep)
        ring, mask, bits = rep.near_ring, rep.near_mask, rep.near_bits
        if rep.spent > 0:
            room = blocks - singles_at(world, rep, t + 1)
            if room - gliders_at(world, rep, active, total, t + 1) < candidate_at(world, rep, i, t + 1):
                return NEVER
            active -= rep.spent
            total -= rep.spent_tokens
            for k in range(rep.block):
                classes[own + k] -= classes[rep.spent_classes + k]
    # where nobody glides, singles that outlived their belief hold more than their peak
    if not (rep.guess and rep.stepwise) and rep.peaks + rep.late_blocks + peak_of(world, rep, i) <= blocks:
        return 0
    due = ends = t
    while True:
        if due <= t:
            due = next_due(world, bits, mask, t) if active > 0 else NEVER
        if ends <= t:
            ends = next_single_end(world, rep, i, t)
        t = min(due, ends)
        if t > last:
            return 0
        room = blocks - (singles_at(world, rep, t) if rep.single_head != NONE else 0)
        needed = candidate_at(world, rep, i, t)
        # the last block of everybody counted whole is an upper bound, and cheaper to tell
        if room < needed + (total + active * (t + rep.block - 1)) // rep.block:
            room -= gliders_at(world, rep, active, total, t)
            if room < needed:
                return delay(rep, world.reqs[i], t, room)
        if t == due:
            k = world.ring[ring + (t & mask)]
            while k != NONE:
                tokens = world.reqs[k].offset + rep.slots
                active -= 1
                total -= tokens
                classes[own + tokens % rep.block] -= 1
                k = world.terms[k].near_next if rep.guess else world.reqs[k].link_next


@compiled
def gliders_at(world: World, rep: Any, active: int, total: int, t: int) -> int:
    """Blocks of the gliding requests still there at step count `t`: the sum of ceil((offset + slots + t) / block)."""
    tokens = total + active * t
    if rep.block == 1:
        return tokens
    for k in range(rep.block):
        tokens += world.classes[rep.scratch + k] * (-(k + t) % rep.block)
    return tokens // rep.block


@compiled
def filling_steps(rep: Any, req: Any) -> int:
    """Steps of its prefill after this one, each a whole chunk."""
    return (req.target - req.computed - req.taken + rep.chunk - 1) // rep.chunk if req.prefilling else 0


@compiled
def end_of(world: World, rep: Any, i: int) -> int:
    """Step count at which a single request will have ended, as believed."""
    req = world.reqs[i]
    after = rep.steps + output_of(world, rep, i) - req.emitted
    if req.prefilling:
        return after + 1 + filling_steps(rep, req) - rep.first_step
    return after


@compiled
def candidate_at(world: World, rep: Any, i: int, t: int) -> int:
    """Blocks of a single request at step count `t`."""
    if t > end_of(world, rep, i):
        return 0
    req = world.reqs[i]
    later = t - rep.steps - 1
    filling = filling_steps(rep, req)
    tokens = req.computed + req.taken
    if filling > 0 and later <= filling:
        return blocks_of(rep, min(req.target, tokens + later * rep.chunk))
    return blocks_of(rep, (req.target if req.prefilling else tokens) + later - filling)


@compiled
def singles_at(world: World, rep: Any, t: int) -> int:
    """Blocks of all single requests at step count `t`."""
    total = 0
    k = rep.single_head
    while k != NONE:
        total += candidate_at(world, rep, k, t)
        k = world.reqs[k].link_next
    return total


@compiled
def next_single_end(world: World, rep: Any, candidate: int, t: int) -> int:
    """The first end above `t` of a single request or the candidate, NEVER if there is none."""
    first = NEVER
    end = end_of(world, rep, candidate)
    if end > t:
        first = end
    k = rep.single_head
    while k != NONE:
        end = end_of(world, rep, k)
        if t < end < first:
            first = end
        k = world.reqs[k].link_next
    return first


@compiled
def delay(rep: Any, req: Any, t: int, room: int) -> int:
    """How many steps later the candidate must start to need no more than `room` blocks at step count `t`."""
    later = t - rep.steps - 1
    tokens = room * rep.block - rep.slots
    fits = -1
    if tokens >= req.target:
        fits = tokens - req.target + filling_steps(rep, req)
    elif tokens >= req.taken:
        fits = (tokens - req.taken) // rep.chunk
    return max(1, later - fits)
