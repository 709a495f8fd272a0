"""What a comparison holds: one row per policy, and how it is written down.

Everything but the seconds of wall-clock time is determined by scenario, policies and seeds; the seconds stand in a
block of their own (`timings`), so that the rest has the same bytes in every run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.fluid import FluidRun
from llmopt.evaluate.growth import Growth
from llmopt.evaluate.report import Estimate, Report, paired_difference, summarise
from llmopt.evaluate.written import Written
from llmopt.output import plain
from llmopt.plan import Plan
from llmopt.scenario import Scenario

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["stable", "unstable", "close", ""]
QUANTILES = np.linspace(0.0, 1.0, 201)
"""Probabilities at which a comparison keeps the distributions of TTFT and TPOT, all seeds together."""


@dataclass(frozen=True)
class Simulated:
    """The simulator's answer for one policy.

    reports: one per seed; growth: of the waiting requests in the pool where they grow fastest, all seeds together;
    times (n_t,) in s and waiting (n_t, n_pools): requests not yet admitted, mean over seeds; ttft, tpot (201,): seconds
    at `QUANTILES`; fractions (n_classes, n_pools): where the requests went.
    """

    reports: tuple[Report, ...]
    growth: Growth
    times: Floats
    waiting: Floats
    ttft: Floats
    tpot: Floats
    fractions: Floats


@dataclass(frozen=True)
class Bound:
    """No batching rule has a smaller mean end-to-end latency than this, whatever it knows.

    by_seed: seconds, one per seed, NaN where nothing is proven; by: whose argument is the best, per seed.
    """

    by_seed: tuple[float, ...]
    by: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds, s."""
        return float(np.mean(self.by_seed))


@dataclass(frozen=True)
class Outcome:
    """One row of a comparison.

    status: "ok", or why the policy has no (complete) result; fractions (n_classes, n_pools): the split the policy
    decided or, where it decides by state, the split that came about; load (n_pools,): estimated load of each pool under
    it; clairvoyant: whether its batching rule knows what no engine can; bracket: factors on all arrivals, at most 2 %
    apart, at which the simulated backlog does not grow and grows in a long run, NaN for a rule that is too slow or too
    far-sighted for one; theory: for a decided split the critical factor by the step-mean estimate with its relative
    half-width `error`, and `outer`, the same by the outer bound; notes: what the estimate does not cover. The seconds
    are wall-clock: planning, of that building and solving, the fluid model, simulating all seeds, searching the margin.
    """

    policy: str
    status: str = "ok"
    plan: Plan | None = None
    fluid: FluidRun | None = None
    simulated: Simulated | None = None
    fractions: Floats | None = None
    load: Floats | None = None
    clairvoyant: bool = False
    bracket: tuple[float, float] = (float("nan"), float("nan"))
    theory: float = float("nan")
    error: float = float("nan")
    outer: float = float("nan")
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def ok(self) -> bool:
        """Whether the policy was planned, and ran in both evaluators."""
        return self.status == "ok"

    @property
    def margin(self) -> float:
        """Factor by which all arrivals could grow, by simulation; below 1 they are too many already."""
        low, high = self.bracket
        return float(np.sqrt(low * high)) if np.isfinite(high) else low

    @property
    def verdict(self) -> Verdict:
        """The simulator's verdict in the long run; ``close`` where the margin is 1 within its resolution.

        Of a rule that has no long run it is the verdict of the measured window.
        """
        low, high = self.bracket
        if np.isnan(low):
            return "" if self.simulated is None or not self.ok else "unstable" if self.growing else "stable"
        return "stable" if low >= 1 else "unstable" if high <= 1 else "close"

    @property
    def growing(self) -> bool:
        """Whether the backlog grew within the measured window, so that latencies depend on its length."""
        return self.simulated is not None and not self.simulated.growth.stable

    @property
    def fluid_verdict(self) -> Verdict:
        """The fluid model's verdict."""
        return "" if self.fluid is None else "stable" if self.fluid.stable else "unstable"

    @property
    def gap(self) -> float:
        """Relative optimality gap of the solve; NaN for a policy without one."""
        return self.plan.solve.gap if self.plan and self.plan.solve else float("nan")

    def estimates(self, confidence: float) -> dict[str, Estimate]:
        """Every metric's mean over seeds with its interval; empty without a simulation."""
        return summarise(self.simulated.reports, confidence) if self.simulated else {}


