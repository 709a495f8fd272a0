"""Policies: settings in the constructor, data in `plan()`. A formulation becomes a policy by being solved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from llmopt.errors import Infeasible, SolveError
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.solution import DEFAULT_OPTIONS, Solve, SolveOptions


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


@runtime_checkable
class Tightening(Protocol):
    """A formulation whose program is solved again after changes that only a solution reveals, such as cuts."""

    def tighten(self, model: Any, solve: Solve, scenario: Scenario) -> int:
        """Change `model` in the light of its loaded solution; return how much was changed, 0 to stop."""
        ...


@dataclass(frozen=True)
class Optimized:
    """A policy that builds its formulation, solves it and returns the plan with its proof.

    A formulation that can `tighten` is solved again after each change, at most `rounds` times in all and until
    `options.time_limit` seconds have passed: each solve may take half of what is left, so that a first program that is
    hard to prove leaves time to improve on it. `Solve.rounds` says how many solves it took.
    """

    formulation: Formulation
    options: SolveOptions = DEFAULT_OPTIONS
    rounds: int = 30

    @property
    def name(self) -> str:
        """Name of the formulation."""
        return self.formulation.name

    def plan(self, scenario: Scenario) -> Plan:
        """Build, solve, tighten while it helps, extract.

        A plan that already carries a record (because its formulation proves more than the last program) keeps it.

        Raises
        ------
        Infeasible, SolveError
            As `llmopt.solve.solve` does.
        """
        start = perf_counter()
        model = self.formulation.build(scenario)
        again = isinstance(self.formulation, Tightening) and self.rounds > 1
        record = self._solve(model, self.options.time_limit / 2 if again else self.options.time_limit)
        while record.rounds < self.rounds and self._tighten(model, record, scenario):
            refined = self._refined(model, record, (self.options.time_limit - (perf_counter() - start)) / 2)
            if refined is None:
                break
            record = refined
        record = replace(record, build_seconds=perf_counter() - start - record.solve_seconds)
        plan = self.formulation.extract(model, record, scenario)
        return plan if plan.solve else replace(plan, solve=record)

    def _tighten(self, model: Any, record: Solve, scenario: Scenario) -> int:
        return self.formulation.tighten(model, record, scenario) if isinstance(self.formulation, Tightening) else 0

    def _solve(self, model: Any, seconds: float) -> Solve:
        return solved(model, self.options.model_copy(update={"time_limit": seconds}))

    def _refined(self, model: Any, record: Solve, seconds: float) -> Solve | None:
        """Solve again; None if the time does not suffice, when the last solution is still loaded."""
        if seconds <= 0:
            return None
        try:
            again = self._solve(model, seconds)
        except Infeasible:
            raise
        except SolveError:
            return None
        return replace(again, solve_seconds=record.solve_seconds + again.solve_seconds, rounds=record.rounds + 1)


def solved(model: Any, options: SolveOptions = DEFAULT_OPTIONS) -> Solve:
    """Solve a model now, for policies whose rules solve a program while they run; errors as `llmopt.solve.solve`."""
    from llmopt.solve import solve

    return solve(model, options)
