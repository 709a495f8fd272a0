# mypy: disable-error-code="no-any-return"
"""Gliding requests and jumps over the steps in which nothing but decoding happens (compiled)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.kernel_belief import join_believed, leave_believed
from llmopt.evaluate.kernel_lists import join_bucket, leave_batch, leave_bucket, next_due, take_bucket
from llmopt.evaluate.kernel_table import table_stretch, unmeasured
from llmopt.evaluate.kernel_types import COEFFICIENTS, LOOKAHEAD, NEVER, NONE, RESERVE, World, compiled, inlined


@compiled
def blocks_of(rep: Any, tokens: int) -> int:
    """Blocks of a request with `tokens` computed tokens."""
    return (tokens + rep.slots + rep.block - 1) // rep.block


@compiled
def held_by(rep: Any, req: Any, tokens: int) -> int:
    """Blocks of a running request: for all its tokens under peak reservation, else for `tokens`."""
    if rep.mode == RESERVE:
        return blocks_of(rep, req.prompt + req.output - rep.first_step)
    return blocks_of(rep, tokens)


@compiled
def peak_of(world: World, rep: Any, i: int) -> int:
    """Blocks of a request at its end, as believed when it was admitted."""
    req = world.reqs[i]
    output = world.terms[i].believed if rep.guess else req.output
    return blocks_of(rep, req.prompt + output - rep.first_step)


@compiled
def give_back(rep: Any, blocks: int) -> None:
    """Free the blocks of a request that has ended; a schedule formed ahead does not know of it yet."""
    rep.used -= blocks
    if rep.ahead:
        rep.late_blocks += blocks
        rep.late_slots += 1
    else:
        rep.pushed += blocks


@compiled
def catch_up(rep: Any) -> None:
    """Let the next schedule know what has ended and arrived up to now."""
    if rep.late_slots > 0:
        rep.pushed += rep.late_blocks
        rep.late_blocks = 0
        rep.late_slots = 0
        rep.retry = 0
    rep.fresh = 0


@compiled
def start_gliding(world: World, rep: Any, i: int) -> None:
    """Let a decode request glide; its area becomes what must be added to c(c + 1)/2 at c computed tokens."""
    req = world.reqs[i]
    req.gliding = 1
    req.offset = req.computed - rep.steps
    req.due = rep.steps + req.output - req.emitted
    req.area -= req.computed * (req.computed + 1) // 2
    world.classes[rep.classes + (req.offset + rep.slots) % rep.block] += 1
    join_bucket(world, rep, i)
    rep.gliding += 1
    rep.kv += req.computed
    rep.due = min(rep.due, req.due)
    if rep.guess:
        join_believed(world, rep, i)


@compiled
def stop_gliding(world: World, rep: Any, i: int) -> None:
    """Undo `start_gliding`."""
    req = world.reqs[i]
    if rep.guess:
        leave_believed(world, rep, i)
    leave_bucket(world, rep, i)
    world.classes[rep.classes + (req.offset + rep.slots) % rep.block] -= 1
    req.computed = req.offset + rep.steps
    req.emitted = req.output - req.due + rep.steps
    req.area += req.computed * (req.computed + 1) // 2
    req.gliding = 0
    rep.gliding -= 1
    rep.kv -= req.computed


@inlined
def finish_due(world: World, rep: Any) -> None:
    """Let the gliding requests leave that have emitted their last token at the clock."""
    reqs = world.reqs
    i = take_bucket(world, rep, rep.steps)
    if i == NONE:
        return
    if rep.retry == NEVER:
        rep.retry = 0
    while i != NONE:
        req = reqs[i]
        if rep.guess:
            leave_believed(world, rep, i)
        req.finish = rep.clock
        computed = req.offset + rep.steps
        world.classes[rep.classes + (req.offset + rep.slots) % rep.block] -= 1
        rep.gliding -= 1
        rep.kv -= computed
        if rep.mode == LOOKAHEAD:
            rep.peaks -= peak_of(world, rep, i)
        give_back(rep, held_by(rep, req, computed))
        leave_batch(world, rep, i)
        i = req.link_next
    if rep.guess or rep.running == 0:
        # what was believed to go on has ended; what must be kept free beside others may be used when alone
        rep.retry = 0


@inlined
def show(rep: Any, outstanding: int) -> None:
    """Keep what routers see until the step that is about to end has ended."""
    rep.seen_waiting = rep.waiting
    rep.seen_running = rep.running
    rep.seen_used = rep.used
    rep.seen_outstanding = outstanding


@inlined
def glide(world: World, rep: Any, until: float) -> int:
    """Make at once all steps that start before `until`, up to the first in which a request ends or memory runs out.

    All running requests glide. Returns the number of steps made.
    """
    if rep.due <= rep.steps:
        rep.due = next_due(world, rep.bits, rep.mask, rep.steps)
    most = rep.due - rep.steps
    if rep.waiting > 0:
        most = min(most, rep.retry - rep.steps)
        if most <= 0 or rep.wake <= rep.clock:
            return 0
        until = min(until, rep.wake)
    if rep.late_slots + rep.fresh > 0:
        # nobody can be admitted before `retry`: what the next schedule does not know matters only if memory runs out
        if rep.used + rep.late_blocks + rep.gliding > rep.blocks:
            return 0
        catch_up(rep)
    steps, seconds, held_time = coast(world.costs, rep, most, until)
    if rep.clock + seconds > rep.halt:
        if steps == 1:
            return 0
        steps, seconds, held_time = coast(world.costs, rep, steps - 1, np.inf)
    if rep.mode != RESERVE:
        room = growth(world, rep, steps)
        if room == 0:
            return 0
        if room < steps:
            steps, seconds, held_time = coast(world.costs, rep, room, np.inf)
    gliding = rep.gliding
    tokens = steps * gliding
    rep.held += steps * rep.kv + gliding * (steps * (steps + 1) // 2)
    rep.held_time += held_time
    rep.busy += seconds
    rep.clock += seconds
    if rep.table != NONE:
        rep.extrapolated += unmeasured(world.costs, rep, steps)
    rep.steps += steps
    rep.decode_tokens += tokens
    rep.outstanding -= tokens
    rep.kv += tokens
    if rep.kv > rep.peak:
        rep.peak = rep.kv
    show(rep, rep.outstanding + gliding)
    if rep.steps == rep.due:
        finish_due(world, rep)
    return steps


@inlined
def growth(world: World, rep: Any, steps: int) -> int:
    """Allocate the blocks of up to `steps` decode steps; returns for how many steps they suffice."""
    free = rep.blocks - rep.used
    block = rep.block
    turns = min(steps // block, free // rep.gliding)
    free -= turns * rep.gliding
    made = turns * block
    first = rep.classes
    k = first + -(rep.steps + made) % block
    while made < steps:
        more = world.classes[k]
        if more > free:
            break
        free -= more
        made += 1
        k = k - 1 if k > first else first + block - 1
    rep.used = rep.blocks - free
    return made


@inlined
def sum_steps(costs: Floats, rep: Any, most: int, until: float, measured: bool) -> tuple[int, float, float]:
    """Sum the step times of up to `most` decode steps that start before `until`.

    With D gliding requests that read K tokens, step j takes max_i (a_i + d_i D + k_i (K + j D)): piece by piece of
    this upper envelope the sums are closed forms, and likewise between two knots of a table's context. Returns steps,
    seconds, and token-seconds of KV memory in use.
    """
    gliding = rep.gliding
    made = 0
    seconds = 0.0
    held_time = 0.0
    while made < most:
        kv = float(rep.kv + made * gliding)
        if measured:
            base, slope, length = table_stretch(costs, rep, kv, most - made)
        else:
            base, slope, length = steepest(costs, rep, kv, most - made)
        start = rep.clock + seconds
        span = stretch(base, slope, length)
        if start + span >= until:
            length = steps_until(base, slope, length, start, until)
            span = stretch(base, slope, length)
            most = made + length
        # step j uses kv + (j + 1) D tokens for base + j slope seconds
        first = length * (length - 1.0) / 2.0
        second = first * (2.0 * length - 1.0) / 3.0
        seconds += span
        held_time += (kv + gliding) * span + gliding * (first * base + second * slope)
        made += length
    return made, seconds, held_time


@inlined
def coast(costs: Floats, rep: Any, most: int, until: float) -> tuple[int, float, float]:
    """As `sum_steps`, with or without a table."""
    if rep.table != NONE:
        return coast_on_table(costs, rep, most, until)
    return sum_steps(costs, rep, most, until, False)


@compiled
def coast_on_table(costs: Floats, rep: Any, most: int, until: float) -> tuple[int, float, float]:
    """As `sum_steps`; a function of its own because in one loop with it pools without a table are a tenth slower."""
    return sum_steps(costs, rep, most, until, True)


@compiled
def stretch(base: float, slope: float, steps: int) -> float:
    """Seconds of `steps` steps that take base, base + slope, base + 2 slope, ..."""
    return steps * base + slope * (steps * (steps - 1.0) / 2.0)


@inlined
def steepest(costs: Floats, rep: Any, kv: float, most: int) -> tuple[float, float, int]:
    """The longest piece when `kv` tokens are read: its step time, its slope, and for how many steps it stays so."""
    gliding = rep.gliding
    base = -1.0
    slope = 0.0
    for k in range(rep.piece, rep.piece + COEFFICIENTS * rep.pieces, COEFFICIENTS):
        value = costs[k] + costs[k + 2] * gliding + costs[k + 3] * kv
        if value > base or (value == base and costs[k + 3] * gliding > slope):
            base = value
            slope = costs[k + 3] * gliding
    if rep.pieces == 1:
        return base, slope, most
    length = most
    for k in range(rep.piece, rep.piece + COEFFICIENTS * rep.pieces, COEFFICIENTS):
        rise = costs[k + 3] * gliding - slope
        if rise > 0.0:
            gap = base - costs[k] - costs[k + 2] * gliding - costs[k + 3] * kv
            if gap < rise * length:
                length = max(1, math.ceil(gap / rise))
    return base, slope, length


@inlined
def steps_until(base: float, slope: float, most: int, clock: float, until: float) -> int:
    """The smallest number of steps, at least 1 and at most `most`, that end at `until` or later."""
    room = until - clock
    low = base - slope / 2.0
    root = low + math.sqrt(max(low * low + 2.0 * slope * room, 0.0))
    steps = max(1, math.ceil(min(2.0 * room / root, most))) if root > 0.0 else most
    while steps < most and clock + stretch(base, slope, steps) < until:
        steps += 1
    while steps > 1 and clock + stretch(base, slope, steps - 1) >= until:
        steps -= 1
    return steps
