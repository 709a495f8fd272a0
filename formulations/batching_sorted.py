"""Sorted-F and its relatives guided by a linear program: whom to serve first when prompts and outputs differ.

Each ranks the waiting queue of a replica anew every few steps, as if all who wait had just arrived together, which is
the setting of arXiv 2508.06133; with `at_once` it orders all requests of a run beforehand, as in that paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations.batching_grid import GridRelaxation, mean_starts
from formulations.batching_queue import all_rounds, keys_of, period, ranking, volumes, waiting_rounds
from llmopt.arrays import Floats, Ints
from llmopt.batcher import Batcher, Candidates, Replan
from llmopt.plan import Plan
from llmopt.rounds import Rounds
from llmopt.scenario import Scenario

EXACT = 10
"""At most so many requests are searched for the subset of smallest F; 2^10 subsets take some microseconds each."""
Order = Callable[[Rounds, int], Ints]


def order_by_f(instance: Rounds, most: int, exact: int = EXACT) -> Ints:
    """Requests in the order of Sorted-F, arrivals ignored, shape (n,).

    Batch after batch that can start together, each of smallest F(X) = sum_{i in X} o_i / |X|^2, ties to the larger;
    inside a batch short outputs first. The best batch is sought among the prefixes of the orders by output, peak and
    volume, and among all subsets once `exact` requests are left. `most`: requests of a batch.
    """
    if not len(instance):
        return np.zeros(0, dtype=np.int64)
    from formulations.batching_sorted_kernel import places_by_f

    keys = (instance.output, instance.peak, instance.volume)
    orders = np.stack([np.argsort(key, kind="stable") for key in keys])
    return np.argsort(places_by_f(orders, instance.prompt, instance.output, instance.capacity, most, exact))


def order_by_start(instance: Rounds, most: int) -> Ints:
    """Requests by their mean start in the grid relaxation (B24) to (B26), smaller volumes first where these agree."""
    start = mean_starts(GridRelaxation(), instance)
    return np.lexsort((instance.volume, np.round(start, 6)))


def order_by_swaps(instance: Rounds, most: int) -> Ints:
    """`order_by_start`, cut into batches; swaps between neighbouring batches while F of the earlier one falls."""
    if not len(instance):
        return np.zeros(0, dtype=np.int64)
    from formulations.batching_sorted_kernel import swapped

    start = order_by_start(instance, most)
    return np.asarray(swapped(start, instance.prompt, instance.output, instance.capacity, most))


@dataclass(frozen=True)
class _Sorted:
    """Keys by `rule` for the queue of each replica, every `steps` full decode steps, or for all requests beforehand.

    at_once: order all requests of the run beforehand by their true outputs, whenever they arrive; steps: full decode
    steps between two plans; plans: at most so many over the horizon of arrivals.
    """

    at_once: bool = False
    steps: int = 5
    plans: int | None = None
    title: ClassVar[str]
    rule: ClassVar[Order]

    @property
    def name(self) -> str:
        """The title of the rule, with -all for the order made beforehand."""
        return f"{self.title}-all" if self.at_once else self.title

    def plan(self, scenario: Scenario) -> Plan:
        """Look-ahead admission along the keys; between two plans newcomers are placed by their believed volume."""
        rule = type(self).rule
        if self.at_once:
            return Plan(
                self.name, batcher=Batcher(_beforehand(rule, scenario), admission="lookahead", clairvoyant=True)
            )
        every = period(scenario, self.steps, self.plans)
        batcher = Batcher(
            volumes,
            admission="lookahead",
            replan=Replan(every, ranking(lambda now: rule(waiting_rounds(now), now.pool.max_batch))),
        )
        return Plan(self.name, batcher=batcher, figures={"plans_every_s": every})


def _beforehand(rule: Order, scenario: Scenario) -> Callable[[Candidates], Floats]:
    most = min(pool.max_batch for pool in scenario.pools)

    def order(candidates: Candidates) -> Floats:
        """Keys of all requests of the run, shape (n,)."""
        requests = all_rounds(scenario, candidates)
        return keys_of(rule(requests, most), requests.volume)

    return order


@dataclass(frozen=True)
class SortedF(_Sorted):
    """Batches of smallest F(X) = sum of outputs / |X|^2 one after the other, admitted in that order by look-ahead.

    |X| requests share a time of the order of their mean output while they delay all others, so F is the time per
    request done; a long prompt that fills the memory no longer goes first because its output is short.

    Source: Sorted-F, Wang, Ye, Zhou, arXiv 2508.06133. Guarantee reported there: total latency at most 48 times the
    optimum for requests that all arrive together with known outputs and the batch of smallest F. Here the batch is
    sought among prefixes of three orders (all subsets of the last ten), and the queue is ranked anew as requests
    arrive, for which no guarantee is claimed.
    """

    title: ClassVar[str] = "sorted-f"
    rule: ClassVar[Order] = staticmethod(order_by_f)


@dataclass(frozen=True)
class SortedLp(_Sorted):
    """Requests by their mean start in the linear relaxation of the time-indexed program, admitted by look-ahead.

    The relaxation is (B5) (B6) on a grid of at most 60 blocks with alike requests counted together, (B24) to (B26).

    Source: Sorted-LP of Wang, Ye, Zhou, arXiv 2508.06133; details are our reading. No guarantee.
    """

    plans: int | None = 200
    title: ClassVar[str] = "sorted-lp"
    rule: ClassVar[Order] = staticmethod(order_by_start)


@dataclass(frozen=True)
class LpSwap(_Sorted):
    """The order of Sorted-LP, cut into batches that can start together; then the longest of a batch and the shortest of
    the next swap while F of the earlier batch falls and both still fit.

    Source: LP-Swap of Wang, Ye, Zhou, arXiv 2508.06133, which says to swap towards lower F; which swaps are tried is
    our reading. No guarantee.
    """

    plans: int | None = 200
    title: ClassVar[str] = "lp-swap"
    rule: ClassVar[Order] = staticmethod(order_by_swaps)
