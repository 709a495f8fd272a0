"""Exact expectations of what one request costs an engine, over the length laws of its class.

A request with prompt s and output o takes K = ceil(s / chunk) prefill steps and d = o - e decode steps, where e is 1
if the last prefill step emits the first token. Everything here is a sum of products of a function of s and a function
of d, so that independent laws need two one-dimensional sums; block rounding adds a function of (s + d) mod block,
which needs one circular convolution of length `block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.lengths import Law
from llmopt.scenario import Pool
from llmopt.workload import RequestClass

Function = Callable[[Floats], Floats]


class Engine(NamedTuple):
    """The settings of a pool that decide what a request occupies; pools that agree in them share moments."""

    chunk: int
    block: int
    slots: int
    first_step: int
    reserve: bool

    @classmethod
    def of(cls, pool: Pool) -> Engine:
        """The settings of `pool`."""
        reserve = pool.preemption == "reserve"
        return cls(pool.chunk, pool.block_size, pool.lookahead_slots, pool.first_step, reserve)


class Moments(NamedTuple):
    """Means per request of each class; arrays of shape (n_classes,).

    prompt: prompt tokens; decode: decode steps; prefills: prefill steps; read: KV tokens read by decode attention
    over its life; pairs: prefill attention pairs s^2 / 2; held: least KV tokens held (whole blocks, lookahead slots
    included) summed over its steps, see `prefill_area`.
    """

    prompt: Floats
    decode: Floats
    prefills: Floats
    read: Floats
    pairs: Floats
    held: Floats


def moments(engine: Engine, classes: Sequence[RequestClass]) -> Moments:
    """Moments of every class under `engine`: exact, with the shortest possible prefill (K steps)."""
    rows = [_of_class(engine, cls) if cls.pairs is None else _of_class.__wrapped__(engine, cls) for cls in classes]
    return Moments(*np.array(rows, dtype=float).reshape(len(classes), 6).T)


@lru_cache(maxsize=4096)
def _of_class(engine: Engine, cls: RequestClass) -> tuple[float, ...]:
    def steps(o: Floats) -> Floats:
        return o - engine.first_step

    def prefills(s: Floats) -> Floats:
        return np.ceil(s / engine.chunk)

    held = _reserved(engine, cls) if engine.reserve else _grown(engine, cls)
    return (
        cls.mean_prompt,
        cls.expect(np.ones_like, steps),
        cls.expect(prefills, np.ones_like),
        cls.expect(_same, steps) + cls.expect(np.ones_like, lambda o: steps(o) * (steps(o) - 1) / 2),
        cls.expect(lambda s: s * s / 2, np.ones_like),
        held,
    )


def _grown(engine: Engine, cls: RequestClass) -> float:
    """E of the held area of a request whose blocks grow as it computes.

    With F(x) = sum_{i<=x} block ceil(i / block) = x (x + block) / 2 + phi(x), phi(x) = r (block - r) / 2 and
    r = x mod block, the decode steps hold F(s + slots + d) - F(s + slots).
    """
    b, slots, e = engine.block, engine.slots, engine.first_step
    r = np.arange(b, dtype=float)
    phi = r * (b - r) / 2
    decode = (
        cls.expect(lambda s: s + slots, lambda o: o - e)
        + cls.expect(np.ones_like, lambda o: (o - e) * (o - e + b) / 2)
        + _expect_residue(cls, engine, np.ones_like, np.ones_like, phi)
        - cls.expect(lambda s: phi[_residue(s + slots, b)], np.ones_like)
    )
    return cls.expect(lambda s: prefill_area(engine, s), np.ones_like) + decode


def _reserved(engine: Engine, cls: RequestClass) -> float:
    """E of the held area (peak blocks) x (K + d) of a request that reserves its peak from admission."""
    b, slots, e = engine.block, engine.slots, engine.first_step
    short = np.asarray(-np.arange(b) % b, dtype=float)
    return (
        cls.expect(lambda s: (s + slots) * np.ceil(s / engine.chunk), np.ones_like)
        + cls.expect(lambda s: np.ceil(s / engine.chunk), lambda o: o - e)
        + cls.expect(lambda s: s + slots, lambda o: o - e)
        + cls.expect(np.ones_like, lambda o: (o - e) ** 2)
        + _expect_residue(cls, engine, lambda s: np.ceil(s / engine.chunk), np.ones_like, short)
        + _expect_residue(cls, engine, np.ones_like, lambda o: o - e, short)
    )


def prefill_area(engine: Engine, prompt: Floats) -> Floats:
    """Least KV tokens held over the prefill steps of prompts, in whole blocks; shape of `prompt`.

    However the budget cuts the chunks, j steps before the last prefill step at least s - j chunk tokens are held:
    sum_{j<K} (s - j chunk) = K s - chunk K (K - 1) / 2 tokens, each step rounded up to blocks. The rounding repeats
    with period block / gcd(block, chunk) in j.
    """
    b, chunk = engine.block, engine.chunk
    k = np.ceil(prompt / chunk)
    area = k * (prompt + engine.slots) - chunk * k * (k - 1) / 2
    period = b // math.gcd(b, chunk)
    for j in range(min(period, int(k.max()))):
        times = np.maximum(np.ceil((k - j) / period), 0.0)
        area += times * _residue(j * chunk - prompt - engine.slots, b)
    return np.asarray(area)


def _expect_residue(cls: RequestClass, engine: Engine, f: Function, h: Function, of_residue: Floats) -> float:
    """E[f(s) h(o) of_residue((s + slots + d) mod block)]."""
    b, e, slots = engine.block, engine.first_step, engine.slots
    if not of_residue.any():
        return 0.0
    if cls.pairs is not None:
        s, o = cls.pairs.prompt.astype(float), cls.pairs.output.astype(float)
        return float(np.mean(f(s) * h(o) * of_residue[_residue(s + slots + o - e, b)]))
    first = _by_residue(cls.prompt, f, slots, b)
    second = _by_residue(cls.output, h, -e, b)
    joint = np.fft.irfft(np.fft.rfft(first) * np.fft.rfft(second), b)
    return float(joint @ of_residue)


def _by_residue(law: Law, f: Function, shift: int, block: int) -> Floats:
    """E[f(x); (x + shift) mod block = r] for every residue r, shape (block,)."""
    values, probs = law.pmf
    x = values.astype(float)
    return np.asarray(np.bincount(_residue(x + shift, block), weights=probs * f(x), minlength=block))


def _residue(x: Floats, block: int) -> Ints:
    return np.asarray(x.astype(np.int64) % block)


def _same(x: Floats) -> Floats:
    return x
