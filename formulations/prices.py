"""What a routing plan tells besides its fractions: critical rates, loads, what binds, and duals read as prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from formulations.data import RoutingData, Row
from formulations.search import Routing, needs
from llmopt.arrays import Floats
from llmopt.capacity import estimated_load, replica_capacity
from llmopt.plan import Plan, split_router
from llmopt.scenario import Pool, Scenario
from llmopt.solution import Solve
from llmopt.stability import CAPS

RESOURCE_UNITS = {"kv": ("kv_1000_tokens", 1000.0), "batch": ("batch_slot", 1.0), "tokens": ("budget_token", 1.0)}
_STEP = 0.05
_TINY = 1e-300
_PRICED = 1e-9


def split_plan(name: str, scenario: Scenario, routing: Routing, **figures: Any) -> Plan:
    """The best split, kept as exactly as whole requests allow; inside a pool least 4 x waiting + running.

    That is the score of vLLM's data-parallel load balancer; unlike outstanding tokens it needs no output lengths.
    """
    assert routing.best is not None
    router = split_router(scenario, routing.best, spread="cyclic", waiting=4.0, running=1.0)
    return Plan(name, router, figures={**split_figures(scenario, routing), **figures})


def split_figures(scenario: Scenario, routing: Routing) -> dict[str, Any]:
    """Figures of the best split, JSON-ready.

    critical_rate: total arrival rate (requests/s, all classes scaled together) that the split can carry by the
    step-mean estimate; outer_rate: by the rows (1), above which it is unstable for certain; load: estimated load of
    each pool at the scenario's rates; fractions: of each class over the pools.
    """
    assert routing.best is not None
    pools, replicas, total = routing.data.pools, routing.data.replicas, scenario.workload.total_rate
    felt, outer = (needs(scenario, replace(routing, estimate=flag), routing.best) / replicas for flag in (True, False))
    return {
        "critical_rate": total / max(float(felt.max()), _TINY),
        "outer_rate": total / max(float(outer.max()), _TINY),
        "load": dict(zip(pools, felt.tolist(), strict=True)),
        "fractions": {
            cls: dict(zip(pools, row.tolist(), strict=True))
            for cls, row in zip(routing.data.classes, routing.best + 0.0, strict=True)
        },
    }


def binding_rows(scenario: Scenario, routing: Routing, duals: Mapping[str, Any]) -> list[dict[str, str]]:
    """Pools whose limit carries a price, each with the piece and the resource that bind, by (1) or by the estimate."""
    keys = [row.key for row in routing.data.rows if abs(_dual(row, duals)) > _PRICED]
    for cut in routing.cuts:
        mix = routing.data.rates * np.asarray(routing.best)[:, cut.pool]
        if abs(_dual(cut, duals)) > _PRICED and mix.any():
            felt = replica_capacity(scenario.pools[cut.pool], scenario.workload.classes, mix)
            keys.append((*cut.key, felt.piece, felt.resource))
    return [dict(zip(("pool", "piece", "resource"), key, strict=True)) for key in dict.fromkeys(keys)]


def resource_prices(
    scenario: Scenario, routing: Routing, record: Solve, fractions: Floats, replica: Floats, scale: float = 1.0
) -> dict[str, dict[str, float]]:
    """Improvement of the objective by one more unit of each resource of each pool, everything else held.

    By the envelope theorem a unit of cap_R is worth the duals of the pool's rows times the replica-seconds it saves:
    lambda_c x_cj a_ij u_Rjc / cap_R^2 on a row of R, a finite difference of the estimate on a cut. Chunk sizes are held
    when the token budget grows.

    Parameters
    ----------
    fractions
        As in the program, shape (n_classes, n_pools), scaled by the margin if the program scales them.
    replica
        d(objective) / d(n_j) in the program's sense, shape (n_pools,).
    scale
        Factor from the program's objective to the unit of the prices.
    """
    better = scale if record.sense == "max" else -scale
    prices = {}
    for j, name in enumerate(routing.data.pools):
        flow = routing.data.rates * fractions[:, j]
        units = {label: 0.0 for label, _ in RESOURCE_UNITS.values()}
        for row in (*routing.data.rows, *routing.cuts):
            dual = _dual(row, record.duals) if row.pool == j else 0.0
            for label, saved in (_savings(scenario, routing.data, row, flow) if dual else {}).items():
                units[label] += better * dual * saved
        prices[name] = {"replica": better * float(replica[j]) + 0.0, **{k: v + 0.0 for k, v in units.items()}}
    return prices


def pool_duals(routing: Routing, duals: Mapping[str, Any]) -> Floats:
    """Sum of the duals of the stability and estimate rows of each pool, shape (n_pools,)."""
    total = np.zeros(len(routing.data.pools))
    for row in (*routing.data.rows, *routing.cuts):
        total[row.pool] += _dual(row, duals)
    return total


def _dual(row: Row, duals: Mapping[str, Any]) -> float:
    block = "estimate" if row.column is None else "stability"
    return float(duals.get(f"{block}[{','.join(row.key)}]", 0.0))


def _savings(scenario: Scenario, data: RoutingData, row: Row, flow: Floats) -> dict[str, float]:
    """Replica-seconds per second that one more unit of each resource takes off a row."""
    if row.column is None:
        pool = scenario.pools[row.pool]
        return {
            label: unit * _estimate_slope(scenario, pool, kind, flow) for kind, (label, unit) in RESOURCE_UNITS.items()
        }
    limit = data.limits[row.pool]
    kinds = len(limit.caps)
    waiting = row.seconds - limit.work[:, row.column // kinds]
    label, unit = RESOURCE_UNITS[limit.resources[row.column]]
    return {label: unit * float(flow @ waiting) / float(limit.caps[row.column % kinds])}


def _estimate_slope(scenario: Scenario, pool: Pool, kind: str, flow: Floats) -> float:
    """- n_j d(rho_j) / d(cap) of the step-mean estimate, by a forward difference of 5 percent.

    The estimate is sampled: a slope below its noise can come out negative, which would say that memory does harm.
    """
    base = getattr(pool, CAPS[kind])
    whole = pool.block_size if kind == "kv" else 1
    step = whole * max(round(_STEP * base / whole), 1)
    held = {"prefill_chunk": pool.chunk}
    now, more = pool.model_copy(update=held), pool.model_copy(update={**held, CAPS[kind]: base + step})
    classes = scenario.workload.classes
    saved = estimated_load(now, classes, flow) - estimated_load(more, classes, flow)
    return float(pool.replicas * max(saved, 0.0) / step)
