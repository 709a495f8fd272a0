"""Compiled loops of the exact search: labels are sets of completed requests with the memory they leave behind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from formulations.batching_kernels import compiled
from llmopt.arrays import Bools, Floats, Ints


class Labels(NamedTuple):
    """Partial schedules in order of completion; every array has the labels as first axis.

    done: bit i is set if request i is completed; last: the request completed last; round: when; latency: total so
    far; priced: sum of cost_i - lambda_i so far; large_round, large_class: the last large completion, -1 if none;
    bound: on the latency of every completion of the schedule; end: completion round of each request, -1 if not
    completed, shape (n_labels, n); usage: tokens that those to come cannot use in rounds `round`, `round` - 1, ...,
    shape (n_labels, W).
    """

    done: Ints
    last: Ints
    round: Ints
    latency: Ints
    priced: Floats
    large_round: Ints
    large_class: Ints
    bound: Floats
    end: Ints
    usage: Ints

    def take(self, chosen: Ints) -> Labels:
        """The labels with these numbers."""
        return Labels._make([values[chosen] for values in self])

    @classmethod
    def empty(cls, size: int, n: int, width: int) -> Labels:
        """Room for `size` labels."""
        kinds = {"priced": np.float64, "bound": np.float64}
        numbers = [np.zeros(size, dtype=kinds.get(name, np.int64)) for name in cls._fields[:-2]]
        return cls._make([*numbers, *(np.zeros((size, axis), dtype=np.int32) for axis in (n, width))])


class Search(NamedTuple):
    """What a search knows: the instance, the permitted completions, and the chain relaxation at its multipliers.

    rank: place in the order in which requests completing in one round are listed; twin: the equal request that must
    complete first, -1 if none; cls: size class, -1 if small; cost: cost_i(c), shape (n, T + 1); reward: lambda_i, 0
    for small requests; cheapest: min_c cost_i(c) of small requests, 0 for large ones; after, first: tables of
    `gains_after`, the former with four axes; constant: sum of lambda_i - M sum of mu_t.
    """

    arrival: Ints
    output: Ints
    peak: Ints
    capacity: int
    slack: int
    rank: Ints
    twin: Ints
    cls: Ints
    allowed: Bools
    cost: Floats
    reward: Floats
    cheapest: Floats
    after: Floats
    first: Floats
    constant: float


@compiled
def _fits(usage: Ints, label: int, shift: int, end: int, peak: int, output: int, capacity: int, new: Ints) -> bool:
    """Write into `new` the usage of rounds end, end - 1, ... after one more completion; whether memory suffices."""
    for j in range(len(new)):
        held = usage[label, j - shift] if j >= shift else 0
        if end - j <= 0:
            held = capacity
        if j < output:
            held += peak - j
            if held > capacity:
                return False
        new[j] = held
    return True


@compiled
def _usable(new: Ints, capacity: int) -> None:
    """Replace usage by what counts for the requests to come.

    These complete later, so that each holds a token more in every round up to the last completion: j rounds before it
    they can use at most room_j = min(M - usage_j, room_{j-1} - 1) tokens.
    """
    room = capacity - new[0]
    for j in range(1, len(new)):
        room = max(min(capacity - new[j], room - 1), 0)
        new[j] = capacity - room


@compiled
def _slipped(end: Ints, new: Ints, c: int, search: Search, held: Ints) -> bool:
    """Whether some completed request could have run a round earlier, whatever comes: then no best schedule has it so.

    `held` is scratch for the tokens held c, c - 1, ... by completed requests; `new` says what those to come can use.
    """
    window, width, capacity = len(held), len(new), search.capacity
    held[:] = 0
    for x in range(len(end)):
        for j in range(max(c - end[x], 0), min(c - end[x] + search.output[x], window) if end[x] >= 0 else 0):
            held[j] += search.peak[x] - (j - c + end[x])
    for x in range(len(end)):
        first = c - end[x] + search.output[x]
        if end[x] < 0 or c - end[x] >= width or first >= window or end[x] - search.output[x] <= search.arrival[x]:
            continue
        blocked = False
        for j in range(c - end[x] + 1, first + 1):
            used = held[j] + (capacity - new[j] if j < width else 0)
            more = 1 if j < first else search.peak[x] - search.output[x] + 1
            if used + more > capacity:
                blocked = True
                break
        if not blocked:
            return True
    return False


@compiled
def _room(usage: Ints, end: int, at: int, capacity: int, slack: int) -> int:
    """Tokens that the next large request may hold, at most, in round `at`: it fits into every round up to `end`."""
    room = capacity
    for j in range(len(usage)):
        room = min(room, max(capacity - usage[j], slack) + at - end + j)
    return max(room, 0)


@compiled
def expand(labels: Labels, begin: int, out: Labels, search: Search, incumbent: int) -> tuple[int, int]:
    """Complete one more request in every permitted way, from label `begin` on, until `out` might overflow.

    Returns the number of labels written and the next label to expand. A label whose bound is above incumbent - 1
    cannot lead to a better schedule, because latencies are whole numbers.
    """
    n, last_round = search.cost.shape[0], search.cost.shape[1] - 1
    limit = incumbent - 1 + 1e-6
    size, width = out.usage.shape
    new, held = np.zeros(width, np.int64), np.zeros(2 * width, np.int64)
    end = np.zeros(n, labels.end.dtype)
    widest, written = search.after.shape[3] - 1, 0
    for a in range(begin, len(labels.done)):
        if written + n * (last_round + 1 - labels.round[a]) > size and written > 0:
            return written, a
        done, now = labels.done[a], labels.round[a]
        left, arrived, cheapest = 0, 0, 0.0
        for i in range(n):
            if not (done >> i) & 1:
                left, arrived, cheapest = left + 1, arrived + search.arrival[i], cheapest + search.cheapest[i]
        for i in range(n):
            twin, k = search.twin[i], search.cls[i]
            if (done >> i) & 1 or (twin >= 0 and not (done >> twin) & 1):
                continue
            before = labels.last[a]
            base = search.constant + labels.priced[a] + cheapest - search.cheapest[i] - search.reward[i]
            at, large = labels.large_round[a], labels.large_class[a]
            for c in range(now, last_round + 1):
                if labels.latency[a] + left * c - arrived > limit:
                    break
                if not search.allowed[i, c] or (c == now and before >= 0 and search.rank[i] < search.rank[before]):
                    continue
                if k >= 0:
                    at, large = c, k
                value = base + search.cost[i, c]
                gain = search.after[at, large, search.capacity, widest] if large >= 0 else search.first[0]
                if value - gain > limit or not _fits(
                    labels.usage, a, c - now, c, search.peak[i], search.output[i], search.capacity, new
                ):
                    continue
                _usable(new, search.capacity)
                if large >= 0:
                    room = _room(new, c, at, search.capacity, search.slack)
                    gain = search.after[at, large, room, min(room, widest)]
                if value - gain > limit:
                    continue
                end[:] = labels.end[a]
                end[i] = c
                if _slipped(end, new, c, search, held):
                    continue
                out.done[written], out.last[written], out.round[written] = done | (1 << i), i, c
                out.latency[written] = labels.latency[a] + c - search.arrival[i]
                out.priced[written] = labels.priced[a] + search.cost[i, c] - search.reward[i]
                out.large_round[written], out.large_class[written] = at, large
                out.bound[written] = max(value - gain, labels.bound[a])
                out.end[written] = end
                for j in range(width):
                    out.usage[written, j] = new[j]
                written += 1
    return written, len(labels.done)


@compiled
def undominated(labels: Labels, order: Ints, left: int, latest: Ints, rank: Ints, tries: int) -> Bools:
    """Which labels no other makes superfluous; `order` sorts them by set, then by latency + left x round.

    Label a makes b of the same set superfluous if it completed no later, leaves at least as much memory in every round
    counted back from its last, and costs no more when everything that follows b moves up with it. latest[x] is the
    round before which what remains of the set of label x might not move up, because it may not have arrived.
    """
    alive = np.ones(len(order), np.bool_)
    begin = 0
    for x in range(len(order)):
        b = order[x]
        if labels.done[b] != labels.done[order[begin]]:
            begin = x
        tried = 0
        for y in range(begin, x):
            a = order[y]
            if not alive[a]:
                continue
            tried += 1
            if tried > tries:
                break
            earlier = labels.round[b] - labels.round[a]
            if earlier < 0 or labels.latency[a] > labels.latency[b] + earlier * left:
                continue
            if rank[labels.last[a]] > rank[labels.last[b]] or (earlier > 0 and labels.round[a] < latest[a]):
                continue
            worse = False
            for j in range(labels.usage.shape[1]):
                if labels.usage[a, j] > labels.usage[b, j]:
                    worse = True
                    break
            if not worse:
                alive[b] = False
                break
    return alive
