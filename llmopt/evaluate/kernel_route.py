"""Routing by data (compiled): pool, draws, smallest score; see docs/simulator.md."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import numpy as np

from llmopt.evaluate.kernel_types import NONE, Table, compiled
from llmopt.lengths import Floats, Ints


@compiled
def score(rep: Any, weights: Floats) -> float:
    """Weighted sum of the state features."""
    w = weights[rep.pool]
    return w[0] * rep.waiting + w[1] * rep.running + w[2] * (rep.used * rep.block) + w[3] * rep.outstanding


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
def smallest(reps: Table, members: Ints, weights: Floats, last: Ints) -> int:
    """The member with the smallest score; ties go to the one chosen least recently, then to the first."""
    best = members[0]
    lowest = score(reps[best], weights)
    for r in members[1:]:
        value = score(reps[r], weights)
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
