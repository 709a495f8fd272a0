# mypy: disable-error-code="no-any-return"
"""Look-ahead admission: would the batch and one more request fit at every later step (compiled)."""

from __future__ import annotations

from typing import Any

from llmopt.arrays import Ints
from llmopt.evaluate.kernel_glide import blocks_of
from llmopt.evaluate.kernel_lists import next_due
from llmopt.evaluate.kernel_types import NEVER, NONE, World, compiled


@compiled
def steps_to_wait(world: World, rep: Any, i: int) -> int:
    """0 if candidate `i` fits to the end, else a number of steps before which it cannot fit.

    Memory in use grows between two ends, so it is enough to look at the steps in which some request ends, and at the
    next one if blocks are freed too late for it.
    """
    reqs = world.reqs
    classes = world.scratch
    for k in range(rep.block):
        classes[k] = world.classes[rep.classes + k]
    active = rep.gliding
    total = rep.kv + (rep.slots - rep.steps) * active
    t = rep.steps
    if rep.late_blocks > 0:
        room = rep.blocks - rep.late_blocks - singles_at(world, rep, t + 1)
        if room - gliders_at(classes, rep.block, active, total, t + 1) < candidate_at(rep, reqs[i], t + 1):
            return 1
    while True:
        due = next_due(world, rep, t) if active > 0 else NEVER
        t = min(due, next_single_end(world, rep, i, t))
        if t == NEVER:
            return 0
        room = rep.blocks - singles_at(world, rep, t) - gliders_at(classes, rep.block, active, total, t)
        if room < candidate_at(rep, reqs[i], t):
            return delay(rep, reqs[i], t, room)
        if t == due:
            k = world.ring[rep.ring + (t & rep.mask)]
            while k != NONE:
                active -= 1
                total -= reqs[k].offset + rep.slots
                classes[(reqs[k].offset + rep.slots) % rep.block] -= 1
                k = reqs[k].link_next


@compiled
def gliders_at(classes: Ints, block: int, active: int, total: int, t: int) -> int:
    """Blocks of the gliding requests still there at step count `t`: the sum of ceil((offset + slots + t) / block)."""
    tokens = total + active * t
    if block == 1:
        return tokens
    for k in range(block):
        tokens += classes[k] * (-(k + t) % block)
    return tokens // block


@compiled
def filling_steps(rep: Any, req: Any) -> int:
    """Steps of its prefill after this one, each a whole chunk."""
    return (req.target - req.computed - req.taken + rep.chunk - 1) // rep.chunk if req.prefilling else 0


@compiled
def end_of(rep: Any, req: Any) -> int:
    """Step count at which a single request will have ended."""
    after = rep.steps + req.output - req.emitted
    if req.prefilling:
        return after + 1 + filling_steps(rep, req) - rep.first_step
    return after


@compiled
def candidate_at(rep: Any, req: Any, t: int) -> int:
    """Blocks of a single request at step count `t`."""
    if t > end_of(rep, req):
        return 0
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
        total += candidate_at(rep, world.reqs[k], t)
        k = world.reqs[k].link_next
    return total


@compiled
def next_single_end(world: World, rep: Any, candidate: int, t: int) -> int:
    """The first end above `t` of a single request or the candidate, NEVER if there is none."""
    first = NEVER
    end = end_of(rep, world.reqs[candidate])
    if end > t:
        first = end
    k = rep.single_head
    while k != NONE:
        end = end_of(rep, world.reqs[k])
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
