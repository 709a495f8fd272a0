"""Capacity of one replica: the step-mean estimate of its critical rate, for verdicts and for cuts in programs.

The rows (1) of `llmopt.stability` bound the critical rate from outside; they would be tight if all steps were alike
and every budget were used to the last token. The estimate follows the saturated replica instead: what a blocked head
leaves unused, what preemption repeats and throws away, how the step time varies with the prefill of a step. See
`llmopt.saturation` (balances), `llmopt.walk` (steps), `llmopt.waves` (lockstep) and docs/stability.md, where the
study stands that the error below was taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.mix import Mix, blend
from llmopt.moments import Engine, moments
from llmopt.saturation import Saturation, saturate
from llmopt.scenario import Pool
from llmopt.stability import occupancy, outer_rate
from llmopt.waves import locked_rate, unstable_modes
from llmopt.workload import RequestClass

ERROR = 0.015
"""Half-width where requests are small against memory: 95 % of the 200 draws of benchmarks/capacity_study.py lie in."""
ERROR_LARGE = 0.2
"""Added per share of the KV memory that the largest request takes: the walk knows the running set by its mean only."""
ERROR_OVER = 0.5
"""Added per share of the step time that goes to over-admitted requests, a cruder part of the walk."""
ERROR_WAVES = 0.05
"""Added where waves grow but cost no memory (recompute, swap): prefill then comes in bursts."""


@dataclass(frozen=True)
class Capacity:
    """What one replica can serve at one class mix.

    rate: estimated critical rate, requests/s over all classes (the verdict's number); outer: bound (1), requests/s;
    piece, resource: what binds; step_time: mean step time at saturation, s; error: relative half-width of `rate`;
    caveats: sentences on what the number does not cover; locked: requests/s once requests run in lockstep, or None
    where they do not (then `rate` is not the middle between two regimes).
    """

    rate: float
    outer: float
    piece: str
    resource: str
    step_time: float
    error: float
    caveats: tuple[str, ...]
    locked: float | None = None


def replica_capacity(pool: Pool, classes: Sequence[RequestClass], mix: Floats, seed: int = 0) -> Capacity:
    """Estimate for one replica of `pool` when class c makes up `mix[c] / sum(mix)` of the requests.

    Deterministic; `seed` shuffles the sample that the fluctuations are taken from. A class that does not fit into a
    replica makes the capacity 0.

    Raises
    ------
    ValueError
        If the mix has a negative entry or no positive one.
    """
    weights = np.asarray(mix, dtype=float)
    if not (weights >= 0).all() or weights.sum() <= 0:
        raise ValueError(f"mix = {weights.tolist()} has no shares; give non-negative weights, one of them positive")
    shares = weights / weights.sum()
    outer = outer_rate(pool, classes, shares)
    unfit = [c.name for c, x in zip(classes, shares, strict=True) if x > 0 and not pool.fits(c.largest)]
    if unfit:
        why = f"Requests of class {unfit[0]!r} can exceed the KV memory of a replica."
        return Capacity(0.0, outer, "", "kv", 0.0, 0.0, (why,))
    blended = blend(pool, classes, shares, seed)
    saturation = saturate(blended)
    largest = max(c.largest for c, x in zip(classes, shares, strict=True) if x > 0)
    return _judged(blended, saturation, outer, largest)


def estimated_load(pool: Pool, classes: Sequence[RequestClass], rates: Floats) -> float:
    """Total rate over the estimated capacity of the whole pool at that mix; homogeneous of degree 1 in `rates`.

    0.0 for zero rates, inf if a class with a positive rate does not fit.
    """
    rates = np.asarray(rates, dtype=float)
    total = float(rates.sum())
    if total <= 0:
        return 0.0
    rate = replica_capacity(pool, classes, rates).rate
    return total / (pool.replicas * rate) if rate > 0 else float("inf")


def load_gradient(pool: Pool, classes: Sequence[RequestClass], rates: Floats) -> Floats:
    """Gradient of `estimated_load` in the class rates, shape (n_classes,), in load per request/s.

    By the envelope theorem each step counts for the piece that is largest in it, and each budget for the weight with
    which it limits the rate; how preemption and blocking change with the mix is left out. `gradient @ rates` is the
    load itself (it is homogeneous of degree 1), so `gradient @ other` is the tangent at `rates`. Zero rates give 0.
    """
    rates = np.asarray(rates, dtype=float)
    load = estimated_load(pool, classes, rates)
    if not 0 < load < float("inf"):
        return np.zeros(len(rates))
    blended = blend(pool, classes, rates / float(rates.sum()), 0)
    saturation = saturate(blended)
    m = moments(Engine.of(pool), classes)
    used = occupancy(m)
    steps = (used / (rates @ used) * saturation.balance.weights).sum(axis=1)
    parts = np.column_stack([x / (rates @ x) if x.any() else x for x in (m.prompt, m.decode, m.read, m.pairs)])
    slopes = np.column_stack([steps, parts]) @ saturation.seconds
    return np.asarray(slopes * load / float(slopes @ rates))


def _middle(mix: Mix, saturation: Saturation) -> tuple[float, float | None, int]:
    """Capacity, capacity in lockstep if that can happen, and the number of growing waves.

    Where waves cost memory the system has two regimes and its history decides: the middle of both is returned.
    """
    modes = unstable_modes(mix) if saturation.resource == "kv" and mix.pool.preemption != "reserve" else 0
    if not modes or mix.pool.preemption in ("recompute", "swap"):
        return saturation.rate, None, modes
    locked = min(locked_rate(mix), saturation.rate)
    return (saturation.rate + locked) / 2, locked, modes


def _judged(mix: Mix, saturation: Saturation, outer: float, largest: int) -> Capacity:
    rate, locked, modes = _middle(mix, saturation)
    share = largest / (mix.pool.kv_blocks * mix.pool.block_size)
    error = ERROR + ERROR_LARGE * share * saturation.balance.memory + ERROR_OVER * min(saturation.over, 1.0)
    if modes:
        error += ERROR_WAVES if locked is None else (saturation.rate - locked) / 2 / rate
    return Capacity(
        rate=float(min(rate, outer)),
        outer=outer,
        piece=mix.pool.stepper.names[saturation.piece],
        resource=saturation.resource,
        step_time=saturation.step_time,
        error=float(error),
        caveats=tuple(_caveats(mix, saturation, locked, modes, share)),
        locked=locked,
    )


SAME = 0.005
"""Rates that differ by less are not worth a caveat."""


def _caveats(mix: Mix, saturation: Saturation, locked: float | None, modes: int, share: float) -> list[str]:
    mode, said = mix.pool.preemption, []
    if locked is not None and locked < saturation.rate * (1 - SAME):
        said.append(
            f"Lengths vary too little to keep requests apart under {mode}, so they can fall into step after a burst; "
            f"then a replica serves only {locked:.4g} requests/s, not {saturation.rate:.4g}; the bound "
            f"mu (1 - delta) does not hold here, and the estimate is the middle of the two."
        )
    elif modes:
        said.append(f"Under {mode} requests tend to start and end in waves, so prefill comes in bursts.")
    if share * saturation.balance.memory > 0.1:
        said.append(
            f"The largest request takes {share:.0%} of the KV memory, so what fits beside it is a "
            f"matter of luck and the estimate is rougher."
        )
    if saturation.resource != "tokens" and saturation.crowded > 0.25:
        said.append(
            f"Prefill fills the token budget in {saturation.crowded:.0%} of the steps, so memory and "
            f"slots are refilled late."
        )
    if saturation.over > 0.02:
        said.append(
            f"Prompts of several chunks are admitted against memory that others still have to fill; "
            f"about {saturation.over:.0%} of the time goes to prefill that is thrown away, and the estimate is rougher."
        )
    return said
