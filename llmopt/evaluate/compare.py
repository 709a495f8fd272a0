"""The main job: every policy is planned, played through the fluid model and the simulator, and judged alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Floats
from llmopt.assess import assess
from llmopt.errors import LLMOptError, PolicyError, ScenarioError
from llmopt.evaluate.comparison import QUANTILES, Bound, Comparison, Outcome, Simulated
from llmopt.evaluate.fluid import evaluate_fluid
from llmopt.evaluate.jobs import Jobs, Progress, check_names, reason
from llmopt.evaluate.margin import ASKED, backlog_growth, long_run, simulated_margin
from llmopt.evaluate.report import in_window, measure, realised_split
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.latency_bound import latency_bound
from llmopt.plan import Plan, Router
from llmopt.policy import Policy
from llmopt.predictions import ORACLE
from llmopt.scenario import Scenario
from llmopt.workload import Requests

if TYPE_CHECKING:
    from llmopt.evaluate.ratio_comparison import RatioComparison

ROUNDING = 1e-9
"""Relative error of a sum of step times."""
CLOCK = 1e-14
"""Relative error of the simulator's clock after many steps."""
ARGUMENTS = {
    "alone": "the latency of each request alone",
    "order": "the order of one machine that shares its time at will",
    "price": "a price on the replicas' time",
}
POINTS = 241
"""Instants at which a simulated backlog is looked at."""
MOST_REQUESTS = 50_000_000
"""Requests of all seeds together: 40 bytes each, and while a run is measured as much again several times."""


