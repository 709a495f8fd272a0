# mypy: disable-error-code="no-any-return"
"""Step times by interpolation in measured tables (compiled): what `StepTable.many` says, one step at a time.

All tables of a run lie one after the other in one flat array, `World.costs`. Each starts with a head: the lengths of
its eight axes, where each axis and each of its four tables begins (counted from the head's start), where the
measurements end on each axis, and the launch's seconds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.kernel_types import compiled
from llmopt.steptable import StepTable

AXES = ("tokens", "sequences", "decode_batch", "decode_context", "chunk", "cached", "mixed_batch", "mixed_context")
TIMES = ("token_time", "sequence_time", "decode_time", "mixed_time")
TOKENS, SEQUENCES, BATCH, CONTEXT, CHUNK, CACHED, MIXED_BATCH, MIXED_CONTEXT = range(8)
KNOTS, TIME, ENDS, LAUNCH, HEAD = 8, 16, 20, 28, 29
"""Places in the head: where the axes begin, where the tables begin, the measured ends, the launch; its length."""


def flatten(table: StepTable) -> Floats:
    """The head and everything behind it as one array."""
    arrays = [np.asarray(getattr(table, name), float).ravel() for name in AXES + TIMES]
    lengths = [len(array) for array in arrays]
    starts = HEAD + np.cumsum([0, *lengths[:-1]])
    return np.concatenate([lengths[: len(AXES)], starts, table.ends, [table.launch], *arrays])


@compiled
def bracket(costs: Floats, start: int, axis: int, point: float) -> tuple[int, float]:
    """Number of the knot at or below `point`, at most the last but one, and the share of the next knot."""
    first = start + int(costs[start + KNOTS + axis])
    low = 0
    high = int(costs[start + axis]) - 1
    if high == 0 or point <= costs[first]:
        return 0, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        if costs[first + middle] <= point:
            low = middle
        else:
            high = middle
    knot = costs[first + low]
    return low, (point - knot) / (costs[first + low + 1] - knot)


@compiled
def along(costs: Floats, start: int, axis: int, point: float) -> float:
    """The table of one axis, TOKENS or SEQUENCES, at `point`."""
    low, share = bracket(costs, start, axis, point)
    k = start + int(costs[start + TIME + axis]) + low
    if share == 0.0:
        return costs[k]
    return costs[k] * (1.0 - share) + costs[k + 1] * share


@compiled
def at_context(costs: Floats, start: int, decode: float, column: int) -> float:
    """Attention of a decode-only step of `decode` sequences at one knot of the context axis."""
    low, share = bracket(costs, start, BATCH, decode)
    width = int(costs[start + CONTEXT])
    k = start + int(costs[start + TIME + 2]) + low * width + column
    if share == 0.0:
        return costs[k]
    return costs[k] * (1.0 - share) + costs[k + width] * share


@compiled
def decode_attention(costs: Floats, start: int, decode: float, context: float) -> float:
    """Attention of a decode-only step."""
    low, share = bracket(costs, start, CONTEXT, context)
    value = at_context(costs, start, decode, low)
    if share == 0.0:
        return value
    return value * (1.0 - share) + at_context(costs, start, decode, low + 1) * share


@compiled
def mixed_attention(costs: Floats, start: int, chunk: float, cached: float, decode: float, context: float) -> float:
    """Attention of a step with prefill: the sum over the 16 corners around the point."""
    c, c_share = bracket(costs, start, CHUNK, chunk)
    h, h_share = bracket(costs, start, CACHED, cached)
    m, m_share = bracket(costs, start, MIXED_BATCH, decode)
    j, j_share = bracket(costs, start, MIXED_CONTEXT, context)
    base = start + int(costs[start + TIME + 3])
    total = 0.0
    for corner in range(16):
        c_up, h_up, m_up, j_up = corner & 1, corner >> 1 & 1, corner >> 2 & 1, corner >> 3 & 1
        weight = c_share if c_up else 1.0 - c_share
        weight *= h_share if h_up else 1.0 - h_share
        weight *= m_share if m_up else 1.0 - m_share
        weight *= j_share if j_up else 1.0 - j_share
        if weight != 0.0:
            k = (c + c_up) * int(costs[start + CACHED]) + h + h_up
            k = k * int(costs[start + MIXED_BATCH]) + m + m_up
            total += weight * costs[base + k * int(costs[start + MIXED_CONTEXT]) + j + j_up]
    return total


@compiled
def prefill_attention(costs: Floats, start: int, prefill: float, decode: float, context: float, pairs: float) -> float:
    """Attention of a step with prefill; several short prompts have fewer pairs than one chunk of as many tokens."""
    cached = pairs / max(prefill, 1.0) - 0.5 * prefill
    if cached >= 0.0:
        return mixed_attention(costs, start, prefill, cached, decode, context)
    whole = mixed_attention(costs, start, prefill, 0.0, decode, context)
    alone = mixed_attention(costs, start, prefill, 0.0, 0.0, 0.0)
    missing = 1.0 - pairs / (0.5 * prefill * prefill)
    return whole - missing * (alone - costs[start + LAUNCH])


@compiled
def table_seconds(costs: Floats, start: int, prefill: float, decode: float, kv: float, pairs: float) -> float:
    """Duration of one step; nothing that was extrapolated below 0 counts."""
    context = kv / max(decode, 1.0)
    heads = decode
    attention = 0.0
    if prefill > 0.0:
        heads += 1.0
        attention = prefill_attention(costs, start, prefill, decode, context, pairs)
    elif decode > 0.0:
        attention = decode_attention(costs, start, decode, context)
    dense = along(costs, start, TOKENS, prefill + decode)
    return max(0.0, dense + along(costs, start, SEQUENCES, heads) + attention)


@compiled
def is_measured(costs: Floats, start: int, prefill: float, decode: float, kv: float, pairs: float) -> bool:
    """Whether a step lies inside the measured ranges, as `StepTable.covers`."""
    context = kv / max(decode, 1.0)
    if prefill + decode > costs[start + ENDS + TOKENS]:
        return False
    if prefill == 0.0:
        inside = decode <= costs[start + ENDS + SEQUENCES] and decode <= costs[start + ENDS + BATCH]
        return inside and context <= costs[start + ENDS + CONTEXT]
    inside = decode + 1.0 <= costs[start + ENDS + SEQUENCES] and prefill <= costs[start + ENDS + CHUNK]
    inside &= decode <= costs[start + ENDS + MIXED_BATCH] and context <= costs[start + ENDS + MIXED_CONTEXT]
    return inside and pairs / max(prefill, 1.0) - 0.5 * prefill <= costs[start + ENDS + CACHED]


@compiled
def read_table(costs: Floats, rep: Any, kv: float, pairs: float) -> float:
    """Step time of the scheduled batch, s, the host's part included; counts it if outside the measured ranges."""
    prefill = float(rep.prefill)
    decode = float(rep.decode)
    if not is_measured(costs, rep.table, prefill, decode, kv, pairs):
        rep.extrapolated += 1
    return rep.host + table_seconds(costs, rep.table, prefill, decode, kv, pairs)


