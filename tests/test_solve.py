"""Both modelling paths against each other, against closed forms and against scipy; and every ending of a solve."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from llmopt.errors import Infeasible, SolveError
from llmopt.plan import Plan
from llmopt.policy import Optimized
from llmopt.solution import Solve, SolveOptions, Termination
from llmopt.solve import solve

WEIGHTS = [12, 2, 1, 4, 1, 7, 9, 5]
VALUES = [4, 2, 1, 10, 2, 6, 7, 3]


def diet_pyomo():
    """Furniture: max 5x + 4y, carpentry 6x + 4y <= 24, finishing x + 2y <= 6, x >= 1; optimum 21 at (3, 1.5)."""
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("furniture")
    m.x, m.y = pyo.Var(domain=pyo.NonNegativeReals), pyo.Var(domain=pyo.NonNegativeReals)
    m.value = pyo.Objective(expr=5 * m.x + 4 * m.y + 1, sense=pyo.maximize)
    m.carpentry = pyo.Constraint(expr=6 * m.x + 4 * m.y <= 24, doc="hours of carpentry")
    m.finishing = pyo.Constraint(expr=m.x + 2 * m.y <= 6)
    m.least = pyo.Constraint(expr=m.x >= 1)
    m.dual = pyo.Suffix(direction=pyo.Suffix.IMPORT)
    return m


def diet_cvxpy():
    import cvxpy as cp

    x, y = cp.Variable(name="x", nonneg=True), cp.Variable(name="y", nonneg=True)
    rows = [
        (6 * x + 4 * y <= 24).set_label("carpentry"),
        (x + 2 * y <= 6).set_label("finishing"),
        (x >= 1).set_label("least"),
    ]
    return cp.Problem(cp.Maximize(5 * x + 4 * y + 1), rows)


def knapsack_pyomo(capacity=15):
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("knapsack")
    m.z = pyo.Var(range(8), domain=pyo.Binary)
    m.value = pyo.Objective(expr=sum(VALUES[i] * m.z[i] for i in range(8)), sense=pyo.maximize)
    m.weight = pyo.Constraint(expr=sum(WEIGHTS[i] * m.z[i] for i in range(8)) <= capacity)
    return m


def knapsack_cvxpy(capacity=15):
    import cvxpy as cp

    z = cp.Variable(8, boolean=True, name="z")
    return cp.Problem(cp.Maximize(np.array(VALUES) @ z), [(np.array(WEIGHTS) @ z <= capacity).set_label("weight")])


def knapsack_by_enumeration(capacity=15):
    picks = [[k >> i & 1 for i in range(8)] for k in range(256)]
    return max(np.dot(p, VALUES) for p in picks if np.dot(p, WEIGHTS) <= capacity)


def test_an_lp_has_the_same_value_and_duals_through_both_paths():
    model, problem = diet_pyomo(), diet_cvxpy()
    one, two = solve(model), solve(problem)
    assert one.objective == pytest.approx(22) and two.objective == pytest.approx(22)
    assert one.bound == one.objective and one.sense == two.sense == "max" and one.label == "optimal"
    assert model.x.value == pytest.approx(3) and model.y.value == pytest.approx(1.5)
    assert one.duals == pytest.approx({"carpentry": 0.75, "finishing": 0.5, "least": 0.0})
    assert dict(two.duals) == pytest.approx(dict(one.duals))
    assert model.dual[model.carpentry] == pytest.approx(0.75)
    assert (one.variables, one.constraints) == (two.variables, two.constraints) == (2, 3)
    assert one.solver == "HiGHS" and one.version.count(".") == 2


def equality_and_lower(modeler: str, shift: float = 0.0, floor: float = 0.5, sense: str = "min") -> Solve:
    """min (or max of the negative) 3x + 5y over x + y == 2 + shift, y >= floor: value 6 + 2 floor + 3 shift."""
    sign = 1 if sense == "min" else -1
    if modeler == "pyomo":
        import pyomo.environ as pyo

        m = pyo.ConcreteModel()
        m.x, m.y = pyo.Var(bounds=(0, None)), pyo.Var()
        m.cost = pyo.Objective(expr=sign * (3 * m.x + 5 * m.y), sense=sign)
        m.total = pyo.Constraint(expr=m.x + m.y == 2 + shift)
        m.floor = pyo.Constraint(expr=m.y >= floor)
        return solve(m)
    import cvxpy as cp

    x, y = cp.Variable(nonneg=True), cp.Variable()
    rows = [(x + y == 2 + shift).set_label("total"), (y >= floor).set_label("floor")]
    goal = cp.Minimize if sense == "min" else cp.Maximize
    return solve(cp.Problem(goal(sign * (3 * x + 5 * y)), rows))


@pytest.mark.parametrize("sense", ["min", "max"])
@pytest.mark.parametrize("modeler", ["pyomo", "cvxpy"])
def test_duals_are_the_derivative_of_the_objective_by_the_right_hand_side(modeler, sense):
    base = equality_and_lower(modeler, sense=sense)
    assert base.sense == sense
    by_total = (equality_and_lower(modeler, shift=0.01, sense=sense).objective - base.objective) / 0.01
    by_floor = (equality_and_lower(modeler, floor=0.51, sense=sense).objective - base.objective) / 0.01
    assert base.duals["total"] == pytest.approx(by_total) and base.duals["floor"] == pytest.approx(by_floor)
    assert abs(by_total) == pytest.approx(3) and abs(by_floor) == pytest.approx(2)


def test_a_range_row_has_one_dual():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x = pyo.Var(["a", "b"], bounds=(0, 10))
    m.cost = pyo.Objective(expr=m.x["a"] + 2 * m.x["b"])
    m.window = pyo.Constraint(["a"], rule=lambda m, k: (3, m.x["a"] + m.x["b"], 7))
    record = solve(m)
    assert record.objective == pytest.approx(3) and record.duals == pytest.approx({"window[a]": 1.0})


def test_vector_duals_keep_their_shape():
    import cvxpy as cp

    x = cp.Variable((2, 3), nonneg=True)
    cap = np.arange(1.0, 7.0).reshape(2, 3)
    record = solve(cp.Problem(cp.Maximize(cp.sum(cp.multiply(cap, x))), [(x <= cap).set_label("cap")]))
    assert record.duals["cap"] == pytest.approx(cap)


def test_entries_of_a_cvxpy_constraint_may_have_names_and_a_sentence():
    import cvxpy as cp

    x = cp.Variable(2, nonneg=True)
    cap = (x <= np.array([1.0, 2.0])).set_label("cap")
    cap.row_keys, cap.doc = ("a-1", "b.2"), "memory of the pool"
    record = solve(cp.Problem(cp.Maximize(3 * x[0] + x[1]), [cap]))
    assert record.duals == pytest.approx({"cap[a-1]": 3.0, "cap[b.2]": 1.0})
    with pytest.raises(Infeasible, match=r"cap\[b.2\] \(memory of the pool\)"):
        solve(cp.Problem(cp.Maximize(x[0]), [cap, (x[1] >= 3).set_label("need")]))


def test_pyomo_names_are_plain():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x = pyo.Var([("a-1", "b.2")], bounds=(0, None))
    m.cap = pyo.Constraint([("a-1", "b.2")], rule=lambda m, *k: m.x[k] <= 4)
    m.value = pyo.Objective(expr=m.x["a-1", "b.2"], sense=pyo.maximize)
    assert solve(m).duals == {"cap[a-1,b.2]": 1.0}


def test_knapsack_bounds_agree_through_both_paths():
    best = knapsack_by_enumeration()
    for model in (knapsack_pyomo(), knapsack_cvxpy()):
        record = solve(model)
        assert record.sense == "max" and record.objective == pytest.approx(best)
        assert record.bound == pytest.approx(best) and record.gap == pytest.approx(0, abs=1e-9)
        assert not record.duals and record.termination is Termination.OPTIMAL


@given(st.integers(0, 42))
@settings(max_examples=15, deadline=None)
def test_knapsack_matches_enumeration(capacity):
    model = knapsack_pyomo(capacity)
    assert solve(model).objective == pytest.approx(knapsack_by_enumeration(capacity), abs=1e-9)
    assert all(v.value in (0.0, 1.0) for v in model.z.values())


def test_minimised_mip_bounds_are_below_the_value():
    import cvxpy as cp

    z = cp.Variable(3, integer=True)
    record = solve(cp.Problem(cp.Minimize(cp.sum(z) + 7), [2 * z >= 3, z <= 9]))
    assert record.objective == pytest.approx(13) and record.bound == pytest.approx(13) and record.sense == "min"


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_random_lps_match_scipy_through_both_paths(seed):
    import cvxpy as cp
    import pyomo.environ as pyo

    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(0, 5, (4, 6)), rng.uniform(5, 9, 4), rng.uniform(-3, 5, 6)
    truth = linprog(-c, A_ub=a, b_ub=b, bounds=[(0, 4)] * 6)
    m = pyo.ConcreteModel()
    m.x = pyo.Var(range(6), bounds=(0, 4))
    m.value = pyo.Objective(expr=sum(c[j] * m.x[j] for j in range(6)), sense=pyo.maximize)
    m.row = pyo.Constraint(range(4), rule=lambda m, i: sum(a[i, j] * m.x[j] for j in range(6)) <= b[i])
    x = cp.Variable(6, bounds=[0, 4])
    one, two = solve(m), solve(cp.Problem(cp.Maximize(c @ x), [(a @ x <= b).set_label("row")]))
    assert one.objective == pytest.approx(-truth.fun) and two.objective == pytest.approx(-truth.fun)
    prices = -truth.ineqlin.marginals
    assert [one.duals[f"row[{i}]"] for i in range(4)] == pytest.approx(prices, abs=1e-7)
    assert two.duals["row"] == pytest.approx(prices, abs=1e-7)


def test_a_quadratic_program_goes_to_highs():
    import cvxpy as cp

    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - np.array([1.0, 2.0]))), [(cp.sum(x) <= 1).set_label("sum")])
    record = solve(problem)
    assert record.solver == "HiGHS" and record.objective == pytest.approx(2)
    assert x.value == pytest.approx([0, 1], abs=1e-6) and record.duals["sum"] == pytest.approx(-2)


def test_a_program_with_cones_goes_to_clarabel_and_says_so():
    import cvxpy as cp

    x = cp.Variable()
    record = solve(cp.Problem(cp.Minimize(cp.inv_pos(x) + x), [(x >= 2).set_label("floor")]))
    assert record.solver == "Clarabel" and record.objective == pytest.approx(2.5, rel=1e-6)
    assert record.duals["floor"] == pytest.approx(0.75, rel=1e-4) and record.gap < 1e-5
    most = solve(cp.Problem(cp.Maximize(cp.sqrt(x)), [(x <= 9).set_label("cap")]))
    assert most.sense == "max" and most.objective == pytest.approx(3, rel=1e-6)
    assert most.bound == pytest.approx(3, rel=1e-5) and most.duals["cap"] == pytest.approx(1 / 6, rel=1e-3)


def test_parameters_are_read_as_constants():
    """CVXPY would need gigabytes to keep a matrix of parameters symbolic."""
    import cvxpy as cp

    cost, x = cp.Parameter((150, 150), nonneg=True), cp.Variable((150, 150), nonneg=True)
    cost.value = np.ones((150, 150))
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(cost, x))), [cp.sum(x, axis=0) >= 1])
    assert solve(problem).objective == pytest.approx(150)
    cost.value = 2 * np.ones((150, 150))
    assert solve(problem).objective == pytest.approx(300)


def test_infeasible_pyomo_models_name_the_conflict_and_its_sentence():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("plan")
    m.x = pyo.Var(["a", "b"], bounds=(0, None))
    m.demand = pyo.Constraint(expr=m.x["a"] + m.x["b"] >= 10, doc="all requests are served.")
    m.cap = pyo.Constraint(["a", "b"], rule=lambda m, k: m.x[k] <= 4, doc="memory of the pool")
    m.idle = pyo.Constraint(expr=m.x["a"] - m.x["b"] <= 100)
    with pytest.raises(Infeasible) as caught:
        solve(m)
    assert str(caught.value) == (
        "plan: demand (all requests are served); cap[a] (memory of the pool); cap[b] (memory of the pool) "
        "cannot hold together; relax one of them"
    )


def test_infeasible_bounds_and_constant_rows_are_named():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("plan")
    m.x = pyo.Var(bounds=(0, 3))
    m.need = pyo.Constraint(expr=2 * m.x >= 10)
    with pytest.raises(Infeasible, match=r"need; x <= 3 cannot hold together"):
        solve(m)
    m.x.setub(None)
    m.always = pyo.Constraint(expr=0 * m.x >= 1, doc="one is at most zero")
    with pytest.raises(Infeasible, match=r"always \(one is at most zero\) cannot hold"):
        solve(m)


def test_integer_only_conflicts_are_named():
    import cvxpy as cp
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("parity")
    m.x = pyo.Var([0, 1], domain=pyo.Integers, bounds=(0, 5))
    m.odd = pyo.Constraint(expr=2 * m.x[0] + 2 * m.x[1] == 3, doc="an odd total of even parts")
    with pytest.raises(Infeasible, match=r"with whole numbers odd \(an odd total of even parts\) cannot hold"):
        solve(m)
    z = cp.Variable(2, integer=True)
    with pytest.raises(Infeasible, match=r"with whole numbers odd cannot hold"):
        solve(cp.Problem(cp.Minimize(z[0]), [(2 * cp.sum(z) == 3).set_label("odd"), z >= 0, z <= 5]))


def test_infeasible_cvxpy_problems_name_label_and_position():
    import cvxpy as cp

    x = cp.Variable(3, nonneg=True)
    cap = (x <= np.array([1.0, 2.0, 3.0])).set_label("cap")
    with pytest.raises(Infeasible, match=r"demand; cap\[2\] cannot hold together|cap\[2\]; demand"):
        solve(cp.Problem(cp.Minimize(cp.sum(x)), [cap, (x[2] >= 4).set_label("demand")]))
    y = cp.Variable()
    with pytest.raises(Infeasible, match=r"cap.*cannot hold together"):
        solve(cp.Problem(cp.Minimize(cp.inv_pos(y)), [(y <= 1).set_label("cap"), (y >= 2).set_label("floor")]))


def test_unbounded_programs_are_refused():
    import cvxpy as cp
    import pyomo.environ as pyo

    m = pyo.ConcreteModel("free")
    m.x = pyo.Var()
    m.value = pyo.Objective(expr=m.x)
    m.row = pyo.Constraint(expr=m.x <= 3)
    with pytest.raises(SolveError, match="free is unbounded"):
        solve(m)
    x = cp.Variable(nonneg=True)
    for objective in (cp.Maximize(x), cp.Minimize(cp.exp(-x) - x)):
        with pytest.raises(SolveError, match="unbounded"):
            solve(cp.Problem(objective))


def market_split(modeler: str):
    """Cornuejols-Dawande market split with slack: feasible points are easy, proof is out of reach."""
    rng = np.random.default_rng(1)
    a = rng.integers(0, 100, (5, 40))
    half = a.sum(axis=1) // 2
    if modeler == "pyomo":
        import pyomo.environ as pyo

        m = pyo.ConcreteModel("split")
        m.z, m.s = pyo.Var(range(40), domain=pyo.Binary), pyo.Var(range(5))
        total = [sum(int(a[i, j]) * m.z[j] for j in range(40)) - int(half[i]) for i in range(5)]
        m.cost = pyo.Objective(expr=sum(m.s[i] for i in range(5)))
        m.up = pyo.Constraint(range(5), rule=lambda m, i: total[i] <= m.s[i])
        m.down = pyo.Constraint(range(5), rule=lambda m, i: total[i] >= -m.s[i])
        return m
    import cvxpy as cp

    z = cp.Variable(40, boolean=True)
    return cp.Problem(cp.Minimize(cp.norm1(a @ z - half)))


@pytest.mark.parametrize("modeler", ["pyomo", "cvxpy"])
def test_a_time_limit_returns_the_incumbent_with_its_gap(modeler):
    record = solve(market_split(modeler), SolveOptions(time_limit=1.0))
    assert record.termination is Termination.TIME_LIMIT and record.bound < record.objective
    assert record.label == f"time limit, gap {record.gap:.2%}" and record.gap > 0.1


@pytest.mark.parametrize("modeler", ["pyomo", "cvxpy"])
def test_a_time_limit_without_incumbent_is_an_error(modeler):
    with pytest.raises(SolveError, match="no feasible point within 1e-06 s"):
        solve(market_split(modeler), SolveOptions(time_limit=1e-6))


def test_a_gap_that_was_allowed_is_not_called_optimal():
    record = Solve(Termination.OPTIMAL, "max", 10.0, 10.5, "HiGHS", "1")
    assert record.label == "gap 5.00%" and record.gap == pytest.approx(0.05)


def test_unknown_options_are_refused():
    with pytest.raises(SolveError, match="no option 'mip_gap_rel'"):
        solve(diet_pyomo(), SolveOptions(highs=(("mip_gap_rel", 0.1),)))
    with pytest.raises(ValueError, match="timelimit"):
        SolveOptions.model_validate({"timelimit": 3.0})
    assert solve(diet_pyomo(), SolveOptions(highs=(("solver", "ipm"),))).objective == pytest.approx(22)


def test_other_models_are_refused():
    import cvxpy as cp
    import pyomo.environ as pyo

    with pytest.raises(SolveError, match="cannot solve a dict"):
        solve({})
    m = pyo.ConcreteModel("bent")
    m.x = pyo.Var(bounds=(0, 1))
    m.cost = pyo.Objective(expr=m.x**2)
    with pytest.raises(SolveError, match="nonlinear"):
        solve(m)
    m.del_component("cost")
    m.one, m.two = pyo.Objective(expr=m.x), pyo.Objective(expr=-m.x)
    with pytest.raises(SolveError, match="2 active objectives"):
        solve(m)
    x, z = cp.Variable(), cp.Variable(boolean=True)
    with pytest.raises(SolveError, match="not convex"):
        solve(cp.Problem(cp.Maximize(cp.square(x))))
    with pytest.raises(SolveError, match="mixed-integer with cones"):
        solve(cp.Problem(cp.Minimize(cp.inv_pos(x + z)), [x <= 3]))


def test_fixed_and_unused_variables_and_missing_objectives():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x, m.y, m.unused = pyo.Var(bounds=(0, 5)), pyo.Var(), pyo.Var(bounds=(2, 3))
    m.y.fix(1.5)
    m.row = pyo.Constraint(expr=m.x + m.y == 4)
    record = solve(m)
    assert m.x.value == pytest.approx(2.5) and m.unused.value == 2 and record.objective == 0


def test_no_negative_zeros_are_returned():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x = pyo.Var(range(3), bounds=(0, None))
    m.cost = pyo.Objective(expr=-1 * sum(m.x[i] for i in range(3)), sense=pyo.maximize)
    m.row = pyo.Constraint(expr=m.x[0] + m.x[1] <= 3)
    record = solve(m)
    numbers = [record.objective, record.bound, *record.duals.values(), *(v.value for v in m.x.values())]
    assert not any(np.signbit(numbers))


def test_threads_may_change_between_solves_and_solves_may_run_in_threads():
    for threads in (1, 2, 1):
        assert solve(knapsack_pyomo(), SolveOptions(threads=threads)).objective == pytest.approx(21)
    found: list[float] = []
    workers = [threading.Thread(target=lambda: found.append(solve(knapsack_pyomo()).objective)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == pytest.approx([21, 21])


@pytest.mark.parametrize("modeler", ["pyomo", "cvxpy"])
def test_nothing_but_our_own_output_reaches_stdout(modeler):
    """HiGHS greets on the C stdout once per process, which would break a JSON stream."""
    code = f"import json; from tests.test_solve import *; print(json.dumps(solve(knapsack_{modeler}()).objective))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(21)


def test_pyomos_own_interface_agrees():
    import pyomo.environ as pyo

    ours, theirs = diet_pyomo(), diet_pyomo()
    solve(ours)
    pyo.SolverFactory("appsi_highs").solve(theirs)
    assert theirs.x.value == pytest.approx(ours.x.value) and theirs.y.value == pytest.approx(ours.y.value)


@dataclass(frozen=True)
class Ladder:
    """max x <= 10; each round cuts one more off, `last` is the cut of round 3."""

    last: object = None
    name: str = "ladder"

    def build(self, scenario):
        import pyomo.environ as pyo

        m = pyo.ConcreteModel("ladder")
        m.x = pyo.Var(bounds=(0, 10))
        m.value = pyo.Objective(expr=m.x, sense=pyo.maximize)
        m.cuts = pyo.ConstraintList(doc="a rung")
        m.cuts.add(m.x <= 10)
        return m

    def tighten(self, model, solve, scenario):
        if len(model.cuts) == 3 and self.last:
            self.last(model)
        else:
            model.cuts.add(model.x <= model.x.value - 1)
        return 1

    def extract(self, model, solve, scenario):
        return Plan(self.name, lambda request, replicas: 0, figures={"x": model.x.value})


def test_tightening_stops_after_the_rounds_allowed():
    plan = Optimized(Ladder(), rounds=4).plan(None)
    assert plan.solve.rounds == 4 and plan.figures["x"] == plan.solve.objective == pytest.approx(7)
    assert Optimized(Ladder(), rounds=1).plan(None).solve.objective == pytest.approx(10)


def test_a_cut_that_leaves_nothing_is_infeasible():
    with pytest.raises(Infeasible, match=r"ladder: cuts\[\d\] \(a rung\)"):
        Optimized(Ladder(last=lambda m: m.cuts.add(m.x >= 11))).plan(None)


def test_a_round_that_cannot_be_solved_keeps_the_last_solution():
    """The third round makes the program unbounded, which stands for any failure to solve."""

    def open_up(m):
        m.cuts.deactivate()
        m.x.setub(None)

    plan = Optimized(Ladder(last=open_up)).plan(None)
    assert plan.solve.rounds == 3 and plan.figures["x"] == plan.solve.objective == pytest.approx(8)


def test_a_program_without_a_name_is_called_the_program_whoever_refuses_it():
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x = pyo.Var(bounds=(0, 1))
    m.goal = pyo.Objective(expr=m.x)
    m.bad = pyo.Constraint(expr=m.x**3 <= 1)
    with pytest.raises(SolveError, match=r"^the program: "):
        solve(m)