@dataclass(frozen=True)
class Comparison(Written):
    """Policies on one scenario, played against the same arrivals; `outcomes` in the order asked for.

    bound: where batching is open, what no rule can beat.
    """

    scenario: Scenario
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    bound: Bound | None = None

    def __getitem__(self, policy: str) -> Outcome:
        """The outcome of `policy` by name."""
        for outcome in self.outcomes:
            if outcome.policy == policy:
                return outcome
        raise KeyError(f"{policy!r} was not compared; compared are {[o.policy for o in self.outcomes]}")

    @property
    def served(self) -> bool:
        """Whether at least one policy is stable in the simulator."""
        return any(outcome.verdict == "stable" for outcome in self.outcomes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the theory does not cover, each kind of note once, whatever the numbers in it."""
        every = (note for outcome in self.outcomes for note in outcome.notes if np.isfinite(outcome.theory))
        return tuple({re.sub(r"[\d.]+%?", "#", note): note for note in reversed(list(every))}.values())[::-1]

    def ratio(self, outcome: Outcome) -> float:
        """Mean end-to-end latency over the certified bound; NaN without one."""
        if self.bound is None or outcome.simulated is None:
            return float("nan")
        return float(np.mean([report.e2e.mean for report in outcome.simulated.reports])) / self.bound.mean

    def difference(self, a: str, b: str, metric: str) -> Estimate:
        """Mean of `metric` of policy `a` minus that of `b`, paired by seed, with its interval."""
        pair = [self[name].simulated for name in (a, b)]
        one, two = ([] if s is None else s.reports for s in pair)
        return paired_difference(one, two, metric, self.scenario.evaluation.confidence)

    def table(self) -> pd.DataFrame:
        """One row per policy: verdicts, margin, latencies (s), goodput (requests/s), cost, gap, seconds."""
        import pandas as pd

        return pd.DataFrame([self._row(outcome) for outcome in self.outcomes]).set_index("policy")

    def records(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and Parquet: what `table` shows without seconds, every metric with its half-width."""
        head = self.stamp(self.scenario, self.seeds)
        return [head | self._record(outcome) for outcome in self.outcomes]

    def timings(self) -> dict[str, dict[str, float]]:
        """Wall-clock seconds of each policy: plan, of that build and solve, fluid, simulate."""
        return self.seconds_of(self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the timings, as plain data."""
        evaluation = self.scenario.evaluation
        head = self.heading(self.scenario) | {
            "horizon": evaluation.horizon,
            "warmup": evaluation.warmup,
            "confidence": evaluation.confidence,
            "seeds": self.seeds,
            "classes": [c.name for c in self.scenario.workload.classes],
            "pools": [p.name for p in self.scenario.pools],
        }
        if self.bound is not None:
            head["bound"] = {"mean": self.bound.mean} | vars(self.bound)
        data: dict[str, Any] = plain(head | {"policies": [self._full(o) for o in self.outcomes]})
        return data

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        metrics = outcome.estimates(self.scenario.evaluation.confidence)
        names: tuple[str, ...] = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "slo", "goodput", "cost")
        if self.bound is not None:
            names = ("e2e_mean", "e2e_p99", "queue_max", "jain", "starved", "preemptions", *names)
        return (
            {"policy": outcome.policy, "fluid": outcome.fluid_verdict, "simulated": outcome.verdict}
            | {"margin": outcome.margin, "theory": outcome.theory}
            | ({} if self.bound is None else {"ratio": self.ratio(outcome)})
            | {name: metrics[name].mean if name in metrics else float("nan") for name in names}
            | {"gap": outcome.gap}
            | {f"{key}_s": outcome.seconds.get(key, float("nan")) for key in ("plan", "run")}
            | {"status": outcome.status}
        )

    def _record(self, outcome: Outcome) -> dict[str, Any]:
        row: dict[str, Any] = {"policy": outcome.policy, "status": outcome.status}
        row |= {"fluid": outcome.fluid_verdict, "simulated": outcome.verdict}
        row |= {
            "margin": outcome.margin,
            "theory": outcome.theory,
            "error": outcome.error,
            "outer_margin": outcome.outer,
            "growing": outcome.growing,
            "gap": outcome.gap,
        }
        if self.bound is not None:
            row |= {"bound": self.bound.mean, "ratio": self.ratio(outcome), "clairvoyant": outcome.clairvoyant}
        for name, value in outcome.estimates(self.scenario.evaluation.confidence).items():
            row |= {name: value.mean, f"{name}_half": value.half}
        for j, pool in enumerate(self.scenario.pools):
            row[f"load_{pool.name}"] = float("nan") if outcome.load is None else float(outcome.load[j])
        return row

    def _full(self, outcome: Outcome) -> dict[str, Any]:
        solve, fluid, simulated = outcome.plan and outcome.plan.solve, outcome.fluid, outcome.simulated
        skip = {"build_seconds", "solve_seconds"}
        return {
            "policy": outcome.policy,
            "status": outcome.status,
            "margin": outcome.margin,
            "bracket": outcome.bracket,
            "theory": outcome.theory,
            "error": outcome.error,
            "outer_margin": outcome.outer,
            "fractions": outcome.fractions,
            "load": outcome.load,
            "notes": outcome.notes,
            **({} if self.bound is None else {"ratio": self.ratio(outcome), "clairvoyant": outcome.clairvoyant}),
            "solve": solve and {"gap": solve.gap} | {k: v for k, v in vars(solve).items() if k not in skip},
            "figures": outcome.plan and outcome.plan.figures,
            "fluid": fluid and _fluid_summary(fluid),
            "simulated": simulated
            and {
                "verdict": outcome.verdict,
                "growing": outcome.growing,
                "growth": simulated.growth,
                "metrics": outcome.estimates(self.scenario.evaluation.confidence),
                "seeds": simulated.reports,
            },
        }


def _fluid_summary(fluid: FluidRun) -> dict[str, Any]:
    """The fluid run without its curves."""
    return {
        "stable": fluid.stable,
        "growth": fluid.growth,
        "load": fluid.load,
        "drain_time": fluid.drain_time,
        "largest_backlog": float(fluid.backlog.sum(axis=1).max()),
    }
