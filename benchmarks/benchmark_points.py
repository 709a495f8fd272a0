"""How well step times fitted to benchmark logs predict benchmark points that they were not shown.

The points are the aggregated ones of aiconfigurator's silicon_sample.csv, by server (model, system, backend with its
version, precision, parallelism). Of each server with at least six loads, every load is predicted by a fit on the
others; then also by a fit near that load, and with all points of its lengths or of its concurrency left out. Then
Splitwise's static batches, each left out in turn, and the step times fitted to all of them.

    python -m benchmarks.benchmark_points [--data FOLDER] [--workers 2] [--least 6]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np

from llmopt.calibrate.bench import BenchFit, fit_benchmarks
from llmopt.calibrate.bench_entries import splitwise_fit
from llmopt.calibrate.bench_out import Fold, LeftOut, leave_out
from llmopt.calibrate.bench_table import BenchFile, BenchTable, read_benchmarks
from llmopt.hardware import StepTime

DATA = Path(__file__).parents[2] / "shared/data"
TARGET = 0.10
RUNS: tuple[tuple[str, Fold, bool], ...] = (
    ("one load left out", "point", False),
    ("the same, fitted near that load", "point", True),
    ("all loads of its lengths left out", "lengths", False),
    ("all loads of its concurrency left out", "concurrency", False),
)
SERVERS = (
    *(("llama2-70b", hardware, tp) for hardware in ("a100-80gb", "h100-80gb") for tp in (2, 4, 8)),
    *(("bloom-176b", hardware, 8) for hardware in ("a100-80gb", "h100-80gb")),
)
REFERENCE = (
    ("llama2-70b", "a100-80gb", 2, (81, 377, 1485), 54.8),
    ("llama2-70b", "h100-80gb", 2, (48, 158, 643), 37.4),
)
"""Milliseconds of prompts of 128, 1024 and 4096 tokens and of a decode step after 1024."""


def selected(file: BenchFile, least: int) -> list[BenchTable]:
    """Servers with enough loads; says what else the file holds."""
    tables = [t for t in file.tables if len(t.load) >= least]
    few = [t for t in file.tables if len(t.load) < least]
    apart = sum(file.left_out.values())
    rows = sum(int(t.repeats.sum()) for t in file.tables)
    print(f"{file.source}: {rows + apart} rows")
    print(f"  {apart} of disaggregated serving, where no replica does both prefill and decode: left out")
    print(f"  {rows} aggregated: {rows - count(file.tables)} repeats of a load, folded into its median")
    print(f"  {count(few)} loads of {len(few)} servers with fewer than {least}: left out")
    print(f"  {count(tables)} loads of {len(tables)} servers: used\n")
    return tables


def count(tables: Iterable[BenchTable]) -> int:
    return sum(len(t.load) for t in tables)


def shortened(table: BenchTable) -> str:
    """The label without what follows the number of a version."""
    version = table.setting["version"]
    return table.label.replace(version, version[:12])[:54] if version else table.label


def quantiles(off: Sequence[float] | np.ndarray) -> str:
    """Median and 90 % quantile in percent."""
    return f"{np.median(off):6.1%} {np.quantile(off, 0.9):6.1%}" if len(off) else f"{'-':>6} {'-':>6}"


def off(outs: Sequence[LeftOut], what: str, among: str = "") -> np.ndarray:
    """Relative errors of all predicted points, or of those that extrapolate (`beyond`) or do not (`inside`)."""
    errors = []
    for out in outs:
        mine = out.predicted
        if among:
            mine = mine & (out.beyond if among == "beyond" else ~out.beyond)
        errors.append(np.abs(getattr(out, what)[mine] / getattr(out.table, what)[mine] - 1))
    return np.concatenate(errors)


def left_out(table: BenchTable, fold: Fold, focused: bool) -> LeftOut:
    return leave_out(table, fold=fold, focused=focused)


def run(pool: ProcessPoolExecutor, tables: Sequence[BenchTable], fold: Fold, focused: bool) -> list[LeftOut]:
    n = len(tables)
    order = sorted(range(n), key=lambda i: -len(tables[i].load))
    outs = list(pool.map(left_out, [tables[i] for i in order], [fold] * n, [focused] * n))
    return [outs[order.index(i)] for i in range(n)]


def by_server(outs: Sequence[LeftOut], near: Sequence[LeftOut], fits: Sequence[BenchFit]) -> None:
    print(f"{'':54} {'':>4}  {'TPOT':^13}  {'near':^13}  {'TTFT':^13}   prompts    burst    KV")
    print(
        f"{'server':54} {'loads':>5} {'median':>6} {'90 %':>6}  {'median':>6} {'90 %':>6}  {'median':>6} {'90 %':>6}  "
    )
    for out, close, fit in zip(outs, near, fits, strict=True):
        name = shortened(out.table)
        parts = [quantiles(off([o], what)) for o, what in ((out, "tpot"), (close, "tpot"), (out, "ttft"))]
        capacity = f"{fit.kv_capacity:.0f}" if np.isfinite(fit.kv_capacity) else ""
        harness = f"{fit.harness.together:8.1f} {fit.harness.burst:8.3f} {capacity:>8}"
        print(f"{name:54} {len(out.table.load):>5} {'  '.join(parts)}  {harness}")
    print()


def overall(title: str, outs: Sequence[LeftOut]) -> float:
    """Print one kind of prediction; the median error of TPOT."""
    print(f"{title}: {len(off(outs, 'tpot'))} loads")
    for among, words in (("", "all"), ("inside", "between others' concurrency"), ("beyond", "beyond it")):
        tpot, ttft = off(outs, "tpot", among), off(outs, "ttft", among)
        if not len(tpot):
            continue
        print(f"  {words:28} {len(tpot):>5}   TPOT {quantiles(tpot)}   TTFT {quantiles(ttft)}")
    medians = [float(np.median(off([out], "tpot"))) for out in outs if out.predicted.any()]
    good = sum(m < TARGET for m in medians)
    print(f"  median TPOT error below {TARGET:.0%} in {good} of {len(medians)} servers, largest {max(medians):.1%}\n")
    return float(np.median(off(outs, "tpot")))


def worst(outs: Sequence[LeftOut], what: str, limit: int = 12) -> None:
    print(f"largest errors of {what.upper()}, one load left out")
    rows = []
    for out in outs:
        ratio = getattr(out, what) / getattr(out.table, what)
        rows += [(abs(np.log(r)), r, out, i) for i, r in enumerate(ratio) if np.isfinite(r)]
    for _, ratio, out, i in sorted(rows, key=lambda row: -row[0])[:limit]:
        load, name = out.table.load, shortened(out.table)
        lengths = f"{load.prompt[i]:.0f}/{load.output[i]:.0f}"
        seen = "beyond" if out.beyond[i] else ""
        print(f"  {name:54} {lengths:>10} x {load.concurrency[i]:<5g} {ratio:6.2f} times the measured  {seen}")
    print()


def splitwise(path: Path) -> None:
    print(f"{'Splitwise':28} {'decode':^13}  {'prefill':^13}  {'one left out':^28}")
    for model, hardware, tp in SERVERS:
        fit = splitwise_fit(path, model, hardware, tp, 2048.0)
        out = leave_out(fit.table, fit.options)
        fitted = {e.what: f"{e.median:6.1%} {e.q90:6.1%}" for e in fit.errors if e.region == "all"}
        tpot, ttft = out.errors()[0], out.errors(among=fit.judged)[1]
        left = f"{tpot.median:6.1%} {tpot.q90:6.1%}  {ttft.median:6.1%} {ttft.q90:6.1%}"
        print(f"{model:12} {hardware:11} x {tp}  {fitted['TPOT']}  {fitted['TTFT']}  {left}")
    for model, hardware, tp, prompts, decode in REFERENCE:
        step = splitwise_fit(path, model, hardware, tp, 2048.0).step_time
        said = [f"{ms} -> {1e3 * prefill(step, s):.0f}" for s, ms in zip((128, 1024, 4096), prompts, strict=True)]
        print(f"{model} on {tp} {hardware}: prefill {', '.join(said)} ms; decode {decode} -> ", end="")
        print(f"{1e3 * step(decode=1, kv=1024 + 63):.1f} ms")


def prefill(step: StepTime, tokens: int, budget: int = 2048) -> float:
    """Seconds of a lone prompt, in chunks of the token budget."""
    sizes = [min(budget, tokens - done) for done in range(0, tokens, budget)]
    return sum(step(prefill=n, pairs=n * i * budget + n * n / 2) for i, n in enumerate(sizes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--least", type=int, default=6)
    options = parser.parse_args()
    start = perf_counter()
    tables = selected(read_benchmarks(options.data / "aiconfigurator/silicon_sample.csv"), options.least)
    with ProcessPoolExecutor(options.workers) as pool:
        fits = list(pool.map(fit_benchmarks, tables))
        results = {title: run(pool, tables, fold, focused) for title, fold, focused in RUNS}
    titles = [title for title, _, _ in RUNS]
    by_server(results[titles[0]], results[titles[1]], fits)
    medians = [overall(title, results[title]) for title in titles]
    for what in ("tpot", "ttft"):
        worst(results[titles[0]], what)
    splitwise(options.data / "splitwise-sim/perf_model.csv")
    met = medians[0] < TARGET
    print(f"\nmedian TPOT error {medians[0]:.1%} (target: below {TARGET:.0%}{'' if met else ', MISSED'}), ", end="")
    print(f"{perf_counter() - start:.0f} s")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
