"""Predictions of output lengths: what a batching rule knows of a request before it runs.

A predictor is data of the scenario, so that one key turns an oracle into a noisy guess and a comparison shows how a
rule fares as the error grows. It says for every request a best guess and an interval, all in whole tokens between 1 and
the most that fits beside the prompt. What it draws depends on the request's own random number alone: every policy, and
every error level, sees the same luck.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import PolicyError
from llmopt.lengths import Tokens
from llmopt.model import InputModel
from llmopt.workload import RequestClass, Requests


class Predicted(NamedTuple):
    """Predicted output tokens: best guess and interval, whole numbers of shape (n_requests,)."""

    point: Ints
    low: Ints
    high: Ints


class PredictorBase(InputModel, ABC):
    """A predictor of output lengths."""

    @abstractmethod
    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """Point, low and high before they are rounded and capped, arrays of shape (n_requests,)."""

    def predict(self, requests: Requests, classes: Sequence[RequestClass], room: int) -> Predicted:
        """Predictions for all requests, cut to 1 and to what fits into `room` tokens beside the prompt.

        Raises
        ------
        ValueError
            If the guess is not finite.
        """
        most = np.maximum(room - requests.prompt, 1)
        point, low, high = self.guess(requests, classes)
        if not all(np.isfinite(np.asarray(values, dtype=float)).all() for values in (point, low, high)):
            raise ValueError("its guess has NaN or infinite entries")
        whole = (np.rint(point), np.ceil(low), np.floor(high))
        best, least, largest = (np.clip(values, 1, most).astype(np.int64) for values in whole)
        return Predicted(best, np.minimum(least, best), np.maximum(largest, best))


class Oracle(PredictorBase):
    """The true output length."""

    law: Literal["oracle"]

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """The truth three times."""
        truth = requests.output.astype(float)
        return truth, truth, truth


class Noise(PredictorBase):
    """The truth times `factor` times a lognormal error: log(point / truth) ~ Normal(log factor, sigma^2).

    The interval is the point times exp(-2 sigma) to exp(2 sigma), and need not hold the truth.
    """

    law: Literal["noise"]
    sigma: Annotated[float, Field(ge=0, le=10)]
    factor: Annotated[float, Field(gt=0, le=1000)] = 1.0

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """Truth and error of each request."""
        from scipy.special import ndtri

        error = np.exp(self.sigma * ndtri(luck(requests.u, 1)))
        point = np.maximum(np.rint(requests.output * self.factor * error), 1.0)
        return point, point * np.exp(-2 * self.sigma), point * np.exp(2 * self.sigma)


class Interval(PredictorBase):
    """An interval around the truth whose ends differ by up to a `factor`: [o / f^v, o f^(1 - v)], v uniform in [0, 1).

    The point is its geometric middle.
    """

    law: Literal["interval"]
    factor: Annotated[float, Field(ge=1, le=1e6)]

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """Whole tokens inside the interval, the truth among them."""
        place = luck(requests.u, 2)
        low = np.minimum(np.ceil(requests.output / self.factor**place), requests.output)
        high = np.maximum(np.floor(requests.output * self.factor ** (1 - place)), requests.output)
        return np.sqrt(low * high), low, high


class Buckets(PredictorBase):
    """Which of the buckets [edge, next edge) the output falls into, as a length classifier says.

    The point is its middle. Below the first edge the bucket begins at 1; from the last edge on it ends at the largest
    output of the class.
    """

    law: Literal["buckets"]
    edges: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _increasing(self) -> Buckets:
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"has edges = {list(self.edges)}, which do not increase; sort them and drop repeats")
        return self

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """Ends and middle of the bucket of each request."""
        edges = np.array(self.edges, dtype=float)
        k = np.searchsorted(edges, requests.output, side="right")
        largest = _of_class(requests, classes, lambda c: float(_outputs(c)[-1]))
        low = np.append(1.0, edges)[k]
        high = np.maximum(np.append(edges - 1, np.inf)[k], low)
        high = np.where(np.isinf(high), np.maximum(largest, low), high)
        return (low + high) / 2, low, high


class Quantile(PredictorBase):
    """The `q` quantile of the outputs of the request's class, the same for all of the class."""

    law: Literal["quantile"]
    q: Annotated[float, Field(ge=0, le=1)]

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """The quantile between 1 and the largest output of the class."""
        point = _of_class(requests, classes, lambda c: float(np.quantile(_outputs(c), self.q, method="inverted_cdf")))
        return point, np.ones(len(requests)), _of_class(requests, classes, lambda c: float(_outputs(c)[-1]))


