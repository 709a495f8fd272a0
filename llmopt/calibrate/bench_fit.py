"""The convex fits behind `llmopt.calibrate.bench`: step time, harness, then both, each by linear programs."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from llmopt.arrays import Bools, Floats
from llmopt.calibrate.bench_model import (
    BASE,
    HIDDEN,
    PAIRS,
    PARAMETERS,
    Harness,
    Model,
    decode_share,
    hides,
    predict,
    tpot_rows,
    ttft_rows,
    work,
)
from llmopt.calibrate.bench_table import BenchTable
from llmopt.hardware import FEATURES, Piece
from llmopt.machines.physics import Floor
from llmopt.model import InputModel
from llmopt.solution import SolveOptions

WAITING, FULL, MOST = (0.05, 0.3), 0.6, 0.8
"""Requests may queue for memory where they wait more than a share of their life (two guesses) and hold more than
`FULL` of the most KV tokens that any point holds, if one of these points holds more than `MOST` of it."""
WRONG = 0.1
"""Relative error of TTFT from which such a point is worth the trial."""
GAIN = 1.1
"""A capacity is one more parameter: it must reduce the error by this factor."""
FALL = 1e-3
"""Relative fall of the error below which a round is the last."""
BURST = 0.05
"""Where the search starts: a benchmark of ten requests a place, without synchronism."""
FIXED, START, SHY = 6, np.zeros(4), np.array([0.0, 0.0, 1.0, 0.0])
"""A point of the search is six parameters, then fixed, steps, together - 1 and burst of the harness."""
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03)
"""Parts of the way to the solution of a linear program that are tried, as it is exact only near where it was made."""


class BenchOptions(InputModel):
    """Assumptions and effort of a fit to benchmark points.

    token_budget: most prefill tokens of a step (8192 is the default of vLLM on data-centre GPUs, SGLang and
    TensorRT-LLM); kv_capacity: KV tokens of a replica (of an attention data-parallel rank) if known, else found in the
    data; pairs: seconds per prefill attention pair if known; floor: coefficients that none may fall below, as
    `physical_floor` takes them from the peaks of the machine; ttft_weight: weight of a relative error of TTFT, which
    depends on the harness, against one of TPOT; together_penalty: weight, per point, of each prompt more than one that
    the harness is said to prefill at once; rounds: most linear programs after the first two; solve: effort of each.
    """

    token_budget: Annotated[float, Field(gt=0)] = 8192.0
    kv_capacity: Annotated[float, Field(gt=0)] | None = None
    pairs: Annotated[float, Field(ge=0, le=1)] | None = None
    floor: Piece | None = None
    ttft_weight: Annotated[float, Field(ge=0, le=10)] = 0.3
    together_penalty: Annotated[float, Field(ge=0, le=10)] = 0.02
    rounds: Annotated[int, Field(ge=1, le=1000)] = 6
    solve: SolveOptions = SolveOptions()


DEFAULT_BENCH = BenchOptions()


class Alternation:
    """The fits for one table and one set of weights (n,)."""

    def __init__(self, table: BenchTable, options: BenchOptions, weights: Floats) -> None:
        self.load, self.ttft, self.tpot = table.load, table.ttft, table.tpot
        self.options, self.weights = options, weights
        self.budget = np.inf if table.load.static else options.token_budget
        self.share = decode_share(self.load, self.ttft, self.tpot)
        self.lower = _lower(options)
        self.status, self.solves = "", 0

    def best(self) -> Model:
        """The model without a bound by memory, or the one with it that is clearly better."""
        known = self.options.kv_capacity
        if self.load.static or known is not None:
            return self._alternate(self._waiting(known or np.inf, WAITING[0]), known or np.inf)
        free = self._alternate(self._waiting(np.inf, 0.0), np.inf)
        return min([free, *self._bounded(free)], key=self._error)

    def _waiting(self, capacity: float, least: float) -> Bools:
        """Points (n,) at which requests wait more than `least` of their life and memory of this capacity is full."""
        held = self.load.concurrency * self.share * self.load.context
        return np.asarray((1.0 - self.share > least) & (held > FULL * capacity))

    def _bounded(self, free: Model) -> list[Model]:
        """Models of a memory that is full where requests wait longest and hold most, if `free` is wrong there."""
        wrong = np.abs(predict(free, self.load)[0] / self.ttft - 1.0) > WRONG
        held = self.load.concurrency * self.share * self.load.context
        guesses = [self._waiting(float(held.max()), wait) for wait in WAITING]
        possible = [g for g in guesses if (g & wrong).any() and held[g].max() > MOST * held.max()]
        if len(possible) > 1 and (possible[0] == possible[1]).all():
            del possible[1]
        return [self._alternate(g, float(np.median(held[g]))) for g in possible]

    def _error(self, model: Model) -> float:
        """Weighted error of the predictions, each error capped so that one point cannot decide."""
        ttft, tpot, _ = predict(model, self.load)
        off = np.minimum(np.abs(tpot / self.tpot - 1.0), 1.0)
        late = np.minimum(np.abs(np.log(np.maximum(ttft, 1e-12) / self.ttft)), 1.0)
        bounded = model.capacity < np.inf and self.options.kv_capacity is None
        return float(self.weights @ (off + self.options.ttft_weight * late)) * (GAIN if bounded else 1.0)

    def _alternate(self, waiting: Bools, capacity: float) -> Model:
        """Step time and harness in turn, then both together by linear programs around where they are."""
        trust, hidden = self._trust(waiting), np.zeros(len(self.load), dtype=bool)
        start = Harness() if self.load.static else Harness(burst=BURST)
        point = np.append(self._step_time(start, hidden, trust), START)
        if not self.load.static:
            point[FIXED:] = self._harness(point, hidden, trust)
        least, best = self._objective(point, hidden, trust), point
        for _ in range(self.options.rounds):
            hidden = hides(self.load, best[:FIXED], self.budget)
            target = self._both(best, hidden, trust)
            tries = [best + length * (target - best) for length in LENGTHS]
            errors = [self._objective(at, hidden, trust) for at in tries]
            error = min(errors)
            if error < least:
                best = tries[errors.index(error)]
            if error > least * (1.0 - FALL):
                break
            least = error
        return Model(best[:FIXED], _harness_of(best), capacity, self.budget)

    def _trust(self, waiting: Bools) -> Floats:
        """Weights (n,) of the errors of TTFT."""
        if self.load.static:
            # a static batch prefills in one step: alike for all outputs, no step of a pool with a smaller budget, and
            # weighted by its tokens, as a launch takes longer than a convex function can say of a small prefill
            tokens = self.load.concurrency * self.load.prompt
            alike = (tokens[:, None] == tokens) & (self.load.prompt[:, None] == self.load.prompt)
            counted = tokens * (tokens <= self.options.token_budget) / alike.sum(axis=1)
            return np.asarray(self.weights * counted / max(float(counted.mean()), 1e-300))
        return self.options.ttft_weight * np.where(waiting, 0.0, self.weights)

    def _rows(self, harness: Harness, hidden: Bools) -> tuple[Floats, Floats]:
        """Rows (n, 6) of TPOT and of TTFT, which are linear in the step time's parameters with the harness given."""
        seen = tpot_rows(self.load, self.share, self.budget, hidden)
        own = ttft_rows(self.load, self.share, self.budget, hidden)
        if self.load.static:
            return seen, own
        prompts = harness.together - 1.0 + harness.burst * self.load.others
        return seen, np.asarray(own + harness.steps * seen + prompts[:, None] * work(self.load))

    def _slopes(self, point: Floats, hidden: Bools) -> Floats:
        """What TTFT changes with each number of the harness, with the step time given, (n, 4)."""
        if self.load.static:
            return np.zeros((len(self.load), 4))
        seen = tpot_rows(self.load, self.share, self.budget, hidden) @ point[:FIXED]
        prompt = work(self.load) @ point[:FIXED]
        return np.column_stack([np.ones(len(seen)), seen, prompt, self.load.others * prompt])

    def _step_time(self, harness: Harness, hidden: Bools, trust: Floats) -> Floats:
        """Parameters (6,) that are best with the harness given, but for its fixed part."""
        tpot, ttft = self._rows(harness, hidden)
        slopes = self._slopes(np.zeros(FIXED), hidden)[:, :1]
        return self._solve(tpot, ttft, slopes, self.ttft, trust)[:FIXED]

    def _harness(self, point: Floats, hidden: Bools, trust: Floats) -> Floats:
        """Numbers of the harness (4,) that are best with the step time given."""
        own = self._rows(Harness(), hidden)[1] @ point[:FIXED]
        rows = np.vstack([self._slopes(point, hidden), SHY])
        target, scale = np.append(self.ttft - own, 0.0), np.append(self.ttft, 1.0)
        return self._least(rows, target, scale, np.append(trust, self._shy), None)

    def _both(self, point: Floats, hidden: Bools, trust: Floats) -> Floats:
        """Parameters and harness (10,) that are best to first order around `point`."""
        tpot, ttft = self._rows(_harness_of(point), hidden)
        slopes = self._slopes(point, hidden)
        return self._solve(tpot, ttft, slopes, self.ttft + slopes[:, 1:] @ point[FIXED + 1 :], trust)

    def _solve(self, tpot: Floats, ttft: Floats, slopes: Floats, target: Floats, trust: Floats) -> Floats:
        """Parameters, then numbers of the harness, for tpot @ x = TPOT and ttft @ x + slopes @ h = target."""
        n, kept = len(self.load), slopes.shape[1]
        matrix = np.block([[tpot, np.zeros((n, kept))], [ttft, slopes]])
        seconds, target = np.concatenate([self.tpot, self.ttft]), np.concatenate([self.tpot, target])
        weights = np.concatenate([self.weights, trust])
        target = target - matrix @ np.append(self.lower, np.zeros(kept))
        if self.options.pairs is not None:
            matrix[:, PAIRS] = 0.0
        if kept == len(START):
            shy = np.concatenate([np.zeros(FIXED), SHY])
            matrix, target = np.vstack([matrix, shy]), np.append(target, 0.0)
            seconds, weights = np.append(seconds, 1.0), np.append(weights, self._shy)
        found = self._least(matrix, target, seconds, weights, float(self.lower[BASE]))
        return found + np.append(self.lower, np.zeros(kept))

    def _objective(self, point: Floats, hidden: Bools, trust: Floats) -> float:
        """What the programs minimise: weighted relative errors, and a little for each prompt prefilled together."""
        tpot, ttft = self._rows(_harness_of(point), hidden)
        off = np.abs(tpot @ point[:FIXED] / self.tpot - 1.0)
        late = np.abs((ttft @ point[:FIXED] + point[FIXED]) / self.ttft - 1.0)
        return float(self.weights @ off + trust @ late + self._shy * point[FIXED + 2])

    @property
    def _shy(self) -> float:
        """Weight of each prompt more than one that is said to be prefilled at once."""
        return max(self.options.together_penalty * self.options.ttft_weight * float(self.weights.sum()), 1e-9)

    def _least(self, matrix: Floats, target: Floats, scale: Floats, weights: Floats, hideable: float | None) -> Floats:
        """Non-negative x with the least weighted sum of |matrix x - target| / scale.

        With `hideable`, x is what parameters are above their lower bounds, and no more than the base can be hidden.
        """
        order = None if hideable is None else (BASE, HIDDEN, hideable)
        found, self.status = least_absolute(matrix / scale[:, None], target / scale, weights, order, self.options.solve)
        self.solves += 1
        return found


