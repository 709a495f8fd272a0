"""Exact search in order of completion: layers of labels, pruned by the chain relaxation and by dominance.

Layer k holds the partial schedules that have completed k requests. With a limited width only the labels of smallest
bound go on; the least bound of those left behind still proves something, so that any width gives a certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from formulations.batching_chain import ChainRelaxation, Multipliers
from llmopt.arrays import Bools, Ints
from llmopt.errors import ScenarioError
from llmopt.rounds import Rounds

if TYPE_CHECKING:
    from formulations.batching_labels import Labels, Search

MOST_REQUESTS, BUFFER, TRIES = 62, 400_000, 300


@dataclass(frozen=True, eq=False)
class Found:
    """Result of a search: the best `start` found, shape (n,), None if none beats the incumbent, and the proven `bound`.

    No schedule has a latency below min(`bound`, latency of the best schedule known).
    """

    start: Ints | None
    bound: float


def search(
    relaxation: ChainRelaxation, at: Multipliers, incumbent: int, width: int, stop: Callable[[], bool] = lambda: False
) -> Found:
    """Look for schedules with a latency below `incumbent`, keeping at most `width` labels a layer.

    Raises
    ------
    ScenarioError
        For more than 62 requests, which no label can tell apart.
    """
    from formulations.batching_labels import Labels

    instance = relaxation.instance
    if len(instance) > MOST_REQUESTS:
        raise ScenarioError(f"exact search takes at most {MOST_REQUESTS} requests, not {len(instance)}; use its bounds")
    data = _prepared(relaxation, at)
    labels = Labels.empty(1, len(instance), instance.capacity + 1)
    labels.usage[:] = instance.capacity
    labels.last[:] = labels.large_round[:] = labels.large_class[:] = labels.end[:] = -1
    left_behind = np.inf
    for _ in range(len(instance)):
        proven = float(labels.bound.min())
        labels = _next_layer(labels, data, incumbent, stop)
        if stop():
            return Found(None, min(left_behind, proven))
        if not len(labels.done):
            return Found(None, left_behind)
        labels = _without_dominated(labels, data)
        if len(labels.done) > width:
            order = np.argsort(labels.bound, kind="stable")
            left_behind = min(left_behind, float(labels.bound[order[width]]))
            labels = labels.take(order[:width])
    return Found(labels.end[labels.latency.argmin()] - instance.output, left_behind)


def _prepared(relaxation: ChainRelaxation, at: Multipliers) -> Search:
    from formulations.batching_labels import Search

    instance, large = relaxation.instance, relaxation.large
    cls, peak, count = relaxation.classes
    cost = relaxation.costs(at)
    after, first = np.zeros((relaxation.rounds, 1, instance.capacity + 1)), np.zeros(1)
    if large.any():
        gains = relaxation.gains(at, cost)[0]
        after, first = relaxation.kernels.gains_after(gains, peak, count, instance.capacity, relaxation.slack)
    rank, twin = _listed(instance)
    return Search(
        instance.arrival,
        instance.output,
        instance.peak,
        instance.capacity,
        relaxation.slack,
        rank,
        twin,
        cls,
        relaxation.allowed,
        cost,
        np.where(large, at.reward, 0.0),
        np.where(large, 0.0, cost.min(axis=1)),
        after if after.ndim == 4 else after[..., None],
        first,
        float(at.reward[large].sum()) - relaxation.paths(at)[0],
    )


def _listed(instance: Rounds) -> tuple[Ints, Ints]:
    """Rank in the order of falling peaks, equal requests next to each other, and the equal one ranked just before."""
    order = np.lexsort((instance.arrival, instance.output, -instance.peak))
    rank, twin = np.empty(len(order), dtype=np.int64), np.full(len(order), -1)
    rank[order] = np.arange(len(order))
    key = np.stack([instance.arrival, instance.prompt, instance.output])
    same = (key[:, order[1:]] == key[:, order[:-1]]).all(axis=0)
    twin[order[1:][same]] = order[:-1][same]
    return rank, twin


def _next_layer(labels: Labels, data: Search, incumbent: int, stop: Callable[[], bool]) -> Labels:
    """All labels with one completion more, expanded into a buffer piece by piece."""
    from formulations.batching_labels import Labels, expand

    size = max(BUFFER, 2 * data.cost.size)
    out, begin, pieces = Labels.empty(size, data.cost.shape[0], labels.usage.shape[1]), 0, []
    while begin < len(labels.done) and not stop():
        written, begin = expand(labels, begin, out, data, incumbent)
        pieces.append(out.take(np.arange(written)))
    return (
        Labels._make(np.concatenate(parts) for parts in zip(*pieces, strict=True)) if pieces else labels.take(_none())
    )


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)


def _without_dominated(labels: Labels, data: Search) -> Labels:
    from formulations.batching_labels import undominated

    bits = (labels.done[:, None] >> np.arange(len(data.arrival))) & 1
    left = len(data.arrival) - int(bits[0].sum())
    late = np.where(data.arrival > 0, data.arrival + data.output, 0)
    latest = np.where(bits == 0, late, 0).max(axis=1, initial=0)
    order = np.lexsort((labels.latency + left * labels.round, labels.done))
    alive: Bools = undominated(labels, order, left, latest, data.rank, TRIES)
    return labels.take(np.flatnonzero(alive))
