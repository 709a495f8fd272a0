"""Routing programs against closed forms, a second hand-written program, brute force and finite differences."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

import formulations
from formulations import POLICIES
from formulations.routing import FewPools, MaxMargin, MinCost, MinDelay
from llmopt.capacity import estimated_load
from llmopt.errors import Infeasible
from llmopt.plan import check_plan
from llmopt.policy import Optimized
from llmopt.registry import get_policy
from llmopt.scenario import Scenario
from llmopt.solution import SolveOptions, Termination
from llmopt.stability import outer_factor


def constant(value):
    return {"law": "constant", "value": value}


def cls(name, prompt, output, rate, **more):
    return {"name": name, "prompt": constant(prompt), "output": constant(output), "rate": rate, **more}


def pool(name, *pieces, replicas=1, **more):
    """One token a block and no first-token rule, so that the moments are those of the textbook."""
    plain = {"kv_capacity": 100_000, "max_batch": 1000, "token_budget": 8192, "block_size": 1, "first_token": "decode"}
    return {"name": name, "replicas": replicas, "step_time": list(pieces), **plain, "preemption": "swap", **more}


def scenario(pools, classes) -> Scenario:
    return Scenario.model_validate({"name": "case", "pools": pools, "workload": {"classes": classes}})


def worked(prefill_ms, decode_ms):
    """A step without base: a request costs its work alone, prefill_ms x prompt + decode_ms x output."""
    return {"prefill": prefill_ms / 1000, "decode": decode_ms / 1000}


def two_by_two(rates=(1.0, 1.0), replicas=(1, 1)) -> Scenario:
    """Seconds of work: short 0.2 on fast, 0.4 on slow; long 0.5 on fast, 0.5 on slow."""
    return scenario(
        [pool("fast", worked(0.5, 1), replicas=replicas[0]), pool("slow", worked(0.25, 3), replicas=replicas[1])],
        [cls("short", 200, 100, rates[0]), cls("long", 800, 100, rates[1])],
    )


def solved(formulation, case, **options):
    return Optimized(formulation, SolveOptions(**options)).plan(case)


def seconds_by_hand(case):
    """(1) for constant lengths with one prefill chunk, written from the formulas; per pool (n_rows, n_classes)."""
    tables = []
    for p in case.pools:
        rows = []
        for piece in p.step_time:
            for kind in ("kv", "batch", "tokens"):
                row = []
                for c in case.workload.classes:
                    s, o = c.prompt.value, c.output.value
                    read, pairs = s * o + o * (o - 1) / 2, s * s / 2
                    work = piece.prefill * s + piece.decode * o + piece.kv * read + piece.pairs * pairs
                    used = {"kv": s + s * o + o * (o + 1) / 2, "batch": 1 + o, "tokens": s + o}[kind]
                    cap = {"kv": p.kv_capacity, "batch": p.max_batch, "tokens": p.token_budget}[kind]
                    row.append(work + piece.base * used / cap)
                rows.append(row)
        tables.append(np.array(rows))
    return tables


def margin_by_linprog(case):
    """max theta over y_cj = theta x_cj, class by class."""
    rates, pools = case.workload.rates, case.pools
    n_c, n_j = len(rates), len(pools)
    upper, limits = [], []
    for j, table in enumerate(seconds_by_hand(case)):
        for row in table:
            line = np.zeros(n_c * n_j + 1)
            line[[c * n_j + j for c in range(n_c)]] = rates * row
            upper.append(line)
            limits.append(pools[j].replicas)
    equal = np.zeros((n_c, n_c * n_j + 1))
    for c in range(n_c):
        equal[c, c * n_j : (c + 1) * n_j] = 1
    equal[:, -1] = -1
    goal = np.zeros(n_c * n_j + 1)
    goal[-1] = -1
    bounds = [(0, None if ok else 0) for row in case.allowed for ok in row] + [(0, None)]
    return -linprog(goal, upper, limits, equal, np.zeros(n_c), bounds).fun


@st.composite
def small_cases(draw):
    """One to three classes and pools, one or two pieces, caps in the range where each of them may bind."""
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    classes = [
        cls(f"c{k}", int(rng.integers(1, 2000)), int(rng.integers(1, 600)), float(rng.uniform(0.1, 5)))
        for k in range(draw(st.integers(1, 3)))
    ]
    pools = []
    for k in range(draw(st.integers(1, 3))):
        pieces = [
            {
                "base": float(rng.uniform(0, 0.02)),
                "prefill": float(rng.uniform(0, 1e-4)),
                "decode": float(rng.uniform(0, 1e-3)),
                "kv": float(rng.uniform(0, 1e-7)),
                "pairs": float(rng.uniform(0, 1e-8)),
            }
            for _ in range(draw(st.integers(1, 2)))
        ]
        caps = {"kv_capacity": int(rng.integers(3000, 200_000)), "max_batch": int(rng.integers(4, 200))}
        pools.append(pool(f"p{k}", *pieces, replicas=int(rng.integers(1, 5)), token_budget=4096, **caps))
    return scenario(pools, classes)


def test_max_margin_two_pools_two_classes_by_hand():
    """Short is served better by fast (ratio 2 against 1), so fast takes all of it and helps with long.

    theta (0.2 + 0.5 y) = 1 on fast, theta 0.5 (1 - y) = 1 on slow: y = 0.3, theta = 1 / 0.35.
    """
    plan = solved(MaxMargin(estimate=False), two_by_two())
    assert plan.solve.objective == pytest.approx(1 / 0.35) and plan.solve.label == "optimal"
    assert plan.router.fractions == pytest.approx(np.array([[1, 0], [0.3, 0.7]]))
    assert [plan.figures[k] for k in ("outer_rate", "bound_rate")] == pytest.approx([2 / 0.35] * 2)
    assert plan.figures["load"]["slow"] == pytest.approx(0.35, rel=0.05)


def test_prices_of_replicas_by_hand():
    """One more fast replica: with n and m replicas theta = (n + m) / 0.7 while both share long, so 2 / 0.7 each."""
    prices = solved(MaxMargin(estimate=False), two_by_two()).figures["prices"]
    assert prices["fast"]["replica"] == prices["slow"]["replica"] == pytest.approx(2 / 0.7)


@given(small_cases())
@settings(max_examples=25, deadline=None)
def test_max_margin_matches_an_independent_program(case):
    plan = solved(MaxMargin(estimate=False), case)
    assert plan.solve.objective == pytest.approx(margin_by_linprog(case), rel=1e-6)
    assert outer_factor(case, plan.router.fractions) == pytest.approx(plan.solve.objective, rel=1e-6)
    check_plan(plan, case)


@given(small_cases())
@settings(max_examples=15, deadline=None)
def test_both_modellers_give_the_same_margin_and_duals(case):
    one = solved(MaxMargin(estimate=False), case).solve
    two = solved(MaxMargin(estimate=False, modeler="cvxpy"), case).solve
    assert one.objective == pytest.approx(two.objective, rel=1e-7)
    assert set(one.duals) == set(two.duals)
    replicas = {p.name: p.replicas for p in case.pools}
    for record in (one, two):
        worth = sum(d * replicas[name[10:-1].split(",")[0]] for name, d in record.duals.items() if name[0:4] == "stab")
        assert worth == pytest.approx(record.objective, rel=1e-6)


def test_max_margin_beats_every_split_on_a_grid():
    case = scenario(
        [
            pool("memory", {"base": 0.02}, kv_capacity=20_000),
            pool("batch", {"base": 0.01}, max_batch=20),
            pool("mixed", {"base": 0.01, "kv": 1e-7}, {"prefill": 2e-4}, replicas=2),
        ],
        [cls("chat", 300, 200, 3.0), cls("code", 1500, 40, 2.0)],
    )
    best = solved(MaxMargin(estimate=False), case).solve.objective
    grid = np.linspace(0, 1, 21)
    splits = [(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1 + 1e-9]
    tables = seconds_by_hand(case)
    found = 0.0
    for x in itertools.product(splits, splits):
        loads = [
            (t @ (case.workload.rates * np.array(x)[:, j])).max() / case.pools[j].replicas for j, t in enumerate(tables)
        ]
        found = max(found, 1 / max(loads))
    assert found <= best * (1 + 1e-9) and found > 0.97 * best


@pytest.mark.parametrize("factor", [0.1, 7])
def test_the_critical_rate_does_not_depend_on_the_rate_and_grows_with_the_replicas(factor):
    base = solved(MaxMargin(estimate=False), two_by_two())
    faster = solved(MaxMargin(estimate=False), two_by_two(rates=(factor, factor)))
    assert faster.figures["outer_rate"] == pytest.approx(base.figures["outer_rate"])
    assert faster.solve.objective == pytest.approx(base.solve.objective / factor)
    larger = solved(MaxMargin(estimate=False), two_by_two(replicas=(3, 3)))
    assert larger.figures["outer_rate"] == pytest.approx(3 * base.figures["outer_rate"])


def roofline() -> Scenario:
    """Memory-bound decode and compute-bound prefill alternate, so that the outer bound is optimistic."""
    lengths = {"prompt": {"law": "lognormal", "mean": 1000.0, "cv": 1.0, "max": 8000}}
    lengths["output"] = {"law": "lognormal", "mean": 150.0, "cv": 0.8, "max": 1000}
    short = {"prompt": {"law": "lognormal", "mean": 200.0, "cv": 1.0, "max": 2000}}
    short["output"] = {"law": "lognormal", "mean": 300.0, "cv": 0.8, "max": 1000}
    return scenario(
        [
            pool(
                "big", {"base": 0.012, "kv": 1e-7}, {"base": 0.004, "prefill": 6e-5}, kv_capacity=400_000, max_batch=64
            ),
            pool("small", {"base": 0.02, "kv": 2e-7}, {"base": 0.004, "prefill": 2e-4}, kv_capacity=60_000, replicas=2),
        ],
        [{"name": "code", "rate": 2.0, **lengths}, {"name": "chat", "rate": 4.0, **short}],
    )


@pytest.mark.parametrize("modeler", ["pyomo", "cvxpy"])
def test_cuts_close_the_gap_between_program_and_estimate(modeler):
    case = roofline()
    loose, tight = solved(MaxMargin(estimate=False), case), solved(MaxMargin(modeler=modeler), case)
    total = case.workload.total_rate
    assert loose.figures["critical_rate"] < 0.97 * loose.solve.objective * total
    assert tight.solve.rounds > 1 and tight.figures["bound_rate"] == pytest.approx(loose.figures["bound_rate"])
    assert tight.figures["critical_rate"] == pytest.approx(tight.solve.objective * total, rel=0.005)
    assert tight.figures["critical_rate"] >= loose.figures["critical_rate"]
    assert {row["piece"] for row in tight.figures["binding"]} <= {"piece 1", "piece 2"}


def larger(case, j, **values):
    return case.replace(**{f"pools.{j}.{key}": value for key, value in values.items()})


def priced_case(load: float = 0.8) -> Scenario:
    """KV memory binds on one pool, the batch on another, the token budget on the third; `load` of the best routing."""
    case = scenario(
        [
            pool("memory", {"base": 0.02, "kv": 1e-8}, kv_capacity=20_000, replicas=200, price=2.0),
            pool("batch", {"base": 0.03}, max_batch=20, replicas=100, price=3.0),
            pool(
                "tokens", {"base": 0.05, "prefill": 1e-6}, token_budget=600, prefill_chunk=600, replicas=100, price=4.0
            ),
        ],
        [cls("chat", 300, 200, 60.0), cls("code", 550, 40, 50.0), cls("essay", 100, 700, 10.0)],
    )
    case = case.replace(**{"pools.2.kv_capacity": 10_000_000})
    scale = load * margin_by_linprog(case)
    return case.replace(**{f"workload.classes.{c}.rate": scale * r for c, r in enumerate(case.workload.rates.tolist())})


CHANGES = [
    (0, "replicas", 1, "replica"),
    (1, "replicas", 1, "replica"),
    (2, "replicas", 1, "replica"),
    (0, "kv_capacity", 200, "kv_1000_tokens"),
    (1, "max_batch", 1, "batch_slot"),
    (2, "token_budget", 1, "budget_token"),
]


@pytest.mark.parametrize(("j", "key", "step", "price"), CHANGES)
@pytest.mark.parametrize("kind", ["margin", "margin cvxpy", "cost", "load", "delay", "delay cone"])
def test_prices_are_finite_differences(kind, j, key, step, price):
    formulation = {
        "margin": MaxMargin(estimate=False),
        "margin cvxpy": MaxMargin(estimate=False, modeler="cvxpy"),
        "cost": MinCost(estimate=False),
        "load": MinCost(objective="load", estimate=False),
        "delay": MinDelay(estimate=False, accuracy=1e-7),
        "delay cone": MinDelay(estimate=False, cone=True),
    }[kind]
    value = {"margin": "outer_rate", "delay": "mean_delay"}.get(kind.split()[0], "cost")
    case = priced_case()
    base = getattr(case.pools[j], key)
    less, more = (larger(case, j, **{key: base + sign * step}) for sign in (-1, 1))
    low, high = (solved(formulation, s).figures[value] for s in (less, more))
    unit = 1000 if price == "kv_1000_tokens" else 1
    slope = (high - low) / (2 * step) * unit * (1 if value == "outer_rate" else -1)
    found = solved(formulation, case).figures["prices"][case.pools[j].name][price]
    assert found == pytest.approx(slope, rel=0.03, abs=1e-9)


@pytest.mark.parametrize(
    ("key", "step", "price"),
    [("replicas", 4, "replica"), ("kv_capacity", 4000, "kv_1000_tokens"), ("max_batch", 4, "batch_slot")],
)
@pytest.mark.parametrize("j", [0, 1])
def test_prices_with_cuts_are_near_finite_differences(j, key, step, price):
    """The estimate is a mean over whole requests, so its slope in a capacity is good to some 15 percent."""
    case = roofline().replace(**{"pools.0.replicas": 40, "pools.1.replicas": 80})
    plan = solved(MaxMargin(accuracy=1e-5), case)
    more = solved(MaxMargin(accuracy=1e-5), larger(case, j, **{key: getattr(case.pools[j], key) + step}))
    unit = 1000 if price == "kv_1000_tokens" else 1
    slope = (more.solve.objective - plan.solve.objective) * case.workload.total_rate / step * unit
    assert plan.figures["prices"][case.pools[j].name][price] == pytest.approx(slope, rel=0.2, abs=0.05)


@pytest.mark.parametrize("formulation", [MinCost(), MinCost("load"), MinDelay()], ids=str)
def test_every_program_grants_what_the_estimate_says_is_needed(formulation):
    case = roofline()
    plan = solved(formulation, case)
    load = plan.figures["load"]
    if isinstance(formulation, MinCost):
        used = plan.figures["replicas_used"]
        assert all(load[p.name] * p.replicas <= 0.9 * used[p.name] * 1.002 + 1e-9 for p in case.pools)
    else:
        n, rate = {p.name: p.replicas for p in case.pools}, case.workload.total_rate
        felt = sum(n[k] * rho / (1 - rho) for k, rho in load.items()) / rate
        assert plan.figures["mean_delay"] == pytest.approx(felt, rel=0.002)


def test_cuts_find_the_best_split_that_a_grid_finds():
    case = roofline()
    rates, classes = case.workload.rates, case.workload.classes
    best = 0.0
    for a in np.linspace(0, 1, 11):
        for b in np.linspace(0, 1, 11):
            split = np.array([[a, 1 - a], [b, 1 - b]])
            loads = [estimated_load(p, classes, rates * split[:, j]) for j, p in enumerate(case.pools)]
            best = max(best, rates.sum() / max(loads))
    assert solved(MaxMargin(), case).figures["critical_rate"] > 0.998 * best


def test_a_program_that_only_the_estimate_forbids_says_so():
    case = roofline()
    margin = solved(MaxMargin(), case).figures["critical_rate"] / case.workload.total_rate
    rates = {f"workload.classes.{c}.rate": float(r) for c, r in enumerate(0.95 * margin * case.workload.rates)}
    with pytest.raises(Infeasible, match=r"min-cost: by the step-mean estimate these rates need \d\.\d% more replicas"):
        solved(MinCost(), case.replace(**rates))
    rates = {key: rate / 0.95 for key, rate in rates.items()}
    with pytest.raises(Infeasible, match=r"min-delay: by the step-mean estimate"):
        solved(MinDelay(), case.replace(**rates))


def test_min_cost_fills_the_cheapest_pool_first():
    """Cost of a request: 0.2 s x 2 on a, 0.3 s x 1 on b; b serves 0.9 x 3 / 0.3 = 9 of 12 requests/s, a the rest."""
    case = scenario(
        [pool("a", worked(0, 2), replicas=2, price=2.0), pool("b", worked(0, 3), replicas=3, price=1.0)],
        [cls("all", 10, 100, 12.0)],
    )
    plan = solved(MinCost(estimate=False), case)
    assert plan.router.fractions == pytest.approx(np.array([[0.25, 0.75]]))
    assert plan.figures["replicas_used"] == pytest.approx({"a": 3 * 0.2 / 0.9, "b": 3.0})
    assert plan.figures["cost"] == pytest.approx(3 + 2 * 0.6 / 0.9) and plan.figures["cost_unit"] == "USD/hour"
    assert plan.figures["prices"]["b"]["replica"] == pytest.approx(2 * 0.2 / 0.3 - 1)
    load = solved(MinCost(objective="load", estimate=False), case)
    assert load.router.fractions == pytest.approx(np.array([[0.75, 0.25]]))
    free = solved(MinCost(estimate=False), larger(case, 1, price=0.0))
    assert free.figures["cost_unit"] == "replicas" and free.figures["cost"] == pytest.approx(2 + 3 * 0.3 / 0.9)


def test_a_tpot_requirement_costs_replicas():
    """(4): the piece 0.01 + 0.0005 D per step needs 0.0005 o lambda <= (1 - 0.01 / T) used."""
    piece = {"base": 0.01, "decode": 0.0005}
    case = scenario([pool("a", piece, replicas=12)], [cls("chat", 10, 400, 10.0, tpot=0.0125)])
    plan = solved(MinCost(estimate=False), case)
    assert plan.figures["replicas_used"]["a"] == pytest.approx(0.0005 * 400 * 10 / (1 - 0.01 / 0.0125))
    loose = solved(MinCost(estimate=False), case.replace(**{"workload.classes.0.tpot": 1.0}))
    assert loose.figures["replicas_used"]["a"] < 0.5 * plan.figures["replicas_used"]["a"]
    with pytest.raises(
        Infeasible, match=r"tpot\[a,piece 1\] \(mean time per output token of the strictest class there\)"
    ):
        solved(MinCost(estimate=False), case.replace(**{"workload.classes.0.tpot": 0.0105}))


def test_a_class_is_barred_where_an_empty_step_is_too_slow():
    case = scenario(
        [pool("slow", {"base": 0.05}, replicas=9, price=1.0), pool("fast", {"base": 0.01}, replicas=9, price=9.0)],
        [cls("chat", 100, 100, 5.0, tpot=0.04), cls("batch", 100, 100, 5.0)],
    )
    plan = solved(MinCost(estimate=False), case)
    assert plan.router.fractions == pytest.approx(np.array([[0, 1], [1, 0]]))
    with pytest.raises(Infeasible, match=r"class 'chat': tpot = 0.005 s .* \(at least 0.01 s\)"):
        solved(MinCost(), case.replace(**{"workload.classes.0.tpot": 0.005}))


def test_infeasible_programs_name_what_cannot_hold():
    case = two_by_two(rates=(0.1, 4.0))
    with pytest.raises(Infeasible) as caught:
        solved(MinCost(estimate=False), case)
    for part in (
        "replicas[slow]",
        "stability[slow,piece 1,kv] (load at most 0.9",
        "served[long]",
        "cannot hold together",
    ):
        assert part in str(caught.value)
    with pytest.raises(Infeasible, match=r"load\[fast\] \(load at most 0.99\)"):
        solved(MinDelay(estimate=False), case)


def test_the_largest_request_keeps_a_class_out_of_a_pool():
    case = scenario(
        [pool("small", worked(0.1, 1), kv_capacity=900), pool("large", worked(0.1, 1), replicas=3)],
        [cls("short", 100, 100, 1.0), cls("long", 1000, 100, 1.0)],
    )
    for policy in POLICIES["routing"]:
        plan = policy.plan(case)
        check_plan(plan, case)
        assert plan.router.fractions[1, 0] == 0


def test_min_delay_follows_the_square_root_rule():
    """Stationarity: w_j / (1 - rho_j)^2 is the same in every pool that is used."""
    case = scenario(
        [pool("a", worked(0, 2), replicas=2), pool("b", worked(0, 3), replicas=3)], [cls("all", 10, 100, 12.0)]
    )
    w, n = np.array([0.2, 0.3]), np.array([2.0, 3.0])
    root = (n / w @ np.sqrt(w)) / (n / w @ np.ones(2) - 12.0)
    rho = 1 - np.sqrt(w) / root
    for cone in (False, True):
        plan = solved(MinDelay(estimate=False, accuracy=1e-5, cone=cone), case)
        assert plan.solve.solver == ("Clarabel" if cone else "HiGHS") and plan.solve.sense == "min"
        assert plan.solve.objective == pytest.approx(n @ (rho / (1 - rho)) / 12, rel=1e-4)
        assert plan.router.fractions[0] == pytest.approx(n * rho / w / 12, rel=3e-3)
        assert plan.solve.bound <= plan.solve.objective * (1 + 1e-7) and plan.solve.gap <= 1.1e-5


@given(small_cases())
@settings(max_examples=10, deadline=None)
def test_min_delay_matches_scipy_and_the_conic_solver(case):
    margin = margin_by_linprog(case)
    rates = case.workload.rates
    case = case.replace(**{f"workload.classes.{c}.rate": float(0.7 * margin * r) for c, r in enumerate(rates)})
    tangents, cone = (solved(MinDelay(estimate=False, accuracy=1e-5, cone=flag), case) for flag in (False, True))
    assert tangents.solve.objective == pytest.approx(cone.solve.objective, rel=1e-4)
    assert tangents.solve.bound <= cone.solve.objective * (1 + 1e-5)
    tables, rates = seconds_by_hand(case), case.workload.rates
    n = np.array([p.replicas for p in case.pools], dtype=float)

    def delay(x):
        split = x.reshape(len(rates), len(n))
        rho = np.array([(t @ (rates * split[:, j])).max() / n[j] for j, t in enumerate(tables)])
        return np.inf if rho.max() >= 1 else float(n @ (rho / (1 - rho))) / rates.sum()

    rng = np.random.default_rng(0)
    best = tangents.router.fractions
    assert delay(best.ravel()) == pytest.approx(tangents.solve.objective, rel=1e-6)
    allowed = np.array(case.allowed, dtype=float)
    for _ in range(200):
        other = allowed * rng.dirichlet(np.ones(len(n)), len(rates))
        other /= other.sum(axis=1, keepdims=True)
        for step in (0.01, 0.1, 1.0):
            assert delay((best + step * (other - best)).ravel()) >= tangents.solve.bound * (1 - 1e-9)


def test_min_delay_matches_a_descent_method():
    case = two_by_two(rates=(1.5, 1.5))
    w = np.array([[0.2, 0.35], [0.5, 0.5]])

    def delay(x):
        rho = np.array(
            [1.5 * x[0] * w[0, 0] + 1.5 * x[1] * w[1, 0], 1.5 * (1 - x[0]) * w[0, 1] + 1.5 * (1 - x[1]) * w[1, 1]]
        )
        return float((rho / (1 - rho)).sum()) / 3

    truth = minimize(delay, [0.5, 0.5], bounds=[(0, 1), (0, 1)], method="L-BFGS-B", options={"ftol": 1e-14})
    plan = solved(MinDelay(estimate=False, accuracy=1e-6), case)
    assert plan.solve.objective == pytest.approx(truth.fun, rel=2e-5)
    assert plan.router.fractions[:, 0] == pytest.approx(truth.x, abs=2e-3)


def margin_by_enumeration(case, k):
    """Try every choice of at most k pools for each class; each leaves an independent linear program."""
    n_j = len(case.pools)
    choices = [s for size in range(1, k + 1) for s in itertools.combinations(range(n_j), size)]
    best = 0.0
    for picks in itertools.product(choices, repeat=len(case.workload.classes)):
        if all(any(case.allowed[c][j] for j in pick) for c, pick in enumerate(picks)):
            best = max(best, _margin_on(case, picks))
    return best


def _margin_on(case, picks):
    rates, tables = case.workload.rates, seconds_by_hand(case)
    names = [(c, j) for c, pick in enumerate(picks) for j in pick if case.allowed[c][j]]
    upper, limits = [], []
    for j, table in enumerate(tables):
        for row in table:
            upper.append([rates[c] * row[c] * (q == j) for c, q in names] + [0.0])
            limits.append(case.pools[j].replicas)
    equal = [[float(c == d) for d, _ in names] + [-1.0] for c in range(len(rates))]
    goal = [0.0] * len(names) + [-1.0]
    return -linprog(goal, upper, limits, equal, np.zeros(len(rates))).fun


@given(small_cases(), st.integers(1, 2))
@settings(max_examples=15, deadline=None)
def test_few_pools_matches_enumeration(case, k):
    plan = solved(FewPools(k, estimate=False), case)
    assert plan.solve.objective == pytest.approx(margin_by_enumeration(case, k), rel=1e-5)
    assert plan.solve.bound == pytest.approx(plan.solve.objective, rel=1e-5)
    assert ((plan.router.fractions > 1e-7).sum(axis=1) <= k).all()
    assert plan.solve.objective <= margin_by_linprog(case) * (1 + 1e-6)


def drawn(seed, n_classes, n_pools):
    """Rooflines with wide length laws, some of them large against KV memory, where mixing classes costs."""
    rng = np.random.default_rng(seed)
    classes = [
        {
            "name": f"c{k}",
            "rate": float(rng.uniform(0.5, 3)),
            "prompt": {"law": "lognormal", "mean": float(rng.uniform(100, 3000)), "cv": 1.0, "max": 16000},
            "output": {"law": "lognormal", "mean": float(rng.uniform(50, 400)), "cv": 0.8, "max": 2000},
        }
        for k in range(n_classes)
    ]
    pools = [
        pool(
            f"p{k}",
            {"base": float(rng.uniform(0.008, 0.03)), "kv": float(rng.uniform(5e-8, 2e-7))},
            {"base": 0.004, "prefill": float(rng.uniform(5e-5, 2e-4))},
            kv_capacity=int(rng.integers(50_000, 400_000)),
            max_batch=int(rng.integers(32, 256)),
            replicas=int(rng.integers(1, 8)),
            block_size=16,
        )
        for k in range(n_pools)
    ]
    return scenario(pools, classes)


@pytest.mark.parametrize("seed", [1, 4])
def test_few_pools_finds_the_best_assignment_by_the_estimate(seed):
    case = drawn(seed, 3, 3)
    rates, classes = case.workload.rates, case.workload.classes
    need = {}
    for j, p in enumerate(case.pools):
        for members in itertools.product([0, 1], repeat=3):
            need[j, members] = estimated_load(p, classes, rates * np.array(members))
    best = max(
        1 / max(need[j, tuple(int(a == j) for a in picks)] for j in range(3))
        for picks in itertools.product(range(3), repeat=3)
    )
    plan = solved(FewPools(1), case)
    assert plan.solve.objective == pytest.approx(best, rel=0.005) and plan.solve.bound >= plan.solve.objective


def test_max_margin_beats_random_splits_where_the_estimate_is_not_convex():
    case = drawn(7, 4, 3)
    rates, classes, rng = case.workload.rates, case.workload.classes, np.random.default_rng(0)
    plan, loose = solved(MaxMargin(), case), solved(MaxMargin(estimate=False), case)
    assert plan.figures["critical_rate"] > 1.1 * loose.figures["critical_rate"] and plan.solve.rounds > 3
    for k in range(60):
        other = rng.dirichlet(np.full(3, 0.5), 4)
        split = other if k < 30 else plan.router.fractions + 0.1 * (other - plan.router.fractions)
        loads = [estimated_load(p, classes, rates * split[:, j]) for j, p in enumerate(case.pools)]
        assert 1 / max(loads) < plan.solve.objective * 1.005


def test_few_pools_with_every_pool_allowed_is_max_margin():
    case = roofline()
    assert solved(FewPools(2, estimate=False), case).solve.objective == pytest.approx(
        solved(MaxMargin(estimate=False), case).solve.objective, rel=1e-6
    )


def test_few_pools_reports_the_gap_at_a_time_limit():
    rng = np.random.default_rng(3)
    case = scenario(
        [pool(f"p{j}", worked(*rng.uniform(0.1, 1, 2).tolist())) for j in range(12)],
        [cls(f"c{c}", *rng.integers(50, 900, 2).tolist(), 1.0) for c in range(60)],
    )
    plan = solved(FewPools(1, estimate=False), case, time_limit=1.0, gap=0.0)
    assert plan.solve.termination is Termination.TIME_LIMIT and plan.solve.bound > plan.solve.objective
    assert plan.solve.label == f"time limit, gap {plan.solve.gap:.2%}"
    check_plan(plan, case)


def test_idle_classes_do_no_harm():
    case = Scenario.model_validate(
        {
            "name": "idle",
            "pools": two_by_two()._raw()["pools"],
            "workload": {
                "rate": 2.0,
                "classes": [
                    {"name": "all", "share": 1.0, "prompt": constant(200), "output": constant(100)},
                    {"name": "none", "share": 0.0, "prompt": constant(800), "output": constant(100)},
                ],
            },
        }
    )
    for policy in POLICIES["routing"]:
        check_plan(policy.plan(case), case)


def test_every_plan_is_json_ready_and_names_its_proof():
    case = roofline()
    for policy in POLICIES["routing"]:
        plan = policy.plan(case)
        figures = json.loads(json.dumps(dict(plan.figures), allow_nan=False))
        assert 0 < figures["critical_rate"] <= figures["outer_rate"] * (1 + 1e-9)
        assert set(figures["fractions"]) == {"code", "chat"} and set(figures["load"]) == {"big", "small"}
        assert plan.policy == policy.name and plan.solve.version and plan.solve.build_seconds > 0
        assert plan.router.spread == "cyclic"


def test_importing_the_formulations_imports_no_modeller():
    code = (
        "import sys, formulations; print(sorted({'cvxpy', 'pyomo', 'highspy', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_formulation_in_the_readme_runs(tmp_path):
    text = (Path(formulations.__file__).parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    (tmp_path / "spread.py").write_text(code)
    case = two_by_two()
    plan = get_policy(f"{tmp_path / 'spread.py'}:policy").plan(case)
    check_plan(plan, case)
    assert plan.solve.label == "optimal" and plan.router.fractions == pytest.approx(np.full((2, 2), 0.5))
