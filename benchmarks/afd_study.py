"""How much throughput do the closed-form A/F ratios lose against the best simulated one, whatever the lengths?

For every law below the saturated bundle is simulated at every ratio over fresh seeds; the regret of a rule is
what its ratio loses of the best mean throughput on the same seeds. The predicted throughputs of the mean field, of
the barrier with normal loads and of the barrier with the exact law of loads are compared with the simulated one over
all ratios up to 20 and over all; beside the largest deviation stands the standard error of the simulated mean there.

    python -m benchmarks.afd_study [--shared DIR] [--seeds 8] [--first 100] [--pipelines ideal,non-blocking:3]
        [--laws azure-code,mooncake]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.barrier import barrier_cycle, best_barrier
from llmopt.bundle import Bundle
from llmopt.evaluate.bundle_run import simulate_bundle
from llmopt.ratio import best_ratio, best_whole, cycle, throughput
from llmopt.reading import load_scenario
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad
from llmopt.workload import Pairs

PUBLISHED = ("256-100-500", "256-500-500", "256-100-100", "128-100-500", "512-100-500")
TRACES = {
    "azure-conv": ("azure-llm-2023/AzureLLMInferenceTrace_conv.csv", 256, 256),
    "azure-code": ("azure-llm-2023/AzureLLMInferenceTrace_code.csv", 64, 256),
    "mooncake": ("mooncake-fast25/conversation_trace.jsonl", 32, 384),
}
"""File, micro-batch size that fits memory, and the largest ratio looked at."""
LIGHT = 20
"""Up to this ratio predictions are held against the simulation by themselves."""


def published() -> Iterator[tuple[str, Scenario]]:
    """The five published instances, from a cold start as there and in steady state."""
    for name in PUBLISHED:
        scenario = load_scenario(f"afd-{name}")
        for start in ("cold", "stationary"):
            yield f"{name} {start}", scenario.replace(**{"evaluation.start": start})


def laws() -> Iterator[tuple[str, Scenario]]:
    """Other laws with the published coefficients; the joint ones are 20,000 pairs drawn once."""
    base = load_scenario("afd-256-100-500").replace(**{"evaluation.start": "stationary"})
    wide = {"min": 1, "max": 100_000}
    shapes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "constant": ({"law": "constant", "value": 100}, {"law": "constant", "value": 500}),
        "uniform": ({"law": "uniform", "low": 1, "high": 199}, {"law": "uniform", "low": 1, "high": 999}),
        "lognormal cv 1.3": tuple({"law": "lognormal", "mean": m, "cv": 1.3, **wide} for m in (100.0, 500.0)),
        "lognormal cv 0.5": tuple({"law": "lognormal", "mean": m, "cv": 0.5, **wide} for m in (400.0, 300.0)),
        "gamma cv 0.7": tuple({"law": "gamma", "mean": m, "cv": 0.7, **wide} for m in (300.0, 200.0)),
    }
    for name, (prompt, output) in shapes.items():
        key = "workload.classes.0"
        yield name, base.replace(**{f"{key}.prompt": prompt, f"{key}.output": output})
    for correlation in (0.7, -0.7):
        yield f"correlated {correlation:+g}", with_pairs(base, *copula(400.0, 300.0, 0.8, correlation))


def copula(prompt: float, output: float, cv: float, correlation: float) -> tuple[Any, Any]:
    """Lognormal lengths with these means and cv whose logarithms have this correlation, 20,000 pairs."""
    rng = np.random.default_rng(7)
    sigma = np.sqrt(np.log1p(cv**2))
    normal = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 20_000)
    drawn = [np.exp(sigma * z - sigma**2 / 2) * mean for z, mean in zip(normal.T, (prompt, output), strict=True)]
    return tuple(np.maximum(1, np.rint(x)).astype(np.int64) for x in drawn)


def with_pairs(scenario: Scenario, prompt: Any, output: Any) -> Scenario:
    """The scenario with one class of these joint lengths."""
    data = scenario._raw()
    marginals = {
        key: {"law": "histogram", "values": values.tolist(), "weights": counts.astype(float).tolist()}
        for key, lengths in (("prompt", prompt), ("output", output))
        for values, counts in [np.unique(lengths, return_counts=True)]
    }
    data["workload"]["classes"] = [{"name": "joint", "share": 1.0, **marginals, "pairs": Pairs(prompt, output)}]
    return Scenario.checked(data, scenario.name)


def traces(shared: Path) -> Iterator[tuple[str, Scenario]]:
    """Real traces with the published coefficients, at a micro-batch size that memory holds."""
    from llmopt.traces import read_trace

    for name, (file, batch, most) in TRACES.items():
        trace = read_trace(shared / "data" / file)
        base = load_scenario("afd-256-100-500")
        size = {"pools.0.bundle.batch": batch, "fleet.most_attention": most, "evaluation.start": "stationary"}
        size |= {"pools.0.bundle.kv_capacity": 10_000_000, "evaluation.requests": 1000}
        yield name, with_pairs(base.replace(**size), trace.prompt, trace.output)


def study(name: str, scenario: Scenario, seeds: range) -> None:
    """Some lines: the rules' ratios, what they lose, and how far the predictions lie off."""
    bundle, load, law, most = scenario.bundle, scenario.run_load, scenario.slot_law, scenario.fleet.most_attention
    runs = np.array([simulate_bundle(scenario, seed).per_weight for seed in seeds])
    curve = runs.mean(axis=0)
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs)) / curve if len(runs) > 1 else np.full(most, np.nan)
    cycles: dict[str, Callable[[int], float]] = {
        "mean field": lambda r: cycle(bundle, load, r),
        "Gaussian": lambda r: barrier_cycle(bundle, load, r),
        "exact": lambda r: barrier_cycle(bundle, load, r, 1, law),
    }
    whole = {"mean field": _nearest(bundle, load, most), "floor/ceil": best_whole(bundle, load, most)}
    whole |= {"Gaussian": best_barrier(bundle, load, most), "exact": best_barrier(bundle, load, most, 1, law)}
    lost = "  ".join(f"{rule} {r:3} loses {1 - curve[r - 1] / curve.max():6.2%}" for rule, r in whole.items())
    near = np.flatnonzero(curve >= 0.99 * curve.max()) + 1
    print(
        f"{name:24} theta {load.theta:7.1f}  r {best_ratio(bundle, load).ratio:6.2f}  simulated "
        f"{int(np.argmax(curve)) + 1:3} ({near[0]}-{near[-1]})  {lost}"
    )
    for rule, tau in cycles.items():
        off = np.array([throughput(bundle, tau(r), r) for r in range(1, most + 1)]) / curve - 1
        print(f"{'':24} {rule:10} off by {_worst(off[:LIGHT], error)} up to {LIGHT}, {_worst(off, error)} over all")
    sys.stdout.flush()


