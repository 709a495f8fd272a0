"""Every batching rule in the simulator: LMSYS-like conversations, replayed traces, and predictions that grow worse.

1. demand: scenarios lmsys-high and lmsys-low. Mean end-to-end latency of the first 2000, 4000, ... requests, the last
   of which is the whole scenario, and its slope in seconds for each further request. Published (Jaillet et al., arXiv
   2502.07115): slopes of about 1/6 against 1/2 for the best of the benchmarks at high demand, 1/800 against 1/100 at
   low demand; 32.11 against 46.47 on average, which is 31 % less.
2. traces: the Azure and Mooncake conversation traces, replayed at parts of the critical rate that the theory estimates
   for the engine's own rule. Measured are requests that arrive after the warm-up. The verdict is that of the margin,
   the factor on all arrivals at which a long simulated run's backlog begins to grow (`--margin` requests, 0 leaves it
   out); for rules without a long run, that of the measured window, in brackets.
3. predictions: mean end-to-end latency in the first minute of lmsys-high as predictions grow worse, and in brackets the
   ratio to that with known outputs. Interval predictions are what A_max and A_min are made for.

Everything random follows from the seeds. Traces are looked for in ../shared/data, or where --data says.

    python -m benchmarks.batching_study [--quick] [--parts demand traces predictions] [--out study.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmopt import load_scenario
from llmopt.api import at_load, plan
from llmopt.evaluate.margin import backlog_growth, long_run, simulated_margin
from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan
from llmopt.registry import policy_names
from llmopt.scenario import Scenario

Row = dict[str, Any]
PARTS = ("demand", "traces", "predictions")
DATA = Path(__file__).parents[2] / "shared" / "data"
TRACES = {
    "azure-conv-batching": "azure-llm-2023/AzureLLMInferenceTrace_conv.csv",
    "mooncake-batching": "mooncake-fast25/conversation_trace.jsonl",
}
LOADS = (0.7, 0.9, 0.99)
DEMAND = ("mc-sf", "fifo-lookahead", "fifo")
ROBUST = ("fifo", "shortest-output", "mc-sf", "a-max", "a-min")
PREDICTIONS: tuple[Row, ...] = (
    {"law": "oracle"},
    *({"law": "noise", "sigma": sigma} for sigma in (0.25, 0.5, 1.0)),
    *({"law": "interval", "factor": factor} for factor in (1.5, 2.0, 4.0, 10.0)),
    {"law": "class-mean"},
    {"law": "none"},
)
SLOW = ("rolling-horizon", "hindsight", "sorted-lp", "lp-swap")
WHOLE = ("vllm-v0", "faster-transformer")
"""Policies that plan while they run or know the future; they have no long run."""


def demand(requests: int, seeds: int) -> Iterator[Row]:
    """Part 1."""
    for name in ("lmsys-high", "lmsys-low"):
        scenario = load_scenario(name)
        heads = np.linspace(requests / 5, requests, 5).astype(int)
        for policy in DEMAND:
            begin = perf_counter()
            means = np.array([_growth(scenario, plan(scenario, policy), seed, heads) for seed in range(1, seeds + 1)])
            slopes = [np.polyfit(heads, row, 1)[0] for row in means]
            yield {
                "scenario": name,
                "policy": policy,
                "e2e by head": means.mean(axis=0).round(3).tolist(),
                "e2e": float(means[:, -1].mean()),
                "slope": float(np.mean(slopes)),
                "seconds": perf_counter() - begin,
            }


def _growth(scenario: Scenario, answer: Plan, seed: int, heads: Sequence[int]) -> list[float]:
    """Mean end-to-end latency (s) of runs of the first requests only, as many as `heads` says."""
    drawn = scenario.workload.sample(scenario.evaluation.horizon, seed)
    return [float(simulate(scenario, answer, seed, requests=drawn.head(n)).e2e.mean()) for n in heads]


def show_demand(rows: Sequence[Row]) -> None:
    """Print part 1 and how much less the first policy takes than each of the others."""
    for name in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == name]
        for row in mine:
            less = 1 - mine[0]["e2e"] / row["e2e"]
            print(
                f"{name:10} {row['policy']:15} mean E2E {row['e2e']:8.2f} s, slope {row['slope']:.5f} s per request; "
                f"{mine[0]['policy']} takes {less:.1%} less; "
                f"{row['seconds']:.0f} s",
                flush=True,
            )


def traces(data: Path, loads: Sequence[float], policies: Sequence[str], margin: int, most: int | None) -> Iterator[Row]:
    """Part 2, one row for each trace, policy and load."""
    for name, file in TRACES.items():
        if not (data / file).exists():
            print(f"{name}: left out, {data / file} is not there; give its folder with --data", flush=True)
            continue
        scenario = load_scenario(name, data / file)
        for policy in policies:
            yield from _on_trace(scenario, policy, loads, margin, most)


def _on_trace(scenario: Scenario, policy: str, loads: Sequence[float], margin: int, most: int | None) -> Iterator[Row]:
    scenario = _roomy(scenario, policy)
    head = {"scenario": scenario.name, "policy": policy}
    critical = at_load(scenario, 1.0)
    bracket: tuple[float, float] | None = None
    try:
        if margin and policy not in SLOW:
            bracket = simulated_margin(critical, plan(critical, policy), long_run(critical, 1, margin), 0.95)
        for load in loads:
            begin, loaded = perf_counter(), at_load(scenario, load)
            requests = loaded.workload.sample(loaded.evaluation.horizon, 1)
            run = simulate(loaded, plan(loaded, policy), requests=requests.head(most or len(requests)))
            yield (
                head
                | {"load": load, "margin": bracket}
                | _measured(loaded, run, load, bracket)
                | {"seconds": perf_counter() - begin}
            )
    except Exception as error:  # one rule that cannot run must not cost the others their rows
        yield head | {"load": None, "verdict": f"{type(error).__name__}: {error}"}


def _roomy(scenario: Scenario, policy: str) -> Scenario:
    """For rules that never cut a prompt a token budget that holds the longest, as their engines are set up."""
    if policy not in WHOLE or scenario.workload.replay is None:
        return scenario
    longest = int((scenario.workload.replay.prompt + scenario.workload.replay.output).max())
    pools = enumerate(scenario.pools)
    return scenario.replace(**{f"pools.{j}.token_budget": max(pool.token_budget, longest) for j, pool in pools})


def _measured(scenario: Scenario, run: SimRun, load: float, bracket: tuple[float, float] | None) -> Row:
    start = min(scenario.evaluation.warmup, float(run.requests.arrival[-1]) / 10)
    inside = run.requests.arrival >= start
    growing = not backlog_growth(scenario, [run]).stable
    return {
        "throughput": run.throughput(start, float(run.requests.arrival[-1])),
        "output_tokens": float(run.requests.output[inside].sum() / (run.requests.arrival[-1] - start)),
        "ttft": float(run.ttft[inside].mean()),
        "ttft_p99": float(np.quantile(run.ttft[inside], 0.99)),
        "e2e": float(run.e2e[inside].mean()),
        "e2e_p99": float(np.quantile(run.e2e[inside], 0.99)),
        "longest_wait": float(run.queue_time[inside].max()),
        "preemptions": int(run.preemptions.sum()),
        "growing": growing,
        "verdict": _verdict(load, bracket, growing),
    }


def _verdict(load: float, bracket: tuple[float, float] | None, growing: bool) -> str:
    if bracket is None:
        return "(unstable)" if growing else "(stable)"
    low, high = bracket
    return "stable" if load <= low else "unstable" if load >= high else "close"


def show_trace(row: Row) -> None:
    """Print a row of part 2."""
    if row["load"] is None:
        print(f"{row['scenario']:19} {row['policy']:22} {row['verdict']}", flush=True)
        return
    margin = "     " if row["margin"] is None else f"{np.sqrt(np.prod(row['margin'])):5.3f}"
    print(
        f"{row['scenario']:19} {row['policy']:22} {row['load']:4.2f}  margin {margin} {row['verdict']:10} "
        f"{row['throughput']:6.3f}/s  TTFT {row['ttft']:8.2f} p99 {row['ttft_p99']:8.1f}  "
        f"E2E {row['e2e']:8.2f} p99 {row['e2e_p99']:8.1f}  wait <= {row['longest_wait']:7.1f}  "
        f"{row['preemptions']:6} preempted  {row['seconds']:5.1f} s",
        flush=True,
    )


def predictions(seconds: float, seeds: int) -> Iterator[Row]:
    """Part 3, one row for each predictor."""
    scenario = load_scenario("lmsys-high").replace(**{"evaluation.horizon": seconds})
    for predictor in PREDICTIONS:
        guessed = scenario.replace(predictions=predictor)
        yield {"predictions": predictor, "e2e": {name: _mean_e2e(guessed, name, seeds) for name in ROBUST}}


def _mean_e2e(scenario: Scenario, policy: str, seeds: int) -> float:
    """Mean over seeds, the rule made to use the scenario's predictions whatever it would bring itself."""
    answer = plan(scenario, policy)
    answer = replace(answer, batcher=replace(answer.batcher, predictor=None))
    return float(np.mean([simulate(scenario, answer, seed).e2e.mean() for seed in range(1, seeds + 1)]))


