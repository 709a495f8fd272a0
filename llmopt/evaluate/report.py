"""Metrics of one simulated run, and confidence intervals over runs.

Latencies and SLO attainment describe the *measured* requests: those that arrive in [warmup, horizon), each followed
to its end. Rates (throughput, goodput, cost) count what *completes* in [warmup, horizon), so that an overloaded system
shows what it delivers per second and not what it was offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmopt.arrays import Bools, Floats
from llmopt.evaluate.run import SimRun
from llmopt.scenario import Pool, Scenario

SECONDS_PER_HOUR = 3600.0
STARVING = 10.0
"""Mean end-to-end latencies after which a request that has never been admitted counts as starved."""


@dataclass(frozen=True)
class Latency:
    """Mean, quantiles and maximum in seconds over the requests that have the quantity; NaN if none has it.

    `count` is the number of these requests: TPOT is not defined for a request of one output token.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Floats) -> Latency:
        """Quantiles of the finite entries of `values`, linear between order statistics."""
        known = values[np.isfinite(values)]
        if not len(known):
            return cls(np.nan, np.nan, np.nan, np.nan, np.nan, 0)
        p50, p90, p99 = (float(q) for q in np.quantile(known, [0.5, 0.9, 0.99]))
        return cls(float(known.mean()), p50, p90, p99, float(known.max()), len(known))


@dataclass(frozen=True)
class PoolUse:
    """What one pool did in a run.

    share: fraction of the measured requests it served; utilisation: fraction of the time a replica was in a step;
    kv_use: time average of KV tokens in use over KV capacity; kv_peak: largest use of a replica in a step over its
    capacity; preemptions: over the whole run; wasted: part of the KV token-steps that preemption made useless.
    Averages run from 0 to the end of the last step or the horizon, whichever is later.
    """

    pool: str
    share: float
    utilisation: float
    kv_use: float
    kv_peak: float
    preemptions: int
    wasted: float


@dataclass(frozen=True)
class Report:
    """Metrics of one run: latencies in s, rates per second, cost in USD per million output tokens.

    requests: measured requests; slo: fraction of them that meet all their requirements (those without any do);
    goodput: requests/s completed that meet all their requirements; throughput: requests/s completed; tokens: output
    tokens/s of completed requests; cost: price of all replicas over that; preemptions: per measured request.

    normalised: E2E per output token, s; jain: Jain's index of the speeds (output tokens over E2E), 1 if all requests
    are served equally fast, 1 / n if one has everything; starved: fraction that waited for their first admission longer
    than `STARVING` times the mean E2E.
    """

    seed: int
    requests: int
    ttft: Latency
    tpot: Latency
    e2e: Latency
    queue: Latency
    normalised: Latency
    slo: float
    goodput: float
    throughput: float
    tokens: float
    cost: float
    preemptions: float
    jain: float
    starved: float
    pools: tuple[PoolUse, ...]

    @property
    def figures(self) -> Mapping[str, float]:
        """All scalar metrics by flat name, e.g. ``ttft_p99``."""
        flat: dict[str, float] = {}
        for key in ("ttft", "tpot", "e2e", "queue", "normalised"):
            latency: Latency = getattr(self, key)
            flat |= {f"{key}_{q}": getattr(latency, q) for q in ("mean", "p50", "p90", "p99", "max")}
        for key in ("slo", "goodput", "throughput", "tokens", "cost", "preemptions", "jain", "starved"):
            flat[key] = getattr(self, key)
        return MappingProxyType(flat)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """Mean of a metric over seeds and the half-width of its confidence interval (NaN for a single seed)."""

    mean: float
    half: float


def measure(scenario: Scenario, run: SimRun, seed: int) -> Report:
    """Metrics of `run`, a simulation of `scenario` with `seed`."""
    measured = in_window(scenario, run.requests.arrival)
    completed = in_window(scenario, run.finish)
    met = meets_slos(scenario, run)
    window = scenario.evaluation.horizon - scenario.evaluation.warmup
    tokens = float(run.requests.output[completed].sum()) / window
    return Report(
        seed=seed,
        requests=int(measured.sum()),
        ttft=Latency.of(run.ttft[measured]),
        tpot=Latency.of(run.tpot[measured]),
        e2e=Latency.of(run.e2e[measured]),
        queue=Latency.of(run.queue_time[measured]),
        normalised=Latency.of((run.e2e / run.requests.output)[measured]),
        slo=_mean(met[measured]),
        goodput=float((met & completed).sum()) / window,
        throughput=float(completed.sum()) / window,
        tokens=tokens,
        cost=_cost(scenario, tokens),
        preemptions=_mean(run.preemptions[measured]),
        jain=jain_index((run.requests.output / run.e2e)[measured]),
        starved=_mean(run.queue_time[measured] > STARVING * run.e2e[measured].mean()) if measured.any() else np.nan,
        pools=tuple(_pool_use(scenario, run, measured, j) for j in range(len(scenario.pools))),
    )


