"""Seconds that the latency bound takes, and how far above it FIFO is: bundled loads, and rounds with all at 0.

Loads are the scenario's own requests at a multiple of their rate; FIFO sends each to the replica with the fewest
outstanding tokens. Rounds are `llmopt.rounds.model_1` instances of n requests in a pool of unit steps.

    python -m benchmarks.batching_bound [--requests 10000] [--large 0]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import perf_counter

import numpy as np

from formulations.batching_bounds import area_bound
from llmopt import load_scenario
from llmopt.evaluate.simulate import simulate
from llmopt.latency_bound import latency_bound
from llmopt.plan import Plan, index_router
from llmopt.rounds import model_1
from llmopt.scenario import Pool, Scenario
from llmopt.workload import Requests

SCENARIOS = ("azure-conv", "azure-code", "bursty-day", "quickstart")
FACTORS = (0.5, 1.0, 2.0)


def judged(what: str, scenario: Scenario, requests: Requests) -> None:
    """One line: FIFO, bound, ratio and seconds."""
    plan = Plan("fifo", index_router(scenario, outstanding_tokens=1.0))
    fifo = float(simulate(scenario, plan, requests=requests).e2e.mean())
    begin = perf_counter()
    bound = latency_bound(scenario.pools, requests.arrival, requests.prompt, requests.output)
    seconds = perf_counter() - begin
    kept = latency_bound(scenario.pools, requests.arrival, requests.prompt, requests.output, preemptive=False)
    print(
        f"{what:22} n = {len(requests):6}: FIFO {fifo:9.2f} s, bound {bound.mean:9.2f} s ({bound.argument}), "
        f"FIFO / bound {fifo / bound.mean:6.2f}, {seconds:6.2f} s to compute; "
        f"without preemption {kept.mean:9.2f} s",
        flush=True,
    )


def faster(requests: Requests, factor: float) -> Requests:
    """The requests at `factor` times their rate."""
    return replace(requests, arrival=requests.arrival / factor)


def sampled(name: str, n: int) -> tuple[Scenario, Requests]:
    """The first `n` requests of a bundled scenario, of as many hours as they need."""
    scenario = load_scenario(name)
    horizon = scenario.evaluation.horizon
    while len(requests := scenario.workload.sample(horizon, 1)) < n:
        horizon *= 2
    return scenario, requests.head(n)


def rounds(n: int) -> None:
    """Model-1 requests, all at round 0, with FIFO admitted by the exact look-ahead check."""
    instance = model_1(0, n)
    base = load_scenario("quickstart")
    pool = Pool.model_validate(
        {
            "name": "rounds",
            "replicas": 1,
            "step_time": [{"base": 1.0}],
            "kv_capacity": instance.capacity,
            "block_size": 1,
            "lookahead_slots": 1,
            "max_batch": 10**6,
            "token_budget": 10**8,
            "preemption": "lookahead",
        }
    )
    longest = {"law": "constant", "value": instance.capacity // 2}
    alike = [{"name": "all", "share": 1.0, "prompt": longest, "output": longest}]
    scenario = base.replace(**{"pools": [pool.model_dump()], "workload.classes": alike})
    zero = np.zeros(n)
    judged("rounds, model 1", scenario, Requests(zero, instance.prompt, instance.output, zero.astype(np.int64), zero))
    print(f"{'':22} area bound of the round model: {area_bound(instance) / n:9.2f} rounds")


def main() -> None:
    """Print one line for each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=0, help="also azure-conv with this many requests")
    options = parser.parse_args()
    first, few = sampled(SCENARIOS[0], 100)
    latency_bound(first.pools, few.arrival, few.prompt, few.output)  # compiles
    for name in SCENARIOS:
        scenario, requests = sampled(name, options.requests)
        for factor in FACTORS:
            judged(f"{name} x {factor:g}", scenario, faster(requests, factor))
        judged(f"{name}, all at 0", scenario, replace(requests, arrival=np.zeros(len(requests))))
    rounds(options.requests)
    if options.large:
        judged(f"{SCENARIOS[0]} x 1", *sampled(SCENARIOS[0], options.large))


if __name__ == "__main__":
    main()
