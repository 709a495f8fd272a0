"""Arrival processes: a gap law run through a rate profile.

Every synthetic process is a point process of unit rate whose clock runs at the profile's rate, so one sampler
serves Poisson, smooth, bursty and batched arrivals under constant, daily and on/off rates.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from llmopt.arrays import Floats
from llmopt.lengths import Positive
from llmopt.model import InputModel

Variation = Annotated[float, Field(gt=0, le=100)]


SMALLEST = 1e-9
"""Least positive factor of a profile beside its largest; below it, scaling to a mean of 1 would overflow."""
PULSE = 1 / 1000
"""Part of the horizon that stands for an instant in the profile of arrivals that come together."""


class ArrivalsBase(InputModel):
    """A stationary process; the mean rate comes from the workload."""

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps at constant rate."""
        return 1.0

    def profile(self, horizon: float) -> tuple[Floats, Floats]:
        """Start times (s, the first 0) and rate factors of the constant pieces up to `horizon`."""
        return np.zeros(1), np.ones(1)

    def epochs(self, length: float, rng: np.random.Generator) -> Floats:
        """Arrivals in [0, length) on a clock of unit rate, in increasing order."""
        return _unit_renewals(self.gap_cv, length, rng)


class Poisson(ArrivalsBase):
    """Exponential gaps."""

    law: Literal["poisson"]


class GammaGaps(ArrivalsBase):
    """Gamma gaps with coefficient of variation `cv` (1 is Poisson, above 1 bursty)."""

    law: Literal["gamma"]
    cv: Variation

    @property
    def gap_cv(self) -> float:
        """As given."""
        return self.cv


class Deterministic(ArrivalsBase):
    """Equal gaps."""

    law: Literal["deterministic"]

    @property
    def gap_cv(self) -> float:
        """Zero."""
        return 0.0


