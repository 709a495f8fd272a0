"""What a simulation returns: one row per request, one row per replica; see docs/simulator.md for the definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.workload import Requests


@dataclass(frozen=True)
class ReplicaTotals:
    """Totals of each replica over the whole run; every array has shape (n_replicas,).

    pool: index of its pool; steps; busy (s); prefill_tokens, decode_tokens computed; preemptions; held: token-steps of
    KV memory in use; wasted: the part of `held` that preemption made useless; held_time: token-seconds of KV memory
    in use; peak: largest KV tokens in use in a step; extrapolated: steps outside the ranges that the pool's table
    measured, 0 without a table. Blocks that a preempted request finds again are in use, but not prefilled.
    """

    pool: Ints
    steps: Ints
    busy: Floats
    prefill_tokens: Ints
    decode_tokens: Ints
    preemptions: Ints
    held: Ints
    wasted: Ints
    held_time: Floats
    peak: Ints
    extrapolated: Ints


@dataclass(frozen=True)
class SimRun:
    """One simulated run; times in seconds from the start, arrays of shape (n_requests,) in order of arrival.

    queued: when the engine first saw the request, which is its arrival or, if a step was under way then, the end of
    that step; scheduled: start of the step that first admitted the request; first_token and finish: ends of the steps
    that emitted its first and last token; replica: where it ran; preemptions: how often it was preempted.
    """

    requests: Requests
    replica: Ints
    queued: Floats
    scheduled: Floats
    first_token: Floats
    finish: Floats
    preemptions: Ints
    replicas: ReplicaTotals
    core: str

    @property
    def queue_time(self) -> Floats:
        """Arrival to first admission, s."""
        return self.scheduled - self.requests.arrival

    @property
    def ttft(self) -> Floats:
        """Time to first token, queueing included, s."""
        return self.first_token - self.requests.arrival

    @property
    def e2e(self) -> Floats:
        """Arrival to last token, s."""
        return self.finish - self.requests.arrival

    @property
    def tpot(self) -> Floats:
        """Mean time per output token after the first, s; NaN for requests of one output token."""
        gaps = self.requests.output - 1
        return np.where(gaps > 0, (self.finish - self.first_token) / np.maximum(gaps, 1), np.nan)

    @property
    def end(self) -> float:
        """End of the last step, s."""
        return float(self.finish.max(initial=0.0))

    @property
    def utilisation(self) -> Floats:
        """Busy fraction of each replica over the whole run, shape (n_replicas,)."""
        return self.replicas.busy / max(self.end, 1e-300)

    @property
    def mean_kv(self) -> Floats:
        """Time average of the KV tokens in use of each replica over the whole run, shape (n_replicas,)."""
        return self.replicas.held_time / max(self.end, 1e-300)

    def in_system(self, times: Floats) -> Ints:
        """Requests arrived and not finished at `times` (s), by pool; shape (n_times, n_pools)."""
        return self._between(self.finish, times)

    def waiting(self, times: Floats) -> Ints:
        """Requests arrived and never yet admitted at `times` (s), by pool; shape (n_times, n_pools)."""
        return self._between(self.scheduled, times)

    def throughput(self, start: float, end: float) -> float:
        """Requests finished in (start, end] per second."""
        return float(np.count_nonzero((self.finish > start) & (self.finish <= end)) / (end - start))

    def _between(self, leave: Floats, times: Floats) -> Ints:
        pool = self.replicas.pool[self.replica]
        columns = []
        for j in range(int(self.replicas.pool[-1]) + 1):
            mine = pool == j
            arrived = np.searchsorted(self.requests.arrival[mine], times, side="right")
            columns.append(arrived - np.searchsorted(np.sort(leave[mine]), times, side="right"))
        return np.column_stack(columns)
