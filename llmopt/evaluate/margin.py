"""How much all arrivals could grow: the simulator's own critical rate, measured alike for every policy.

A rule that decides by state fills its slowest pool to the brim long before the system is unstable, and a run of ten
minutes cannot tell a queue that fills up from one that grows. So the verdict comes from runs of `PLAYED` requests with
the lengths and classes of the workload, spaced evenly at one rate: in the long run only the mean rate and the mix
decide, and bursts, peaks of the day and a drift of the lengths would only blur the answer. The rate is raised and
lowered until the backlog of the second half of a run grows at one rate and does not at another, 2 % below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmopt.arrivals import Poisson
from llmopt.evaluate.growth import Growth, growth, pooled
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
PLAYED = 400_000
"""Requests of a run of the search. With these, `benchmarks.verdicts --seed N` moves margins by up to 2 %, and by up to
4 % in bursty-day, where one request may take two thirds of a replica's memory."""
ASKED = 100_000
"""The same for a rule in plain Python, which is asked once for each."""
START = 0.5
"""Part of such a run that is not judged, for the system starts empty and may take long to fill."""


def backlog_growth(scenario: Scenario, runs: Sequence[SimRun]) -> Growth:
    """Growth, after the warm-up and over all runs, of the backlog of the pool that grows fastest.

    A trace may end before the horizon; what drains after its end is no sign of stability.
    """
    start, end = scenario.evaluation.warmup, scenario.evaluation.horizon
    last = max((float(run.requests.arrival.max(initial=0.0)) for run in runs), default=0.0)
    return _fastest(scenario, runs, start, min(end, last) if last > start else end, scenario.workload.total_rate)


def _fastest(scenario: Scenario, runs: Sequence[SimRun], start: float, end: float, rate: float) -> Growth:
    """Growth of the pool that grows fastest: one that cannot keep up is enough, however idle the others are.

    Where batching is open all requests in the system count: a rule may admit everybody at once and finish nobody.
    """
    times = np.linspace(start, end, POINTS)
    whole = scenario.problem == "batching"
    backlogs = [(run.in_system(times) if whole else run.waiting(times)).astype(float) for run in runs]
    pools = [pooled([growth(times, b[:, j], rate) for b in backlogs]) for j in range(len(scenario.pools))]
    return max(pools, key=lambda g: (not g.stable, g.relative))


def simulated_margin(scenario: Scenario, plan: Plan, played: Requests, guess: float) -> tuple[float, float]:
    """Factors on all arrivals, at most 2 % apart, at which the simulated backlog does not grow and grows.

    Parameters
    ----------
    played
        What the arrivals bring (`long_run`); when they come is not used.
    guess
        Where to look first.
    """

    def holds(factor: float) -> bool:
        rate = scenario.workload.total_rate * factor
        run = simulate(scenario, plan, requests=_even(played, rate))
        end = len(played) / rate
        return _fastest(scenario, [run], START * end, end, rate).stable

    return search(holds, guess)


def search(holds: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """A factor that holds and one that does not, at most `RESOLUTION` apart, by strides from `guess` and bisection.

    Starts from 1 if `guess` is no number to start from; (LARGEST or more, inf) and (0, 1 / LARGEST or less) if there
    is none.
    """
    low, high = 0.0, np.inf
    probe = guess if 1 / LARGEST < guess < LARGEST else 1.0
    while high / max(low, 1e-12) > RESOLUTION and high > 1 / LARGEST and low < LARGEST:
        if not probe:
            probe = low * STRIDE if high == np.inf else high / STRIDE if low == 0.0 else float(np.sqrt(low * high))
        low, high, probe = (probe, high, 0.0) if holds(probe) else (low, probe, 0.0)
    return low, float(high)


def long_run(scenario: Scenario, seed: int, count: int = PLAYED) -> Requests:
    """`count` requests with the lengths and classes of the workload in random order; times mean nothing.

    A replayed trace is repeated as often as it takes, each time in another order.
    """
    drawn = _drawn(scenario, seed, count)
    rng = np.random.default_rng(seed)
    laps = -(-count // len(drawn))
    order = np.concatenate([rng.permutation(len(drawn)) for _ in range(laps)])[:count]
    return Requests(np.zeros(count), drawn.prompt[order], drawn.output[order], drawn.cls[order], rng.random(count))


def _drawn(scenario: Scenario, seed: int, count: int) -> Requests:
    """The requests of a replayed trace within the horizon, or `count` fresh ones and some more."""
    work = scenario.workload
    if work.replay is not None:
        inside = work.sample(scenario.evaluation.horizon, seed)
        return inside if len(inside) else work.replay
    steady = work.model_copy(update={"arrivals": Poisson(law="poisson")})
    return steady.sample((count + 10 * np.sqrt(count) + 50) / work.total_rate, seed)


def _even(requests: Requests, rate: float) -> Requests:
    """The requests at equal distances, `rate` in a second."""
    return replace(requests, arrival=np.asarray((np.arange(len(requests)) + 0.5) / rate))