class Piecewise(ArrivalsBase):
    """Rates by time of day: from `times[i]` seconds on the rate is in proportion to `factors[i]`.

    With `period` (s) the profile repeats. Only the ratios of the factors matter: they are scaled so that the mean
    over a period, or over the horizon if there is none, is the workload's rate.
    """

    law: Literal["piecewise"]
    times: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    factors: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    period: Positive | None = None
    cv: Annotated[float, Field(ge=0, le=100)] = 1.0

    @model_validator(mode="after")
    def _shape(self) -> Piecewise:
        if len(self.times) != len(self.factors):
            raise ValueError(f"has {len(self.times)} times but {len(self.factors)} factors; give one factor per time")
        if self.times[0] != 0 or any(b <= a for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("has times that do not start at 0 and increase strictly; correct them")
        if self.period is not None and self.period <= self.times[-1]:
            raise ValueError(f"has period = {self.period:g}, before the last time {self.times[-1]:g}; make it longer")
        if max(self.factors) == 0:
            raise ValueError("has factors that are all zero; nothing would arrive, so give a positive one")
        least = min(f for f in self.factors if f > 0)
        if least < SMALLEST * max(self.factors):
            raise ValueError(f"has a factor of {least:g} beside one of {max(self.factors):g}; write 0 for none at all")
        return self

    @property
    def gap_cv(self) -> float:
        """As given."""
        return self.cv

    def profile(self, horizon: float) -> tuple[Floats, Floats]:
        """The given pieces, scaled to a mean of 1 and repeated every `period` up to `horizon`."""
        times, factors = np.asarray(self.times, float), np.asarray(self.factors, float)
        span = self.period or horizon
        stay = np.diff(np.append(np.minimum(times, span), span))
        factors = factors * span / float(stay @ factors) if stay @ factors > 0 else factors
        laps = max(1, int(np.ceil(horizon / self.period))) if self.period else 1
        return (times + span * np.arange(laps)[:, None]).ravel(), np.tile(factors, laps)


class Bursts(ArrivalsBase):
    """On/off bursts: `on` seconds at a high rate, `off` seconds at `floor` x the mean rate; the mean is kept."""

    law: Literal["bursts"]
    on: Positive
    off: Positive
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    cv: Annotated[float, Field(ge=0, le=100)] = 1.0

    @property
    def gap_cv(self) -> float:
        """As given."""
        return self.cv

    @property
    def peak(self) -> float:
        """Rate factor during a burst, such that the time average is 1."""
        return (self.on + self.off * (1 - self.floor)) / self.on

    def profile(self, horizon: float) -> tuple[Floats, Floats]:
        """Off first, then on, repeated: a run starts calm."""
        laps = max(1, int(np.ceil(horizon / (self.on + self.off))))
        starts = (self.on + self.off) * np.arange(laps)
        return np.column_stack([starts, starts + self.off]).ravel(), np.tile([self.floor, self.peak], laps)


class Batches(ArrivalsBase):
    """`size` requests at the same instant, every `size` / rate seconds on average; `cv` is that of these gaps.

    Averages over time, such as the fluid model's, see the even flow.
    """

    law: Literal["batches"]
    size: Annotated[int, Field(ge=1, le=1_000_000)]
    cv: Annotated[float, Field(ge=0, le=100)] = 0.0

    @property
    def gap_cv(self) -> float:
        """As given: of the gaps between batches."""
        return self.cv

    def epochs(self, length: float, rng: np.random.Generator) -> Floats:
        """Renewals at the rate of the batches, each `size` times."""
        return np.repeat(self.size * _unit_renewals(self.cv, length / self.size, rng), self.size)


class Together(ArrivalsBase):
    """The rate x horizon requests of a run, rounded, all at time 0; then nobody."""

    law: Literal["together"]

    def profile(self, horizon: float) -> tuple[Floats, Floats]:
        """All of the rate in the first `PULSE` of the horizon, which is what the fluid model can see of an instant."""
        return np.array([0.0, horizon * PULSE]), np.array([1 / PULSE, 0.0])

    def epochs(self, length: float, rng: np.random.Generator) -> Floats:
        """As many as are due, all at once."""
        return np.zeros(round(length))


class Replay(ArrivalsBase):
    """The arrival times of a trace; `time_scale` 0.5 squeezes them into half the time (twice the rate)."""

    law: Literal["replay"]
    time_scale: Positive = 1.0


Arrivals = Annotated[
    Poisson | GammaGaps | Deterministic | Piecewise | Bursts | Batches | Together | Replay, Field(discriminator="law")
]


def sample_arrivals(process: ArrivalsBase, rate: float, horizon: float, rng: np.random.Generator) -> Floats:
    """Arrival times in [0, horizon) seconds at mean `rate` requests/s, shape (n,)."""
    starts, factors = process.profile(horizon)
    starts, factors = starts[starts < horizon], factors[starts < horizon]
    clock = np.concatenate([[0.0], np.cumsum(rate * factors * np.diff(np.append(starts, horizon)))])
    ticks = process.epochs(float(clock[-1]), rng)
    edges = np.append(starts, horizon)
    return _invert(ticks, clock, edges)


def _invert(ticks: Floats, clock: Floats, edges: Floats) -> Floats:
    """Times at which the clock shows `ticks`; stretches where it stands still get no arrivals."""
    piece = np.clip(np.searchsorted(clock, ticks, side="right") - 1, 0, len(clock) - 2)
    speed = np.diff(clock)[piece] / np.diff(edges)[piece]
    return np.asarray(edges[piece] + (ticks - clock[piece]) / speed)


def _unit_renewals(cv: float, length: float, rng: np.random.Generator) -> Floats:
    """Renewal epochs in [0, length) with unit mean gaps of the given coefficient of variation.

    The process is stationary: the first epoch is the rest of a gap that began before 0 (a uniform part of a
    length-biased gap, which for gamma gaps has one more in the shape), so that the mean count is exactly `length`.
    """
    if cv < 1e-6:
        return np.arange(0.5, length, 1.0)
    shape = 1 / cv**2
    ticks = np.array([rng.random() * rng.standard_gamma(shape + 1) / shape])
    while ticks[-1] < length:
        n = int((length - ticks[-1]) * 1.02 + 10 * (1 + cv) * np.sqrt(length + 1)) + 16
        ticks = np.append(ticks, ticks[-1] + np.cumsum(rng.standard_gamma(shape, n) / shape))
    return ticks[ticks < length]
