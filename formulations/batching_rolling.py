"""A policy that plans ahead again and again: what runs and waits now, with predicted outputs, as a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from formulations.batching_grid import GridRelaxation, mean_starts
from formulations.batching_queue import period, ranking, running_rounds, volumes, waiting_rounds
from formulations.batching_sorted import order_by_f
from llmopt.arrays import Ints
from llmopt.batcher import Batcher, Replan, Snapshot
from llmopt.plan import Plan
from llmopt.rounds import Rounds
from llmopt.scenario import Scenario

FEW = 6
"""Up to so many waiting requests every order is tried: 720 schedules take some milliseconds."""


@dataclass(frozen=True)
class RollingHorizon:
    """At regular times, the order that finishes those who run and wait soonest, as far as anybody knows by then.

    Of up to six waiting requests every order is tried. Of more, these: by mean start in the grid relaxation (B24) to
    (B26) with the memory of the running requests taken, by Sorted-F, by believed output, and by volume. An order is
    worth the total latency in rounds of a queue that keeps it, looks ahead, and stops at the first that does not fit
    beside those before it and those that run. Believed outputs count as true, arrivals to come do not exist, and steps
    all last the same; it is a heuristic that solves programs, and no bound comes with it.

    steps, plans: full decode steps between two plans, and most plans over the horizon of arrivals.

    Source: receding horizon over the program of Jaillet et al., arXiv 2502.07115, named as a variant in arXiv
    2508.06133; candidates and grid are ours. No guarantee.
    """

    steps: int = 5
    plans: int = 200
    name: str = "rolling-horizon"

    def plan(self, scenario: Scenario) -> Plan:
        """Look-ahead admission along the keys; between two plans newcomers are placed by their believed volume."""
        every = period(scenario, self.steps, self.plans)
        batcher = Batcher(volumes, admission="lookahead", replan=Replan(every, ranking(planned)))
        return Plan(self.name, batcher=batcher, figures={"plans_every_s": every})


def planned(snapshot: Snapshot) -> Ints:
    """The best order found of the waiting requests, shape (w,)."""
    return best_order(waiting_rounds(snapshot), running_rounds(snapshot), snapshot.pool.max_batch)


def best_order(waiting: Rounds, running: Rounds, most: int) -> Ints:
    """The candidate of least total latency beside what runs, shape (w,); the first of equals."""
    if len(waiting) < 2:
        return np.arange(len(waiting))
    if len(waiting) <= FEW:
        orders = [np.array(order) for order in permutations(range(len(waiting)))]
    else:
        orders = [
            by_start(waiting, running),
            order_by_f(waiting, most),
            np.argsort(waiting.output, kind="stable"),
            np.argsort(waiting.volume, kind="stable"),
        ]
    return min(orders, key=queue_latency(waiting, running))


def by_start(waiting: Rounds, running: Rounds) -> Ints:
    """Waiting requests by mean start in the grid relaxation beside what runs, smaller volumes first where equal."""
    taken = running.usage(np.zeros(len(running), dtype=np.int64))[1:].astype(float)
    start = mean_starts(GridRelaxation(), waiting, taken)
    return np.lexsort((waiting.volume, np.round(start, 6)))


def queue_latency(waiting: Rounds, running: Rounds) -> Callable[[Ints], int]:
    """Total latency, in rounds from now, of what runs and of a queue in a given order that stops at a misfit."""
    from formulations.batching_sorted_kernel import prefix_schedule

    prompt = np.append(running.prompt, waiting.prompt)
    output = np.append(running.output, waiting.output)
    usage = np.zeros(2 * int(output.sum()) + 2, dtype=np.int64)
    first = np.arange(len(running))

    def latency(order: Ints) -> int:
        everybody = np.append(first, len(first) + order)
        return int(prefix_schedule(everybody, len(first), prompt, output, waiting.capacity, usage))

    return latency
