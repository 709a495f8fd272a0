"""How true and how fast the simulator is: errors on recorded vLLM runs, simulated seconds per second, critical rates.

Part 1 validates every recorded run with each step time and each host overhead. Part 2 shows what one overhead for all
machines does, from none to 1.4 ms a step. Part 3 is speed, after compilation. Part 4 compares, for the replica of each
run, the critical rate that the theory predicts from max-affine pieces with the rate at which the same replica, played
with its table, serves a queue that never empties; once with pieces fitted to the whole table, as `llmopt calibrate`
does, and once with pieces fitted to the steps that the load makes.

    python -m benchmarks.fidelity [--data FOLDER] [--requests 6000]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.simulator import seconds
from llmopt.arrays import Ints
from llmopt.calibrate.fit import fit_step_time
from llmopt.calibrate.sample import Caps, sample_steps
from llmopt.capacity import replica_capacity
from llmopt.evaluate.saturate import saturated_throughput
from llmopt.evaluate.simulate import simulate
from llmopt.hardware import Piece
from llmopt.plan import Plan, index_router
from llmopt.runs import EngineRun, read_run
from llmopt.scenario import Pool, Scenario
from llmopt.traces import read_trace
from llmopt.validation import Validation, validate
from llmopt.validation.accuracy import JUDGED, METRICS
from llmopt.validation.constants import HOST_OVERHEAD
from llmopt.validation.fitting import pieces_met
from llmopt.validation.replay import play
from llmopt.workload import Pairs, Requests

DATA = Path(__file__).parents[2] / "shared/data"
MODES: tuple[dict[str, Any], ...] = (
    {"step_time": "table", "host_overhead": 0.0},
    {"step_time": "table", "host_overhead": "common"},
    {"step_time": "table", "host_overhead": "fit"},
    {"step_time": "max-affine", "host_overhead": "common"},
    {"step_time": "max-affine", "host_overhead": "fit"},
)
LIMITS = {"common": (0.10, 0.04), "fit": (0.05, 0.02)}
"""Largest and mean error promised; for max-affine pieces only the first of `common`."""
PROBED = 800
"""Requests of the run whose steps the pieces of a load are fitted to."""
MISSED = "  MISSED"


def runs(data: Path) -> list[EngineRun]:
    """The recorded runs."""
    return [read_run(path.parent) for path in sorted((data / "vllm-runs").glob("*/requests.jsonl"))]


def errors(found: list[EngineRun], profiles: Path) -> bool:
    """Print a table of errors for every run and mode; whether all are as promised."""
    print("| run | step time | host overhead, ms | " + " | ".join(f"{m} {s}" for m in METRICS for s in JUDGED), end="")
    print(" | mean abs. | largest |\n" + "|---" * (5 + len(METRICS) * len(JUDGED)) + "|")
    met = True
    for run in found:
        for mode in MODES:
            answer = validate(run, profiles, **mode)
            good = promised(answer)
            met &= good
            cells = [f"{100 * answer.relative_error[m][s]:+.1f}" for m in METRICS for s in JUDGED]
            ends = f"{100 * answer.mean_absolute_error:.1f} | {100 * answer.largest_error:.1f}"
            host = f"{1e3 * answer.host_overhead:.2f} ({answer.overhead})"
            print(
                f"| {run.name} | {answer.step_time} | {host} | {' | '.join(cells)} | {ends} |{'' if good else MISSED}"
            )
    return met


def promised(answer: Validation) -> bool:
    """Whether the errors are within `LIMITS`."""
    if answer.overhead not in LIMITS:
        return True
    fitted = answer.step_time != "table"
    largest, mean = LIMITS["common"] if fitted else LIMITS[answer.overhead]
    return answer.largest_error <= largest and (fitted or answer.mean_absolute_error <= mean)


def scan(found: list[EngineRun], profiles: Path) -> None:
    """Mean and largest error of the table for one overhead on all machines."""
    print("\n| host overhead of all machines, ms | mean abs. error over all runs, % | of each | largest of each |")
    print("|---|---|---|---|")
    for host in np.arange(0.0, 1.45e-3, 1e-4):
        answers = [validate(run, profiles, host_overhead=float(host)) for run in found]
        means = [100 * a.mean_absolute_error for a in answers]
        most = ", ".join(f"{100 * a.largest_error:.1f}" for a in answers)
        print(f"| {1e3 * host:.1f} | {np.mean(means):.2f} | {', '.join(f'{m:.2f}' for m in means)} | {most} |")


def speed(found: list[EngineRun], profiles: Path) -> None:
    """Simulated seconds per second of a replay, and the seconds of a whole validation."""
    print("\n| run | simulated s per s | steps per s | whole validation, s |\n|---|---|---|---|")
    for run in found:
        answer = validate(run, profiles)
        replay = seconds(lambda answer=answer: play(answer.scenario), 15)
        whole = seconds(lambda run=run: validate(run.path, profiles), 5)
        print(f"| {run.name} | {answer.sim.end / replay:,.0f} | {answer.steps / replay:,.0f} | {whole:.2f} |")


def workloads(data: Path) -> Iterator[tuple[str, Ints, Ints]]:
    """Names, prompt and output lengths of real workloads."""
    columns = {"prompt": "num_prefill_tokens", "output": "num_decode_tokens"}
    shared_gpt = next((data / "sharegpt-lengths").glob("*.csv"))
    traces = {"ShareGPT": read_trace(shared_gpt, columns=columns)}
    for name in ("conv", "code"):
        traces[f"Azure {name}"] = read_trace(data / f"azure-llm-2023/AzureLLMInferenceTrace_{name}.csv")
    for name, trace in traces.items():
        yield name, trace.prompt, trace.output


def critical_rates(found: list[EngineRun], data: Path, count: int) -> bool:
    """Print predicted and simulated critical rates; whether the fit to the load is within 10 % everywhere."""
    head = "| replica | workload | simulated with table, 1/s | predicted, fit to the table | error | "
    print(f"\n{head}predicted, fit to the load | error | binds |\n|---|---|---|---|---|---|---|---|")
    met = True
    for run in found:
        pool = validate(run, data / "vllm-runs/profiles").scenario.pools[0]
        whole = whole_fit(pool)
        for name, prompt, output in workloads(data):
            few = prompt + output <= pool.largest
            scenario = loaded(pool, prompt[few], output[few])
            sample = scenario.workload.classes[0].sample(np.random.default_rng(1), count)
            rate = saturated_throughput(pool, *sample).rate
            general, load = (predicted(scenario, pieces) for pieces in (whole, met_fit(scenario, sample)))
            off = [100 * (capacity.rate / rate - 1) for capacity in (general, load)]
            good = abs(off[1]) <= 10
            met &= good
            print(
                f"| {run.name} | {name} | {rate:.3f} | {general.rate:.3f} | {off[0]:+.1f} % | {load.rate:.3f} | "
                f"{off[1]:+.1f} % | {load.resource} |{'' if good else MISSED}"
            )
    return met


def loaded(pool: Pool, prompt: Ints, output: Ints) -> Scenario:
    """One replica under requests of these lengths."""
    laws = {}
    for name, values in (("prompt", prompt), ("output", output)):
        different, counts = np.unique(values, return_counts=True)
        laws[name] = {"law": "histogram", "values": different.tolist(), "weights": counts.astype(float).tolist()}
    one = {"name": "only", "share": 1.0, "pairs": Pairs(prompt, output), **laws}
    pools = [pool.model_dump(exclude_none=True) | {"replicas": 1, "table": pool.table}]
    data = {"name": "t", "workload": {"rate": 1.0, "classes": [one]}, "pools": pools}
    return Scenario.checked(data, "benchmark")


def whole_fit(pool: Pool) -> tuple[Piece, ...]:
    """Pieces fitted to the whole table within the pool's limits."""
    assert pool.table is not None
    features, weights = sample_steps(pool.table, Caps(pool.max_batch, pool.token_budget, pool.kv_capacity))
    return fit_step_time(features, pool.table.many(features), weights=weights).pieces


