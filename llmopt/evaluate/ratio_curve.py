"""The curve over A/F ratios: every number of Attention workers, simulated with the same loads, beside the theory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.evaluate.bundle_run import BundleRun
from llmopt.evaluate.report import Estimate, estimate
from llmopt.ratio_report import RatioReport
from llmopt.scenario import Scenario

NEAR = 0.01
"""Loss up to which a ratio counts as on the plateau of the best one."""
METRICS = ("throughput", "per_weight", "idle_attention", "idle_ffn", "tpot", "tpot_p99")
"""What is kept of a simulated bundle, as in `BundleRun`."""


@dataclass(frozen=True)
class Curve:
    """Every number of Attention workers x = 1..W at one micro-batch size B and one number of FFN servers y.

    bundle: with that B and y; runs: one simulation per seed; report: the theory, for the same x; rule: the published
    ratio as `afd-published` has it, by mean lengths, over the run if that starts cold.
    """

    bundle: Bundle
    runs: tuple[BundleRun, ...]
    report: RatioReport
    rule: float
    confidence: float

    def values(self, metric: str) -> Floats:
        """`metric` of every seed and every x, shape (n_seeds, W)."""
        return np.array([getattr(run, metric) for run in self.runs])

    def mean(self, metric: str) -> Floats:
        """Mean of `metric` over seeds, shape (W,)."""
        return np.asarray(self.values(metric).mean(axis=0))

    def at(self, workers: int, metric: str) -> Estimate:
        """Mean of `metric` over seeds with `workers` workers, and the half-width of its interval."""
        return estimate(list(self.values(metric)[:, workers - 1]), self.confidence)

    @property
    def workers(self) -> int:
        """W, the most workers simulated."""
        return len(self.runs[0].throughput)

    @cached_property
    def loss(self) -> Floats:
        """Share of the objective, throughput per unit of weight, lost against the best simulated x; shape (W,)."""
        worth = self.mean("per_weight")
        return np.asarray(1 - worth / worth.max())

    @property
    def best(self) -> int:
        """The x of the largest simulated objective, the smallest among equals."""
        return int(np.argmin(self.loss)) + 1

    @property
    def plateau(self) -> tuple[int, int]:
        """The x around the best that lose at most `NEAR`, first and last."""
        first = last = self.best
        while first > 1 and self.loss[first - 2] <= NEAR:
            first -= 1
        while last < self.workers and self.loss[last] <= NEAR:
            last += 1
        return first, last

    @property
    def alike(self) -> tuple[int, ...]:
        """The x around the best whose objective, paired by seed, may be as large: of the plateau and its neighbours."""
        worth = self.values("per_weight")
        less = [estimate(list(worth[:, self.best - 1] - worth[:, x - 1]), self.confidence) for x in self._near_best()]
        return tuple(x for x, one in zip(self._near_best(), less, strict=True) if not one.mean > one.half)

    def _near_best(self) -> range:
        """The plateau and its neighbours."""
        first, last = self.plateau
        return range(max(1, first - 1), min(self.workers, last + 1) + 1)

    def theory(self) -> tuple[Floats, Floats]:
        """Throughput per instance for every x, tokens/s: in the mean field and with the barrier; shapes (W,)."""
        x = np.arange(1, self.workers + 1)
        rows = np.array(self.report.curve, dtype=float)
        mean_field, barrier = (np.interp(x, rows[:, 0], rows[:, k], right=np.nan) for k in (1, 2))
        return mean_field, barrier

    @property
    def per_weight(self) -> Floats:
        """Instances per unit of weight for every x: turns tokens/s per instance into the objective; shape (W,)."""
        (w_a, w_f), x, y = self.bundle.weights, np.arange(1, self.workers + 1), self.bundle.ffn_servers
        return np.asarray((x + y) / (x * w_a + y * w_f))

    def as_dict(self) -> dict[str, Any]:
        """The curve as plain data."""
        mean_field, barrier = self.theory()
        points = [{m: self.at(x, m) for m in METRICS} for x in range(1, self.workers + 1)]
        return {
            "batch": self.bundle.batch,
            "ffn_servers": self.bundle.ffn_servers,
            "steps": self.runs[0].steps,
            "best": self.best,
            "plateau": self.plateau,
            "published_rule": self.rule,
            "theory": {key: value for key, value in theory_data(self.report).items() if key != "curve"},
            "points": [
                {"attention_workers": k + 1, "loss": self.loss[k], "mean_field": mean_field[k], "barrier": barrier[k]}
                | point
                for k, point in enumerate(points)
            ],
        }


def curve_order(scenario: Scenario, curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """The scenario's own B and y first, the others by B and y."""
    own = (scenario.bundle.batch, scenario.bundle.ffn_servers)

    def key(curve: Curve) -> tuple[bool, int, int]:
        mine = (curve.bundle.batch, curve.bundle.ffn_servers)
        return (mine != own, *mine)

    return tuple(sorted(curves, key=key))


def shape(bundle: Bundle) -> str:
    """`9A-1F`."""
    return f"{bundle.attention_workers}A-{bundle.ffn_servers}F"


def theory_data(report: RatioReport) -> dict[str, Any]:
    """The report with names for all its parts, as plain data."""
    named = {key: getattr(report, key)._asdict() for key in ("published", "horizon")}
    bundle = report.bundle.model_dump(mode="json")
    return {**vars(report), **named, "bundle": bundle, "curve": [point._asdict() for point in report.curve]}


def simulated_optimum(curve: Curve) -> str:
    """The best simulated ratio and its plateau as a sentence."""
    y, (first, last) = curve.bundle.ffn_servers, curve.plateau
    best = curve.at(curve.best, "throughput").mean
    flat = (
        f"{first}A to {last}A lose at most {NEAR:.0%}" if last > first else f"both neighbours lose more than {NEAR:.0%}"
    )
    per = "" if curve.bundle.weights == (1.0, 1.0) else " per dollar"
    return f"Simulated, {curve.best}A-{y}F is best{per} with {best:,.0f} tokens/s per instance; {flat}{_doubt(curve)}."


def _doubt(curve: Curve) -> str:
    """How sure the best is: which others these seeds cannot tell from it."""
    if len(curve.runs) == 1:
        return "; of one seed, so that nothing is known of the error"
    alike = [f"{x}A" for x in curve.alike if x != curve.best]
    return f"; these seeds do not tell it from {', '.join(alike)}" if alike else ""


def published_verdict(curve: Curve) -> str:
    """What the published rule's ratio loses in simulation: the better of the whole numbers beside it."""
    y, rule = curve.bundle.ffn_servers, curve.rule
    beside = {min(max(1, int(end(rule * y))), curve.workers) for end in (floor, ceil)}
    x = min(sorted(beside), key=lambda one: curve.loss[one - 1])
    lost = float(curve.loss[x - 1])
    if lost <= NEAR:
        return f"Simulated, the published rule's {rule:.2f}, at best {x}A-{y}F, loses {lost:.2%}."
    return (
        f"The published rule fails here: simulated, its {rule:.2f}, at best {x}A-{y}F, loses {lost:.1%}; right is "
        f"{curve.best}A-{y}F."
    )
