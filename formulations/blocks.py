"""Constraints that routing programs share; one function each, its equation as docstring, numbered as in README.md.

Symbols: c class, j pool, i piece, R resource; lambda_c rate, x_cj fraction, n_j replicas (or the part of them that
the program grants), w work, a base, u occupancy. The first half speaks Pyomo, the second half CVXPY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from formulations.data import RoutingData, Row
from formulations.search import Routing
from llmopt.arrays import Floats
from llmopt.errors import Infeasible

SERVED = "every request of the class is served"
STABLE = "the pool can be stable"
_ROUNDING = 1e-7
ESTIMATED = "the pool is stable by the step-mean estimate"


def fractions(data: RoutingData) -> Any:
    """x_cj >= 0, only for pools that hold the largest request of the class.                                     (2)"""
    import pyomo.environ as pyo

    return pyo.Var(data.pairs, bounds=(0, None), doc="fraction of the class sent to the pool")


def served(m: Any, data: RoutingData, total: Any) -> Any:
    """sum_j x_cj = total, which is 1, or the margin theta when all arrivals are scaled.                         (3)"""
    import pyomo.environ as pyo

    of_class: dict[str, list[Any]] = {name: [] for name in data.classes}
    for (cls, _), x in m.x.items():
        of_class[cls].append(x)
    ones = {cls: _linear([1.0] * len(xs), xs) for cls, xs in of_class.items()}
    return pyo.Constraint(data.classes, rule=lambda _, cls: ones[cls] == total, doc=SERVED)


def stability(m: Any, data: RoutingData, count: Sequence[Any], sentence: str = STABLE) -> Any:
    """sum_c lambda_c x_cj ( w_ijc + a_ij u_Rjc / cap_Rj ) <= n_j   for every piece i and resource R of pool j.   (1)"""
    import pyomo.environ as pyo

    rows = {row.key: usage(m, data, row) for row in data.rows}
    pool = {name: count[j] for j, name in enumerate(data.pools)}
    return pyo.Constraint(list(rows), rule=lambda _, *key: rows[key] <= pool[key[0]], doc=sentence)


def usage(m: Any, data: RoutingData, row: Row) -> Any:
    """sum_c lambda_c x_cj seconds_c, the replica-seconds per second that a row counts."""
    cls = np.flatnonzero(data.allowed[:, row.pool])
    name = data.pools[row.pool]
    return _linear((data.rates[cls] * row.seconds[cls]).tolist(), [m.x[data.classes[c], name] for c in cls])


def tpot(m: Any, data: RoutingData, required: Floats, count: Sequence[Any]) -> Any:
    """sum_c lambda_c x_cj w_ijc <= (1 - a_ij / T_j) n_j   for every piece i, T_j = `required[j]` in seconds.     (4)"""
    import pyomo.environ as pyo

    rows = {
        (limit.pool, piece): (
            usage(m, data, Row(j, (), limit.work[:, i])),
            (1.0 - limit.base[i] / required[j]) * count[j],
        )
        for j, limit in enumerate(data.limits)
        for i, piece in enumerate(limit.pieces[:: len(limit.caps)])
        if np.isfinite(required[j])
    }
    sentence = "mean time per output token of the strictest class there"
    return pyo.Constraint(list(rows), rule=lambda _, *key: rows[key][0] <= rows[key][1], doc=sentence)


def replicas(m: Any, data: RoutingData) -> Any:
    """used_j <= n_j (1 + over): no more replicas than exist; `over` is 0 unless cuts need it.                    (6)"""
    import pyomo.environ as pyo

    count = dict(zip(data.pools, data.replicas.tolist(), strict=True))
    return pyo.Constraint(
        data.pools,
        rule=lambda m, pool: m.used[pool] <= count[pool] * (1 + m.over),
        doc="replicas that exist; raise them to ask for more",
    )


def tpot_of_pools(data: RoutingData) -> tuple[RoutingData, Floats]:
    """T_j = min of T_c over the classes allowed in pool j, so that (4) stays linear; inf where none is required.

    A class is barred from a pool where even an empty step, max_i a_ij, takes longer than its T_c. Asking every pool
    for its strictest class is an inner approximation: which classes share a pool would need integer variables.

    Raises
    ------
    Infeasible
        If a class is barred from every pool.
    """
    empty = np.array([limit.base.max() for limit in data.limits])
    allowed = data.allowed & (empty[None, :] < data.tpot[:, None])
    for c in np.flatnonzero(~allowed.any(axis=1)):
        least = float(empty[data.allowed[c]].min())
        raise Infeasible(
            f"class {data.classes[c]!r}: tpot = {data.tpot[c]:g} s is not above the empty step of any pool it fits "
            f"(at least {least:g} s); relax tpot or add a faster pool"
        )
    required = np.where(allowed, data.tpot[:, None], np.inf).min(axis=0)
    return replace(data, allowed=allowed), required


def tpot_needs(data: RoutingData, required: Floats, x: Floats) -> Floats:
    """Replicas that (4) asks for at the split `x`, shape (n_pools,)."""
    work = [
        (data.rates * x[:, j]) @ limit.work / (1.0 - limit.base / required[j]) for j, limit in enumerate(data.limits)
    ]
    return np.array([most.max() if np.isfinite(r) else 0.0 for most, r in zip(work, required, strict=True)])


def at_most(m: Any, data: RoutingData, k: int, largest: Floats) -> None:
    """x_cj <= largest_cj z_cj   and   sum_j z_cj <= k,   z_cj in {0, 1}: a class uses at most k pools.          (5)"""
    import pyomo.environ as pyo

    most = {pair: float(value) for pair, value in zip(data.pairs, largest[data.pair_index], strict=True)}
    m.z = pyo.Var(data.pairs, domain=pyo.Binary, doc="whether the class may use the pool")
    m.opened = pyo.Constraint(data.pairs, rule=lambda m, *pair: m.x[pair] <= most[pair] * m.z[pair])
    m.few = pyo.Constraint(
        data.classes,
        rule=lambda m, cls: pyo.quicksum(m.z[p] for p in data.pairs if p[0] == cls) <= k,
        doc=f"the class uses at most {k} pool{'s' if k > 1 else ''}",
    )


def refine(model: Any) -> None:
    """Put the cuts (9) of `model.routing` into the model, in place of older ones, and keep it near its best split:

    (best_cj - radius) total <= x_cj <= (best_cj + radius) total.                                               (10)
    """
    if not model.routing.estimate:
        return
    (_refine_cvxpy if hasattr(model, "var_dict") else _refine_pyomo)(model, model.routing)


def _refine_pyomo(m: Any, routing: Routing) -> None:
    import pyomo.environ as pyo

    for name in ("estimate", "near"):
        if m.component(name) is not None:
            m.del_component(name)
    rows = {cut.key: usage(m, routing.data, cut) <= routing.count[cut.pool] for cut in routing.cuts}
    m.estimate = pyo.Constraint(list(rows), rule=lambda _, *key: rows[key], doc=ESTIMATED)
    m.near = _few_changes(m, routing) if m.component("z") is not None else _near(m, routing)


def _near(m: Any, routing: Routing) -> Any:
    import pyomo.environ as pyo

    best = dict(zip(routing.data.pairs, _best(routing).tolist(), strict=True))
    rows = {(*p, "least"): m.x[p] >= (best[p] - routing.radius) * routing.total for p in best}
    rows |= {(*p, "most"): m.x[p] <= (best[p] + routing.radius) * routing.total for p in best}
    return pyo.Constraint(list(rows), rule=lambda _, *key: rows[key])


def _few_changes(m: Any, routing: Routing) -> Any:
    """Sum of 1 - z_cj over the pairs in use <= a share `radius` of them, at least one: (10) for whole pools."""
    import pyomo.environ as pyo

    used = [pair for pair, x in zip(routing.data.pairs, _best(routing), strict=True) if x > _ROUNDING]
    return pyo.Constraint(expr=sum(1 - m.z[p] for p in used) <= max(1, round(routing.radius * len(used))))


def _best(routing: Routing) -> Floats:
    """Best split so far, for the allowed pairs."""
    assert routing.best is not None
    return np.asarray(routing.best[routing.data.pair_index])


def _refine_cvxpy(problem: Any, routing: Routing) -> None:
    x, best = problem.var_dict["x"], _best(routing)
    rows = [
        (x <= (best + routing.radius) * routing.total).set_label("near"),
        (x >= (best - routing.radius) * routing.total).set_label("near"),
    ]
    if routing.cuts:
        rows.append(within(x, routing.data, routing.cuts, routing.count, "estimate", ESTIMATED))
    replace_rows(problem, [c for c in problem.constraints if c.label not in ("estimate", "near")] + rows)


def replace_rows(problem: Any, constraints: Sequence[Any], objective: Any = None) -> None:
    """CVXPY problems cannot grow, so the same object is initialised again, without what it remembers of its past."""
    goal, own = objective or problem.objective, {k: problem.__dict__[k] for k in ("name", "routing")}
    problem.__dict__.clear()
    type(problem).__init__(problem, goal, list(constraints))
    problem.__dict__.update(own)


def value(model: Any, name: str) -> Any:
    """Loaded value of a scalar, or array of an indexed, variable of either modeller."""
    if hasattr(model, "var_dict"):
        return (
            np.asarray(model.var_dict[name].value) if model.var_dict[name].shape else float(model.var_dict[name].value)
        )
    variable = getattr(model, name)
    return np.array([v.value for v in variable.values()]) if variable.is_indexed() else float(variable.value)


def split(model: Any) -> Floats:
    """Loaded x as a table of shape (n_classes, n_pools) whose rows sum to 1."""
    table = model.routing.data.table(np.maximum(value(model, "x"), 0.0))
    return np.asarray(table / table.sum(axis=1, keepdims=True))


def _linear(coefficients: list[float], variables: list[Any]) -> Any:
    """sum_k a_k v_k as one expression, which Pyomo builds and compiles faster than a sum of products."""
    from pyomo.core.expr import LinearExpression

    return LinearExpression(constant=0, linear_coefs=coefficients, linear_vars=variables)


def served_by(x: Any, data: RoutingData, total: Any) -> Any:
    """sum_j x_cj = total for all classes at once; `x` holds the allowed pairs.                                  (3)"""
    return _labelled(data.serving() @ x == total * np.ones(len(data.classes)), "served", data.classes, SERVED)


def within(
    x: Any, data: RoutingData, rows: Sequence[Row], count: Any, label: str = "stability", sentence: str = STABLE
) -> Any:
    """sum_c lambda_c x_cj seconds_c <= n_j for all `rows` at once; `count` has shape (n_pools,).              (1)"""
    pool = np.array([row.pool for row in rows])
    keys = tuple(",".join(row.key) for row in rows)
    return _labelled(data.usage(rows) @ x <= count[pool], label, keys, sentence)


def at_most_load(load: Any, data: RoutingData, most: float, over: Any = 0.0) -> Any:
    """rho_j <= most (1 + over), so that queues stay finite; `over` is 0 unless cuts need it.                     (7)"""
    ones = np.ones(len(data.pools))
    return _labelled(load - most * over * ones <= most * ones, "load", data.pools, f"load at most {most:g}")


def tangent(delay: Any, load: Any, at: Floats) -> Any:
    """d_j >= f(r_j) + f'(r_j) (rho_j - r_j) with f(r) = r / (1 - r), tangent at r = `at`.                      (8)"""
    from cvxpy import multiply

    slope = 1.0 / (1.0 - at) ** 2
    return (multiply(slope, load) - delay <= slope * at - at / (1.0 - at)).set_label("tangent")


def _labelled(constraint: Any, label: str, keys: Sequence[str], sentence: str) -> Any:
    constraint.set_label(label)
    constraint.row_keys, constraint.doc = keys, sentence
    return constraint
