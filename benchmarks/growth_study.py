"""How often is the growth test wrong? A single-server queue whose load is known, at both sides of 1.

Poisson arrivals, lognormal service; the number in system is looked at 401 times, the first tenth of a run is cut, three
runs are pooled as the seeds of a comparison are. Printed: percent of trials whose verdict is wrong.

    python -m benchmarks.growth_study [--trials 150]
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np

from llmopt.evaluate.growth import Growth, growth, pooled

LOADS = (0.95, 0.98, 1.02, 1.05)
REQUESTS = (12_000, 36_000)
VARIATION = (1.0, 2.0)
SEEDS, POINTS = 3, 401


def run(rng: np.random.Generator, load: float, cv: float, requests: int) -> Growth:
    """Growth of one queue: unit arrival rate, mean service `load`; finish_n = S_n + max_k (arrival_k - S_(k-1))."""
    arrival = np.cumsum(rng.exponential(size=requests))
    sigma = np.sqrt(np.log1p(cv**2))
    service = load * rng.lognormal(-(sigma**2) / 2, sigma, requests)
    work = np.cumsum(service)
    finish = work + np.maximum.accumulate(arrival - work + service)
    times = np.linspace(arrival[-1] / 10, arrival[-1], POINTS)
    inside = np.searchsorted(arrival, times, side="right") - np.searchsorted(finish, times, side="right")
    return growth(times, inside.astype(float), 1.0)


def wrong(load: float, cv: float, requests: int, trials: int) -> float:
    """Part of `trials` with a wrong verdict."""
    rng = np.random.default_rng([7, requests, int(cv * 10), int(load * 100)])
    verdicts = (pooled([run(rng, load, cv, requests) for _ in range(SEEDS)]).stable for _ in range(trials))
    return sum(stable != (load < 1) for stable in verdicts) / trials


def main() -> None:
    """Print one row per length and variation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=150, help="trials of each cell")
    trials = parser.parse_args().trials
    print("requests    cv" + "".join(f"{f'load {load}':>12}" for load in LOADS))
    for requests, cv in product(REQUESTS, VARIATION):
        cells = (f"{wrong(load, cv, requests, trials):12.1%}" for load in LOADS)
        print(f"{requests:8d}{cv:6.1f}" + "".join(cells))


if __name__ == "__main__":
    main()
