"""How many published model-1 instances close within a minute, and how small the certified gap is on larger ones.

Instances are `llmopt.rounds.model_1(seed, n)` for seeds 0, 1, .... An instance is closed if the bound meets
the latency of the schedule found; the gap is (latency - bound) / latency. Seconds are of CPU of the thread that bounds,
so that a busy machine changes little; a second thread looks for schedules meanwhile.

    python -m benchmarks.batching_exact [--quick] [--seeds 10] [--limit 60] [--large-limit 60]
    python -m benchmarks.batching_exact --bounds [--sizes 10 15 20 40] [--seeds 2]

The second form compares the relaxations, as shares of the best latency of a quarter of the limit.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from time import thread_time

from formulations.batching import TimeIndexed
from formulations.batching_bounds import area_bound
from formulations.batching_chain import ChainRelaxation, Multipliers, ascend
from formulations.batching_exact import CLIMB, THEN, ExactHindsight, Hindsight, permitted
from formulations.batching_start import mc_sf
from llmopt.rounds import model_1
from llmopt.solve import solve

SMALL, LARGE = (10, 15, 20), (40, 50, 60)


def measured(n: int, seeds: int, limit: float) -> list[Hindsight]:
    """Solve the first `seeds` instances of n requests, one line each."""
    found = []
    for seed in range(seeds):
        instance = model_1(seed, n)
        best = ExactHindsight(time_limit=limit, clock=thread_time).solve(instance)
        assert instance.feasible(best.start)
        found.append(best)
        shortest = instance.latency(mc_sf(instance))
        print(
            f"  n = {n}, seed {seed:2}: latency {best.latency:6}, bound {best.bound:6}, gap {best.gap:6.2%}, "
            f"{best.seconds:6.1f} s; MC-SF {shortest:6}, area bound {area_bound(instance) / best.latency:.3f}",
            flush=True,
        )
    return found


def relaxations(n: int, seed: int, limit: float) -> str:
    """One line with every bound as a share of the best latency found."""
    instance = model_1(seed, n)
    best = ExactHindsight(time_limit=limit, clock=thread_time).solve(instance)
    shares = {"area": area_bound(instance)}
    for name, cliques in (("LP", False), ("LP with (B8)", True)):
        shares[name] = solve(TimeIndexed(cliques=cliques, relaxed=True).build(instance)).bound
    at: Multipliers | None = None
    for stage in (*CLIMB, THEN):
        relaxation = ChainRelaxation(instance, permitted(instance, instance.horizon), *stage[:3])
        at = relaxation.adapted(at) if at else relaxation.start()
        value, at = ascend(relaxation, at, best.latency, stage.iterations, length=stage.step)
        shares[f"chains of {stage.length}" + " with sawtooth" * stage.sawtooth] = value
    return f"  n = {n}, seed {seed:2}: " + ", ".join(f"{k} {v / best.latency:.3f}" for k, v in shares.items())


def summary(n: int, found: list[Hindsight], limit: float) -> str:
    """How many closed, and the median and worst gap."""
    gaps = [h.gap for h in found]
    closed = sum(gap == 0 for gap in gaps)
    return (
        f"n = {n}: closed {closed} of {len(found)} within {limit:g} s, "
        f"gap median {statistics.median(gaps):.2%}, worst {max(gaps):.2%}"
    )


def main() -> None:
    """Print one line for each instance and a summary for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two instances each of 10 and 15 requests")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--large-limit", type=float, default=60.0)
    parser.add_argument("--sizes", type=int, nargs="*", default=[*SMALL, *LARGE])
    parser.add_argument("--bounds", action="store_true", help="compare relaxations instead")
    options = parser.parse_args()
    if options.bounds:
        for n, seed in product(options.sizes, range(options.seeds)):
            print(relaxations(n, seed, options.limit / 4), flush=True)
        return
    sizes, seeds, limit = ((10, 15), 2, 12.0) if options.quick else (options.sizes, options.seeds, options.limit)
    lines = []
    for n in sizes:
        most = options.large_limit if n >= min(LARGE) else limit
        lines.append(summary(n, measured(n, seeds, most), most))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
