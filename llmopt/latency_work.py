"""What each request costs a pool at least, step by step: the numbers behind `llmopt.latency_bound`.

After its prefill a request emits one token per step, and such a step depends on the request only through the context
c it reads. All sums over these steps are differences of sums over c = 0, 1, ..., made once for all requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Bools, Floats, Ints
from llmopt.moments import Engine, prefill_area
from llmopt.scenario import Pool
from llmopt.stability import RESOURCES, caps


class Share(NamedTuple):
    """How the time of a step is shared among its requests: a convex combination of rows.

    pieces (n_pieces,): weights of the pieces of the step time, summing to 1; of_base (4,): weights, summing to 1, by
    which the seconds per step are shared: by KV memory, batch slots, tokens, and by work (`elastic`, which depends on
    how long the step takes).
    """

    pieces: Floats
    of_base: Floats

    def name(self, pool: Pool) -> str:
        """The pieces and resources with a weight, for people."""
        pieces = [n for n, w in zip(pool.stepper.names, self.pieces, strict=True) if w > 0]
        resources = [n for n, w in zip((*RESOURCES, "work"), self.of_base, strict=True) if w > 0]
        return f"{pool.name}: {' + '.join(pieces)} by {' + '.join(resources)}"


class _Phase(NamedTuple):
    """Steps of one way to make progress: arrays of shape (n,), for contexts or for the prefills of requests.

    steps: how many; least: s that they take at least; work (n, n_pieces): s besides the base; used (n, 3): resources.
    """

    steps: Floats
    least: Floats
    work: Floats
    used: Floats


@dataclass(frozen=True, eq=False)
class PoolWork:
    """Requests of `prompt` and `output` tokens, shape (n,), on a replica of `pool`.

    grid: whether all steps take the same time and begin at its multiples; then work counts at the end of its step.
    preemptive: whether requests may lose their cache and be prefilled again.
    """

    pool: Pool
    prompt: Ints
    output: Ints
    grid: bool = False
    preemptive: bool = True
    base: Floats = field(init=False)
    fits: Bools = field(init=False)
    solo: Floats = field(init=False)
    _prefill: _Phase = field(init=False)
    _ways: tuple[_Phase, ...] = field(init=False)
    _hours: Floats = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "base", self.pool.stepper.coefficients[:, 0])
        put(self, "fits", self.prompt + self.output <= self.pool.largest)
        put(self, "_prefill", _prefills(self.pool, self.prompt))
        put(self, "_ways", _emissions(self.pool, int((self.prompt + self.output).max(initial=0)), self.preemptive))
        put(self, "_hours", _sums(np.minimum.reduce([way.least for way in self._ways])))
        put(self, "solo", self._prefill.least + self._over(self._hours))

    def _over(self, sums: Floats) -> Floats:
        """Sum over the steps after the prefill, from sums over contexts."""
        last = self.prompt + self.output - self.pool.first_step
        return np.asarray(sums[last] - sums[self.prompt])

    def row(self, share: Share) -> tuple[Floats, Floats]:
        """Replica seconds w and mean lag delta of each request, shapes (n,), under a share without elastic part.

        w_i = sum of theta_k (work_ik + a_k sum_R rho_R used_iR / cap_R) over its steps, and delta_i = the least time
        from the mean of the moments at which it gets them to its completion.                                  (L3)
        """
        y = np.minimum.reduce([self._seconds(way, share) for way in self._ways])
        ends = self._hours[1:] - np.minimum.reduce([self._own(way, share) for way in self._ways])
        decode = self._over(_sums(y))
        first = self._seconds(self._prefill, share)
        end = self._hours[self.prompt + self.output - self.pool.first_step]
        own = self._own(self._prefill, share)
        lag = end * decode - self._over(_sums(y * ends)) + first * (self._over(self._hours) + own)
        w = first + decode
        return w, np.where(w > 0, lag / np.where(w > 0, w, 1.0), 0.0)

    def _own(self, phase: _Phase, share: Share) -> Floats:
        """Least time from the mean of a phase's work to its end, however many steps it is cut into, shape (n,).

        Steps of works x_j take a + x_j at least, so that the part x of the work has its mean (x + a) / 2 before the
        end or earlier, and the part of the base a / 2.
        """
        if self.grid:
            return np.zeros(len(phase.steps))
        whole, x, a = self._seconds(phase, share), phase.work @ share.pieces, float(share.pieces @ self.base)
        moment = x * (x + a) / 2 + (whole - x) * a / 2
        return np.divide(moment, whole, out=np.zeros_like(whole), where=whole > 0)

    def priced(self, share: Share, price: float) -> Floats:
        """Phi_i(price): least seconds of its steps plus price x replica seconds, shape (n,).                   (L5)"""
        y = np.minimum.reduce([self._cost(way, share, price) for way in self._ways])
        return self._cost(self._prefill, share, price) + self._over(_sums(y))

    def _seconds(self, phase: _Phase, share: Share) -> Floats:
        weights = share.of_base[:3] / caps(self.pool) * (share.pieces @ self.base)
        return np.asarray(phase.work @ share.pieces + phase.used @ weights)

    def _cost(self, phase: _Phase, share: Share, price: float) -> Floats:
        """The least of T + price (q + g / (T - n a)) over T >= least, for n steps that take T together.

        q is the part of the share that does not depend on T. Of n steps with works x_j and times T_j, the sum of
        a x_j / (T_j - a) is at least a sum_j x_j / sum_j (T_j - a), so that several steps cost at least as much.
        """
        base = float(share.pieces @ self.base) * phase.steps
        g = float(share.of_base[3] * (share.pieces @ self.base)) * (phase.work @ share.pieces)
        over = np.maximum(phase.least - base, np.sqrt(price * g))
        elastic = np.divide(g, over, out=np.zeros_like(g), where=over > 0)
        return np.asarray(base + over + price * (self._seconds(phase, share) + elastic))


def _sums(values: Floats) -> Floats:
    """Sums of the first 0, 1, ..., n values, shape (n + 1,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _prefills(pool: Pool, prompt: Ints) -> _Phase:
    """The prefill of each request in as few steps as the token budget allows; other ways of cutting take no less.

    Rules that prefill whole prompts ignore the pool's `prefill_chunk`, so that it must be ignored here.
    """
    s = prompt.astype(float)
    pool = pool.model_copy(update={"prefill_chunk": None})
    steps = np.ceil(s / pool.chunk)
    work = _work(pool, np.column_stack([s, 0 * s, 0 * s, s * s / 2]))
    used = np.column_stack([prefill_area(Engine.of(pool), s) if len(s) else s, steps, s])
    return _Phase(steps, (steps[:, None] * pool.stepper.coefficients[:, 0] + work).max(axis=1), work, used)


def _emissions(pool: Pool, most: int, preemptive: bool) -> tuple[_Phase, ...]:
    """The ways to emit a token from a context of c = 0, 1, ..., most - 1 tokens.

    Besides the decode step, an engine that drops the cache of a preempted request may prefill its tokens again, and
    the last prefill step emits the next token: of c + 1 tokens, or of one if the others are found in a cache. That is
    cheap on pieces that do not charge for prefill, so that it must be allowed for, whatever the pool's own engine does:
    a rule may drop caches where the engine would not.
    """
    c = np.arange(most, dtype=float)
    blocks = np.ceil((c + 1 + pool.lookahead_slots) / pool.block_size) * pool.block_size
    zero, one = np.zeros(most), np.ones(most)
    decode = _phase(pool, np.column_stack([zero, one, c, zero]), np.column_stack([blocks, one, one]))
    if not preemptive or not pool.first_step:
        return (decode,)
    m = one if pool.prefix_caching else c + 1
    pairs = m * (c + 1 - m) + m * m / 2
    return decode, _phase(pool, np.column_stack([m, zero, zero, pairs]), np.column_stack([blocks, one, m]))


def _phase(pool: Pool, features: Floats, used: Floats) -> _Phase:
    """Single steps with these features and resources."""
    work = _work(pool, features)
    return _Phase(np.ones(len(work)), (pool.stepper.coefficients[:, 0] + work).max(axis=1), work, used)


def _work(pool: Pool, features: Floats) -> Floats:
    """Seconds besides the base on each piece, shape (n, n_pieces)."""
    return np.asarray(features @ pool.stepper.coefficients[:, 1:].T)
