"""Length laws of prompts and outputs: integer tokens, exact probabilities, one truth for programs and samplers.

Every law is turned into a probability mass function on integers; moments are sums over it and samples are drawn
from it, so that a program and the simulator never see two different workloads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from llmopt.arrays import Floats, Ints
from llmopt.model import InputModel

Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
Positive = Annotated[float, Field(gt=0)]
Pmf = tuple[Ints, Floats]


class LawBase(InputModel, ABC):
    """A law of one length: support and probabilities."""

    @cached_property
    def pmf(self) -> Pmf:
        """Support (increasing integers, shape (n,)) and probabilities (shape (n,), summing to 1)."""
        values, probs = self.masses()
        keep = probs > 0
        return values[keep], probs[keep] / probs[keep].sum()

    @cached_property
    def cumulative(self) -> Floats:
        """Probabilities of at most each length of the support, shape (n,)."""
        return np.cumsum(self.pmf[1])

    @abstractmethod
    def masses(self) -> Pmf:
        """Support and unnormalised masses."""

    @property
    def mean(self) -> float:
        """Mean length in tokens, after clamping."""
        values, probs = self.pmf
        return float(values @ probs)

    @property
    def largest(self) -> int:
        """Largest possible length in tokens."""
        return int(self.pmf[0][-1])

    def sample(self, u: Floats) -> Ints:
        """Lengths for uniform random numbers `u` of shape (n,), by inversion."""
        values, _ = self.pmf
        index = np.searchsorted(self.cumulative, u, side="right")
        return values[np.minimum(index, len(values) - 1)]


class Constant(LawBase):
    """Always `value` tokens."""

    law: Literal["constant"]
    value: Tokens

    def masses(self) -> Pmf:
        """One atom."""
        return np.array([self.value]), np.ones(1)


class Uniform(LawBase):
    """Integer uniform on `low`..`high`, both included."""

    law: Literal["uniform"]
    low: Tokens
    high: Tokens

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"has low = {self.low} above high = {self.high}; swap them")
        return self

    def masses(self) -> Pmf:
        """Equal masses."""
        values = np.arange(self.low, self.high + 1)
        return values, np.ones(len(values))


class Clamped(LawBase):
    """A law on the positive reals rounded to the nearest token; what lies outside `min`..`max` sits on the ends.

    `max` has no default because engines always have one (max_model_len, max_tokens) and KV memory depends on it.
    """

    mean_tokens: Positive = Field(alias="mean")
    min: Tokens = 1
    max: Tokens

    @model_validator(mode="after")
    def _ordered(self) -> Clamped:
        if self.min > self.max:
            raise ValueError(f"has min = {self.min} above max = {self.max}; swap them")
        return self

    @abstractmethod
    def cdf(self, x: Floats) -> Floats:
        """Distribution function of the law before rounding and clamping."""

    def masses(self) -> Pmf:
        """Mass of token k is F(k + 1/2) - F(k - 1/2); the ends take the tails. Lengths of no mass are not listed."""
        doublings = np.asarray(self.min * 2.0 ** np.arange(25), dtype=np.float64)
        full = doublings[self.cdf(doublings) == 1.0]
        values = np.arange(self.min, min(self.max, full.min(initial=self.max)) + 1, dtype=np.int64)
        upper = self.cdf(np.asarray(values + 0.5, dtype=np.float64))
        upper[-1] = 1.0
        return values, np.diff(upper, prepend=0.0)


class Geometric(Clamped):
    """Geometric on 1, 2, ... with mean `mean`: each token is the last with probability 1/mean."""

    law: Literal["geometric"]

    @model_validator(mode="after")
    def _mean(self) -> Geometric:
        if self.mean_tokens < 1:
            raise ValueError(f"has mean = {self.mean_tokens:g}, but a geometric length is at least 1 token; raise it")
        return self

    def cdf(self, x: Floats) -> Floats:
        """P(k <= x) = 1 - (1 - 1/mean)^floor(x)."""
        return np.asarray(1.0 - (1.0 - 1.0 / self.mean_tokens) ** np.floor(x))


class Lognormal(Clamped):
    """Lognormal with mean `mean` and coefficient of variation `cv` (both before clamping)."""

    law: Literal["lognormal"]
    cv: Positive

    def cdf(self, x: Floats) -> Floats:
        """Lognormal distribution function."""
        from scipy.stats import lognorm

        sigma = np.sqrt(np.log1p(self.cv**2))
        return np.asarray(lognorm.cdf(x, s=sigma, scale=self.mean_tokens / np.exp(sigma**2 / 2)))


class Gamma(Clamped):
    """Gamma with mean `mean` and coefficient of variation `cv` (both before clamping)."""

    law: Literal["gamma"]
    cv: Positive

    def cdf(self, x: Floats) -> Floats:
        """Gamma distribution function."""
        from scipy.stats import gamma

        shape = 1.0 / self.cv**2
        return np.asarray(gamma.cdf(x, a=shape, scale=self.mean_tokens / shape))


class Quantiles(LawBase):
    """Empirical quantiles: length `values[i]` at probability `probs[i]`, linear in between."""

    law: Literal["quantiles"]
    probs: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False, min_length=2)]
    values: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=2)]

    @model_validator(mode="after")
    def _shape(self) -> Quantiles:
        if len(self.probs) != len(self.values):
            raise ValueError(f"has {len(self.probs)} probs but {len(self.values)} values; give one value per prob")
        if self.probs[0] != 0 or self.probs[-1] != 1:
            raise ValueError("has probs that do not start at 0 (the minimum) and end at 1 (the maximum); add them")
        if any(b <= a for a, b in zip(self.probs, self.probs[1:], strict=False)):
            raise ValueError("has probs that do not increase strictly; correct them")
        if any(b < a for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError("has values that decrease; correct them")
        return self

    def masses(self) -> Pmf:
        """Masses of the piecewise linear distribution function, rounded to the nearest token."""
        values = np.arange(self.values[0], self.values[-1] + 1)
        knots, probs = np.asarray(self.values, float), np.asarray(self.probs)
        upper = _cdf_through(np.asarray(values + 0.5, dtype=np.float64), knots, probs)
        return values, np.diff(upper, prepend=0.0)


class Histogram(LawBase):
    """Lengths `values` with weights `weights` (any positive scale)."""

    law: Literal["histogram"]
    values: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1)]
    weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _shape(self) -> Histogram:
        if len(self.values) != len(self.weights):
            raise ValueError(f"has {len(self.values)} values but {len(self.weights)} weights; give one weight each")
        if sum(self.weights) <= 0:
            raise ValueError("has weights that are all zero; give at least one positive weight")
        return self

    def masses(self) -> Pmf:
        """Weights summed over equal values."""
        return _tally(np.asarray(self.values), np.asarray(self.weights, float))


class Mixture(LawBase):
    """A mixture of laws: part i with weight `weights[i]` (any positive scale)."""

    law: Literal["mixture"]
    parts: Annotated[tuple[Law, ...], Field(strict=False, min_length=1)]
    weights: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _shape(self) -> Mixture:
        if len(self.parts) != len(self.weights):
            raise ValueError(f"has {len(self.parts)} parts but {len(self.weights)} weights; give one weight per part")
        return self

    def masses(self) -> Pmf:
        """Weighted masses of the parts."""
        pmfs = [part.pmf for part in self.parts]
        values = np.concatenate([v for v, _ in pmfs])
        return _tally(values, np.concatenate([w * p for w, (_, p) in zip(self.weights, pmfs, strict=True)]))


Law = Annotated[
    Constant | Uniform | Geometric | Lognormal | Gamma | Quantiles | Histogram | Mixture,
    Field(discriminator="law"),
]


def _tally(values: Ints, weights: Floats) -> Pmf:
    unique, inverse = np.unique(values, return_inverse=True)
    return unique, np.asarray(np.bincount(inverse, weights=weights), dtype=np.float64)


def _cdf_through(x: Floats, knots: Floats, probs: Floats) -> Floats:
    """Distribution function through (knots, probs); equal knots make a jump, the last knot closes at 1."""
    upper = np.searchsorted(knots, x, side="right")
    low = np.clip(upper - 1, 0, len(knots) - 1)
    high = np.minimum(upper, len(knots) - 1)
    width = np.where(high > low, knots[high] - knots[low], 1.0)
    inside = np.clip((x - knots[low]) / width, 0.0, 1.0)
    return np.where(x >= knots[-1], 1.0, probs[low] + inside * (probs[high] - probs[low]))
