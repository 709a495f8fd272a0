"""Request classes and the workload: who arrives, how often, how long, and with which requirements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field, InstanceOf, model_validator

from llmopt.arrays import Bools, Floats, Ints
from llmopt.arrivals import Arrivals, Poisson, Replay, sample_arrivals
from llmopt.lengths import Law, Tokens
from llmopt.model import InputModel, Name

Function = Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Joint prompt and output lengths with equal weights, taken from a trace; arrays of shape (n,)."""

    prompt: Ints
    output: Ints


@dataclass(frozen=True, eq=False)
class Requests:
    """Sampled requests in order of arrival; every array has shape (n_requests,).

    `u` holds one uniform random number per request: every policy draws its own choices from it, so that two
    policies compared on one seed see the same luck.
    """

    arrival: Floats
    prompt: Ints
    output: Ints
    cls: Ints
    u: Floats

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival)

    def head(self, n: int) -> Requests:
        """The first `n` requests."""
        return self.part(slice(n))

    def part(self, which: slice | Bools) -> Requests:
        """The requests of a slice or a mask of shape (n_requests,)."""
        return Requests(self.arrival[which], self.prompt[which], self.output[which], self.cls[which], self.u[which])


class RequestClass(InputModel):
    """Alike requests.

    Give `share` (of the workload's rate) or `rate` (requests/s); the prompt and output laws, which are
    independent of each other; and, if there are any, the requirements `ttft` and `tpot` (s). `prompts = [low,
    high]` says which requests of a trace belong to the class: those with a prompt of that many tokens, ends
    included. With a trace the class has joint `pairs`; its laws are then their marginals, and share the trace's.
    """

    name: Name
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    rate: Annotated[float, Field(gt=0)] | None = None
    prompt: Law
    output: Law
    ttft: Annotated[float, Field(gt=0, le=3600)] | None = None
    tpot: Annotated[float, Field(gt=0, le=10)] | None = None
    prompts: Annotated[tuple[Tokens, Tokens], Field(strict=False)] | None = None
    pairs: Annotated[InstanceOf[Pairs] | None, Field(exclude=True)] = None

    @model_validator(mode="after")
    def _one_rate(self) -> RequestClass:
        if (self.share is None) == (self.rate is None):
            raise ValueError(f"(class {self.name!r}) needs exactly one of share and rate; give one of them")
        if self.prompts and self.prompts[0] > self.prompts[1]:
            raise ValueError(f"has prompts = {list(self.prompts)}, which is empty; give [low, high] with low <= high")
        return self

    def expect(self, of_prompt: Function, of_output: Function) -> float:
        """E[f(prompt) h(output)] for vectorised `f` and `h`, exact over the laws or the pairs."""
        if self.pairs is not None:
            return float(
                np.mean(of_prompt(self.pairs.prompt.astype(float)) * of_output(self.pairs.output.astype(float)))
            )
        return _mean(self.prompt, of_prompt) * _mean(self.output, of_output)

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length in tokens."""
        return self.expect(_identity, np.ones_like)

    @property
    def mean_output(self) -> float:
        """Mean output length in tokens."""
        return self.expect(np.ones_like, _identity)

    @property
    def largest(self) -> int:
        """Largest prompt + output in tokens that the class can send."""
        if self.pairs is not None:
            return int((self.pairs.prompt + self.pairs.output).max())
        return self.prompt.largest + self.output.largest

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
        """`n` prompt and output lengths, arrays of shape (n,)."""
        if self.pairs is not None:
            index = rng.integers(0, len(self.pairs.prompt), n)
            return self.pairs.prompt[index], self.pairs.output[index]
        return self.prompt.sample(rng.random(n)), self.output.sample(rng.random(n))


class TraceSource(InputModel):
    """A trace file: `file`, relative to the scenario file, in a known `format` or with `columns` named.

    Requests with more than `max_tokens` prompt and output tokens are left out, as an engine with that max_model_len
    refuses them. Rows that are no requests are refused unless `skip_bad_rows`.
    """

    file: str
    format: str | None = None
    columns: dict[str, str] | None = None
    max_tokens: Tokens | None = None
    skip_bad_rows: bool = False


class Workload(InputModel):
    """What arrives: total `rate` (requests/s) with class shares, or a rate per class; and the arrival process.

    A `replay` holds the requests of a trace with their recorded times; it is squeezed or stretched to `rate`, so
    that one key scales a real trace as it scales a synthetic process.
    """

    rate: Annotated[float, Field(gt=0, le=1e7)] | None = None
    arrivals: Arrivals = Poisson(law="poisson")
    classes: Annotated[tuple[RequestClass, ...], Field(strict=False, min_length=1)]
    trace: TraceSource | None = None
    replay: Annotated[InstanceOf[Requests] | None, Field(exclude=True)] = None

    @model_validator(mode="after")
    def _shares(self) -> Workload:
        names = [c.name for c in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"has repeated class names {names}; name each class once")
        by_share = [c.share is not None for c in self.classes]
        if any(by_share) != all(by_share):
            raise ValueError("has classes with share and classes with rate; use one kind for all")
        if all(by_share):
            _check_shares(self)
        elif self.rate is not None:
            raise ValueError("has rate and its classes have rates; drop one of the two")
        if isinstance(self.arrivals, Replay) != (self.replay is not None):
            raise ValueError("has arrivals law 'replay' but no trace; add [workload.trace] file or pass --trace FILE")
        return self

    @cached_property
    def rates(self) -> Floats:
        """Mean arrival rate of each class in requests/s, shape (n_classes,)."""
        if self.rate is None:
            return np.array([c.rate for c in self.classes], dtype=float)
        return np.array([self.rate * (c.share or 0.0) for c in self.classes])

    @property
    def total_rate(self) -> float:
        """Mean arrival rate of all classes together in requests/s."""
        return float(self.rates.sum())

    def sample(self, horizon: float, seed: int) -> Requests:
        """Requests that arrive in [0, horizon) seconds; the same seed gives the same bytes."""
        rng = np.random.default_rng(seed)
        if self.replay is not None:
            return _replayed(self.replay, self.total_rate, horizon, rng)
        arrival = sample_arrivals(self.arrivals, self.total_rate, horizon, rng)
        cls = np.searchsorted(np.cumsum(self.rates / self.total_rate)[:-1], rng.random(len(arrival)), side="right")
        prompt, output = np.zeros(len(arrival), np.int64), np.zeros(len(arrival), np.int64)
        for c, one in enumerate(self.classes):
            mine = np.flatnonzero(cls == c)
            prompt[mine], output[mine] = one.sample(rng, len(mine))
        return Requests(arrival, prompt, output, cls.astype(np.int64), rng.random(len(arrival)))


def _check_shares(workload: Workload) -> None:
    total = sum(c.share or 0.0 for c in workload.classes)
    if workload.rate is None:
        raise ValueError("has no rate; classes with shares need the total rate in requests/s")
    if abs(total - 1) > 1e-6:
        raise ValueError(f"has class shares that sum to {total:g}, not 1; scale them to fractions")


def extent(arrival: Floats) -> float:
    """Seconds that sorted arrivals stand for: the span and one more mean gap; n / extent is their mean rate."""
    return float((arrival[-1] - arrival[0]) * len(arrival) / (len(arrival) - 1))


def _replayed(replay: Requests, rate: float, horizon: float, rng: np.random.Generator) -> Requests:
    """The replay at the given mean rate; between seeds only the random numbers of the policies differ."""
    arrival = replay.arrival * (len(replay) / extent(replay.arrival) / rate)
    n = int(np.searchsorted(arrival, horizon, side="left"))
    return Requests(arrival[:n], replay.prompt[:n], replay.output[:n], replay.cls[:n], rng.random(n))


def _identity(x: Floats) -> Floats:
    return x


def _mean(law: Law, f: Function) -> float:
    values, probs = law.pmf
    return float((f(values.astype(float)) * probs).sum())
