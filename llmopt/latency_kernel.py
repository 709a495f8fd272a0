"""Compiled loops of `llmopt.latency_bound`: the preemptive schedule, and prices that change from block to block."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import numba
import numpy as np

from llmopt.arrays import Floats, Ints

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile with numba, cached on disk."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@compiled
def mean_busy(arrival: Floats, work: Floats, rank: Ints, order: Ints, speed: float, tick: float) -> Floats:
    """Mean time from its arrival at which each request is served, s, shape (n,), if the smallest work goes first.

    One machine serves `speed` s of work per second and preempts at no cost. arrival: sorted; rank: place of each
    request in ascending order of work; order: its inverse. With `tick` > 0, whatever is served in a tick counts at the
    tick's end. O(n log n). Times count from the start of a busy period and means from the arrival, so that nothing is
    lost by cancellation however long the run is.
    """
    n = len(arrival)
    left, moment = work.copy(), np.zeros(n)
    waiting = [rank[0]]
    waiting.pop()
    origin, now, k = 0.0, 0.0, 0
    while k < n or len(waiting) > 0:
        if len(waiting) == 0 and arrival[k] - origin > now:
            origin = np.floor(arrival[k] / tick + 1e-9) * tick if tick > 0 else arrival[k]
            now = max(arrival[k] - origin, 0.0)
        while k < n and arrival[k] - origin <= now:
            heapq.heappush(waiting, rank[k])
            k += 1
        i = order[waiting[0]]
        end = now + left[i] / speed
        if k < n and arrival[k] - origin < end:
            end = arrival[k] - origin
            left[i] -= (end - now) * speed
        else:
            left[i] = 0.0
            heapq.heappop(waiting)
        since = arrival[i] - origin
        middle = (now - since + (end - since)) / 2
        moment[i] += (_area(end, tick) - _area(now, tick) - since * (end - now)) if tick > 0 else (end - now) * middle
        now = end
    for i in range(n):
        moment[i] = moment[i] * speed / work[i] if work[i] > 0 else 0.0
    return moment


@compiled
def _area(time: float, tick: float) -> float:
    """Integral of the end of the tick that contains t, over t from 0 to `time`."""
    full = np.floor(time / tick + 1e-9)
    return float(tick * tick * full * (full + 1) / 2 + (time - full * tick) * (full + 1) * tick)


class Priced(NamedTuple):
    """Requests under prices by level: what each costs at least while a price lasts, and what a second then costs.

    arrival (n,), s, ascending; phi (n_levels, n): seconds of its steps and price of its replica time, phi[0] without a
    price; work (n,): replica seconds that it needs at any pace; price, cost (n_levels,): of one second of work, and of
    a second of all replicas.
    """

    arrival: Floats
    phi: Floats
    work: Floats
    price: Floats
    cost: Floats


@compiled
def least_cost(load: Priced, i: int, start: Floats, level: Ints, b: int) -> float:
    """The bound (L6) for request i, which arrives in block b; block k lasts from start[k] to start[k + 1]."""
    arrival, low = load.arrival[i], level[b]
    least = max(load.phi[0, i], start[-1] - arrival)
    for k in range(b, len(level)):
        wait = max(start[k] - arrival, 0.0)
        if wait >= least:
            break
        # whoever ends in block k has waited for it, and has paid the least price since the arrival or more
        low = min(low, level[k])
        least = min(least, max(load.phi[low, i], wait + load.work[i] * load.price[low]))
    return float(least)


@compiled
def least_costs(load: Priced, start: Floats, level: Ints) -> Floats:
    """The bounds (L6) of all requests, shape (n,); start (n_blocks + 1,), level (n_blocks,)."""
    out, b = np.empty(len(load.arrival)), 0
    for i in range(len(out)):
        while b < len(level) - 1 and load.arrival[i] > start[b + 1]:
            b += 1
        out[i] = least_cost(load, i, start, level, b)
    return out


@compiled
def climb(load: Priced, start: Floats, level: Ints, sweeps: int) -> None:
    """Move the level of runs of blocks by one, from long runs to single blocks, as long as that raises the bound."""
    until = np.searchsorted(load.arrival, start[1:], side="right")
    for _ in range(sweeps):
        moved, size = False, len(level)
        while size > 0:
            for b in range(0, len(level), size):
                for step in (-1, 1):
                    while gain(load, start, level, until, b, min(b + size, len(level)), step) > 0:
                        level[b : b + size] = np.minimum(np.maximum(level[b : b + size] + step, 0), len(load.cost) - 1)
                        moved = True
            size //= 2
        if not moved:
            return


@compiled
def gain(load: Priced, start: Floats, level: Ints, until: Ints, b: int, end: int, step: int) -> float:
    """What the bound gains if the levels of blocks b, ..., end - 1 move by `step`; later requests do not see it."""
    changed, total = level.copy(), 0.0
    for k in range(b, end):
        changed[k] = min(max(level[k] + step, 0), len(load.cost) - 1)
        total += (load.cost[level[k]] - load.cost[changed[k]]) * (start[k + 1] - start[k])
    top = max(level.max(), changed.max())
    for k in range(end - 1, -1, -1):
        reach = 0.0
        for i in range(until[k - 1] if k > 0 else 0, until[k]):
            total += least_cost(load, i, start, changed, k) - least_cost(load, i, start, level, k)
            reach = max(reach, load.phi[top, i])
        if k < b and until[k] > (until[k - 1] if k > 0 else 0) and start[b] - start[k] > reach:
            break
    return float(total)
