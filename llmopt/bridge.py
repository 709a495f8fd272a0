"""Bridges: a Pyomo model or a CVXPY problem as plain arrays, and a solution back into the model it came from.

Nothing here knows a solver: `llmopt.solve` feeds the arrays to HiGHS. Both bridges speak the model's own sense, so a
dual is always d(objective) / d(right-hand side) of the constraint as its author wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from llmopt.errors import Infeasible, SolveError
from llmopt.lengths import Floats, Ints


@dataclass(frozen=True)
class Program:
    """min or max  costs @ x + offset (+ x' hessian x / 2)  over  row_lower <= matrix x <= row_upper  and column bounds.

    matrix: compressed sparse columns (n_rows, n_columns); integer: indices of the integer columns; hessian: upper
    triangle in compressed sparse columns, for quadratic objectives. `negated` says that the model maximises and the
    arrays minimise its negative.
    """

    costs: Floats
    offset: float
    maximise: bool
    matrix: Any
    row_lower: Floats
    row_upper: Floats
    col_lower: Floats
    col_upper: Floats
    integer: Ints
    hessian: Any = None
    negated: bool = False

    @property
    def sign(self) -> float:
        """Objective of the model = sign x objective of the arrays."""
        return -1.0 if self.negated else 1.0


class Bridge(Protocol):
    """A translated model."""

    @property
    def program(self) -> Program:
        """The arrays."""
        ...

    def row(self, index: int) -> str:
        """Name of the requirement behind a row, with its sentence if the model gives one."""
        ...

    def column(self, index: int) -> str:
        """Name of the variable behind a column."""
        ...

    def load(self, x: Floats, row_dual: Floats | None, objective: float) -> Mapping[str, Any]:
        """Write values (and duals of the arrays) into the model; return the duals by constraint name."""
        ...


class PyomoBridge:
    """A Pyomo model through its standard-form compiler; range constraints become two rows, fixed variables vanish."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.form = _standard_form(model)
        self.program = _pyomo_program(self.form)

    def row(self, index: int) -> str:
        """Constraint name, and the `doc` of its component in brackets."""
        constraint = self.form.rows[index].constraint
        return _with_sentence(_plain_name(constraint), constraint.parent_component().doc)

    def column(self, index: int) -> str:
        """Variable name."""
        return _plain_name(self.form.columns[index])

    def load(self, x: Floats, row_dual: Floats | None, objective: float) -> Mapping[str, Any]:
        """Set every variable, fill an importing `dual` suffix, and return duals by constraint name."""
        for variable, value in zip(self.form.columns, x.tolist(), strict=True):
            variable.set_value(value, skip_validation=True)
        _settle_unused(self.model)
        if row_dual is None:
            return {}
        duals: dict[Any, float] = {}
        for entry, value in zip(self.form.rows, row_dual.tolist(), strict=True):
            duals[entry.constraint] = duals.get(entry.constraint, 0.0) + value
        suffix = self.model.component("dual")
        if suffix is not None and suffix.import_enabled():
            suffix.update(duals)
        return {_plain_name(constraint): value for constraint, value in duals.items()}


def _standard_form(model: Any) -> Any:
    from pyomo.common.errors import InfeasibleConstraintException
    from pyomo.repn.plugins.standard_form import LinearStandardFormCompiler

    try:
        form = LinearStandardFormCompiler().write(model, mixed_form=True, set_sense=None)
    except InfeasibleConstraintException as error:
        name = str(error).rsplit("'", 2)[-2] if "'" in str(error) else str(error)
        component = model.find_component(name)
        sentence = component.parent_component().doc if component is not None else None
        raise Infeasible(
            f"{model.name}: {_with_sentence(name, sentence)} cannot hold whatever is decided; relax it"
        ) from error
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise SolveError(f"{model.name}: {text}; use linear expressions, or write the program in CVXPY") from error
    if len(form.objectives) > 1:
        raise SolveError(f"{model.name} has {len(form.objectives)} active objectives; deactivate all but one")
    return form


def _pyomo_program(form: Any) -> Program:
    rhs = np.asarray(form.rhs, dtype=float)
    kind = np.array([entry.bound_type for entry in form.rows], dtype=int)
    bounds = np.array([variable.bounds for variable in form.columns], dtype=object).reshape(-1, 2)
    costs = form.c.toarray()[0] if form.objectives else np.zeros(len(form.columns))
    return Program(
        costs=costs,
        offset=float(form.c_offset[0]) if form.objectives else 0.0,
        maximise=bool(form.objectives) and form.objectives[0].sense == -1,
        matrix=form.A,
        row_lower=np.where(kind <= 0, rhs, -np.inf),
        row_upper=np.where(kind >= 0, rhs, np.inf),
        col_lower=_numbers(bounds[:, 0], -np.inf),
        col_upper=_numbers(bounds[:, 1], np.inf),
        integer=_integer_columns(form.columns),
    )


def _numbers(values: Any, missing: float) -> Floats:
    return np.array([missing if value is None else value for value in values], dtype=float)


def _integer_columns(columns: list[Any]) -> Ints:
    discrete = [k for k, variable in enumerate(columns) if not variable.is_continuous()]
    for k in discrete:
        if not (columns[k].is_integer() or columns[k].is_binary()):
            raise SolveError(f"variable {columns[k].name} has domain {columns[k].domain}; use reals or integers")
    return np.array(discrete, dtype=np.int64)


def _settle_unused(model: Any) -> None:
    """Variables that no constraint mentions get the allowed value nearest to zero, as if a solver had seen them."""
    from pyomo.core import Var

    for component in model.component_objects(Var, active=True):
        for variable in component.values():
            if variable.value is None:
                low, high = variable.bounds
                nearest = np.clip(0.0, -np.inf if low is None else low, np.inf if high is None else high)
                variable.set_value(float(nearest))


def _plain_name(component: Any) -> str:
    """`stability[a100,roofline,kv]`, without the quotes that Pyomo puts around some keys."""
    index, name = component.index(), str(component.parent_component().name)
    if index is None:
        return name
    return f"{name}[{','.join(str(k) for k in (index if isinstance(index, tuple) else (index,)))}]"


def _with_sentence(name: str, sentence: str | None) -> str:
    return f"{name} ({sentence.strip().rstrip('.')})" if sentence else name


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
            negated=_maximises(self.problem),
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


def _maximises(problem: Any) -> bool:
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
        names += [_with_sentence(name + entry, sentence) for entry in _entries(author, compiled.size)]
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
    sense = -1.0 if _maximises(problem) else 1.0
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