def physical_floor(floor: Floor) -> Piece:
    """The least coefficients that make a fit as slow as the peaks at every step (see `llmopt.machines.floor`)."""
    most = floor.step_time.coefficients.max(axis=0)
    return Piece(name="floor", **dict(zip(FEATURES, most.tolist(), strict=True)))


def _lower(options: BenchOptions) -> Floats:
    """Lower bounds of the parameters (6,); that of `pairs` is its value where it is known."""
    floor = options.floor or Piece()
    bounds = {name: getattr(floor, name, 0.0) for name in PARAMETERS}
    if options.pairs is not None:
        bounds["pairs"] = options.pairs
    return np.array(list(bounds.values()))


def _harness_of(point: Floats) -> Harness:
    fixed, steps, more, burst = point[FIXED:].tolist()
    return Harness(fixed, steps, 1.0 + more, burst)


def least_absolute(
    matrix: Floats, target: Floats, weights: Floats, ordered: tuple[int, int, float] | None, options: SolveOptions
) -> tuple[Floats, str]:
    """Non-negative x (m,) that minimises sum_i weights_i |matrix_i x - target_i|, and the status of the program.

    Columns are scaled to explain the target alone, so that the program is well conditioned; empty columns get 0.
    `ordered` = (i, j, slack) demands x_i + slack >= x_j.
    """
    import cvxpy as cp

    from llmopt.solve import solve

    used = weights > 0
    weights = weights / weights.sum()
    scale = weights @ np.abs(matrix)
    known = np.flatnonzero(scale > 0)
    x = cp.Variable(len(known), name="coefficients")
    shares = weights[used, None] * matrix[np.ix_(used, known)] / scale[known]
    demands: list[Any] = [x >= 0]
    if ordered is not None and set(ordered[:2]) <= set(known.tolist()):
        i, j = (int(np.flatnonzero(known == k)[0]) for k in ordered[:2])
        demands.append(x[i] / scale[ordered[0]] + ordered[2] >= x[j] / scale[ordered[1]])
    solved = solve(cp.Problem(cp.Minimize(cp.norm1(shares @ x - weights[used] * target[used])), demands), options)
    found = np.zeros(matrix.shape[1])
    found[known] = np.maximum(np.asarray(x.value), 0.0) / scale[known]
    return found, solved.label
