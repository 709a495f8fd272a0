"""One replica, step by step (compiled)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from typing import Any

from llmopt.evaluate.kernel_types import LOOKAHEAD, NONE, RESERVE, RESTART, SWAP, Table, compiled
from llmopt.lengths import Floats


@compiled
def blocks_of(rep: Any, tokens: int) -> int:
    """Blocks of a request with `tokens` computed tokens."""
    return -(-(tokens + rep.slots) // rep.block)


@compiled
def append(reqs: Table, rep: Any, i: int) -> None:
    """Add to the end of the batch."""
    reqs[i].next = NONE
    reqs[i].prev = rep.batch_tail
    if rep.batch_tail == NONE:
        rep.batch_head = i
    else:
        reqs[rep.batch_tail].next = i
    rep.batch_tail = i
    rep.running += 1


@compiled
def unlink(reqs: Table, rep: Any, i: int) -> None:
    """Take out of the batch."""
    before, after = reqs[i].prev, reqs[i].next
    if before == NONE:
        rep.batch_head = after
    else:
        reqs[before].next = after
    if after == NONE:
        rep.batch_tail = before
    else:
        reqs[after].prev = before
    rep.running -= 1


@compiled
def arrive(reqs: Table, rep: Any, i: int, number: int, time: float) -> None:
    """Queue a request."""
    if rep.waiting + rep.running == 0:
        rep.clock = max(rep.clock, time)
    req = reqs[i]
    req.replica = number
    req.next = NONE
    if rep.queue_head == NONE:
        rep.queue_head = i
    else:
        reqs[rep.queue_tail].next = i
    rep.queue_tail = i
    rep.waiting += 1
    rep.outstanding += req.prompt + req.output


@compiled
def preempt(reqs: Table, rep: Any, i: int) -> None:
    """Move a request from the batch to the front of the queue."""
    req = reqs[i]
    unlink(reqs, rep, i)
    rep.used -= blocks_of(rep, req.computed)
    req.next = rep.queue_head
    rep.queue_head = i
    if req.next == NONE:
        rep.queue_tail = i
    rep.waiting += 1
    req.preemptions += 1
    rep.preemptions += 1
    if rep.mode == SWAP:
        return
    before = req.output - req.emitted
    if req.prefilling:
        before += req.target - req.computed
    if rep.mode == RESTART:
        rep.wasted += req.life
        req.emitted = 0
        req.life = 0
        req.prefilled = 0
    elif req.prefilling:
        rep.wasted += req.attempt
    req.computed = 0
    req.target = req.prompt + req.emitted
    req.prefilling = 1
    req.attempt = 0
    rep.outstanding += req.target + req.output - req.emitted - before


@compiled
def projection_fits(reqs: Table, rep: Any, candidate: int) -> bool:
    """Whether the batch and the candidate fit at every step at which one of them ends; all know their tokens now."""
    judge = rep.batch_head
    done = False
    while not done:
        if judge == NONE:
            judge = candidate
            done = True
        last = last_step(rep, reqs[judge])
        total = 0
        i = rep.batch_head
        while i != NONE:
            total += blocks_at(rep, reqs[i], last)
            i = reqs[i].next
        if total + blocks_at(rep, reqs[candidate], last) > rep.blocks:
            return False
        judge = reqs[judge].next
    return True


@compiled
def last_step(rep: Any, req: Any) -> int:
    """Steps from now after which the request is gone."""
    if not req.prefilling:
        return req.output - req.emitted - req.take
    steps = -(-(req.target - req.computed - req.take) // rep.chunk)
    return steps + req.output - req.emitted - rep.first_step


@compiled
def blocks_at(rep: Any, req: Any, step: int) -> int:
    """Projected blocks `step` steps from now."""
    if step > last_step(rep, req):
        return 0
    if not req.prefilling:
        return blocks_of(rep, req.computed + req.take + step)
    now = req.computed + req.take
    steps = -(-(req.target - now) // rep.chunk)
    if step <= steps:
        return blocks_of(rep, min(req.target, now + step * rep.chunk))
    return blocks_of(rep, req.target + step - steps)


@compiled
def wants(rep: Any, req: Any, budget: int) -> int:
    """Tokens that the request takes of `budget`."""
    if req.prefilling:
        return min(req.target - req.computed, rep.chunk, budget)
    return min(1, budget)


@compiled
def begin(reqs: Table, rep: Any, pieces: Floats) -> None:
    """Schedule a step at the clock."""
    budget = rep.budget
    preempted = False
    i = rep.batch_head
    while i != NONE:
        reqs[i].take = 0
        i = reqs[i].next
    i = rep.batch_head
    while i != NONE and budget > 0:
        req = reqs[i]
        tokens = wants(rep, req, budget)
        more = 0
        if rep.mode != RESERVE:
            more = blocks_of(rep, req.computed + tokens) - blocks_of(rep, req.computed)
        gone = False
        while more > rep.blocks - rep.used and not gone:
            gone = rep.batch_tail == i
            preempt(reqs, rep, rep.batch_tail)
            preempted = True
        if gone:
            break
        rep.used += more
        req.take = tokens
        budget -= tokens
        i = req.next
    while not preempted and rep.waiting > 0 and budget > 0 and rep.running < rep.max_batch:
        i = rep.queue_head
        req = reqs[i]
        tokens = wants(rep, req, budget)
        req.take = tokens
        after = req.next
        req.next = NONE
        if rep.mode == RESERVE:
            more = blocks_of(rep, req.prompt + req.output - rep.first_step)
            ok = more <= rep.blocks - rep.used
        elif rep.mode == LOOKAHEAD:
            more = blocks_of(rep, req.computed + tokens)
            ok = projection_fits(reqs, rep, i)
        else:
            more = blocks_of(rep, req.computed + tokens)
            ok = blocks_of(rep, max(req.target, req.computed + tokens)) <= rep.blocks - rep.used
        if not ok:
            req.next = after
            break
        rep.queue_head = after
        rep.waiting -= 1
        append(reqs, rep, i)
        rep.used += more
        budget -= tokens
        if math.isnan(req.scheduled):
            req.scheduled = rep.clock
    rep.end = rep.clock + duration(reqs, rep, pieces)
    rep.under_way = 1


@compiled
def duration(reqs: Table, rep: Any, pieces: Floats) -> float:
    """Step time of the scheduled batch."""
    prefill = 0
    decode = 0
    kv = 0
    pairs = 0.0
    i = rep.batch_head
    while i != NONE:
        req = reqs[i]
        if req.prefilling:
            prefill += req.take
            pairs += req.take * req.computed + 0.5 * req.take * req.take
        elif req.take > 0:
            decode += 1
            kv += req.computed
        i = req.next
    rep.prefill_tokens += prefill
    rep.decode_tokens += decode
    longest = 0.0
    for k in range(rep.piece, rep.piece + rep.pieces):
        p = pieces[k]
        longest = max(longest, p[0] + p[1] * prefill + p[2] * decode + p[3] * kv + p[4] * pairs)
    return longest


@compiled
def complete(reqs: Table, rep: Any) -> None:
    """End the step under way."""
    used = 0
    i = rep.batch_head
    while i != NONE:
        req = reqs[i]
        after = req.next
        before = req.emitted
        req.computed += req.take
        req.life += req.computed
        if req.prefilling:
            req.attempt += req.computed
            rep.outstanding -= req.take
            if req.computed == req.target:
                if req.prefilled:
                    rep.wasted += req.attempt - rep.first_step * req.computed
                req.emitted += rep.first_step
                req.prefilling = 0
                req.prefilled = 1
        else:
            req.emitted += req.take
        rep.outstanding -= req.emitted - before
        used += req.computed
        if before == 0 and req.emitted == 1 and math.isnan(req.first_token):
            req.first_token = rep.end
        if req.emitted == req.output:
            req.finish = rep.end
            unlink(reqs, rep, i)
            if rep.mode == RESERVE:
                rep.used -= blocks_of(rep, req.prompt + req.output - rep.first_step)
            else:
                rep.used -= blocks_of(rep, req.computed)
        i = after
    rep.held += used
    rep.held_time += used * (rep.end - rep.clock)
    rep.busy += rep.end - rep.clock
    rep.steps += 1
    rep.peak = max(rep.peak, used)
    rep.under_way = 0
    rep.clock = rep.end


@compiled
def advance(reqs: Table, rep: Any, pieces: Floats, until: float) -> None:
    """Begin every step that starts before `until`, complete every step that ends by `until`."""
    while True:
        if rep.under_way:
            if rep.end > until:
                return
            complete(reqs, rep)
        if rep.clock >= until or rep.waiting + rep.running == 0:
            return
        begin(reqs, rep, pieces)
