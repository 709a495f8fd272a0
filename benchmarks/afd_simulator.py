"""Speed and memory of the bundle simulator: medians of several runs, compilation apart.

The published instance (prompts of 100 and outputs of 500 tokens on average, geometric): 32 workers with 512 slots each
over 10 000 steps, every number of workers at once. The naive simulator of the tests does a small part of it.

    python -m benchmarks.afd_simulator [--runs 9]
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from functools import partial
from time import perf_counter

import numpy as np

from benchmarks.simulator import Report, seconds
from llmopt.bundle import Bundle
from llmopt.evaluate.bundle_load import load_series
from llmopt.evaluate.bundle_run import play_bundle
from llmopt.workload import RequestClass
from tests import oracle_bundle

WORKERS, SLOTS, STEPS = 32, 512, 10_000
MANY_WORKERS, MANY_STEPS, LAYERS = 256, 1000, 61
FEW_WORKERS, FEW_SLOTS, FEW_STEPS = 8, 256, 1000
REQUESTS = RequestClass.model_validate(
    {
        "name": "requests",
        "share": 1.0,
        "prompt": {"law": "geometric", "mean": 100.0, "max": 4000},
        "output": {"law": "geometric", "mean": 500.0, "max": 20_000},
    }
)
BUNDLE = Bundle.model_validate(
    {
        "attention": [{"base": 50e-6, "kv": 0.00165e-6}],
        "transfer": [{"base": 20e-6, "decode": 0.022e-6}],
        "ffn": [{"base": 100e-6, "decode": 0.083e-6}],
        "batch": SLOTS,
        "kv_capacity": 10_000_000,
    }
)


def bundle_of(pipeline: str, micro_batches: int = 1, layers: int = 1, slots: int = SLOTS) -> Bundle:
    """The published bundle in another pipeline."""
    changes = {"pipeline": pipeline, "micro_batches": micro_batches, "layers": layers, "batch": slots}
    return BUNDLE.model_copy(update=changes)


def series_of(bundle: Bundle, workers: int = WORKERS, steps: int = STEPS) -> np.ndarray:
    """A load series of the published lengths, in steady state."""
    return load_series([REQUESTS], np.ones(1), 0, bundle, workers, steps, 1)


def first_call() -> None:
    """Compilation, or reading what an earlier run compiled, on a run of one step."""
    bundle = bundle_of("non-blocking")
    series = series_of(bundle, 2, 1)
    start = perf_counter()
    play_bundle(bundle, series)
    print(f"first call, compilation or its cache included: {perf_counter() - start:.2f} s\n")


def speed(report: Report, runs: int) -> None:
    """Load series and pipeline, apart and together."""
    cases = {
        "ideal": bundle_of("ideal"),
        "1 micro-batch": bundle_of("non-blocking"),
        "2 micro-batches": bundle_of("attention-blocking", 2),
        "3 micro-batches": bundle_of("non-blocking", 3),
    }
    for name, bundle in cases.items():
        series = series_of(bundle)
        loads = seconds(partial(series_of, bundle), runs)
        plays = seconds(partial(play_bundle, bundle, series), runs)
        report.line(f"load series, {name}", loads, "s")
        report.line(f"1..{WORKERS} workers on it, {name}", plays, "s")
        report.line(f"both, {name}", loads + plays, "s", most=5.0)
    many_layers(report, max(3, runs // 3))


def many_layers(report: Report, runs: int) -> None:
    """What the layers of a model cost beside a single one, for few workers and for many."""
    for workers, steps in ((WORKERS, STEPS), (MANY_WORKERS, MANY_STEPS)):
        flat, deep = bundle_of("non-blocking", 3), bundle_of("non-blocking", 3, layers=LAYERS)
        series = series_of(flat, workers, steps)
        one = seconds(partial(play_bundle, flat, series), runs)
        all_layers = seconds(partial(play_bundle, deep, series), runs)
        report.line(f"{LAYERS} layers, 3 micro-batches, 1..{workers} workers, {steps} steps", all_layers, "s")
        report.line("the same, times a single layer", all_layers / one, "x", most=LAYERS / 3)


def naive(report: Report, runs: int) -> None:
    """Times the naive simulator, which looks at every slot in every step and plays one number of workers at a time."""
    bundle = bundle_of("non-blocking", 2, slots=FEW_SLOTS)
    rng = np.random.default_rng(1)

    def slowly() -> None:
        loads = [[worker(rng) for _ in range(FEW_WORKERS)] for _ in range(bundle.micro_batches)]
        by_step = [[list(row) for row in zip(*one, strict=True)] for one in loads]
        for x in range(1, FEW_WORKERS + 1):
            oracle_bundle.play(bundle, by_step, x, 1)

    slow = seconds(slowly, max(3, runs // 3))
    fast = seconds(lambda: play_bundle(bundle, series_of(bundle, FEW_WORKERS, FEW_STEPS)), runs)
    work = f"{FEW_WORKERS} workers, {FEW_SLOTS} slots, {FEW_STEPS} steps, 2 micro-batches"
    report.line(f"naive, {work}", slow, "s")
    report.line("the same, times the naive simulator", slow / fast, "x", least=10.0)


def worker(rng: np.random.Generator) -> list[float]:
    """What one worker's micro-batch holds in each step, slot by slot, from a cold start."""
    slots = [oracle_bundle.slot_loads(requests(rng), 0, FEW_STEPS) for _ in range(FEW_SLOTS)]
    return [float(sum(step)) for step in zip(*slots, strict=True)]


def requests(rng: np.random.Generator) -> Iterator[oracle_bundle.Lengths]:
    """Requests for ever."""
    while True:
        for prompt, output in zip(*REQUESTS.sample(rng, 8), strict=True):
            yield oracle_bundle.Lengths(int(prompt), int(output))


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    print(f"{WORKERS} workers, {SLOTS} slots each, {STEPS} steps; medians of {runs} runs")
    report = Report()
    first_call()
    speed(report, runs)
    naive(report, runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.line("peak memory of this process", peak, "GiB", most=2.0)
    sys.exit(int(report.missed))


if __name__ == "__main__":
    main()
