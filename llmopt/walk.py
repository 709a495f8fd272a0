"""The boundary walk: which steps a replica makes when its queue never runs empty.

Put the requests in the order of first-come-first-served and let B_k be the resource (KV tokens, or batch slots) that
the first k of them need at admission. In units of that line the replica runs everything below a boundary: completions
push the position y up by what they free, the growth of running requests pulls it down, and the boundary is the
largest B_k <= y. This replaces the running set by its mean (completions come as a Poisson stream at the saturated
rate, growth is constant) and keeps exactly what a capacity estimate needs of a step: how much is prefilled, how much
memory a blocked head leaves free, how often the boundary moves back (a preemption) and what that repeats.

One period of completions is repeated three times and the middle one is used, which makes the walk stationary.
Everything is array arithmetic on `STEPS` steps or fewer per period; no request is followed through its life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmopt.arrays import Bools, Floats, Ints
from llmopt.chunks import Path, chunked, limited, line_of, served
from llmopt.mix import Mix

STEPS = 8192
Turn = Literal["stay", "ahead", "park", "back"]
"""What happens where the position goes down: it never does (reserve, slots), admission looked ahead so that it need
not, the request is parked (swap), or it must be prefilled again (recompute, restart)."""


@dataclass(frozen=True)
class Walk:
    """Steps of the walk, in means unless said otherwise.

    prefill: prompt tokens served in each step, shape (n_steps,); pairs: their attention pairs; free: resource left
    before the blocked head, shape (n_steps,); kept: resource that look-ahead keeps free for growth; again: repeated
    prefill tokens per step; back: preemptions per completion; doomed, doomed_held: running requests that will be
    preempted before they end, and the resource they took at admission; over: prefill tokens per step of requests
    that were let in against memory that others had still to fill, and were preempted for it.
    """

    prefill: Floats
    pairs: Floats
    free: Floats
    kept: float
    again: float
    back: float
    doomed: float
    doomed_held: float
    over: float


def walk(mix: Mix, rate: float, room: float, peak: Floats, need: Floats, turn: Turn, offset: float = 0.0) -> Walk:
    """Walk at `rate` completions per step with `room` prefill tokens per step.

    peak, need: resource that each sample request frees when it completes and needs when it is admitted, shape of
    `mix.s`; their difference is what it grows in between. offset: position modulo the lattice of the needs.
    """
    n = int(np.clip(rate * STEPS, 64, len(mix.s)))
    steps = max(round(n / rate), 1)
    growth = max(float(peak[:n].sum() - need[:n].sum()), 0.0) / steps
    position = np.cumsum(np.tile(_freed(mix, peak, n, steps), 3) - growth)
    position += offset - position.min()
    kept = _kept(position, growth, float(mix.d[:n].mean())) if turn == "ahead" else np.zeros(len(position))
    position = position - kept
    queue = np.argsort(mix.queue[:n])
    line = line_of(need[queue], mix.s[queue], float(position.max()))
    boundary = np.maximum(np.searchsorted(line.need, position, side="right") - 1, 0)
    target = line.tokens[boundary]
    front = limited(np.maximum.accumulate(target) if turn in ("park", "ahead") else target, room)
    path = Path(line, boundary, position - line.need[boundary], front)
    touched = np.searchsorted(line.tokens, np.minimum(target, front), side="left")
    return _middle(mix, path, touched, kept, room, turn, n, steps)


def _freed(mix: Mix, peak: Floats, n: int, steps: int) -> Floats:
    """Resource freed in each step of one period by `n` completions at uniform times."""
    at = np.minimum((mix.when[:n] * steps).astype(int), steps - 1)
    return np.asarray(np.bincount(at, weights=peak[:n][np.argsort(mix.out[:n])], minlength=steps))


def _kept(position: Floats, growth: float, life: float) -> Floats:
    """What look-ahead keeps free at each step: position minus its lowest future value.

    The projection leaves out requests that are not admitted yet, so growth in it falls as running requests end: over
    a horizon h by the factor 1 - h / (2 life), taken at the mean horizon of the minimum, weighted by its depth.
    """
    steps = np.arange(len(position))
    kept = position - _lowest_ahead(position)
    horizon = np.minimum(_next(kept <= 0), len(position) - 1) - steps
    middle = slice(len(position) // 3, 2 * len(position) // 3)
    mean = float((kept * horizon)[middle].sum() / max(kept[middle].sum(), 1e-9))
    eased = position + growth * min(mean / (2 * life), 0.5) * steps
    return np.asarray(eased - _lowest_ahead(eased))


def _lowest_ahead(x: Floats | Ints) -> Floats:
    return np.asarray(np.minimum.accumulate(x[::-1])[::-1])


def _next(hit: Bools) -> Ints:
    """Index of the next true entry at or after each index."""
    index = np.where(hit, np.arange(len(hit)), len(hit))
    return np.asarray(np.minimum.accumulate(index[::-1])[::-1])


def _middle(mix: Mix, path: Path, touched: Ints, kept: Floats, room: float, turn: Turn, n: int, steps: int) -> Walk:
    """What is observed in the middle period of `steps` steps and `n` completions."""
    part = slice(steps, 2 * steps)
    if mix.pool.chunk < min(mix.pool.token_budget, mix.s.max()):
        prefill, pairs, over = chunked(path, mix.pool.chunk, room, n / steps, turn == "back")
    else:
        (prefill, pairs), over = served(path), np.zeros(3 * steps)
    staying = _lowest_ahead(touched).astype(int)
    again = float(prefill[part].mean() - mix.s[:n].sum() / steps)
    return Walk(
        prefill=prefill[part],
        pairs=pairs[part],
        free=path.free[part],
        kept=float(kept[part].mean()),
        again=max(again, 0.0) if turn == "back" else 0.0,
        back=float(np.maximum(-np.diff(touched), 0)[part].sum()) / n,
        doomed=float((touched - staying)[part].mean()),
        doomed_held=float((path.line.need[touched] - path.line.need[staying])[part].mean()),
        over=float(over[part].mean()),
    )
