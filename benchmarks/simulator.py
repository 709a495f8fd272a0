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
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmopt import load_scenario
from llmopt.batcher import Batcher
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.predictions import Noise
from llmopt.scenario import Pool, Scenario
from llmopt.steptable import StepTable
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
        target = f"(at least {least:,.10g})" if least > -np.inf else f"(at most {most:g})" if most < np.inf else ""
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


def tabulated(pool: Pool) -> StepTable:
    """A table with as many knots as measured ones have, of about the same step times as the pool's first piece."""
    base, prefill, decode, kv, pairs = pool.stepper.coefficients[0]
    tokens, sequences = np.geomspace(1.0, 4096.0, 180), np.geomspace(1.0, 512.0, 40)
    batch, context = np.geomspace(1.0, 256.0, 16), np.geomspace(16.0, 32768.0, 24)
    chunk, cached, few = np.geomspace(16.0, 2048.0, 8), np.linspace(0.0, 16384.0, 8), np.linspace(0.0, 256.0, 9)
    own = pairs * chunk[:, None] * (cached + 0.5 * chunk[:, None])
    return StepTable(
        tokens=tokens,
        token_time=base + prefill * tokens,
        sequences=sequences,
        sequence_time=(decode - prefill) * sequences,
        decode_batch=batch,
        decode_context=context,
        decode_time=kv * np.outer(batch, context),
        chunk=chunk,
        cached=cached,
        mixed_batch=few,
        mixed_context=context,
        mixed_time=own[:, :, None, None] + kv * np.outer(few, context),
    )


def engines(report: Report, scenario: Scenario, requests: Requests, runs: int) -> None:
    """What a measured table and the scheduling of a real engine cost, against the same pool without them."""
    plan = Plan("jsq", index_router(scenario, waiting=1.0, running=1.0))
    options: dict[str, dict[str, Any]] = {
        "a measured table": {"table": tabulated(scenario.pools[0])},
        "scheduling ahead and prefix caching": {"async_scheduling": True, "prefix_caching": True},
    }
    options["all of it"] = {key: value for option in options.values() for key, value in option.items()}
    work = {"plain": scenario} | {
        name: scenario.model_copy(update={"pools": tuple(pool.model_copy(update=option) for pool in scenario.pools)})
        for name, option in options.items()
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, other in work.items():
            start = perf_counter()
            run = simulate(other, plan, requests=requests)
            times[name].append(perf_counter() - start)
    plain = np.array(times["plain"])
    for name in options:
        ratio = float(np.median(np.array(times[name]) / plain))
        report.line(f"{name}, times the plain pool", ratio, "x", most=4.0)
    seconds_per_second = run.end * len(run.replicas.steps) / float(np.median(times["all of it"]))
    report.line("replica seconds simulated per second, all of it", seconds_per_second, "")


def rules(report: Report, scenario: Scenario, requests: Requests, runs: int) -> None:
    """Shortest output first with the look-ahead check, against first come first served, close to the critical rate.

    The critical rate is that of a backlog served first come first served. The third rule believes noisy guesses.
    """
    backlog = simulate(scenario, Plan("backlog"), requests=replace(requests, arrival=np.zeros(len(requests))))
    work = stretched(requests, len(requests), 0.97 * float(requests.arrival[-1]) / backlog.end)
    noisy = Noise(law="noise", sigma=0.5)
    plans = {
        "first come first served": Plan("fifo"),
        "MC-SF": Plan("mc-sf", batcher=Batcher("predicted", admission="lookahead")),
        "MC-SF with noisy guesses": Plan("noisy", batcher=Batcher("predicted", admission="lookahead", predictor=noisy)),
    }
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(runs + 1):
        for name, plan in plans.items():
            start = perf_counter()
            simulate(scenario, plan, requests=work)
            times[name].append(perf_counter() - start)
    fifo = np.array(times["first come first served"][1:])
    report.line(
        "first come first served at 0.97 of the critical rate", len(work) / float(np.median(fifo)), "requests/s"
    )
    for name in list(plans)[1:]:
        mine = np.array(times[name][1:])
        report.line(f"{name}, same requests", len(work) / float(np.median(mine)), "requests/s")
        ratio = float(np.median(fifo / mine))
        report.line(f"{name}, requests/s over first come first served", ratio, "x", least=0.1)


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
    engines(report, scenario, requests, options.runs)
    rules(report, scenario, requests, options.runs)
    scaling(report, requests, options.trace, options.largest)
    sys.exit(int(report.missed))


if __name__ == "__main__":
    main()
