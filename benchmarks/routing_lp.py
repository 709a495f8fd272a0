"""Time to build and solve the routing LP of 500 classes and 500 pools, as ratios to HiGHS fed with raw arrays.

The LP is (1) to (3) of formulations/README.md with theta maximised: 250 001 columns, one KV row per pool, one row per
class. All three paths start from the same `RoutingData` and run in turn in one process; medians of the runs count.

    python -m benchmarks.routing_lp [--size 500] [--runs 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np

from formulations.data import RoutingData
from formulations.routing import MaxMargin
from llmopt.solve import solve
from llmopt.stability import RESOURCES, PoolRows

Path = Callable[[RoutingData], tuple[float, float]]
LIMITS = {"raw": 1.0, "cvxpy": 2.0, "pyomo": 7.0}


def random_data(size: int, seed: int = 0) -> RoutingData:
    """`size` classes and pools whose KV rows are random; a class costs what its length and the pool's speed say."""
    rng = np.random.default_rng(seed)
    length, speed = rng.lognormal(0, 1, size), rng.uniform(0.5, 2, size)
    seconds = np.outer(length, 1 / speed) * rng.uniform(0.7, 1.4, (size, size))
    replicas = rng.integers(1, 20, size)
    pools = tuple(f"pool{j}" for j in range(size))
    limits = tuple(
        PoolRows(
            pool=pools[j],
            replicas=int(replicas[j]),
            pieces=("memory",) * 3,
            resources=RESOURCES,
            seconds=seconds[:, j : j + 1] * np.array([1.0, 0.5, 0.25]),
            work=np.zeros((size, 1)),
            base=np.ones(1),
            occupancy=seconds[:, j : j + 1] * np.array([1.0, 0.5, 0.25]),
            caps=np.ones(3),
        )
        for j in range(size)
    )
    return RoutingData(
        classes=tuple(f"class{c}" for c in range(size)),
        pools=pools,
        rates=rng.uniform(0.5, 2, size),
        replicas=replicas.astype(float),
        price=np.ones(size),
        tpot=np.full(size, np.inf),
        allowed=np.ones((size, size), dtype=bool),
        limits=limits,
    )


def raw(data: RoutingData) -> tuple[float, float]:
    """Optimum and seconds in HiGHS of the same LP as raw arrays: columns x_cj class by class, then theta."""
    import highspy

    classes, pools = len(data.classes), len(data.pools)
    seconds = np.array([row.seconds for row in data.rows]).T
    cls, pool = np.divmod(np.arange(classes * pools), pools)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = classes * pools + 1, pools + classes
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = np.concatenate([np.zeros(classes * pools), [1.0]])
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.full(lp.num_col_, np.inf)
    lp.row_lower_ = np.concatenate([np.full(pools, -np.inf), np.zeros(classes)])
    lp.row_upper_ = np.concatenate([data.replicas, np.zeros(classes)])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.concatenate([2 * np.arange(classes * pools + 1), [2 * classes * pools + classes]])
    lp.a_matrix_.index_ = np.concatenate([np.column_stack([pool, pools + cls]).ravel(), pools + np.arange(classes)])
    costs = (data.rates[:, None] * seconds).ravel()
    lp.a_matrix_.value_ = np.concatenate([np.column_stack([costs, np.ones(len(costs))]).ravel(), -np.ones(classes)])
    highs = highspy.Highs()
    for option, value in {"output_flag": False, "threads": 1}.items():
        highs.setOptionValue(option, value)
    highs.passModel(lp)
    start = perf_counter()
    highs.run()
    return float(highs.getInfo().objective_function_value), perf_counter() - start


def through(modeler: str) -> Path:
    """Optimum and seconds in HiGHS of the product's path through one modeller."""
    formulation = MaxMargin(modeler="cvxpy" if modeler == "cvxpy" else "pyomo")

    def path(data: RoutingData) -> tuple[float, float]:
        record = solve(formulation.program(data))
        return record.objective, record.solve_seconds

    return path


def measure(size: int, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds in all, and in HiGHS, of each run of each path; refuses paths that disagree on the optimum."""
    paths: dict[str, Path] = {"raw": raw, "cvxpy": through("cvxpy"), "pyomo": through("pyomo")}
    for path in paths.values():
        path(random_data(10))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(runs):
        optima = []
        for name, path in paths.items():
            data = random_data(size)
            start = perf_counter()
            optimum, inside = path(data)
            seconds[name].append((perf_counter() - start, inside))
            optima.append(optimum)
        if max(optima) > min(optima) * (1 + 1e-6):
            raise SystemExit(f"the paths disagree: {optima}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    seconds = measure(options.size, options.runs)
    middle = {name: np.median(times, axis=0) for name, times in seconds.items()}
    print(f"routing LP, {options.size} classes x {options.size} pools, median of {options.runs} runs")
    for name, (total, inside) in middle.items():
        ratio = f"{total / middle['raw'][0]:5.2f} x raw   (at most {LIMITS[name]:g})"
        print(f"{name:6} {total:7.2f} s, of which HiGHS {inside:6.2f} s   {ratio}")
    sys.exit(int(any(total > LIMITS[name] * middle["raw"][0] for name, (total, _) in middle.items())))


if __name__ == "__main__":
    main()
