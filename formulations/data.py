"""Sets and data of the routing programs, read once from a scenario; no variable and no solver appears here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llmopt.arrays import Bools, Floats, Ints
from llmopt.scenario import Scenario
from llmopt.stability import PoolRows, stability_rows


@dataclass(frozen=True)
class Row:
    """One linear limit of a pool: sum_c lambda_c x_cj seconds_c <= replicas.

    pool: index of the pool; key: names of pool and row; seconds (n_classes,): replica-seconds that one request costs;
    column: its place in `PoolRows`, None for a cut that comes from the step-mean estimate.
    """

    pool: int
    key: tuple[str, ...]
    seconds: Floats
    column: int | None = None


@dataclass(frozen=True)
class RoutingData:
    """Classes c, pools j and what requests cost them.

    rates (n_classes,): lambda_c, requests/s; replicas (n_pools,): n_j; price (n_pools,): USD/hour of a replica;
    tpot (n_classes,): required mean time per output token, s, inf where there is none; allowed (n_classes, n_pools):
    the largest request of the class fits; limits: equation (1) of every pool as arrays, for prices.
    """

    classes: tuple[str, ...]
    pools: tuple[str, ...]
    rates: Floats
    replicas: Floats
    price: Floats
    tpot: Floats
    allowed: Bools
    limits: tuple[PoolRows, ...]

    @classmethod
    def of(cls, scenario: Scenario) -> RoutingData:
        """Read a scenario, which holds no class whose largest request fits no pool."""
        classes = scenario.workload.classes
        return cls(
            classes=tuple(c.name for c in classes),
            pools=tuple(p.name for p in scenario.pools),
            rates=scenario.workload.rates,
            replicas=np.array([p.replicas for p in scenario.pools], dtype=float),
            price=np.array([p.price for p in scenario.pools]),
            tpot=np.array([c.tpot or np.inf for c in classes]),
            allowed=np.array(scenario.allowed),
            limits=stability_rows(scenario),
        )

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows (1), without those that another row of the pool implies for every mix of classes."""
        return tuple(
            Row(j, (limit.pool, limit.pieces[r], limit.resources[r]), limit.seconds[:, r], r)
            for j, limit in enumerate(self.limits)
            for r in _undominated(limit.seconds[self.allowed[:, j]])
        )

    @cached_property
    def pair_index(self) -> tuple[Ints, Ints]:
        """Class and pool of each allowed pair, class by class; arrays of shape (n_pairs,)."""
        cls, pool = np.nonzero(self.allowed)
        return cls, pool

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of the allowed pairs, in the order of `pair_index`."""
        return [(self.classes[c], self.pools[j]) for c, j in zip(*self.pair_index, strict=True)]

    def table(self, values: Sequence[float] | Floats) -> Floats:
        """Values of the allowed pairs as a table of shape (n_classes, n_pools), zero elsewhere."""
        full = np.zeros(self.allowed.shape)
        full[self.pair_index] = values
        return full

    def serving(self) -> Any:
        """Sparse (n_classes, n_pairs): row c adds up the fractions of class c."""
        return _sparse(np.ones(len(self.pairs)), self.pair_index[0], len(self.classes))

    def usage(self, rows: Sequence[Row]) -> Any:
        """Sparse (n_rows, n_pairs): entry lambda_c seconds_c of each row for the pairs of its pool."""
        from scipy.sparse import csr_array

        cls, pool = self.pair_index
        of_pool = [np.flatnonzero(pool == j) for j in range(len(self.pools))]
        columns = [of_pool[row.pool] for row in rows]
        data = [self.rates[cls[k]] * row.seconds[cls[k]] for row, k in zip(rows, columns, strict=True)]
        starts = np.concatenate([[0], np.cumsum([len(k) for k in columns])])
        flat = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
        return csr_array((np.concatenate(data or [np.zeros(0)]), flat, starts), shape=(len(rows), len(self.pairs)))


def _undominated(seconds: Floats) -> list[int]:
    """Columns of `seconds` (n_classes, n_rows) that no other column dominates; the first of equal ones stays."""
    kept: list[int] = []
    for r in range(seconds.shape[1]):
        column = seconds[:, r : r + 1]
        beaten = (seconds >= column).all(axis=0)
        beaten &= (seconds > column).any(axis=0) | (np.arange(seconds.shape[1]) < r)
        if not beaten.any():
            kept.append(r)
    return kept


def _sparse(values: Floats, rows: Ints, n_rows: int) -> Any:
    from scipy.sparse import csr_array

    return csr_array((values, (rows, np.arange(len(values)))), shape=(n_rows, len(values)))
