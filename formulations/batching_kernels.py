"""Compiled loops of the batching bounds: list schedules, and the dynamic programs over chains of large completions.

Notation of README.md, "Chains": V[t, k] is the gain of a completion of size class k in round t (`NEVER` if there is
none), peaks ascend with k, and a request of peak P that completes at c would hold P - (c - t) tokens in round t; up to
`slack` tokens it may not have started. B[t, k, q] is the best gain after a completion (t, k) if the next large request
would hold at most q tokens in round t; A[t, k, q] is the best gain before it if the next would hold q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np

from llmopt.arrays import Floats, Ints

F = TypeVar("F", bound=Callable[..., object])
NEVER = -1e18


def compiled(function: F) -> F:
    """Compile with numba, cached on disk."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@compiled
def earliest_start(p: int, prompt: int, output: int, capacity: int, usage: Ints) -> int:
    """The first round from p on in which a request can start beside `usage` (tokens by rounds) and run to its end."""
    k = output
    while k > 0:
        room = max(capacity - usage[p + k] - prompt, 0)
        if room < k:
            p += k - room
            k = output
        else:
            k -= 1
    return p


@compiled
def list_schedule(
    order: Ints, arrival: Ints, prompt: Ints, output: Ints, capacity: int, usage: Ints, start: Ints
) -> int:
    """Start each request of `order` in its earliest round that fits with those before it; return sum of c_i - a_i."""
    usage[:] = 0
    total = 0
    for i in order:
        p = earliest_start(arrival[i], prompt[i], output[i], capacity, usage)
        for k in range(1, output[i] + 1):
            usage[p + k] += prompt[i] + k
        start[i] = p
        total += p + output[i] - arrival[i]
    return total


