"""The chain relaxation: a Lagrangian bound that sees how large requests get into each other's way over time.

The time-indexed relaxation is weak because a round's memory row does not see that growing requests collide later. Here
the memory rows and the assignment of large requests are priced, and what remains keeps, exactly, the memory of any
three large requests that complete one after the other. Mathematics: README.md, "Chains".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from formulations.batching_bounds import memory_prices
from llmopt.arrays import Bools, Floats, Ints
from llmopt.rounds import Rounds

PATIENCE, MOMENTUM, SHRINK, FIRST_STEP = 30, 0.9, 0.7, 0.5


@dataclass(frozen=True, eq=False)
class Multipliers:
    """reward: lambda_i for completing request i, shape (n,), 0 for small ones; price: mu_t, shape (T + 1,)."""

    reward: Floats
    price: Floats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The bound at some multipliers, and its slopes: how often a request is missing (n,), tokens above M (T + 1,)."""

    bound: float
    missing: Floats
    excess: Floats


@dataclass(frozen=True, eq=False)
class ChainRelaxation:
    """L(lambda, mu) of equation (B7) over completions that `allowed`, shape (n, T + 1), still permits.

    threshold: requests with a peak above this share of M are large; length: how many large completions in a row share
    memory, 3, or 4 for a tighter bound at a hundred times the work. Every optimal schedule that may beat the
    incumbent must complete each request in an allowed round; then L is below its latency for all lambda, mu >= 0.
    """

    instance: Rounds
    allowed: Bools
    threshold: float = 0.4
    length: Literal[3, 4] = 3

    @property
    def kernels(self) -> Any:
        """The dynamic programs for chains of this length."""
        from formulations import batching_kernels, batching_quads

        return batching_kernels if self.length == 3 else batching_quads

    @property
    def rounds(self) -> int:
        """T + 1."""
        return int(self.allowed.shape[1])

    @cached_property
    def large(self) -> Bools:
        """Which requests are large, shape (n,)."""
        return np.asarray(self.instance.peak > self.threshold * self.instance.capacity)

    @cached_property
    def classes(self) -> tuple[Ints, Ints, Ints]:
        """Size class of each request (n,), -1 if small; peak and number of requests of each class (K,), ascending."""
        peak, inverse, count = np.unique(self.instance.peak[self.large], return_inverse=True, return_counts=True)
        cls = np.full(len(self.instance), -1)
        cls[self.large] = inverse
        return cls, peak.astype(np.int64), count.astype(np.int64)

    @cached_property
    def slack(self) -> int:
        """Largest prompt of a large request."""
        return int(self.instance.prompt[self.large].max(initial=0))

    @property
    def table_size(self) -> int:
        """Numbers in a table of the dynamic program."""
        return int(self.rounds * len(self.classes[1]) * (self.instance.capacity + 1) ** (self.length - 2))

    def start(self) -> Multipliers:
        """Prices of the fluid schedule, and rewards that just pay for the cheapest completion."""
        price = memory_prices(self.instance, self.rounds - 1)
        cheapest = self.costs(price).min(axis=1, initial=np.inf)
        return Multipliers(np.where(self.large & np.isfinite(cheapest), cheapest, 0.0), price)

    def adapted(self, at: Multipliers) -> Multipliers:
        """Multipliers of another relaxation of the same instance for this one, at no loss of its bound."""
        price = at.price[: self.rounds]
        cheapest = self.costs(price).min(axis=1, initial=np.inf)
        paid = np.where(at.reward == 0, cheapest, at.reward)
        return Multipliers(np.where(self.large & np.isfinite(paid), paid, 0.0), price)

    def costs(self, price: Floats) -> Floats:
        """Cost c - a_i + sum_t mu_t usage_ict, the priced latency of completing i in round c, shape (n, T + 1)."""
        t = np.arange(self.rounds)
        total, moment = np.cumsum(price), np.cumsum(price * t)
        start = np.maximum(t[None, :] - self.instance.output[:, None], 0)
        base = self.instance.peak[:, None] - t[None, :]
        memory = base * (total[None, :] - total[start]) + moment[None, :] - moment[start]
        return np.asarray(np.where(self.allowed, memory + t[None, :] - self.instance.arrival[:, None], np.inf))

    def gains(self, at: Multipliers, costs: Floats) -> tuple[Floats, Ints]:
        """V[t, k] = max over i in class k of lambda_i - cost_i(t), shape (T + 1, K), and who attains it."""
        from formulations.batching_kernels import NEVER

        cls, peak, _ = self.classes
        V, who = np.full((self.rounds, len(peak)), NEVER), np.zeros((self.rounds, len(peak)), dtype=np.int64)
        for i in np.flatnonzero(self.large):
            gain = at.reward[i] - costs[i]
            better = gain > V[:, cls[i]]
            V[better, cls[i]], who[better, cls[i]] = gain[better], i
        return V, who

    def constant(self, at: Multipliers, costs: Floats) -> float:
        """What the bound adds to the best chain: rewards, the small requests' cheapest rounds, - M times the prices."""
        small = costs[~self.large].min(axis=1, initial=np.inf)
        return float(at.reward[self.large].sum() + small.sum() - self.instance.capacity * at.price.sum())

    def evaluate(self, at: Multipliers) -> Evaluation:
        """The bound and a subgradient; infinite if some request has no allowed round left."""
        if not self.allowed.any(axis=1).all():
            return Evaluation(np.inf, np.zeros(len(self.instance)), np.zeros(self.rounds))
        costs = self.costs(at.price)
        bound, missing = self.constant(at, costs), self.large.astype(float)
        done = [(i, int(costs[i].argmin())) for i in np.flatnonzero(~self.large).tolist()]
        if self.large.any():
            (V, who), (_, peak, count) = self.gains(at, costs), self.classes
            V = V[: np.flatnonzero((V > 0).any(axis=1))[-1] + 1] if (V > 0).any() else V[:1]  # later, chains only lose
            after, first = self.kernels.gains_after(V, peak, count, self.instance.capacity, self.slack)
            chain = self.kernels.best_chain(V, after, first, peak, count, self.instance.capacity, self.slack)
            bound -= float(first[0])
            large = [(int(who[t, k]), int(t)) for t, k in chain]
            np.subtract.at(missing, [i for i, _ in large], 1.0)
            done += large
        return Evaluation(bound, missing, self._excess(done))

    def _excess(self, done: list[tuple[int, int]]) -> Floats:
        """Tokens above M in each round when requests complete as in `done`, repetitions included; round 0 is none."""
        i, c = np.array(done, dtype=np.int64).reshape(-1, 2).T
        excess = np.full(self.rounds, -float(self.instance.capacity))
        for request, end in zip(i.tolist(), c.tolist(), strict=True):
            age = np.arange(1, self.instance.output[request] + 1)
            excess[end - len(age) + 1 : end + 1] += self.instance.prompt[request] + age
        excess[0] = 0.0
        return excess

    def completion_bounds(self, at: Multipliers) -> Floats:
        """A lower bound on the latency of every schedule that completes request i in round c, shape (n, T + 1)."""
        from formulations.batching_kernels import NEVER

        costs = self.costs(at.price)
        constant, cls = self.constant(at, costs), self.classes[0]
        chain, through = 0.0, np.zeros((self.rounds, 0))
        if self.large.any():
            V, _ = self.gains(at, costs)
            data = (*self.classes[1:], self.instance.capacity, self.slack)
            after, first = self.kernels.gains_after(V, *data)
            after += self.kernels.gains_before(V, *data)
            through = np.where(V > NEVER, after.reshape(*V.shape, -1).max(axis=2), -np.inf)
            chain = float(first[0])
        bounds = np.where(self.large[:, None], constant, constant - chain) + np.zeros_like(costs)
        for i in range(len(self.instance)):
            own = costs[i] - at.reward[i] - through[:, cls[i]] if self.large[i] else costs[i] - costs[i].min()
            bounds[i] += own
        return np.asarray(np.where(self.allowed, bounds, np.inf))


