"""Request routing: four programs over the stability polytope; mathematics and equation numbers in README.md.

MaxMargin keeps as far from instability as possible, MinCost pays least, MinDelay queues least, FewPools gives each
class few pools. All return a static split of each class over the pools and, inside a pool of identical replicas, send
a request to the replica with the fewest requests, waiting ones counted four times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from formulations import blocks
from formulations.data import Routing, RoutingData, estimated_needs, revise_cuts
from formulations.prices import binding_rows, pool_duals, resource_prices, split_plan
from llmopt.lengths import Floats
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.solution import Solve


@dataclass(frozen=True)
class MaxMargin:
    """max theta: the largest factor by which all arrivals can grow together while every pool stays stable.

    accuracy: relative excess of the step-mean estimate over the program that is left alone; inf for no cuts, which
    leaves the outer bound (1). modeler: the same program in Pyomo or, faster to build, in CVXPY.
    """

    accuracy: float = 0.002
    modeler: Literal["pyomo", "cvxpy"] = "pyomo"
    name: str = "max-margin"

    def build(self, scenario: Scenario) -> Any:
        """Maximise theta over  (1), (2), (3) with total theta."""
        return self.program(RoutingData.of(scenario))

    def program(self, data: RoutingData) -> Any:
        """The program from its data alone."""
        model = _max_margin_in_pyomo(data) if self.modeler == "pyomo" else _max_margin_in_cvxpy(data)
        model.routing = Routing(data, count=data.replicas)
        return model

    def tighten(self, model: Any, scenario: Scenario) -> int:
        """Cut with the step-mean estimate where a pool needs more replicas than it has."""
        return _tighten_margin(model, scenario, self.accuracy)

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split seen, with prices in requests/s; `bound_rate` is what (1) allows under any routing."""
        routing: Routing = model.routing
        replica, total = pool_duals(routing, solve.duals), scenario.workload.total_rate
        prices = resource_prices(scenario, routing, solve, blocks.split(model), replica, total)
        return _margin_plan(
            self,
            model,
            scenario,
            bound_rate=(routing.first or solve.objective) * total,
            prices=prices,
            price_unit="requests/s",
            binding=binding_rows(routing, solve.duals),
        )


