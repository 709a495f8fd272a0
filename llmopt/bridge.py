"""Bridges: a model as plain arrays, and a solution back into the model it came from.

Nothing here knows a solver: `llmopt.solve` feeds the arrays to HiGHS. Both bridges, `llmopt.bridge_pyomo` and
`llmopt.bridge_cvxpy`, speak the model's own sense, so a dual is always d(objective) / d(right-hand side) of the
constraint as its author wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmopt.arrays import Floats, Ints


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

    def start(self) -> Floats | None:
        """Values that the model's variables carry now, NaN where there is none; None if there are none at all."""
        ...

    def load(self, x: Floats, row_dual: Floats | None, objective: float) -> Mapping[str, Any]:
        """Write values (and duals of the arrays) into the model; return the duals by constraint name."""
        ...


def program_name(model: Any) -> str:
    """Name for messages: a CVXPY problem may be given one; Pyomo calls a model without one `unknown`."""
    name = str(getattr(model, "name", None) or "the program")
    return "the program" if name == "unknown" else name


def with_sentence(name: str, sentence: str | None) -> str:
    """A requirement as a user reads it: its name, and its sentence in brackets if the model gives one."""
    return f"{name} ({sentence.strip().rstrip('.')})" if sentence else name
