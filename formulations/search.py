"""Programs whose true objective is an estimate: solve, linearise at the best split, move a little, solve again.

The rows (1) are linear but optimistic; what verdicts use is the step-mean estimate, which is neither linear nor quite
convex in the routing. So after the program over (1), each round puts the tangents of the estimate at the best split so
far into the program and lets the split move only a radius away from it: sequential linear programming in a trust
region. The best split by the estimate is what counts; what the first program proved bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from formulations.data import RoutingData, Row
from llmopt.arrays import Floats
from llmopt.capacity import estimated_load, load_gradient
from llmopt.scenario import Scenario
from llmopt.solution import Solve

START, SMALLEST, SHRINK = 0.25, 1e-3, 3.0


@dataclass
class Routing:
    """What a routing model carries beside its variables.

    data: sets and data; count: replicas granted to each pool, numbers or expressions (n_pools,); total: what the
    fractions of a class sum to; estimate: judge loads by the step-mean estimate, else by (1) alone; best: best split
    so far, shape (n_classes, n_pools), rows summing to 1, and `merit` its objective; bound: what the first program
    proved; cuts: tangents of the estimate at `best`; radius: how far a fraction may move from `best`; alone: load of
    a pool by one request/s of each class alone (n_classes,), for pools that had to be asked.
    """

    data: RoutingData
    count: Any
    total: Any = 1.0
    estimate: bool = True
    best: Floats | None = None
    merit: float = np.nan
    bound: float = np.nan
    cuts: list[Row] = field(default_factory=list)
    radius: float = START
    alone: dict[int, Floats] = field(default_factory=dict)


def needs(scenario: Scenario, routing: Routing, fractions: Floats) -> Floats:
    """Replicas that each pool needs for a split of any scale, shape (n_pools,): the larger of (1) and the estimate."""
    flow = routing.data.rates[:, None] * fractions
    least = np.array([(flow[:, j] @ limit.seconds).max() for j, limit in enumerate(routing.data.limits)])
    if not routing.estimate:
        return least
    classes = scenario.workload.classes
    felt = [p.replicas * estimated_load(p, classes, flow[:, j]) for j, p in enumerate(scenario.pools)]
    return np.asarray(np.maximum(least, felt))


def consider(routing: Routing, fractions: Floats, merit: float, solve: Solve) -> bool:
    """Keep the split if it is the best so far, and adapt the radius; return whether it was kept.

    A step that achieves more than half of what the program hoped for doubles the radius, one that achieves nothing
    divides it by three. Without the estimate every program is a relaxation, so that the latest bound holds.
    """
    sign = 1.0 if solve.sense == "max" else -1.0
    if routing.best is None or not routing.estimate:
        routing.bound = solve.bound
    gained, hoped = sign * (merit - routing.merit), sign * (solve.objective - routing.merit)
    if gained <= 0:
        routing.radius /= SHRINK
        return False
    routing.radius = min(2 * routing.radius, 1.0) if gained > hoped / 2 else routing.radius
    routing.best, routing.merit = fractions, merit
    return True


def advance(
    scenario: Scenario, routing: Routing, fractions: Floats, merit: float, solve: Solve, accuracy: float
) -> bool:
    """Take in the solution of a round; return whether another round may gain more than `accuracy` (relative)."""
    kept = consider(routing, fractions, merit, solve)
    left = solve.objective - routing.merit if solve.sense == "max" else routing.merit - solve.objective
    if left <= accuracy * abs(routing.merit) or (routing.estimate and routing.radius < SMALLEST):
        return False
    if kept and routing.estimate:
        routing.cuts = tangents(scenario, routing, fractions)
    return True


def tangents(scenario: Scenario, routing: Routing, fractions: Floats) -> list[Row]:
    """Tangents of the estimate at a split, one row for each pool.

    With rho_j(y) the estimated load at class rates y_c = lambda_c x_cj, homogeneous of degree 1,
    sum_c lambda_c x_cj n_j d rho_j / d y_c <= replicas granted; a pool without requests has no tangent, and counts
    each class as if it were alone.                                                                               (9)
    """
    rows = []
    for j, pool in enumerate(scenario.pools):
        flow = routing.data.rates * fractions[:, j]
        slope = load_gradient(pool, scenario.workload.classes, flow) if flow.any() else _alone(scenario, routing, j)
        rows.append(Row(j, (pool.name,), pool.replicas * np.maximum(slope, 0.0)))
    return rows


def _alone(scenario: Scenario, routing: Routing, j: int) -> Floats:
    if j not in routing.alone:
        pool, classes = scenario.pools[j], scenario.workload.classes
        ones = np.diag(routing.data.allowed[:, j].astype(float))
        routing.alone[j] = np.array([estimated_load(pool, classes, one) for one in ones])
    return routing.alone[j]