@compiled
def table_stretch(costs: Floats, rep: Any, kv: float, most: int) -> tuple[float, float, int]:
    """Decode-only steps as in `between_knots`, the host's part included."""
    base, slope, length = between_knots(costs, rep.table, float(rep.gliding), kv, most)
    return base + rep.host, slope, length


@compiled
def between_knots(costs: Floats, start: int, decode: float, kv: float, most: int) -> tuple[float, float, int]:
    """Decode-only steps between two knots: the first one's seconds, what each one adds, and how many they are.

    The mean context grows by one token a step, so that between two knots the step time is linear in the step number.
    """
    context = kv / decode
    first = start + int(costs[start + KNOTS + CONTEXT])
    low, share = bracket(costs, start, CONTEXT, context)
    base = at_context(costs, start, decode, low)
    slope = 0.0
    end = costs[first]
    if int(costs[start + CONTEXT]) > 1 and context >= end:
        end = costs[first + low + 1]
        rise = at_context(costs, start, decode, low + 1) - base
        slope = rise / (end - costs[first + low])
        base += rise * share
    if context <= end < context + most:
        most = int(end - context) + 1
    base += along(costs, start, TOKENS, decode) + along(costs, start, SEQUENCES, decode)
    return clip(base, slope, most)


@compiled
def unmeasured(costs: Floats, rep: Any, steps: int) -> int:
    """How many of the next decode-only steps lie outside the measured ranges: from some step on, all of them."""
    kv = float(rep.kv)
    decode = float(rep.gliding)
    if not is_measured(costs, rep.table, 0.0, decode, kv, 0.0):
        return steps
    room = costs[rep.table + ENDS + CONTEXT] - kv / decode
    return steps - min(steps, int(room) + 1)


@compiled
def clip(base: float, slope: float, most: int) -> tuple[float, float, int]:
    """Let nothing below 0 count among `most` steps that take base, base + slope, ... seconds."""
    if base < 0.0:
        return 0.0, 0.0, most if slope <= 0.0 or -base >= slope * most else math.ceil(-base / slope)
    if slope < 0.0 and base < -slope * most:
        return base, slope, max(1, math.ceil(base / -slope))
    return base, slope, most
