"""Benchmark points left out: how well a fit predicts what it was not shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.calibrate.bench import LEAST, BenchError, fit_benchmarks, relative_error
from llmopt.calibrate.bench_fit import DEFAULT_BENCH, BenchOptions
from llmopt.calibrate.bench_model import Load
from llmopt.calibrate.bench_table import BenchTable
from llmopt.errors import ScenarioError

Fold = Literal["point", "lengths", "concurrency"]


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Predictions for points that the fit was not shown.

    ttft, tpot (n,): s, NaN where too few points were left to fit; beyond (n,): whether the point's concurrency lies
    beyond those of the points with the same lengths that were left, or none was left, so that the fit extrapolates.
    """

    table: BenchTable
    ttft: Floats
    tpot: Floats
    beyond: Bools

    @property
    def predicted(self) -> Bools:
        """Points (n,) that could be predicted."""
        return np.isfinite(self.tpot)

    def errors(self, region: str = "all", among: Bools | None = None) -> tuple[BenchError, BenchError]:
        """Relative errors of TPOT and TTFT on the predicted points, or those of them in `among` (n,)."""
        mine = self.predicted if among is None else self.predicted & among
        tpot = relative_error("TPOT", region, self.tpot[mine], self.table.tpot[mine])
        return tpot, relative_error("TTFT", region, self.ttft[mine], self.table.ttft[mine])


def leave_out(
    table: BenchTable, options: BenchOptions = DEFAULT_BENCH, *, fold: Fold = "point", focused: bool = False
) -> LeftOut:
    """Predict each point by a fit on the others.

    Parameters
    ----------
    table, options
        As for `fit_benchmarks`. Repeated measurements of one load are one point, so none of them stays behind.
    fold
        What is left out besides the point: nothing (of static batches, those with the same prefill), or all points of
        its lengths, or of its concurrency.
    focused
        Fit near the load that is predicted, which for `point` is a fit for every point.

    Raises
    ------
    ScenarioError
        If there are so few points that fewer than `LEAST` stay when one is left out.
    """
    n = len(table.load)
    if n <= LEAST:
        raise ScenarioError(f"{table.label}: has {n} benchmark points; leaving one out needs at least {LEAST + 1}")
    ttft, tpot, beyond = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=bool)
    for out in _folds(table.load, fold):
        kept = ~out
        if kept.sum() < LEAST:
            continue
        for target in [np.flatnonzero(out)] if not focused else np.flatnonzero(out)[:, None]:
            load = table.load.some(target)
            fit = fit_benchmarks(table.some(kept), options, load if focused else None)
            ttft[target], tpot[target] = fit.predict(load)
            beyond[target] = _beyond(load, table.load.some(kept))
    return LeftOut(table, ttft, tpot, beyond)


def _folds(load: Load, fold: Fold) -> Iterator[Bools]:
    lengths, prefill = load.prompt + 1j * load.output, load.prompt + 1j * load.concurrency
    # static batches that differ by their outputs share their prefill
    points = prefill if load.static else np.arange(len(load), dtype=float)
    keys = {"point": points, "lengths": lengths, "concurrency": load.concurrency}
    for value in np.unique(keys[fold]):
        yield keys[fold] == value


def _beyond(load: Load, kept: Load) -> Bools:
    """Whether no kept point of the same lengths has at most, or none at least, the concurrency (n,)."""
    alike = (kept.prompt == load.prompt[:, None]) & (kept.output == load.output[:, None])
    lower = (alike & (kept.concurrency <= load.concurrency[:, None])).any(axis=1)
    higher = (alike & (kept.concurrency >= load.concurrency[:, None])).any(axis=1)
    return np.asarray(~(lower & higher))
