"""What a benchmark of a server says about its step time: TTFT and TPOT as sums of step times, and back.

A benchmark keeps c requests in flight, each of s prompt and o output tokens, and reports means. A request lives
TTFT + (o - 1) TPOT seconds, of which it decodes the share x = (o - 1) TPOT / (TTFT + (o - 1) TPOT). The means then
are linear in the coefficients of the step time (docs/benchmarks.md derives the rows below), which is what makes the
fit convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Bools, Floats, Ints

PARAMETERS = ("base", "decode", "kv", "prefill", "pairs", "hidden")
"""Columns of all rows here: both pieces share `decode` and `kv`; the mixed piece's base is `base` - `hidden`."""
BASE, DECODE, KV, PREFILL, PAIRS, HIDDEN = range(6)
DAMPED = 200
CLOSE = 1e-10


@dataclass(frozen=True, eq=False)
class Load:
    """Conditions of benchmark points, arrays of shape (n,).

    concurrency: requests in flight on one replica (one attention data-parallel rank); prompt, output: tokens of each
    request. static: the requests start together and none follows, as in a static batch; else each request that ends
    is followed by another at once.
    """

    concurrency: Floats
    prompt: Floats
    output: Floats
    static: bool = False

    def __len__(self) -> int:
        return len(self.concurrency)

    def some(self, chosen: Ints | Bools) -> Load:
        """The points with these indices."""
        return Load(self.concurrency[chosen], self.prompt[chosen], self.output[chosen], self.static)

    @property
    def context(self) -> Floats:
        """Mean KV tokens that a decode step of one request reads: s at first, s + o - 2 at last, tokens (n,)."""
        return np.asarray(self.prompt + np.maximum(self.output - 2.0, 0.0) / 2.0)

    @property
    def others(self) -> Floats:
        """Requests in flight besides one, (n,)."""
        return np.maximum(self.concurrency - 1.0, 0.0)


@dataclass(frozen=True)
class Harness:
    """What a mean TTFT holds besides the steps that prefill the prompt itself.

    fixed: seconds that no step accounts for (network, tokenizer); steps: mean steps waited for; together: prompts
    prefilled at once with one's own, itself included; burst: further prompts waited for, per other request in flight.
    """

    fixed: float = 0.0
    steps: float = 0.0
    together: float = 1.0
    burst: float = 0.0

    @property
    def rounds(self) -> float:
        """Requests per place in flight that explain `burst` by the first, simultaneous ones alone: 1 / (2 burst)."""
        return 0.5 / self.burst if self.burst > 0 else np.inf


@dataclass(frozen=True, eq=False)
class Model:
    """Everything that predicts a benchmark point.

    values (6,): by `PARAMETERS`, seconds per unit; capacity: KV tokens that bound the requests decoding at once;
    budget: most prefill tokens of a step.
    """

    values: Floats
    harness: Harness = Harness()
    capacity: float = np.inf
    budget: float = np.inf


def decode_share(load: Load, ttft: Floats, tpot: Floats) -> Floats:
    """Share x (n,) of its life that a request decodes."""
    decoding = (load.output - 1.0) * tpot
    return np.asarray(decoding / (ttft + decoding))


def chunks(load: Load, budget: float) -> Floats:
    """Steps (n,) that the prefill of a prompt takes alone; of all prompts at once for a static batch."""
    tokens = load.prompt * (load.concurrency if load.static else 1.0)
    return np.maximum(np.ceil(tokens / budget), 1.0)


def work(load: Load) -> Floats:
    """Prefill tokens and pairs of one prompt, in rows (n, 6)."""
    rows = np.zeros((len(load), len(PARAMETERS)))
    rows[:, PREFILL], rows[:, PAIRS] = load.prompt, load.prompt**2 / 2.0
    return rows


def hides(load: Load, values: Floats, budget: float) -> Bools:
    """Where (n,) the chunks of a prompt take no longer than a decode-only step, so that they cost nothing."""
    count = load.concurrency if load.static else 1.0
    return np.asarray(count * (work(load) @ values) <= chunks(load, budget) * values[HIDDEN])


def tpot_rows(load: Load, share: Floats, budget: float, hidden: Bools) -> Floats:
    """Rows (n, 6) whose product with the parameters is the mean step time that a decoding request sees."""
    if load.static:
        return _decode_rows(load, load.concurrency)
    # a request that decodes sees the others as they are in the mean: c - 1 of them, decoding for the share x
    decoding = np.minimum(load.concurrency, 1.0) + load.others * share
    starts = load.others * share / np.maximum(load.output - 1.0, 1.0)
    rows = _decode_rows(load, decoding)
    prefill = np.where(hidden, 0.0, starts)
    rows += prefill[:, None] * work(load)
    # starts fall on steps independently of each other, so a step is spared all of them with probability exp(-mean)
    rows[:, HIDDEN] = -np.where(hidden, 0.0, -np.expm1(-starts * chunks(load, budget)))
    return rows


def ttft_rows(load: Load, share: Floats, budget: float, hidden: Bools) -> Floats:
    """Rows (n, 6) of the steps that prefill the prompt, with the other requests decoding beside it."""
    count = chunks(load, budget)
    decoding = np.zeros(len(load)) if load.static else load.others * share
    rows = count[:, None] * _decode_rows(load, decoding)
    prompts = load.concurrency if load.static else np.ones(len(load))
    rows += np.where(hidden, 0.0, prompts)[:, None] * work(load)
    rows[:, HIDDEN] = -np.where(hidden, 0.0, count)
    return rows


def _decode_rows(load: Load, decoding: Floats) -> Floats:
    rows = np.zeros((len(load), len(PARAMETERS)))
    rows[:, BASE], rows[:, DECODE], rows[:, KV] = 1.0, decoding, decoding * load.context
    return rows


def predict(model: Model, load: Load) -> tuple[Floats, Floats, Bools]:
    """TTFT and TPOT (n,) of a load in seconds, and where memory bounds the requests that decode at once.

    The share x of its life that a request decodes follows from both times, which follow from x: the damped iteration
    ends at the fixed point. Where memory bounds x, requests wait until their life satisfies Little's law.
    """
    hidden = hides(load, model.values, model.budget)
    room = model.capacity / (load.concurrency * load.context)
    share = np.minimum(1.0, room)
    for _ in range(DAMPED):
        ttft, tpot = _at_share(model, load, share, hidden)
        free = decode_share(load, ttft, tpot)
        last, share = share, 0.5 * share + 0.5 * np.minimum(free, room)
        if np.abs(share - last).max(initial=0.0) < CLOSE:
            break
    if load.static:
        return ttft, tpot, np.zeros(len(load), dtype=bool)
    full = room < free
    waiting = (1.0 / np.minimum(share, 1.0) - 1.0) * (load.output - 1.0) * tpot
    return np.where(full, np.maximum(ttft, waiting), ttft), tpot, full


def _at_share(model: Model, load: Load, share: Floats, hidden: Bools) -> tuple[Floats, Floats]:
    harness = model.harness
    tpot = tpot_rows(load, share, model.budget, hidden) @ model.values
    own = ttft_rows(load, share, model.budget, hidden) @ model.values
    if load.static:
        return own, tpot
    prompts = harness.together - 1.0 + harness.burst * load.others
    return own + harness.fixed + harness.steps * tpot + prompts * (work(load) @ model.values), tpot