class ClassMean(PredictorBase):
    """The mean output of the request's class."""

    law: Literal["class-mean"]

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """The mean between 1 and the largest output of the class."""
        point = _of_class(requests, classes, lambda c: c.mean_output)
        return point, np.ones(len(requests)), _of_class(requests, classes, lambda c: float(_outputs(c)[-1]))


class Unknown(PredictorBase):
    """Nothing but the largest output of all classes, which an engine knows as its max_tokens."""

    law: Literal["none"]

    def guess(self, requests: Requests, classes: Sequence[RequestClass]) -> tuple[Floats, Floats, Floats]:
        """Anything from 1 to the largest, which is also the point."""
        most = np.full(len(requests), max(float(_outputs(c)[-1]) for c in classes))
        return most, np.ones(len(requests)), most


Predictor = Annotated[Oracle | Noise | Interval | Buckets | Quantile | ClassMean | Unknown, Field(discriminator="law")]
ORACLE = Oracle(law="oracle")


def check_predicted(predicted: Predicted, requests: Requests, room: int, policy: str) -> None:
    """Refuse predictions that no request can have, whoever made them.

    Raises
    ------
    PolicyError
        For predictions that are not whole numbers, below 1, more than `room` tokens hold beside the prompt, or an
        interval whose ends are in the wrong order; naming the first request.
    """
    for name, values in zip(Predicted._fields, predicted, strict=True):
        if not isinstance(values, np.ndarray) or values.shape != (len(requests),) or values.dtype.kind not in "iu":
            raise PolicyError(
                f"policy {policy!r}: {name} predictions must be whole numbers of shape ({len(requests)},)"
            )
        _refuse(values < 1, f"predicts {name} = {{}} output tokens; give at least 1", values, policy)
        wrong = values > np.maximum(room - requests.prompt, 1)
        _refuse(wrong, f"predicts {name} = {{}} output tokens, more than fit in memory; cap them", values, policy)
    _refuse(predicted.low > predicted.high, "predicts low = {} above high; swap them", predicted.low, policy)


def luck(u: Floats, stream: int) -> Floats:
    """Uniform random numbers in (0, 1), one for each `u` of shape (n,), independent of u and of other streams.

    A hash of the bits of u (the finaliser of splitmix64, Steele, Lea and Flood, OOPSLA 2014).
    """
    step = stream * 0x9E3779B97F4A7C15 % 2**64
    x = np.ascontiguousarray(u, dtype=np.float64).view(np.uint64) + np.uint64(step)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return np.asarray(((x >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52)


def _outputs(cls: RequestClass) -> Ints:
    """Outputs of a class in increasing order: those of its trace, or one for each small part of its law."""
    if cls.pairs is not None:
        return np.sort(cls.pairs.output)
    values, _ = cls.output.pmf
    inside = cls.output.sample((np.arange(4096) + 0.5) / 4096)
    return np.append(inside, values[-1])


def _of_class(requests: Requests, classes: Sequence[RequestClass], figure: Callable[[RequestClass], float]) -> Floats:
    return np.array([figure(c) for c in classes])[requests.cls]


def _refuse(wrong: Bools, sentence: str, values: Ints, policy: str) -> None:
    if wrong.any():
        i = int(np.argmax(wrong))
        raise PolicyError(f"policy {policy!r}: request {i} " + sentence.format(values[i]))
