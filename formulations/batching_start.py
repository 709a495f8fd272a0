"""Schedules in rounds from list rules: what exact methods start from; each returns starts, shape (n,)."""

from __future__ import annotations

import numpy as np

from formulations.batching_sorted import order_by_f
from llmopt.arrays import Floats, Ints
from llmopt.rounds import Rounds


def mc_sf(instance: Rounds) -> Ints:
    """Shortest output first with the exact memory check, stopping at the first request that does not fit.

    Source: MC-SF of arXiv 2502.07115, with outputs known.
    """
    return admitted(instance, instance.output.astype(float))


def by_volume(instance: Rounds) -> Ints:
    """As MC-SF in the order of volumes s o + o (o + 1) / 2, the order of the memory-area bound."""
    return admitted(instance, instance.volume.astype(float))


def sorted_f(instance: Rounds) -> Ints:
    """Sorted-F: batches of smallest F(X) = sum of outputs / |X|^2 one after the other, then admitted in that order.

    See `batching_sorted.order_by_f`. Source: arXiv 2508.06133.
    """
    place = np.empty(len(instance))
    place[order_by_f(instance, len(instance))] = np.arange(len(instance))
    return admitted(instance, place)


def admitted(instance: Rounds, priority: Floats) -> Ints:
    """Each round, admit arrived requests by ascending priority while memory suffices at every later completion."""
    start = np.full(len(instance), -1, dtype=np.int64)
    order = np.argsort(priority, kind="stable")
    running: list[int] = []
    now = 0
    while (start < 0).any():
        running = [j for j in running if start[j] + instance.output[j] > now]
        for i in order[(start[order] < 0) & (instance.arrival[order] <= now)].tolist():
            start[i] = now
            if not _fits(instance, [*running, i], start[[*running, i]], now):
                start[i] = -1
                break
            running.append(i)
        now += 1
    return start


def _fits(instance: Rounds, chosen: list[int], start: Ints, now: int) -> bool:
    """Whether requests `chosen` with their starts hold at most M tokens at every completion after `now`."""
    s, o = instance.prompt[chosen], instance.output[chosen]
    at = np.unique(start + o)
    age = at[at > now][:, None] - start
    return bool((np.where(age <= o, s + age, 0).sum(axis=1) <= instance.capacity).all())


def best_start(instance: Rounds, iterations: int | None = None, seed: int = 0) -> Ints:
    """The best of the list rules, improved by simulated annealing over the order of a list schedule.

    The number of `iterations` defaults to what takes a second or two, 200 000 at most.
    """
    from formulations.batching_kernels import anneal

    iterations = min(200_000, 400_000_000 // (instance.horizon + 1)) if iterations is None else iterations
    rules = (mc_sf, by_volume, sorted_f) if not instance.arrival.any() else (mc_sf, by_volume)
    best = min((rule(instance) for rule in rules), key=instance.latency)
    for key in (best, best + instance.output):
        order = np.argsort(key, kind="stable")
        data = (instance.arrival, instance.prompt, instance.output, instance.capacity)
        _, found = anneal(order, *data, instance.horizon + instance.capacity, iterations, seed)
        best = min(best, found, key=instance.latency)
    return best
