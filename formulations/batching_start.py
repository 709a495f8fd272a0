"""Schedules in rounds from list rules: what exact methods start from; each returns starts, shape (n,)."""

from __future__ import annotations

from threading import Thread
from time import thread_time

import numpy as np

from formulations.batching_sorted import order_by_f
from llmopt.arrays import Floats, Ints
from llmopt.rounds import Rounds

SAMPLE = 20_000  # iterations that tell how fast annealing is


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
    iterations = min(200_000, 400_000_000 // (instance.horizon + 1)) if iterations is None else iterations
    rules = (mc_sf, by_volume, sorted_f) if not instance.arrival.any() else (mc_sf, by_volume)
    best = min((rule(instance) for rule in rules), key=instance.latency)
    for key in (best, best + instance.output):
        best = min(best, _annealed(instance, key, iterations, seed, np.zeros(1, dtype=np.int64)), key=instance.latency)
    return best


def _annealed(instance: Rounds, key: Ints, iterations: int, seed: int, halt: Ints) -> Ints:
    """Best list schedule found by annealing from the order of `key`, until done or `halt`[0] is set."""
    from formulations.batching_kernels import anneal

    data = (instance.arrival, instance.prompt, instance.output, instance.capacity)
    order, best = np.argsort(key, kind="stable"), np.zeros(len(instance), dtype=np.int64)
    anneal(order, *data, instance.horizon + instance.capacity, iterations, seed, best, halt)
    return best


class Annealer:
    """Anneals list schedules on another core, runs of some `seconds` of CPU each, until it is left.

    best: the best starts so far, shape (n,); of a run that has ended, or of the last one after leaving.
    """

    def __init__(self, instance: Rounds, best: Ints, seconds: float) -> None:
        self.instance, self.best, self.seconds = instance, best, seconds
        self._halt = np.zeros(1, dtype=np.int64)
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Annealer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt[0] = 1
        self._thread.join()

    def wait(self, seconds: float) -> None:
        """Let it run on for some seconds."""
        self._thread.join(timeout=seconds)

    def _run(self) -> None:
        seed, iterations = 1, SAMPLE
        while not self._halt[0]:
            begin = thread_time()
            found = _annealed(self.instance, self.best, iterations, seed, self._halt)
            self.best = min(self.best, found, key=self.instance.latency)
            took = max(thread_time() - begin, 1e-6)
            seed, iterations = seed + 1, max(int(iterations * self.seconds / took), SAMPLE) if seed == 1 else iterations