def ascend(
    relaxation: ChainRelaxation,
    at: Multipliers,
    target: float,
    iterations: int,
    stop: Callable[[], bool] = lambda: False,
    length: float = FIRST_STEP,
) -> tuple[float, Multipliers]:
    """Maximise L by subgradient steps with momentum towards `target`, an upper bound; best bound and its multipliers.

    `length` is the first step in units of Polyak's; begin with a short one at multipliers that are nearly best. Prices
    count in tokens and rewards in requests; dividing the former by M makes one step length fit both.
    """
    capacity = relaxation.instance.capacity
    best, held = -np.inf, at
    reference, since = -np.inf, 0
    reward_step, price_step = np.zeros(len(at.reward)), np.zeros(len(at.price))
    for _ in range(iterations):
        here = relaxation.evaluate(at)
        since = 0 if here.bound > reference + 1e-4 * target else since + 1
        reference = max(reference, here.bound) if since == 0 else reference
        if here.bound > best:
            best, held = here.bound, at
        if best > target or stop():
            break
        if since > PATIENCE:
            length, since, at = SHRINK * length, 0, held
            reward_step, price_step = np.zeros_like(reward_step), np.zeros_like(price_step)
            continue
        missing, excess = here.missing, here.excess / capacity
        reward_step, price_step = missing + MOMENTUM * reward_step, excess + MOMENTUM * price_step
        step = length * (target - here.bound) / max(float(missing @ missing + excess @ excess), 1e-9)
        at = Multipliers(at.reward + step * reward_step, np.maximum(at.price + step * price_step / capacity, 0.0))
    return best, held