@compiled
def anneal(
    order: Ints,
    arrival: Ints,
    prompt: Ints,
    output: Ints,
    capacity: int,
    length: int,
    iterations: int,
    seed: int,
    best: Ints,
    halt: Ints,
) -> int:
    """Simulated annealing over the order of a list schedule by near swaps and insertions, until `halt`[0] is set.

    Returns the best latency; its starts are left in `best`, shape (n,).
    """
    np.random.seed(seed)  # noqa: NPY002 (numba knows only the legacy generator, private to compiled code)
    n = len(order)
    usage, start, reach = np.zeros(length + 1, np.int64), np.zeros(n, np.int64), max(n // 4, 3)
    least = now = list_schedule(order, arrival, prompt, output, capacity, usage, start)
    best[:], held = start, order.copy()
    for step in range(iterations if n > 1 else 0):
        if halt[0]:
            break
        heat = 0.001 * least * (1 - step / iterations) + 1e-9
        order[:] = held
        a = np.random.randint(n)  # noqa: NPY002
        b = min(max(a + np.random.randint(-reach, reach + 1), 0), n - 1)  # noqa: NPY002
        moved = order[a]
        if np.random.random() < 0.5:  # noqa: NPY002
            order[a] = order[b]
        elif a < b:
            order[a:b] = held[a + 1 : b + 1]
        else:
            order[b + 1 : a + 1] = held[b:a]
        order[b] = moved
        value = list_schedule(order, arrival, prompt, output, capacity, usage, start)
        if value <= now or np.random.random() < np.exp((now - value) / heat):  # noqa: NPY002
            now, held[:] = value, order
            if value < least:
                least, best[:] = value, start
    return least


@compiled
def next_room(peak: int, held: int, gap: int, capacity: int, slack: int) -> int:
    """Tokens that the third request may hold, at most, when the second completes, `gap` rounds after the first.

    When the first completes with `peak` tokens, the second holds `held`, which leaves M - peak - held for the third;
    up to `slack` tokens it may not have started then. -1 if the first two do not fit together.
    """
    counted = held if held > slack else 0
    left = capacity - peak - counted
    return -1 if left < 0 else min(capacity, gap + max(left, slack))


@compiled
def copies(k: int, other: int, turn: int, gap: int, members: int) -> bool:
    """Whether class `other` may complete `gap` rounds after class k: at once only in the order of falling peaks.

    Turn 0 handles all but several completions of one class in one round, which later turns add one by one; a class
    with one member never follows itself.
    """
    if other == k and members == 1:
        return False
    if turn > 0:
        return other == k and gap == 0
    return gap > 0 or other < k


@compiled
def gains_after(V: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> tuple[Floats, Floats]:
    """B of shape (T + 1, K, M + 1), and the best gain of a whole chain from each round on, shape (T + 2 + reach,)."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    B, first = np.zeros((rounds, classes, capacity + 1)), np.zeros(rounds + reach + 1)
    for t in range(rounds - 1, -1, -1):
        first[t] = first[t + 1]
        for k in range(classes):
            best = B[t, k]
            best[:] = first[t + reach]
            if V[t, k] <= NEVER:
                continue
            for turn in range(max(1, min(count[k], capacity // peak[k]))):
                for other in range(classes) if turn == 0 else range(k, k + 1):
                    for gap in range(min(reach, rounds - t) if turn == 0 else 1):
                        if V[t + gap, other] <= NEVER or not copies(k, other, turn, gap, count[k]):
                            continue
                        room = next_room(peak[k], peak[other] - gap, gap, capacity, slack)
                        if room >= 0:
                            held = max(0, peak[other] - gap)
                            best[held] = max(best[held], V[t + gap, other] + B[t + gap, other, room])
                for q in range(1, capacity + 1):
                    best[q] = max(best[q], best[q - 1])
            first[t] = max(first[t], V[t, k] + best[capacity])
    return B, first


@compiled
def gains_before(V: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> Floats:
    """A of shape (T + 1, K, M + 1)."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    A, last = np.zeros((rounds, classes, capacity + 1)), np.zeros(rounds + 1)
    for t in range(rounds):
        for k in range(classes - 1, -1, -1):
            if V[t, k] <= NEVER:
                continue
            best = A[t, k]
            best[:] = last[t - reach] if t >= reach else 0.0
            for turn in range(max(1, min(count[k], capacity // peak[k]))):
                for other in range(classes) if turn == 0 else range(k, k + 1):
                    for gap in range(min(reach, t + 1) if turn == 0 else 1):
                        if V[t - gap, other] <= NEVER or not copies(other, k, turn, gap, count[k]):
                            continue
                        held = peak[k] - gap
                        room = next_room(peak[other], held, gap, capacity, slack)
                        if room >= 0:
                            best[room] = max(best[room], V[t - gap, other] + A[t - gap, other, max(0, held)])
                for q in range(capacity - 1, -1, -1):
                    best[q] = max(best[q], best[q + 1])
            last[t] = max(last[t], V[t, k] + best[0])
        last[t + 1] = last[t]
    return A


@compiled
def best_chain(V: Floats, B: Floats, first: Floats, peak: Ints, count: Ints, capacity: int, slack: int) -> Ints:
    """A chain of largest gain as rows (t, k), followed through the table of `gains_after`."""
    rounds, classes = V.shape
    reach = peak[-1] + 1
    chain = np.zeros((classes * rounds + 1, 2), np.int64)
    length, t, k, room = 0, 0, -1, capacity
    left = first[0]
    while left > 1e-9 and length < len(chain):
        if k < 0 or abs(first[min(t + reach, rounds)] - left) <= 1e-9:
            t = t + reach if k >= 0 else 0
            while first[t + 1] >= left - 1e-9:
                t += 1
            k = classes - 1
            while V[t, k] <= NEVER or V[t, k] + B[t, k, capacity] < left - 1e-9:
                k -= 1
            room = capacity
        else:
            t, k, room = _follower(V, B, peak, count, capacity, slack, t, k, room, left)
        chain[length, 0], chain[length, 1] = t, k
        length += 1
        left = B[t, k, room]
    return chain[:length]


@compiled
def _follower(
    V: Floats, B: Floats, peak: Ints, count: Ints, capacity: int, slack: int, t: int, k: int, q: int, left: float
) -> tuple[int, int, int]:
    """The completion that follows (t, k) with value `left`, and the room it leaves for the one after."""
    best, found = -1.0, (t, k, q)
    for other in range(V.shape[1]):
        for gap in range(min(peak[-1] + 1, V.shape[0] - t)):
            held = peak[other] - gap
            if (
                V[t + gap, other] <= NEVER
                or held > q
                or not copies(k, other, int(other == k and gap == 0), gap, count[k])
            ):
                continue
            room = next_room(peak[k], held, gap, capacity, slack)
            if room >= 0 and V[t + gap, other] + B[t + gap, other, room] > best:
                best, found = V[t + gap, other] + B[t + gap, other, room], (t + gap, other, room)
    return found
