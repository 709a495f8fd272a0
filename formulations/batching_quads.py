"""Compiled loops over chains in which any four large completions in a row share memory: slower, tighter than three.

Notation of `batching_kernels`. D[t, k, q, r] is the best gain after a completion (t, k) if the next large request would
hold at most q tokens in round t and the one after it at most r; E[t, k, q, r] is the best gain before it if the next
would hold q and the one after it may hold up to r. D grows and E falls in q and r.
"""

from __future__ import annotations

import numpy as np

from formulations.batching_kernels import NEVER, compiled, copies
from llmopt.arrays import Floats, Ints


@compiled
def _left(peak: int, held: int, capacity: int, slack: int) -> int:
    """Tokens left when a request completes with `peak` tokens beside one that holds `held`, if it surely started."""
    return capacity - peak - held if held > slack else capacity - peak


@compiled
def gains_after(V: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> tuple[Floats, Floats]:
    """D of shape (T + 1, K, M + 1, M + 1), and the best gain of a whole chain from each round on."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    D, first = np.zeros((rounds, classes, capacity + 1, capacity + 1)), np.zeros(rounds + reach + 1)
    for t in range(rounds - 1, -1, -1):
        first[t] = first[t + 1]
        for k in range(classes):
            if V[t, k] <= NEVER:
                continue
            D[t, k] = first[t + reach]
            for turn in range(max(1, min(count[k], capacity // peak[k]))):
                for other in range(classes) if turn == 0 else range(k, k + 1):
                    for gap in range(min(reach, rounds - t) if turn == 0 else 1):
                        if V[t + gap, other] > NEVER and copies(k, other, turn, gap, count[k]):
                            left = _left(peak[k], peak[other] - gap, capacity, slack)
                            if left >= 0:
                                held = max(0, peak[other] - gap)
                                _follow(D, t, k, held, t + gap, other, V[t + gap, other], gap, left, capacity, slack)
                _grow(D, t, k)
            first[t] = max(first[t], V[t, k] + D[t, k, capacity, capacity])
    return D, first


@compiled
def _follow(
    D: Floats,
    t: int,
    k: int,
    held: int,
    later: int,
    other: int,
    gain: float,
    gap: int,
    left: int,
    capacity: int,
    slack: int,
) -> None:
    """Offer D[t, k, held, r] the completion (later, other), for every size r of the third request in round t."""
    third = min(capacity, slack + gap)
    best = gain + D[later, other, third, min(capacity, gap + max(left, slack))]
    D[t, k, held, 0] = max(D[t, k, held, 0], best)
    for r in range(slack + 1, min(left, capacity - gap) + 1):
        value = gain + D[later, other, r + gap, min(capacity, gap + max(left - r, slack))]
        D[t, k, held, r] = max(D[t, k, held, r], value)


@compiled
def _grow(D: Floats, t: int, k: int) -> None:
    """Make D[t, k] monotone in both sizes."""
    for q in range(D.shape[2]):
        for r in range(D.shape[3]):
            value = D[t, k, q, r]
            if q > 0:
                value = max(value, D[t, k, q - 1, r])
            if r > 0:
                value = max(value, D[t, k, q, r - 1])
            D[t, k, q, r] = value


@compiled
def gains_before(V: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> Floats:
    """E of shape (T + 1, K, M + 1, M + 1)."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    E, last = np.full((rounds, classes, capacity + 1, capacity + 1), NEVER), np.zeros(rounds + 1)
    for t in range(rounds):
        for k in range(classes - 1, -1, -1):
            if V[t, k] <= NEVER:
                continue
            E[t, k, capacity, capacity] = last[t - reach] if t >= reach else 0.0
            for turn in range(max(1, min(count[k], capacity // peak[k]))):
                for other in range(classes) if turn == 0 else range(k, k + 1):
                    for gap in range(min(reach, t + 1) if turn == 0 else 1):
                        if V[t - gap, other] > NEVER and copies(other, k, turn, gap, count[k]):
                            left = _left(peak[other], peak[k] - gap, capacity, slack)
                            if left >= 0:
                                held = max(0, peak[k] - gap)
                                _precede(E, t, k, held, t - gap, other, V[t - gap, other], gap, left, capacity, slack)
                _shrink(E, t, k)
            last[t] = max(last[t], V[t, k] + E[t, k, 0, 0])
        last[t + 1] = last[t]
    return E


@compiled
def _precede(
    E: Floats,
    t: int,
    k: int,
    held: int,
    earlier: int,
    other: int,
    gain: float,
    gap: int,
    left: int,
    capacity: int,
    slack: int,
) -> None:
    """Offer E[t, k, q, r] the completion (earlier, other), for every size of the request after k."""
    next_, after = min(capacity, slack + gap), min(capacity, gap + max(left, slack))
    E[t, k, next_, after] = max(E[t, k, next_, after], gain + E[earlier, other, held, 0])
    for q in range(slack + 1, min(left, capacity - gap) + 1):
        after = min(capacity, gap + max(left - q, slack))
        E[t, k, q + gap, after] = max(E[t, k, q + gap, after], gain + E[earlier, other, held, q])


@compiled
def _shrink(E: Floats, t: int, k: int) -> None:
    for q in range(E.shape[2] - 1, -1, -1):
        for r in range(E.shape[3] - 1, -1, -1):
            value = E[t, k, q, r]
            if q + 1 < E.shape[2]:
                value = max(value, E[t, k, q + 1, r])
            if r + 1 < E.shape[3]:
                value = max(value, E[t, k, q, r + 1])
            E[t, k, q, r] = value


@compiled
def best_chain(V: Floats, D: Floats, first: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> Ints:
    """A chain of largest gain as rows (t, k), followed through the table of `gains_after`."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    chain = np.zeros((classes * rounds + 1, 2), np.int64)
    length, t, k, q, r = 0, 0, -1, capacity, capacity
    left = first[0]
    while left > 1e-9 and length < len(chain):
        if k < 0 or abs(first[min(t + reach, rounds)] - left) <= 1e-9:
            t = t + reach if k >= 0 else 0
            while first[t + 1] >= left - 1e-9:
                t += 1
            k = classes - 1
            while V[t, k] <= NEVER or V[t, k] + D[t, k, capacity, capacity] < left - 1e-9:
                k -= 1
            q, r = capacity, capacity
        else:
            t, k, q, r = _follower(V, D, peak, count, capacity, slack, t, k, q, r)
        chain[length, 0], chain[length, 1] = t, k
        length += 1
        left = D[t, k, q, r]
    return chain[:length]


@compiled
def _follower(
    V: Floats, D: Floats, peak: Ints, count: Ints, capacity: int, slack: int, t: int, k: int, q: int, r: int
) -> tuple[int, int, int, int]:
    """The best completion after (t, k) under the sizes q and r, and the sizes it leaves."""
    best, found = -1.0, (t, k, 0, 0)
    for other in range(V.shape[1]):
        for gap in range(min(peak[-1] + 1, V.shape[0] - t)):
            held = peak[other] - gap
            turn = int(other == k and gap == 0)
            if held > q or V[t + gap, other] <= NEVER or not copies(k, other, turn, gap, count[k]):
                continue
            left = _left(peak[k], held, capacity, slack)
            for third in range(slack, max(slack, min(r, left, capacity - gap)) + 1 if left >= 0 else slack):
                beyond = min(capacity, gap + max(left - (third if third > slack else 0), slack))
                value = V[t + gap, other] + D[t + gap, other, min(capacity, third + gap), beyond]
                if value > best:
                    best, found = value, (t + gap, other, min(capacity, third + gap), beyond)
    return found