def _worst(off: Floats, error: Floats) -> str:
    at = int(np.abs(off).argmax())
    return f"{off[at]:+6.2%} at {at + 1:3} (error {error[at]:5.2%})"


def _nearest(bundle: Bundle, load: SlotLoad, most: int) -> int:
    return int(np.clip(np.rint(best_ratio(bundle, load).ratio), 1, most))


def main() -> None:
    """Print some lines per law and pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder of reference data, for the traces")
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--first", type=int, default=100, help="first seed")
    parser.add_argument("--pipelines", default="ideal,non-blocking:3", help="names, with :M for M micro-batches")
    parser.add_argument("--laws", default="", help="names of laws, all if absent")
    args = parser.parse_args()
    seeds, start = range(args.first, args.first + args.seeds), perf_counter()
    for pipeline in args.pipelines.split(","):
        kind, _, many = pipeline.partition(":")
        print(f"pipeline {pipeline}, seeds {seeds[0]} to {seeds[-1]}")
        cases = [*published(), *laws(), *(traces(args.shared) if args.shared else ())]
        for name, scenario in cases:
            if args.laws and name not in args.laws.split(","):
                continue
            keys = {"pools.0.bundle.pipeline": kind} | ({"pools.0.bundle.micro_batches": int(many)} if many else {})
            study(name, scenario.replace(**keys, **{"pools.0.bundle.kv_capacity": 10_000_000}), seeds)
    print(f"{perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
