"""The fluid of a replica: requests of each class as a liquid that waits, runs and leaves; see docs/fluid.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.capacity import replica_capacity
from llmopt.plan import STATE_FEATURES
from llmopt.scenario import Pool, Scenario
from llmopt.stability import PoolRows, stability_rows
from llmopt.workload import RequestClass

MIX_MOVE = 0.05
"""Change of a class mix (sum over classes) from which the step-mean estimate is asked again."""

FADE = 0.9
"""Weight of the past in the mix, so that the luck of sample requests averages out."""


@dataclass(frozen=True)
class Cells:
    """Alike replicas as one cell each: constants of the dynamics, and of what a router sees.

    pool: index of the pool of each cell (n_cells,); replicas: how many it stands for (n_cells,); steps (n_classes,
    n_cells): steps of one request; base (n_cells, n_pieces), work (n_cells, n_classes, n_pieces): step time without
    requests, and what one running request adds to it, s; held (n_cells, n_classes, 3): part of each capped resource
    that one running request holds; running, waiting (n_cells, n_classes, n_features): state features of one request.
    """

    pool: Ints
    replicas: Floats
    steps: Floats
    base: Floats
    work: Floats
    held: Floats
    running: Floats
    waiting: Floats
    slowdown: Slowdown

    @property
    def shape(self) -> tuple[int, int]:
        """(n_classes, n_cells)."""
        return self.steps.shape[0], self.steps.shape[1]

    @classmethod
    def of(cls, scenario: Scenario, one_by_one: bool) -> Cells:
        """A cell for every pool, or for every replica if the rule may tell alike replicas apart."""
        counts = np.array([pool.replicas for pool in scenario.pools])
        pool = np.repeat(np.arange(len(counts)), counts) if one_by_one else np.arange(len(counts))
        rows = stability_rows(scenario)
        pieces = max(len(r.base) for r in rows)
        data = [_of_pool(scenario.pools[j], scenario.workload.classes, r, pieces) for j, r in enumerate(rows)]
        steps, base, work, held, running, waiting = (np.array(column)[pool] for column in zip(*data, strict=True))
        replicas = np.ones(len(pool)) if one_by_one else counts.astype(float)
        return cls(pool, replicas, steps.T, base, work, held, running, waiting, Slowdown(scenario, pool))

    def step_time(self, running: Floats) -> Floats:
        """Step time of each cell (n_cells,) when `running` (n_classes, n_cells) requests per replica run, s."""
        work = np.einsum("cj,jci->ji", running, self.work)
        return np.asarray(np.maximum((self.base + work).max(axis=1), 1e-9) * self.slowdown.factor)

    def use(self, running: Floats) -> Floats:
        """Used part of each capped resource, shape (n_cells, 3)."""
        return np.asarray(np.einsum("cj,jcr->jr", running, self.held))

    def features(self, waiting: Floats, running: Floats) -> Floats:
        """State features of a replica of each cell, shape (n_cells, n_features)."""
        return np.asarray(
            np.einsum("cj,jcf->jf", waiting, self.waiting) + np.einsum("cj,jcf->jf", running, self.running)
        )


@dataclass
class Slowdown:
    """By how much steps last longer than (1) says because they are not alike, at the class mix of each cell.

    pool: index of the pool of each cell; factor (n_cells,); mix: where the estimate was asked; inflow: recent requests
    (both n_classes, n_cells).
    """

    scenario: Scenario
    pool: Ints
    factor: Floats = field(init=False)
    mix: Floats = field(init=False)
    inflow: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.factor = np.ones(len(self.pool))
        self.mix = np.zeros((len(self.scenario.workload.classes), len(self.pool)))
        self.inflow = self.mix.copy()

    def guess(self, inflow: Floats) -> None:
        """Start from the mix of `inflow` (n_classes, n_pools), which weighs nothing against what is seen later."""
        self.update(1e-9 * inflow[:, self.pool])

    def update(self, inflow: Floats) -> None:
        """Take in `inflow` (n_classes, n_cells) and ask the step-mean estimate where the recent mix has moved."""
        self.inflow = FADE * self.inflow + inflow
        total = self.inflow.sum(axis=0)
        mix = self.inflow / np.where(total > 0, total, 1.0)
        for j in np.flatnonzero((total > 0) & (np.abs(mix - self.mix).sum(axis=0) > MIX_MOVE)):
            pool, classes = self.scenario.pools[int(self.pool[j])], self.scenario.workload.classes
            capacity = replica_capacity(pool, classes, mix[:, j])
            self.factor[j], self.mix[:, j] = capacity.outer / capacity.rate, mix[:, j]


def _of_pool(pool: Pool, classes: Sequence[RequestClass], rows: PoolRows, pieces: int) -> tuple[Floats, ...]:
    """Constants of one replica of `pool`; absent pieces are padded with zeros, which never are the largest."""
    kv, steps, _ = rows.occupancy.T
    padding = (0, pieces - len(rows.base))
    base = np.pad(rows.base, padding)
    work = np.pad(rows.work / steps[:, None], ((0, 0), padding))
    held = rows.occupancy / steps[:, None] / rows.caps
    tokens = np.array([c.mean_prompt + c.mean_output for c in classes])
    zero, one = np.zeros(len(classes)), np.ones(len(classes))
    running = {"running": one, "kv_tokens": kv / steps, "outstanding_tokens": _remaining(pool, classes) / steps}
    waiting = {"waiting": one, "outstanding_tokens": tokens}
    seen = [np.column_stack([part.get(f, zero) for f in STATE_FEATURES]) for part in (running, waiting)]
    return steps, base, work, held, *seen


def _remaining(pool: Pool, classes: Sequence[RequestClass]) -> Floats:
    """E of the tokens still to prefill and decode of one request, summed over its steps, shape (n_classes,)."""
    chunk, e = pool.chunk, pool.first_step

    def prefills(s: Floats) -> Floats:
        return np.ceil(s / chunk)

    def prompt_left(s: Floats) -> Floats:
        return prefills(s) * s - chunk * prefills(s) * (prefills(s) - 1) / 2

    def output_left(o: Floats) -> Floats:
        return (o - e) * (o - e + 1) / 2

    one = np.ones_like
    parts = ((prompt_left, one), (prefills, lambda o: o), (one, output_left))
    return np.array([sum(c.expect(f, h) for f, h in parts) for c in classes])
