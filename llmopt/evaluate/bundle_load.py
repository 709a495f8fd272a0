"""The load series of a saturated bundle: KV tokens of every Attention worker's micro-batches, step by step.

All B slots of a micro-batch are always occupied: the step after a request's last one, its slot holds the next request.
In step k = 0, 1, ... of its D a request with prompt P loads its slot with P + k tokens, as in `llmopt.slots`. The
series depends neither on the A/F ratio nor on times, so that one series serves every ratio (section 4.2 of the notes on
Song et al., arXiv 2601.21351).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.workload import RequestClass

Start = Literal["cold", "stationary"]
MOST_LOADS = 2**26
"""Numbers in one series at most: half a gigabyte."""
MOST_DRAWS = 2**21
"""Requests drawn at a time at most, unless there are more slots."""


def load_series(
    classes: Sequence[RequestClass],
    rates: Floats,
    first_step: int,
    bundle: Bundle,
    workers: int,
    steps: int,
    seed: int,
    start: Start = "stationary",
) -> Floats:
    """KV tokens at the start of each step, whole numbers, shape (M, steps, workers); M is 1 if the pipeline is ideal.

    Every series has its own random numbers, from (seed, worker, micro-batch): a worker's are the same among few workers
    as among many. O(requests + steps) for each.

    Parameters
    ----------
    rates
        Requests/s of each class, shape (n_classes,); only their proportions matter.
    first_step
        1 if the prefill gives the first token, so that a request stays output - 1 steps; a request that stays none
        never occupies a slot.
    start
        ``cold``: every slot begins with a new request. ``stationary``: as at a random time, with a request whose D is
        met with probability proportional to D, at an age uniform on 0..D-1.

    Raises
    ------
    ScenarioError
        If workers or steps are not positive, the series would not fit into memory, or no request stays a single step.
    """
    micro_batches = 1 if bundle.pipeline == "ideal" else bundle.micro_batches
    _check_size(workers, steps, micro_batches)
    law = _Law(tuple(classes), np.asarray(rates, dtype=float), first_step)
    if law.mean_decode <= 0:
        raise ScenarioError("no request stays a single decode step, so that no slot is ever loaded; lengthen outputs")
    series = np.empty((micro_batches, steps, workers))
    for m in range(micro_batches):
        for j in range(workers):
            series[m, :, j] = _one(law, bundle.batch, steps, start, np.random.default_rng([seed, j, m]))
    return series


def _check_size(workers: int, steps: int, micro_batches: int) -> None:
    if workers < 1 or steps < 1:
        raise ScenarioError(f"a load series of {steps} steps on {workers} workers is empty; give at least 1 of both")
    if micro_batches * steps * workers > MOST_LOADS:
        raise ScenarioError(
            f"a load series of {steps} steps for {micro_batches} micro-batches on {workers} workers needs more than "
            f"{MOST_LOADS} numbers; lower evaluation.requests or fleet.most_attention"
        )


@dataclass(frozen=True)
class _Law:
    """The joint law of P and D under the mix of classes."""

    classes: tuple[RequestClass, ...]
    rates: Floats
    first_step: int

    def _decode(self, output: Floats) -> Floats:
        return output - self.first_step

    @cached_property
    def stays(self) -> Floats:
        """Mean steps of each class, shape (n_classes,)."""
        return np.array([cls.expect(np.ones_like, self._decode) for cls in self.classes])

    @cached_property
    def mean_decode(self) -> float:
        """Mean steps of a request."""
        return float(self.rates @ self.stays / self.rates.sum())

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
        """P and D of `n` requests in the order in which they arrive, arrays of shape (n,)."""
        prompt, decode = np.empty(n, np.int64), np.empty(n, np.int64)
        for cls, mine in self._mixed(self.rates, rng, n):
            prompt[mine], output = cls.sample(rng, len(mine))
            decode[mine] = output - self.first_step
        return prompt, decode

    def draw_met(self, rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
        """P and D of `n` requests met in their slots at a random time: D times as likely as they arrive."""
        prompt, decode = np.empty(n, np.int64), np.empty(n, np.int64)
        for cls, mine in self._mixed(self.rates * self.stays, rng, n):
            prompt[mine], decode[mine] = _met(cls, self.first_step, rng, len(mine))
        return prompt, decode

    def _mixed(self, weights: Floats, rng: np.random.Generator, n: int) -> list[tuple[RequestClass, Ints]]:
        """Each class and which of `n` requests are its own, drawn with probabilities proportional to `weights`."""
        if len(self.classes) == 1:
            return [(self.classes[0], np.arange(n))]
        cls = _chosen(weights, rng, n)
        return [(one, np.flatnonzero(cls == c)) for c, one in enumerate(self.classes)]


def _met(cls: RequestClass, first_step: int, rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
    if cls.pairs is not None:
        decode = cls.pairs.output - first_step
        index = _chosen(decode.astype(float), rng, n)
        return cls.pairs.prompt[index], decode[index]
    output, probs = cls.output.pmf
    decode = output - first_step
    return cls.prompt.sample(rng.random(n)), decode[_chosen(decode * probs, rng, n)]


def _chosen(weights: Floats, rng: np.random.Generator, n: int) -> Ints:
    """`n` indices with probabilities proportional to `weights`; one of weight 0 is never chosen."""
    edges = np.cumsum(weights)
    last = int(np.flatnonzero(weights)[-1]) if np.any(weights) else 0
    return np.asarray(np.minimum(np.searchsorted(edges, rng.random(n) * edges[-1], side="right"), last), np.int64)


def _one(law: _Law, batch: int, steps: int, start: Start, rng: np.random.Generator) -> Floats:
    """KV tokens of `batch` slots, shape (steps,).

    A request in its slot since step s has the load (P - s) + k in step k. The slots are never empty, so that the sum of
    the second parts is batch * k, and that of the first ones changes only where a request follows another.
    """
    if start == "stationary":
        prompt, decode = law.draw_met(rng, batch)
        since = -rng.integers(0, decode)
    else:
        prompt, decode = law.draw(rng, batch)
        since = np.zeros(batch, np.int64)
    level, end = prompt - since, since + decode
    change = np.zeros(steps)
    change[0] = level.sum()
    while (alive := np.flatnonzero(end < steps)).size:
        level, end = _followed(law, level[alive], end[alive], change, rng)
    return np.cumsum(change) + batch * np.arange(steps, dtype=float)


def _followed(law: _Law, level: Ints, end: Ints, change: Floats, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Several requests more in every slot: their effect is added to `change`; the level and end of each slot's last.

    level: P - s of the request in the slot; end: first step after it.
    """
    slots, steps = len(end), len(change)
    most = max(1, MOST_DRAWS // slots)
    each = min(most, 1 + int(np.mean(steps - end) / law.mean_decode))
    prompt, decode = (x.reshape(slots, each) for x in law.draw(rng, slots * each))
    ends = end[:, None] + np.cumsum(decode, axis=1)
    begins = ends - decode
    levels = prompt - begins
    jumps = np.diff(levels, prepend=level[:, None])
    inside = begins < steps
    change += np.bincount(begins[inside], weights=jumps[inside], minlength=steps)
    return levels[:, -1], ends[:, -1]
