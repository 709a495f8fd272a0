# mypy: disable-error-code="no-any-return"
"""One engine step of one replica, and the loop that advances a replica in time (compiled); see docs/simulator.md."""

from __future__ import annotations

import math
from typing import Any

from llmopt.evaluate.kernel_admit import admit_by_rule, demand, enter, refused_until
from llmopt.evaluate.kernel_glide import (
    blocks_of,
    catch_up,
    finish_due,
    give_back,
    glide,
    held_by,
    peak_of,
    show,
    start_gliding,
)
from llmopt.evaluate.kernel_lists import leave_batch, leave_singles, unqueue
from llmopt.evaluate.kernel_mix import plan_step
from llmopt.evaluate.kernel_queue import join_queue
from llmopt.evaluate.kernel_table import read_table
from llmopt.evaluate.kernel_types import COEFFICIENTS, LOOKAHEAD, NEVER, NONE, RESERVE, World, compiled, inlined
from llmopt.evaluate.kernel_victims import make_room


@compiled
def advance(world: World, r: int, until: float) -> None:
    """Make every step of replica `r` that starts before `until`."""
    rep = world.reps[r]
    if rep.pending >= 0.0 and not complete_pending(world, rep):
        return
    while rep.clock < until and rep.waiting + rep.running > 0:
        if rep.single_head != NONE or rep.gliding == 0 or glide(world, rep, until) == 0:
            if rep.stepwise:
                if plan_step(world, rep):
                    # all are held back until somebody arrives
                    rep.clock = until
                    return
            else:
                schedule(world, rep)
            if rep.ahead:
                catch_up(rep)
            if rep.running == 0:
                # schedule again: with what is known now instead of one step ago, or after all have been preempted, or
                # when a waiting request is released
                if rep.wake < math.inf and rep.retry > rep.steps:
                    if rep.wake >= until:
                        return
                    rep.clock = max(rep.clock, rep.wake)
                continue
            seconds = duration(world, rep)
            show(rep, rep.outstanding)
            if rep.clock + seconds > rep.halt:
                rep.pending = seconds
                return
            complete(world, rep, seconds)


@compiled
def arrive(world: World, r: int, i: int, time: float) -> None:
    """Hand request `i` to replica `r`, which has been advanced to `time`."""
    rep, req = world.reps[r], world.reqs[i]
    if rep.running == 0:
        rep.clock = max(rep.clock, time)
    if rep.waiting == 0:
        rep.retry = 0
    req.replica = r
    req.queued = rep.clock + max(rep.pending, 0.0)
    rep.fresh += rep.ahead
    join_queue(world, rep, i)
    rep.seen_waiting += 1
    rep.outstanding += req.prompt + req.output
    rep.seen_outstanding += req.prompt + req.output


@inlined
def schedule(world: World, rep: Any) -> None:
    """Form the batch of the step that starts at the clock."""
    rep.need = world.classes[rep.classes + -rep.steps % rep.block] if rep.mode != RESERVE else 0
    left = allot(world, rep)
    if rep.mode != RESERVE:
        i = rep.single_head
        while i != NONE:
            req = world.reqs[i]
            rep.need += blocks_of(rep, req.computed + req.taken) - blocks_of(rep, req.computed)
            i = req.link_next
    preempted = rep.need > rep.blocks - rep.used - rep.late_blocks
    if preempted:
        make_room(world, rep)
    rep.used += rep.need
    if not preempted and rep.waiting > rep.fresh and (rep.steps >= rep.retry or rep.clock >= rep.wake):
        admit(world, rep, left)


@inlined
def allot(world: World, rep: Any) -> int:
    """Give the running requests their tokens of this step; returns what is left of the budget.

    Demands never grow and each was met when the next request was admitted, so the budget can only cut the last one.
    """
    reqs = world.reqs
    left = rep.budget - rep.gliding
    i = rep.single_head
    while i != NONE:
        req = reqs[i]
        req.taken = demand(rep, req)
        left -= req.taken
        i = req.link_next
    if left < 0:
        reqs[rep.single_tail].taken += left
        return 0
    return left


