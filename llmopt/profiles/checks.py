"""Refusing tables that cannot be measurements: a time that falls clearly where the work grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.errors import ScenarioError
from llmopt.profiles.data import PER_MODEL
from llmopt.profiles.files import Rows

OPERATOR_FALL = 0.4
"""How far the mean of several runs of an operator may fall behind earlier ones, as a share, where it weighs.

No operator that weighs falls by 2 % in the LLMServingSim profiles of an RTX 4090 and an RTX PRO 6000; of those that do
not, the largest of a layer is 50 % (rotary embedding, 12 microseconds)."""
SINGLE_FALL = 0.5
"""The same for single kernel times at the resolution of a microsecond: the largest in Vidur's and Frontier's files is
42 % (an H100's down projection at 680 tokens)."""
ATTENTION_FALL = 0.6
"""The same for attention along each axis: the largest is 55 % (A800, Qwen3-30B-A3B, where small chunks waited for the
host), and 38 % in LLMServingSim's (RTX PRO 6000, cached context 16384)."""
QUORUM = 0.2
"""Which share of the earlier entries single times of attention must fall behind: that file has 3 spikes in 19."""
WEIGHT = 0.05
"""A fall below this share of all operators of a layer is not looked at: kernels that switch with the size make
activations, norms and rotary embedding fall."""
ONCE = 1 / 32
"""Weight of an operator that runs once a model and not in each of some 32 layers; the embedding falls by 71 %."""
ANY_FALL = 0.85
"""A fall beyond this is refused whatever it weighs."""


def falls(values: Floats, share: float, quorum: float = 0.0) -> Bools:
    """Where `values` (n, ...) fall more than `share` behind earlier entries along the first axis.

    Two earlier entries must be higher, for a single one may be a spike; it is none, so that one is enough, if it stands
    right before and the next entry reaches it again, or there is no next one. With a `quorum`, that share of the
    earlier entries must be higher. NaN is never compared.
    """
    known = np.isfinite(values)
    limit = values / (1.0 - share)
    before, after = _before(values), _before(values[::-1])[::-1]
    out = np.zeros(values.shape, dtype=bool)
    for i in range(1, len(values)):
        higher = (known[:i] & (values[:i] > limit[i])).sum(axis=0)
        dip = (before[i] > limit[i]) & ~(after[i] < before[i])
        enough = np.where(dip, 1, 2) if quorum == 0.0 else np.maximum(2, quorum * known[:i].sum(axis=0))
        out[i] = known[i] & (higher >= enough)
    return out


def _before(values: Floats) -> Floats:
    """The last known entry before each along the first axis, NaN where there is none."""
    out = np.full(values.shape, np.nan)
    for i in range(1, len(values)):
        out[i] = np.where(np.isfinite(values[i - 1]), values[i - 1], out[i - 1])
    return out


def check_operators(
    rows: Rows, names: Sequence[str], axis: Floats, seconds: Floats, lines: Floats, tolerance: float, unit: str
) -> None:
    """Refuse operators whose time (len(axis), len(names)), NaN where not measured, falls clearly.

    lines, of the same shape, says where each time stands in the file.

    Raises
    ------
    ScenarioError
        Naming the file, the row, the operator and the two points.
    """
    highest = np.fmax.accumulate(seconds, axis=0)
    often = np.array([ONCE if name in PER_MODEL else 1.0 for name in names])
    whole = np.nansum(seconds * often, axis=1, keepdims=True)
    weighty = (highest - seconds) * often > WEIGHT * (whole + highest - seconds)
    bad = (falls(seconds, tolerance) & weighty) | falls(seconds, ANY_FALL)
    if bad.any():
        i, j = (int(k) for k in np.argwhere(bad)[0])
        peak = int(np.nanargmax(seconds[:i, j]))
        now, then = _time(seconds[i, j]), _time(seconds[peak, j])
        raise ScenarioError(
            f"{_place(rows, lines[i, j])}: {names[j]} takes {now} at {axis[i]:g} {unit} but {then} at {axis[peak]:g}, "
            f"a fall beyond measurement noise ({tolerance:.0%}); measure it again"
        )


def check_grid(
    rows: Rows,
    what: str,
    axes: Sequence[Floats],
    names: Sequence[str],
    seconds: Floats,
    lines: Floats,
    quorum: float,
) -> None:
    """Refuse attention, or whatever `what` says, whose time falls clearly along an axis.

    seconds, lines: one entry for each combination of `axes`, NaN where not measured, and where it stands in the file.

    Raises
    ------
    ScenarioError
        Naming the file, the row and the two points.
    """
    for d, axis in enumerate(axes):
        values = np.moveaxis(seconds, d, 0)
        bad = falls(values, ATTENTION_FALL, quorum)
        if bad.any():
            i, *rest = (int(k) for k in np.argwhere(bad)[0])
            series = values.reshape(len(values), -1)[:, np.ravel_multi_index(rest, values.shape[1:])]
            peak = int(np.nanargmax(series[:i]))
            others = [k for k in range(len(axes)) if k != d]
            at = ", ".join(f"{names[k]} {axes[k][r]:g}" for k, r in zip(others, rest, strict=True))
            raise ScenarioError(
                f"{_place(rows, np.moveaxis(lines, d, 0)[(i, *rest)])}: {what} at {at + ', ' if at else ''}{names[d]} "
                f"{axis[i]:g} takes {_time(series[i])} but {_time(series[peak])} at {names[d]} {axis[peak]:g}, a fall "
                f"beyond measurement noise ({ATTENTION_FALL:.0%}); measure it again"
            )


def _place(rows: Rows, line: float) -> str:
    return f"{rows.path}: {rows.unit} {int(line)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"
