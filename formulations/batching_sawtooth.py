"""Compiled loops of the sawtooth: what whole requests, however they start and complete, can be paid for memory.

Of a schedule only two numbers are kept, tokens held U_t and requests running N_t. Each round U grows by N, a start adds
a prompt s, and a completion takes a whole peak P at once. Mathematics: README.md, "Sawtooth".
"""

from __future__ import annotations

import numpy as np

from formulations.batching_kernels import NEVER, compiled
from llmopt.arrays import Bools, Floats, Ints


@compiled
def sawtooth(
    price: Floats, number: Floats, ending: Floats, starts: Bools, ends: Bools, capacity: int
) -> tuple[float, Ints, Ints, Ints]:
    """The most that a path can earn, with its tokens (T + 1,), requests (T + 1,) and completions (T + 1, M + 1).

    It earns price[t] a token and number[t] a request held in round t, and ending[t, P] for completing a peak P after
    it. starts[t, s] and ends[t, P] say what may start or complete after round t. What happens later than T is free.
    """
    prompts, peaks = _present(starts), _present(ends)
    least = prompts[0] + 1 if len(prompts) else 1
    shape = (len(price) + 1, capacity // least + 1, capacity + 1)
    ended, free = np.full(shape, NEVER), np.full(shape, NEVER)
    free[-1] = 0.0
    for t in range(len(price) - 1, -1, -1):
        _start(ended[t], free[t + 1], t, price, number, prompts[starts[t][prompts]], least)
        _complete(free[t], ended[t], ending[t], peaks[ends[t][peaks]], least)
    tokens, requests, done = _follow(ended, free, price, number, ending, starts, ends, prompts, peaks, least)
    return free[0, 0, 0], tokens, requests, done


@compiled
def _present(table: Bools) -> Ints:
    """Columns of a table that are true somewhere."""
    some = np.zeros(table.shape[1], np.bool_)
    for t in range(table.shape[0]):
        some |= table[t]
    return np.flatnonzero(some)


@compiled
def _next(free: Floats, t: int, price: Floats, number: Floats, n: int, u: int) -> float:
    """What remains to be earned when n requests with u tokens go on into round t + 1, and free[n, u] after it."""
    u += n
    if u >= free.shape[1]:
        return NEVER
    return float(free[n, u] + (price[t + 1] * u + number[t + 1] * n if t + 1 < len(price) else 0.0))


@compiled
def _start(ended: Floats, free: Floats, t: int, price: Floats, number: Floats, prompts: Ints, least: int) -> None:
    """ended[n, u]: the most to be earned after round t with n requests and u tokens left, starting any of `prompts`."""
    most, capacity = ended.shape[0] - 1, ended.shape[1] - 1
    for n in range(most, -1, -1):
        for u in range(capacity - n, n * (least - 1) - 1, -1):
            best = _next(free, t, price, number, n, u)
            if n < most:
                for s in prompts:
                    if u + s > capacity:
                        break
                    if ended[n + 1, u + s] > best:
                        best = ended[n + 1, u + s]
            ended[n, u] = best


@compiled
def _complete(free: Floats, ended: Floats, ending: Floats, peaks: Ints, least: int) -> None:
    """free[n, u]: as `ended`, but before any of `peaks` complete; those left hold `least` tokens each, or more."""
    free[0, 0] = ended[0, 0]
    for n in range(1, free.shape[0]):
        for u in range(n * least, free.shape[1]):
            best = ended[n, u]
            for peak in peaks:
                left = u - peak
                if left < (n - 1) * least:
                    break
                if (n > 1 or left == 0) and free[n - 1, left] + ending[peak] > best:
                    best = free[n - 1, left] + ending[peak]
            free[n, u] = best


@compiled
def _follow(
    ended: Floats,
    free: Floats,
    price: Floats,
    number: Floats,
    ending: Floats,
    starts: Bools,
    ends: Bools,
    prompts: Ints,
    peaks: Ints,
    least: int,
) -> tuple[Ints, Ints, Ints]:
    """Tokens, requests and completions of a path that earns most."""
    last, capacity = len(price), free.shape[2] - 1
    tokens, requests, done = np.zeros(last, np.int64), np.zeros(last, np.int64), np.zeros(ends.shape, np.int64)
    n, u = 0, 0
    for t in range(last):
        tokens[t], requests[t] = u, n
        while free[t, n, u] > ended[t, n, u]:
            for peak in peaks:
                left = u - peak
                fits = ends[t, peak] and left >= (n - 1) * least and (n > 1 or left == 0)
                if fits and free[t, n, u] == free[t, n - 1, left] + ending[t, peak]:
                    done[t, peak] += 1
                    n, u = n - 1, left
                    break
        while ended[t, n, u] > _next(free[t + 1], t, price, number, n, u):
            for s in prompts:
                if starts[t, s] and u + s <= capacity and ended[t, n, u] == ended[t, n + 1, u + s]:
                    n, u = n + 1, u + s
                    break
        u += n
    return tokens, requests, done
