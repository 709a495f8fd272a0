"""What a simulation returns: one row per request, one row per replica; see docs/simulator.md for the definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.lengths import Floats, Ints
from llmopt.workload import Requests


@dataclass(frozen=True)
class ReplicaTotals:
    """Totals of each replica over the whole run; every array has shape (n_replicas,).

    pool: index of its pool; steps; busy (s); prefill_tokens, decode_tokens computed; preemptions; held: token-steps of
    KV memory in use; wasted: the part of `held` that preemption made useless; held_time: token-seconds of KV memory
    in use; peak: largest KV tokens in use in a step.
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


@dataclass(frozen=True)
class SimRun:
    """One simulated run; times in seconds from the start, arrays of shape (n_requests,) in order of arrival.

    scheduled: start of the step that first admitted the request; first_token and finish: ends of the steps that
    emitted its first and last token; replica: where it ran; preemptions: how often it was preempted.
    """

    requests: Requests
    replica: Ints
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
