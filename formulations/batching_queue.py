"""What rules that rank a replica's queue share: the queue in rounds, keys from an order, and how often to plan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.batcher import Candidates, Ranking, Snapshot
from llmopt.rounds import Rounds
from llmopt.scenario import Pool, Scenario

LEAST_PERIOD = 1e-3


def ranking(rule: Callable[[Snapshot], Ints]) -> Ranking:
    """Keys of waiting requests by a rule that puts them into an order; a snapshot lists them by number."""

    def rank(snapshot: Snapshot) -> Floats:
        """Keys of the waiting requests, shape (w,)."""
        return keys_of(rule(snapshot), waiting_rounds(snapshot).volume)

    return rank


def waiting_rounds(snapshot: Snapshot) -> Rounds:
    """The waiting requests as an instance that has all arrived, a step of the replica being a round.

    A preempted request has the tokens it kept for a prompt and those still to come for an output; each chunk of prefill
    beyond the first counts as a round of output. Outputs are cut to what fits beside the prompt.
    """
    pool, room = snapshot.pool, capacity(snapshot.pool)
    prompt = np.minimum(snapshot.prompt + snapshot.emitted, room - 1)
    rounds = snapshot.predicted - snapshot.emitted + (prompt - 1) // pool.chunk
    return Rounds(np.zeros_like(prompt), prompt, np.clip(rounds, 1, room - prompt), room)


def running_rounds(snapshot: Snapshot) -> Rounds:
    """The running requests in the same terms, as if they started now with the tokens they hold for a prompt."""
    pool, room = snapshot.pool, capacity(snapshot.pool)
    held = np.minimum(snapshot.running_computed, room - 1)
    prefill = np.maximum(snapshot.running_prompt - snapshot.running_computed, 0)
    rounds = snapshot.running_predicted - snapshot.running_emitted + -(-prefill // pool.chunk)
    return Rounds(np.zeros_like(held), held, np.clip(rounds, 1, room - held), room)


def all_rounds(scenario: Scenario, candidates: Candidates) -> Rounds:
    """All requests of a run as if they had arrived together at an empty replica of the smallest pool."""
    pool = min(scenario.pools, key=capacity)
    nobody = np.zeros(0, dtype=np.int64)
    none = np.zeros(len(candidates.prompt), dtype=np.int64)
    queue = (np.arange(len(none)), candidates.arrival, candidates.prompt, candidates.predicted, none)
    return waiting_rounds(Snapshot(0.0, pool, *queue, nobody, nobody, nobody, nobody))


def capacity(pool: Pool) -> int:
    """Tokens of KV memory that a request can fill in the terms of the round model, 2 at least."""
    return max(pool.largest, 2)


def volumes(candidates: Candidates) -> Floats:
    """Believed volume s p + p (p + 1) / 2 of each request, token-steps, shape (n,): where newcomers go at first."""
    p = candidates.predicted.astype(float)
    return np.asarray(candidates.prompt * p + p * (p + 1) / 2)


def keys_of(order: Ints, volume: Ints) -> Floats:
    """Keys that put requests into this order, on the scale of their volumes, shape (n,).

    The first gets the smallest volume of all, and so on, so that whoever arrives before the next plan, ranked by its
    own volume, lands where smallest-volume-first would put it.
    """
    keys = np.empty(len(order))
    keys[order] = np.sort(volume) + 0.5 * np.arange(len(order)) / max(len(order), 1)
    return keys


def period(scenario: Scenario, steps: int, most: int | None = None) -> float:
    """Seconds that `steps` full decode steps of the fastest pool last; longer if the horizon held over `most` of them.

    A full step decodes max_batch sequences, or as many mean requests half way through as fit into memory.
    """
    seconds = max(steps * min(full_step(pool, scenario) for pool in scenario.pools), LEAST_PERIOD)
    return seconds if most is None else max(seconds, scenario.evaluation.horizon / most)


def full_step(pool: Pool, scenario: Scenario) -> float:
    """Seconds of a decode step that fills the pool's memory or its batch."""
    shares = scenario.workload.rates / scenario.workload.total_rate
    means = [(c.mean_prompt + c.mean_output / 2) for c in scenario.workload.classes]
    each = float(shares @ np.array(means))
    batch = max(min(pool.max_batch, pool.kv_capacity / each), 1.0)
    return pool.stepper(decode=batch, kv=min(batch * each, pool.kv_capacity))
