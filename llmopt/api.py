"""The verbs with names: policies and scenarios may be given by name, file or object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import LLMOptError, PolicyError, ScenarioError
from llmopt.plan import Plan, check_plan
from llmopt.policy import Policy
from llmopt.reading import load_scenario
from llmopt.registry import get_policy, policy_names, short_error
from llmopt.scenario import Scenario

if TYPE_CHECKING:
    from llmopt.assess import StabilityReport
    from llmopt.evaluate.compare import Progress
    from llmopt.evaluate.comparison import Comparison

EXACT = "max-margin"
"""The program that `plan` runs, whose split `stability` assesses and whose critical rate `--load` refers to."""
MOST_SEEDS = 10_000
"""More, asked for as a number, are a slip of the hand."""


def compare(
    scenario: Scenario | str | Path,
    policies: Sequence[str | Policy] | None = None,
    seeds: int | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Play policies against the same arrivals in the fluid model and the simulator.

    Parameters
    ----------
    scenario
        A scenario, its file, or the name of a bundled one.
    policies
        Policies or their names, also ``module:attribute``; all bundled ones for its problem if absent.
    seeds
        Seeds of the simulation, or how many; those of the scenario if absent.
    progress
        Called with (jobs done, jobs in all, what starts now).

    Raises
    ------
    ScenarioError, PolicyError
        If the input cannot be used; a policy that fails keeps its row instead.
    """
    from llmopt.evaluate.compare import compare as play

    known = _loaded(scenario)
    chosen = [_named(p) for p in (policy_names(known.problem) if policies is None else policies)]
    return play(known, chosen, _seeds(seeds), progress)


def plan(scenario: Scenario | str | Path, policy: str | Policy = EXACT) -> Plan:
    """The plan of one policy, checked against the scenario; both may be named as in `compare`.

    Raises
    ------
    Infeasible, SolveError
        If the program of an optimized policy has no answer.
    PolicyError
        If the policy raises anything else, or if its plan does not fit the scenario.
    """
    known, chosen = _loaded(scenario), _named(policy)
    try:
        answer = chosen.plan(known)
    except LLMOptError:
        raise
    except Exception as error:
        raise PolicyError(f"policy {chosen.name!r} raised {short_error(error)}; fix its plan(scenario)") from error
    return check_plan(answer, known)


def stability(scenario: Scenario | str | Path, policy: str | Policy = EXACT) -> StabilityReport:
    """Loads, critical rate and what binds under the static split that `policy` plans.

    Raises
    ------
    ScenarioError
        If the policy routes by state, so that there is no split to assess.
    """
    from llmopt.assess import assess

    known = _loaded(scenario)
    answer = plan(known, policy)
    if answer.fractions is None:
        raise ScenarioError(
            f"policy {answer.policy!r} routes by the state of the replicas and has no fixed split to assess; "
            "use llmopt compare, or a policy with a split"
        )
    return assess(known, answer.fractions, router=answer.policy)


def at_rate(scenario: Scenario, rate: float) -> Scenario:
    """The scenario with all arrivals scaled to `rate` requests/s in all, the mix kept."""
    if scenario.workload.rate is not None:
        return scenario.replace(**{"workload.rate": rate})
    factor = rate / scenario.workload.total_rate
    scaled = {f"workload.classes.{c}.rate": float(r * factor) for c, r in enumerate(scenario.workload.rates)}
    return scenario.replace(**scaled)


def at_load(scenario: Scenario, load: float) -> Scenario:
    """The scenario with all arrivals scaled to `load` times the critical rate of the exact program's split."""
    report = stability(scenario)
    return at_rate(scenario, scenario.workload.total_rate * load * report.critical_rate / report.rate)


def _loaded(scenario: Scenario | str | Path) -> Scenario:
    return scenario if isinstance(scenario, Scenario) else load_scenario(scenario)


def _named(policy: str | Policy) -> Policy:
    return get_policy(policy) if isinstance(policy, str) else policy


def _seeds(seeds: int | Sequence[int] | None) -> Sequence[int] | None:
    if not isinstance(seeds, int):
        return seeds
    if seeds < 1:
        raise ScenarioError(f"seeds = {seeds} leaves nothing to simulate; give at least 1")
    if seeds > MOST_SEEDS:
        raise ScenarioError(f"seeds = {seeds} are more runs than anybody waits for; give at most {MOST_SEEDS}")
    return range(1, seeds + 1)
