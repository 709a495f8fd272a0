"""Routing in the fluid model: how the requests that arrive during a step spread over the cells.

A rule that follows the state switches infinitely often in the fluid limit: as soon as one score falls below another,
all arrivals go there and lift it again. What remains is a sliding motion (Filippov, 1988), in which the scores of the
used cells stay equal. It is computed without chatter by an implicit step: arrivals are spread so that the scores
*after* the step are in order. That is a separable convex program over the splits that the rule can produce,

    min  sum_j integral_0^{f_j} score_j(v) dv    s.t.  sum_j f_j = A,   f(S) >= A ((n_0 + n(S)) / n)^d  for all S,

because with d draws out of n replicas a request has to go into S if all draws fall into it (d = 0: only S = all).
Its levels are found by the decomposition algorithm for polymatroids (Groenevelt, Eur. J. Oper. Res. 54 (1991) 227).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, cycle
from typing import Protocol

import numpy as np

from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import PolicyError
from llmopt.evaluate.fluid_state import Cells
from llmopt.plan import Incoming, Plan, ReplicaState, Router, RouterRule, ask
from llmopt.scenario import Scenario

SAMPLES = 8
"""Most sample requests of a class in a step for which a Python rule is asked."""


@dataclass(frozen=True)
class Instant:
    """What a spread may look at.

    time (s); arrivals (n_classes,): requests that arrive in the step; features (n_cells, n_features): state of a
    replica at its end without them; more (n_cells, n_classes, n_features): what one request per replica adds to that.
    """

    time: float
    arrivals: Floats
    features: Floats
    more: Floats


class Spread(Protocol):
    """Where the arrivals of a step go: requests of each class to each cell, shape (n_classes, n_cells)."""

    def __call__(self, now: Instant) -> Floats:
        """Spread `now.arrivals`; rows sum to them."""
        ...


def spread_of(plan: Plan, scenario: Scenario, cells: Cells) -> Spread:
    """The spread that the plan's rule amounts to."""
    assert plan.router is not None
    if not isinstance(plan.router, Router):
        return Called(plan.policy, plan.router, scenario, cells)
    if plan.router.fractions is not None:
        return Split(plan.router.fractions)
    shape = (len(scenario.workload.classes), len(scenario.pools))
    mask = np.ones(shape, dtype=bool) if plan.router.mask is None else plan.router.mask
    return Index(plan.router.weights, mask, cells.replicas, plan.router.choices)


@dataclass(frozen=True)
class Split:
    """Fixed fractions; an index inside a pool of alike replicas keeps them alike."""

    fractions: Floats

    def __call__(self, now: Instant) -> Floats:
        """Fractions of the arrivals."""
        return now.arrivals[:, None] * self.fractions


@dataclass(frozen=True)
class Index:
    """The smallest score of all replicas, or of `choices` drawn ones.

    Classes that may go to the same cells see the same scores and spread alike. Groups of such classes take turns within
    the step, half their arrivals in one order and half in the other, because none comes first in truth.
    """

    weights: Floats
    mask: Bools
    replicas: Floats
    choices: int

    def __call__(self, now: Instant) -> Floats:
        """Levelled scores."""
        score = (self.weights * now.features).sum(axis=1)
        gain = np.einsum("jcf,jf->cj", now.more, self.weights)
        flows = np.zeros(gain.shape)
        groups = self.groups
        turns = [(group, 0.5) for group in (*groups, *reversed(groups))] if len(groups) > 1 else [(groups[0], 1.0)]
        for (classes, cells), part in turns:
            amount = now.arrivals[classes] * part
            if amount.sum() > 0:
                lift = amount @ gain[classes]
                args = (score[cells].tolist(), lift[cells].tolist(), self.replicas[cells].tolist())
                parts = np.zeros(len(score))
                parts[cells] = level(1.0, *args, self.choices)
                flows[classes] += np.outer(amount, parts)
                score = score + lift * parts / self.replicas
        return flows

    @cached_property
    def groups(self) -> list[tuple[Ints, Ints]]:
        """Classes that may go to the same cells, and these cells."""
        rows, group = np.unique(self.mask, axis=0, return_inverse=True)
        return [(np.flatnonzero(group == g), np.flatnonzero(row)) for g, row in enumerate(rows)]


