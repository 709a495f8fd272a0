"""The A/F ratio: a convex program for the ratio alone, a program for one bundle, a program for a fleet of them.

ConvexRatio finds the best real ratio in the mean field, IntegerRatio the cheapest whole bundle within memory and TPOT,
FleetRatio the bundles that make the most tokens of a number of devices. Mathematics and equation numbers in README.md,
"A/F ratio"; what a shape costs is computed in `af_ratio_shapes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor, isfinite
from typing import Any

from formulations.af_ratio_shapes import (
    MICRO,
    Costs,
    RatioData,
    Shape,
    as_many,
    cheaper,
    shape,
    shapes,
)
from llmopt import ratio
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.solution import Solve

ROUNDING = 1e-9
FEW = 500
"""Shapes among which a program for one bundle chooses itself; of more, the dominated ones are left out first."""


@dataclass(frozen=True)
class ConvexRatio:
    """min t: what a million tokens cost at the best real A/F ratio, in the mean field, for given B.

    The duals of its rows say by which share each stage decides the cost. The plan has the best whole numbers, which lie
    beside the real ratio (lemma in README.md). Prices of workers and servers count; KV memory and TPOT do not.
    """

    name: str = "afd-convex"

    def build(self, scenario: Scenario) -> Any:
        """Minimise t over (A2), (A3)."""
        import cvxpy as cp

        data = RatioData.of(scenario)
        bundle = ratio.kept_bundle(scenario, self.name)
        a, b = ratio.mean_field(bundle, data.load)
        unit = float((a + b).max())
        r, t = cp.Variable(name="r"), cp.Variable(name="t")
        rows = [_costs(r, t, a / unit, b / unit, bundle.weights), *_range(r, data)]
        rows[0].row_keys = _numbered([row.stage for row in ratio.cycle_rows(bundle)])
        problem: Any = cp.Problem(cp.Minimize(t), rows)
        problem.name = self.name
        problem.scale = unit * data.unit[0] * MICRO * bundle.layers / bundle.batch
        return problem

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best whole bundle beside the real ratio; `binding`: the share of each row that decides, by its dual."""
        data, best = RatioData.of(scenario), float(model.var_dict["r"].value)
        one = _nearest(data, ratio.kept_bundle(scenario, self.name).batch, best)
        shares = {key[6:-1]: abs(float(value)) for key, value in solve.duals.items() if key.startswith("stage[")}
        binding = {key: share for key, share in shares.items() if share > 1e-4}
        proof = _scaled(solve, model.scale)
        return _plan(self.name, data, [(one, 1)], proof, ratio=best, least_cost=proof.objective, binding=binding)


