"""Do the fluid model and the simulator agree on stability? Both sides of the simulated critical rate, all scenarios.

For every bundled scenario of routing and each policy below, the critical factor on all arrivals is found by long
simulated runs (`llmopt.evaluate.margin`, known to 2 %), and the fluid model is asked at fixed distances from it. A cell
that disagrees is marked with an arrow.

    python -m benchmarks.verdicts [--distance 0.03] [--policies max-margin,jsq,...] [--seed 1]
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np

from llmopt import load_scenario
from llmopt.evaluate.fluid import evaluate_fluid
from llmopt.evaluate.margin import long_run, simulated_margin
from llmopt.plan import Plan
from llmopt.reading import bundled_scenarios
from llmopt.registry import get_policy
from llmopt.scenario import Scenario

POLICIES = "max-margin,weighted-round-robin,random,power-of-two,jsq,least-tokens,least-kv"


def verdicts(scenario: Scenario, plan: Plan, distance: float, seed: int = 1) -> tuple[float, bool, bool]:
    """Simulated margin, and whether the fluid model is stable below and above it, as it should and should not be."""
    low, high = simulated_margin(scenario, plan, long_run(scenario, seed), 1.0)
    margin = float(np.sqrt(low * high))
    rates = (scenario.workload.total_rate * margin * factor for factor in (1 - distance, 1 + distance))
    below, above = (evaluate_fluid(scenario.replace(**{"workload.rate": rate}), plan).stable for rate in rates)
    return margin, below, above


def main() -> None:
    """Print one line per scenario and policy, and the count of verdicts that agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distance", type=float, default=0.03, help="relative distance from the critical rate")
    parser.add_argument("--policies", default=POLICIES, help="names, separated by commas")
    parser.add_argument("--seed", type=int, default=1, help="of the long simulated runs")
    args = parser.parse_args()
    start, agree, asked = perf_counter(), 0, 0
    for name in bundled_scenarios():
        scenario = load_scenario(name)
        if scenario.problem != "routing":
            continue
        for policy in args.policies.split(","):
            margin, below, above = verdicts(scenario, get_policy(policy).plan(scenario), args.distance, args.seed)
            agree, asked = agree + below + (not above), asked + 2
            arrow = "" if below and not above else "  <- fluid " + ("unstable below" if not below else "stable above")
            print(f"{name:12} {policy:22} simulated margin {margin:6.3f}{arrow}", flush=True)
    print(f"{agree} of {asked} fluid verdicts agree {args.distance:.0%} away, in {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
