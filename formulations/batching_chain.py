"""The chain relaxation: a Lagrangian bound that sees how large requests get into each other's way over time.

The time-indexed relaxation is weak because a round's memory row does not see that growing requests collide later. Here
memory and the assignment of large requests are priced, and what remains keeps, exactly, the memory of any three large
requests that complete one after the other. Memory is paid for by paths in which requests are whole again.
Mathematics: README.md, "Chains" and "Sawtooth".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from formulations.batching_bounds import memory_prices
from llmopt.arrays import Bools, Floats, Ints
from llmopt.rounds import Rounds

PATIENCE, MOMENTUM, SHRINK, FIRST_STEP = 30, 0.9, 0.7, 0.5
PRICE_SCALE, NUMBER_SCALE, ENDING_SCALE = 10.0, 0.1, 10.0
KNOT, PEAKS = 8, 7  # beta has a knot every so many rounds, and so many between peaks 1 and M


@dataclass(frozen=True, eq=False)
class Multipliers:
    """What the bound pays, or by how much the bound grows with it.

    reward: lambda_i for completing request i, shape (n,), 0 for small ones; price: mu_t a token, number: nu_t a running
    request in round t, both of shape (T + 1,); ending: beta for a completion at the knots of round and peak, (R, Q).
    """

    reward: Floats
    price: Floats
    number: Floats
    ending: Floats

    def moved(self, by: Multipliers, step: float, scale: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Multipliers:
        """These plus step x scale x `by`."""
        return Multipliers(*(a + step * f * b for a, b, f in zip(self.parts, by.parts, scale, strict=True)))

    def square(self, scale: tuple[float, ...]) -> float:
        """Squared length, weighted by `scale`."""
        return sum(f * float((part**2).sum()) for part, f in zip(self.parts, scale, strict=True))

    @property
    def parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        """The four arrays."""
        return self.reward, self.price, self.number, self.ending


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The bound at some multipliers, and its slope by each of them."""

    bound: float
    slope: Multipliers