def compare(
    scenario: Scenario,
    policies: Sequence[Policy],
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Comparison | RatioComparison:
    """Play every policy against the same arrivals and collect one row each.

    Arrivals are sampled once per seed and shared by all policies (common random numbers). A policy that raises, or
    whose program is infeasible, keeps its row with the reason. Where the A/F ratio is open it is `compare_ratios`.

    Parameters
    ----------
    scenario
        What is given.
    policies
        Policy objects with different names.
    seeds
        Seeds of the simulation; those of the scenario if absent.
    progress
        Called as each job starts.

    Raises
    ------
    PolicyError
        If two policies share a name or none is given.
    ScenarioError
        If more requests are asked for than memory holds.
    """
    check_names(policies)
    given = scenario.evaluation.seeds if seeds is None else seeds
    if scenario.problem == "af-ratio":
        from llmopt.evaluate.ratio_compare import compare_ratios

        return compare_ratios(scenario, policies, tuple(given), progress)
    _check_size(scenario, len(given))
    chosen = tuple(given)
    arrivals = {seed: scenario.workload.sample(scenario.evaluation.horizon, seed) for seed in chosen}
    game = _Game(
        scenario=scenario,
        arrivals=arrivals,
        long=long_run(scenario, chosen[0]),
        progress=progress,
        total=len(policies) * (2 + len(chosen)),
    )
    outcomes = []
    for i, policy in enumerate(policies):
        outcomes.append(game.play(policy))
        game.done = (i + 1) * (2 + len(chosen))
    game.tell("done", 0)
    bound = certify(scenario, arrivals, outcomes) if scenario.problem == "batching" else None
    return Comparison(scenario, chosen, tuple(outcomes), bound)


@dataclass(kw_only=True)
class _Game(Jobs):
    """Scenario, shared arrivals and the state of the progress display."""

    scenario: Scenario
    arrivals: dict[int, Requests]
    long: Requests
    warm: bool = False

    def play(self, policy: Policy) -> Outcome:
        """All stages for one policy; what was reached before an error is kept."""
        outcome, self.seconds = Outcome(policy.name), {}
        try:
            for stage in (self.plan, self.fluid, self.simulate, self.judge):
                outcome = stage(policy, outcome)
        except Exception as error:
            # A user's rule may raise anything; one broken policy must not cost the others their rows.
            outcome = replace(outcome, status=reason(error))
        return replace(outcome, seconds=dict(self.seconds))

    def plan(self, policy: Policy, outcome: Outcome) -> Outcome:
        """Decide."""
        plan = self.planned(policy, self.scenario)
        told = plan.batcher.predictor == ORACLE and self.scenario.predictions != ORACLE
        return replace(outcome, plan=plan, clairvoyant=plan.batcher.clairvoyant or told)

    def fluid(self, policy: Policy, outcome: Outcome) -> Outcome:
        """The fluid model."""
        assert outcome.plan is not None
        self.tell(f"{policy.name}: fluid model")
        with self.timed("fluid"):
            return replace(outcome, fluid=evaluate_fluid(self.scenario, outcome.plan))

    def simulate(self, policy: Policy, outcome: Outcome) -> Outcome:
        """The simulator, once per seed."""
        assert outcome.plan is not None
        if isinstance(outcome.plan.router, Router) and not self.warm:
            self.tell("loading the simulator, which the first run compiles (some seconds)", 0)
            first = next(iter(self.arrivals.values()))
            simulate(self.scenario, outcome.plan, 0, requests=first.head(2))
            self.warm = True
        runs = []
        for seed, requests in self.arrivals.items():
            self.tell(f"{policy.name}: simulate seed {seed}")
            with self.timed("run"):
                runs.append(simulate(self.scenario, outcome.plan, seed, requests=requests))
        return replace(outcome, simulated=summarise_runs(self.scenario, tuple(self.arrivals), runs))

    def judge(self, policy: Policy, outcome: Outcome) -> Outcome:
        """Loads under the split that the policy decided or that came about; the margin by theory and by search."""
        plan, simulated = outcome.plan, outcome.simulated
        assert plan is not None and simulated is not None
        fractions = simulated.fractions if plan.fractions is None else plan.fractions
        theory = assess(plan.batcher.served(self.scenario), fractions, router=policy.name)
        notes = tuple(caveat for pool in theory.pools for caveat in pool.caveats)
        load = np.array([pool.load for pool in theory.pools])
        outcome = replace(outcome, fractions=fractions, load=load, notes=notes)
        margin = theory.critical_rate / theory.rate
        if not (plan.batcher.clairvoyant or plan.batcher.replan):
            self.tell(f"{policy.name}: search for the margin", 0)
            outcome = replace(outcome, bracket=self.bracket(plan, margin))
        if not decided(self.scenario, plan):
            return outcome
        return replace(outcome, theory=margin, error=theory.error, outer=theory.outer_rate / theory.rate)

    def bracket(self, plan: Plan, guess: float) -> tuple[float, float]:
        """The margin by long runs, whose requests are others than those measured; an error says so."""
        played = self.long if isinstance(plan.router, Router) else self.long.head(ASKED)
        with self.timed("margin"):
            try:
                return simulated_margin(self.scenario, plan, played, guess)
            except LLMOptError as error:
                raise PolicyError(f"in the long runs for the margin, {error}") from error


def decided(scenario: Scenario, plan: Plan) -> bool:
    """Whether the plan leaves the theory no choice: a fixed split, and steps in which nobody pauses."""
    alone = scenario.problem == "batching" and len(scenario.pools) == 1
    guessed = plan.batcher.predictor_of(scenario) != ORACLE
    looks = any(pool.preemption == "lookahead" for pool in plan.batcher.served(scenario).pools)
    return (plan.fractions is not None or alone) and not plan.batcher.stepwise and not (guessed and looks)


def certify(scenario: Scenario, arrivals: Mapping[int, Requests], outcomes: Sequence[Outcome]) -> Bound:
    """The best lower bound on the mean end-to-end latency of the measured requests of every seed.

    Leaving out the others only helps those, so that a bound for them alone holds.

    Raises
    ------
    RuntimeError
        If a simulated latency lies below its bound, which would be an error of this program.
    """
    best: list[tuple[float, str]] = []
    for s, requests in enumerate(arrivals.values()):
        measured = requests.part(in_window(scenario, requests.arrival))
        found = latency_bound(scenario.pools, measured.arrival, measured.prompt, measured.output)
        certificates = [(found.mean, found.reason or ARGUMENTS[found.argument])]
        for outcome in outcomes if covered(scenario, outcomes) else ():
            if outcome.plan and outcome.plan.bound:
                certificates.append((outcome.plan.bound(measured) / len(measured), outcome.policy))
        best.append(max(certificates, key=lambda one: -np.inf if np.isnan(one[0]) else one[0]))
        for outcome in outcomes:
            latency = outcome.simulated.reports[s].e2e.mean if outcome.simulated else np.nan
            if latency < best[-1][0] * (1 - ROUNDING) - CLOCK * scenario.evaluation.horizon:
                raise RuntimeError(f"{outcome.policy} has {latency} s, below the bound {best[-1]} of {scenario.name}")
    return Bound(tuple(value for value, _ in best), tuple(by for _, by in best))


def covered(scenario: Scenario, outcomes: Sequence[Outcome]) -> bool:
    """Whether the policies' own certificates hold for all rules compared: none keeps tokens where the pool does not."""
    plans = [outcome.plan for outcome in outcomes if outcome.plan is not None]
    starting_over = [pool for pool in scenario.pools if pool.preemption == "restart"]
    return all(plan.batcher.preemption(pool) == "restart" for plan in plans for pool in starting_over)


def summarise_runs(scenario: Scenario, seeds: Sequence[int], runs: Sequence[SimRun]) -> Simulated:
    """Reports, growth, mean backlog and pooled distributions of one policy's runs, one per seed."""
    times = np.linspace(0.0, scenario.evaluation.horizon, POINTS)
    measured = [in_window(scenario, run.requests.arrival) for run in runs]
    return Simulated(
        reports=tuple(measure(scenario, run, seed) for seed, run in zip(seeds, runs, strict=True)),
        growth=backlog_growth(scenario, runs),
        times=times,
        waiting=np.mean([run.waiting(times) for run in runs], axis=0),
        ttft=_quantiles([run.ttft[m] for run, m in zip(runs, measured, strict=True)]),
        tpot=_quantiles([run.tpot[m] for run, m in zip(runs, measured, strict=True)]),
        fractions=realised_split(scenario, runs),
    )


def _check_size(scenario: Scenario, seeds: int) -> None:
    """Refuse more requests than memory holds before they are drawn."""
    each = scenario.workload.total_rate * scenario.evaluation.horizon
    if each * seeds > MOST_REQUESTS:
        raise ScenarioError(
            f"{scenario.name}: {seeds} x {each:.3g} requests (seeds x rate x horizon) are more than the "
            f"{MOST_REQUESTS:,} that fit in memory; take fewer seeds, or a lower rate or horizon"
        )


def _quantiles(samples: Sequence[Floats]) -> Floats:
    """Quantiles at `QUANTILES` of all samples together; NaN where there are none."""
    pooled = np.concatenate(samples)
    pooled = pooled[np.isfinite(pooled)]
    return np.asarray(np.quantile(pooled, QUANTILES)) if len(pooled) else np.full(len(QUANTILES), np.nan)
