# mypy: disable-error-code="no-any-return"
"""The waiting queue in another order than that of arrival: a pairing heap by (key, number) (compiled).

Its root is the replica's `queue_head`; `next` leads to the next sibling, the rule's `child` to the first child.
"""

from __future__ import annotations

from typing import Any

from llmopt.arrays import Floats, Ints
from llmopt.evaluate.kernel_hold import count_in, rank
from llmopt.evaluate.kernel_lists import queue, requeue
from llmopt.evaluate.kernel_types import ARRIVAL, BY_LEVEL, NONE, PREDICTED, World, compiled


@compiled
def join_queue(world: World, rep: Any, i: int) -> None:
    """Let a request that arrives wait; the replica looks at it at once if it may be the next to be admitted.

    No request is believed to be larger than its replica, which would then never admit it.
    """
    if not rep.ruled:
        queue(world, rep, i)
        return
    term = world.terms[i]
    room = rep.blocks * rep.block - rep.slots + rep.first_step
    term.believed = min(term.believed, room - world.reqs[i].prompt)
    if not rep.heap:
        queue(world, rep, i)
        return
    if rep.counts > 0:
        count_in(world, rep, i, 1)
    if rep.first_order == PREDICTED:
        term.key = term.believed
    push(world, rep, i)
    if rep.skips > 0 or rep.queue_head == i:
        rep.retry = 0


@compiled
def rejoin_queue(world: World, rep: Any, i: int) -> None:
    """Let a preempted request wait again."""
    if not rep.heap:
        requeue(world, rep, i)
        return
    if rep.counts > 0:
        count_in(world, rep, i, 1)
    if rep.gating == BY_LEVEL:
        world.terms[i].key = rank(world, rep, world.reqs[i].emitted)
    elif rep.order == ARRIVAL:
        rep.fronts += 1
        world.terms[i].key = -rep.fronts
    elif rep.order == PREDICTED:
        world.terms[i].key = world.terms[i].believed
    push(world, rep, i)


@compiled
def push(world: World, rep: Any, i: int) -> None:
    """Insert into the heap."""
    world.reqs[i].next = NONE
    world.terms[i].child = NONE
    rep.queue_head = i if rep.queue_head == NONE else meld(world, rep.queue_head, i)
    rep.waiting += 1


@compiled
def meld(world: World, a: int, b: int) -> int:
    """Join two heaps; returns the root."""
    terms = world.terms
    if terms[b].key < terms[a].key or (terms[b].key == terms[a].key and b < a):
        a, b = b, a
    world.reqs[b].next = terms[a].child
    terms[a].child = b
    world.reqs[a].next = NONE
    return a


@compiled
def pop(world: World, rep: Any) -> None:
    """Take the root out of the heap: join its children pair by pair, then the pairs from the last to the first."""
    reqs = world.reqs
    i = world.terms[rep.queue_head].child
    pairs = NONE
    while i != NONE:
        other = reqs[i].next
        after = NONE if other == NONE else reqs[other].next
        if other != NONE:
            i = meld(world, i, other)
        reqs[i].next = pairs
        pairs = i
        i = after
    root = pairs
    if root != NONE:
        i = reqs[root].next
        reqs[root].next = NONE
        while i != NONE:
            after = reqs[i].next
            root = meld(world, root, i)
            i = after
    rep.queue_head = root
    rep.waiting -= 1


@compiled
def list_waiting(world: World, r: int, numbers: Ints) -> None:
    """Write the numbers of the requests waiting at replica `r`, in no order, to `numbers`."""
    rep = world.reps[r]
    count = 0
    if rep.queue_head != NONE:
        numbers[0] = rep.queue_head
        count = 1
    k = 0
    while k < count:
        i = world.terms[numbers[k]].child
        while i != NONE:
            numbers[count] = i
            count += 1
            i = world.reqs[i].next
        k += 1


@compiled
def rank_anew(world: World, r: int, numbers: Ints, keys: Floats, time: float) -> None:
    """Give all requests waiting at replica `r` new keys; if it idles it may start a step at `time` by them."""
    rep = world.reps[r]
    if rep.running == 0:
        rep.clock = max(rep.clock, time)
    rep.queue_head = NONE
    rep.waiting = 0
    rep.retry = 0
    for k in range(len(numbers)):
        world.terms[numbers[k]].key = keys[k]
        push(world, rep, numbers[k])
