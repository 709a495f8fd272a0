# mypy: disable-error-code="no-any-return"
"""What a preempted request finds of its blocks when it comes back (compiled); see docs/simulator.md.

Free blocks form a queue: a released request's blocks are appended, the last one first, and new blocks are taken from
the front. Neither needs names for the blocks. Places in the queue are numbered in the order of appending, and what a
request released is a segment of them, whose end belongs to its first block; `pushed` less the number of free blocks is
the first place that has not been taken.

Found blocks leave the queue in the middle, after which that place is too high by their number as long as any block
before them is free. This changes nothing. Whoever was preempted last comes back first, and nobody found anything behind
its segment: either nothing is free before the segment, and the place is right; or the whole segment is free, and the
place is at or before its start. And nobody else finds anything: a request that preempts another one takes, at once or
when it is back itself, more blocks than were free, and so all that earlier ones had released.
"""

from __future__ import annotations

from typing import Any

from llmopt.evaluate.kernel_types import compiled


@compiled
def leave_blocks(rep: Any, req: Any) -> None:
    """Remember where a preempted request's blocks, just released, lie in the queue, and how many of them are full."""
    req.offset = rep.pushed
    req.full = req.computed // rep.block


@compiled
def find_blocks(rep: Any, req: Any) -> None:
    """Give an admitted request those of its full blocks that nobody has taken; one token is always computed anew."""
    place = rep.pushed - (rep.blocks - rep.used - rep.late_blocks)
    found = min(req.offset - place, req.full, (req.target - 1) // rep.block)
    req.full = 0
    if found > 0:
        req.computed = found * rep.block
        rep.outstanding -= req.computed
