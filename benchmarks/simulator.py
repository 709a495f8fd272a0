"""Speed and memory of the simulator, after compilation: medians, and ratios taken within this run.

The work is the real Azure conversation trace (19 366 requests) on six replicas; without the file, the bundled
scenario's own sample of the same size. The naive oracle of the tests does the same work on the first requests of it.

    python -m benchmarks.simulator [--trace FILE] [--runs 15] [--largest 1000000]
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmopt import load_scenario
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.scenario import Scenario
from llmopt.workload import Requests
from tests import oracle

FEW = 1000
TRACE = Path(__file__).parents[2] / "shared/data/azure-llm-2023/AzureLLMInferenceTrace_conv.csv"


def on_replicas(replicas: int, trace: Path | None) -> Scenario:
    """The bundled Azure scenario on `replicas` H100 nodes."""
    scenario = load_scenario("azure-conv", trace)
    return scenario.replace(pools=[scenario.pools[0].model_copy(update={"replicas": replicas}).model_dump()])


def stretched(requests: Requests, n: int, factor: float) -> Requests:
    """`n` requests with lengths drawn from `requests`, arriving as a Poisson process at `factor` times their rate."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(requests), n)
    gap = float(requests.arrival[-1]) / len(requests) / factor
    arrival = np.cumsum(rng.exponential(gap, n))
    return Requests(arrival, requests.prompt[rows], requests.output[rows], requests.cls[rows], rng.random(n))


def seconds(work: Callable[[], Any], runs: int) -> float:
    """Median wall-clock time of `work`, s."""
    times = []
    for _ in range(runs):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return float(np.median(times))


class Report:
    """Lines with a target each; remembers whether one was missed."""

    missed = False

    def line(self, what: str, value: float, unit: str, least: float = -np.inf, most: float = np.inf) -> None:
        """Print one measurement beside its target."""
        target = f"(at least {least:,.0f})" if least > -np.inf else f"(at most {most:g})" if most < np.inf else ""
        met = least <= value <= most
        self.missed |= not met
        number = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        print(f"{what:58} {number:>12} {unit:12} {target} {'' if met else 'MISSED'}")


def shortest_queue(request: Any, replicas: Any) -> int:
    """Join the shortest queue, as a user would write it in Python."""
    return int(min(replicas, key=lambda r: r.waiting + r.running).replica)


def speed(report: Report, scenario: Scenario, requests: Requests, runs: int) -> None:
    """Requests per second of wall-clock of both cores, and of the oracle on the same work."""
    turns, n = Plan("round-robin", index_router(scenario)), len(requests)
    shortest = Plan("jsq", index_router(scenario, waiting=1.0, running=1.0))
    plans = {
        "round-robin": turns,
        "join-shortest-queue": shortest,
        "power-of-two": Plan("po2", index_router(scenario, 2, waiting=1.0, running=1.0)),
        "least outstanding tokens": Plan("least-tokens", index_router(scenario, outstanding_tokens=1.0)),
    }
    start = perf_counter()
    simulate(scenario, turns, requests=requests.head(2))
    print(f"first call, compilation or its cache included: {perf_counter() - start:.1f} s\n")
    for name, plan in plans.items():
        rate = n / seconds(lambda plan=plan: simulate(scenario, plan, requests=requests), runs)  # type: ignore[misc]
        report.line(f"compiled core, {name}", rate, "requests/s", least=300_000)
    rule = Plan("rule", shortest_queue)
    rate = n / seconds(lambda: simulate(scenario, rule, requests=requests), max(3, runs // 5))
    report.line("compiled core, join-shortest-queue as a Python function", rate, "requests/s")
    few = max(3, runs // 5)
    rate = n / seconds(lambda: simulate(scenario, turns, requests=requests, core="python"), few)
    report.line("plain-Python core, round-robin", rate, "requests/s", least=50_000)
    rate = n / seconds(lambda: simulate(scenario, rule, requests=requests, core="python"), few)
    report.line("plain-Python core, the Python function", rate, "requests/s")
    some = requests.head(FEW)
    naive = seconds(lambda: oracle.simulate(scenario, shortest, some), 1)
    ours = seconds(lambda: simulate(scenario, shortest, requests=some), runs)
    report.line(f"naive oracle, join-shortest-queue, first {FEW} requests", len(some) / naive, "requests/s")
    report.line("compiled core on the same work, times the oracle", naive / ours, "x", least=100)


def scaling(report: Report, requests: Requests, trace: Path | None, largest: int) -> None:
    """Time per request from 10 000 to `largest` requests on eight replicas, and peak memory."""
    scenario = on_replicas(8, trace)
    plan = Plan("jsq", index_router(scenario, waiting=1.0, running=1.0))
    cost = {}
    for n in (10_000, 100_000, largest):
        sample = stretched(requests, n, factor=8 / 6)
        cost[n] = seconds(lambda sample=sample: simulate(scenario, plan, requests=sample), 5) / n  # type: ignore[misc]
        report.line(f"{n} requests on 8 replicas", 1e9 * cost[n], "ns/request")
    report.line(f"cost per request, {largest} over 10000", cost[largest] / cost[10_000], "x", most=1.5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.line("peak memory of this process", peak, "GiB", most=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE if TRACE.exists() else None)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--largest", type=int, default=1_000_000)
    options = parser.parse_args()
    scenario = on_replicas(6, options.trace)
    requests = scenario.workload.sample(scenario.evaluation.horizon, 1)
    print(f"{len(requests)} requests ({options.trace or 'sampled'}) on 6 replicas; median of {options.runs} runs")
    report = Report()
    speed(report, scenario, requests, options.runs)
    scaling(report, requests, options.trace, options.largest)
    sys.exit(int(report.missed))


if __name__ == "__main__":
    main()
