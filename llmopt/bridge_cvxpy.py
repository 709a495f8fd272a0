"""A CVXPY problem as arrays, by CVXPY's own reductions; and names and signs for what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.bridge import Program, with_sentence


class CvxpyBridge:
    """A CVXPY problem that HiGHS can take (linear, mixed-integer or quadratic), compiled by CVXPY itself."""

    def __init__(self, problem: Any, compiled: tuple[Any, Any, Any]) -> None:
        self.problem = problem
        self.data, self.chain, self.inverse = compiled
        self.program = self._program()

    def _program(self) -> Program:
        data, solver = self.data, self.inverse[-1]
        quadratic = "P" in data
        matrix, rhs, equal = _stacked(data) if quadratic else (data["A"].tocsc(), data["b"], data["dims"].zero)
        columns = matrix.shape[1]
        lower, upper = _column_bounds(data, columns)
        return Program(
            costs=np.asarray(data["q" if quadratic else "c"], dtype=float),
            offset=float(solver["offset"]),
            maximise=False,
            matrix=matrix,
            row_lower=np.where(np.arange(len(rhs)) < equal, rhs, -np.inf),
            row_upper=np.asarray(rhs, dtype=float),
            col_lower=lower,
            col_upper=upper,
            integer=np.array([*data["bool_vars_idx"], *data["int_vars_idx"]], dtype=np.int64),
            hessian=_upper_triangle(data["P"]) if quadratic else None,
            negated=maximises(self.problem),
        )

    @cached_property
    def _rows(self) -> list[str]:
        return row_names(self.problem, self.inverse)

    def row(self, index: int) -> str:
        """Label of the constraint, with its position if it is an array; its text if it has no label."""
        return self._rows[index]

    def column(self, index: int) -> str:
        """Column number; CVXPY gives names to whole arrays only."""
        return f"column {index}"

    def start(self) -> Floats | None:
        """None: CVXPY's reductions do not translate values."""
        return None

    def load(self, x: Floats, row_dual: Floats | None, objective: float) -> Mapping[str, Any]:
        """Unpack through CVXPY, and return duals by constraint name in the model's sense."""
        answer = {
            "solution": SimpleNamespace(col_value=x, row_dual=np.zeros(0) if row_dual is None else row_dual),
            "info": _NoStatistics(objective - self.program.offset),
            "model_status": "kOptimal",
            "run_time": 0.0,
        }
        self.problem.unpack_results(answer, self.chain, self.inverse)
        return {} if row_dual is None else model_duals(self.problem)


class _NoStatistics(SimpleNamespace):
    """Solver statistics that CVXPY adds up and nobody reads here."""

    def __init__(self, objective: float) -> None:
        super().__init__(objective_function_value=objective)

    def __getattr__(self, name: str) -> int:
        return 0


def _stacked(data: Mapping[str, Any]) -> tuple[Any, Floats, int]:
    from scipy.sparse import vstack

    return vstack([data["A"], data["F"]]).tocsc(), np.concatenate([data["b"], data["G"]]), len(data["b"])


def _upper_triangle(hessian: Any) -> Any:
    from scipy.sparse import triu

    return triu(hessian, format="csc") if hessian.count_nonzero() else None


def _column_bounds(data: Mapping[str, Any], columns: int) -> tuple[Floats, Floats]:
    lower, upper = data["lower_bounds"], data["upper_bounds"]
    low = np.full(columns, -np.inf) if lower is None else np.array(lower, dtype=float)
    high = np.full(columns, np.inf) if upper is None else np.array(upper, dtype=float)
    boolean = np.array(data["bool_vars_idx"], dtype=np.int64)
    low[boolean], high[boolean] = np.maximum(low[boolean], 0), np.minimum(high[boolean], 1)
    return low, high


def maximises(problem: Any) -> bool:
    """Whether a CVXPY problem maximises; its compiled arrays then minimise the negative."""
    return str(problem.objective.NAME) == "maximize"


def _position(index: int, shape: tuple[int, ...]) -> str:
    """CVXPY flattens by columns."""
    return ",".join(str(int(k)) for k in np.unravel_index(index, shape, order="F"))


def row_names(problem: Any, inverse: Any) -> list[str]:
    """Name of the author's constraint behind each compiled row, equalities first as every CVXPY solver has them.

    A constraint may carry `row_keys`, one name per entry of a vector, and `doc`, a sentence.
    """
    named = {constraint.id: (constraint, name) for constraint, name in named_constraints(problem)}
    names: list[str] = []
    for compiled in (*inverse[-1]["eq_constr"], *inverse[-1]["other_constr"]):
        author, name = named.get(_author(compiled.id, inverse), (None, "a constraint inside a CVXPY atom"))
        sentence = getattr(author, "doc", None)
        names += [with_sentence(name + entry, sentence) for entry in _entries(author, compiled.size)]
    return names


def _entries(constraint: Any, size: int) -> list[str]:
    """`[key]` of each entry of a constraint array, in CVXPY's order by columns."""
    if keys := getattr(constraint, "row_keys", None):
        return [f"[{key}]" for key in keys]
    if size == 1 or constraint is None or constraint.size != size:
        return [""] * size
    return [f"[{_position(k, constraint.shape)}]" for k in range(size)]


def _author(row_id: int, inverse: Any) -> int:
    """Follow a constraint back through CVXPY's reductions to the id it had in the problem."""
    for step in reversed(inverse):
        before = {new: old for old, new in getattr(step, "cons_id_map", {}).items()}
        row_id = before.get(row_id, row_id)
    return row_id


def named_constraints(problem: Any) -> list[tuple[Any, str]]:
    """Constraints of a CVXPY problem with their labels; unlabelled ones are named by their text."""
    return [(c, c.label or _shortened(str(c))) for c in problem.constraints]


def _shortened(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 60 else plain[:57] + "..."


def model_duals(problem: Any) -> dict[str, Any]:
    """Duals of a solved CVXPY problem as d(objective) / d(right-hand side), in the model's sense.

    CVXPY reports magnitudes for inequalities and negated values for equalities of the minimised problem. The
    right-hand side is the constant side if one side is constant, else the larger side of `lower <= upper`.
    """
    sense = -1.0 if maximises(problem) else 1.0
    duals: dict[str, Any] = {}
    for constraint, name in named_constraints(problem):
        value = constraint.dual_value
        if value is not None and constraint.__class__.__name__ in _SIGNS:
            signed = np.asarray(sense * _SIGNS[constraint.__class__.__name__] * _side(constraint) * value) + 0.0
            duals |= _by_name(name, getattr(constraint, "row_keys", None), signed)
    return duals


def _by_name(name: str, keys: Any, values: Floats) -> dict[str, Any]:
    if keys:
        return {f"{name}[{key}]": value for key, value in zip(keys, values.tolist(), strict=True)}
    return {name: float(values) if values.ndim == 0 else values}


_SIGNS = {"Inequality": -1.0, "NonPos": -1.0, "NonNeg": 1.0, "Equality": -1.0, "Zero": -1.0}


def _side(constraint: Any) -> float:
    """-1 where the author's right-hand side is the constant that CVXPY stores on the left (`expr >= 3`)."""
    sides = constraint.args
    return -1.0 if len(sides) == 2 and sides[0].is_constant() and not sides[1].is_constant() else 1.0