@dataclass(frozen=True)
class IntegerRatio:
    """min cost of a million tokens over the shapes (x, y, B) of one bundle, within KV memory and the strictest TPOT.

    tau(x / y) is linear in neither x nor z, so each shape has a copy t_c of the cycle that is 0 unless the shape is
    chosen (perspective form). That costs a column a shape and makes the linear relaxation exact, while a product of
    x and tau by bounds would have to branch. costs: see `Costs`.
    """

    costs: Costs = "mean-field"
    name: str = "afd-integer"

    def build(self, scenario: Scenario) -> Any:
        """Minimise sum_c kappa_c t_c over (A5), (A7), (A8), (A9), (A11)."""
        import pyomo.environ as pyo

        data = RatioData.of(scenario)
        fleet = data.fleet
        many = fleet.most_attention * fleet.most_ffn * len(data.batches) > FEW
        known = {s.key: s for s in shapes(data, self.costs, cheaper if many else None)}
        m = pyo.ConcreteModel(self.name)
        m.shapes, m.scale, unit = known, *(min(getattr(s, key) for s in known.values()) for key in ("cost", "cycle"))
        m.z = pyo.Var(list(known), domain=pyo.Binary, doc="whether this is the shape of the bundle")
        m.t = pyo.Var(list(known), bounds=(0, None), doc="cycle in shortest cycles; 0 unless the bundle has this shape")
        kappa = {c: s.cost * unit / (s.cycle * m.scale) for c, s in known.items()}
        m.cost = pyo.Objective(expr=pyo.quicksum(kappa[c] * m.t[c] for c in known))
        m.one = pyo.Constraint(expr=pyo.quicksum(m.z.values()) == 1, doc="the bundle has a shape")
        m.stage = _cycles(m, unit)
        m.kv_capacity = _memory(m, data)
        if isfinite(data.tpot):
            m.tpot = _in_time(m, data)
        if fleet.devices is not None:
            m.devices = _devices(m.z, known, fleet.devices)
        return m

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The chosen shape."""
        chosen = [s for c, s in model.shapes.items() if model.z[c].value > 0.5]
        return _plan(self.name, RatioData.of(scenario), [(chosen[0], 1)], _scaled(solve, model.scale), costs=self.costs)


@dataclass(frozen=True)
class FleetRatio:
    """max tokens/s of `fleet.devices` accelerators: numbers n_c of bundles of each shape, within KV memory and TPOT.

    Without a number of devices it is one bundle, of most tokens/s per unit of weight. kinds: how many shapes may be
    mixed; costs: see `Costs`.
    """

    kinds: int = 1
    costs: Costs = "barrier"
    name: str = "afd-fleet"

    def build(self, scenario: Scenario) -> Any:
        """Maximise sum_c g_c n_c over (A10), (A11), (A12), (A13)."""
        import pyomo.environ as pyo

        data = RatioData.of(scenario)
        devices = data.fleet.devices
        known = {s.key: s for s in shapes(data, self.costs, cheaper if devices is None else as_many)}
        most = {c: 1 if devices is None else max(1, devices // s.devices) for c, s in known.items()}
        m = pyo.ConcreteModel(self.name)
        gain = {c: _gain(data, s) for c, s in known.items()}
        m.shapes, m.scale = known, max(gain.values())
        m.n = pyo.Var(list(known), domain=pyo.NonNegativeIntegers, doc="bundles of this shape")
        m.z = pyo.Var(list(known), domain=pyo.Binary, doc="whether there are bundles of this shape")
        m.output = pyo.Objective(expr=pyo.quicksum(gain[c] / m.scale * m.n[c] for c in known), sense=pyo.maximize)
        m.some = pyo.Constraint(expr=pyo.quicksum(m.n.values()) >= 1, doc="there is at least one bundle")
        m.used = pyo.Constraint(list(known), rule=lambda m, c: m.n[c] <= most[c] * m.z[c])
        m.kinds = pyo.Constraint(
            expr=pyo.quicksum(m.z.values()) <= self.kinds, doc=f"at most {self.kinds} shapes beside each other"
        )
        if devices is None:
            m.one = pyo.Constraint(
                expr=pyo.quicksum(m.n.values()) <= 1, doc="one bundle, since devices are not limited"
            )
        else:
            m.devices = _devices(m.n, known, devices)
        _only_what_holds(m, data)
        return m

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The bundles, those with most devices first; `prices`: tokens/s that one more accelerator is worth (A14)."""
        data, proof = RatioData.of(scenario), _scaled(solve, model.scale)
        counts = [(s, round(model.n[c].value)) for c, s in model.shapes.items() if model.n[c].value > 0.5]
        counts.sort(key=lambda one: (-one[0].devices * one[1], one[0].key))
        if data.fleet.devices is None:
            return _plan(self.name, data, counts, proof, costs=self.costs)
        price = max(s.tokens / s.devices for s in model.shapes.values() if holds(s, data))
        prices = {"accelerator": price}
        return _plan(self.name, data, counts, proof, costs=self.costs, prices=prices, price_unit="tokens/s")


def holds(one: Shape, data: RatioData) -> bool:
    """Whether a shape is within KV memory and TPOT."""
    return not (_exceeds(one.kv, data.bundle.kv_capacity) or _exceeds(one.tpot, data.tpot))


def _costs(r: Any, t: Any, a: Any, b: Any, weights: tuple[float, float]) -> Any:
    """w_A a_i + w_F b_i + w_A b_i r + w_F a_i / r <= t   for every row i of the cycle.                          (A2)"""
    import cvxpy as cp

    w_a, w_f = weights
    cost = w_a * a + w_f * b + w_a * b * r + w_f * a * cp.inv_pos(r)
    row: Any = (cost <= t).set_label("stage")
    row.doc = "what a million tokens cost by this stage"
    return row


def _range(r: Any, data: RatioData) -> list[Any]:
    """1 / most_ffn <= r <= most_attention.                                                                      (A3)"""
    fleet = data.fleet
    return [(r >= 1 / fleet.most_ffn).set_label("most_ffn"), (r <= fleet.most_attention).set_label("most_attention")]


def _cycles(m: Any, unit: float) -> Any:
    """t_c >= tau_ic z_c   for every stage i of every shape c.                                                   (A5)"""
    import pyomo.environ as pyo

    rows = [(stage, c) for c, s in m.shapes.items() for stage in s.stages]
    rule = {(stage, c): m.t[c] >= m.shapes[c].stages[stage] / unit * m.z[c] for stage, c in rows}
    return pyo.Constraint(rows, rule=lambda _, *key: rule[key], doc="a cycle takes as long as this stage")


def _memory(m: Any, data: RatioData) -> Any:
    """sum_c K_c z_c <= kv_capacity,   K_c = M B theta + z sqrt(M B) nu.                                         (A8)"""
    import pyomo.environ as pyo

    room = data.bundle.kv_capacity
    total = pyo.quicksum(s.kv / room * m.z[c] for c, s in m.shapes.items())
    return pyo.Constraint(expr=total <= 1, doc=_kv_sentence(m.shapes, data))


