"""Request routing: four programs over the stability polytope; mathematics and equation numbers in README.md.

MaxMargin keeps as far from instability as possible, MinCost pays least, MinDelay queues least, FewPools gives each
class few pools. All return a static split of each class over the pools and, inside a pool of identical replicas, send
a request to the replica with the fewest requests, waiting ones counted four times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from formulations import blocks
from formulations.data import RoutingData
from formulations.prices import binding_rows, pool_duals, resource_prices, split_plan
from formulations.search import Routing, advance, consider, needs
from llmopt.arrays import Floats
from llmopt.errors import Infeasible
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.solution import Solve


@dataclass(frozen=True)
class MaxMargin:
    """max theta: the largest factor by which all arrivals can grow together while every pool stays stable.

    estimate: judge pools by the step-mean estimate, else by the outer bound (1) alone; accuracy: relative gain that
    is not worth another round; modeler: the same program in Pyomo or, faster to build, in CVXPY.
    """

    estimate: bool = True
    accuracy: float = 0.002
    modeler: Literal["pyomo", "cvxpy"] = "pyomo"
    name: str = "max-margin"

    def build(self, scenario: Scenario) -> Any:
        """Maximise theta over (1), (2), (3) with total theta."""
        return self.program(RoutingData.of(scenario))

    def program(self, data: RoutingData) -> Any:
        """The program from its data alone."""
        model = _max_margin_in_pyomo(data) if self.modeler == "pyomo" else _max_margin_in_cvxpy(data)
        model.routing.estimate = self.estimate
        return model

    def tighten(self, model: Any, solve: Solve, scenario: Scenario) -> int:
        """Linearise the estimate at the best split."""
        return _improve_margin(self, model, solve, scenario)

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split, with prices in requests/s; `bound_rate` is what (1) allows any split of the classes.

        A rule that tells requests of one class apart by their lengths may carry more: cut the class to bound it too.
        """
        routing, total = _best_margin(model, solve, scenario), scenario.workload.total_rate
        scaled = routing.merit * np.asarray(routing.best)
        prices = resource_prices(scenario, routing, solve, scaled, pool_duals(routing, solve.duals), total)
        plan = split_plan(
            self.name,
            scenario,
            routing,
            bound_rate=routing.bound * total,
            prices=prices,
            price_unit="requests/s",
            binding=binding_rows(scenario, routing, solve.duals),
        )
        return _proven(plan, routing, solve)


