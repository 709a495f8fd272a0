"""Comparing A/F ratios: every policy is planned, and its bundle is looked up on a curve that all policies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.evaluate.bundle_load import load_series
from llmopt.evaluate.bundle_run import play_bundle
from llmopt.evaluate.jobs import Jobs, Progress, reason
from llmopt.evaluate.ratio_comparison import RatioComparison, RatioOutcome
from llmopt.evaluate.ratio_curve import Curve, curve_order
from llmopt.evaluate.ways import checked_ways
from llmopt.policy import Policy
from llmopt.ratio import Published, horizon_load, published
from llmopt.ratio_report import ratio_report
from llmopt.scenario import Scenario


def compare_ratios(
    scenario: Scenario, policies: Sequence[Policy], seeds: Sequence[int], progress: Progress | None = None
) -> RatioComparison:
    """Plan every policy and judge its bundle by simulations that all of them share (common random numbers).

    There is one load series for each micro-batch size in use and each seed; every number of workers up to the fleet's
    most is played on it, for each number of FFN servers in use. A policy that fails keeps its row with the reason.
    """
    game = _Game(scenario=scenario, seeds=tuple(seeds), progress=progress, total=len(policies) * (1 + len(seeds)))
    outcomes = []
    for i, policy in enumerate(policies):
        outcomes.append(game.play(policy))
        game.done = (i + 1) * (1 + len(game.seeds))
    game.tell("ways of serving")
    ways = checked_ways(scenario, game.seeds[0])
    game.tell("done", 0)
    curves = curve_order(scenario, list(game.curves.values()))
    return RatioComparison(scenario, game.seeds, tuple(outcomes), curves, ways)


@dataclass(kw_only=True)
class _Game(Jobs):
    """Scenario and seeds, the load series by B and seed, the curves by B and y."""

    scenario: Scenario
    seeds: tuple[int, ...]
    loads: dict[tuple[int, int], Floats] = field(default_factory=dict)
    curves: dict[tuple[int, int], Curve] = field(default_factory=dict)

    def play(self, policy: Policy) -> RatioOutcome:
        """Plan, check, simulate; what was reached before an error is kept."""
        outcome, self.seconds = RatioOutcome(policy.name), {}
        try:
            outcome = self.plan(policy, outcome)
            outcome = self.simulate(outcome)
        except Exception as error:
            # A user's policy may raise anything; one broken policy must not cost the others their rows.
            outcome = replace(outcome, status=reason(error))
        return replace(outcome, seconds=dict(self.seconds))

    def plan(self, policy: Policy, outcome: RatioOutcome) -> RatioOutcome:
        """Decide."""
        return replace(outcome, plan=self.planned(policy, self.scenario))

    def simulate(self, outcome: RatioOutcome) -> RatioOutcome:
        """The curves of the plan's shapes, simulated where they are new."""
        plan = outcome.plan
        assert plan is not None and plan.bundle is not None
        main, *others = (self.curve(bundle, outcome.policy) for bundle in (plan.bundle, *(b for b, _ in plan.others)))
        return replace(outcome, curve=main, others=tuple(others))

    def curve(self, bundle: Bundle, policy: str) -> Curve:
        """Every number of workers at the bundle's B and y."""
        key = (bundle.batch, bundle.ffn_servers)
        if key not in self.curves:
            base = self.scenario.bundle.sized(self.scenario.bundle.attention_workers, *key[::-1])
            runs = []
            for seed in self.seeds:
                self.tell(f"{policy}: simulate seed {seed}")
                with self.timed("run"):
                    runs.append(play_bundle(base, self.series(base, seed), base.ffn_servers))
            evaluation = self.scenario.evaluation
            report = ratio_report(self.scenario, base, evaluation.confidence)
            rule = report.horizon if evaluation.start == "cold" else self.endless(base)
            self.curves[key] = Curve(base, tuple(runs), report, rule.ratio, evaluation.confidence)
        return self.curves[key]

    def endless(self, bundle: Bundle) -> Published:
        """The published rule for an endless run, which knows lengths by their means alone."""
        load = self.scenario.slot_load
        return published(bundle, horizon_load(load.mean_prompt, load.mean_decode, bundle.batch, None))

    def series(self, bundle: Bundle, seed: int) -> Floats:
        """The loads of the most workers at the bundle's B, drawn when first asked for."""
        key = (bundle.batch, seed)
        if key not in self.loads:
            scenario, load = self.scenario, self.scenario.run_load
            self.loads[key] = load_series(
                scenario.workload.classes,
                scenario.workload.rates,
                scenario.pools[0].first_step,
                bundle,
                scenario.fleet.most_attention,
                ceil(scenario.evaluation.requests * load.mean_decode / bundle.batch),
                seed,
                scenario.evaluation.start,
            )
        return self.loads[key]
