# mypy: disable-error-code="no-any-return"
"""Admission of waiting requests (compiled); see docs/simulator.md."""

from __future__ import annotations

import math
from typing import Any

from llmopt.evaluate.kernel_ahead import steps_to_wait
from llmopt.evaluate.kernel_cache import find_blocks
from llmopt.evaluate.kernel_glide import held_by, peak_of, start_gliding
from llmopt.evaluate.kernel_hold import count_in
from llmopt.evaluate.kernel_lists import join_batch, join_singles
from llmopt.evaluate.kernel_queue import pop, push
from llmopt.evaluate.kernel_types import LOOKAHEAD, NEVER, NONE, World, compiled, inlined


@compiled
def demand(rep: Any, req: Any) -> int:
    """Tokens that a request would take of an unlimited budget."""
    return min(req.target - req.computed, rep.chunk) if req.prefilling else 1


@inlined
def refused_until(world: World, rep: Any, i: int) -> int:
    """0 if memory admits a waiting request with the tokens it would take, else a step count before which it cannot.

    NEVER stands for the next end of a request.
    """
    req = world.reqs[i]
    if rep.whole and req.computed + req.taken < req.target:
        return NEVER
    if rep.mode == LOOKAHEAD:
        wait = steps_to_wait(world, rep, i)
        if wait > 0:
            return min(rep.steps + wait, NEVER)
        # a prefill cut by the budget ends later than projected; who came alone may hold what is kept free
        whole = req.taken == demand(rep, req) and (rep.kept == 0 or rep.running > 0)
        rep.sound = rep.steady if whole else 0
        return 0
    needed = held_by(rep, req, max(req.target, req.computed + req.taken))
    if rep.kept > 0 and rep.running > 0:
        needed = max(needed, held_by(rep, req, req.computed + req.taken) + rep.kept)
    return 0 if needed <= rep.blocks - rep.used - rep.late_blocks else NEVER


@inlined
def enter(world: World, rep: Any, i: int, left: int) -> int:
    """Admit a request just taken out of the queue; returns the tokens it takes."""
    req = world.reqs[i]
    if rep.caching and req.full > 0:
        find_blocks(world, rep, i)
        req.taken = min(demand(rep, req), left)
    join_batch(world, rep, i)
    rep.used += held_by(rep, req, req.computed + req.taken)
    if rep.mode == LOOKAHEAD:
        rep.peaks += peak_of(world, rep, i)
    if math.isnan(req.scheduled):
        req.scheduled = rep.clock
    if rep.counts > 0:
        count_in(world, rep, i, -1)
    if rep.stepwise:
        world.terms[i].served = rep.steps + 1
    if rep.stepwise or req.prefilling or math.isnan(req.first_token):
        join_singles(world, rep, i)
        rep.single_kv += req.computed
    else:
        start_gliding(world, rep, i)
    return req.taken


@compiled
def admit_by_rule(world: World, rep: Any, left: int) -> None:
    """Admit in the order of the heap, passing over as many requests as the rule allows.

    `retry` and `wake` become bounds before which none of those that failed can be admitted.
    """
    reqs = world.reqs
    rep.retry = NEVER
    rep.wake = math.inf
    passed = NONE
    failures = 0
    overtaken = False
    while rep.waiting > 0 and failures <= rep.skips:
        if rep.running >= rep.max_batch or left == 0:
            rep.retry = NEVER if rep.running >= rep.max_batch or rep.single_head == NONE else rep.steps + 1
            break
        i = rep.queue_head
        reqs[i].taken = min(demand(rep, reqs[i]), left)
        late = world.terms[i].release > rep.clock
        refused = NEVER if late else refused_until(world, rep, i)
        if refused == 0:
            pop(world, rep)
            left -= enter(world, rep, i, left)
            overtaken = overtaken or failures > 0
            continue
        failures += 1
        rep.retry = min(rep.retry, refused)
        if late:
            rep.wake = min(rep.wake, world.terms[i].release)
        if rep.skips > 0:
            pop(world, rep)
            reqs[i].next = passed
            passed = i
    while passed != NONE:
        after = reqs[passed].next
        push(world, rep, passed)
        passed = after
    if overtaken:
        # the requests just admitted leave less of the budget to those that failed before them
        rep.retry = rep.steps + 1
