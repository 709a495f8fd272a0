"""Batch scheduling whose steps take as long as their batch: a program for small instances, and the score of any.

Requests run from their start to their end without a pause, the whole prompt in the first step. It emits the first
token, so that o steps make o tokens, and the schedule is given by the step after which each request starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from formulations.batching import memory, started
from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.rounds import Rounds

LASTS = "a step takes its time on every piece"
ARRIVED = "a request starts after its arrival"
WAITS = "who is unfinished waits for the step"
ALONE = "an unfinished request waits for at least its own work"


@dataclass(frozen=True, eq=False)
class TimedInstance:
    """Lengths and memory in `rounds` (its arrivals are not used), step time, and arrivals in s, shape (n,).

    Raises
    ------
    ScenarioError
        If there is not one finite arrival, at least 0, for each request.
    """

    rounds: Rounds
    stepper: StepTime
    arrival: Floats

    def __post_init__(self) -> None:
        arrival = np.asarray(self.arrival, dtype=float)
        if arrival.shape != (len(self.rounds),) or not np.isfinite(arrival).all() or (arrival < 0).any():
            raise ScenarioError("timed instance: give one finite arrival in s, at least 0, for each request")
        object.__setattr__(self, "arrival", arrival)

    @classmethod
    def together(cls, rounds: Rounds, stepper: StepTime) -> TimedInstance:
        """All requests at 0."""
        return cls(rounds, stepper, np.zeros(len(rounds)))

    @cached_property
    def steps(self) -> int:
        """Steps that some best schedule needs at most: none of them is empty."""
        return int(self.rounds.output.sum())


@dataclass(frozen=True, eq=False)
class Timed:
    """A schedule with its times: step_time (n_steps,), s, 0 where nothing runs; finish (n,), s; latency: their sum."""

    step_time: Floats
    finish: Floats
    latency: float


def evaluated(instance: TimedInstance, start: Ints) -> Timed:
    """When a schedule in rounds is done if its steps take their time; O(n + number of rounds).

    A round becomes a step that begins when the step before it has ended and all that start in it have arrived. With
    all at 0 these are the times of an engine that admits in these rounds; rounds without requests take no time.
    """
    s, o = instance.rounds.prompt, instance.rounds.output
    p = np.asarray(start, dtype=np.int64)
    horizon = int((p + o).max(initial=0))

    def at(step: Ints, value: Any) -> Floats:
        return np.bincount(step - 1, np.broadcast_to(value, p.shape).astype(float), horizon + 1)[: horizon + 1].astype(
            float
        )

    prefill, pairs = at(p + 1, s), at(p + 1, s * s / 2)
    # request i decodes in steps p + 2, ..., p + o and reads s + t - p - 2 tokens in step t
    decode = np.cumsum(at(p + 2, 1) - at(p + o + 1, 1)) if len(p) else prefill
    offset = np.cumsum(at(p + 2, s - p - 2) - at(p + o + 1, s - p - 2)) if len(p) else prefill
    read = offset + decode * np.arange(1, horizon + 2)
    busy = at(p + 1, 1) + decode > 0
    lasts = np.where(busy, instance.stepper.many(np.column_stack([prefill, decode, read, pairs])), 0.0)[:horizon]
    done = np.concatenate([[0.0], np.cumsum(lasts)])
    allowed = np.zeros(horizon + 1)
    np.maximum.at(allowed, p, instance.arrival)
    finish = done[p + o] + np.maximum.accumulate(allowed - done)[p + o - 1]
    return Timed(lasts, finish, float((finish - instance.arrival).sum()))


@dataclass(frozen=True)
class TimedSchedule:
    """min sum_i (C_i - a_i), steps lasting T_t >= a_k + b_k P_t + c_k D_t + d_k K_t + e_k Q_t on every piece k (B13).

    Exact for one replica, whole prefills, first tokens by prefill, no pause and no preemption, and memory counted as
    in rounds, s + k tokens in the k-th step. A step begins W_t >= 0 s after the one before it. With x_ip = 1 if i
    starts after step p and u_it = 1 - sum_{p + o_i < t} x_ip, 1 while i is unfinished,

        sum_i C_i  =  sum_it v_it,   v_it = u_it (W_t + T_t)  >=  W_t + T_t - B (1 - u_it)                      (B14)

    where B is at least the longest possible W_t + T_t. The product is exact at whole x since v is minimised. For
    some ten steps: the number of v grows with n times the sum of outputs.
    """

    name: str = "timed-schedule"

    def build(self, instance: TimedInstance, start: Ints | None = None) -> Any:
        """The program; a feasible `start` is where x begins."""
        import pyomo.environ as pyo

        m = pyo.ConcreteModel(self.name)
        rounds, steps = instance.rounds, instance.steps
        keys = [(i, p) for i in range(len(rounds)) for p in range(steps - int(rounds.output[i]) + 1)]
        m.x = pyo.Var(keys, domain=pyo.Binary, doc="whether request i starts after step p")
        m.step = pyo.RangeSet(1, steps)
        m.lasts = pyo.Var(m.step, domain=pyo.NonNegativeReals, doc="T_t, s")
        m.idle = pyo.Var(m.step, domain=pyo.NonNegativeReals, doc="W_t, s")
        m.wait = pyo.Var(range(len(rounds)), m.step, domain=pyo.NonNegativeReals, doc="v_it, s")
        m.latency = pyo.Objective(expr=pyo.quicksum(m.wait.values()) - float(instance.arrival.sum()))
        m.started = started(m, rounds)
        m.memory = memory(m, rounds)
        _times(m, instance)
        if start is not None:
            for (i, p), x in m.x.items():
                x.set_value(int(start[i] == p))
        return m

    def extract(self, model: Any, instance: TimedInstance) -> Ints:
        """Start of each request of a solved model, shape (n,)."""
        start = np.zeros(len(instance.rounds), dtype=np.int64)
        for (i, p), x in model.x.items():
            start[i] += p * round(x.value)
        return start


def _times(m: Any, instance: TimedInstance) -> None:
    """(B13) on every piece, and (B14) with what it implies for single requests."""
    import pyomo.environ as pyo

    n, pieces = len(instance.rounds), instance.stepper.coefficients
    longest = _longest_step(instance) + float(instance.arrival.max(initial=0.0))
    unfinished = {(i, t): _unfinished(m, instance, i, t) for i in range(n) for t in m.step}
    own = {(i, t): _features(m, instance, i, t) for i in range(n) for t in m.step}

    def lasts(m: Any, t: int, k: int, i: int) -> Any:
        work = pyo.quicksum(float(c) * own[j, t][f] for j in range(n) for f, c in enumerate(pieces[k, 1:]) if c)
        return m.lasts[t] >= float(pieces[k, 0]) * unfinished[i, t] + work

    def alone(m: Any, i: int, t: int, k: int) -> Any:
        work = pyo.quicksum(float(c) * own[i, t][f] for f, c in enumerate(pieces[k, 1:]) if c)
        return m.wait[i, t] >= float(pieces[k, 0]) * unfinished[i, t] + work

    # the base of a step is charged while anybody is unfinished, for then the steps of a best schedule are not empty
    m.duration = pyo.Constraint(m.step, range(len(pieces)), range(n), rule=lasts, doc=LASTS)
    m.alone = pyo.Constraint(range(n), m.step, range(len(pieces)), rule=alone, doc=ALONE)
    m.product = pyo.Constraint(
        range(n),
        m.step,
        rule=lambda m, i, t: m.wait[i, t] >= m.idle[t] + m.lasts[t] - longest * (1 - unfinished[i, t]),
        doc=WAITS,
    )
    m.arrived = pyo.Constraint(
        [(i, p) for i, p in m.x if instance.arrival[i] > 0],
        rule=lambda m, i, p: (
            pyo.quicksum(m.idle[t] + m.lasts[t] for t in range(1, p + 1)) + m.idle[p + 1]
            >= float(instance.arrival[i]) * m.x[i, p]
        ),
        doc=ARRIVED,
    )


def _unfinished(m: Any, instance: TimedInstance, i: int, t: int) -> Any:
    """u_it = 1 - sum_{p + o_i < t} x_ip."""
    import pyomo.environ as pyo

    return 1 - pyo.quicksum(m.x[i, p] for p in range(t - int(instance.rounds.output[i])))


def _features(m: Any, instance: TimedInstance, i: int, t: int) -> tuple[Any, Any, Any, Any]:
    """P, D, K and Q of request i in step t, linear in its starts."""
    import pyomo.environ as pyo

    s, o = int(instance.rounds.prompt[i]), int(instance.rounds.output[i])
    last = instance.steps - o
    first = m.x[i, t - 1] if t - 1 <= last else 0
    ages = [(p, t - p) for p in range(max(t - o, 0), min(t - 2, last) + 1)]
    decode = pyo.quicksum(m.x[i, p] for p, _ in ages)
    read = pyo.quicksum((s + age - 2) * m.x[i, p] for p, age in ages)
    return s * first, decode, read, s * s / 2 * first


def _longest_step(instance: TimedInstance) -> float:
    """An upper bound on the time of any step that fits into memory, s."""
    s, capacity = instance.rounds.prompt.astype(float), float(instance.rounds.capacity)
    most = np.array([1.0, min(s.sum(), capacity), min(len(s), capacity), min(capacity, instance.rounds.peak.sum()), 0])
    most[4] = (s * s).sum() / 2
    return float((instance.stepper.coefficients @ most).max())