@dataclass(frozen=True, eq=False)
class ChainRelaxation:
    """L of equation (B12), or (B7) without sawtooth, over completions that `allowed`, shape (n, T + 1), still permits.

    threshold: requests with a peak above this share of M are large; length: how many large completions in a row share
    memory, 3, or 4 for a tighter bound at a hundred times the work; sawtooth: whether memory is paid for by paths of
    whole requests, (B11), else by M tokens a round. Every optimal schedule that may beat the incumbent must complete
    each request in an allowed round; then L is below its latency for all multipliers (mu >= 0 without sawtooth).
    """

    instance: Rounds
    allowed: Bools
    threshold: float = 0.4
    length: Literal[3, 4] = 3
    sawtooth: bool = True

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
        """Numbers in a table of the dynamic programs."""
        capacity = self.instance.capacity
        chains = self.rounds * len(self.classes[1]) * (capacity + 1) ** (self.length - 2)
        paths = self.rounds * (capacity // (int(self.instance.prompt.min(initial=0)) + 1)) * capacity
        return int(max(chains, 2 * paths if self.sawtooth else 0))

    @cached_property
    def hats(self) -> tuple[Ints, Floats, Floats]:
        """Knot before each round, weight of the next one, shape (T + 1,), and weights of the peaks' (M + 1, Q)."""
        t, capacity = np.arange(self.rounds), self.instance.capacity
        knots = np.linspace(1, capacity, PEAKS)
        peaks = np.stack([np.interp(np.arange(capacity + 1), knots, unit) for unit in np.eye(PEAKS)], axis=1)
        return t // KNOT, t % KNOT / KNOT, peaks

    @cached_property
    def events(self) -> tuple[Bools, Bools]:
        """Which prompts may start, (T + 1, max s + 1), and which peaks may complete, (T + 1, M + 1), after a round."""
        one = self.instance
        starts = np.zeros((self.rounds, int(one.prompt.max(initial=0)) + 1), dtype=bool)
        ends = np.zeros((self.rounds, one.capacity + 1), dtype=bool)
        i, c = np.nonzero(self.allowed)
        starts[c - one.output[i], one.prompt[i]] = ends[c, one.peak[i]] = True
        return starts, ends

    def start(self) -> Multipliers:
        """Prices of the fluid schedule, and rewards that just pay for the cheapest completion."""
        none, ending = np.zeros(len(self.instance)), np.zeros((self.hats[0][-1] + 2, PEAKS))
        price = memory_prices(self.instance, self.rounds - 1)
        return self.adapted(Multipliers(none, price, np.zeros(self.rounds), ending))

    def adapted(self, at: Multipliers) -> Multipliers:
        """Multipliers of another relaxation of the same instance for this one, at no loss of its bound."""
        last, rows = self.rounds, self.hats[0][-1] + 2
        cut = Multipliers(at.reward, at.price[:last], at.number[:last], at.ending[:rows])
        cheapest = self.costs(cut).min(axis=1, initial=np.inf)
        paid = np.where(at.reward == 0, cheapest, at.reward)
        return replace(cut, reward=np.where(self.large & np.isfinite(paid), paid, 0.0))

    def ending(self, at: Multipliers) -> Floats:
        """beta_tP between its knots, shape (T + 1, M + 1)."""
        knot, weight, by_peak = self.hats
        at_knots = at.ending @ by_peak.T
        return np.asarray(at_knots[knot] * (1 - weight[:, None]) + at_knots[knot + 1] * weight[:, None])

    def costs(self, at: Multipliers) -> Floats:
        """Priced latency cost_i(c) of completing i in round c, equation (B10), shape (n, T + 1)."""
        t, one = np.arange(self.rounds), self.instance
        total, moment, number = np.cumsum(at.price), np.cumsum(at.price * t), np.cumsum(at.number)
        start = np.maximum(t[None, :] - one.output[:, None], 0)
        base = one.peak[:, None] - t[None, :]
        memory = base * (total[None, :] - total[start]) + moment[None, :] - moment[start]
        paid = memory + number[None, :] - number[start] + self.ending(at)[:, one.peak].T
        return np.asarray(np.where(self.allowed, paid + t[None, :] - one.arrival[:, None], np.inf))

    def paths(self, at: Multipliers) -> tuple[float, Floats, Floats, Floats]:
        """Most that memory can be paid, and what it takes: tokens, requests (T + 1,), completions (T + 1, M + 1)."""
        from formulations.batching_sawtooth import sawtooth

        ending, (starts, ends) = self.ending(at), self.events
        none, done = np.zeros(self.rounds), np.zeros(ending.shape)
        if not self.sawtooth:
            full = np.full(self.rounds, float(self.instance.capacity))
            return float(full @ at.price), full, none, done
        paid = np.flatnonzero((at.price != 0) | (at.number != 0) | (ending != 0).any(axis=1))
        last = int(paid[-1]) + 1 if len(paid) else 1
        value, *path = sawtooth(
            at.price[:last], at.number[:last], ending[:last], starts[:last], ends[:last], self.instance.capacity
        )
        tokens, requests = none.copy(), none
        tokens[:last], requests[:last], done[:last] = path
        return value, tokens, requests, done

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
        """What the bound adds to chains and paths: rewards, and the small requests' cheapest rounds."""
        return float(at.reward[self.large].sum() + costs[~self.large].min(axis=1, initial=np.inf).sum())

    def evaluate(self, at: Multipliers) -> Evaluation:
        """The bound and a subgradient; infinite if some request has no allowed round left."""
        if not self.allowed.any(axis=1).all():
            return Evaluation(np.inf, Multipliers(*(np.zeros_like(part) for part in at.parts)))
        costs = self.costs(at)
        most, *path = self.paths(at)
        bound, missing = self.constant(at, costs) - most, self.large.astype(float)
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
        tokens, number, ends = self._used(done)
        knot, weight, by_peak = self.hats
        ending, more = np.zeros_like(at.ending), (ends - path[2]) @ by_peak * self.sawtooth
        np.add.at(ending, knot, more * (1 - weight[:, None]))
        np.add.at(ending, knot + 1, more * weight[:, None])
        number = (number - path[1]) * self.sawtooth
        return Evaluation(bound, Multipliers(missing, tokens - path[0], number, ending))

    def _used(self, done: list[tuple[int, int]]) -> tuple[Floats, Floats, Floats]:
        """Tokens, requests and completions by round when requests complete as in `done`, repetitions included."""
        tokens, number = np.zeros(self.rounds), np.zeros(self.rounds)
        ends = np.zeros((self.rounds, self.instance.capacity + 1))
        for i, c in done:
            age = np.arange(1, self.instance.output[i] + 1)
            tokens[c - len(age) + 1 : c + 1] += self.instance.prompt[i] + age
            number[c - len(age) + 1 : c + 1] += 1
            ends[c, self.instance.peak[i]] += 1
        return tokens, number, ends

    def completion_bounds(self, at: Multipliers) -> Floats:
        """A lower bound on the latency of every schedule that completes request i in round c, shape (n, T + 1)."""
        from formulations.batching_kernels import NEVER

        costs = self.costs(at)
        constant, cls = self.constant(at, costs) - self.paths(at)[0], self.classes[0]
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

    `length` is the first step in units of Polyak's; begin with a short one at multipliers that are nearly best. The
    slopes count requests, tokens, running requests and completions; the scale makes one step length fit all.
    """
    price_scale = PRICE_SCALE if relaxation.sawtooth else 1.0
    scale = (1.0, price_scale / relaxation.instance.capacity**2, NUMBER_SCALE, ENDING_SCALE)
    best, held = -np.inf, at
    reference, since = -np.inf, 0
    still = Multipliers(*(np.zeros_like(part) for part in at.parts))
    step = still
    for _ in range(iterations):
        here = relaxation.evaluate(at)
        since = 0 if here.bound > reference + 1e-4 * target else since + 1
        reference = max(reference, here.bound) if since == 0 else reference
        if here.bound > best:
            best, held = here.bound, at
        if best > target or stop():
            break
        if since > PATIENCE:
            length, since, at, step = SHRINK * length, 0, held, still
            continue
        slope = here.slope
        if not relaxation.sawtooth:  # a price of 0 stays there, and such rounds should not shorten the step
            slope = replace(slope, price=np.where((at.price <= 0) & (slope.price < 0), 0.0, slope.price))
        step = slope.moved(step, MOMENTUM)
        at = at.moved(step, length * (target - here.bound) / max(slope.square(scale), 1e-9), scale)
        at = at if relaxation.sawtooth else replace(at, price=np.maximum(at.price, 0.0))
    return best, held
