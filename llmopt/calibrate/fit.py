"""Max-affine step time from measured steps: a convex fit, alternated with the choice of the piece for each step.

For measured steps x_i = (1, P, D, K, Q) of y_i seconds and weights w_i that sum to 1, the fit looks for non-negative
coefficient vectors c_1, ..., c_m that minimise the mean relative error

    E(c) = Σ_i w_i | max_j c_j·x_i − y_i | / y_i.                                                              (1)

E is not convex where a step is predicted too short. With a piece a(i) named for every step, that part is bounded by
y_i − c_a(i)·x_i, and

    V(c, a) = Σ_i w_i max( max_j c_j·x_i − y_i,  y_i − c_a(i)·x_i ) / y_i                                      (2)

is a linear program in c. V(c, a) ≥ E(c), with equality where a names the largest piece of every step.

The alternation "solve (2) for c, then let a name the largest pieces" never raises E. Let a name the largest pieces of
c, and c' be optimal in (2) for a: then E(c') ≤ V(c', a) ≤ V(c, a) = E(c). There are finitely many assignments, so it
ends, in a local optimum; so it is started from several assignments. Pieces are added one at a time by splitting the
steps of one that is there; the model with a copy of a piece has the same E, so a piece more never raises it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.hardware import FEATURES, Piece, StepTime
from llmopt.model import InputModel
from llmopt.solution import SolveOptions

PREFILL, PAIRS = FEATURES.index("prefill"), FEATURES.index("pairs")


class FitOptions(InputModel):
    """Effort of a fit.

    rounds: most linear programs from one start; tolerance: relative fall of the error below which a round is the last;
    thin: number of steps, drawn at random, on which starts are compared, before the best goes on with all of them;
    kicks: how often every piece in turn is given up for the split of another one, at the end; random_starts: splits by
    random directions tried besides the others; seed: of all that is random; solve: effort of a linear program.
    """

    rounds: Annotated[int, Field(ge=1, le=1000)] = 40
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    thin: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    kicks: Annotated[int, Field(ge=0, le=100)] = 1
    random_starts: Annotated[int, Field(ge=0, le=1000)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    solve: SolveOptions = SolveOptions()


DEFAULT_FIT = FitOptions()


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted step time and what it was fitted to.

    pieces: the fitted pieces, those that are largest in no step left out; features (n, 4), seconds (n,),
    weights (n,): the steps, weights summing to 1; error: weighted mean relative error (1), the best found, which is a
    local optimum; path: error by number of pieces as they were added, as (decode pieces, mixed pieces, error); status:
    label of the last linear program, which is (2) at the end; solves: linear programs solved; spent: wall-clock s.
    """

    pieces: tuple[Piece, ...]
    features: Floats
    seconds: Floats
    weights: Floats
    error: float
    path: tuple[tuple[int, int, float], ...]
    status: str
    solves: int
    spent: float

    @cached_property
    def step_time(self) -> StepTime:
        """The fitted pieces as arrays."""
        return StepTime.from_pieces(self.pieces)

    @property
    def relative(self) -> Floats:
        """Signed relative error (n,) of each step: predicted over measured, less 1."""
        return np.asarray(self.step_time.many(self.features) / self.seconds - 1.0)


def fit_step_time(
    features: Floats,
    seconds: Floats,
    *,
    decode_pieces: int = 1,
    mixed_pieces: int = 2,
    weights: Floats | None = None,
    options: FitOptions = DEFAULT_FIT,
) -> Fit:
    """The max-affine step time with the smallest weighted mean relative error that the search finds.

    Parameters
    ----------
    features
        Measured steps, shape (n, 4): prefill tokens, decode sequences, KV tokens read, prefill attention pairs.
    seconds
        Their measured times (n,), s.
    decode_pieces
        Pieces without prefill terms, p = q = 0.
    mixed_pieces
        Pieces with all five terms. The maximum of all pieces is the step time everywhere.
    weights
        Weight of each step (n,), equal if absent; they are normalised.
    options
        Effort of the search.

    Raises
    ------
    ScenarioError
        If the arrays do not fit together or hold a number that no step has.
    SolveError
        If a linear program ends without an answer.
    """
    if min(decode_pieces, mixed_pieces) < 0 or decode_pieces + mixed_pieces < 1:
        raise ScenarioError(f"{decode_pieces} decode and {mixed_pieces} mixed pieces make no step time; ask for one")
    start = perf_counter()
    search = _Search(_samples(features, seconds, weights), options)
    best = search.grow(decode_pieces, mixed_pieces)
    used = best.used(search.whole)
    pieces = tuple(_pieces(best.coefficients[used] / search.whole.scale))
    data = search.whole
    return Fit(
        pieces=pieces,
        features=np.asarray(features, dtype=float),
        seconds=data.seconds,
        weights=data.weights,
        error=float(data.weights @ np.abs(StepTime.from_pieces(pieces).many(data.raw) / data.seconds - 1.0)),
        path=tuple(search.path),
        status=search.status,
        solves=search.solves,
        spent=perf_counter() - start,
    )