def met_fit(scenario: Scenario, sample: tuple[Ints, Ints]) -> tuple[Piece, ...]:
    """Pieces fitted to the steps of a replica that finds `PROBED` requests waiting."""
    prompt, output = (values[:PROBED] for values in sample)
    none = np.zeros(len(prompt))
    requests = Requests(none, prompt, output, none.astype(np.int64), none)
    return pieces_met(scenario, simulate(scenario, Plan("only", index_router(scenario)), requests=requests))


def predicted(scenario: Scenario, pieces: tuple[Piece, ...]) -> Any:
    """The theory's capacity of the replica with these pieces."""
    pool = scenario.pools[0].model_dump(exclude_none=True) | {"step_time": pieces}
    return replica_capacity(Pool.model_validate(pool), scenario.workload.classes, np.ones(1))


def main() -> int:
    """Print all parts; 1 if a promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with vllm-runs and traces")
    parser.add_argument("--requests", type=int, default=6000, help="requests of a saturated run")
    chosen = parser.parse_args()
    profiles, start = chosen.data / "vllm-runs/profiles", perf_counter()
    found = runs(chosen.data)
    met = errors(found, profiles)
    scan(found, profiles)
    speed(found, profiles)
    met &= critical_rates(found, chosen.data, chosen.requests)
    print(f"\nhost overhead of all machines: {1e3 * HOST_OVERHEAD:g} ms; {perf_counter() - start:.0f} s")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