def in_window(scenario: Scenario, times: Floats) -> Bools:
    """Which `times` lie in [warmup, horizon)."""
    return (times >= scenario.evaluation.warmup) & (times < scenario.evaluation.horizon)


def meets_slos(scenario: Scenario, run: SimRun) -> Bools:
    """Which requests meet all requirements of their class, shape (n_requests,); no requirement is met."""
    classes = scenario.workload.classes
    cls = run.requests.cls
    ttft = np.array([np.inf if c.ttft is None else c.ttft for c in classes])[cls]
    tpot = np.array([np.inf if c.tpot is None else c.tpot for c in classes])[cls]
    one_token = run.requests.output == 1
    return np.asarray((run.ttft <= ttft) & (one_token | (np.nan_to_num(run.tpot) <= tpot)))


def realised_split(scenario: Scenario, runs: Sequence[SimRun]) -> Floats:
    """Fraction of each class that each pool received over all `runs`, shape (n_classes, n_pools).

    A class without requests is spread evenly, which loads nothing.
    """
    classes, pools = len(scenario.workload.classes), len(scenario.pools)
    counts = np.zeros((classes, pools))
    for run in runs:
        np.add.at(counts, (run.requests.cls, run.replicas.pool[run.replica]), 1.0)
    total = counts.sum(axis=1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1.0), 1.0 / pools)


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """Mean and Student-t half-width of independent runs; NaN entries make the mean NaN, not silently smaller."""
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else np.nan, np.nan)
    quantile = float(stdtrit(len(x) - 1, 0.5 + confidence / 2))
    return Estimate(float(x.mean()), quantile * float(x.std(ddof=1)) / float(np.sqrt(len(x))))


def summarise(reports: Sequence[Report], confidence: float) -> dict[str, Estimate]:
    """Estimate of every scalar metric over `reports`, one per seed."""
    if not reports:
        return {}
    return {key: estimate([r.figures[key] for r in reports], confidence) for key in reports[0].figures}


def paired_difference(a: Sequence[Report], b: Sequence[Report], metric: str, confidence: float) -> Estimate:
    """Estimate of `metric` of `a` minus that of `b`, seed by seed: common arrivals cancel most of the noise."""
    pairs = zip(a, b, strict=True)
    return estimate([one.figures[metric] - two.figures[metric] for one, two in pairs], confidence)


def jain_index(shares: Floats) -> float:
    """(sum x)^2 / (n sum x^2) of positive shares of shape (n,); NaN without any.

    Source: Jain, Chiu, Hawe, "A quantitative measure of fairness", DEC-TR-301 (1984).
    """
    return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())) if len(shares) else float("nan")


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _cost(scenario: Scenario, tokens: float) -> float:
    """USD per million output tokens when `tokens` are delivered per second; inf if none are, NaN without prices."""
    hourly = sum(pool.price * pool.replicas for pool in scenario.pools)
    if hourly == 0:
        return float("nan")
    return hourly / SECONDS_PER_HOUR / tokens * 1e6 if tokens > 0 else float("inf")


def _pool_use(scenario: Scenario, run: SimRun, measured: Bools, j: int) -> PoolUse:
    pool: Pool = scenario.pools[j]
    totals, mine = run.replicas, run.replicas.pool == j
    seconds = max(run.end, scenario.evaluation.horizon) * pool.replicas
    held = float(totals.held[mine].sum())
    return PoolUse(
        pool=pool.name,
        share=_mean(totals.pool[run.replica[measured]] == j),
        utilisation=float(totals.busy[mine].sum()) / seconds,
        kv_use=float(totals.held_time[mine].sum()) / seconds / pool.kv_capacity,
        kv_peak=float(totals.peak[mine].max()) / pool.kv_capacity,
        preemptions=int(totals.preemptions[mine].sum()),
        wasted=float(totals.wasted[mine].sum()) / held if held > 0 else 0.0,
    )
