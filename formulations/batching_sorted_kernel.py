"""Compiled loops of the rules that serve requests in batches: which batch has the smallest F, and swaps between them.

A batch can start together if at every age t those with an output of t or more, s_i + t tokens each, fit into memory.
"""

from __future__ import annotations

import numpy as np

from formulations.batching_kernels import compiled, earliest_start
from llmopt.arrays import Ints


@compiled
def places_by_f(orders: Ints, prompt: Ints, output: Ints, capacity: int, most: int, exact: int) -> Ints:
    """Place of each request when batches of smallest F = sum of outputs / size^2 follow each other, shape (n,).

    The best batch of up to `most` requests is one of the prefixes of the rows of `orders` (n_orders, n) that can start
    together, or any subset where at most `exact` requests are left. Inside a batch short outputs come first.
    """
    n = len(prompt)
    place, batch, best = np.full(n, -1), np.zeros(n, np.int64), np.zeros(n, np.int64)
    done = 0
    while done < n:
        if n - done <= exact:
            size = _best_subset(orders[0], place, prompt, output, capacity, most, n - done, batch, best)
        else:
            row, size, total = 0, 0, 0
            for r in range(len(orders)):
                found, sum_ = _grow(orders[r], place, prompt, output, capacity, most, batch)
                if size == 0 or _better(sum_, found, total, size):
                    row, size, total = r, found, sum_
            _grow(orders[row], place, prompt, output, capacity, size, best)
        for k in range(size):
            place[best[k]] = done + k
        done += size
    return place


@compiled
def swapped(order: Ints, prompt: Ints, output: Ints, capacity: int, most: int) -> Ints:
    """The order cut into batches that can start together, then improved by swaps between neighbouring batches.

    The longest of a batch and the shortest of the next change places while that lowers F of the earlier one and both
    can still start together.
    """
    n = len(order)
    first, count = _cut(order, prompt, output, capacity, most)
    changed, passes = True, 0
    while changed and passes < n:
        changed, passes = False, passes + 1
        for b in range(count - 1):
            here, there = order[first[b] : first[b + 1]], order[first[b + 1] : first[b + 2]]
            while output[there[0]] < output[here[-1]] and _swap(here, there, prompt, output, capacity):
                changed = True
    return order


@compiled
def _swap(here: Ints, there: Ints, prompt: Ints, output: Ints, capacity: int) -> bool:
    """Swap the last of one batch with the first of the next if both can still start together."""
    one, other = here.copy(), there.copy()
    one[-1], other[0] = there[0], here[-1]
    _sort(one, output)
    _sort(other, output)
    good = fits(one, len(one), prompt, output, capacity) and fits(other, len(other), prompt, output, capacity)
    if good:
        here[:], there[:] = one, other
    return good


@compiled
def prefix_schedule(order: Ints, running: int, prompt: Ints, output: Ints, capacity: int, usage: Ints) -> int:
    """Total latency when requests start in this order, each as soon as memory allows but not before the one before it.

    The first `running` of `order` have started at 0, whether memory suffices or not. This is what a queue does that
    looks ahead and stops at the first that does not fit; `usage` is room for tokens by rounds.
    """
    usage[:] = 0
    total = p = 0
    for place, i in enumerate(order):
        if place >= running:
            p = earliest_start(p, prompt[i], output[i], capacity, usage)
        for age in range(1, output[i] + 1):
            usage[p + age] += prompt[i] + age
        total += p + output[i]
    return total


@compiled
def fits(batch: Ints, size: int, prompt: Ints, output: Ints, capacity: int) -> bool:
    """Whether the first `size` of a batch in order of output can start together."""
    held = 0
    for k in range(size - 1, -1, -1):
        held += prompt[batch[k]]
        if held + (size - k) * output[batch[k]] > capacity:
            return False
    return True


@compiled
def _better(total: int, size: int, best_total: int, best_size: int) -> bool:
    """Whether total / size^2 is smaller, or as small with more requests."""
    here, there = total * best_size**2, best_total * size**2
    return here < there or (here == there and size > best_size)


@compiled
def _grow(
    order: Ints, place: Ints, prompt: Ints, output: Ints, capacity: int, most: int, batch: Ints
) -> tuple[int, int]:
    """Fill `batch` in order of output with those of `order` without a place; size and sum of its best prefix."""
    size = total = best_size = best_total = 0
    for i in order:
        if place[i] >= 0:
            continue
        if size == most:
            break
        k = size
        while k > 0 and output[batch[k - 1]] > output[i]:
            batch[k] = batch[k - 1]
            k -= 1
        batch[k] = i
        # whoever fits nowhere beside others still gets a batch of its own
        if size > 0 and not fits(batch, size + 1, prompt, output, capacity):
            break
        size += 1
        total += output[i]
        if size == 1 or _better(total, size, best_total, best_size):
            best_size, best_total = size, total
    return best_size, best_total


@compiled
def _best_subset(
    order: Ints, place: Ints, prompt: Ints, output: Ints, capacity: int, most: int, left: int, batch: Ints, best: Ints
) -> int:
    """Fill `best` with the subset of smallest F of those without a place, `order` being that of outputs; its size."""
    rest, n = np.zeros(left, np.int64), 0
    for i in order:
        if place[i] < 0:
            rest[n] = i
            n += 1
    best[0], best_size, best_total = rest[0], 1, output[rest[0]]
    for mask in range(1, 1 << left):
        size = total = 0
        for k in range(left):
            if mask >> k & 1:
                batch[size] = rest[k]
                total += output[rest[k]]
                size += 1
        if size <= most and _better(total, size, best_total, best_size) and fits(batch, size, prompt, output, capacity):
            best[:size] = batch[:size]
            best_size, best_total = size, total
    return best_size


@compiled
def _cut(order: Ints, prompt: Ints, output: Ints, capacity: int, most: int) -> tuple[Ints, int]:
    """First index of each batch and one past the last, and their number; every batch is sorted by output in place."""
    n = len(order)
    first, count, begin = np.zeros(n + 1, np.int64), 0, 0
    for k in range(1, n + 1):
        whole = k == n or k - begin == most
        if not whole:
            trial = order[begin : k + 1].copy()
            _sort(trial, output)
            whole = not fits(trial, len(trial), prompt, output, capacity)
        if whole:
            _sort(order[begin:k], output)
            count += 1
            first[count] = begin = k
    return first, count


@compiled
def _sort(batch: Ints, output: Ints) -> None:
    """Insertion sort by output, which batches that are nearly sorted like."""
    for k in range(1, len(batch)):
        i, j = batch[k], k
        while j > 0 and output[batch[j - 1]] > output[i]:
            batch[j] = batch[j - 1]
            j -= 1
        batch[j] = i
