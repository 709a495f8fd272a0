"""The verbs with names: policies and scenarios may be given by name, file or object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.arrays import Floats
from llmopt.errors import LLMOptError, PolicyError, ScenarioError
from llmopt.plan import Plan, check_plan
from llmopt.policy import Policy
from llmopt.predictions import ORACLE
from llmopt.reading import load_scenario
from llmopt.registry import get_policy, policy_names, short_error
from llmopt.scenario import Scenario

if TYPE_CHECKING:
    from llmopt.assess import StabilityReport
    from llmopt.evaluate.comparison import Comparison
    from llmopt.evaluate.jobs import Progress
    from llmopt.evaluate.ratio_comparison import RatioComparison

DEFAULTS = {"routing": "max-margin", "batching": "mc-sf", "af-ratio": "afd-fleet"}
"""The policy whose plan `plan` makes unless another is named, by problem."""
EXACT = DEFAULTS["routing"]
"""The program whose split `stability` assesses and whose critical rate `--load` refers to."""
MOST_SEEDS = 10_000
"""More, asked for as a number, are a slip of the hand."""


def compare(
    scenario: Scenario | str | Path,
    policies: Sequence[str | Policy] | None = None,
    seeds: int | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Comparison | RatioComparison:
    """Play policies against the same arrivals in the fluid model and the simulator, or on the same full slots.

    The latter where the A/F ratio is open; both kinds of comparison have rows, a table, JSON, CSV and Parquet.

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


def plan(scenario: Scenario | str | Path, policy: str | Policy | None = None) -> Plan:
    """The plan of one policy, checked against the scenario; both may be named as in `compare`.

    Without a policy it is `DEFAULTS`'s for the scenario's problem.

    Raises
    ------
    Infeasible, SolveError
        If the program of an optimized policy has no answer.
    PolicyError
        If the policy raises anything else, or if its plan does not fit the scenario.
    """
    known = _loaded(scenario)
    chosen = _named(DEFAULTS[known.problem] if policy is None else policy)
    try:
        answer = chosen.plan(known)
    except LLMOptError:
        raise
    except Exception as error:
        raise PolicyError(f"policy {chosen.name!r} raised {short_error(error)}; fix its plan(scenario)") from error
    return check_plan(answer, known)


def stability(scenario: Scenario | str | Path, policy: str | Policy | None = None) -> StabilityReport:
    """Loads, critical rate and what binds under the static split that `policy` plans.

    Without a policy it is the exact program's split; where the A/F ratio is open, bundles of the size that `DEFAULTS`'s
    policy decides on. A routing policy takes the bundle as given.

    Raises
    ------
    ScenarioError
        If the policy routes by state, so that there is no split to assess, or lets running requests pause.
    """
    from llmopt.assess import assess

    known = _loaded(scenario)
    if known.problem == "af-ratio":
        routed = _with_bundle(known, DEFAULTS["af-ratio"] if policy is None else policy)
        return _of_bundles(stability(routed, EXACT), routed)
    answer = plan(known, EXACT if policy is None else policy)
    if answer.batcher.stepwise:
        raise ScenarioError(
            f"policy {answer.policy!r} lets running requests pause, for which there is no theory; use llmopt compare"
        )
    if known.problem == "batching" and answer.fractions is None:
        served = answer.batcher.served(known)
        report = assess(served, _split(served), router=answer.policy)
        looks = any(pool.preemption == "lookahead" for pool in served.pools)
        if not looks or answer.batcher.predictor_of(known) == ORACLE:
            return report
        said = "Look-ahead is assessed as if outputs were known; where they are guessed, llmopt compare tells."
        return replace(report, sentences=(*report.sentences, said))
    if answer.fractions is None:
        raise ScenarioError(
            f"policy {answer.policy!r} routes by the state of the replicas and has no fixed split to assess; "
            "use llmopt compare, or a policy with a split"
        )
    return assess(known, answer.fractions, router=answer.policy)


def _of_bundles(report: StabilityReport, scenario: Scenario) -> StabilityReport:
    """The report, which says first what bundles it is on."""
    pool = scenario.pools[0]
    assert pool.bundle is not None
    size = f"{pool.bundle.attention_workers}A-{pool.bundle.ffn_servers}F, B = {pool.bundle.batch}"
    said = f"Of {pool.replicas} x {size}; the fullest worker holds {pool.bundle.imbalance:.1%} more than the mean."
    return replace(report, sentences=(said, *report.sentences))


def _with_bundle(scenario: Scenario, policy: str | Policy) -> Scenario:
    """The routing question of the bundles that `policy` decides on, or of the given bundle where it decides on none.

    Their workers wait for the fullest of them, as much as theory says unless the bundle does.
    """
    from llmopt.barrier import imbalance

    if (policy if isinstance(policy, str) else policy.name) in policy_names("routing"):
        return scenario.replace(problem="routing")
    answer = plan(scenario, policy)
    assert answer.bundle is not None
    sizes = {key: getattr(answer.bundle, key) for key in ("attention_workers", "ffn_servers", "batch")}
    load, x = scenario.slot_load, answer.bundle.attention_workers
    # A pool runs on, however the bundles of the ratio's question start.
    law = scenario.replace(**{"evaluation.start": "stationary"}).slot_law
    sizes["imbalance"] = answer.bundle.imbalance or imbalance(answer.bundle, load, x, law)
    bundle = {f"pools.0.bundle.{key}": value for key, value in sizes.items()}
    return scenario.replace(**bundle, **{"pools.0.replicas": answer.bundles}, problem="routing")


def _split(scenario: Scenario) -> Floats:
    """The exact program's split, for rules that leave routing open."""
    fractions = plan(scenario, EXACT).fractions
    assert fractions is not None
    return fractions


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


def with_predictions(scenario: Scenario, text: str) -> Scenario:
    """The scenario with another predictor of output lengths, such as ``noise:0.5``, ``quantile:0.9`` or ``none``.

    Raises
    ------
    ScenarioError
        If there is no such law, its number is missing or out of range, or nothing in the scenario depends on it.
    """
    if scenario.problem == "af-ratio":
        raise ScenarioError(
            f"--predictions {text}: slots are always full where the A/F ratio is open, so that no rule looks at "
            "predictions; drop it"
        )
    law, _, value = text.partition(":")
    numbers = {"noise": "sigma", "interval": "factor", "quantile": "q"}
    plain = {"oracle", "class-mean", "none"}
    if law not in numbers and law not in plain:
        known = ", ".join([*sorted(plain), *(f"{name}:{key.upper()}" for name, key in numbers.items())])
        raise ScenarioError(f"--predictions {text} is not known; give one of {known}, or [predictions] in the file")
    if (law in numbers) != bool(value):
        raise ScenarioError(
            f"--predictions {text}: write {law}:{numbers[law].upper()}"
            if law in numbers
            else f"--predictions {text}: {law} takes no number; drop it"
        )
    try:
        number = {numbers[law]: float(value)} if value else {}
    except ValueError:
        raise ScenarioError(f"--predictions {text}: {value!r} is not a number; give one") from None
    return scenario.replace(predictions={"law": law, **number})


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