@dataclass(frozen=True, eq=False)
class _Samples:
    """Steps as the program sees them: `shares` (n, 5) are features over seconds, each column over its `scale` (5,).

    A coefficient in these units is about the part of the time that it explains, so that the program is well
    conditioned. `known` (5,) marks columns with any entry; the others have no coefficient to estimate.
    """

    raw: Floats
    seconds: Floats
    weights: Floats
    shares: Floats
    scale: Floats
    known: Bools

    def some(self, chosen: Ints) -> _Samples:
        """The steps with these indices, in the same units."""
        weights = self.weights[chosen]
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(chosen), 1.0 / len(chosen))
        return _Samples(self.raw[chosen], self.seconds[chosen], weights, self.shares[chosen], self.scale, self.known)


@dataclass(frozen=True, eq=False)
class _Model:
    """Coefficients (m, 5) in scaled units, which pieces are decode pieces (m,), and the error (1)."""

    coefficients: Floats
    decode: Bools
    error: float

    def values(self, samples: _Samples) -> Floats:
        """Predicted over measured seconds of every piece, shape (n, m)."""
        return np.asarray(samples.shares @ self.coefficients.T)

    def used(self, samples: _Samples) -> Ints:
        """Indices of the pieces that are the largest in some step."""
        return np.unique(self.values(samples).argmax(axis=1))


class _Search:
    """Alternation from several starts, with a growing number of pieces."""

    def __init__(self, samples: _Samples, options: FitOptions) -> None:
        self.whole, self.options = samples, options
        self.random = np.random.default_rng(options.seed)
        self.thin = samples.some(np.sort(self.random.permutation(len(samples.seconds))[: options.thin]))
        self.path: list[tuple[int, int, float]] = []
        self.status, self.solves = "", 0

    def grow(self, decode_pieces: int, mixed_pieces: int) -> _Model:
        """The best model found with these numbers of pieces."""
        decode = np.arange(min(decode_pieces, 1) + min(mixed_pieces, 1)) < min(decode_pieces, 1)
        found, before = self._best(self._first(decode), decode), None
        while len(decode) < decode_pieces + mixed_pieces:
            before = self._kept(found, before)
            kind = bool(decode.sum() < decode_pieces) and not (decode.sum() >= (~decode).sum() < mixed_pieces)
            decode = np.append(decode, kind)
            found, before = self._best(self._splits(before), decode), _with_copy(before, kind)
        return self._kept(self._kicked(found), before)

    def _kept(self, found: _Model, before: _Model | None) -> _Model:
        """The model found on the thinned steps, polished on all; or the one before, if that is better there."""
        polished = self._alternate(self.whole, found.values(self.whole).argmax(axis=1), found.decode)
        best = polished if before is None or polished.error < before.error else before
        self.path.append((int(best.decode.sum()), int((~best.decode).sum()), best.error))
        return best

    def _first(self, decode: Bools) -> Iterator[Ints]:
        """Steps without prefill to the decode piece if there is one, and those with much prefill to the mixed piece."""
        prefill = self.thin.raw[:, 0]
        mixed = prefill[prefill > 0]
        for share in (0.0, 0.25, 0.5, 0.75) if len(decode) > 1 and len(mixed) else (0.0,):
            least = np.quantile(mixed, share) if len(mixed) else 0.0
            yield np.where((prefill > 0) & (prefill >= least), len(decode) - 1, 0)

    def _splits(self, model: _Model) -> Iterator[Ints]:
        """The largest pieces of `model`, where a new piece takes over half of the steps of one, or its worst."""
        values = model.values(self.thin)
        largest, new = values.argmax(axis=1), len(model.decode)
        gap = 1.0 - values.max(axis=1)
        tokens, kv = self.thin.raw[:, :2].sum(axis=1), self.thin.raw[:, 2]
        for j in np.unique(largest).tolist():
            mine = largest == j
            yield np.where(mine & (gap > 0.5 * gap[mine].max()), new, largest)
            for score in (gap, tokens, kv, self.thin.seconds, *self._random_scores()):
                yield np.where(mine & (score > np.median(score[mine])), new, largest)

    def _kicked(self, model: _Model) -> _Model:
        """`model`, or a better one reached by giving up one of its pieces and splitting another instead."""
        for _ in range(self.options.kicks if len(model.decode) > 1 else 0):
            last = model
            for j in range(len(last.decode)):
                rest = _Model(np.delete(last.coefficients, j, 0), np.delete(last.decode, j), last.error)
                decode = np.append(rest.decode, last.decode[j])
                model = min(model, self._best(self._splits(rest), decode), key=lambda m: m.error)
            if model is last:
                break
        return model

    def _random_scores(self) -> list[Floats]:
        shares = np.log1p(self.thin.shares)
        return [shares @ self.random.standard_normal(5) for _ in range(self.options.random_starts)]

    def _best(self, starts: Iterator[Ints], decode: Bools) -> _Model:
        return min((self._alternate(self.thin, a, decode) for a in starts), key=lambda m: m.error)

    def _alternate(self, samples: _Samples, assigned: Ints, decode: Bools) -> _Model:
        best, last = None, np.inf
        for _ in range(self.options.rounds):
            model = self._solve(samples, assigned, decode)
            best = model if best is None or model.error < best.error else best
            if model.error >= last * (1.0 - self.options.tolerance):
                break
            last, assigned = model.error, model.values(samples).argmax(axis=1)
        assert best is not None
        return best

    def _solve(self, samples: _Samples, assigned: Ints, decode: Bools) -> _Model:
        coefficients, self.status = solve_assigned(samples, assigned, decode, self.options.solve)
        self.solves += 1
        top = (samples.shares @ coefficients.T).max(axis=1)
        return _Model(coefficients, decode, float(samples.weights @ np.abs(top - 1.0)))


