"""A certified lower bound, in seconds, on the mean latency of every batching rule; derived in docs/batching_bound.md.

Rules may admit, order, mix and preempt as they like and may know the future; they cannot leave the engine: its step
time, its caps, one replica per request. Two arguments are tried, and the better one counts: *order* (a single machine
that preempts at no cost serves what the requests cost) and *price* (replica time has a price, at which every request
chooses how fast it runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Literal

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.latency_work import PoolWork, Share
from llmopt.scenario import Pool

Argument = Literal["alone", "order", "price", "none"]
ROUNDING = 1e-9
SPLITS = 10
MIXES = (0.5, 0.1)
SCALES = (0.3, 0.6, 0.85, 0.95, 1.05, 1.2, 1.6, 3.0)
SWEEPS = 2
HINT = 1e-3
TAILS = 12
BLOCKS = 64
SWEEPS_OF_BLOCKS = 4
LEVELS = np.exp2(np.arange(-16, 9) / 2)


@dataclass(frozen=True)
class LatencyBound:
    """No batching rule has a smaller latency, from arrival to last token.

    mean, total: s, over the `requests`; NaN if there is no bound, for which `reason` gives the cause. argument: what
    proves it; shares: how each pool's step time was charged to requests; counted: requests that the argument says
    more about than how long they take alone.
    """

    mean: float
    total: float
    requests: int
    argument: Argument
    shares: tuple[str, ...] = ()
    counted: int = 0
    reason: str = ""


def latency_bound(
    pools: Sequence[Pool], arrival: Floats, prompt: Ints, output: Ints, *, preemptive: bool = True
) -> LatencyBound:
    """Bound the latency of every batching rule, and of every routing, for requests on `pools`.

    Parameters
    ----------
    pools
        Pools with max-affine step times; each request runs on any one replica that can hold it.
    arrival, prompt, output
        Arrival times (s, ascending) and lengths (tokens, at least 1), shape (n,).
    preemptive
        False for a bound, often a higher one, on rules that let no request lose its cache once it is admitted.

    Raises
    ------
    ScenarioError
        For requests out of order, malformed, or too large for every replica.
    """
    arrival, prompt, output = np.asarray(arrival, dtype=float), np.asarray(prompt), np.asarray(output)
    _check(pools, arrival, prompt, output)
    n = len(arrival)
    tables = [pool.name for pool in pools if pool.table is not None]
    if tables:
        why = f"pool {tables[0]!r} plays a measured table, which its fitted step_time does not bound from below"
        return LatencyBound(float("nan"), float("nan"), n, "none", reason=why)
    if n == 0:
        return LatencyBound(0.0, 0.0, 0, "alone")
    tick = _tick(pools, arrival)
    load = _Load(tuple(PoolWork(pool, prompt, output, tick > 0, preemptive) for pool in pools), arrival)
    alone = LatencyBound(0.0, float(load.alone.sum()), n, "alone")
    best = max((alone, _order(load, tick), _price(load)), key=lambda bound: bound.total)
    total = best.total * (1 - ROUNDING)
    return replace(best, mean=total / n, total=total)


def _check(pools: Sequence[Pool], arrival: Floats, prompt: Ints, output: Ints) -> None:
    if not pools:
        raise ScenarioError("latency_bound: there is no pool; give at least one")
    if not arrival.shape == prompt.shape == output.shape == (len(arrival),):
        raise ScenarioError("latency_bound: arrival, prompt and output differ in shape; give one of each per request")
    if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any():
        raise ScenarioError("latency_bound: arrivals must be finite and in ascending order; sort the requests")
    if len(arrival) and min(prompt.min(), output.min()) < 1:
        raise ScenarioError("latency_bound: every prompt and output needs at least 1 token; drop empty requests")
    room = max(pool.largest for pool in pools)
    if len(arrival) and (prompt + output).max() > room:
        i = int(np.argmax(prompt + output))
        raise ScenarioError(
            f"latency_bound: request {i} needs {prompt[i] + output[i]} tokens and can never fit into a replica, which "
            f"holds at most {room}; drop it or raise kv_capacity"
        )


def _tick(pools: Sequence[Pool], arrival: Floats) -> float:
    """The duration of every step, if it is always the same and all arrivals are multiples of it; else 0.

    Then some best schedule starts steps at multiples only: each may start as soon as those before it have ended.
    """
    bases = {float(pool.stepper.coefficients[:, 0].max()) for pool in pools}
    tick = bases.pop()
    whole = not bases and tick > 0 and not any(pool.stepper.coefficients[:, 1:].any() for pool in pools)
    return tick if whole and np.array_equal(np.round(arrival / tick) * tick, arrival) else 0.0


@dataclass(frozen=True, eq=False)
class _Load:
    """What the requests that arrive at `arrival` cost on each pool."""

    works: tuple[PoolWork, ...]
    arrival: Floats

    @property
    def alone(self) -> Floats:
        """e_i: least latency of each request on an empty replica, s, shape (n,).                               (L1)"""
        return self.cheapest([work.solo for work in self.works])

    def cheapest(self, values: Sequence[Floats]) -> Floats:
        """The least value of each request over the pools that can hold it, shape (n,)."""
        kept = [np.where(w.fits, v, np.inf) for w, v in zip(self.works, values, strict=True)]
        return np.asarray(np.minimum.reduce(kept))

    def speed(self, scale: Floats) -> float:
        """Seconds of work per second of all replicas, those of pool p counting `scale[p]` each."""
        return float(sum(w.pool.replicas * s for w, s in zip(self.works, scale.tolist(), strict=True)))

    def rows(self, shares: Sequence[Share], scale: Floats) -> tuple[Floats, Floats]:
        """Work and lag (L3) of each request on the pool that is most favourable for it, shapes (n,)."""
        rows = [work.row(share) for work, share in zip(self.works, shares, strict=True)]
        w = self.cheapest([row[0] * s for row, s in zip(rows, scale.tolist(), strict=True)])
        return w, self.cheapest([row[1] for row in rows])

    def names(self, shares: Sequence[Share]) -> tuple[str, ...]:
        """The shares, for people."""
        return tuple(share.name(work.pool) for share, work in zip(shares, self.works, strict=True))


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A share and a scale for each pool, and the value that they reach."""

    shares: tuple[Share, ...]
    scale: Floats
    value: float = -np.inf