@inlined
def admit(world: World, rep: Any, left: int) -> None:
    """Admit from the head of the queue while budget, batch slots and memory allow."""
    if rep.heap:
        admit_by_rule(world, rep, left)
        return
    while rep.waiting > rep.fresh:
        if rep.running + rep.late_slots >= rep.max_batch:
            rep.retry = NEVER
            return
        if left == 0:
            rep.retry = NEVER if rep.single_head == NONE else rep.steps + 1
            return
        i = rep.queue_head
        req = world.reqs[i]
        req.taken = min(demand(rep, req), left)
        refused = refused_until(world, rep, i)
        if refused > 0:
            rep.retry = refused
            return
        unqueue(world, rep)
        left -= enter(world, rep, i, left)


@inlined
def duration(world: World, rep: Any) -> float:
    """Step time of the scheduled batch, s."""
    rep.prefill = 0
    rep.decode = rep.gliding
    kv = rep.kv
    pairs = 0.0
    i = rep.single_head
    while i != NONE:
        req = world.reqs[i]
        if req.prefilling:
            rep.prefill += req.taken
            pairs += req.taken * (req.computed + 0.5 * req.taken)
        else:
            rep.decode += req.taken
            kv += req.taken * req.computed
        i = req.link_next
    if rep.table != NONE:
        return read_table(world.costs, rep, float(kv), pairs)
    longest = 0.0
    p = world.costs
    for k in range(rep.piece, rep.piece + COEFFICIENTS * rep.pieces, COEFFICIENTS):
        seconds = p[k] + p[k + 1] * rep.prefill + p[k + 2] * rep.decode + p[k + 3] * kv + p[k + 4] * pairs
        longest = max(longest, seconds)
    return longest


@compiled
def complete_pending(world: World, rep: Any) -> bool:
    """End the step that was left under way, if it may end by now."""
    if rep.clock + rep.pending > rep.halt:
        return False
    seconds = rep.pending
    rep.pending = -1.0
    complete(world, rep, seconds)
    return True


@inlined
def complete(world: World, rep: Any, seconds: float) -> None:
    """End the scheduled step."""
    rep.clock += seconds
    rep.steps += 1
    rep.busy += seconds
    rep.prefill_tokens += rep.prefill
    rep.decode_tokens += rep.decode
    tokens = rep.prefill + rep.decode
    use = rep.kv + rep.single_kv + tokens
    rep.outstanding -= tokens
    rep.held += use
    rep.held_time += use * seconds
    rep.peak = max(rep.peak, use)
    rep.single_kv += tokens - rep.gliding
    rep.kv += rep.gliding
    i = rep.single_head
    while i != NONE:
        after = world.reqs[i].link_next
        step_single(world, rep, i)
        i = after
    finish_due(world, rep)


@inlined
def step_single(world: World, rep: Any, i: int) -> None:
    """What the step did to a single request."""
    req = world.reqs[i]
    req.computed += req.taken
    req.area += req.computed
    if req.prefilling:
        if req.computed < req.target:
            return
        if req.prefilled:
            rep.wasted += req.area - rep.first_step * req.computed
        req.prefilling = 0
        req.prefilled = 1
        req.emitted += rep.first_step
        rep.outstanding -= rep.first_step
    else:
        req.emitted += req.taken
    if req.emitted == 0:
        # first_token = "decode": the next step is looked at too, because it times the first token
        return
    if math.isnan(req.first_token):
        req.first_token = rep.clock
    if rep.stepwise and req.emitted < req.output:
        return
    leave_singles(world, rep, i)
    rep.single_kv -= req.computed
    if req.emitted < req.output:
        start_gliding(world, rep, i)
        return
    req.finish = rep.clock
    if rep.mode == LOOKAHEAD:
        rep.peaks -= peak_of(world, rep, i)
    give_back(rep, held_by(rep, req, req.computed))
    leave_batch(world, rep, i)
    if rep.retry == NEVER or rep.guess or rep.running == 0:
        rep.retry = 0
