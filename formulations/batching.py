"""Batch scheduling with hindsight: the time-indexed 0/1 program in rounds; equation numbers of README.md, "Batching".

The program is Jaillet et al.'s, tightened: starts only in the window that an incumbent leaves, equal requests in a
fixed order, and cliques of large requests that get into each other's way across rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from formulations.batching_bounds import area_bound
from llmopt.arrays import Ints
from llmopt.rounds import Rounds

START = "every request starts once"
MEMORY = "tokens held in the round fit into memory"
APART = "large requests do not complete too close to each other"
TWINS = "equal requests start in the order of their numbers"


@dataclass(frozen=True)
class TimeIndexed:
    """min sum_i (c_i - a_i) over (B5) (B6), tightened by (B8) if `cliques` and (B9); integers dropped if `relaxed`."""

    cliques: bool = True
    relaxed: bool = False
    name: str = "time-indexed"

    def build(self, instance: Rounds, start: Ints | None = None) -> Any:
        """The program; a feasible `start` narrows the windows to what may beat or match it, and is where x begins."""
        import pyomo.environ as pyo

        m = pyo.ConcreteModel(self.name)
        latest = windows(instance, None if start is None else instance.latency(start))
        keys = [(i, p) for i in range(len(instance)) for p in range(int(instance.arrival[i]), latest[i] + 1)]
        kind = pyo.UnitInterval if self.relaxed else pyo.Binary
        m.x = pyo.Var(keys, domain=kind, doc="whether request i starts at the end of round p")
        wait = (instance.output - instance.arrival).tolist()
        m.latency = pyo.Objective(expr=_linear([p + wait[i] for i, p in keys], list(m.x.values())))
        m.started = started(m, instance)
        m.memory = memory(m, instance)
        m.twins = twins(m, instance)
        if self.cliques:
            m.apart = apart(m, instance)
        if start is not None:
            for (i, p), x in m.x.items():
                x.set_value(int(start[i] == p))
        return m

    def extract(self, model: Any, instance: Rounds) -> Ints:
        """Start rounds of a solved model, shape (n,); of a relaxed one, the mean starts rounded down."""
        start = np.zeros(len(instance))
        for (i, p), x in model.x.items():
            start[i] += p * x.value
        return np.floor(start + 1e-6).astype(np.int64)


def windows(instance: Rounds, latency: int | None) -> Ints:
    """Latest start of each request in some optimal schedule, shape (n,); `latency` is that of a known schedule.

    Some optimal schedule is done by `instance.horizon`. And if i completes in round c, the others alone have at
    least the memory-area bound LB_i of the instance without i, so that c - a_i + LB_i cannot exceed `latency`.
    """
    latest = np.full(len(instance), instance.horizon)
    if latency is not None:
        others = np.array([area_bound(instance.part(np.arange(len(instance)) != i)) for i in range(len(instance))])
        latest = np.minimum(latest, np.floor(instance.arrival + latency - others + 1e-6).astype(np.int64))
    return np.asarray(latest - instance.output)


def started(m: Any, instance: Rounds) -> Any:
    """sum_p x_ip = 1.                                                                                          (B5)"""
    import pyomo.environ as pyo

    of_request: list[list[Any]] = [[] for _ in range(len(instance))]
    for (i, _), x in m.x.items():
        of_request[i].append(x)
    return pyo.Constraint(
        range(len(instance)), rule=lambda _, i: _linear([1.0] * len(of_request[i]), of_request[i]) == 1, doc=START
    )


def memory(m: Any, instance: Rounds) -> Any:
    """sum_i sum_{p = t - o_i}^{t - 1} (s_i + t - p) x_ip <= M   for every round t.                              (B6)"""
    rows: dict[int, list[tuple[int, Any]]] = {}
    for (i, p), x in m.x.items():
        for age in range(1, int(instance.output[i]) + 1):
            rows.setdefault(p + age, []).append((int(instance.prompt[i]) + age, x))
    return _rows(rows, instance.capacity, MEMORY)


def apart(m: Any, instance: Rounds) -> Any:
    """At most 1 is the sum of x_ip over large i that complete near tau, tau - e_i < c_i < tau + l_i.            (B8)

    For every half round tau, with l_i = P_i - M / 2 and e_i = min(P_i, M - max s) - M / 2 for P_i > M / 2. Two of them,
    c_i <= c_j < c_i + e_i + l_j, would hold P_i + P_j - (c_j - c_i) > M tokens in round c_i, in which j has started.
    """
    half, most = instance.capacity / 2, instance.capacity - int(instance.prompt.max(initial=0))
    rows: dict[int, list[tuple[int, Any]]] = {}
    for (i, p), x in m.x.items():
        peak, twice = int(instance.peak[i]), 2 * (p + int(instance.output[i]))
        if peak > half:
            late, early = 2 * (peak - half), 2 * (min(peak, most) - half)
            for tau in range(int(np.floor(twice - late)) + 1, int(np.ceil(twice + early))):
                rows.setdefault(tau, []).append((1, x))
    return _rows({tau: row for tau, row in rows.items() if len(row) > 1}, 1, APART)


def twins(m: Any, instance: Rounds) -> Any:
    """sum_p p x_ip <= sum_p p x_jp   for equal requests i < j, one after the other.                             (B9)"""
    import pyomo.environ as pyo

    order = np.lexsort((np.arange(len(instance)), instance.output, instance.prompt, instance.arrival))
    key = np.stack([instance.arrival, instance.prompt, instance.output])
    same = (key[:, order[1:]] == key[:, order[:-1]]).all(axis=0)
    pairs = list(zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True))
    mean: dict[int, tuple[list[float], list[Any]]] = {i: ([], []) for pair in pairs for i in pair}
    for (i, p), x in m.x.items():
        if i in mean:
            mean[i][0].append(float(p))
            mean[i][1].append(x)
    return pyo.Constraint(pairs, rule=lambda _, i, j: _linear(*mean[i]) - _linear(*mean[j]) <= 0, doc=TWINS)


def _rows(rows: dict[int, list[tuple[int, Any]]], most: int, sentence: str) -> Any:
    import pyomo.environ as pyo

    linear = {t: _linear([float(c) for c, _ in row], [x for _, x in row]) for t, row in sorted(rows.items())}
    return pyo.Constraint(list(linear), rule=lambda _, t: linear[t] <= most, doc=sentence)


def _linear(coefficients: list[float], variables: list[Any]) -> Any:
    """sum_k a_k v_k as one expression, which Pyomo builds and compiles faster than a sum of products."""
    from pyomo.core.expr import LinearExpression

    return LinearExpression(constant=0, linear_coefs=coefficients, linear_vars=variables)
