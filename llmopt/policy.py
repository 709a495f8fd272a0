"""Policies: settings in the constructor, data in `plan()`. A formulation becomes a policy by being solved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.solution import Solve, SolveOptions


@runtime_checkable
class Policy(Protocol):
    """Anything with a `name` and `plan(scenario) -> Plan`; frozen, hence reusable."""

    @property
    def name(self) -> str:
        """Unique name on the command line and in reports."""
        ...

    def plan(self, scenario: Scenario) -> Plan:
        """Decide."""
        ...


class Formulation(Protocol):
    """A mathematical program: `build` a model from data, `extract` a plan from its solution; knows no solver."""

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    def build(self, scenario: Scenario) -> Any:
        """A Pyomo model or a CVXPY problem."""
        ...

    def extract(self, model: Any, solve: Solve, scenario: Scenario) -> Plan:
        """Read the plan from the solved model."""
        ...


@dataclass(frozen=True)
class Optimized:
    """A policy that builds its formulation, solves it and returns the plan with its proof."""

    formulation: Formulation
    options: SolveOptions = field(default_factory=SolveOptions)

    @property
    def name(self) -> str:
        """Name of the formulation."""
        return self.formulation.name

    def plan(self, scenario: Scenario) -> Plan:
        """Build, solve, extract.

        Raises
        ------
        Infeasible, SolveError
            As `llmopt.solve.solve` does.
        """
        from llmopt.solve import solve

        model = self.formulation.build(scenario)
        record = solve(model, self.options)
        return replace(self.formulation.extract(model, record, scenario), solve=record)
