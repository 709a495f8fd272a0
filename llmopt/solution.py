"""The record of a solve: why the solver stopped and what it holds are two facts; neither is called "optimal" alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from llmopt.model import InputModel


class Termination(StrEnum):
    """Why the solver stopped."""

    OPTIMAL = "optimal"
    TIME_LIMIT = "time limit"
    ITERATION_LIMIT = "iteration limit"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    FAILED = "failed"


class SolveOptions(InputModel):
    """Effort of a solve: `time_limit` (s), relative `gap` at which a MILP may stop, `threads`, `seed`.

    `warm_start` begins from the values that a Pyomo model's variables carry, if they are feasible. `highs` passes
    further options to HiGHS as (name, value) pairs; an unknown one is refused, never ignored.
    """

    time_limit: Annotated[float, Field(gt=0)] = 60.0
    gap: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    warm_start: bool = False
    highs: tuple[tuple[str, bool | int | float | str], ...] = ()


DEFAULT_OPTIONS = SolveOptions()


@dataclass(frozen=True)
class Solve:
    """What one solve returned.

    termination: why it stopped; objective: value of the incumbent in the model's sense; bound: proven bound on the
    optimum in the same sense (equal to `objective` for a linear program; for one that is refined in rounds, what its
    first and widest form proved); build_seconds, solve_seconds: wall-clock; solver, version: who solved; variables,
    constraints: size after translation; duals: value of one more unit on the right-hand side of each named
    constraint, in the model's sense, empty for a MILP; rounds: how often the model was solved, changed in between.
    """

    termination: Termination
    sense: Literal["min", "max"]
    objective: float
    bound: float
    solver: str
    version: str
    build_seconds: float = 0.0
    solve_seconds: float = 0.0
    variables: int = 0
    constraints: int = 0
    rounds: int = 1
    duals: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def gap(self) -> float:
        """Relative gap |objective - bound| / max(|objective|, 1e-9); 0 when proven optimal."""
        return abs(self.objective - self.bound) / max(abs(self.objective), 1e-9)

    @property
    def label(self) -> str:
        """One phrase for a table: ``optimal`` only with a closed gap, else the reason and the gap."""
        if self.termination is Termination.OPTIMAL:
            return "optimal" if self.gap <= 1e-5 else f"gap {self.gap:.2%}"
        return f"{self.termination}, {f'gap {self.gap:.2%}' if isfinite(self.gap) else 'no bound'}"
