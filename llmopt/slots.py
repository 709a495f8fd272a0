"""What an always occupied batch slot holds: the KV load of a slot in steady state, for any joint law of lengths.

A slot serves one request after the other without a pause. A request with prompt P that stays D steps loads its slot
with P + k KV tokens in its k-th step, k = 0..D-1; D counts the output tokens computed here, all of them or, where the
prefill gives the first token, one less. By renewal-reward over one request

    theta = E[D P + D (D - 1) / 2] / E[D],    m2 = E[D P^2 + P D (D - 1) + D (D - 1) (2 D - 1) / 6] / E[D],

and nu^2 = m2 - theta^2 is the variance of the load at a random time (derived from section 2.2 of the notes on v2 to v4
of Song et al., arXiv 2601.21351; both are ratios of means, never means of ratios).

The standard error of theta from n requests is that of a ratio, sd(Y - theta D) / (sqrt(n) mean D) with Y the sum of the
loads over a request's steps, if requests are independent. Lengths of a recorded trace drift; then sums of Y - theta D
over blocks of consecutive requests vary more than independence allows, and the error is taken from them (batch means).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.workload import RequestClass, Requests

BLOCKS = 20
"""Blocks of consecutive requests for the error of a recorded trace; it needs at least two requests in each."""


@dataclass(frozen=True)
class SlotLoad:
    """KV load of one slot.

    theta: mean, tokens; variance: nu^2, tokens^2; mean_prompt, mean_decode: of the requests, tokens and steps;
    error: standard error of theta as an estimate, 0 for a given law; requests: how many it was estimated from, 0 for
    a law; blocks: how many blocks of consecutive requests gave the error, 0 if the requests were taken as independent.
    """

    theta: float
    variance: float
    mean_prompt: float
    mean_decode: float
    error: float = 0.0
    requests: int = 0
    blocks: int = 0

    @property
    def deviation(self) -> float:
        """nu, tokens."""
        return float(np.sqrt(self.variance))


def slot_load(
    classes: Sequence[RequestClass], rates: Floats, first_step: int = 0, recorded: Requests | None = None
) -> SlotLoad:
    """The load under a mix of classes with `rates` of shape (n_classes,); exact over laws, estimated from pairs.

    first_step: 1 if the prefill gives the first token, so that a request stays output - 1 steps. recorded: the requests
    of the pairs in order of arrival, if it is known; the error is then the larger one of independent requests and of
    blocks.

    Raises
    ------
    ScenarioError
        If no request stays a single step.
    """
    weights = np.asarray(rates, dtype=float) / np.sum(rates)
    means = weights @ np.array([request_means(cls, first_step) for cls in classes])
    prompt, decode, load, square = (float(x) for x in means)
    if decode <= 0:
        raise ScenarioError("no request stays a single decode step, so that no slot is ever loaded; lengthen outputs")
    theta, sizes = load / decode, [0 if cls.pairs is None else len(cls.pairs.prompt) for cls in classes]
    found = SlotLoad(theta, max(0.0, square / decode - theta**2), prompt, decode)
    if not all(sizes):
        return found
    found = replace(found, error=_error(classes, weights, sum(sizes), found, first_step), requests=sum(sizes))
    return found if recorded is None else _by_blocks(found, recorded.prompt, recorded.output - first_step)


def slot_load_of(prompt: Ints, decode: Ints, ordered: bool = False) -> SlotLoad:
    """The load estimated from lengths of shape (n,): prompts in tokens, decode steps.

    ordered: they are in order of arrival, so that the error is the larger one of independent requests and of blocks.

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
    found = SlotLoad(theta, variance, float(p.mean()), float(d.mean()), float(error), len(p))
    return _by_blocks(found, prompt, decode) if ordered else found


def block_error(prompt: Ints, decode: Ints, theta: float, blocks: int = BLOCKS) -> float:
    """Standard error of theta from requests of shape (n,) in order of arrival, cut into `blocks` blocks.

    With R_b the sum of Y - theta D over block b it is sqrt(sum_b R_b^2 blocks / (blocks - 1)) / sum D, and holds as
    long as a block is much longer than the memory of the lengths.

    Raises
    ------
    ScenarioError
        If the requests do not fill at least two blocks.
    """
    if not 2 <= blocks <= len(prompt):
        raise ScenarioError(f"{len(prompt)} requests cannot be cut into {blocks} blocks; give 2 to {len(prompt)}")
    p, d = np.asarray(prompt, dtype=float), np.asarray(decode, dtype=float)
    residuals = np.add.reduceat(area(p, d) - theta * d, np.arange(blocks) * len(p) // blocks)
    return float(np.sqrt((residuals**2).sum() * blocks / (blocks - 1)) / d.sum())


def area(prompt: Floats, decode: Floats) -> Floats:
    """KV tokens summed over the steps of a request, D P + D (D - 1) / 2."""
    return np.asarray(decode * prompt + decode * (decode - 1) / 2)


def area_of_square(prompt: Floats, decode: Floats) -> Floats:
    """Squares of its KV tokens summed over its steps, D P^2 + P D (D - 1) + D (D - 1) (2 D - 1) / 6."""
    d = decode
    return np.asarray(d * prompt**2 + prompt * d * (d - 1) + d * (d - 1) * (2 * d - 1) / 6)


def request_means(cls: RequestClass, first_step: int, context: float = 1.0) -> list[float]:
    """E of P, D, the area and the area of the square, with all prompts `context` times as long: tokens, steps."""

    def steps(o: Floats) -> Floats:
        return o - first_step

    one = np.ones_like
    decode = cls.expect(one, steps)
    ages = cls.expect(one, lambda o: steps(o) * (steps(o) - 1) / 2)
    square = (
        context**2 * cls.expect(np.square, steps)
        + context * cls.expect(lambda s: s, lambda o: steps(o) * (steps(o) - 1))
        + cls.expect(one, lambda o: steps(o) * (steps(o) - 1) * (2 * steps(o) - 1) / 6)
    )
    return [context * cls.mean_prompt, decode, context * cls.expect(lambda s: s, steps) + ages, square]


def _error(classes: Sequence[RequestClass], weights: Floats, requests: int, load: SlotLoad, first_step: int) -> float:
    """sd(Y - theta D) / (sqrt(n) E[D]) with Y the area, over the pairs of all classes."""
    second = 0.0
    for cls, weight in zip(classes, weights, strict=True):
        assert cls.pairs is not None
        p, d = cls.pairs.prompt.astype(float), cls.pairs.output.astype(float) - first_step
        second += float(weight * np.mean((area(p, d) - load.theta * d) ** 2))
    return float(np.sqrt(second / (requests - 1)) / load.mean_decode) if requests > 1 else float("inf")


def _by_blocks(load: SlotLoad, prompt: Ints, decode: Ints) -> SlotLoad:
    """The load with the error of blocks, if there are requests enough for them and it is the larger one."""
    error = block_error(prompt, decode, load.theta) if len(prompt) >= 2 * BLOCKS else 0.0
    return replace(load, error=error, blocks=BLOCKS) if error > load.error else load