@dataclass(frozen=True)
class FewPools:
    """max theta when each class may use at most `pools_per_class` pools; other settings as in MaxMargin."""

    pools_per_class: int = 2
    estimate: bool = True
    accuracy: float = 0.002
    name: str = "few-pools"

    def build(self, scenario: Scenario) -> Any:
        """Maximise theta over (1), (2), (3), (5)."""
        data = RoutingData.of(scenario)
        model = _max_margin_in_pyomo(data)
        blocks.at_most(model, data, self.pools_per_class, _largest_alone(data))
        model.routing.estimate, model.routing.radius = self.estimate, 1.0
        return model

    def tighten(self, model: Any, solve: Solve, scenario: Scenario) -> int:
        """As MaxMargin."""
        return _improve_margin(self, model, solve, scenario)

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split; a mixed-integer program has no prices."""
        routing = _best_margin(model, solve, scenario)
        bound_rate = routing.bound * scenario.workload.total_rate
        plan = split_plan(self.name, scenario, routing, bound_rate=bound_rate, pools_per_class=self.pools_per_class)
        return _proven(plan, routing, solve)


@dataclass(frozen=True)
class MinCost:
    """min sum_j price_j used_j: the cheapest replicas that serve everybody within a target load and the TPOTs.

    objective: `cost` (USD/hour; replicas unless every pool has a price) or `load` (mean share of all replicas in
    use); load: largest load of a replica in use; estimate, accuracy: as in MaxMargin.
    """

    objective: Literal["cost", "load"] = "cost"
    load: float = 0.9
    estimate: bool = True
    accuracy: float = 0.002
    name: str = "min-cost"

    def build(self, scenario: Scenario) -> Any:
        """Minimise sum_j price_j used_j over (1) with load x used_j, (2), (3) with total 1, (4), (6)."""
        import pyomo.environ as pyo

        data, required = blocks.tpot_of_pools(RoutingData.of(scenario))
        m = pyo.ConcreteModel(self.name)
        m.x = blocks.fractions(data)
        m.used = pyo.Var(data.pools, bounds=(0, None), doc="replicas in use, fractional")
        m.over = pyo.Var(bounds=(0, None), initialize=0.0, doc="relative shortage of replicas")
        m.over.fix()
        used, granted = list(m.used.values()), [self.load * n for n in m.used.values()]
        m.total = pyo.Objective(expr=self._bill(data, used, m.over))
        m.tpot = blocks.tpot(m, data, required, used)
        m.replicas = blocks.replicas(m, data)
        m.stability = blocks.stability(m, data, granted, f"load at most {self.load:g}")
        m.served = blocks.served(m, data, 1.0)
        m.routing = Routing(data, granted, estimate=self.estimate)
        return m

    def tighten(self, model: Any, solve: Solve, scenario: Scenario) -> int:
        """Linearise the estimate at the best split.

        It may need more replicas than there are where (1) did not, so a shortage is penalised from now on.
        """
        x = blocks.split(model)
        merit, _, _ = self._merit(model.routing, scenario, x)
        if not advance(scenario, model.routing, x, merit, solve, self.accuracy):
            return 0
        model.over.unfix()
        blocks.refine(model)
        return 1

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split and the replicas it uses; prices are savings of the objective."""
        routing, x = model.routing, blocks.split(model)
        consider(routing, x, self._merit(routing, scenario, x)[0], solve)
        cost, used, over = self._merit(routing, scenario, routing.best)
        _refuse_shortage(self.name, over, f"at a load of {self.load:g}")
        replica = np.array([solve.duals[f"replicas[{pool}]"] for pool in routing.data.pools])
        if self.objective == "load":
            replica = replica - cost / float(routing.data.replicas.sum())
        plan = split_plan(
            self.name,
            scenario,
            routing,
            cost=cost,
            cost_unit=self._unit(routing.data),
            replicas_used=dict(zip(routing.data.pools, used.tolist(), strict=True)),
            prices=resource_prices(scenario, routing, solve, routing.best, replica),
            price_unit=self._unit(routing.data),
            binding=binding_rows(scenario, routing, solve.duals),
        )
        return _proven(plan, routing, solve)

    def _merit(self, routing: Routing, scenario: Scenario, x: Floats) -> tuple[float, Floats, float]:
        """Bill, replicas used and relative shortage of a split."""
        _, required = blocks.tpot_of_pools(routing.data)
        in_time = blocks.tpot_needs(routing.data, required, x)
        used = np.maximum(needs(scenario, routing, x) / self.load, in_time)
        over = max(float((used / routing.data.replicas).max()) - 1.0, 0.0)
        return float(self._bill(routing.data, used, over)), used, over

    def _bill(self, data: RoutingData, used: Any, over: Any) -> Any:
        """sum_j price_j used_j, and a penalty on a shortage; for variables and for numbers."""
        price = data.price if data.price.all() else np.ones(len(data.pools))
        price = np.full(len(data.pools), 1.0 / float(data.replicas.sum())) if self.objective == "load" else price
        penalty = _PENALTY * float(price @ data.replicas)
        return sum(float(p) * n for p, n in zip(price, used, strict=True)) + penalty * over

    def _unit(self, data: RoutingData) -> str:
        if self.objective == "load":
            return "share of replicas in use"
        return "USD/hour" if data.price.all() else "replicas"


@dataclass(frozen=True)
class MinDelay:
    """min (1/lambda) sum_j n_j rho_j / (1 - rho_j): work times the factor 1 / (1 - rho) by which queueing stretches it.

    For processor sharing this is the mean time in system, in seconds. The convex term is approached from below by
    tangents, so that HiGHS solves it as a linear program with a proven bound. most: largest load of a pool; estimate,
    accuracy: as in MaxMargin; cone: hand the term itself, over (1) alone, to a conic solver.
    """

    most: float = 0.99
    estimate: bool = True
    accuracy: float = 0.001
    cone: bool = False
    name: str = "min-delay"

    def build(self, scenario: Scenario) -> Any:
        """Minimise sum_j n_j d_j / lambda over (1) with n_j rho_j, (2), (3) with total 1, (7), (8)."""
        import cvxpy as cp

        data = RoutingData.of(scenario)
        x, load = cp.Variable(len(data.pairs), nonneg=True, name="x"), cp.Variable(len(data.pools), name="load")
        delay = cp.Variable(len(data.pools), nonneg=True, name="delay")
        term, granted = cp.inv_pos(1 - load) - 1 if self.cone else delay, cp.multiply(data.replicas, load)
        limits = [
            blocks.at_most_load(load, data, self.most),
            blocks.within(x, data, data.rows, granted),
            blocks.served_by(x, data, 1.0),
        ]
        tangents = [] if self.cone else [blocks.tangent(delay, load, r * np.ones(len(data.pools))) for r in _KNOTS]
        problem: Any = cp.Problem(cp.Minimize(data.replicas / data.rates.sum() @ term), limits + tangents)
        problem.name, problem.routing = self.name, Routing(data, granted, estimate=self.estimate and not self.cone)
        return problem

    def tighten(self, model: Any, solve: Solve, scenario: Scenario) -> int:
        """Linearise the delay at the load of the program and of the split, and the estimate at the best split."""
        routing, x = model.routing, blocks.split(model)
        merit, load = self._merit(routing, scenario, x)
        if self.cone or not advance(scenario, routing, x, merit, solve, self.accuracy):
            return 0
        delay, felt = model.var_dict["delay"], model.var_dict["load"]
        at = [np.minimum(r, self.most) for r in (blocks.value(model, "load"), load)]
        blocks.replace_rows(model, [*model.constraints, *(blocks.tangent(delay, felt, r) for r in at)])
        if "over" not in model.var_dict:
            self._soften(model)
        blocks.refine(model)
        return 1

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """The best split with its delay by the estimate."""
        routing, x = model.routing, blocks.split(model)
        consider(routing, x, self._merit(routing, scenario, x)[0], solve)
        value, load = self._merit(routing, scenario, routing.best)
        _refuse_shortage(self.name, float(load.max()) / self.most - 1.0, f"at a load of {self.most:g}")
        replica = load / (1 - load) / routing.data.rates.sum() + load * pool_duals(routing, solve.duals)
        plan = split_plan(
            self.name,
            scenario,
            routing,
            mean_delay=value,
            prices=resource_prices(scenario, routing, solve, routing.best, replica),
            price_unit="s of mean delay",
            binding=binding_rows(scenario, routing, solve.duals),
        )
        return plan if self.cone else _proven(plan, routing, solve)

    def _merit(self, routing: Routing, scenario: Scenario, x: Floats) -> tuple[float, Floats]:
        """Delay of a split and the load of its pools; beyond `most` the delay goes on along its tangent, penalised."""
        n, total = routing.data.replicas, float(routing.data.rates.sum())
        load = needs(scenario, routing, x) / n
        inside = np.minimum(load, self.most)
        delay = inside / (1 - inside) + (load - inside) / (1 - self.most) ** 2
        over = max(float(load.max()) / self.most - 1.0, 0.0)
        return float(n @ delay + _PENALTY * n.sum() * over) / total, load

    def _soften(self, model: Any) -> None:
        """Penalise a load above `most` rather than refuse it, for the estimate may be above it where (1) was not."""
        import cvxpy as cp

        over, data = cp.Variable(nonneg=True, name="over"), model.routing.data
        limit = blocks.at_most_load(model.var_dict["load"], data, self.most, over)
        penalty = _PENALTY * float(data.replicas.sum() / data.rates.sum())
        rest = [c for c in model.constraints if c.label != "load"]
        blocks.replace_rows(model, [*rest, limit], cp.Minimize(model.objective.expr + penalty * over))


