"""Hindsight by chains and search: the best schedule found within a time limit, and a bound that certifies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Literal

import numpy as np

from formulations.batching_bounds import area_bound
from formulations.batching_chain import FIRST_STEP, ChainRelaxation, Multipliers, ascend
from formulations.batching_search import search
from formulations.batching_start import best_start
from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.rounds import Rounds

ROUNDING = 1e-6
WIDTHS = (3_000, 3_000, 30_000, 300_000, 2_000_000)
SEARCHED = 25  # requests; beyond, a search of any width that fits into minutes proves no more than its relaxation
SHARE_OF_START = 0.05
WARM_STEP = 0.2
LARGEST_TABLE = 60_000_000  # numbers; half a gigabyte
Kind = tuple[float, Literal[3, 4]]
FIRST: Kind = (0.4, 3)
THEN: Kind = (0.3, 4)


@dataclass(frozen=True, eq=False)
class Hindsight:
    """The best schedule known with hindsight, and what is proven of it.

    start: start rounds, shape (n,); latency: its total latency; bound: no schedule has less; seconds: wall-clock.
    """

    start: Ints
    latency: int
    bound: int
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """(latency - bound) / latency; 0 when proven best."""
        return max(self.latency - self.bound, 0.0) / max(self.latency, 1)


@dataclass(frozen=True)
class ExactHindsight:
    """Bound by chains, strike out completions that cannot beat the incumbent, search, repeat with more width.

    time_limit: seconds; iterations: subgradient steps before each search; widths: labels that a search keeps a layer.
    """

    time_limit: float = 60.0
    iterations: int = 300
    widths: tuple[int, ...] = WIDTHS
    name: str = "exact-hindsight"

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ScenarioError(f"time_limit is {self.time_limit:g} s; give a positive number of seconds")

    def solve(self, instance: Rounds, start: Ints | None = None) -> Hindsight:
        """The best schedule and bound within the time limit; `start` is a first schedule, else list rules give one."""
        begin = perf_counter()

        def stop() -> bool:
            return perf_counter() - begin > self.time_limit

        first = _annealed(instance, self.time_limit * SHARE_OF_START) if start is None else start
        state = _State(instance, first, area_bound(instance), permitted(instance, instance.horizon))
        state.tighten(FIRST, self.iterations, stop)
        for width in self.widths:
            if len(instance) <= SEARCHED:
                state.look(width, stop)
            state.tighten(THEN, self.iterations // 5, stop)
        return Hindsight(state.start, state.latency, state.whole_bound, perf_counter() - begin)


def _annealed(instance: Rounds, seconds: float) -> Ints:
    """Best of several annealed list schedules within some seconds, one at least."""
    begin, seed = perf_counter(), 0
    best = best_start(instance)
    while perf_counter() - begin < seconds:
        seed += 1
        best = min(best, best_start(instance, seed=seed), key=instance.latency)
    return best


def permitted(instance: Rounds, horizon: int) -> Bools:
    """Completions between arrival + output and the horizon, shape (n, horizon + 1)."""
    return np.arange(horizon + 1)[None, :] >= (instance.arrival + instance.output)[:, None]


class _State:
    """Incumbent, bound, completions that a better schedule may still use, and the best relaxation for them."""

    def __init__(self, instance: Rounds, start: Ints, bound: float, allowed: Bools) -> None:
        self.instance, self.start, self.bound, self.allowed = instance, start, bound, allowed
        self.latency = instance.latency(start)
        self.kind: Kind = FIRST
        self.at: Multipliers | None = None

    @property
    def proven(self) -> bool:
        """Whether no schedule has a smaller whole latency."""
        return self.whole_bound >= self.latency

    @property
    def whole_bound(self) -> int:
        """Latencies are whole numbers, so that the bound may be rounded up."""
        return min(ceil(self.bound - ROUNDING), self.latency)

    def relaxation(self) -> ChainRelaxation:
        """The tightest relaxation so far, over the completions that are left."""
        return ChainRelaxation(self.instance, self.allowed, *self.kind)

    def tighten(self, kind: Kind, iterations: int, stop: Callable[[], bool]) -> None:
        """Raise the bound by a relaxation, and strike out completions whose bound is above latency - 1."""
        relaxation = ChainRelaxation(self.instance, self.allowed, *kind)
        if self.proven or stop() or relaxation.table_size > LARGEST_TABLE:
            return
        self.kind = kind
        at = relaxation.adapted(self.at) if self.at else relaxation.start()
        length = WARM_STEP if self.at else FIRST_STEP
        value, self.at = ascend(relaxation, at, self.latency, iterations, stop, length)
        self.bound = max(self.bound, min(value, self.latency))
        self.strike(relaxation.completion_bounds(self.at))

    def strike(self, bounds: Floats) -> None:
        """Forget completions that no better schedule uses, and rounds after the last that is left."""
        self.allowed = self.allowed & (bounds <= self.latency - 1 + ROUNDING)
        used = np.flatnonzero(self.allowed.any(axis=0))
        self.allowed = self.allowed[:, : int(used[-1]) + 1 if len(used) else 1]

    def look(self, width: int, stop: Callable[[], bool]) -> None:
        """Search with the best relaxation; an improved incumbent or a better bound is kept."""
        if self.proven or stop() or self.at is None:
            return
        relaxation = self.relaxation()
        found = search(relaxation, relaxation.adapted(self.at), self.latency, width, stop)
        if found.start is not None:
            self.start, self.latency = found.start, self.instance.latency(found.start)
        self.bound = max(self.bound, min(found.bound, self.latency))
