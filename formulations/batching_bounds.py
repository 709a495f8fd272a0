"""Certified lower bounds on total latency that need no search: the memory-area bound and a linear program on a grid.

Both forget that requests are whole and keep how much memory time they need; numbers refer to README.md, "Batching".
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.rounds import Rounds

SPLITS = 10


@dataclass(frozen=True, eq=False)
class Fluid:
    """The preemptive schedule that serves small volumes first, M tokens a round, and what it proves.

    mean_round: mean round in which the token-rounds of request i are served, shape (n,); served: pieces of the
    schedule as (request, from, to) in token-rounds from the start, round t being [(t - 1) M, t M).
    """

    mean_round: Floats
    served: tuple[tuple[int, int, int], ...]


def area_bound(instance: Rounds) -> float:
    """A lower bound on the total latency of every schedule in O(n log n), by equation (B2).

    Requests that the fluid schedule would serve in less time than their output takes count with their output instead,
    and the others are bounded again without them; any such split is valid, and the best of a few counts.
    """
    counted, best = np.ones(len(instance), dtype=bool), 0.0
    for _ in range(SPLITS):
        part = instance.part(counted)
        latency = fluid(part).mean_round + _lag(part) - part.arrival
        best = max(best, float(latency.sum() + instance.output[~counted].sum()))
        if (latency >= part.output).all():
            break
        counted[counted] = latency >= part.output
    return max(best, float(instance.output.sum()))


def fluid(instance: Rounds) -> Fluid:
    """Serve, at any moment, the arrived request of smallest volume; preempt when a smaller one arrives.

    Of all ways to serve vol_i token-rounds each after a_i, at most M a round, this one has the least sum of mean
    rounds (Goemans' preemptive schedule for mean busy dates); with all at round 0 it is the greedy by volume.
    """
    volume, moment, capacity = instance.volume, np.zeros(len(instance)), instance.capacity
    left = volume.tolist()
    pieces: list[tuple[int, int, int]] = []
    for i, begin, end in _pieces(instance, left):
        moment[i] += _moment(end, capacity) - _moment(begin, capacity)
        pieces.append((i, begin, end))
    return Fluid(moment / np.maximum(volume, 1), tuple(pieces))


def _pieces(instance: Rounds, left: list[int]) -> list[tuple[int, int, int]]:
    """Pieces (request, from, to) of the preemptive schedule; `left` is emptied."""
    order = np.argsort(instance.arrival, kind="stable").tolist()
    opens = (instance.arrival * instance.capacity).tolist()
    waiting: list[tuple[int, int]] = []
    pieces, now, k = [], 0, 0
    while k < len(order) or waiting:
        if not waiting:
            now = max(now, opens[order[k]])
        while k < len(order) and opens[order[k]] <= now:
            heappush(waiting, (int(instance.volume[order[k]]), order[k]))
            k += 1
        i = waiting[0][1]
        end = min(now + left[i], opens[order[k]]) if k < len(order) else now + left[i]
        pieces.append((i, now, end))
        left[i] -= end - now
        now = end
        if not left[i]:
            heappop(waiting)
    return pieces


def _moment(area: int, capacity: int) -> int:
    """g(x): sum of the rounds in which the first x token-rounds are served, M a round."""
    full, rest = divmod(area, capacity)
    return capacity * full * (full + 1) // 2 + rest * (full + 1)


def _lag(instance: Rounds) -> Floats:
    """delta_i = sum_k (s_i + k) (o_i - k) / vol_i, from the centroid of a request's memory to its completion."""
    s, o = instance.prompt.astype(float), instance.output.astype(float)
    return np.asarray(((s * o * (o - 1) / 2) + (o - 1) * o * (o + 1) / 6) / instance.volume)


def memory_prices(instance: Rounds, horizon: int) -> Floats:
    """mu_t, what a token of memory in round t is worth to the fluid schedule, shape (horizon + 1,).

    The price falls by 1 / vol_i a round while request i is served, and is 0 at the end: the dual of (B1).
    """
    slope = np.zeros(horizon + 1)
    for i, begin, end in fluid(instance).served:
        first, last = begin // instance.capacity + 1, min(end // instance.capacity + 1, horizon)
        slope[first : last + 1] += (end - begin) / (last - first + 1 or 1) / instance.volume[i] / instance.capacity
    prices = np.cumsum(slope[::-1])[::-1] - slope / 2
    prices[0] = 0.0
    return np.asarray(prices)


def round_down(instance: Rounds, grid: float, block: int) -> tuple[Ints, Ints]:
    """Class of each request, shape (n,), and what its members have at least: (prompt, output, arrival), (n_classes, 3).

    Prompts and outputs are rounded down to powers of 1 + `grid`, arrivals to the beginning of a block. Every schedule
    of the true requests is one of the rounded ones with the same starts, so that the rounded instance is a relaxation.
    """
    early = instance.arrival // block * block
    table = np.stack([_down(instance.prompt, grid), _down(instance.output, grid), early], axis=1)
    members, cls = np.unique(table, axis=0, return_inverse=True)
    return cls.reshape(-1), members


def _down(values: Ints, grid: float) -> Ints:
    """Largest whole number of the form ceil((1 + grid)^k) that is not above the value; 0 stays 0."""
    steps = [1]
    while steps[-1] <= values.max(initial=1):
        steps.append(max(steps[-1] + 1, int(np.ceil(steps[-1] * (1 + grid)))))
    ladder = np.array(steps)
    return np.where(values > 0, ladder[np.searchsorted(ladder, np.maximum(values, 1), side="right") - 1], 0)


@dataclass(frozen=True)
class CoarseRelaxation:
    """min latency when starts are known to `block` rounds only and memory counts from the beginning, (B3) (B4).

    With `grid` = 0 the value V of this linear program and the value V_1 at block = 1 satisfy
    V <= V_1 <= V + n (2 block - 1), and V_1 is below the time-indexed relaxation. A positive `grid` rounds lengths
    down to powers of 1 + grid and counts alike requests together, for instances of many thousand requests.
    """

    block: int = 1
    grid: float = 0.0
    name: str = "coarse-relaxation"

    def build(self, instance: Rounds) -> Any:
        """A CVXPY problem over y_kb, how many requests of class k start in block b."""
        import cvxpy as cp
        from scipy import sparse

        cls, members = round_down(instance, self.grid, self.block) if self.grid else _each(instance)
        count = np.bincount(cls, minlength=len(members))
        blocks = _horizon(instance) // self.block + 1
        k, b = _starts(members, self.block, blocks)
        y = cp.Variable(len(k), nonneg=True, name="y")
        start = np.maximum(b * self.block, members[k, 2])
        serves = sparse.csr_array((np.ones(len(k)), (k, np.arange(len(k)))), shape=(len(members), len(k)))
        room = instance.capacity * self.block * np.arange(1, blocks + 1)
        rows = [
            (serves @ y == count).set_label("served"),
            (self._area(members, k, b, blocks) @ y <= room).set_label("memory"),
        ]
        problem: Any = cp.Problem(cp.Minimize(start @ y + int((instance.output - instance.arrival).sum())), rows)
        problem.name = self.name
        return problem

    def _area(self, members: Ints, k: Ints, b: Ints, blocks: int) -> Any:
        """V_k(K block - p) at the last start p of block b, for K = 1, 2, ...; sparse (n_blocks, n_columns).     (B4)

        The last block stands for all later starts as well, which use no memory before the horizon.
        """
        from scipy import sparse

        row, column = np.nonzero((np.arange(blocks)[:, None] >= b[None, :]) & (b[None, :] < blocks - 1))
        age = np.minimum((row - b[column]) * self.block + 1, members[k[column], 1])
        value = members[k[column], 0] * age + age * (age + 1) // 2
        return sparse.csr_array((value.astype(float), (row, column)), shape=(blocks, len(k)))


def _each(instance: Rounds) -> tuple[Ints, Ints]:
    table = np.stack([instance.prompt, instance.output, instance.arrival], axis=1)
    return np.arange(len(instance)), table


def _horizon(instance: Rounds) -> int:
    """Some rounds after the fluid schedule has ended; no start needs to be told apart later."""
    ends = fluid(instance).served[-1][2] // instance.capacity if len(instance) else 0
    return int(min(instance.horizon, ends + 2 * instance.output.max(initial=0))) + 1


def _starts(members: Ints, block: int, blocks: int) -> tuple[Ints, Ints]:
    """Class and block of each column, from the block of the arrival to the last one."""
    first = np.minimum(members[:, 2] // block, blocks - 1)
    k = np.repeat(np.arange(len(members)), blocks - first)
    b = np.concatenate([np.arange(f, blocks) for f in first])
    return k, b