def _pieces(count: int) -> Iterator[Floats]:
    """Weights of pieces: each alone, and mixtures of two."""
    yield from np.eye(count)
    for a, b in combinations(np.eye(count), 2):
        for mix in MIXES:
            yield mix * a + (1 - mix) * b
            yield mix * b + (1 - mix) * a


def _tuned(load: _Load, of_base: Floats, scale: Floats, value: Callable[[tuple[Share, ...], Floats], float]) -> _Chosen:
    """Climb from `scale` and the shares by equal pieces: one pool's share at a time, or what its replicas count."""
    options = [[Share(p, r) for p in _pieces(len(w.base)) for r in of_base] for w in load.works]
    best = _Chosen(_even(load, of_base[0]), scale)
    best = replace(best, value=value(best.shares, best.scale))
    for _ in range(SWEEPS):
        before = best.value
        for p, choices in enumerate(options):
            tries = [((*best.shares[:p], share, *best.shares[p + 1 :]), best.scale) for share in choices]
            best = _better(best, tries, value)
            scales = [np.where(np.arange(len(options)) == p, best.scale * f, best.scale) for f in SCALES if p]
            best = _better(best, [(best.shares, scale) for scale in scales], value)
        if best.value <= before * (1 + 1e-6):
            break
    return best


def _even(load: _Load, of_base: Floats) -> tuple[Share, ...]:
    """Shares in which all pieces count the same."""
    return tuple(Share(np.full(len(w.base), 1 / len(w.base)), of_base) for w in load.works)


def _equal_load(load: _Load) -> Floats:
    """What a replica of each pool counts so that the requests that fit everywhere cost the same on all, (n_pools,)."""
    everywhere = np.logical_and.reduce([work.fits for work in load.works])
    rows = [w.row(share)[0] for w, share in _zip(load, _even(load, np.array([0.25, 0.5, 0.25, 0.0])))]
    sums = [float(row[everywhere].sum()) for row in rows]
    return np.array([sums[0] / x if min(x, sums[0]) > 0 else 1.0 for x in sums])


def _zip(load: _Load, shares: Sequence[Share]) -> Iterator[tuple[PoolWork, Share]]:
    return zip(load.works, shares, strict=True)


def _better(
    best: _Chosen,
    tries: Sequence[tuple[tuple[Share, ...], Floats]],
    value: Callable[[tuple[Share, ...], Floats], float],
) -> _Chosen:
    return max(
        [best, *(_Chosen(shares, scale, value(shares, scale)) for shares, scale in tries)], key=lambda c: c.value
    )


def _order(load: _Load, tick: float) -> LatencyBound:
    """The best bound (L4) over shares by memory, batch slots and tokens."""

    def value(shares: tuple[Share, ...], scale: Floats) -> float:
        # where nothing binds yet the longer time to serve everything leads on
        span = float(load.rows(shares, scale)[0].sum()) / load.speed(scale)
        return _served(load, shares, scale, tick)[0] + HINT * span

    best = _tuned(load, np.eye(4)[:3], _equal_load(load), value)
    total, counted = _served(load, best.shares, best.scale, tick)
    return LatencyBound(0.0, total, len(load.arrival), "order", load.names(best.shares), counted)


