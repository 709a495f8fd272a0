# mypy: disable-error-code="no-any-return"
"""Queue, batch, singles and the ring of finishing steps of one replica (compiled); every change is O(1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmopt.evaluate.kernel_types import NEVER, NONE, WORD, World, compiled, inlined

LOWEST = np.zeros(37, np.int64)
"""Position of the lowest bit of a word, by the bit's value modulo 37 (the powers of 2 below 2^36 differ modulo 37)."""
for _bit in range(WORD):
    LOWEST[(1 << _bit) % 37] = _bit


@compiled
def queue(world: World, rep: Any, i: int) -> None:
    """Append to the waiting queue."""
    reqs = world.reqs
    reqs[i].next = NONE
    if rep.queue_head == NONE:
        rep.queue_head = i
    else:
        reqs[rep.queue_tail].next = i
    rep.queue_tail = i
    rep.waiting += 1


@compiled
def requeue(world: World, rep: Any, i: int) -> None:
    """Put at the front of the waiting queue."""
    reqs = world.reqs
    reqs[i].next = rep.queue_head
    if rep.queue_head == NONE:
        rep.queue_tail = i
    rep.queue_head = i
    rep.waiting += 1


@compiled
def unqueue(world: World, rep: Any) -> None:
    """Take the head out of the waiting queue."""
    rep.queue_head = world.reqs[rep.queue_head].next
    rep.waiting -= 1


@compiled
def join_batch(world: World, rep: Any, i: int) -> None:
    """Append to the batch a request just taken out of the queue."""
    reqs = world.reqs
    req = reqs[i]
    if rep.waiting == 0:
        rep.drained = rep.clock
    req.next = NONE
    req.prev = rep.batch_tail
    if rep.batch_tail == NONE:
        rep.batch_head = i
    else:
        reqs[rep.batch_tail].next = i
    rep.batch_tail = i
    rep.running += 1


@compiled
def leave_batch(world: World, rep: Any, i: int) -> None:
    """Take out of the batch."""
    reqs = world.reqs
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
def join_singles(world: World, rep: Any, i: int) -> None:
    """Append to the singles, which thereby stay in the order of the batch."""
    reqs = world.reqs
    reqs[i].link_next = NONE
    reqs[i].link_prev = rep.single_tail
    if rep.single_tail == NONE:
        rep.single_head = i
    else:
        reqs[rep.single_tail].link_next = i
    rep.single_tail = i


@compiled
def leave_singles(world: World, rep: Any, i: int) -> None:
    """Take out of the singles."""
    reqs = world.reqs
    before, after = reqs[i].link_prev, reqs[i].link_next
    if before == NONE:
        rep.single_head = after
    else:
        reqs[before].link_next = after
    if after == NONE:
        rep.single_tail = before
    else:
        reqs[after].link_prev = before


@compiled
def join_bucket(world: World, rep: Any, i: int) -> None:
    """Put into the bucket of the step count `due`."""
    reqs = world.reqs
    slot = reqs[i].due & rep.mask
    head = world.ring[rep.ring + slot]
    reqs[i].link_prev = NONE
    reqs[i].link_next = head
    if head == NONE:
        world.bits[rep.bits + slot // WORD] |= 1 << (slot % WORD)
    else:
        reqs[head].link_prev = i
    world.ring[rep.ring + slot] = i


@compiled
def leave_bucket(world: World, rep: Any, i: int) -> None:
    """Take out of its bucket."""
    reqs = world.reqs
    before, after = reqs[i].link_prev, reqs[i].link_next
    if after != NONE:
        reqs[after].link_prev = before
    if before != NONE:
        reqs[before].link_next = after
        return
    slot = reqs[i].due & rep.mask
    world.ring[rep.ring + slot] = after
    if after == NONE:
        world.bits[rep.bits + slot // WORD] ^= 1 << (slot % WORD)


@compiled
def take_bucket(world: World, rep: Any, due: int) -> int:
    """Empty the bucket of a step count; returns its first request or NONE."""
    slot = due & rep.mask
    head = world.ring[rep.ring + slot]
    if head != NONE:
        world.ring[rep.ring + slot] = NONE
        world.bits[rep.bits + slot // WORD] ^= 1 << (slot % WORD)
    return head


@inlined
def next_due(world: World, bits: int, mask: int, after: int) -> int:
    """The smallest filled step count above `after`, NEVER if there is none within one turn of the ring at `bits`."""
    start = (after + 1) & mask
    words = (mask + 1) // WORD
    w = start // WORD
    word = world.bits[bits + w] >> (start % WORD) << (start % WORD)
    for _ in range(words + 1):
        if word != 0:
            slot = w * WORD + LOWEST[(word & -word) % 37]
            return after + 1 + ((slot - start) & mask)
        w += 1
        if w == words:
            w = 0
        word = world.bits[bits + w]
    return NEVER
