"""How far predictions are from measurements: means and quantiles, request by request, and as distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.run import SimRun
from llmopt.runs import Records

METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
JUDGED = ("mean", "p50", "p90", "p99")
"""Statistics whose errors count; the others are shown."""
Latencies = Mapping[str, Floats]
"""TTFT, TPOT and E2E of each request, s, arrays of shape (n,); TPOT is NaN for one output token."""
Summary = Mapping[str, Mapping[str, float]]
"""A number for each metric and statistic."""


def measured_latencies(records: Records) -> Latencies:
    """Latencies of the run by the engine's clock: from the engine's notice of a request to its tokens."""
    return _latencies(records.queued, records.first_token, records.finish, np.asarray(records.output - 1, dtype=float))


def predicted_latencies(sim: SimRun) -> Latencies:
    """The same of a simulated run, from the simulated engine's notice."""
    return _latencies(sim.queued, sim.first_token, sim.finish, np.asarray(sim.requests.output - 1, dtype=float))


def _latencies(queued: Floats, first: Floats, finish: Floats, gaps: Floats) -> Latencies:
    tpot = np.where(gaps > 0, (finish - first) / np.maximum(gaps, 1.0), np.nan)
    return {"ttft": first - queued, "tpot": tpot, "e2e": finish - queued}


def summary(latencies: Latencies) -> Summary:
    """Mean and quantiles of each metric, s; NaN where no request has one."""
    return {name: _statistics(values[np.isfinite(values)]) for name, values in latencies.items()}


def _statistics(values: Floats) -> dict[str, float]:
    if len(values) == 0:
        return dict.fromkeys(STATISTICS, float("nan"))
    quantiles = [float(np.quantile(values, int(name[1:]) / 100)) for name in STATISTICS[1:]]
    return dict(zip(STATISTICS, [float(values.mean()), *quantiles], strict=True))


def relative_errors(measured: Summary, predicted: Summary) -> Summary:
    """Predicted over measured, less 1; NaN where nothing was measured or it was zero."""
    return {
        name: {key: _relative(predicted[name][key], value) for key, value in row.items()}
        for name, row in measured.items()
    }


def _relative(predicted: float, measured: float) -> float:
    return predicted / measured - 1.0 if measured else float("nan")


@dataclass(frozen=True)
class Agreement:
    """One metric request by request.

    rank_correlation: Spearman's; median_error: median absolute relative error of a request; distance: largest gap
    between the two distribution functions (Kolmogorov-Smirnov). NaN where there are too few requests.
    """

    rank_correlation: float
    median_error: float
    distance: float


def agreement(measured: Floats, predicted: Floats) -> Agreement:
    """How one metric, arrays (n,), agrees over the requests that have it."""
    known = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[known], predicted[known]
    if len(x) < 2:
        return Agreement(float("nan"), float("nan"), float("nan"))
    positive = x > 0
    error = float(np.median(np.abs(y[positive] / x[positive] - 1.0))) if positive.any() else float("nan")
    return Agreement(_correlation(_ranks(x), _ranks(y)), error, _distance(x, y))


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(last - (counts + 1) / 2.0)[inverse]


def _correlation(x: Floats, y: Floats) -> float:
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else float("nan")


def _distance(x: Floats, y: Floats) -> float:
    at = np.concatenate([x, y])
    below = [np.searchsorted(np.sort(one), at, side="right") / len(one) for one in (x, y)]
    return float(np.abs(below[0] - below[1]).max())
