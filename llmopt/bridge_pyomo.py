"""A Pyomo model as arrays, by Pyomo's own standard-form compiler: much faster than its solver interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.bridge import Program, program_name, with_sentence
from llmopt.errors import Infeasible, SolveError


class PyomoBridge:
    """A Pyomo model through its standard-form compiler; range constraints become two rows, fixed variables vanish."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.form = _standard_form(model)
        self.program = _pyomo_program(self.form)

    def row(self, index: int) -> str:
        """Constraint name, and the `doc` of its component in brackets."""
        constraint = self.form.rows[index].constraint
        return with_sentence(_plain_name(constraint), constraint.parent_component().doc)

    def column(self, index: int) -> str:
        """Variable name."""
        return _plain_name(self.form.columns[index])

    def start(self) -> Floats | None:
        """Values of the variables, NaN where one has none; None if none has."""
        values = np.array([np.nan if v.value is None else v.value for v in self.form.columns], dtype=float)
        return None if np.isnan(values).all() else values

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

    program = program_name(model)
    try:
        form = LinearStandardFormCompiler().write(model, mixed_form=True, set_sense=None)
    except InfeasibleConstraintException as error:
        name = str(error).rsplit("'", 2)[-2] if "'" in str(error) else str(error)
        component = model.find_component(name)
        sentence = component.parent_component().doc if component is not None else None
        raise Infeasible(
            f"{program}: {with_sentence(name, sentence)} cannot hold whatever is decided; relax it"
        ) from error
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise SolveError(f"{program}: {text}; use linear expressions, or write the program in CVXPY") from error
    if len(form.objectives) > 1:
        raise SolveError(f"{program} has {len(form.objectives)} active objectives; deactivate all but one")
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
