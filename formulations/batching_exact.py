"""Hindsight by chains and search: the best schedule found within a time limit, and a bound that certifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

from formulations.batching_bounds import area_bound
from formulations.batching_chain import ChainRelaxation, Multipliers, ascend
from formulations.batching_search import search
from formulations.batching_start import Annealer, best_start
from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.rounds import Rounds

ROUNDING = 1e-6
WIDTHS = (3_000, 3_000, 30_000, 300_000, 2_000_000)
SEARCHED = 25  # requests; beyond, a search of any width that fits into minutes proves no more than its relaxation
FIRST_RUN = 50_000
RUN = 0.3  # of the time limit, a run of annealing
LARGEST_TABLE = 60_000_000  # numbers; half a gigabyte


class Stage(NamedTuple):
    """A relaxation, `ChainRelaxation`(threshold, length, sawtooth), and how far and with which first step to climb."""

    threshold: float
    length: Literal[3, 4]
    sawtooth: bool
    iterations: int
    step: float


CLIMB = (Stage(0.4, 3, False, 200, 0.5), Stage(0.4, 3, True, 400, 0.08))
THEN = Stage(0.3, 4, True, 60, 0.04)


@dataclass(frozen=True, eq=False)
class Hindsight:
    """The best schedule known with hindsight, and what is proven of it.

    start: start rounds, shape (n,); latency: its total latency; bound: no schedule has less; seconds: by the clock.
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

    time_limit: seconds by `clock`, which may be `time.thread_time` on a busy machine; climb: stages before the first
    search; then: the stage after each search; widths: labels that a search keeps a layer. A second core anneals
    schedules meanwhile.
    """

    time_limit: float = 60.0
    climb: tuple[Stage, ...] = CLIMB
    then: Stage = THEN
    widths: tuple[int, ...] = WIDTHS
    clock: Callable[[], float] = perf_counter
    name: str = "exact-hindsight"

    def __post_init__(self) -> None:
        if not 0 < self.time_limit < float("inf"):
            raise ScenarioError(f"time_limit is {self.time_limit:g} s; give a positive number of seconds")

    def solve(self, instance: Rounds, start: Ints | None = None) -> Hindsight:
        """The best schedule and bound within the time limit; `start` is a first schedule, else list rules give one."""
        begin = self.clock()

        def stop() -> bool:
            return self.clock() - begin > self.time_limit

        first = best_start(instance, FIRST_RUN) if start is None else start
        state = _State(instance, first, area_bound(instance), permitted(instance, instance.horizon))
        with Annealer(instance, first, RUN * self.time_limit) as annealer:
            for stage in self._stages(state):
                state.adopt(annealer.best)
                if state.proven or stop():
                    break
                state.look(stage, stop) if isinstance(stage, int) else state.tighten(stage, stop)
            if state.at is None and not state.proven:  # no relaxation fits into memory; schedules can still be improved
                annealer.wait(RUN * self.time_limit)
        state.adopt(annealer.best)
        return Hindsight(state.start, state.latency, state.whole_bound, self.clock() - begin)

    def _stages(self, state: _State) -> Iterator[Stage | int]:
        """What to climb, and how wide to search; without a search, climb on until the time is up."""
        climb = [stage for stage in (*self.climb, self.then) if state.fits(stage)]
        yield from climb[: len(self.climb)]
        if len(state.instance) <= SEARCHED:
            for width in self.widths:
                yield width
                yield from climb[len(self.climb) :]
        while climb and len(state.instance) > SEARCHED:
            yield climb[-1]._replace(iterations=self.then.iterations, step=self.then.step)


def permitted(instance: Rounds, horizon: int) -> Bools:
    """Completions between arrival + output and the horizon, shape (n, horizon + 1)."""
    return np.arange(horizon + 1)[None, :] >= (instance.arrival + instance.output)[:, None]


class _State:
    """Incumbent, bound, completions that a better schedule may still use, and the best relaxation for them."""

    def __init__(self, instance: Rounds, start: Ints, bound: float, allowed: Bools) -> None:
        self.instance, self.start, self.bound, self.allowed = instance, start, bound, allowed
        self.latency = instance.latency(start)
        self.stage = CLIMB[0]
        self.at: Multipliers | None = None

    @property
    def proven(self) -> bool:
        """Whether no schedule has a smaller whole latency."""
        return self.whole_bound >= self.latency

    @property
    def whole_bound(self) -> int:
        """Latencies are whole numbers, so that the bound may be rounded up."""
        return min(ceil(self.bound - ROUNDING), self.latency)

    def relaxation(self, stage: Stage) -> ChainRelaxation:
        """The relaxation of a stage over the completions that are left."""
        return ChainRelaxation(self.instance, self.allowed, *stage[:3])

    def fits(self, stage: Stage) -> bool:
        """Whether the tables of a stage fit into memory."""
        return self.relaxation(stage).table_size <= LARGEST_TABLE

    def adopt(self, start: Ints) -> None:
        """Keep a better schedule."""
        if self.instance.latency(start) < self.latency:
            self.start, self.latency = start, self.instance.latency(start)

    def tighten(self, stage: Stage, stop: Callable[[], bool]) -> None:
        """Raise the bound by a relaxation, and strike out completions whose bound is above latency - 1."""
        relaxation = self.relaxation(stage)
        self.stage = stage
        at = relaxation.adapted(self.at) if self.at else relaxation.start()
        value, self.at = ascend(relaxation, at, self.latency, stage.iterations, stop, stage.step)
        self.bound = max(self.bound, min(value, self.latency))
        self.strike(relaxation.completion_bounds(self.at))

    def strike(self, bounds: Floats) -> None:
        """Forget completions that no better schedule uses, and rounds after the last that is left."""
        self.allowed = self.allowed & (bounds <= self.latency - 1 + ROUNDING)
        used = np.flatnonzero(self.allowed.any(axis=0))
        self.allowed = self.allowed[:, : int(used[-1]) + 1 if len(used) else 1]

    def look(self, width: int, stop: Callable[[], bool]) -> None:
        """Search with the best relaxation; an improved incumbent or a better bound is kept."""
        if self.at is None:
            return
        relaxation = self.relaxation(self.stage)
        found = search(relaxation, relaxation.adapted(self.at), self.latency, width, stop)
        if found.start is not None:
            self.adopt(found.start)
        self.bound = max(self.bound, min(found.bound, self.latency))