def _in_time(m: Any, data: RatioData) -> Any:
    """sum_c M L tau_c z_c <= T.                                                                                 (A9)"""
    import pyomo.environ as pyo

    total = pyo.quicksum(s.tpot / data.tpot * m.z[c] for c, s in m.shapes.items())
    return pyo.Constraint(expr=total <= 1, doc=_tpot_sentence(m.shapes, data))


def _devices(number: Any, known: Mapping[str, Shape], limit: int) -> Any:
    """sum_c d_c n_c <= D.                                                                                      (A11)"""
    import pyomo.environ as pyo

    least = min(s.devices for s in known.values())
    return pyo.Constraint(
        expr=pyo.quicksum(s.devices * number[c] for c, s in known.items()) <= limit,
        doc=f"all bundles have at most fleet.devices = {limit} accelerators, but the smallest bundle has {least}; "
        "raise fleet.devices",
    )


def _only_what_holds(m: Any, data: RatioData) -> None:
    """sum_{c: K_c > kv_capacity} n_c <= 0,   sum_{c: M L tau_c > T} n_c <= 0.                                  (A12)"""
    import pyomo.environ as pyo

    over = [m.n[c] for c, s in m.shapes.items() if _exceeds(s.kv, data.bundle.kv_capacity)]
    late = [m.n[c] for c, s in m.shapes.items() if _exceeds(s.tpot, data.tpot)]
    if over:
        m.kv_capacity = pyo.Constraint(expr=pyo.quicksum(over) <= 0, doc=_kv_sentence(m.shapes, data))
    if late:
        m.tpot = pyo.Constraint(expr=pyo.quicksum(late) <= 0, doc=_tpot_sentence(m.shapes, data))


def _exceeds(value: float, limit: float) -> bool:
    """Whether a value is above a limit by more than rounding."""
    return value > limit * (1 + ROUNDING)


def _kv_sentence(known: Mapping[str, Shape], data: RatioData) -> str:
    least = min(s.kv for s in known.values())
    return (
        f"the KV tokens of a worker, mean and {data.fleet.kv_sigmas:g} standard deviations, fit into kv_capacity = "
        f"{data.bundle.kv_capacity}, but are {least:.0f} with the smallest batch; lower batch or micro_batches"
    )


def _tpot_sentence(known: Mapping[str, Shape], data: RatioData) -> str:
    least = min(s.tpot for s in known.values())
    return (
        f"a token must take at most the tpot = {data.tpot:g} s of class {data.strictest!r}, but takes {least:.4g} s in "
        "the fastest bundle; raise tpot, or lower batch or micro_batches"
    )


def _gain(data: RatioData, one: Shape) -> float:
    """g_c: tokens/s of a bundle; where there is just one, for each unit of its weight.                         (A10)"""
    if data.fleet.devices is not None:
        return one.tokens
    worker, server = data.bundle.weights
    return one.tokens / (one.workers * worker + one.servers * server)


def _nearest(data: RatioData, batch: int, best: float) -> Shape:
    """The cheapest whole bundle: for every y the floor or the ceiling of r y; with a measured table every x."""
    most = data.fleet.most_attention
    tried: list[Shape] = []
    for y in range(1, data.fleet.most_ffn + 1):
        beside = {min(max(n, 1), most) for n in (floor(best * y), floor(best * y) + 1)}
        xs = range(1, most + 1) if data.bundle.ffn_table else sorted(beside)
        tried += [shape(data, x, y, batch, "mean-field") for x in xs]
    least = min(one.cost for one in tried)
    return min((one for one in tried if one.cost <= least * (1 + 1e-12)), key=lambda one: one.devices)


def _scaled(solve: Solve, scale: float) -> Solve:
    """The record in the units of the objective; programs are solved in units of their own, whatever those are."""
    return replace(solve, objective=solve.objective * scale, bound=solve.bound * scale)


def _plan(name: str, data: RatioData, chosen: list[tuple[Shape, int]], proof: Solve, **figures: Any) -> Plan:
    """The plan of these bundles; ratio, cost and TPOT are those of the first."""
    (one, count), *rest = chosen
    bundles = [(data.bundle.sized(s.workers, s.servers, s.batch), n) for s, n in rest]
    known = {
        "ratio": one.workers / one.servers,
        "cycle": one.cycle,
        "tpot": one.tpot,
        "cost": one.cost,
        "cost_unit": f"{data.unit[1]} for a million tokens",
        "tokens": sum(s.tokens * n for s, n in chosen),
        "devices": sum(s.devices * n for s, n in chosen),
    }
    bundle = data.bundle.sized(one.workers, one.servers, one.batch)
    return Plan(name, solve=proof, bundle=bundle, bundles=count, others=tuple(bundles), figures={**known, **figures})


def _numbered(names: list[str]) -> list[str]:
    """Each name, with a number from its second appearance on."""
    seen = [names[:k].count(name) + 1 for k, name in enumerate(names)]
    return [name if n == 1 else f"{name} {n}" for name, n in zip(names, seen, strict=True)]
