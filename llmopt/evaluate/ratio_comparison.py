"""What a comparison of A/F ratios holds: one row per policy, and the curves that the rows are points of.

The protocol is that of `llmopt.evaluate.comparison.Comparison`. Everything but the seconds of wall-clock time is
determined by scenario, policies and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmopt.bundle import Bundle
from llmopt.evaluate.ratio_curve import METRICS, Curve, published_verdict, shape, simulated_optimum
from llmopt.evaluate.report import Estimate
from llmopt.evaluate.written import Written
from llmopt.output import plain
from llmopt.plan import Plan
from llmopt.ratio import kv_need, regime
from llmopt.scenario import Scenario
from llmopt.ways_report import WaysComparison

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RatioOutcome:
    """One row: status is "ok", or why the policy has no (complete) result; curve: on which its bundle is a point.

    others: curves of the further shapes of its plan. seconds: wall-clock, of planning, of that building and solving.
    """

    policy: str
    status: str = "ok"
    plan: Plan | None = None
    curve: Curve | None = None
    others: tuple[Curve, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def ok(self) -> bool:
        """Whether the policy was planned and simulated."""
        return self.status == "ok"

    @property
    def bundle(self) -> Bundle | None:
        """The bundle decided on."""
        return self.plan.bundle if self.plan else None

    @property
    def gap(self) -> float:
        """Relative optimality gap of the solve; NaN for a policy without one."""
        return self.plan.solve.gap if self.plan and self.plan.solve else float("nan")

    @property
    def ratio(self) -> float:
        """The continuous ratio behind the whole numbers, or theirs where the policy names none."""
        found = self.plan.figures.get("ratio") if self.plan else None
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
        return self.bundle.ratio if self.bundle else float("nan")

    @property
    def simulated(self) -> bool:
        """Whether there is a simulation."""
        return self.curve is not None

    @property
    def loss(self) -> float:
        """The regret: share of the objective lost against the best simulated x at the same B and y; NaN without one."""
        if self.curve is None or self.bundle is None:
            return float("nan")
        return float(self.curve.loss[self.bundle.attention_workers - 1])

    @property
    def tokens(self) -> float:
        """Simulated tokens/s of all bundles of the plan; NaN without a simulation."""
        if self.plan is None or self.curve is None or self.bundle is None:
            return float("nan")
        shapes = [(self.bundle, self.plan.bundles), *self.plan.others]
        return float(
            sum(
                n * _instances(bundle) * curve.at(bundle.attention_workers, "throughput").mean
                for (bundle, n), curve in zip(shapes, (self.curve, *self.others), strict=True)
            )
        )

    def at(self, metric: str) -> Estimate:
        """A simulated metric of the bundle; NaN without a simulation."""
        if self.curve is None or self.bundle is None:
            return Estimate(float("nan"), float("nan"))
        return self.curve.at(self.bundle.attention_workers, metric)

    @property
    def predicted(self) -> float:
        """Throughput per instance by theory with the barrier, tokens/s."""
        if self.curve is None or self.bundle is None:
            return float("nan")
        return float(self.curve.theory()[1][self.bundle.attention_workers - 1])

    @property
    def per_device(self) -> float:
        """Simulated tokens/s per accelerator of the bundle."""
        bundle = self.bundle
        return self.at("throughput").mean * _instances(bundle) / bundle.devices if bundle else float("nan")

    def excess(self, scenario: Scenario) -> str:
        """By what the plan exceeds limits of the scenario, that rules do not look at: TPOT, KV memory, devices."""
        if self.plan is None or self.bundle is None or self.curve is None:
            return ""
        shapes = [(self.bundle, self.plan.bundles), *self.plan.others]
        limit = min((c.tpot for c in scenario.workload.classes if c.tpot is not None), default=float("inf"))
        tpot, capacity = self.at("tpot").mean, self.bundle.kv_capacity
        kv = kv_need(self.bundle, scenario.slot_load, scenario.fleet.kv_sigmas)
        devices = sum(bundle.devices * count for bundle, count in shapes)
        found = [f"TPOT {1e3 * tpot:.4g} ms of {1e3 * limit:.4g}"] if tpot > limit else []
        found += [f"KV tokens {kv:,.0f} of {capacity:,} a worker"] if kv > capacity else []
        most = scenario.fleet.devices
        found += [f"{devices} devices of {most}"] if most is not None and devices > most else []
        return ", ".join(found)

    @property
    def cost(self) -> float:
        """USD per million tokens; NaN without prices."""
        if self.bundle is None or self.bundle.price <= 0:
            return float("nan")
        return 1e6 * self.bundle.price / 3600 / (self.at("throughput").mean * _instances(self.bundle))


@dataclass(frozen=True)
class RatioComparison(Written):
    """Policies on one scenario, simulated with the same loads; `outcomes` in the order asked for.

    curves: one for each B and y in use, that of the scenario's own bundle first if it is among them. ways: the ways of
    serving side by side, or why they cannot be compared.
    """

    scenario: Scenario
    seeds: tuple[int, ...]
    outcomes: tuple[RatioOutcome, ...]
    curves: tuple[Curve, ...]
    ways: WaysComparison | str = ""

    def __getitem__(self, policy: str) -> RatioOutcome:
        """The outcome of `policy` by name."""
        for outcome in self.outcomes:
            if outcome.policy == policy:
                return outcome
        raise KeyError(f"{policy!r} was not compared; compared are {[o.policy for o in self.outcomes]}")

    @property
    def served(self) -> bool:
        """Whether at least one policy has a result: bundles whose slots are always full are never overloaded."""
        return any(outcome.ok for outcome in self.outcomes)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What follows: of every curve the simulated optimum and the published rule, all of the theory of the first."""
        found: list[str] = []
        for i, curve in enumerate(self.curves):
            head = f"B = {curve.bundle.batch}, y = {curve.bundle.ffn_servers}: " if len(self.curves) > 1 else ""
            theory = curve.report.sentences if i == 0 else curve.report.sentences[:1]
            found += [f"{head}{text}" for text in (simulated_optimum(curve), published_verdict(curve), *theory)]
        return (*found, *self._beyond())

    def _beyond(self) -> Iterator[str]:
        """Which policies exceed what limits of the scenario, those with the same bundles together."""
        by_excess: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            excess = outcome.excess(self.scenario)
            if excess and outcome.bundle:
                by_excess.setdefault(f"{shape(outcome.bundle)}: {excess}", []).append(outcome.policy)
        for excess, policies in by_excess.items():
            yield f"Beyond the limits: {', '.join(policies)}, {excess}."

    def table(self) -> pd.DataFrame:
        """One row per policy, as in `records`, with the seconds of planning."""
        import pandas as pd

        rows = [self._row(outcome) | {"plan_s": outcome.seconds.get("plan", float("nan"))} for outcome in self.outcomes]
        return pd.DataFrame(rows).set_index("policy")

    def records(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and Parquet."""
        head = self.stamp(self.scenario, self.seeds)
        return [head | self._row(outcome) for outcome in self.outcomes]

    def timings(self) -> dict[str, dict[str, float]]:
        """Wall-clock seconds of each policy: plan, of that build and solve; run: the simulations that it waited for."""
        return self.seconds_of(self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the timings, as plain data."""
        evaluation = self.scenario.evaluation
        head = self.heading(self.scenario) | {
            "problem": self.scenario.problem,
            "requests": evaluation.requests,
            "start": evaluation.start,
            "confidence": evaluation.confidence,
            "seeds": self.seeds,
            "load": self.scenario.run_load,
            "bundle": self.scenario.bundle.model_dump(mode="json"),
            "sentences": self.sentences,
        }
        curves: dict[str, Any] = {"curves": [curve.as_dict() for curve in self.curves]}
        curves["ways"] = self.ways if isinstance(self.ways, str) else self.ways.as_dict()
        data: dict[str, Any] = plain(head | {"policies": [self._full(o) for o in self.outcomes]} | curves)
        return data

    def regime(self, outcome: RatioOutcome) -> str:
        """The stage that binds at the outcome's ratio, in the mean field."""
        bundle = outcome.bundle
        return "" if bundle is None else regime(bundle, self.scenario.load_at(bundle.batch), bundle.ratio)

    def _row(self, outcome: RatioOutcome) -> dict[str, Any]:
        bundle, plan = outcome.bundle, outcome.plan
        low, high = outcome.curve.report.interval if outcome.curve else (float("nan"), float("nan"))
        row: dict[str, Any] = {"policy": outcome.policy, "status": outcome.status}
        row |= {key: getattr(bundle, key, None) for key in ("attention_workers", "ffn_servers", "batch")}
        row |= {"bundles": plan.bundles if plan else None, "ratio": outcome.ratio}
        row |= {"ratio_low": low, "ratio_high": high, "regime": self.regime(outcome), "predicted": outcome.predicted}
        for metric in METRICS:
            value = outcome.at(metric)
            row |= {metric: value.mean, f"{metric}_half": value.half}
        return row | {
            "loss": outcome.loss,
            "per_device": outcome.per_device,
            "all_bundles": outcome.tokens,
            "usd_per_million": outcome.cost,
            "gap": outcome.gap,
        }

    def _full(self, outcome: RatioOutcome) -> dict[str, Any]:
        plan, solve = outcome.plan, outcome.plan and outcome.plan.solve
        skip = {"build_seconds", "solve_seconds"}
        others = [{"bundle": shape(b), "batch": b.batch, "bundles": n} for b, n in (plan.others if plan else ())]
        return self._row(outcome) | {
            "bundle": outcome.bundle and shape(outcome.bundle),
            "others": others,
            "solve": solve and {"gap": solve.gap} | {k: v for k, v in vars(solve).items() if k not in skip},
            "figures": plan and plan.figures,
        }


def _instances(bundle: Bundle) -> int:
    return bundle.attention_workers + bundle.ffn_servers