def level(
    amount: float, score: Sequence[float], gain: Sequence[float], replicas: Sequence[float], choices: int = 0
) -> list[float]:
    """Spread `amount` over cells of `replicas` each so that the final scores are in order.

    A cell that gets f has the final score `score + gain f / replicas`. Every list has length n_cells; the result sums
    to `amount`. A gain that is not positive stands for a score that arrivals do not lift: a sink.
    """
    floor = max(max(map(abs, gain)) * 1e-6, 1e-12)
    width = [n / max(g, floor) for n, g in zip(replicas, gain, strict=True)]
    flows = [0.0] * len(score)
    total, tiny = sum(replicas), 1e-9 * amount

    def owed(n: float) -> float:
        return amount * (n / total) ** choices if choices else (amount if n >= total else 0.0)

    def fill(cells: list[int], mass: float, behind: float) -> None:
        """Level `cells`, which share `mass`; `behind` replicas are never preferred to them."""
        if mass <= 0:
            return
        height = (mass + sum(width[j] * score[j] for j in cells)) / sum(width[j] for j in cells)
        for j in cells:
            flows[j] = width[j] * (height - score[j])
        cells = sorted(cells, key=lambda j: flows[j] / replicas[j])
        n, sent, worst, cut, edge = behind, 0.0, tiny, 0, behind
        for k, j in enumerate(cells[:-1], 1):
            n, sent = n + replicas[j], sent + flows[j]
            lacking = owed(n) - owed(behind) - sent
            if lacking > worst:
                worst, cut, edge = lacking, k, n
        if cut:
            for j in cells:
                flows[j] = 0.0
            fill(cells[:cut], owed(edge) - owed(behind), behind)
            fill(cells[cut:], mass - owed(edge) + owed(behind), edge)

    fill(list(range(len(score))), amount, 0.0)
    return flows


@dataclass(frozen=True)
class Called:
    """A Python rule, asked for sample requests that each stand for a part of the step's arrivals."""

    policy: str
    rule: RouterRule
    scenario: Scenario
    cells: Cells
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    numbers: Iterator[int] = field(default_factory=count)

    def __call__(self, now: Instant) -> Floats:
        """Ask, place, let the next request see it."""
        seen = now.features.copy()
        flows = np.zeros((len(now.arrivals), len(seen)))
        states = [self._state(k, row) for k, row in enumerate(seen)]
        for c, part in self._parts(now.arrivals):
            k = self._ask(now.time, c, states)
            flows[c, k] += part
            seen[k] += part * now.more[k, c]
            states[k] = self._state(k, seen[k])
        return flows

    def _parts(self, arrivals: Floats) -> list[tuple[int, float]]:
        """Classes and amounts of the sample requests, in random order as in truth."""
        counts = [min(int(np.ceil(a)), SAMPLES) for a in arrivals]
        parts = [(c, float(arrivals[c]) / n) for c, n in enumerate(counts) for _ in range(n)]
        return [parts[i] for i in self.rng.permutation(len(parts))]

    def _ask(self, time: float, c: int, states: list[ReplicaState]) -> int:
        prompt, output = next(self.lengths[c])
        request = Incoming(next(self.numbers), time, prompt, output, c, float(self.rng.random()))
        k = ask(self.rule, self.policy, request, list(states))
        pool = self.scenario.pools[states[k].pool]
        if not pool.fits(prompt + output):
            raise PolicyError(
                f"policy {self.policy!r} sent a request of {prompt + output} tokens to pool {pool.name!r}, whose KV "
                "memory it exceeds; check the lengths in the rule"
            )
        return k

    @cached_property
    def lengths(self) -> list[Iterator[tuple[int, int]]]:
        """Endless lengths of each class, the same few thousand again and again."""
        draws = [c.sample(self.rng, 4096) for c in self.scenario.workload.classes]
        return [cycle(zip(prompt.tolist(), output.tolist(), strict=True)) for prompt, output in draws]

    def _state(self, k: int, seen: Floats) -> ReplicaState:
        return ReplicaState(k, int(self.cells.pool[k]), *(round(float(x)) for x in seen))
