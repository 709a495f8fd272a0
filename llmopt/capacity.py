"""Capacity of one replica: the step-mean estimate of its critical rate, for verdicts and for cuts in programs.

The rows (1) of `llmopt.stability` bound the critical rate from outside; they would be tight if all steps were alike.
The estimate averages the step time over the random prefill content of a step at saturation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.lengths import Floats, Ints
from llmopt.moments import Engine, Moments, moments
from llmopt.scenario import Pool
from llmopt.stability import caps, occupancy, pool_rows
from llmopt.workload import RequestClass

STEPS = 4096


@dataclass(frozen=True)
class Capacity:
    """What one replica can serve at one class mix.

    rate: estimated critical rate, requests/s over all classes; outer: bound (1), requests/s; piece, resource: what
    binds; step_time: mean step time at saturation, s; error: relative half-width of the estimate; caveats: what the
    number does not cover, in sentences.
    """

    rate: float
    outer: float
    piece: str
    resource: str
    step_time: float
    error: float
    caveats: tuple[str, ...]


def replica_capacity(pool: Pool, classes: Sequence[RequestClass], mix: Floats, seed: int = 0) -> Capacity:
    """Estimate of the critical rate of one replica of `pool` when class c makes up `mix[c] / sum(mix)` of requests.

    Deterministic for a given `seed`, which only moves the sampled prefill content of the steps.
    """
    shares = np.asarray(mix, dtype=float) / float(np.sum(mix))
    m = moments(Engine.of(pool), classes)
    rows = pool_rows(pool, m)
    loads = shares @ rows.seconds
    binding = int(loads.argmax())
    per_step = float((rows.caps / (shares @ occupancy(m))).min())
    step = _mean_step(pool, classes, shares, m, per_step, seed)
    return Capacity(
        rate=per_step / step,
        outer=1.0 / float(loads.max()),
        piece=rows.pieces[binding],
        resource=rows.resources[binding],
        step_time=step,
        error=0.05,
        caveats=(),
    )


def estimated_load(pool: Pool, classes: Sequence[RequestClass], rates: Floats) -> float:
    """Total rate over the estimated capacity of the whole pool at that mix; homogeneous of degree 1 in `rates`."""
    total = float(np.sum(rates))
    if total <= 0:
        return 0.0
    return total / (pool.replicas * replica_capacity(pool, classes, rates).rate)


def load_gradient(pool: Pool, classes: Sequence[RequestClass], rates: Floats) -> Floats:
    """Gradient of `estimated_load` in the class rates by forward differences, shape (n_classes,), s per request.

    `estimated_load` is homogeneous of degree 1, so `gradient @ rates` is the load itself and the tangent at `rates`
    is `gradient @ new_rates`.
    """
    rates = np.asarray(rates, dtype=float)
    load, step = estimated_load(pool, classes, rates), 0.02 * float(rates.sum())
    bumped = rates + step * np.eye(len(rates))
    slopes = np.array([(estimated_load(pool, classes, row) - load) / step for row in bumped])
    euler = float(slopes @ rates)
    return slopes * (load / euler) if euler > 0 else slopes


def _mean_step(
    pool: Pool, classes: Sequence[RequestClass], shares: Floats, m: Moments, per_step: float, seed: int
) -> float:
    """Mean step time when `per_step` requests are admitted per step, prefill served from what decode leaves."""
    rng = np.random.default_rng(seed)
    decode, read = per_step * float(shares @ m.decode), per_step * float(shares @ m.read)
    counts = rng.poisson(per_step * shares, (STEPS, len(shares)))
    sizes = [cls.sample(rng, int(counts[:, c].sum()))[0] for c, cls in enumerate(classes)]
    drawn = [(x.astype(float), counts[:, c]) for c, x in enumerate(sizes)]
    tokens = np.sum([_per_step(x, n) for x, n in drawn], axis=0)
    pairs = float(sum((x**2 / 2).sum() for x, _ in drawn))
    room = float(caps(pool)[2]) - decode
    net = np.cumsum(tokens - room)
    left = net - np.minimum(np.minimum.accumulate(net), 0.0)
    served = tokens - np.diff(left, prepend=0.0)
    ratio = pairs / max(float(tokens.sum()), 1.0)
    features = np.column_stack([served, np.full((STEPS, 2), (decode, read)), served * ratio])
    return float(pool.stepper.many(features).mean())


def _per_step(x: Floats, counts: Ints) -> Floats:
    """Sums of consecutive groups of `counts` entries of `x`."""
    ends = np.cumsum(counts)
    total = np.concatenate([[0.0], np.cumsum(x)])
    return np.asarray(total[ends] - total[ends - counts])