def solve_assigned(samples: _Samples, assigned: Ints, decode: Bools, options: SolveOptions) -> tuple[Floats, str]:
    """Coefficients (m, 5) that minimise (2) for an assignment (n,), and the status of the linear program."""
    import cvxpy as cp

    from llmopt.solve import solve

    free = np.repeat(samples.known[None], len(decode), axis=0)
    free[decode, PREFILL] = free[decode, PAIRS] = False
    # steps by pieces by free coefficients: what each coefficient adds to the piece at the step
    terms = samples.shares[:, None, None, :] * np.eye(len(decode))[None, :, :, None]
    terms = terms[:, :, free]
    chosen = cp.Variable(int(free.sum()), nonneg=True, name="coefficients")
    error = cp.Variable(len(assigned), name="error")
    own = terms[np.arange(len(assigned)), assigned]
    above = [(terms[:, j] @ chosen - 1.0 <= error).set_label(f"piece {j} above") for j in range(len(decode))]
    below = (1.0 - own @ chosen <= error).set_label("assigned piece below")
    solved = solve(cp.Problem(cp.Minimize(samples.weights @ error), [*above, below]), options)
    coefficients = np.zeros(free.shape)
    coefficients[free] = np.maximum(np.asarray(chosen.value), 0.0)
    return coefficients, solved.label


def _with_copy(model: _Model, kind: bool) -> _Model:
    """The same step time with one more piece, a copy of one of its kind."""
    j = int(np.flatnonzero(model.decode == kind)[0])
    return _Model(np.vstack([model.coefficients, model.coefficients[j]]), np.append(model.decode, kind), model.error)


def _pieces(coefficients: Floats) -> Iterator[Piece]:
    """Pieces by name, those without prefill terms first, each kind by its time per step."""
    decode = (coefficients[:, [PREFILL, PAIRS]] == 0).all(axis=1)
    for kind, name in ((True, "decode"), (False, "mixed")):
        rows = coefficients[decode == kind]
        rows = rows[np.argsort(-rows[:, 0], kind="stable")]
        for i, row in enumerate(rows.tolist(), 1):
            yield _piece(f"{name} {i}" if len(rows) > 1 else name, row)


def _piece(name: str, row: list[float]) -> Piece:
    try:
        return Piece(name=name, **dict(zip(FEATURES, row, strict=True)))
    except ValidationError:
        raise ScenarioError(
            f"the fitted {name} piece has {max(row[1:]):.3g} s a token and {row[0]:.3g} s a step; give times in seconds"
        ) from None


def _samples(features: Any, seconds: Any, weights: Any) -> _Samples:
    raw, time = np.asarray(features, dtype=float), np.asarray(seconds, dtype=float)
    weight = np.ones(len(time)) if weights is None else np.asarray(weights, dtype=float)
    _check(raw, time, weight)
    shares = np.column_stack([np.ones(len(raw)), raw]) / time[:, None]
    weight = weight / weight.sum()
    scale = weight @ shares
    known = scale > 0
    scale = np.where(known, scale, 1.0)
    return _Samples(raw, time, weight, shares / scale, scale, known)


def _check(raw: Floats, time: Floats, weight: Floats) -> None:
    if raw.ndim != 2 or raw.shape[1] != 4 or len(raw) != len(time) or time.ndim != 1 or weight.shape != time.shape:
        raise ScenarioError(
            f"steps of shape {raw.shape}, {time.shape} seconds and {weight.shape} weights do not fit together; "
            "give (n, 4) features, (n,) seconds and (n,) weights"
        )
    if len(time) == 0:
        raise ScenarioError("there are no steps to fit; give at least one")
    for name, bad in (
        ("time", ~(np.isfinite(time) & (time > 0))),
        ("feature", ~(np.isfinite(raw) & (raw >= 0)).all(axis=1)),
        ("weight", ~(np.isfinite(weight) & (weight >= 0))),
    ):
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ScenarioError(f"step {i} has an impossible {name} ({raw[i].tolist()}, {time[i]:g} s, {weight[i]:g})")
    if weight.sum() <= 0:
        raise ScenarioError("all steps have weight 0; give one of them a positive weight")