def show_predictions(rows: Sequence[Row]) -> None:
    """Print part 3."""
    print(f"{'mean E2E, s':24}" + "".join(f"{name:>22}" for name in ROBUST))
    for row in rows:
        law = " ".join(str(value) for value in row["predictions"].values())
        cells = (f"{e:8.2f} ({e / rows[0]['e2e'][name]:.2f})" for name, e in row["e2e"].items())
        print(f"{law:24}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    """Print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests and no margins")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--policies", help="names for the traces, separated by commas; all batching policies if absent")
    parser.add_argument("--loads", type=float, nargs="*", default=LOADS, help="parts of the critical rate")
    parser.add_argument("--margin", type=int, default=100_000, help="requests of a long run; 0: no margins")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    options = parser.parse_args()
    quick = options.quick
    names = options.policies.split(",") if options.policies else policy_names("batching")
    found: dict[str, list[Row]] = {}
    if "demand" in options.parts:
        found["demand"] = list(demand(1000 if quick else 10_000, 1 if quick else 3))
        show_demand(found["demand"])
    if "traces" in options.parts:
        found["traces"] = []
        played = partial(traces, options.data, options.loads, names)
        for row in played(0, 1000) if quick else played(options.margin, None):
            show_trace(row)
            found["traces"].append(row)
    if "predictions" in options.parts:
        found["predictions"] = list(predictions(10.0 if quick else 60.0, 1 if quick else 3))
        show_predictions(found["predictions"])
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
