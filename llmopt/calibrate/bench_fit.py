"""The alternated convex fits behind `llmopt.calibrate.bench`: step time and harness in turn, each a linear program."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from llmopt.arrays import Bools, Floats
from llmopt.calibrate.bench_model import (
    BASE,
    HIDDEN,
    PAIRS,
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
"""Relative fall of the error below which a round of the alternation is the last."""


class BenchOptions(InputModel):
    """Assumptions and effort of a fit to benchmark points.

    token_budget: most prefill tokens of a step (8192 is the default of vLLM on data-centre GPUs, SGLang and
    TensorRT-LLM); kv_capacity: KV tokens of a replica (of an attention data-parallel rank) if known, else found in the
    data; pairs: seconds per prefill attention pair if known; ttft_weight: weight of a relative error of TTFT, which
    depends on the harness, against one of TPOT; together_penalty: weight, per point, of each prompt more than one that
    the harness is said to prefill at once; rounds: most alternations; solve: effort of each linear program.
    """

    token_budget: Annotated[float, Field(gt=0)] = 8192.0
    kv_capacity: Annotated[float, Field(gt=0)] | None = None
    pairs: Annotated[float, Field(ge=0, le=1)] | None = None
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
        """Step time and harness in turn, until the error falls no further."""
        trust = self._trust(waiting)
        harness = Harness() if self.load.static else Harness(burst=0.05)
        hidden, best, least = np.zeros(len(self.load), dtype=bool), None, np.inf
        for _ in range(self.options.rounds):
            values, fixed = self._step_time(replace(harness, fixed=0.0), hidden, trust)
            harness = Harness(fixed=fixed) if self.load.static else self._harness(values, hidden, trust)
            error = self._rows_error(values, harness, hidden, trust)
            if error < least:
                best = Model(values, harness, capacity, self.budget)
            if error > least * (1.0 - FALL):
                break
            least = error
            hidden = hides(self.load, values, self.budget)
        assert best is not None
        return best

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

    def _ttft_rows(self, harness: Harness, hidden: Bools) -> Floats:
        own = ttft_rows(self.load, self.share, self.budget, hidden)
        if self.load.static:
            return own
        seen = tpot_rows(self.load, self.share, self.budget, hidden)
        prompts = harness.together - 1.0 + harness.burst * self.load.others
        return np.asarray(own + harness.steps * seen + prompts[:, None] * work(self.load))

    def _step_time(self, harness: Harness, hidden: Bools, trust: Floats) -> tuple[Floats, float]:
        """Parameters (6,) and the fixed part of TTFT that are best with the rest of the harness given."""
        n, static = len(self.load), self.load.static
        tpot = tpot_rows(self.load, self.share, self.budget, hidden)
        matrix = np.vstack([tpot, self._ttft_rows(harness, hidden)])
        fixed = np.concatenate([np.zeros(n), np.full(n, 0.0 if static else 1.0)])
        seconds = np.concatenate([self.tpot, self.ttft])
        weights = np.concatenate([self.weights, trust])
        known = 0.0 if self.options.pairs is None else self.options.pairs
        rest = seconds - known * matrix[:, PAIRS]
        if self.options.pairs is not None:
            matrix[:, PAIRS] = 0.0
        found = self._least(np.column_stack([matrix, fixed]), rest, seconds, weights, (BASE, HIDDEN))
        found[PAIRS] += known
        return found[:-1], float(found[-1])

    def _harness(self, values: Floats, hidden: Bools, trust: Floats) -> Harness:
        """The harness that is best with the step time given."""
        n = len(self.load)
        own = ttft_rows(self.load, self.share, self.budget, hidden) @ values
        seen = tpot_rows(self.load, self.share, self.budget, hidden) @ values
        prompt = work(self.load) @ values
        rows = np.column_stack([np.ones(n), seen, prompt, self.load.others * prompt])
        rows = np.vstack([rows, [0.0, 0.0, 1.0, 0.0]])
        target, scale = np.append(self.ttft - own, 0.0), np.append(self.ttft, 1.0)
        fixed, steps, more, burst = self._least(rows, target, scale, np.append(trust, self._shy), None).tolist()
        return Harness(fixed, steps, 1.0 + more, burst)

    @property
    def _shy(self) -> float:
        """Weight of each prompt more than one that is said to be prefilled at once."""
        return max(self.options.together_penalty * self.options.ttft_weight * float(self.weights.sum()), 1e-9)

    def _rows_error(self, values: Floats, harness: Harness, hidden: Bools, trust: Floats) -> float:
        """The objective of both programs at these parameters."""
        tpot = tpot_rows(self.load, self.share, self.budget, hidden) @ values
        ttft = self._ttft_rows(harness, hidden) @ values + harness.fixed
        off, late = np.abs(tpot / self.tpot - 1.0), np.abs(ttft / self.ttft - 1.0)
        return float(self.weights @ off + trust @ late + self._shy * (harness.together - 1.0))

    def _least(
        self, matrix: Floats, target: Floats, scale: Floats, weights: Floats, ordered: tuple[int, int] | None
    ) -> Floats:
        """Non-negative x with the least weighted sum of |matrix x - target| / scale; x[i] >= x[j] if `ordered`."""
        found, self.status = least_absolute(
            matrix / scale[:, None], target / scale, weights, ordered, self.options.solve
        )
        self.solves += 1
        return found


def least_absolute(
    matrix: Floats, target: Floats, weights: Floats, ordered: tuple[int, int] | None, options: SolveOptions
) -> tuple[Floats, str]:
    """Non-negative x (m,) that minimises sum_i weights_i |matrix_i x - target_i|, and the status of the program.

    Columns are scaled to explain the target alone, so that the program is well conditioned; empty columns get 0.
    `ordered` = (i, j) demands x_i >= x_j.
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
    if ordered is not None and set(ordered) <= set(known.tolist()):
        i, j = (int(np.flatnonzero(known == k)[0]) for k in ordered)
        demands.append(x[i] / scale[ordered[0]] >= x[j] / scale[ordered[1]])
    solved = solve(cp.Problem(cp.Minimize(cp.norm1(shares @ x - weights[used] * target[used])), demands), options)
    found = np.zeros(matrix.shape[1])
    found[known] = np.maximum(np.asarray(x.value), 0.0) / scale[known]
    return found, solved.label
