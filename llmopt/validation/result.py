"""What a validation holds and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from llmopt import __version__
from llmopt.arrays import Floats
from llmopt.evaluate.run import SimRun
from llmopt.output import plain
from llmopt.runs import Curves, EngineRun, Setting
from llmopt.scenario import Scenario
from llmopt.validation.accuracy import (
    JUDGED,
    METRICS,
    Agreement,
    Latencies,
    Summary,
    agreement,
    measured_latencies,
    predicted_latencies,
    relative_errors,
    summary,
)
from llmopt.validation.constants import Constant
from llmopt.validation.overhead import Estimate
from llmopt.validation.replay import SEED


@dataclass(frozen=True, eq=False)
class Validation:
    """A run and its prediction.

    skipped: requests at the start that are not judged, because the host overhead was estimated from them; curves: the
    predicted engine state at the recorded times, and every second after the last of them or where there are none;
    seconds: wall-clock.
    """

    run: EngineRun
    scenario: Scenario
    sim: SimRun
    step_time: str
    overhead: str
    settings: Mapping[str, Setting]
    constants: tuple[Constant, ...]
    notes: tuple[str, ...]
    curves: Curves
    skipped: int = 0
    estimate: Estimate | None = None
    seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def host_overhead(self) -> float:
        """Seconds of every step besides its kernels, as played."""
        return self.scenario.pools[0].host_overhead

    @cached_property
    def measured_latencies(self) -> Latencies:
        """TTFT, TPOT and E2E (s) of each judged request, arrays (n,)."""
        return self._judged(measured_latencies(self.run.records))

    @cached_property
    def predicted_latencies(self) -> Latencies:
        """The same as predicted."""
        return self._judged(predicted_latencies(self.sim))

    def _judged(self, latencies: Latencies) -> Latencies:
        return {name: values[self.skipped :] for name, values in latencies.items()}

    @cached_property
    def measured(self) -> Summary:
        """Mean and quantiles of the measured latencies, s."""
        return summary(self.measured_latencies)

    @cached_property
    def predicted(self) -> Summary:
        """Mean and quantiles of the predicted latencies, s."""
        return summary(self.predicted_latencies)

    @cached_property
    def relative_error(self) -> Summary:
        """Predicted over measured, less 1, by metric and statistic."""
        return relative_errors(self.measured, self.predicted)

    @property
    def errors(self) -> Floats:
        """The known relative errors that count (`JUDGED`), shape (n,)."""
        values = np.array([row[key] for row in self.relative_error.values() for key in JUDGED])
        return np.asarray(values[np.isfinite(values)])

    @property
    def mean_absolute_error(self) -> float:
        """Mean of the absolute relative errors that count."""
        return float(np.abs(self.errors).mean()) if len(self.errors) else math.nan

    @property
    def largest_error(self) -> float:
        """Largest absolute relative error that counts."""
        return float(np.abs(self.errors).max(initial=0.0))

    @cached_property
    def agreements(self) -> Mapping[str, Agreement]:
        """Agreement request by request, for each metric."""
        return {m: agreement(self.measured_latencies[m], self.predicted_latencies[m]) for m in METRICS}

    @cached_property
    def curve_errors(self) -> Mapping[str, float]:
        """Mean absolute difference of running and waiting from the recorded curves, as a share of their largest value;
        empty without recorded curves.
        """
        recorded = self.run.curves
        if recorded is None:
            return {}
        n = len(recorded.times)
        pairs = {name: (getattr(recorded, name), getattr(self.curves, name)[:n]) for name in ("running", "waiting")}
        return {name: float(np.abs(a - b).mean() / max(a.max(), 1.0)) for name, (a, b) in pairs.items()}

    @property
    def steps(self) -> int:
        """Engine steps of all replicas."""
        return int(self.sim.replicas.steps.sum())

    @property
    def extrapolated(self) -> int:
        """Steps outside the measured ranges of the table; 0 where a fit was played instead."""
        return int(self.sim.replicas.extrapolated.sum())

    @property
    def preemptions(self) -> int:
        """Preemptions of all requests."""
        return int(self.sim.preemptions.sum())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; what is not known becomes None. Only `seconds` differs between equal runs."""
        data: dict[str, Any] = plain(
            {
                "run": self.run.name,
                "version": __version__,
                "scenario": self.scenario.digest,
                "seed": SEED,
                "core": self.sim.core,
                "step_time": self.step_time,
                "requests": len(self.run.records),
                "judged": len(self.run.records) - self.skipped,
                "relative_error": self.relative_error,
                "measured": self.measured,
                "predicted": self.predicted,
                "mean_absolute_error": self.mean_absolute_error,
                "largest_error": self.largest_error,
                "by_request": self.agreements,
                "host_overhead": {"seconds": self.host_overhead, "choice": self.overhead, "estimate": self.estimate},
                "constants": self.constants,
                "settings": self.settings,
                "steps": self.steps,
                "extrapolated_steps": self.extrapolated,
                "preemptions": self.preemptions,
                "curve_error": self.curve_errors,
                "curves": {"measured": self.run.curves, "predicted": self.curves},
                "notes": self.notes,
                "seconds": self.seconds,
            }
        )
        return data
