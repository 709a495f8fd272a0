"""Prefill along the boundary walk: who is served in which step, whole or in chunks, within the room of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats, Ints


@dataclass(frozen=True)
class Line:
    """The queue as a line: cumulative need, prompt tokens and attention pairs before each request, shape (n + 1,)."""

    need: Floats
    tokens: Floats
    pairs: Floats


@dataclass(frozen=True)
class Path:
    """A walk along `line`: index of the blocked head, resource `free` before it, prompt tokens served so far."""

    line: Line
    head: Ints
    free: Floats
    front: Floats


def line_of(need: Floats, prompt: Floats, top: float) -> Line:
    """The line of these requests, repeated until their needs reach `top`."""
    times = int(np.ceil((top + 1.0) / need.sum())) + 1
    columns = (np.tile(x, times).cumsum() for x in (need, prompt, prompt**2 / 2))
    return Line(*(np.concatenate([[0.0], column]) for column in columns))


def limited(target: Floats, room: float) -> Floats:
    """The highest path below `target` that rises by at most `room` a step (Lindley's recursion, solved)."""
    ramp = room * np.arange(len(target))
    return np.asarray(np.minimum.accumulate(target - ramp) + ramp)


def served(path: Path) -> tuple[Floats, Floats]:
    """Prompt tokens and attention pairs of each step when a prompt takes all the room there is."""
    line, front = path.line, path.front
    at = np.searchsorted(line.tokens, front, side="right") - 1
    pairs = line.pairs[at] + (front - line.tokens[at]) ** 2 / 2
    rise = _rise(front)
    return np.maximum(rise, 0.0), np.where(rise > 0, np.maximum(_rise(pairs), 0.0), 0.0)


def chunked(path: Path, chunk: int, room: float, rate: float, optimistic: bool) -> tuple[Floats, Floats, Floats]:
    """Prompt tokens, attention pairs and over-admitted tokens of each step, `chunk` tokens a request and step.

    With `optimistic` admission the next head is tried against memory that requests in prefill have not filled yet,
    see `_over_admitted`; a completion before that memory runs out saves it.
    """
    first = np.searchsorted(path.line.tokens, path.front, side="left")
    last = np.minimum(np.concatenate([first[:1], first[:-1]]), first)
    count, prompt = first - last, np.diff(path.line.tokens)
    which = np.repeat(last, count) + _within(count)
    size, when = prompt[which], np.repeat(np.arange(len(first)), count)
    over = np.zeros(len(first))
    if optimistic:
        owed = np.concatenate([[0.0], np.cumsum(np.maximum(prompt - chunk, 0.0))])
        head = prompt[path.head]
        spare = (count > 0) & (_rise(path.front) < room)
        over = _over_admitted(head, path.free, owed[first] - owed[last], chunk) * spare
        over *= np.exp(-rate * np.minimum(path.free, head) / chunk)
        hit = np.flatnonzero(over >= 1.0)
        size, when = np.concatenate([size, over[hit]]), np.concatenate([when, hit])
    return (*_spread(size, when, len(first), chunk, room), over)


def _over_admitted(head: Floats, free: Floats, owed: Floats, chunk: int) -> Floats:
    """Prefill tokens lost to heads that fit only because `owed` tokens are not filled yet.

    If m - 1 heads are let in beside the rightful ones, all share free + owed tokens at equal pace and give up one by
    one, the youngest first, when (free + owed) / m, / (m - 1), ... is reached: (free + owed) (1/2 + ... + 1/m).
    """
    most = np.floor(np.clip((free + owed - head) / chunk, 0.0, 64.0)) + 2.0
    harmonic = np.log(most) + np.euler_gamma - 1.0 + 0.5 / most
    return np.where(head <= free + owed, (free + owed) * harmonic, 0.0)


def _spread(size: Floats, when: Ints, steps: int, chunk: int, room: float) -> tuple[Floats, Floats]:
    """Prompt tokens and pairs per step of prompts `size` admitted at steps `when`, `room` tokens for all together."""
    parts = np.ceil(size / chunk).astype(int)
    owner, nth = np.repeat(np.arange(len(size)), parts), _within(parts)
    order = np.lexsort((owner, when[owner] + nth))
    at, start = (when[owner] + nth)[order], (nth * chunk)[order].astype(float)
    part = np.minimum(size[owner] - nth * chunk, chunk)[order]
    done = np.concatenate([[0.0], np.cumsum(part)])
    pairs = np.concatenate([[0.0], np.cumsum(part * start + part**2 / 2)])
    front = limited(done[np.searchsorted(at, np.arange(steps), side="right")], room)
    k = np.minimum(np.searchsorted(done, front, side="right") - 1, len(part) - 1)
    inside = front - done[k]
    return _rise(front), np.maximum(_rise(pairs[k] + inside * start[k] + inside**2 / 2), 0.0)


def _rise(x: Floats) -> Floats:
    return np.asarray(np.diff(x, prepend=x[0]))


def _within(count: Ints) -> Ints:
    """0, 1, ..., count[0] - 1, 0, 1, ..., count[1] - 1, ..."""
    return np.asarray(np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count))
