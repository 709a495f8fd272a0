# mypy: disable-error-code="no-any-return"
"""What a preempted request finds of its blocks when it comes back (compiled); see docs/simulator.md.

Free blocks form a queue: a released request's blocks are appended, the last one first, and new blocks are taken from
the front. Neither needs names for the blocks. Places in the queue are numbered in the order of appending, and what a
request released is a segment of them, whose end belongs to its first block; `pushed` less the number of free blocks is
the first place that has not been taken.

Found blocks leave the queue in the middle, after which that place is too high by their number as long as any block
before them is free. Under the engine's own rule this changes nothing. Whoever was preempted last comes back first, and
nobody found anything behind its segment: either nothing is free before the segment, and the place is right; or the
whole segment is free, and the place is at or before its start. And nobody else finds anything: a request that preempts
another one takes, at once or when it is back itself, more blocks than were free, and so all that earlier ones had
released. Under other rules those who may find blocks are in a list, and the places behind blocks found move up.
"""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_types import NONE, World, compiled


@compiled
def leave_blocks(world: World, rep: Any, i: int) -> None:
    """Remember where a preempted request's blocks, just released, lie in the queue, and how many of them are full."""
    reqs = world.reqs
    reqs[i].offset = rep.pushed
    reqs[i].full = reqs[i].computed // rep.block
    if rep.ruled and reqs[i].full > 0:
        reqs[i].link_prev = NONE
        reqs[i].link_next = rep.lost_head
        if rep.lost_head != NONE:
            reqs[rep.lost_head].link_prev = i
        rep.lost_head = i


@compiled
def find_blocks(world: World, rep: Any, i: int) -> None:
    """Give an admitted request those of its full blocks that nobody has taken; one token is always computed anew."""
    req = world.reqs[i]
    place = rep.pushed - (rep.blocks - rep.used - rep.late_blocks)
    found = min(req.offset - place, req.full, (req.target - 1) // rep.block)
    req.full = 0
    if found > 0:
        req.computed = found * rep.block
        rep.outstanding -= req.computed
    if rep.ruled:
        close_up(world, rep, i, max(found, 0))


@compiled
def close_up(world: World, rep: Any, i: int, found: int) -> None:
    """Take a request out of the list of those that may find blocks, and what it found out of the queue."""
    reqs = world.reqs
    before, after = reqs[i].link_prev, reqs[i].link_next
    if before == NONE:
        rep.lost_head = after
    else:
        reqs[before].link_next = after
    if after != NONE:
        reqs[after].link_prev = before
    rep.pushed -= found
    k = rep.lost_head
    while found > 0 and k != NONE:
        if reqs[k].offset > reqs[i].offset:
            reqs[k].offset -= found
        k = reqs[k].link_next
