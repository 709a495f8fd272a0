"""Limits of physics: the shortest time that peak arithmetic and memory bandwidth allow, and who claims to be faster.

Public simulators are known to prefill several times faster than the accelerator that they model can multiply, and a
plan made on such a step time buys too few machines. The floor is a max-affine step time, so that it holds for every
step, whatever is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.hardware import FEATURES, StepTime
from llmopt.machines.accelerators import Accelerator
from llmopt.machines.shapes import UNQUANTISED, ModelShape, weight_size

TOLERANCE = 1.05
"""Factor below the floor from which a step is called impossible: data sheets give peaks at a rated clock, which cards
exceed a little (GEMMs of the RTX 4090 profile reach 1.005 of its peak)."""
COMPUTE, MEMORY = "compute", "memory"


class Steps(Protocol):
    """A step time: max-affine or a table."""

    def many(self, features: Floats) -> Floats:
        """Durations (n,) of steps with `features` of shape (n, 4)."""


@dataclass(frozen=True)
class Floor:
    """The shortest possible step time, and the peaks that it comes from.

    step_time: two pieces, ``memory`` and ``compute``; machine: what has these peaks, in words; flops, bandwidth: of the
    whole replica, FLOP/s and B/s.
    """

    step_time: StepTime
    machine: str
    flops: float
    bandwidth: float

    def many(self, features: Floats) -> Floats:
        """Shortest durations (n,) of steps with `features` of shape (n, 4)."""
        return self.step_time.many(features)

    def bound(self, features: Floats) -> Bools:
        """Which of the steps (n,) arithmetic bounds; memory bounds the others."""
        memory, compute = self.step_time.coefficients
        difference = compute - memory
        above: Bools = difference[0] + features @ difference[1:] > 0
        return above


@dataclass(frozen=True, eq=False)
class Violations:
    """Steps that are shorter than the floor.

    features (n, 4), seconds (n,), floor (n,): all steps that were looked at; which (n,): those below the floor by more
    than `TOLERANCE`; sentence: the worst of them, or how close the fastest steps come.
    """

    features: Floats
    seconds: Floats
    floor: Floats
    which: Bools
    sentence: str

    @property
    def worst(self) -> float:
        """Largest floor / time: how many times too fast the fastest step is; below 1 if none is."""
        return float(_ratio(self.floor, self.seconds).max())

    @property
    def count(self) -> int:
        """Steps that are impossible."""
        return int(self.which.sum())

    def __bool__(self) -> bool:
        return self.count > 0


def floor(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
    precision: str | None = None,
    kv_precision: str | None = None,
) -> Floor:
    """What the peaks of `tensor_parallel` accelerators allow at 100 %, without launches, transfers and waiting.

        compute: 2 x weights of the layers that a token meets x tokens, the output head of every decode sequence,
                 and attention, over the dense peak
        memory:  every weight once, and the KV cache of decode attention, over the memory bandwidth

    Of the experts only those of one token count as read, since all tokens of a batch may visit the same; prefill
    sequences count without output head, layers with a window without attention. So no engine that computes the whole
    model can be faster, whatever it overlaps. (Caches of some 0.1 GB on the chip are neglected.)
    """
    size = precision or shape.precision
    flops = tensor_parallel * accelerator.fastest(size)
    bandwidth = tensor_parallel * accelerator.bandwidth
    number = UNQUANTISED if kv_precision is None else weight_size(kv_precision)
    kv = shape.full_layers * shape.cached_width * number
    read = shape.step_bytes(size, experts=shape.experts_per_token)
    rows = np.zeros((2, len(FEATURES)))
    rows[0] = np.array([read, 0.0, 0.0, kv, 0.0]) / bandwidth
    token = shape.flops_per_token
    rows[1] = np.array([0.0, token, token + shape.head_flops, shape.flops_per_kv, shape.flops_per_pair]) / flops
    machine = f"{tensor_parallel} x {accelerator.name}" if tensor_parallel > 1 else accelerator.name
    return Floor(StepTime(rows, (MEMORY, COMPUTE)), machine, flops, bandwidth)


def violations(steps: Steps, limit: Floor, features: Floats) -> Violations:
    """Which of the steps with `features`, shape (n, 4) as in `FEATURES` without the base, are impossibly short."""
    seconds, shortest = steps.many(features), limit.many(features)
    ratio = _ratio(shortest, seconds)
    worst = int(ratio.argmax())
    which: Bools = ratio > TOLERANCE
    arithmetic = limit.bound(features)
    if which.any():
        said = _impossible(features[worst], seconds[worst], shortest[worst], limit, bool(arithmetic[worst]))
    else:
        said = _possible(ratio, arithmetic, limit)
    return Violations(features, seconds, shortest, which, said)


def _ratio(shortest: Floats, seconds: Floats) -> Floats:
    """How many times too fast; infinite for a step that takes no time."""
    return np.where(seconds > 0, shortest / np.where(seconds > 0, seconds, 1.0), np.inf)


def _impossible(features: Floats, seconds: float, shortest: float, limit: Floor, arithmetic: bool) -> str:
    peak = f"{limit.flops / 1e12:,.4g} TFLOP/s" if arithmetic else f"{limit.bandwidth / 1e12:,.4g} TB/s"
    faster = (
        f"takes {_time(seconds)}, {shortest / seconds:.2g} times faster" if seconds > 0 else "takes no time, faster"
    )
    return f"{describe(features)} {faster} than the {_time(shortest)} that the {peak} of {limit.machine} allow"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _possible(ratio: Floats, arithmetic: Bools, limit: Floor) -> str:
    """How much of the peaks the fastest steps of either kind need."""
    parts = []
    if arithmetic.any():
        parts.append(f"{ratio[arithmetic].max():.0%} of {limit.flops / 1e12:,.4g} TFLOP/s")
    if not arithmetic.all():
        parts.append(f"{ratio[~arithmetic].max():.0%} of {limit.bandwidth / 1e12:,.4g} TB/s")
    return f"no step is faster than {limit.machine} allows; the fastest need {' and '.join(parts)}"


def describe(features: Floats) -> str:
    """A step in words: ``prefill of 2048 tokens``, ``decode of 32 sequences with 1000 KV tokens each``."""
    prefill, decode, kv, _ = (float(x) for x in features)
    parts = []
    if prefill:
        parts.append(f"prefill of {prefill:.0f} token{'s' * (prefill != 1)}")
    if decode:
        parts.append(f"decode of {decode:.0f} sequence{'s' * (decode != 1)} with {kv / decode:.0f} KV tokens each")
    return " and ".join(parts) or "an empty step"


def probe(token_budget: int, max_batch: int, kv_capacity: int, chunk: int | None = None) -> Floats:
    """Steps that show what a step time claims, features (n, 4): prefills, decode batches, and both together.

    Parameters
    ----------
    token_budget, max_batch, kv_capacity
        Largest step, batch and KV memory; probes stay within them, and below what is ever met (65536 tokens, 4096
        sequences), so that a pool without limits has sensible ones.
    chunk
        Most tokens that one prompt prefills in a step.
    """
    budget = min(token_budget, 65_536)
    batch = min(max_batch, budget, 4096, kv_capacity)
    sizes = sorted({min(2**k, budget, chunk or budget) for k in range(5, 17)})
    batches = sorted({min(2**k, batch) for k in range(13)})
    contexts = (128.0, 1024.0, 8192.0)
    rows = [(p, 0.0, 0.0, p * (cached + p / 2)) for p in sizes for cached in (0.0, 4096.0) if p + cached <= kv_capacity]
    decodes = [(0.0, n, n * context, 0.0) for n in batches for context in contexts if n * context <= kv_capacity]
    both = [
        (p, n, kv, p * p / 2) for p in sizes for _, n, kv, _ in decodes if n + p <= budget and p + kv <= kv_capacity
    ]
    return np.array([*rows, *decodes, *both] or [(1.0, 0.0, 0.0, 0.5)], dtype=float)
