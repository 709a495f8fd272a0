"""Max-affine step time from benchmark logs: TTFT and TPOT against concurrency and lengths, by convex fits.

`llmopt.calibrate.bench_model` writes mean TTFT and TPOT as rows times the parameters of two pieces (decode-only and
mixed) and of the harness. With the harness given, the step time is a linear program: non-negative coefficients with
the smallest sum of relative errors; with the step time given, so is the harness. From there both are improved
together, by linear programs to first order, until the error falls no further. Points at which requests queue for
memory say nothing about prefill in their TTFT; they are found by trying, and predicted by Little's law.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.calibrate.bench_fit import DEFAULT_BENCH, Alternation, BenchOptions
from llmopt.calibrate.bench_model import PARAMETERS, Harness, Load, Model, predict
from llmopt.calibrate.bench_table import BenchTable
from llmopt.errors import ScenarioError
from llmopt.hardware import Piece, StepTime

LEAST = 5
"""Points below which nothing is fitted; the step time and the harness have up to ten parameters, a point gives two."""
FOCUS_WIDTH = 1.0
"""With a focus, the weight of a point falls by e for each factor of e in concurrency, or e^2 in prompt length."""
FOCUS_LEAST = 0.02
NOTHING = 1e-9
"""Part of a base below which what is left of it is round-off."""


@dataclass(frozen=True)
class BenchError:
    """Relative errors of a fit: `what` is TTFT or TPOT, `region` says of which `points`; all as fractions."""

    what: str
    region: str
    points: int
    median: float
    q90: float
    largest: float


@dataclass(frozen=True, eq=False)
class BenchFit:
    """A step time fitted to benchmark points, and what it says of them.

    table, options: what was fitted, and how; pieces: the step time; model: the same with the harness and the
    capacity; ttft, tpot (n,): predictions for the points of `table`, s; queueing (n,): points at which requests are
    said to wait for memory; status: label of the last linear program; solves: linear programs solved; spent:
    wall-clock s.
    """

    table: BenchTable
    options: BenchOptions
    pieces: tuple[Piece, ...]
    model: Model
    ttft: Floats
    tpot: Floats
    queueing: Bools
    status: str
    solves: int
    spent: float

    @cached_property
    def step_time(self) -> StepTime:
        """The fitted pieces as arrays."""
        return StepTime.from_pieces(self.pieces)

    @property
    def harness(self) -> Harness:
        """What a mean TTFT holds besides the prompt's own steps."""
        return self.model.harness

    @property
    def kv_capacity(self) -> float:
        """KV tokens that bound the requests decoding at once; inf where the points show no bound."""
        return self.model.capacity

    @property
    def judged(self) -> Bools:
        """Points (n,) whose TTFT the step time speaks of: not those of a static batch beyond the token budget."""
        load = self.table.load
        return np.full(len(load), not load.static) | (load.concurrency * load.prompt <= self.options.token_budget)

    @property
    def errors(self) -> tuple[BenchError, ...]:
        """Errors on the fitted points: all, and the halves of light and heavy load."""
        middle = float(np.median(self.table.load.concurrency))
        light = self.table.load.concurrency <= middle
        regions = {"all": np.ones(len(light), dtype=bool), f"concurrency <= {middle:g}": light}
        regions |= {f"concurrency > {middle:g}": ~light} if not light.all() else {}
        return tuple(
            relative_error(what, region, predicted[mine & known], true[mine & known])
            for what, predicted, true, known in (
                ("TPOT", self.tpot, self.table.tpot, regions["all"]),
                ("TTFT", self.ttft, self.table.ttft, self.judged),
            )
            for region, mine in regions.items()
        )

    def predict(self, load: Load) -> tuple[Floats, Floats]:
        """TTFT and TPOT of a load under the same harness, s, both (n,)."""
        return predict(self.model, load)[:2]


def relative_error(what: str, region: str, predicted: Floats, measured: Floats) -> BenchError:
    """Quantiles of |predicted / measured - 1|; NaN for no points."""
    off = np.abs(predicted / measured - 1.0)
    if not len(off):
        return BenchError(what, region, 0, np.nan, np.nan, np.nan)
    return BenchError(what, region, len(off), float(np.median(off)), float(np.quantile(off, 0.9)), float(off.max()))


def fit_benchmarks(table: BenchTable, options: BenchOptions = DEFAULT_BENCH, focus: Load | None = None) -> BenchFit:
    """The step time of one server from its benchmark points.

    Parameters
    ----------
    table
        Points of one model on one system with one parallelism.
    options
        Assumptions and effort.
    focus
        One load near which the fit shall be best: points far from it count less. A max-affine function is convex, and
        the step time of a mixture of experts is not; then one fit cannot be good everywhere.

    Raises
    ------
    ScenarioError
        If there are fewer than `LEAST` points, or a coefficient comes out as no step time can have it.
    SolveError
        If a linear program ends without an answer.
    """
    if len(table.load) < LEAST:
        raise ScenarioError(f"{table.label}: has {len(table.load)} benchmark points; give at least {LEAST}")
    start = perf_counter()
    fitting = Alternation(table, options, np.ones(len(table.load)) if focus is None else _near(table.load, focus))
    model = fitting.best()
    ttft, tpot, queueing = predict(model, table.load)
    spent = perf_counter() - start
    pieces = _pieces(model.values, table.label)
    return BenchFit(table, options, pieces, model, ttft, tpot, queueing, fitting.status, fitting.solves, spent)


def _near(load: Load, focus: Load) -> Floats:
    def away(values: Floats, middle: Floats) -> Floats:
        return np.asarray(np.abs(np.log(values / middle[0])))

    distance = away(load.concurrency, focus.concurrency) + 0.5 * away(load.prompt, focus.prompt)
    return np.exp(-distance / FOCUS_WIDTH) + FOCUS_LEAST


def _pieces(values: Floats, label: str) -> tuple[Piece, ...]:
    """Decode-only and mixed piece; one piece where they differ by the prefill terms alone."""
    base, decode, kv, prefill, pairs, hidden = values.tolist()
    shared = {"decode": decode, "kv": kv}
    try:
        mixed = Piece(
            name="mixed",
            base=base - hidden if base - hidden > NOTHING * base else 0.0,
            prefill=prefill,
            pairs=pairs,
            **shared,
        )
        return (Piece(name="decode", base=base, **shared), mixed) if hidden > 0 else (mixed,)
    except ValueError:
        text = ", ".join(f"{name} {value:.3g} s" for name, value in zip(PARAMETERS, values.tolist(), strict=True))
        raise ScenarioError(f"{label}: the fit gives {text}; check the unit of its times") from None
