"""What an always occupied batch slot holds: the KV load of a slot in steady state, for any joint law of lengths.

A slot serves one request after the other without a pause. A request with prompt P that stays D steps loads its slot
with P + k KV tokens in its k-th step, k = 0..D-1; D counts the output tokens computed here, all of them or, where the
prefill gives the first token, one less. By renewal-reward over one request

    theta = E[D P + D (D - 1) / 2] / E[D],    m2 = E[D P^2 + P D (D - 1) + D (D - 1) (2 D - 1) / 6] / E[D],

and nu^2 = m2 - theta^2 is the variance of the load at a random time (derived from section 2.2 of the notes on v2 to v4
of Song et al., arXiv 2601.21351; both are ratios of means, never means of ratios).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.workload import RequestClass


@dataclass(frozen=True)
class SlotLoad:
    """KV load of one slot.

    theta: mean, tokens; variance: nu^2, tokens^2; mean_prompt, mean_decode: of the requests, tokens and steps;
    error: standard error of theta as an estimate, 0 for a given law; requests: how many it was estimated from, 0 for
    a law.
    """

    theta: float
    variance: float
    mean_prompt: float
    mean_decode: float
    error: float = 0.0
    requests: int = 0

    @property
    def deviation(self) -> float:
        """nu, tokens."""
        return float(np.sqrt(self.variance))


def slot_load(classes: Sequence[RequestClass], rates: Floats, first_step: int = 0) -> SlotLoad:
    """The load under a mix of classes with `rates` of shape (n_classes,); exact over laws, estimated from pairs.

    first_step: 1 if the prefill gives the first token, so that a request stays output - 1 steps.

    Raises
    ------
    ScenarioError
        If no request stays a single step.
    """
    weights = np.asarray(rates, dtype=float) / np.sum(rates)
    means = weights @ np.array([_means(cls, first_step) for cls in classes])
    prompt, decode, load, square = (float(x) for x in means)
    if decode <= 0:
        raise ScenarioError("no request stays a single decode step, so that no slot is ever loaded; lengthen outputs")
    theta = load / decode
    sizes = [0 if cls.pairs is None else len(cls.pairs.prompt) for cls in classes]
    error = _error(classes, weights, sizes, theta, decode, first_step) if all(sizes) else 0.0
    return SlotLoad(theta, max(0.0, square / decode - theta**2), prompt, decode, error, sum(sizes) if all(sizes) else 0)


def slot_load_of(prompt: Ints, decode: Ints) -> SlotLoad:
    """The load estimated from lengths of shape (n,): prompts in tokens, decode steps; the error takes them as i.i.d.

    Raises
    ------
    ScenarioError
        If there are none, or none stays a step.
    """
    if len(prompt) == 0 or np.sum(decode) <= 0:
        raise ScenarioError("there are no requests to estimate a slot's load from; give a trace with outputs")
    p, d = np.asarray(prompt, dtype=float), np.asarray(decode, dtype=float)
    load, square = area(p, d), area_of_square(p, d)
    theta = float(load.mean() / d.mean())
    spread = float(np.std(load - theta * d, ddof=1)) if len(p) > 1 else float("inf")
    error = spread / (np.sqrt(len(p)) * float(d.mean()))
    variance = max(0.0, float(square.mean() / d.mean()) - theta**2)
    return SlotLoad(theta, variance, float(p.mean()), float(d.mean()), float(error), len(p))


def area(prompt: Floats, decode: Floats) -> Floats:
    """KV tokens summed over the steps of a request, D P + D (D - 1) / 2."""
    return np.asarray(decode * prompt + decode * (decode - 1) / 2)


def area_of_square(prompt: Floats, decode: Floats) -> Floats:
    """Squares of its KV tokens summed over its steps, D P^2 + P D (D - 1) + D (D - 1) (2 D - 1) / 6."""
    d = decode
    return np.asarray(d * prompt**2 + prompt * d * (d - 1) + d * (d - 1) * (2 * d - 1) / 6)


def _means(cls: RequestClass, first_step: int) -> list[float]:
    """E of P, D, the area and the area of the square; products of a function of P and one of D."""

    def steps(o: Floats) -> Floats:
        return o - first_step

    one = np.ones_like
    decode = cls.expect(one, steps)
    ages = cls.expect(one, lambda o: steps(o) * (steps(o) - 1) / 2)
    square = (
        cls.expect(np.square, steps)
        + cls.expect(lambda s: s, lambda o: steps(o) * (steps(o) - 1))
        + cls.expect(one, lambda o: steps(o) * (steps(o) - 1) * (2 * steps(o) - 1) / 6)
    )
    return [cls.mean_prompt, decode, cls.expect(lambda s: s, steps) + ages, square]


def _error(
    classes: Sequence[RequestClass], weights: Floats, sizes: Sequence[int], theta: float, decode: float, first: int
) -> float:
    """sd(Y - theta D) / (sqrt(n) E[D]) with Y the area, over the pairs of all classes."""
    second = 0.0
    for cls, weight in zip(classes, weights, strict=True):
        assert cls.pairs is not None
        p, d = cls.pairs.prompt.astype(float), cls.pairs.output.astype(float) - first
        second += float(weight * np.mean((area(p, d) - theta * d) ** 2))
    n = sum(sizes)
    return float(np.sqrt(second / max(n - 1, 1)) / decode)
