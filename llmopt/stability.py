"""The stability polytope: which arrival rates and routings a cluster can possibly serve.

With class rates lambda_c and routing fractions x_cj, pool j of n_j replicas can be stable only if, for every piece i
of its step time and every capped resource R,

    sum_c lambda_c x_cj ( w_ijc + a_ij u_Rjc / cap_Rj )  <=  n_j                                              (1)

because a replica that completes X_c requests of class c per second makes at least sum_c X_c u_Rjc / cap_Rj steps per
second, each of which lasts at least a_ij plus its work on piece i. (1) holds for every policy, every preemption mode
and every arrival process that has a rate; it is an outer bound, and linear in rates, fractions and replica counts.
Special cases: Nie, Si & Zhou (2605.04595) mu = M / (b E[g]), one piece without work; Dai et al. (2504.07347), the
token row; Dong & Cao (2604.11001); the fluid equilibrium of Ao et al. (2504.11320), see `equilibrium`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.moments import Engine, Moments, moments
from llmopt.scenario import Pool, Scenario
from llmopt.workload import RequestClass

CAPS = {"kv": "kv_capacity", "batch": "max_batch", "tokens": "token_budget"}
"""Capped resources of a replica (KV tokens in whole blocks, sequences, tokens of a step) and the keys of their caps."""
RESOURCES = tuple(CAPS)


@dataclass(frozen=True)
class PoolRows:
    """The rows (1) of one pool.

    pieces, resources: names of each row, length n_rows = n_pieces x 3, piece by piece; seconds (n_classes, n_rows):
    replica-seconds that one request of a class costs on a row; work (n_classes, n_pieces): its pure work, s;
    base (n_pieces,): seconds per step; occupancy (n_classes, 3): resource-steps of one request; caps (3,).

    A TPOT requirement T adds rows in the same data, one per piece: `base / T + lam @ work / replicas <= 1`.
    """

    pool: str
    replicas: int
    pieces: tuple[str, ...]
    resources: tuple[str, ...]
    seconds: Floats
    work: Floats
    base: Floats
    occupancy: Floats
    caps: Floats

    def loads(self, rates: Floats) -> Floats:
        """Load of each row, shape (n_rows,), when class c arrives at the pool at `rates[c]` requests/s."""
        return np.asarray(rates @ self.seconds / self.replicas)

    def tpot_loads(self, rates: Floats, tpot: float) -> Floats:
        """Left-hand sides a_i / T + sum_c lambda_c w_ic / n of the rows of a mean TPOT of `tpot` s, (n_pieces,).

        The step time in steady state is max_i(a_i + tau W_i) with W_i the work offered per second, so it stays
        below T only if every piece has a_i + T W_i <= T.
        """
        return np.asarray(self.base / tpot + rates @ self.work / self.replicas)


@dataclass(frozen=True)
class Equilibrium:
    """Fluid equilibrium of one replica: all steps alike, caps ignored.

    step_time (s); kv_tokens held; batch: sequences running; tokens: computed per step. `step_time` is inf where the
    work alone exceeds the time. Source: Ao et al. 2504.11320, T* = d0 / (1 - d1 G), for several pieces.
    """

    step_time: float
    kv_tokens: float
    batch: float
    tokens: float

    def within(self, pool: Pool) -> bool:
        """Whether the equilibrium fits the caps of `pool`."""
        held = np.array([self.kv_tokens, self.batch, self.tokens])
        return bool((held <= caps(pool)).all())


def caps(pool: Pool) -> Floats:
    """Caps of `RESOURCES`, shape (3,): tokens in whole blocks, sequences, tokens per step."""
    return np.array([pool.kv_blocks * pool.block_size, pool.max_batch, pool.token_budget], dtype=float)


def work(pool: Pool, m: Moments) -> Floats:
    """Seconds of work of one request on each piece, as the engine charges it, shape (n_classes, n_pieces)."""
    features = np.column_stack([m.prompt, m.decode, m.read, m.pairs])
    return np.asarray(features @ pool.stepper.coefficients[:, 1:].T)


def occupancy(m: Moments) -> Floats:
    """Resource-steps of one request on each of `RESOURCES`, shape (n_classes, 3)."""
    return np.column_stack([m.held, m.prefills + m.decode, m.prompt + m.decode])


def pool_rows(pool: Pool, m: Moments) -> PoolRows:
    """The rows of `pool` for classes with moments `m`."""
    base = pool.stepper.coefficients[:, 0]
    w, u, cap = work(pool, m), occupancy(m), caps(pool)
    seconds = w[:, :, None] + base[None, :, None] * (u / cap)[:, None, :]
    return PoolRows(
        pool=pool.name,
        replicas=pool.replicas,
        pieces=tuple(name for name in pool.stepper.names for _ in RESOURCES),
        resources=RESOURCES * len(base),
        seconds=seconds.reshape(len(w), -1),
        work=w,
        base=base,
        occupancy=u,
        caps=cap,
    )


def stability_rows(scenario: Scenario) -> tuple[PoolRows, ...]:
    """Rows (1) of every pool: sum_c lambda_c x_cj seconds[c, r] <= replicas.

    Occupancies are the least that any way of cutting the prefill into chunks can have, so (1) stays an outer bound
    where the token budget cuts chunks.
    """
    cache: dict[Engine, Moments] = {}
    for pool in scenario.pools:
        engine = Engine.of(pool)
        if engine not in cache:
            cache[engine] = moments(engine, scenario.workload.classes)
    return tuple(pool_rows(pool, cache[Engine.of(pool)]) for pool in scenario.pools)


def pool_loads(scenario: Scenario, fractions: Floats) -> tuple[Floats, ...]:
    """Load of each row of each pool, shapes (n_rows,), under a static split of shape (n_classes, n_pools)."""
    rates = scenario.workload.rates[:, None] * fractions
    return tuple(rows.loads(rates[:, j]) for j, rows in enumerate(stability_rows(scenario)))


def outer_factor(scenario: Scenario, fractions: Floats) -> float:
    """Largest factor on all arrival rates that (1) allows under the split `fractions` (n_classes, n_pools)."""
    load = max(float(loads.max()) for loads in pool_loads(scenario, fractions))
    return 1.0 / load if load > 0 else float("inf")


def outer_rate(pool: Pool, classes: Sequence[RequestClass], shares: Floats) -> float:
    """Largest total rate of one replica, requests/s, that (1) allows when class c makes up `shares[c]` of it."""
    rows = pool_rows(pool, moments(Engine.of(pool), classes))
    return 1.0 / float((shares @ rows.seconds).max())


def equilibrium(pool: Pool, classes: Sequence[RequestClass], rates: Floats) -> Equilibrium:
    """Fluid equilibrium of one replica of `pool` when class c arrives at the pool at `rates[c]` requests/s.

    T* = max_i a_i / (1 - W_i), W_i = sum_c lambda_c w_ic; the replica then holds T* times the occupancy offered.
    """
    m = moments(Engine.of(pool), classes)
    rate = np.asarray(rates, dtype=float) / pool.replicas
    slack = 1.0 - rate @ work(pool, m)
    base = pool.stepper.coefficients[:, 0]
    step = float((base / slack).max()) if (slack > 0).all() else float("inf")
    held = np.where(rate @ occupancy(m) > 0, step * (rate @ occupancy(m)), 0.0)
    return Equilibrium(step, *(float(x) for x in held))
