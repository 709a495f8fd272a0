"""The exact law of the KV load of an always occupied slot, and of the sum over the slots of a micro-batch.

A request with prompt P that stays D steps loads its slot with P + k KV tokens in step k = 0..D-1. At a random time

    P(load = v) = E[number of k in 0..D-1 with P + k = v] / E[D],

by renewal-reward, as for the moments in `llmopt.slots`. For independent P and D that is the convolution of the pmf of P
with P(D > k) / E[D]; over pairs of a trace it is a count; and under a mix of classes a slot is met with one of class c
with probability proportional to rate_c E[D_c]. Over K steps from new requests in all slots, step k counts by the
weight of `llmopt.renewal.age_weights` instead of 1 / E[D].

Slots are independent of each other, so that n of them hold a sum whose characteristic function is the n-th power. It is
computed by a Fourier transform on a lattice: of single tokens as far as `MOST` points reach, else each load is split
over the three nearest points so that its mean and variance stay, which is accurate as long as loads are spread over
many tokens. The lattice is a circle wide enough, by Bernstein's inequality, for all but 2e-16 of the probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, floor, log, sqrt
from typing import ClassVar

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.renewal import age_weights
from llmopt.workload import Pairs, RequestClass

MOST = 2**18
"""Points of the lattice at most."""
SHORT = 2**14
"""A sum of a range of so many tokens is kept token by token."""
FINE = 512
"""Of others at most so many points in a standard deviation are kept, which lengthens it by 3e-7 of itself."""
TAIL = 1e-12
"""Probability that is neglected beyond each end: round-off of the transform hides it."""
REACH = -log(1e-16)
"""The circle neglects exp(-REACH) beyond each end."""


@dataclass(frozen=True, eq=False)
class LoadLaw:
    """Law of KV tokens on the points first + k step, k = 0..n-1.

    log_below: log-probability of at most that many tokens, of shape (n,), increasing to 0.
    """

    first: float
    step: float
    log_below: Floats
    nodes: ClassVar[int] = 1
    """The distribution is constant between two points, where one node is exact."""

    @cached_property
    def points(self) -> Floats:
        """KV tokens at which the law has mass, increasing, of shape (n,)."""
        return np.asarray(self.first + self.step * np.arange(len(self.log_below)), dtype=np.float64)

    def log_cdf(self, tokens: Floats) -> Floats:
        """Log-probability of at most `tokens` KV tokens, same shape; -inf below the first point."""
        k = np.floor((tokens - self.first) / self.step + 1e-9)
        below = self.log_below[np.clip(k, 0, len(self.log_below) - 1).astype(np.int64)]
        return np.asarray(np.where(k < 0, -np.inf, below))

    def shared(self, parts: int) -> LoadLaw:
        """The law of a `parts`-th of the tokens."""
        return LoadLaw(self.first / parts, self.step / parts, self.log_below)


@dataclass(frozen=True, eq=False)
class SlotLaw:
    """Law of the KV tokens of one slot: `values`, increasing, with `probabilities`, both of shape (n,)."""

    values: Ints
    probabilities: Floats
    _sums: dict[int, LoadLaw] = field(default_factory=dict, repr=False)

    @cached_property
    def mean(self) -> float:
        """Theta, tokens."""
        return float(self.values @ self.probabilities)

    @cached_property
    def variance(self) -> float:
        """nu^2, tokens^2."""
        return float((self.values - self.mean) ** 2 @ self.probabilities)

    def sums(self, n: int) -> LoadLaw:
        """Law of the KV tokens of n independent slots together; computed once for each n.

        Raises
        ------
        ScenarioError
            If n is not a whole number of at least 1.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ScenarioError(f"{n!r} slots hold nothing; give a whole number of at least 1")
        if n not in self._sums:
            self._sums[int(n)] = _summed(self, int(n))
        return self._sums[n]


def slot_law(classes: Sequence[RequestClass], rates: Floats, first_step: int = 0, steps: int | None = None) -> SlotLaw:
    """The law under a mix of classes with `rates` of shape (n_classes,); arguments as of `slots.slot_load`.

    steps: the law is the mean one over so many steps from a new request in every slot; absent, that of a steady state.

    Raises
    ------
    ScenarioError
        If no request stays a single step.
    """
    shares = np.asarray(rates, dtype=float)
    ages = None if steps is None else age_weights(_stays(classes, shares, first_step), steps)
    counts = [_counts(cls, first_step, ages) for cls in classes]
    lowest = min(low for low, _ in counts)
    total = np.zeros(max(low + len(met) for low, met in counts) - lowest)
    for rate, (low, met) in zip(shares, counts, strict=True):
        total[low - lowest : low - lowest + len(met)] += rate * met
    if total.sum() <= 0:
        raise ScenarioError("no request stays a single decode step, so that no slot is ever loaded; lengthen outputs")
    at = np.flatnonzero(total)
    return SlotLaw(np.asarray(lowest + at, np.int64), total[at] / total.sum())


def _stays(classes: Sequence[RequestClass], rates: Floats, first_step: int) -> Floats:
    """P(D = d) for d = 0, 1, ... under the mix of classes; one step for certain where no request stays any."""
    laws = [_staying(cls, first_step) for cls in classes]
    mixed = np.zeros(max(2, *(len(law) for law in laws)))
    for rate, law in zip(rates, laws, strict=True):
        mixed[: len(law)] += rate / rates.sum() * law
    return mixed if mixed[1:].any() else np.array([0.0, 1.0])


def _staying(cls: RequestClass, first_step: int) -> Floats:
    if cls.pairs is not None:
        return np.asarray(np.bincount(cls.pairs.output - first_step) / len(cls.pairs.output), dtype=np.float64)
    output, q = cls.output.pmf
    return np.asarray(np.bincount(output - first_step, weights=q), dtype=np.float64)


