"""Step time by interpolation in measured tables: what a profiled engine step takes, without fitting.

The table is composed once for the whole model (layers, tensor parallel degree, transfers; see `llmopt.profiles`) and is
read by the simulator at every step. The programs need the max-affine `StepTime` instead; `llmopt calibrate` fits it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from llmopt.arrays import Bools, Floats

Axis = Floats


@dataclass(frozen=True, eq=False)
class StepTable:
    """Seconds of one engine step, as the sum of three tables.

    A step holds P prefill tokens, D decode sequences, which read K KV tokens, and Q prefill attention pairs
    (`llmopt.hardware.FEATURES`). Its time is

        token(P + D) + sequence(D + [P > 0]) + attention

    where attention is decode(D, K/D) without prefill, else mixed(P, h, D, K/D) with the cached context
    h = Q/P - P/2 of one chunk of P tokens that has the same number of pairs (the coordinate of LLMServingSim's
    profiler). Several short prompts have fewer pairs than one fresh chunk of P tokens, h < 0: then the part of
    mixed(P, 0, 0, .) above its smallest entry, the cost of the launch, is scaled by the pairs, Q/(P^2/2).

    Between knots every table is (multi)linear; below the first knot it is constant, above the last it follows the
    last two knots (never below 0), and `covers` says so. Tables are seconds for all layers together; axes are
    increasing.

    tokens (t,), token_time (t,): dense layers and transfers by tokens of the step. sequences (s,), sequence_time (s,):
    output head and sampler by sequences. decode_batch (n,), decode_context (k,), decode_time (n, k): attention of
    decode-only steps. chunk (c,), cached (h,), mixed_batch (m,), mixed_context (j,), mixed_time (c, h, m, j):
    attention of steps with prefill, where mixed_batch starts with 0, the pure prefill. separate: whether mixed
    steps were measured, or are the sum of the pure ones. source: where the measurements come from; notes: what in the
    table is not measured. limits: where the measurements end on each of the eight axes, in the order of the fields, if
    the last knots lie beyond them, put there to say how to continue.
    """

    tokens: Axis
    token_time: Floats
    sequences: Axis
    sequence_time: Floats
    decode_batch: Axis
    decode_context: Axis
    decode_time: Floats
    chunk: Axis
    cached: Axis
    mixed_batch: Axis
    mixed_context: Axis
    mixed_time: Floats
    separate: bool = True
    source: str = ""
    notes: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together, which would interpolate to nonsense in silence."""
        groups = (self.axes[:1], self.axes[1:2], self.axes[2:4], self.axes[4:])
        tables = (self.token_time, self.sequence_time, self.decode_time, self.mixed_time)
        for axes, table in zip(groups, tables, strict=True):
            if table.shape != tuple(len(axis) for axis in axes):
                raise ValueError(f"a table of shape {table.shape} has axes of {[len(axis) for axis in axes]} knots")
            if not all((np.diff(axis) > 0).all() for axis in axes):
                raise ValueError("the knots of an axis do not increase")
        if self.limits and len(self.limits) != len(self.axes):
            raise ValueError(f"{len(self.limits)} limits for {len(self.axes)} axes")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The eight axes: tokens, sequences, decode batch and context, chunk, cached, mixed batch and context."""
        alone = (self.tokens, self.sequences, self.decode_batch, self.decode_context)
        return (*alone, self.chunk, self.cached, self.mixed_batch, self.mixed_context)

    @property
    def ends(self) -> tuple[float, ...]:
        """Where the measurements end on each axis."""
        return self.limits or tuple(float(axis[-1]) for axis in self.axes)

    def __call__(self, prefill: float = 0, decode: float = 0, kv: float = 0, pairs: float = 0) -> float:
        """Duration of one step in seconds."""
        return float(self.many(np.array([[prefill, decode, kv, pairs]], dtype=float))[0])

    def many(self, features: Floats) -> Floats:
        """Durations (n,) of steps with `features` of shape (n, 4): prefill, decode, kv, pairs."""
        prefill, decode = features[:, 0], features[:, 1]
        dense = interpolate((self.tokens,), self.token_time, (prefill + decode,))
        heads = interpolate((self.sequences,), self.sequence_time, (decode + (prefill > 0),))
        return np.maximum(dense + heads + self.attention(features), 0.0)

    def attention(self, features: Floats) -> Floats:
        """Attention's part of the durations (n,) of steps with `features` of shape (n, 4)."""
        prefill, decode = features[:, 0], features[:, 1]
        context = features[:, 2] / np.maximum(decode, 1.0)
        pure = interpolate((self.decode_batch, self.decode_context), self.decode_time, (decode, context))
        return np.where(prefill > 0, self._mixed(features, context), np.where(decode > 0, pure, 0.0))

    def covers(self, features: Floats) -> Bools:
        """Which steps (n,) lie inside the measured ranges, so that nothing was extrapolated."""
        prefill, decode = features[:, 0], features[:, 1]
        context, mixed = features[:, 2] / np.maximum(decode, 1.0), prefill > 0
        tokens, sequences, batch, longest, chunk, cached, mixed_batch, mixed_longest = self.ends
        inside = (prefill + decode <= tokens) & (decode + mixed <= sequences)
        pure = (decode <= batch) & (context <= longest)
        joint = (prefill <= chunk) & (_cached(features) <= cached)
        joint &= (decode <= mixed_batch) & (context <= mixed_longest)
        measured: Bools = inside & np.where(mixed, joint, pure)
        return measured

    def _mixed(self, features: Floats, context: Floats) -> Floats:
        prefill, decode = features[:, 0], features[:, 1]
        cached = _cached(features)
        axes = (self.chunk, self.cached, self.mixed_batch, self.mixed_context)
        zero = np.zeros_like(prefill)
        whole = interpolate(axes, self.mixed_time, (prefill, np.maximum(cached, 0.0), decode, context))
        alone = interpolate(axes, self.mixed_time, (prefill, zero, zero, zero))
        share = features[:, 3] / np.maximum(0.5 * prefill * prefill, 1e-300)
        return whole - np.where(cached < 0, (1.0 - share) * (alone - self.launch), 0.0)

    @cached_property
    def launch(self) -> float:
        """The smallest attention time of a pure prefill, s: what launching the kernels costs."""
        return float(self.mixed_time[:, :, 0, :].min())

    def content(self) -> dict[str, Any]:
        """All fields as plain data, for digests and files."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in plain.items()}


def _cached(features: Floats) -> Floats:
    """Cached context of the one chunk with the same tokens and pairs; negative for several short prompts."""
    prefill = np.maximum(features[:, 0], 1.0)
    return features[:, 3] / prefill - 0.5 * features[:, 0]


def interpolate(axes: tuple[Axis, ...], table: Floats, points: tuple[Floats, ...]) -> Floats:
    """Multilinear interpolation of `table`, shape (len(axes[0]), ...), at `points`, one array (n,) per axis.

    Constant below the first knot of an axis, linear through the last two knots above the last.
    """
    total = np.zeros(len(points[0]))
    corners = [_bracket(axis, point) for axis, point in zip(axes, points, strict=True)]
    for corner in range(2 ** len(axes)):
        weight, index = np.ones(len(total)), []
        for d, (low, share) in enumerate(corners):
            high = (corner >> d) & 1
            weight = weight * (share if high else 1.0 - share)
            index.append(np.minimum(low + high, len(axes[d]) - 1))
        total += weight * table[tuple(index)]
    return total


def _bracket(axis: Axis, points: Floats) -> tuple[Any, Floats]:
    """Index of the knot at or below each point, at most the last but one, and the share of the next knot."""
    if len(axis) == 1:
        return np.zeros(len(points), dtype=np.int64), np.zeros(len(points))
    low = np.clip(np.searchsorted(axis, points, side="right") - 1, 0, len(axis) - 2)
    share = (points - axis[low]) / (axis[low + 1] - axis[low])
    return low, np.maximum(share, 0.0)
