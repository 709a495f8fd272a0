# mypy: disable-error-code="no-any-return"
"""Steps of the rules in which running requests may pause: whom a step serves (compiled); see docs/simulator.md.

Under these rules nobody glides: every running request is a single, and a step gives tokens to some of them.
"""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_admit import admit_by_rule, demand, enter, refused_until
from llmopt.evaluate.kernel_hold import anybody_called, called, deepest, moves, open_gates, rank
from llmopt.evaluate.kernel_queue import pop, push
from llmopt.evaluate.kernel_types import (
    BY_LEVEL,
    DECODE_ONLY,
    NEVER,
    NONE,
    PREFILL_FIRST,
    PREFILL_ONLY,
    UNGATED,
    World,
    compiled,
)
from llmopt.evaluate.kernel_victims import evict, growth_of, strike


@compiled
def plan_step(world: World, rep: Any) -> bool:
    """Form the batch of the step that starts at the clock; returns whether nobody moves until somebody arrives."""
    rep.need = 0
    rep.retry = NEVER
    start(world, rep)
    if rep.mixing == PREFILL_FIRST:
        prefill_first(world, rep)
    elif rep.mixing == PREFILL_ONLY:
        prefill_only(world, rep)
    elif rep.mixing == DECODE_ONLY:
        decode_only(world, rep)
    else:
        decode_first(world, rep)
    if rep.counts == 0 or (rep.running == 0 and rep.retry <= rep.steps):
        return False
    i = rep.single_head
    while i != NONE and world.reqs[i].taken == 0:
        i = world.reqs[i].link_next
    return i == NONE


@compiled
def start(world: World, rep: Any) -> None:
    """Nobody has tokens of this step yet."""
    i = rep.single_head
    while i != NONE:
        world.reqs[i].taken = 0
        world.terms[i].served = 0
        world.terms[i].paused = 0
        i = world.reqs[i].link_next


@compiled
def decode_first(world: World, rep: Any) -> None:
    """Running requests in the order of the batch, unless held back, then admission (WAIT, Nested WAIT, levels)."""
    if rep.counts > 0:
        open_gates(world, rep)
        i = rep.single_head
        while i != NONE:
            world.terms[i].paused = 0 if moves(world, rep, i) else 1
            i = world.reqs[i].link_next
    preemptions = rep.preemptions
    left = serve(world, rep, rep.budget)
    if rep.preemptions == preemptions:
        join(world, rep, left)


@compiled
def prefill_first(world: World, rep: Any) -> None:
    """Running prefills, then admission, then decodes with what is left of the budget (Orca)."""
    preemptions = rep.preemptions
    pause(world, rep, 0)
    left = serve(world, rep, rep.budget)
    if rep.preemptions == preemptions:
        join(world, rep, left)
    pause(world, rep, 1)
    left = rep.budget
    rep.need = 0
    i = rep.single_head
    while i != NONE:
        left -= world.reqs[i].taken
        reopen(world, rep, i)
        i = world.reqs[i].link_next
    serve(world, rep, left)


@compiled
def prefill_only(world: World, rep: Any) -> None:
    """New requests alone, with their whole prompts, if any are admitted; else decodes (vLLM before chunked prefill)."""
    last = rep.single_tail
    join(world, rep, rep.budget)
    if rep.single_tail == last:
        serve(world, rep, rep.budget)


@compiled
def decode_only(world: World, rep: Any) -> None:
    """Decodes until nobody runs; only then new requests, with their whole prompts (FasterTransformer)."""
    if rep.running == 0:
        join(world, rep, rep.budget)
    else:
        serve(world, rep, rep.budget)


@compiled
def pause(world: World, rep: Any, prefilling: int) -> None:
    """Let the running requests in prefill (1) or in decode (0) pause, and the others not."""
    i = rep.single_head
    while i != NONE:
        world.terms[i].paused = 1 if world.reqs[i].prefilling == prefilling else 0
        i = world.reqs[i].link_next


@compiled
def serve(world: World, rep: Any, left: int) -> int:
    """Give tokens, and blocks for them, to the running requests that do not pause, in the order of the batch.

    Others are preempted if memory runs out, and give back what they had, for those whose turn comes later. Returns what
    is left of the budget.
    """
    i = rep.batch_head
    while i != NONE and left > 0:
        req, term = world.reqs[i], world.terms[i]
        if term.paused or term.served == rep.steps + 1:
            i = req.next
            continue
        preemptions, all_preemptions = req.preemptions, rep.preemptions
        req.taken = min(demand(rep, req), left)
        while req.preemptions == preemptions and rep.need + growth_of(rep, req) > rep.blocks - rep.used:
            left += strike(world, rep)
        if req.preemptions == preemptions:
            rep.need += growth_of(rep, req)
            left -= req.taken
            term.served = rep.steps + 1
        i = req.next if rep.preemptions == all_preemptions else rep.batch_head
    rep.used += rep.need
    return left


@compiled
def reopen(world: World, rep: Any, i: int) -> None:
    """Count the blocks for a running request's tokens as needed again, not as allocated."""
    blocks = growth_of(rep, world.reqs[i])
    rep.used -= blocks
    rep.need += blocks


@compiled
def join(world: World, rep: Any, left: int) -> None:
    """Admit waiting requests; the projection pretends that pausing requests move, as every running one."""
    if rep.waiting == 0:
        return
    i = rep.single_head
    while i != NONE:
        req = world.reqs[i]
        if world.terms[i].served != rep.steps + 1:
            req.taken = demand(rep, req)
        i = req.link_next
    if rep.gating == UNGATED:
        admit_by_rule(world, rep, left)
    else:
        admit_called(world, rep, left)
    i = rep.single_head
    while i != NONE:
        if world.terms[i].served != rep.steps + 1:
            world.reqs[i].taken = 0
        i = world.reqs[i].link_next


@compiled
def admit_called(world: World, rep: Any, left: int) -> None:
    """Try the waiting requests that are called, in the order of the queue, until one more fails than may."""
    passed = NONE
    failures = 0
    while rep.waiting > 0 and left > 0 and failures <= rep.skips and anybody_called(world, rep):
        if rep.gating != BY_LEVEL and rep.running >= rep.max_batch:
            break
        i = rep.queue_head
        pop(world, rep)
        if called(world, rep, i):
            left = make_way(world, rep, i, left)
            if world.reqs[i].taken > 0:
                left -= enter(world, rep, i, left)
                continue
            failures += 1
        world.reqs[i].next = passed
        passed = i
    while passed != NONE:
        after = world.reqs[passed].next
        push(world, rep, passed)
        passed = after


@compiled
def make_way(world: World, rep: Any, i: int, left: int) -> int:
    """Give waiting request `i` its tokens, or none if it cannot join; those on higher levels are preempted for it.

    Returns what is left of the budget with the tokens that they give back.
    """
    reqs = world.reqs
    reqs[i].taken = min(demand(rep, reqs[i]), left)
    while rep.running >= rep.max_batch or refused_until(world, rep, i) > 0:
        victim = deepest(world, rep) if rep.gating == BY_LEVEL else NONE
        if victim == NONE or rank(world, rep, reqs[victim].emitted) <= rank(world, rep, reqs[i].emitted):
            reqs[i].taken = 0
            break
        rep.need = 0
        reopen(world, rep, victim)
        left += evict(world, rep, victim)
        world.terms[victim].served = rep.steps + 1
        reqs[i].taken = min(demand(rep, reqs[i]), left)
    return left
