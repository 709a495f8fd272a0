"""The host's part of a step, estimated from the first requests of a run.

If every step of the engine takes h seconds more than its kernels, a request whose decode spans n steps ends n h late,
and late by whatever one-off delays (warm-up, compilation) fell into its span. So h is the slope of

    measured decode span - predicted decode span     against     n, the steps in the predicted span,

over the first requests; the intercept takes the one-off delays. The slope is that of Theil and Sen, the median of the
slopes between all pairs, which a few requests that were preempted in one world only cannot move. Since the overhead
changes what the steps contain, the replay is repeated with the estimate until it moves no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.runs import EngineRun
from llmopt.scenario import Pool
from llmopt.validation.replay import play, recorded_scenario, states_at

ROUNDS = 8
"""Most replays of the fixed point; with slopes near -1 in h it needs two to four."""
TOLERANCE = 1e-5
"""Seconds by which the estimate may still move: a hundredth of what it is good for."""
ALIKE = 0.02
"""Relative spread of the spans' step counts (standard deviation over mean) below which a slope means nothing."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated overhead.

    overhead: s a step, never negative; intercept: s, the median one-off delay of a decode span; requests: how many of
    the first have a span; rounds: replays it took; sloped: whether it is a slope, or, for spans too alike in length to
    have one, the median delay a step; path: the estimates of the rounds.
    """

    overhead: float
    intercept: float
    requests: int
    rounds: int
    sloped: bool
    path: tuple[float, ...]


def estimate_overhead(run: EngineRun, pool: Pool, first: int) -> Estimate:
    """The host overhead, s a step, that the first `first` requests of the run name.

    Raises
    ------
    ScenarioError
        If the run has no request beyond the first, or fewer than 5 of these have two output tokens.
    """
    if first >= len(run.records):
        raise ScenarioError(
            f"{run.path}: has {len(run.records)} requests, so that none is left to judge after the first {first}; "
            "give --first a smaller number"
        )
    if (run.records.output[:first] > 1).sum() < 5:
        raise ScenarioError(
            f"{run.path}: fewer than 5 of the first {first} requests have two output tokens or more, too few to "
            "estimate the host overhead; raise --first or give --host-overhead in seconds"
        )
    host, path = 0.0, []
    for _ in range(ROUNDS):
        delays, steps = _spans(run, pool.model_copy(update={"host_overhead": host}), first)
        change, sloped = slope(delays, steps)
        intercept = float(np.median(delays - change * steps))
        path.append(max(0.0, host + change))
        host, moved = path[-1], abs(path[-1] - host)
        if moved <= TOLERANCE:
            break
    return Estimate(host, intercept, len(delays), len(path), sloped, tuple(path))


def slope(delays: Floats, steps: Floats) -> tuple[float, bool]:
    """Delay per step, s: Theil and Sen's slope and True; the median ratio and False if all spans are alike."""
    if steps.std() < ALIKE * steps.mean():
        return float(np.median(delays / steps)), False
    i, j = np.triu_indices(len(steps), 1)
    rise, run = delays[j] - delays[i], steps[j] - steps[i]
    return float(np.median(rise[run != 0] / run[run != 0])), True


def _spans(run: EngineRun, pool: Pool, first: int) -> tuple[Floats, Floats]:
    """Delays (s) of the decode spans of the first requests against the replay, and the steps in the replayed spans."""
    scenario = recorded_scenario(run, pool)
    sim, records = play(scenario), run.records
    known = np.flatnonzero(records.output[:first] > 1)
    begun = states_at(scenario, sim, np.concatenate([sim.first_token[known], sim.finish[known]])).steps
    mine = sim.replica[known]
    count = len(known)
    steps = begun[count:][np.arange(count), mine] - begun[:count][np.arange(count), mine]
    measured = records.finish[known] - records.first_token[known]
    return measured - (sim.finish[known] - sim.first_token[known]), np.maximum(steps, 1).astype(float)
