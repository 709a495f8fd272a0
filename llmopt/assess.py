"""The stability verdict of a scenario under a static split: loads, critical rate, what binds, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmopt.arrays import Floats
from llmopt.arrivals import PULSE
from llmopt.capacity import Capacity, replica_capacity
from llmopt.errors import ScenarioError
from llmopt.limits import PoolPhysics, pool_physics
from llmopt.output import plain
from llmopt.scenario import Pool, Scenario
from llmopt.stability import CAPS, PoolRows, stability_rows

TARGET_LOAD = 0.9
"""Load that a pool is sized for: N = ceil(lambda / (0.9 mu)), Nie, Si & Zhou 2605.04595, section 7.1."""
MINUTE = 60.0
MORE = 1.1
"""Factor by which a cap is raised to see whether it binds."""
FELT = 0.005
"""Gain in capacity from `MORE` of a cap below which the cap is said not to bind."""
PLAIN_SPLIT = "in proportion to what the pools could serve of each class alone"
Verdict = Literal["stable", "unstable", "too close to call"]


@dataclass(frozen=True)
class RowLoad:
    """Load of one row (1): a piece of the step time with a capped resource."""

    piece: str
    resource: str
    load: float


@dataclass(frozen=True)
class PoolReport:
    """One pool under the split.

    rate: requests/s that it gets on average; rows: loads of the rows (1); outer_load: the largest of them; load:
    estimated load; peak_load: the same at the highest rate of a time-varying workload; replicas_needed: for an
    estimated load of at most `TARGET_LOAD`; capacity: of one replica at its class mix, None if it gets nothing;
    relief: by how much, relatively, `MORE` times each cap would raise that capacity; physics: what the peaks of its
    accelerators say of its step time, None if they are not known.
    """

    pool: str
    replicas: int
    rate: float
    rows: tuple[RowLoad, ...]
    outer_load: float
    load: float
    peak_load: float
    replicas_needed: int
    capacity: Capacity | None
    relief: Mapping[str, float]
    physics: PoolPhysics | None = None

    @property
    def binds(self) -> str:
        """The cap whose raise gains most, or ``time`` if none gains anything: then only faster steps help."""
        most = max(self.relief, key=lambda r: self.relief[r], default="time")
        return most if self.relief.get(most, 0.0) >= FELT else "time"

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the estimate does not cover, and steps that no machine can do, in sentences that name the pool."""
        said = self.capacity.caveats if self.capacity else ()
        impossible = (self.physics.sentence,) if self.physics and self.physics.impossible else ()
        return tuple(f"Pool {self.pool!r}: {c[0].lower()}{c[1:]}" for c in said) + impossible

    @property
    def error(self) -> float:
        """Half-width of `load` relative to it."""
        return self.capacity.error if self.capacity else 0.0


