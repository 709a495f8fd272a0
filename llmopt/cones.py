"""Convex programs with cones, which HiGHS cannot take: Clarabel through CVXPY."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np

from llmopt.bridge import program_name
from llmopt.bridge_cvxpy import maximises, model_duals, row_names
from llmopt.errors import Infeasible, SolveError
from llmopt.solution import Solve, SolveOptions, Termination


def solve_cone(problem: Any, compiled: tuple[Any, Any, Any], options: SolveOptions, start: float) -> Solve:
    """Solve a compiled CVXPY problem by Clarabel; `start` is when its translation began (`perf_counter`).

    The bound is Clarabel's dual objective, so the gap is what the interior-point method left open.

    Raises
    ------
    Infeasible, SolveError
        As `llmopt.solve.solve` does; the requirements named are those that carry the infeasibility certificate.
    """
    data, chain, inverse = compiled
    build_seconds = perf_counter() - start
    effort = {"time_limit": options.time_limit, "max_threads": options.threads}
    answer = chain.solve_via_data(problem, data, solver_opts=effort)
    status = str(answer.status)
    _refuse(problem, status, answer, inverse, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.unpack_results(answer, chain, inverse)
    sense = -1.0 if maximises(problem) else 1.0
    offset = float(inverse[-1]["offset"])
    return Solve(
        termination=Termination.OPTIMAL if status == "Solved" else Termination.ITERATION_LIMIT,
        sense="max" if sense < 0 else "min",
        objective=float(problem.value) + 0.0,
        bound=sense * (float(answer.obj_val_dual) + offset) + 0.0,
        solver="Clarabel",
        version=version("clarabel"),
        build_seconds=build_seconds,
        solve_seconds=float(answer.solve_time),
        variables=len(answer.x),
        constraints=len(answer.z),
        duals=MappingProxyType(model_duals(problem)),
    )


def _refuse(problem: Any, status: str, answer: Any, inverse: Any, options: SolveOptions) -> None:
    name = program_name(problem)
    if status.endswith("PrimalInfeasible"):
        weight = np.abs(np.asarray(answer.z))
        heavy = np.flatnonzero(weight > 1e-6 * weight.max(initial=0.0))
        named = list(dict.fromkeys(row_names(problem, inverse)[k] for k in heavy))
        raise Infeasible(f"{name}: {'; '.join(named)} cannot hold together; relax one of them")
    if status.endswith("DualInfeasible"):
        raise SolveError(f"{name} is unbounded: its objective improves without limit; bound the variables")
    if status not in ("Solved", "AlmostSolved"):
        raise SolveError(f"{name}: Clarabel stopped ({status}) within {options.time_limit:g} s; rescale or wait longer")
