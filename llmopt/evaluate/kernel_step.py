# mypy: disable-error-code="no-any-return"
"""One engine step of one replica, and the loop that advances a replica in time (compiled); see docs/simulator.md."""

from __future__ import annotations

import math
from typing import Any

from llmopt.evaluate.kernel_ahead import steps_to_wait
from llmopt.evaluate.kernel_cache import find_blocks, leave_blocks
from llmopt.evaluate.kernel_glide import (
    blocks_of,
    catch_up,
    finish_due,
    give_back,
    glide,
    held_by,
    show,
    start_gliding,
    stop_gliding,
)
from llmopt.evaluate.kernel_lists import join_batch, join_singles, leave_batch, leave_singles, queue, requeue
from llmopt.evaluate.kernel_table import read_table
from llmopt.evaluate.kernel_types import (
    COEFFICIENTS,
    LOOKAHEAD,
    NEVER,
    NONE,
    RESERVE,
    RESTART,
    SWAP,
    World,
    compiled,
    inlined,
)


@compiled
def advance(world: World, r: int, until: float) -> None:
    """Make every step of replica `r` that starts before `until`."""
    rep = world.reps[r]
    while rep.clock < until and rep.waiting + rep.running > 0:
        if rep.single_head != NONE or rep.gliding == 0 or glide(world, rep, until) == 0:
            schedule(world, rep)
            if rep.ahead:
                catch_up(rep)
                if rep.running == 0:
                    # nothing could run with what was known one step ago: schedule again with what is known now
                    continue
            seconds = duration(world, rep)
            show(rep, rep.outstanding)
            complete(world, rep, seconds)


@compiled
def arrive(world: World, r: int, i: int, time: float) -> None:
    """Hand request `i` to replica `r`, which has been advanced to `time`."""
    rep, req = world.reps[r], world.reqs[i]
    if rep.waiting + rep.running == 0:
        rep.clock = max(rep.clock, time)
    if rep.waiting == 0:
        rep.retry = 0
    req.replica = r
    req.queued = rep.clock
    rep.fresh += rep.ahead
    queue(world, rep, i)
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
    preempted = False
    while rep.need > rep.blocks - rep.used - rep.late_blocks:
        preempt(world, rep, rep.batch_tail)
        preempted = True
    rep.used += rep.need
    if not preempted and rep.waiting > rep.fresh and rep.steps >= rep.retry:
        admit(world, rep, left)


@compiled
def demand(rep: Any, req: Any) -> int:
    """Tokens that a request would take of an unlimited budget."""
    return min(req.target - req.computed, rep.chunk) if req.prefilling else 1


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


@compiled
def preempt(world: World, rep: Any, i: int) -> None:
    """Move the youngest request to the front of the queue, in a step that is being scheduled."""
    req = world.reqs[i]
    if req.gliding:
        if (req.offset + rep.slots + rep.steps) % rep.block == 0:
            rep.need -= 1
        stop_gliding(world, rep, i)
    else:
        rep.need -= blocks_of(rep, req.computed + req.taken) - blocks_of(rep, req.computed)
        leave_singles(world, rep, i)
        rep.single_kv -= req.computed
    leave_batch(world, rep, i)
    blocks = blocks_of(rep, req.computed)
    rep.used -= blocks
    rep.pushed += blocks
    if rep.caching:
        leave_blocks(rep, req)
    requeue(world, rep, i)
    rep.retry = 0
    req.preemptions += 1
    rep.preemptions += 1
    if rep.mode != SWAP:
        forget(rep, req)


@compiled
def forget(rep: Any, req: Any) -> None:
    """Back to prefill: of its output too under restart, else of the tokens it has emitted."""
    rep.outstanding += req.computed if req.prefilling else req.prompt + req.emitted
    if rep.mode == RESTART:
        rep.wasted += req.area
        req.emitted = 0
        req.prefilled = 0
    elif req.prefilling:
        rep.wasted += req.area
    req.computed = 0
    req.area = 0
    req.target = req.prompt + req.emitted
    req.prefilling = 1


@inlined
def admit(world: World, rep: Any, left: int) -> None:
    """Admit from the head of the queue while budget, batch slots and memory allow."""
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
        if not fits_now(world, rep, i):
            return
        if rep.caching and req.full > 0:
            find_blocks(rep, req)
            req.taken = min(demand(rep, req), left)
        join_batch(world, rep)
        left -= req.taken
        rep.used += held_by(rep, req, req.computed + req.taken)
        if math.isnan(req.scheduled):
            req.scheduled = rep.clock
        if req.prefilling or math.isnan(req.first_token):
            join_singles(world, rep, i)
            rep.single_kv += req.computed
        else:
            start_gliding(world, rep, i)


@inlined
def fits_now(world: World, rep: Any, i: int) -> bool:
    """Whether memory admits the head of the queue; if not, sets when to try again."""
    req = world.reqs[i]
    if rep.mode == LOOKAHEAD:
        wait = steps_to_wait(world, rep, i)
        if wait == 0:
            return True
        rep.retry = rep.steps + wait
        return False
    needed = held_by(rep, req, max(req.target, req.computed + req.taken))
    if needed <= rep.blocks - rep.used - rep.late_blocks:
        return True
    rep.retry = NEVER
    return False


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
            rep.decode += 1
            kv += req.computed
        i = req.link_next
    if rep.table != NONE:
        return read_table(world.costs, rep, float(kv), pairs)
    longest = 0.0
    p = world.costs
    for k in range(rep.piece, rep.piece + COEFFICIENTS * rep.pieces, COEFFICIENTS):
        seconds = p[k] + p[k + 1] * rep.prefill + p[k + 2] * rep.decode + p[k + 3] * kv + p[k + 4] * pairs
        longest = max(longest, seconds)
    return longest


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
        req.emitted += 1
    if req.emitted == 0:
        # first_token = "decode": the next step is looked at too, because it times the first token
        return
    if math.isnan(req.first_token):
        req.first_token = rep.clock
    leave_singles(world, rep, i)
    rep.single_kv -= req.computed
    if req.emitted < req.output:
        start_gliding(world, rep, i)
        return
    req.finish = rep.clock
    give_back(rep, held_by(rep, req, req.computed))
    if rep.retry == NEVER:
        rep.retry = 0
    leave_batch(world, rep, i)