def _served(load: _Load, shares: Sequence[Share], scale: Floats, tick: float) -> tuple[float, int]:
    """The bound (L4) and how many requests are in its set S, the best of those that arise when the quick leave S."""
    w, lag = load.rows(shares, scale)
    alone, inside = load.alone, np.ones(len(w), dtype=bool)
    best = (float(alone.sum()), 0)
    for _ in range(SPLITS):
        latency = _mean_busy(load.arrival[inside], w[inside], load.speed(scale), tick) + lag[inside]
        best = max(best, (float(latency.sum() + alone[~inside].sum()), int(inside.sum())))
        stays = latency >= alone[inside]
        inside[inside] = stays
        if stays.all() or not inside.any():
            break
    return best


def _mean_busy(arrival: Floats, work: Floats, speed: float, tick: float) -> Floats:
    from llmopt.latency_kernel import mean_busy

    order = np.argsort(work, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return np.asarray(mean_busy(arrival, work, rank, order, speed, tick))


def _price(load: _Load) -> LatencyBound:
    """The best bound (L6) over shares, prices and the times at which they hold."""
    alone, arrival = load.alone, load.arrival
    tails = float(np.median(alone)) * np.exp2(np.arange(TAILS))
    state = {"price": 1.0, "tail": float(tails[0])}

    def level(shares: tuple[Share, ...], scale: Floats, price: float) -> Floats:
        return load.cheapest([w.priced(s, price * f) for (w, s), f in zip(_zip(load, shares), scale, strict=True)])

    def flat(shares: tuple[Share, ...], scale: Floats, price: float, tail: float) -> float:
        end = float(arrival[-1]) + tail
        gain = np.maximum(alone, np.minimum(level(shares, scale, price), end - arrival))
        return float(gain.sum()) - price * load.speed(scale) * (end - float(arrival[0]))

    def value(shares: tuple[Share, ...], scale: Floats) -> float:
        tried = [(flat(shares, scale, state["price"] * f, state["tail"]), f) for f in (0.5, 1.0, 2.0)]
        return max(tried)[0]

    rest = np.array([[0.0, 0, 0, 1], [0.5, 0, 0, 0.5], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5]])
    even = _even(load, rest[0])
    chosen = []
    for scale in _fastest(load):
        _, state["price"], state["tail"] = _peak(partial(flat, even, scale), tails, len(alone))
        best = _tuned(load, rest, scale, value)
        chosen.append((*_peak(partial(flat, best.shares, best.scale), tails, len(alone)), best))
    _, price, tail, best = max(chosen, key=lambda found: found[0])
    phi = np.stack([alone, *(level(best.shares, best.scale, price * f) for f in LEVELS)])
    prices = np.concatenate([[0.0], price * LEVELS])
    total, counted = _in_blocks(load, best, phi, prices, tail)
    return LatencyBound(0.0, total, len(alone), "price", load.names(best.shares), counted)


def _fastest(load: _Load) -> Iterator[Floats]:
    """What replicas count if only those of the fastest pools do, for any number of pools; shape (n_pools,) each.

    Time of slow replicas that nobody needs is free; who runs there takes as long as alone there at least.
    """
    means = np.array([float(w.solo[w.fits].mean()) if w.fits.any() else np.inf for w in load.works])
    for slowest in np.sort(means):
        yield np.where(means <= slowest, _equal_load(load), 0.0)


def _peak(flat: Callable[[float, float], float], tails: Floats, largest: float) -> tuple[float, float, float]:
    """The best value over prices in [1/100, largest] and tails, with its price and tail."""
    prices = np.geomspace(0.01, max(largest, 1.0), 24)
    _, price, _ = max((flat(p, t), p, t) for p in prices.tolist() for t in tails[::3].tolist())
    fine = [price * f for f in (0.75, 0.85, 1.0, 1.15, 1.3)]
    return max((flat(p, t), p, t) for p in fine for t in tails.tolist())


def _in_blocks(load: _Load, chosen: _Chosen, phi: Floats, prices: Floats, tail: float) -> tuple[float, int]:
    """Raise (L6) block by block, the blocks halved whenever nothing gains any more."""
    from llmopt.latency_kernel import Priced, climb, least_costs

    cost = prices * load.speed(chosen.scale)
    priced = Priced(load.arrival, phi, load.rows(chosen.shares, chosen.scale)[0], prices, cost)
    level = np.full(1, 1 + int(np.flatnonzero(LEVELS == 1.0)[0]))
    first, last = float(load.arrival[0]), float(load.arrival[-1]) + tail
    while len(level) < BLOCKS:
        level = np.repeat(level, 4)
        start = np.linspace(first, last, len(level) + 1)
        climb(priced, start, level, SWEEPS_OF_BLOCKS)
    least = least_costs(priced, start, level)
    return float(least.sum() - (priced.cost[level] * np.diff(start)).sum()), int((least > phi[0]).sum())
