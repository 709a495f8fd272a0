"""The published figures of Attention/FFN disaggregation beside ours.

1. The ratios that Song et al., arXiv 2601.21351, print for DeepSeek-V3 on Ascend 910C, in two ablations (rows of the
   reference instance differ in print: 9.30 and 9.34). Ours: their rule with the load of a run from empty slots to
   10,000 requests and with that of an endless run; the best ratio with the barrier; and the best simulated ratio, cold
   start, with what the rule's better whole number loses.
2. Stage times and tokens/s per GPU that an independent public tool predicts for Qwen3-235B-A22B on H200 nodes; ours:
   the law of the pipeline on these stage times, and the ratio that the programs return.

    python -m benchmarks.afd_published [--seeds 3]
"""

from __future__ import annotations

import argparse
from math import ceil, floor
from time import perf_counter

from llmopt import compare, load_scenario, plan
from llmopt.evaluate.ratio_comparison import RatioComparison
from llmopt.ratio import published

WORKLOAD = (("afd-256-100-500", 9.30), ("afd-256-500-500", 17.25), ("afd-256-100-100", 2.17))
BATCH = (("afd-128-100-500", 7.08), ("afd-256-100-500", 9.34), ("afd-512-100-500", 10.31))
QWEN = ((1, 1193), (2, 1370), (3, 1232), (4, 1169), (6, 933))
PLANS = ("afd-convex", "afd-integer", "afd-fleet", "afd-gaussian", "afd-mean-field")


def ratios(title: str, rows: tuple[tuple[str, float], ...], seeds: int) -> None:
    """Part 1: one line an instance."""
    print(title)
    print("  instance          published  from empty  deviation  endless  barrier  simulated  within 1 %  rule loses")
    for name, printed in rows:
        comparison = compare(name, ["afd-published"], seeds)
        assert isinstance(comparison, RatioComparison)
        (curve,) = comparison.curves
        report, (first, last) = curve.report, curve.plateau
        rule = report.horizon.ratio
        endless = published(report.bundle, comparison.scenario.slot_load.theta).ratio
        loses = min(curve.loss[max(1, end(rule)) - 1] for end in (floor, ceil))
        print(
            f"  {name:16} {printed:10.2f} {rule:11.4f} {rule / printed - 1:+10.2%} {endless:8.4f} "
            f"{report.barrier:8} {curve.best:10} {f'{first} to {last}':>11} {loses:11.2%}"
        )


def qwen() -> None:
    """Part 2: one line a ratio, then what the programs return and how long they take."""
    scenario = load_scenario("afd-qwen3-235b-h200")
    comparison = compare(scenario, ["afd-one"])
    assert isinstance(comparison, RatioComparison)
    (curve,) = comparison.curves
    print("Qwen3-235B-A22B on H200 nodes, tokens/s per GPU")
    print("  A:F  published   theory  deviation  simulated  deviation")
    for x, printed in QWEN:
        theory = curve.theory()[0][x - 1] / 8
        simulated = curve.at(x, "throughput").mean / 8
        print(
            f"  {x}:1 {printed:10} {theory:8.1f} {theory / printed - 1:+10.2%} {simulated:10.1f} "
            f"{simulated / printed - 1:+10.2%}"
        )
    for name in PLANS:
        plan(scenario, name)  # what is imported and compiled once is not timed
        begin = perf_counter()
        bundle = plan(scenario, name).bundle
        assert bundle is not None
        milliseconds = 1e3 * (perf_counter() - begin)
        print(f"  {name}: {bundle.attention_workers}A-{bundle.ffn_servers}F in {milliseconds:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    count = parser.parse_args().seeds
    ratios("Ablation of the workload", WORKLOAD, count)
    ratios("Ablation of the micro-batch", BATCH, count)
    qwen()
