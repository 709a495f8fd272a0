"""A class mix as one replica sees it: exact means per request, and a fixed sample of requests for what fluctuates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.moments import Engine, moments
from llmopt.scenario import Pool
from llmopt.workload import Pairs, RequestClass

SAMPLE = 4096
AGES, LIVES = 24, 1024
GOLDEN = 1.2207440846057596
"""Root of x^4 = x + 1: powers of its inverse give the 3-dimensional Kronecker sequence of lowest known discrepancy."""


@dataclass(frozen=True)
class Mix:
    """What is offered to one replica of `pool`.

    prompt, decode, prefills, read, pairs, held: exact means per request as in `Moments`. s, d: prompt tokens and
    decode steps of `SAMPLE` sample requests; when: uniform in [0, 1), when a sample request completes; out, queue:
    sort keys of the order in which sample requests complete and stand in the queue. The sample is a low-discrepancy
    sequence pushed through the laws, so that it moves smoothly with the mix, and every prefix of it is a fair sample.
    """

    pool: Pool
    prompt: float
    decode: float
    prefills: float
    read: float
    pairs: float
    held: float
    s: Floats
    d: Floats
    when: Floats
    out: Floats
    queue: Floats

    def blocks(self, tokens: Floats) -> Floats:
        """KV tokens in whole blocks, lookahead slots included."""
        block = self.pool.block_size
        return np.asarray(np.ceil((tokens + self.pool.lookahead_slots) / block) * block)

    @cached_property
    def variances(self) -> tuple[float, float]:
        """Stationary variance of slots and of KV tokens in use, per request admitted per step, paced by prefill.

        Admissions follow each other at the pace of their prompts, so a request of prompt s brings the deviation
        x(t) - E x(t) s / E s of what it holds at age t; the variance is the integral of its mean square over t.
        """
        s, d = self.s[:LIVES], self.d[:LIVES]
        width = (float(d.max()) + 1) / AGES
        age = (np.arange(AGES)[:, None] + 0.5) * width
        alive = (d >= age).astype(float)
        held = alive * (s + d if self.pool.preemption == "reserve" else s + age)
        pace = s / s.mean()
        slots, memory = (float(((x - np.outer(x.mean(1), pace)) ** 2).mean(1).sum()) * width for x in (alive, held))
        return slots, memory


def blend(pool: Pool, classes: Sequence[RequestClass], shares: Floats, seed: int) -> Mix:
    """The mix in which class c makes up `shares[c]` of the requests (shape (n_classes,), summing to 1)."""
    used = [c for c, share in zip(classes, shares, strict=True) if share > 0]
    weight = shares[shares > 0]
    m = moments(Engine.of(pool), used)
    index = np.arange(1, SAMPLE + 1)[:, None] * GOLDEN ** -np.arange(1.0, 4.0)
    prompt, output = _lengths(used, weight, index % 1.0)
    keys = np.random.default_rng(seed).random((3, SAMPLE))
    return Mix(
        pool=pool,
        prompt=float(weight @ m.prompt),
        decode=float(weight @ m.decode),
        prefills=float(weight @ m.prefills),
        read=float(weight @ m.read),
        pairs=float(weight @ m.pairs),
        held=float(weight @ m.held),
        s=prompt,
        d=output - pool.first_step,
        when=keys[0],
        out=keys[1],
        queue=keys[2],
    )


def reserving(mix: Mix) -> Mix:
    """The same mix on a replica that reserves the peak of every request."""
    pool = mix.pool.model_copy(update={"preemption": "reserve"})
    peak = mix.blocks(mix.s + mix.d)
    return replace(mix, pool=pool, held=float((peak * (np.ceil(mix.s / pool.chunk) + mix.d)).mean()))


def _lengths(classes: Sequence[RequestClass], weight: Floats, points: Floats) -> tuple[Floats, Floats]:
    """Prompt and output tokens for points (n, 3) of the unit cube: class, then prompt, then output by inversion."""
    cls = np.searchsorted(np.cumsum(weight)[:-1], points[:, 0], side="right")
    prompt, output = np.zeros(len(points)), np.zeros(len(points))
    for c, one in enumerate(classes):
        mine = np.flatnonzero(cls == c)
        if one.pairs is not None:
            rows = _by_area(one.pairs)[(points[mine, 1] * len(one.pairs.prompt)).astype(int)]
            prompt[mine], output[mine] = one.pairs.prompt[rows], one.pairs.output[rows]
        else:
            prompt[mine], output[mine] = one.prompt.sample(points[mine, 1]), one.output.sample(points[mine, 2])
    return prompt, output


def _by_area(pairs: Pairs) -> Ints:
    """Rows of a trace from the smallest to the largest KV area, so that even spacing samples it fairly."""
    output = pairs.output.astype(float)
    return np.argsort(output * (pairs.prompt + output / 2), kind="stable")
