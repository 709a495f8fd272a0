"""The fluid model: backlog per class and pool under any routing rule; equations and limits in docs/fluid.md.

Requests are a liquid. Replica j runs r_cj requests of class c; a step lasts

    tau_j = kappa_j max_i ( a_ij + sum_c r_cj w_ijc / L_cj ),

a request leaves after L_cj steps on average, and running requests hold sum_c r_cj u_Rjc / L_cj of resource R. Arrivals
are admitted at once while every resource is below its cap, else as fast as departures allow, in proportion to what
waits. In equilibrium this is (1) of `llmopt.stability`, row by row, with kappa_j the step-mean correction
(`llmopt.capacity`) at the class mix that the pool receives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.fluid_route import Instant, Spread, spread_of
from llmopt.evaluate.fluid_state import Cells
from llmopt.evaluate.growth import Growth, growth
from llmopt.plan import Plan, Router, check_plan
from llmopt.scenario import Scenario
from llmopt.stability import stability_rows

STEPS = 600
"""Time steps of a run; more where the arrival profile has short pieces, up to `MOST_STEPS`."""

MOST_STEPS = 2400
SETTLE = 2.0
"""Horizons at the mean rate that follow the run, twice: first the backlog may settle, then it is judged."""

REMIX = 25
"""Time steps between two looks at the class mix of a pool."""


@dataclass(frozen=True)
class FluidRun:
    """A fluid run over [0, horizon] and what becomes of it.

    times (n_t,) s; backlog (n_t, n_pools) and by_class (n_t, n_classes): requests waiting; fractions (n_classes,
    n_pools): the split that came about. After the horizon arrivals go on at their mean rate, and once the backlog had
    time to settle: load (n_pools,): estimated load under the split that lasts; growth: of the fastest growing pool;
    stable: whether it is none; drain_time: seconds from the horizon until the backlog is at its lasting level (0 if it
    never was above it, inf if unstable).
    """

    times: Floats
    backlog: Floats
    by_class: Floats
    load: Floats
    fractions: Floats
    growth: Growth
    drain_time: float
    stable: bool


def evaluate_fluid(scenario: Scenario, plan: Plan, horizon: float | None = None) -> FluidRun:
    """Play `plan` in the fluid model for `horizon` s of arrivals (the evaluation's if absent), from empty.

    Raises
    ------
    PolicyError
        If the plan does not fit the scenario, or its rule returns no replica that can hold the request.
    """
    plan = check_plan(plan, scenario)
    scenario = plan.batcher.served(scenario)
    span = scenario.evaluation.horizon if horizon is None else horizon
    cells = Cells.of(scenario, one_by_one=not isinstance(plan.router, Router))
    tank = _Tank(cells, spread_of(plan, scenario, cells))
    arrivals = arriving(scenario, span)
    rates = arrivals.sum(axis=0) / _covered(scenario, span)
    cells.slowdown.guess(rates[:, None] * _first_split(scenario, plan))
    run = tank.fill(arrivals, span / len(arrivals))
    dt = span * SETTLE / STEPS
    mean = np.tile(rates * dt, (STEPS, 1))
    after, late = tank.fill(mean, dt), tank.fill(mean, dt)
    fractions, lasting = (_split(_by_pool(part.sent, cells)) for part in (run, late))
    waiting = _by_pool(run.waiting, cells)
    verdict = _fastest(late.times, _by_pool(late.waiting, cells).sum(axis=1), float(rates.sum()))
    return FluidRun(
        times=run.times,
        backlog=waiting.sum(axis=1),
        by_class=waiting.sum(axis=2),
        load=_loads(scenario, cells, rates[:, None] * lasting),
        fractions=fractions,
        growth=verdict,
        drain_time=_drained(after, late) if verdict.stable else float("inf"),
        stable=verdict.stable,
    )


def arriving(scenario: Scenario, horizon: float) -> Floats:
    """Requests of each class in each of n equal time steps up to `horizon` s, shape (n, n_classes)."""
    work = scenario.workload
    if work.replay is not None:
        requests = work.sample(horizon, 0)
        table = np.zeros((STEPS, len(work.classes)))
        step = np.minimum((requests.arrival / horizon * STEPS).astype(int), STEPS - 1)
        np.add.at(table, (step, requests.cls), 1.0)
        return table
    starts, factors = work.arrivals.profile(horizon)
    starts, factors = starts[starts < horizon], factors[starts < horizon]
    ends = np.append(starts, horizon)
    n = int(np.clip(2 * horizon / np.diff(ends).min(), STEPS, MOST_STEPS))
    clock = np.concatenate([[0.0], np.cumsum(factors * np.diff(ends))])
    return np.outer(np.diff(np.interp(np.linspace(0, horizon, n + 1), ends, clock)), work.rates)


def _covered(scenario: Scenario, horizon: float) -> float:
    """Seconds up to `horizon` in which requests arrive: a trace may end earlier."""
    work = scenario.workload
    return min(horizon, len(work.replay) / work.total_rate) if work.replay is not None else horizon


@dataclass(frozen=True)
class _Run:
    """times (n + 1,); waiting (n + 1, n_classes, n_cells) requests in all replicas; sent (n_classes, n_cells)."""

    times: Floats
    waiting: Floats
    sent: Floats


class _Tank:
    """The state of the fluid: requests that wait and run per replica, shapes (n_classes, n_cells)."""

    def __init__(self, cells: Cells, spread: Spread) -> None:
        self.cells, self.spread = cells, spread
        self.waiting, self.running = np.zeros(cells.shape), np.zeros(cells.shape)
        self.time = 0.0

    def fill(self, arrivals: Floats, dt: float) -> _Run:
        """Let `arrivals` (n, n_classes) come in steps of `dt` s."""
        waiting = np.empty((len(arrivals) + 1, *self.cells.shape))
        waiting[0] = self.waiting
        sent, before = np.zeros(self.cells.shape), np.zeros(self.cells.shape)
        for k, amount in enumerate(arrivals):
            sent += self.step(amount, dt)
            waiting[k + 1] = self.waiting
            if k % REMIX == REMIX - 1:
                self.cells.slowdown.update(sent - before)
                before = sent.copy()
        times = np.linspace(0.0, len(arrivals) * dt, len(arrivals) + 1)
        return _Run(times, waiting * self.cells.replicas, sent)

    def step(self, amount: Floats, dt: float) -> Floats:
        """One time step; returns where `amount` (n_classes,) went, shape (n_classes, n_cells).

        What is admitted comes evenly over the step and leaves exponentially, so that any `dt` keeps mass and capacity.
        """
        cells = self.cells
        life = cells.steps * cells.step_time(self.running)
        stay = self.running * np.exp(-dt / life)
        kept = -np.expm1(-dt / life) * life / dt
        room = 1.0 - cells.use(stay)
        part = _admitted(room, cells.use(self.waiting * kept))
        left = self.waiting * (1.0 - part)
        more = np.where((part < 1.0)[:, None, None], cells.waiting, cells.running * kept.T[:, :, None])
        seen = cells.features(left, stay + self.waiting * part * kept)
        flows = self.spread(Instant(self.time, amount, seen, more))
        queue = self.waiting + flows / cells.replicas
        part = _admitted(room, cells.use(queue * kept))
        self.waiting, self.running = queue * (1.0 - part), stay + queue * part * kept
        self.time += dt
        return np.asarray(flows)


def _admitted(room: Floats, need: Floats) -> Floats:
    """Largest part of the queue of each cell whose `need` (n_cells, 3) fits into `room`, shape (n_cells,)."""
    fits = np.where(need > room, room / np.maximum(need, 1e-300), 1.0)
    return np.asarray(np.clip(fits.min(axis=1), 0.0, 1.0))


def _by_pool(table: Floats, cells: Cells) -> Floats:
    """Sum the last axis, cells, over the cells of each pool."""
    starts = np.flatnonzero(np.diff(cells.pool, prepend=-1))
    return np.asarray(np.add.reduceat(table, starts, axis=-1))


def _split(sent: Floats) -> Floats:
    """Fractions of what was sent; a class without arrivals is spread evenly, which loads nothing."""
    total = sent.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, sent / np.maximum(total, 1e-300), 1.0 / sent.shape[1]))


def _first_split(scenario: Scenario, plan: Plan) -> Floats:
    """The plan's fractions, or every pool that can hold the class, shape (n_classes, n_pools)."""
    return np.array(scenario.allowed, dtype=float) if plan.fractions is None else plan.fractions


def _loads(scenario: Scenario, cells: Cells, rates: Floats) -> Floats:
    """Largest row (1) of each pool, times the slowdown at which its cells ended; `rates` (n_classes, n_pools)."""
    rows = [r.loads(column).max() for r, column in zip(stability_rows(scenario), rates.T, strict=True)]
    return np.asarray(rows * _by_pool(cells.slowdown.factor, cells) / np.bincount(cells.pool))


def _fastest(times: Floats, backlog: Floats, rate: float) -> Growth:
    """Growth of the fastest growing pool; backlog (n_t, n_pools)."""
    return max((growth(times, column, rate) for column in backlog.T), key=lambda g: g.relative)


def _drained(after: _Run, late: _Run) -> float:
    """When the backlog after the horizon has lost 99 % of its excess over its last value, s."""
    times = np.concatenate([after.times, after.times[-1] + late.times])
    backlog = np.concatenate([after.waiting, late.waiting]).sum(axis=(1, 2))
    level = backlog[-1] + 0.01 * max(backlog[0] - backlog[-1], 0.0) + 1e-6
    return float(times[int(np.argmax(backlog <= level))])
