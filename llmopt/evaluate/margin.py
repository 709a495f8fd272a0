"""How much all arrivals could grow: measured for rules that decide by state, which have no fixed split to assess.

A state-dependent rule fills its slowest pool to the brim long before the system is unstable, so that the load under
the split that came about says nothing about what the rule could carry. Here the arrivals are made denser instead, until
the simulated backlog grows. They are shuffled and spaced evenly: in the long run only their mean rate and mix decide;
bursts, peaks of the day and a drift of the lengths, which a run of finite length cannot tell from growth, would only
blur the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from llmopt.evaluate.growth import Growth, growth, pooled
from llmopt.evaluate.report import waiting
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.workload import Requests

POINTS = 401
"""Instants at which a backlog is looked at."""
RESOLUTION = 1.02
"""Ratio of an unstable factor to a stable one at which the search ends; a finite run tells no finer."""
STRIDE = 1.25
LARGEST = 1e3
ENOUGH = 100_000
"""Requests over all seeds; the search plays no more of them."""
START = 0.1
"""Part of a run that the search leaves out, for the system starts empty."""


def backlog_growth(scenario: Scenario, runs: Sequence[SimRun]) -> Growth:
    """Growth, after the warm-up and over all runs, of the backlog of the pool that grows fastest.

    A trace may end before the horizon; what drains after its end is no sign of stability.
    """
    start, end = scenario.evaluation.warmup, scenario.evaluation.horizon
    last = max((float(run.requests.arrival.max(initial=0.0)) for run in runs), default=0.0)
    return _fastest(scenario, runs, start, min(end, last) if last > start else end, scenario.workload.total_rate)


def _fastest(scenario: Scenario, runs: Sequence[SimRun], start: float, end: float, rate: float) -> Growth:
    """Growth of the pool that grows fastest: one that cannot keep up is enough, however idle the others are."""
    times = np.linspace(start, end, POINTS)
    backlogs = [waiting(scenario, run, times) for run in runs]
    pools = [pooled([growth(times, b[:, j], rate) for b in backlogs]) for j in range(len(scenario.pools))]
    return max(pools, key=lambda g: (not g.stable, g.relative))


def simulated_margin(scenario: Scenario, plan: Plan, arrivals: Mapping[int, Requests], guess: float) -> float:
    """Largest factor on all arrivals at which the simulated backlog does not grow, within 2 %; NaN without requests.

    Parameters
    ----------
    arrivals
        Requests by seed; what they bring is kept, when they come is not.
    guess
        Where to look first.
    """
    most = min(ENOUGH // len(arrivals), *(len(requests) for requests in arrivals.values()))
    if most == 0:
        return float("nan")
    played = [_shuffled(requests, seed, most) for seed, requests in arrivals.items()]

    def holds(factor: float) -> bool:
        rate = scenario.workload.total_rate * factor
        runs = [simulate(scenario, plan, requests=_even(requests, rate)) for requests in played]
        return _fastest(scenario, runs, START * most / rate, most / rate, rate).stable

    return search(holds, guess)


def search(holds: Callable[[float], bool], guess: float) -> float:
    """Largest factor that holds, by strides from `guess` (from 1 if it is no number to start from) and bisection."""
    low, high = 0.0, np.inf
    probe = guess if 1 / LARGEST < guess < LARGEST else 1.0
    while high / max(low, 1e-12) > RESOLUTION and high > 1 / LARGEST and low < LARGEST:
        if not probe:
            probe = low * STRIDE if high == np.inf else high / STRIDE if low == 0.0 else float(np.sqrt(low * high))
        low, high, probe = (probe, high, 0.0) if holds(probe) else (low, probe, 0.0)
    return low


def _shuffled(requests: Requests, seed: int, most: int) -> Requests:
    """`most` of the requests, in random order."""
    order = np.random.default_rng(seed).permutation(len(requests))[:most]
    lengths = requests.prompt[order], requests.output[order]
    return Requests(requests.arrival[:most], *lengths, requests.cls[order], requests.u[order])


def _even(requests: Requests, rate: float) -> Requests:
    """The requests at equal distances, `rate` in a second."""
    return replace(requests, arrival=np.asarray((np.arange(len(requests)) + 0.5) / rate))