_PENALTY = 1e5
_ROUNDING = 1e-7
_KNOTS = 1.0 - 0.85 ** np.arange(29)


def _max_margin_in_pyomo(data: RoutingData) -> Any:
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("max-margin")
    m.x = blocks.fractions(data)
    m.margin = pyo.Var(bounds=(0, None), doc="theta")
    m.goal = pyo.Objective(expr=m.margin, sense=pyo.maximize)
    m.stability = blocks.stability(m, data, data.replicas.tolist())
    m.served = blocks.served(m, data, m.margin)
    m.routing = Routing(data, data.replicas.tolist(), total=m.margin)
    return m


def _max_margin_in_cvxpy(data: RoutingData) -> Any:
    import cvxpy as cp

    x, margin = cp.Variable(len(data.pairs), nonneg=True, name="x"), cp.Variable(nonneg=True, name="margin")
    rows = [blocks.within(x, data, data.rows, data.replicas), blocks.served_by(x, data, margin)]
    problem: Any = cp.Problem(cp.Maximize(margin), rows)
    problem.name, problem.routing = "max-margin", Routing(data, data.replicas, total=margin)
    return problem


def _improve_margin(formulation: MaxMargin | FewPools, model: Any, solve: Solve, scenario: Scenario) -> int:
    x = blocks.split(model)
    merit = _margin(model.routing, scenario, x)
    if not advance(scenario, model.routing, x, merit, solve, formulation.accuracy):
        return 0
    blocks.refine(model)
    return 1


def _best_margin(model: Any, solve: Solve, scenario: Scenario) -> Routing:
    """The search record with the last solution taken in."""
    x, routing = blocks.split(model), model.routing
    consider(routing, x, _margin(routing, scenario, x), solve)
    return cast(Routing, routing)


def _margin(routing: Routing, scenario: Scenario, x: Floats) -> float:
    """Largest factor on all arrivals under which no pool needs more replicas than it has."""
    return 1.0 / float((needs(scenario, routing, x) / routing.data.replicas).max())


def _proven(plan: Plan, routing: Routing, solve: Solve) -> Plan:
    """The value of the split by the estimate, against the bound that the first program proved for every split."""
    return replace(plan, solve=replace(solve, objective=routing.merit, bound=routing.bound))


def _refuse_shortage(name: str, over: float, what: str) -> None:
    if over > _ROUNDING:
        raise Infeasible(
            f"{name}: by the step-mean estimate these rates need {over:.1%} more replicas {what}, though the bound (1) "
            "would allow them; add replicas or lower the rate"
        )


def _largest_alone(data: RoutingData) -> Floats:
    """Largest scale at which pool j can carry class c alone, and no larger than any class allows in all its pools."""
    seconds = np.array([limit.seconds.max(axis=1) for limit in data.limits]).T
    with np.errstate(divide="ignore"):
        alone = np.where(data.allowed, data.replicas / (data.rates[:, None] * seconds), 0.0)
    return np.asarray(np.minimum(alone, alone.sum(axis=1).min()))
