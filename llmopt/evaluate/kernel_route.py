"""Routing by data (compiled): pool, draws, smallest score; see docs/simulator.md."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import numpy as np

from llmopt.evaluate.kernel_types import NONE, Table, compiled
from llmopt.lengths import Floats, Ints


@compiled
def score(rep: Any, weights: Floats, time: float) -> float:
    """Weighted sum of the state features at `time`, which is before the clock while a step is under way."""
    j = rep.pool
    if time < rep.clock:
        waiting, running, used, outstanding = rep.seen_waiting, rep.seen_running, rep.seen_used, rep.seen_outstanding
    else:
        waiting, running, used, outstanding = rep.waiting, rep.running, rep.used, rep.outstanding
    value = weights[j, 0] * waiting + weights[j, 1] * running
    return value + weights[j, 2] * (used * rep.block) + weights[j, 3] * outstanding


@compiled
def draw_pool(fractions: Floats, cls: int, u: float) -> tuple[int, float]:
    """The pool by inversion of the fractions, and what is left of the random number."""
    row = fractions[cls]
    pool = NONE
    start = 0.0
    below = 0.0
    for j in range(len(row)):
        if row[j] > 0:
            pool = j
            start = below
            below += row[j]
            if u < below:
                break
    return pool, min(max((u - start) / row[pool], 0.0), 1.0)


@compiled
def next_pool(fractions: Floats, sent: Ints, cls: int) -> int:
    """The pool with the largest deficit of whole requests."""
    row, counts = fractions[cls], sent[cls]
    total = counts.sum() + 1
    pool = 0
    best = -np.inf
    for j in range(len(row)):
        deficit = row[j] * total - counts[j]
        if deficit > best:
            best = deficit
            pool = j
    counts[pool] += 1
    return pool


@compiled
def smallest(reps: Table, members: Ints, weights: Floats, last: Ints, time: float) -> int:
    """The member with the smallest score; ties go to the one chosen least recently, then to the first."""
    best = members[0]
    lowest = score(reps[best], weights, time)
    for r in members[1:]:
        value = score(reps[r], weights, time)
        if value < lowest or (value == lowest and (last[r] < last[best] or (last[r] == last[best] and r < best))):
            best = r
            lowest = value
    return best


@compiled
def draw(members: Ints, u: float, drawn: Ints) -> None:
    """Fill `drawn` with members drawn with replacement from the digits of `u`."""
    for d in range(len(drawn)):
        k = min(int(u * len(members)), len(members) - 1)
        u = u * len(members) - k
        drawn[d] = members[k]
