"""The only caller of solvers: a Pyomo model or a CVXPY problem in, its solution loaded and a `Solve` record out.

Linear, mixed-integer and quadratic programs go to HiGHS as arrays (`llmopt.bridge`); only a CVXPY problem that needs
cones goes to Clarabel, and the record says so.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.bridge import Bridge, Program, program_name
from llmopt.bridge_cvxpy import CvxpyBridge
from llmopt.bridge_pyomo import PyomoBridge
from llmopt.errors import Infeasible, SolveError
from llmopt.solution import DEFAULT_OPTIONS, Solve, SolveOptions, Termination

_ENDINGS = {
    "kOptimal": Termination.OPTIMAL,
    "kModelEmpty": Termination.OPTIMAL,
    "kInfeasible": Termination.INFEASIBLE,
    "kUnbounded": Termination.UNBOUNDED,
    "kUnboundedOrInfeasible": Termination.UNBOUNDED,
    "kTimeLimit": Termination.TIME_LIMIT,
    "kIterationLimit": Termination.ITERATION_LIMIT,
    "kSolutionLimit": Termination.ITERATION_LIMIT,
}
_IIS_FROM_LP_IRREDUCIBLE = 6
_SHOWN = 5


def solve(model: Any, options: SolveOptions = DEFAULT_OPTIONS) -> Solve:
    """Solve, load values and duals into the model's variables and constraints, and say what was proven.

    Parameters
    ----------
    model
        A Pyomo `ConcreteModel` with linear constraints, or a `cvxpy.Problem`.
    options
        Effort. A time limit that is reached with an incumbent returns the incumbent, labelled with its gap.

    Raises
    ------
    Infeasible
        Naming the requirements that cannot hold together, by constraint name and, in Pyomo, the `doc` sentence.
    SolveError
        Unbounded, nothing found within the limits, or a model or option that no solver takes.
    """
    start = perf_counter()
    cone = None
    if _is_cvxpy(model):
        cone, compiled = _compile(model)
        if cone:
            from llmopt.cones import solve_cone

            return solve_cone(model, compiled, options, start)
        bridge: Bridge = CvxpyBridge(model, compiled)
    elif _is_pyomo(model):
        bridge = PyomoBridge(model)
    else:
        raise SolveError(f"cannot solve a {type(model).__name__}; build a Pyomo ConcreteModel or a cvxpy.Problem")
    return _solve_by_highs(bridge, program_name(model), options, perf_counter() - start)


def _is_cvxpy(model: Any) -> bool:
    cvxpy = sys.modules.get("cvxpy")
    return cvxpy is not None and isinstance(model, cvxpy.Problem)


def _is_pyomo(model: Any) -> bool:
    block = sys.modules.get("pyomo.core.base.block")
    return block is not None and isinstance(model, block.BlockData)


def _compile(problem: Any) -> tuple[bool, tuple[Any, Any, Any]]:
    """Compile for HiGHS if it can take the problem, else for Clarabel; parameters are read as constants.

    Reading parameters as constants keeps a parameter that multiplies a matrix from exploding the compilation.
    """
    import cvxpy as cp

    name = program_name(problem)
    try:
        for cone, solver in ((False, cp.HIGHS), (True, cp.CLARABEL)):
            try:
                return cone, problem.get_problem_data(solver, ignore_dpp=bool(problem.parameters()), solver_opts={})
            except cp.SolverError:
                continue
    except cp.DCPError as error:
        raise SolveError(f"{name} is not convex by CVXPY's rules: {' '.join(str(error).split())}") from error
    raise SolveError(f"{name} is mixed-integer with cones, which no solver here takes; outer-linearise it")


@dataclass(frozen=True)
class _Run:
    """One finished HiGHS run; `x` is None unless a feasible point is held, `row_dual` None unless duals are."""

    highs: Any
    termination: Termination
    objective: float
    bound: float
    seconds: float
    x: Floats | None
    row_dual: Floats | None


def _solve_by_highs(bridge: Bridge, name: str, options: SolveOptions, build_seconds: float) -> Solve:
    program = bridge.program
    run = _run(program, options, name, bridge.start() if options.warm_start else None)
    if run.termination is Termination.INFEASIBLE:
        raise Infeasible(f"{name}: {_conflict(bridge, run.highs, options)}")
    if run.x is None or run.termination is Termination.UNBOUNDED:
        raise SolveError(_without_answer(name, run.termination, options))
    duals = bridge.load(run.x, run.row_dual, run.objective)
    return Solve(
        termination=run.termination,
        sense="max" if program.maximise or program.negated else "min",
        objective=program.sign * run.objective + 0.0,
        bound=program.sign * run.bound + 0.0,
        solver="HiGHS",
        version=str(run.highs.version()),
        build_seconds=build_seconds,
        solve_seconds=run.seconds,
        variables=len(program.costs),
        constraints=len(program.row_lower),
        duals=MappingProxyType(dict(duals)),
    )


def _without_answer(name: str, termination: Termination, options: SolveOptions) -> str:
    if termination is Termination.UNBOUNDED:
        return f"{name} is unbounded: its objective improves without limit; bound the variables it depends on"
    if termination is Termination.TIME_LIMIT:
        return f"{name}: no feasible point within {options.time_limit:g} s; raise time_limit or shrink the instance"
    return f"{name}: HiGHS stopped ({termination}) without a feasible point; check the scale of the coefficients"


def _run(program: Program, options: SolveOptions, name: str, point: Floats | None) -> _Run:
    import highspy

    highs = _new_highs()
    with _threads(options.threads):
        _set(highs, _highs_options(options))
        _accept(highs.passModel(_highs_model(program)), name)
        _begin_at(highs, point)
        start = perf_counter()
        highs.run()
        seconds = perf_counter() - start
    info = highs.getInfo()
    mixed = len(program.integer) > 0
    held = info.primal_solution_status == highspy.kSolutionStatusFeasible
    dual = not mixed and held and info.dual_solution_status == highspy.kSolutionStatusFeasible
    termination = _ENDINGS.get(highs.getModelStatus().name, Termination.FAILED)
    objective = float(info.objective_function_value)
    worst = -np.inf if not program.maximise else np.inf
    return _Run(
        highs=highs,
        termination=termination,
        objective=objective,
        bound=float(info.mip_dual_bound) if mixed else objective if termination is Termination.OPTIMAL else worst,
        seconds=seconds,
        x=_tidy(highs.getSolution().col_value, program) if held else None,
        row_dual=np.asarray(highs.getSolution().row_dual, dtype=float) + 0.0 if dual else None,
    )


def _begin_at(highs: Any, point: Floats | None) -> None:
    """Offer a first point; HiGHS completes what is missing and drops what is not feasible."""
    if point is not None:
        known = np.flatnonzero(np.isfinite(point))
        highs.setSolution(len(known), known.astype(np.int32), point[known])


def _tidy(values: Sequence[float], program: Program) -> Floats:
    """Values inside their bounds, whole where they must be, and without negative zeros."""
    x = np.clip(np.asarray(values, dtype=float), program.col_lower, program.col_upper)
    x[program.integer] = np.round(x[program.integer])
    return np.asarray(x + 0.0)


def _highs_options(options: SolveOptions) -> dict[str, Any]:
    return {
        "time_limit": options.time_limit,
        "mip_rel_gap": options.gap,
        "threads": options.threads,
        "random_seed": options.seed,
        **dict(options.highs),
    }


def _set(highs: Any, values: dict[str, Any]) -> None:
    import highspy

    for option, value in values.items():
        if highs.setOptionValue(option, value) == highspy.HighsStatus.kError:
            raise SolveError(f"HiGHS has no option {option!r} that takes {value!r}; see its list of options")


def _accept(status: Any, name: str) -> None:
    import highspy

    if status == highspy.HighsStatus.kError:
        raise SolveError(f"{name}: HiGHS refuses the arrays; look for NaN or infinite coefficients")


def _highs_model(program: Program) -> Any:
    """The arrays as a HighsModel; `integrality_` takes only a list."""
    import highspy

    model = highspy.HighsModel()
    lp = model.lp_
    lp.num_row_, lp.num_col_ = program.matrix.shape
    lp.sense_ = highspy.ObjSense.kMaximize if program.maximise else highspy.ObjSense.kMinimize
    lp.offset_ = program.offset
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.costs, program.col_lower, program.col_upper
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = program.matrix.indptr
    lp.a_matrix_.index_ = program.matrix.indices
    lp.a_matrix_.value_ = program.matrix.data
    if len(program.integer):
        kinds = [highspy.HighsVarType.kContinuous] * len(program.costs)
        for k in program.integer.tolist():
            kinds[k] = highspy.HighsVarType.kInteger
        lp.integrality_ = kinds
    if program.hessian is not None:
        _add_hessian(model.hessian_, program.hessian)
    return model


def _add_hessian(hessian: Any, upper: Any) -> None:
    import highspy

    hessian.dim_ = upper.shape[0]
    hessian.format_ = highspy.HessianFormat.kTriangular
    hessian.start_, hessian.index_, hessian.value_ = upper.indptr, upper.indices, upper.data


_lock = threading.Lock()
_running = 0
_fixed_threads = 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """HiGHS has one thread pool per process, sized by the first run: resize it only while nothing else runs."""
    global _running, _fixed_threads
    with _lock:
        if _fixed_threads not in (0, count):
            if _running:
                raise SolveError(f"another solve runs with threads = {_fixed_threads}; use that number here too")
            _new_highs().resetGlobalScheduler(True)
        _fixed_threads = count
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1


def _new_highs() -> Any:
    """A silent solver; one per solve, so that no option or limit of an earlier call lingers."""
    import highspy

    _swallow_banner()
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    return highs


@cache
def _swallow_banner() -> None:
    """The first solver of a process prints a banner to descriptor 1, which may carry somebody's JSON."""
    import highspy

    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _conflict(bridge: Bridge, highs: Any, options: SolveOptions) -> str:
    """Which requirements contradict each other: an irreducible set, or rows that no integer point satisfies."""
    _set(highs, {"iis_strategy": _IIS_FROM_LP_IRREDUCIBLE, "iis_time_limit": options.time_limit})
    _, iis = highs.getIis()
    if iis.valid_ and (len(iis.row_index_) or len(iis.col_index_)):
        bounds = _bounds_in_conflict(bridge, iis.col_index_, iis.col_bound_)
        return _cannot_hold([bridge.row(k) for k in iis.row_index_] + bounds)
    program = bridge.program
    if highs.feasibilityRelaxation(-1.0, -1.0, 1.0).name == "kOk":
        value = np.asarray(highs.getSolution().row_value)
        off = (value < program.row_lower - 1e-6) | (value > program.row_upper + 1e-6)
        if off.any():
            return f"with whole numbers {_cannot_hold([bridge.row(int(k)) for k in np.flatnonzero(off)])}"
    return "no point satisfies all requirements; relax some of them to see which ones conflict"


def _bounds_in_conflict(bridge: Bridge, columns: Sequence[int], sides: Sequence[int]) -> list[str]:
    """Column bounds of a conflict, except x >= 0, which nobody needs to be told."""
    found = []
    for k, side in zip(columns, sides, strict=True):
        low, high = bridge.program.col_lower[k], bridge.program.col_upper[k]
        if side in (_LOWER, _BOXED) and low != 0:
            found.append(f"{bridge.column(k)} >= {low:g}")
        if side in (_UPPER, _BOXED):
            found.append(f"{bridge.column(k)} <= {high:g}")
    return found


_LOWER, _UPPER, _BOXED = 2, 3, 4  # highspy.IisBoundStatus


def _cannot_hold(requirements: list[str]) -> str:
    """The sentence about a conflict."""
    names = list(dict.fromkeys(requirements))
    if len(names) == 1:
        return f"{names[0]} cannot hold; relax it"
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'; '.join(names[:_SHOWN])}{more} cannot hold together; relax one of them"
