"""Replicas between two steps, for rules that rank their queues anew (compiled); see docs/simulator.md."""

from __future__ import annotations

from llmopt.arrays import Ints
from llmopt.evaluate.kernel_step import advance
from llmopt.evaluate.kernel_types import NONE, World, compiled
from llmopt.evaluate.kernel_victims import believed_of


@compiled
def halt_at(world: World, time: float) -> None:
    """Let no replica end a step after `time`, until another time is said."""
    for r in range(len(world.reps)):
        world.reps[r].halt = time


@compiled
def halt(world: World, time: float, counts: Ints) -> None:
    """End every step that ends by `time`, leave those under way; `counts` is waiting and running, (n_replicas, 2)."""
    for r in range(len(world.reps)):
        advance(world, r, time)
        counts[r, 0] = world.reps[r].waiting
        counts[r, 1] = world.reps[r].running


@compiled
def list_running(world: World, r: int, table: Ints) -> None:
    """Fill a row for each running request: prompt, believed output, computed and emitted tokens before the step."""
    rep = world.reps[r]
    row = 0
    i = rep.batch_head
    while i != NONE:
        req = world.reqs[i]
        table[row, 0] = req.prompt
        table[row, 1] = believed_of(world, rep, i)
        table[row, 2] = req.offset + rep.steps if req.gliding else req.computed
        table[row, 3] = req.output - req.due + rep.steps if req.gliding else req.emitted
        row += 1
        i = req.next


@compiled
def list_beliefs(world: World, numbers: Ints, table: Ints) -> None:
    """Fill a row for each waiting request of `numbers`: believed output and emitted tokens."""
    for k in range(len(numbers)):
        req = world.reqs[numbers[k]]
        table[k, 0] = max(world.terms[numbers[k]].believed, req.emitted + 1)
        table[k, 1] = req.emitted