@dataclass(frozen=True)
class StabilityReport:
    """What `llmopt stability` prints.

    router: whose split it is; fractions (n_classes, n_pools); load: the largest estimated load; error: its relative
    half-width; rate: mean arrivals, requests/s; critical_rate, outer_rate: total arrivals at which the first pool
    reaches load 1 by the estimate and by (1), all classes scaled together; pool, piece, resource: what binds, with
    ``time`` for the resource where no cap does; sentences: the verdict, its reasons and caveats in words.
    """

    router: str
    fractions: Floats
    pools: tuple[PoolReport, ...]
    rate: float
    load: float
    error: float
    critical_rate: float
    outer_rate: float
    pool: str
    piece: str
    resource: str
    verdict: Verdict
    sentences: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; what is infinite becomes None."""
        data: dict[str, Any] = plain(self)
        return data


def assess(scenario: Scenario, fractions: Floats | None = None, router: str = "") -> StabilityReport:
    """Judge the scenario under a static split.

    Parameters
    ----------
    fractions
        Share of each class that each pool gets, shape (n_classes, n_pools), rows summing to 1. Absent: each class
        is split in proportion to what the pools could serve of it alone.
    router
        Whose split it is, for the report.

    Raises
    ------
    ScenarioError
        If `fractions` has the wrong shape.
    """
    shape = (len(scenario.workload.classes), len(scenario.pools))
    split = plain_split(scenario) if fractions is None else np.asarray(fractions, dtype=float)
    if split.shape != shape:
        raise ScenarioError(f"fractions have shape {split.shape}, not {shape}; give one row per class, one per pool")
    peak = peak_factor(scenario)
    rates = scenario.workload.rates[:, None] * split
    rows = stability_rows(scenario)
    pools = tuple(_pool_report(scenario, pool, rows[j], rates[:, j], peak) for j, pool in enumerate(scenario.pools))
    return _report(router or (PLAIN_SPLIT if fractions is None else "given split"), split, pools)


def plain_split(scenario: Scenario) -> Floats:
    """Each class in proportion to what the pools could serve of it alone, shape (n_classes, n_pools)."""
    classes = scenario.workload.classes
    alone = np.array(
        [
            [
                p.replicas * replica_capacity(p, [c], np.ones(1)).rate if p.fits(c.largest) else 0.0
                for p in scenario.pools
            ]
            for c in classes
        ]
    )
    return np.asarray(alone / alone.sum(axis=1, keepdims=True))


def peak_factor(scenario: Scenario) -> float:
    """Largest arrival rate over the mean: of the profile in time, or of the busiest minute of a replayed trace."""
    horizon = scenario.evaluation.horizon
    if scenario.workload.replay is None:
        return float(scenario.workload.arrivals.profile(horizon)[1].max())
    minutes = np.bincount((scenario.workload.sample(horizon, 0).arrival // MINUTE).astype(int), minlength=1)
    return max(float(minutes.max() / (scenario.workload.total_rate * MINUTE)), 1.0)


def _pool_report(scenario: Scenario, pool: Pool, rows: PoolRows, rates: Floats, peak: float) -> PoolReport:
    total = float(rates.sum())
    loads = rows.loads(rates)
    capacity = replica_capacity(pool, scenario.workload.classes, rates) if total > 0 else None
    load = 0.0
    if capacity is not None:
        load = total / (pool.replicas * capacity.rate) if capacity.rate > 0 else math.inf
    return PoolReport(
        pool=pool.name,
        replicas=pool.replicas,
        rate=total,
        rows=tuple(RowLoad(*row) for row in zip(rows.pieces, rows.resources, loads.tolist(), strict=True)),
        outer_load=float(loads.max()),
        load=load,
        peak_load=load * peak,
        replicas_needed=_needed(load, pool.replicas),
        capacity=capacity,
        relief=_relief(scenario, pool, rates, capacity.rate) if capacity and capacity.rate > 0 else {},
        physics=pool_physics(pool),
    )


def _relief(scenario: Scenario, pool: Pool, rates: Floats, rate: float) -> dict[str, float]:
    """Relative gain in capacity from `MORE` times each cap, by the estimate; never negative."""
    raised = {
        resource: pool.model_copy(update={key: math.ceil(getattr(pool, key) * MORE)}) for resource, key in CAPS.items()
    }
    return {
        resource: max(replica_capacity(more, scenario.workload.classes, rates).rate / rate - 1, 0.0)
        for resource, more in raised.items()
    }


def _needed(load: float, replicas: int) -> int:
    """N = ceil(lambda / (0.9 mu)), 0 where no number of replicas helps."""
    return math.ceil(load * replicas / TARGET_LOAD - 1e-9) if math.isfinite(load) else 0


def _report(router: str, split: Floats, pools: tuple[PoolReport, ...]) -> StabilityReport:
    worst = max(pools, key=lambda p: p.load)
    assert worst.capacity is not None
    rate = sum(p.rate for p in pools)
    critical, outer = _over(rate, worst.load), _over(rate, max(p.outer_load for p in pools))
    verdict, error = _verdict(pools), _error(worst, pools)
    return StabilityReport(
        router=router,
        fractions=split,
        pools=pools,
        rate=rate,
        load=worst.load,
        error=error,
        critical_rate=critical,
        outer_rate=outer,
        pool=worst.pool,
        piece=worst.capacity.piece,
        resource=worst.binds,
        verdict=verdict,
        sentences=tuple(_sentences(router, verdict, worst, pools, rate, critical, outer, error)),
    )


def _error(worst: PoolReport, pools: tuple[PoolReport, ...]) -> float:
    """By how much, relatively, the largest load may be higher: a pool close to it may be known less well."""
    if not 0 < worst.load < math.inf:
        return worst.error
    return max(p.load * (1 + p.error) for p in pools) / worst.load - 1


def _over(rate: float, load: float) -> float:
    return rate / load if load > 0 else math.inf


def _verdict(pools: tuple[PoolReport, ...]) -> Verdict:
    """Unstable by proof if a row of (1) exceeds 1; otherwise by the estimate, unless 1 lies within its error."""
    if any(p.outer_load > 1 or p.load * (1 - p.error) > 1 for p in pools):
        return "unstable"
    return "stable" if all(p.load * (1 + p.error) < 1 for p in pools) else "too close to call"


def _sentences(
    router: str,
    verdict: Verdict,
    worst: PoolReport,
    pools: tuple[PoolReport, ...],
    rate: float,
    critical: float,
    outer: float,
    error: float,
) -> list[str]:
    said = [_verdict_sentence(verdict, worst, pools)]
    if worst.capacity is not None and worst.capacity.rate > 0:
        said.append(_binding_sentence(worst, worst.capacity.piece))
        said.append(
            f"Routed {router}, the critical rate is {critical:.4g} requests/s in all (now {rate:.4g}), to within "
            f"{error:.1%}; no engine with this split can carry more than {outer:.4g} ({_gap(critical, outer)})."
        )
    said += [s for p in pools for s in _needs(p)]
    said += _peaks(pools)
    said += [caveat for p in pools for caveat in p.caveats]
    return said + [p.physics.sentence for p in pools if p.physics and not p.physics.impossible]


def _verdict_sentence(verdict: Verdict, worst: PoolReport, pools: tuple[PoolReport, ...]) -> str:
    head = f"the highest load is {worst.load:.3f} ± {worst.load * worst.error:.3f}, of pool {worst.pool!r}"
    if verdict == "stable":
        return f"Stable: {head}."
    if verdict == "too close to call":
        return f"Too close to call: {head}, and 1 lies within its error; simulate it, or leave more room."
    proven = [p.pool for p in pools if p.outer_load > 1]
    if proven:
        return f"Unstable: {head}; the outer bound alone exceeds 1 in {', '.join(proven)}, so no engine policy helps."
    return f"Unstable: {head}; the backlog grows without end."


def _binding_sentence(worst: PoolReport, piece: str) -> str:
    """What would help the pool that reaches load 1 first."""
    words = {"kv": "KV memory", "batch": "batch slots (max_batch)", "tokens": "token budget"}
    gains = ", ".join(f"{words[r]} {gain:+.1%}" for r, gain in worst.relief.items())
    binds = f"the {words[worst.binds]}" if worst.binds in words else "the time of the steps themselves"
    return (
        f"What binds first is {binds} of pool {worst.pool!r}, mostly in steps whose largest piece is {piece!r}; "
        f"{MORE - 1:.0%} more of each cap would change its capacity by: {gains}."
    )


def _gap(critical: float, outer: float) -> str:
    gap = 1 - critical / outer if outer > 0 else 0.0
    return f"the estimate lies {gap:.1%} below that bound"


def _needs(p: PoolReport) -> list[str]:
    if p.rate == 0:
        return [f"Pool {p.pool!r} gets no requests."]
    if p.replicas_needed == 0:
        return [f"Pool {p.pool!r} cannot hold some of the requests it gets, with any number of replicas."]
    return [
        f"Pool {p.pool!r} gets {p.rate:.4g} requests/s, has {p.replicas} and needs {p.replicas_needed} "
        f"replica{'s' * (p.replicas_needed != 1)} for a load of at most {TARGET_LOAD}."
    ]


def _peaks(pools: tuple[PoolReport, ...]) -> list[str]:
    """What a time-varying rate does, if it varies."""
    worst = max(pools, key=lambda p: p.peak_load)
    if worst.peak_load > worst.load / PULSE * (1 - 1e-9):
        return ["All requests come at once: loads say how many such runs a pool can carry, one after the other."]
    if worst.peak_load <= worst.load * (1 + 1e-9):
        return []
    said = f"Arrivals vary in time: the mean load of pool {worst.pool!r} is {worst.load:.3f}, at the peak it is "
    if worst.peak_load <= 1:
        return [said + f"{worst.peak_load:.3f}, still below 1."]
    after = "drains after the peak" if worst.load < 1 else "never drains, since the mean is not below 1 either"
    return [said + f"{worst.peak_load:.3f}; above 1 a backlog builds up, which {after}."]