@dataclass(frozen=True)
class FewPools:
    """max theta when each class may use at most `pools_per_class` pools; other settings as in MaxMargin."""

    pools_per_class: int = 1
    accuracy: float = 0.002
    name: str = "few-pools"

    def build(self, scenario: Scenario) -> Any:
        """Maximise theta over  (1), (2), (3), (5)."""
        data = RoutingData.of(scenario)
        model = _max_margin_in_pyomo(data)
        blocks.at_most(model, data, self.pools_per_class, _largest_alone(data))
        model.routing = Routing(data, count=data.replicas)
        return model

    def tighten(self, model: Any, scenario: Scenario) -> int:
        """As MaxMargin."""
        return _tighten_margin(model, scenario, self.accuracy)

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split seen; a mixed-integer program has no prices."""
        return _margin_plan(self, model, scenario, pools_per_class=self.pools_per_class)


@dataclass(frozen=True)
class MinCost:
    """min sum_j price_j used_j: the cheapest replicas that serve everybody within a target load and the TPOTs.

    objective: `cost` (USD/hour; replicas if the scenario has no prices) or `load` (mean share of all replicas in
    use); load: largest load of a replica in use; accuracy: as in MaxMargin.
    """

    objective: Literal["cost", "load"] = "cost"
    load: float = 0.9
    accuracy: float = 0.002
    name: str = "min-cost"

    def build(self, scenario: Scenario) -> Any:
        """Minimise sum_j price_j used_j over  (1) with load x used_j, (2), (3) with total 1, (4), (6)."""
        import pyomo.environ as pyo

        data, required = blocks.tpot_of_pools(RoutingData.of(scenario))
        weight = _price_of_replicas(data, self.objective)
        m = pyo.ConcreteModel(self.name)
        m.x = blocks.fractions(data)
        m.used = pyo.Var(data.pools, bounds=(0, None), doc="replicas in use, fractional")
        used = [m.used[name] for name in data.pools]
        m.over = pyo.Var(bounds=(0, None), initialize=0.0, doc="relative shortage of replicas")
        m.over.fix()
        penalty = _PENALTY * float(weight @ data.replicas)
        m.total = pyo.Objective(expr=sum(float(w) * n for w, n in zip(weight, used, strict=True)) + penalty * m.over)
        m.tpot = blocks.tpot(m, data, required, used)
        m.replicas = blocks.replicas(m, data)
        m.stability = blocks.stability(m, data, [self.load * n for n in used])
        m.served = blocks.served(m, data, 1.0)
        m.routing = Routing(data, count=[self.load * n for n in used])
        return m

    def tighten(self, model: Any, scenario: Scenario) -> int:
        """Cut with the step-mean estimate where a pool needs more than `load` times the replicas in use.

        A cut may be wrong by more than the slack of a tight program, so that from now on a shortage is penalised
        rather than refused; the cuts are revised where it leads.
        """
        x, room = blocks.split(model), self.load * blocks.value(model, "used")
        model.over.unfix()
        return _revise(model, scenario, x, room, self.accuracy)

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """Read the split and the replicas in use; prices are savings of the objective."""
        blocks.refuse_shortage(
            self.name, blocks.value(model, "over"), f"replicas than there are at a load of {self.load:g}"
        )
        routing: Routing = model.routing
        x = blocks.split(model)
        replica = np.array([solve.duals[f"replicas[{pool}]"] for pool in routing.data.pools])
        if self.objective == "load":
            replica = replica - solve.objective / routing.data.replicas.sum()
        return split_plan(
            self.name,
            scenario,
            x,
            cost=solve.objective,
            cost_unit=_cost_unit(routing.data, self.objective),
            replicas_used={pool: n.value for pool, n in model.used.items()},
            prices=resource_prices(scenario, routing, solve, x, replica),
            price_unit=_cost_unit(routing.data, self.objective),
            binding=binding_rows(routing, solve.duals),
        )


@dataclass(frozen=True)
class MinDelay:
    """min (1/lambda) sum_j n_j rho_j / (1 - rho_j): work times the factor 1 / (1 - rho) by which queueing stretches it.

    For processor sharing this is the mean time in system, in seconds. The convex term is approached from below by
    tangents, so that HiGHS solves it as a linear program with a proven bound; `cone=True` hands the term itself to
    a conic solver. gap: relative gap at which tangents stop; most: largest load of a pool; accuracy: as in MaxMargin.
    """

    gap: float = 1e-5
    most: float = 0.99
    accuracy: float = 0.0005
    cone: bool = False
    name: str = "min-delay"

    def build(self, scenario: Scenario) -> Any:
        """Minimise sum_j n_j d_j / lambda over  (1) with n_j rho_j, (2), (3) with total 1, (7), (8)."""
        import cvxpy as cp

        data = RoutingData.of(scenario)
        x, load = cp.Variable(len(data.pairs), nonneg=True, name="x"), cp.Variable(len(data.pools), name="load")
        delay = cp.Variable(len(data.pools), nonneg=True, name="delay")
        term = cp.inv_pos(1 - load) - 1 if self.cone else delay
        limits = [
            blocks.at_most_load(load, data, self.most),
            blocks.within(x, data, data.rows, cp.multiply(data.replicas, load)),
            blocks.served_by(x, data, 1.0),
        ]
        tangents = [] if self.cone else [blocks.tangent(delay, load, r * np.ones(len(data.pools))) for r in _KNOTS]
        weight = data.replicas / scenario.workload.total_rate
        problem: Any = cp.Problem(cp.Minimize(weight @ term), limits + tangents)
        problem.name, problem.routing = self.name, Routing(data, count=cp.multiply(data.replicas, load))
        return problem

    def tighten(self, model: Any, scenario: Scenario) -> int:
        """Tangents at the current loads while the gap is open, and cuts of the step-mean estimate."""
        routing: Routing = model.routing
        x, load, value = blocks.split(model), blocks.value(model, "load"), float(model.value)
        changed = _revise(model, scenario, x, routing.data.replicas * load, self.accuracy)
        if changed and not self.cone and "over" not in model.var_dict:
            self._soften(model)
        if not self.cone and load.max() < 1 and _delay(routing, load, scenario) > value * (1 + self.gap):
            touching = blocks.tangent(model.var_dict["delay"], model.var_dict["load"], load)
            blocks.replace_rows(model, [*model.constraints, touching])
            changed += len(load)
        return changed

    def _soften(self, model: Any) -> None:
        """Penalise a load above `most` rather than refuse it, since cuts may be wrong by more than the slack."""
        import cvxpy as cp

        over, data = cp.Variable(nonneg=True, name="over"), model.routing.data
        limit = blocks.at_most_load(model.var_dict["load"], data, self.most, over)
        rest = [c for c in model.constraints if c.label != "load"]
        penalty = _PENALTY * float(data.replicas.sum() / data.rates.sum())
        blocks.replace_rows(model, [*rest, limit], cp.Minimize(model.objective.expr + penalty * over))

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """Read the split; the value is the true delay at the split, the bound is what the program proved."""
        routing: Routing = model.routing
        if "over" in model.var_dict:
            blocks.refuse_shortage(self.name, blocks.value(model, "over"), f"replicas at a load of {self.most:g}")
        x, load = blocks.split(model), blocks.value(model, "load")
        value = _delay(routing, load, scenario)
        replica = load / (1 - load) / scenario.workload.total_rate + load * pool_duals(routing, solve.duals)
        plan = split_plan(
            self.name,
            scenario,
            x,
            mean_delay=value,
            prices=resource_prices(scenario, routing, solve, x, replica),
            price_unit="s of mean delay",
            binding=binding_rows(routing, solve.duals),
        )
        return replace(plan, solve=solve if self.cone else replace(solve, objective=value))


_PATIENCE = 3
_PENALTY = 1e5
_KNOTS = 1.0 - 0.75 ** np.arange(16)


def _delay(routing: Routing, load: Floats, scenario: Scenario) -> float:
    """(1/lambda) sum_j n_j rho_j / (1 - rho_j), s."""
    return float(routing.data.replicas @ (load / (1 - load))) / scenario.workload.total_rate


def _max_margin_in_pyomo(data: RoutingData) -> Any:
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("max-margin")
    m.x = blocks.fractions(data)
    m.margin = pyo.Var(bounds=(0, None), doc="theta")
    m.goal = pyo.Objective(expr=m.margin, sense=pyo.maximize)
    m.stability = blocks.stability(m, data, data.replicas.tolist())
    m.served = blocks.served(m, data, m.margin)
    return m


def _max_margin_in_cvxpy(data: RoutingData) -> Any:
    import cvxpy as cp

    x, margin = cp.Variable(len(data.pairs), nonneg=True, name="x"), cp.Variable(nonneg=True, name="margin")
    rows = [blocks.within(x, data, data.rows, data.replicas), blocks.served_by(x, data, margin)]
    problem: Any = cp.Problem(cp.Maximize(margin), rows)
    problem.name = "max-margin"
    return problem


def _tighten_margin(model: Any, scenario: Scenario, accuracy: float) -> int:
    """Cut, and remember the split with the margin that the estimate gives it; stop when three rounds gained nothing."""
    routing: Routing = model.routing
    x, margin = blocks.split(model), blocks.value(model, "margin")
    routing.first = margin if routing.first is None else routing.first
    if not np.isfinite(accuracy):
        return 0
    needs = estimated_needs(scenario, x)
    routing.tried.append((margin / float((needs / routing.data.replicas).max()), x / margin))
    margins = [tried for tried, _ in routing.tried]
    if len(margins) > _PATIENCE and max(margins[-_PATIENCE:]) <= max(margins[:-_PATIENCE]) * (1 + accuracy):
        return 0
    return _revise(model, scenario, x, routing.data.replicas, accuracy, needs)


def _revise(
    model: Any, scenario: Scenario, x: Floats, room: Floats, accuracy: float, needs: Floats | None = None
) -> int:
    changed = revise_cuts(scenario, model.routing, x, room, accuracy, needs)
    if changed:
        blocks.set_cuts(model)
    return changed


def _margin_plan(formulation: MaxMargin | FewPools, model: Any, scenario: Scenario, **figures: Any) -> Plan:
    """The plan of the best split seen, by the estimate."""
    routing: Routing = model.routing
    x, margin = blocks.split(model), blocks.value(model, "margin")
    _, best = max([*routing.tried, (0.0, x / margin)], key=lambda tried: tried[0])
    return split_plan(formulation.name, scenario, best, **figures)


def _largest_alone(data: RoutingData) -> Floats:
    """Largest scale at which pool j can carry class c alone, and no larger than any class allows in all its pools."""
    seconds = np.array([limit.seconds.max(axis=1) for limit in data.limits]).T
    with np.errstate(divide="ignore"):
        alone = np.where(data.allowed, data.replicas / (data.rates[:, None] * seconds), 0.0)
    return np.asarray(np.minimum(alone, alone.sum(axis=1).min()))


def _price_of_replicas(data: RoutingData, objective: str) -> Floats:
    if objective == "load":
        return np.full(len(data.pools), 1.0 / float(data.replicas.sum()))
    return data.price if data.price.any() else np.ones(len(data.pools))


def _cost_unit(data: RoutingData, objective: str) -> str:
    if objective == "load":
        return "share of replicas in use"
    return "USD/hour" if data.price.any() else "replicas"