def _counts(cls: RequestClass, first_step: int, ages: Floats | None) -> tuple[int, Floats]:
    """The lowest load v, and the mean number of steps that a request of the class spends at v, v + 1, ...

    ages: what a step counts by its number, if not 1; steps beyond count nothing.
    """
    if cls.pairs is not None:
        return _counted(cls.pairs, first_step) if ages is None else _weighted(cls.pairs, first_step, ages)
    prompt, p = cls.prompt.pmf
    begins = np.bincount(prompt - prompt[0], weights=p).astype(float)
    longer = np.cumsum(_staying(cls, first_step)[::-1])[::-1][1:]  # P(D > k), k = 0, 1, ..., from the small ones up
    counted = longer if ages is None else longer[: len(ages)] * ages[: len(longer)]
    return int(prompt[0]), _convolved(begins, counted)


def _counted(pairs: Pairs, first_step: int) -> tuple[int, Floats]:
    """A request enters the load P and leaves P + D: the running sum of both is how many are at a load."""
    low, n = int(pairs.prompt.min()), len(pairs.prompt)
    ends = pairs.prompt + pairs.output - first_step - low
    size = int(ends.max()) + 1
    met = np.cumsum(np.bincount(pairs.prompt - low, minlength=size) - np.bincount(ends, minlength=size))
    return low, met / n


def _weighted(pairs: Pairs, first_step: int, ages: Floats) -> tuple[int, Floats]:
    """The same, step by step of the requests that stay so long."""
    low, decode = int(pairs.prompt.min()), pairs.output - first_step
    longest = np.argsort(-decode, kind="stable")
    begins, decode = (pairs.prompt - low)[longest], decode[longest]
    met = np.zeros(int((begins + decode).max()) + 1)
    for k, weight in enumerate(ages[: int(decode[0])]):
        alive = int(np.searchsorted(-decode, -k, side="left"))
        at = np.bincount(begins[:alive] + k)
        met[: len(at)] += weight * at
    return low, met / len(decode)


def _convolved(a: Floats, b: Floats) -> Floats:
    if not len(b):
        return np.zeros(1)
    size = len(a) + len(b) - 1
    n = _round_up(size)
    return np.maximum(np.fft.irfft(np.fft.rfft(a, n) * np.fft.rfft(b, n), n)[:size], 0.0)


def _summed(law: SlotLaw, n: int) -> LoadLaw:
    """The n-th power of the characteristic function, on the lattice n values[0] + k step."""
    low, width, step = _lattice(law, n)
    begin = floor(low / step)
    beside = min(n, 2) if step > 1 else 0
    size = _round_up(ceil(width / step) + 1 + 2 * beside)
    transform = np.fft.rfft(_split(law, step, size))
    mass = np.roll(np.fft.irfft(transform**n, size), -((begin - beside) % size))
    first = float(n * law.values[0]) + step * (begin - beside)
    many = floor(sqrt(n * law.variance) / (FINE * step)) if width > SHORT else 1
    return _tabled(first, float(step * max(1, many)), _thinned(mass, max(1, many)))


def _lattice(law: SlotLaw, n: int) -> tuple[float, float, int]:
    """Where the circle begins, above n values[0], its length, and the distance of its points, in tokens."""
    below, above = law.mean - float(law.values[0]), float(law.values[-1]) - law.mean
    if n * (below + above) < MOST:
        return 0.0, n * (below + above), 1
    low, high = (min(n * side, _bernstein(side, n * law.variance)) for side in (below, above))
    return n * below - low, low + high, max(1, ceil((low + high) / MOST))


def _thinned(mass: Floats, many: int) -> Floats:
    """Mass on every `many`-th point, that between them split over both neighbours, so that the mean stays."""
    if many == 1:
        return mass
    rows = np.append(mass, np.zeros(-len(mass) % many)).reshape(-1, many)
    right = np.arange(many) / many
    return np.asarray(np.append(rows @ (1 - right), 0.0) + np.append(0.0, rows @ right))


def _bernstein(most: float, variance: float) -> float:
    """How far a sum of this variance, each part at most `most` above its mean, exceeds its mean with exp(-REACH)."""
    half = REACH * most / 3
    return half + sqrt(half**2 + 2 * REACH * variance)


def _split(law: SlotLaw, step: int, size: int) -> Floats:
    """Mass of one slot on a circle of `size` points: of each load on three points, with its mean and its square."""
    at = (law.values - law.values[0]) / step
    near = np.rint(at).astype(np.int64)
    off = at - near
    mass = np.zeros(size)
    for shift, share in ((-1, off * (off - 1) / 2), (0, 1 - off**2), (1, off * (off + 1) / 2)):
        mass += np.bincount((near + shift) % size, weights=law.probabilities * share, minlength=size)
    return mass


def _tabled(first: float, step: float, mass: Floats) -> LoadLaw:
    """The law of these masses, without its tails; each probability is summed from its own end."""
    mass = np.maximum(mass, 0.0)
    mass /= mass.sum()
    below = np.cumsum(mass)
    above = np.append(np.cumsum(mass[:0:-1])[::-1], 0.0)
    start, stop = int(np.argmax(below > TAIL)), int(np.argmax(above <= TAIL))
    kept = slice(start, max(start, stop) + 1)
    table = np.where(below[kept] < 0.5, np.log(below[kept]), np.log1p(-above[kept]))
    table[-1] = 0.0
    return LoadLaw(first + step * start, step, table)


def _round_up(size: int) -> int:
    """The next number 2^i or 3 2^i, of which transforms are fast."""
    power = 1 << max(1, (size - 1).bit_length())
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power
