"""How well max-affine fits follow the profiles at hand: error by number of pieces, and replays of recorded runs.

Part 1 fits every profile that the catalog is fitted to with more and more pieces. Part 2 replays the recorded vLLM runs
with the fitted pieces alone (no table), for several samples of steps: nothing in a fit knows the run.

    python -m benchmarks.calibration [--data FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.catalog_fits import ENTRIES, Profiled
from benchmarks.fidelity import DATA, runs
from llmopt.calibrate.fit import Fit, FitOptions, fit_step_time
from llmopt.calibrate.result import Caps
from llmopt.calibrate.sample import sample_steps
from llmopt.runs import EngineRun
from llmopt.scenario import Pool
from llmopt.steptable import StepTable
from llmopt.validation import validate
from llmopt.validation.accuracy import (
    JUDGED,
    METRICS,
    measured_latencies,
    predicted_latencies,
    relative_errors,
    summary,
)
from llmopt.validation.replay import play, recorded_scenario

NUMBERS = ((1, 1), (1, 2), (2, 2), (2, 3), (2, 4))
EFFORT = FitOptions(kicks=0)
SEEDS = range(4)


def profiled() -> Iterator[tuple[str, Profiled]]:
    """Entries of the catalog that are fitted to operator tables."""
    for name, build in ENTRIES.items():
        if isinstance(build, Profiled):
            yield name, build


def fitted(table: StepTable, caps: Caps, numbers: tuple[int, int], seed: int = 0) -> Fit:
    """A fit as `llmopt calibrate` makes it."""
    features, weights = sample_steps(table, caps, seed=seed)
    decode, mixed = numbers
    return fit_step_time(
        features, table.many(features), decode_pieces=decode, mixed_pieces=mixed, weights=weights, options=EFFORT
    )


def by_pieces(data: Path) -> None:
    """Mean relative error in percent: all steps, then those without and with prefill."""
    print("| profile | " + " | ".join(f"{d} + {m}" for d, m in NUMBERS) + " |\n" + "|---" * (1 + len(NUMBERS)) + "|")
    for name, entry in profiled():
        cells = []
        for decode, mixed in NUMBERS:
            points = entry.calibrated(data, decode_pieces=decode, mixed_pieces=mixed).points
            size, pure = np.abs(points.predicted / points.measured - 1.0), points.kind == 0
            each = 100 * size[pure].mean(), 100 * size[~pure].mean()
            cells.append(f"{np.mean(each):.2f} ({each[0]:.1f}, {each[1]:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


def replays(found: list[EngineRun], data: Path) -> None:
    """Relative errors in percent of every judged statistic, by sample and number of pieces."""
    print("\n| run | pieces | sample | " + " | ".join(f"{m} {s}" for m in METRICS for s in JUDGED), end="")
    print(" | mean abs. | largest |\n" + "|---" * (5 + len(METRICS) * len(JUDGED)) + "|")
    for run in found:
        pool = validate(run, data / "vllm-runs/profiles").scenario.pools[0]
        for numbers in NUMBERS[:4]:
            for seed in SEEDS:
                errors = 100 * replayed(run, pool, numbers, seed)
                cells = " | ".join(f"{e:+.1f}" for e in errors)
                ends = f"{np.abs(errors).mean():.1f} | {np.abs(errors).max():.1f}"
                print(f"| {run.name} | {numbers[0]} + {numbers[1]} | {seed} | {cells} | {ends} |")


def replayed(run: EngineRun, pool: Pool, numbers: tuple[int, int], seed: int) -> np.ndarray:
    """Relative errors (n_statistics,) of a replay without the table."""
    assert pool.table is not None
    fit = fitted(pool.table, Caps(pool.max_batch, pool.token_budget, pool.kv_capacity), numbers, seed)
    affine = pool.model_copy(update={"step_time": fit.pieces, "table": None, "profile": ""})
    sim = play(recorded_scenario(run, affine))
    errors = relative_errors(summary(measured_latencies(run.records)), summary(predicted_latencies(sim)))
    return np.array([errors[metric][statistic] for metric in METRICS for statistic in JUDGED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with profiles and vllm-runs")
    data = parser.parse_args().data
    by_pieces(data)
    replays(runs(data), data)


if __name__ == "__main__":
    main()
