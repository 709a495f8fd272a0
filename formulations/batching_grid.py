"""The time-indexed relaxation on a grid that stays small: starts of kinds of requests in blocks of rounds.

Made to order a queue within a fraction of a second, not to bound anything: what bounds is in batching_bounds.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from formulations.batching_bounds import round_down
from llmopt.arrays import Floats, Ints
from llmopt.policy import solved
from llmopt.rounds import Rounds
from llmopt.solution import SolveOptions

LADDERS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
SLACK = 1.25  # of the horizon over the time that the memory needs if it is always full


@dataclass(frozen=True)
class GridRelaxation:
    """min sum_kb b D y_kb over (B24) (B25) (B26), arrivals ignored; D = 1 and one kind a request give (B5) (B6).

    blocks: most blocks of the grid; kinds: most kinds of requests, which are alike up to a factor.
    """

    blocks: int = 60
    kinds: int = 150
    name: str = "grid-relaxation"

    def build(self, instance: Rounds, taken: Floats | None = None) -> Any:
        """A CVXPY problem over y_kb; `taken`, shape (rounds,), are tokens that others hold in rounds 1, 2, ..."""
        import cvxpy as cp

        grid = self.grid(instance, taken)
        y = cp.Variable((len(grid.count), grid.blocks + 1), nonneg=True, name="y")
        cost = np.append(np.arange(grid.blocks), 2 * grid.blocks) * grid.step
        rows = [
            (cp.sum(y, axis=1) == grid.count).set_label("served"),
            (grid.area @ cp.vec(y[:, :-1], order="C") <= grid.room).set_label("memory"),
        ]
        problem: Any = cp.Problem(cp.Minimize(cp.sum(y @ cost)), rows)
        problem.name = self.name
        return problem

    def grid(self, instance: Rounds, taken: Floats | None = None) -> Grid:
        """Blocks, kinds and memory rows of an instance."""
        cls, kind = kinds(instance, self.kinds)
        needed = instance.volume.sum() / instance.capacity + (0 if taken is None else taken.sum() / instance.capacity)
        rounds = min(int(SLACK * needed + 2 * instance.output.max()), _sum(instance, taken)) + 1
        step = -(-rounds // self.blocks)
        blocks = -(-rounds // step)
        room = np.full(blocks, float(step * instance.capacity))
        if taken is not None:
            held = np.zeros(blocks * step)
            held[: min(len(taken), len(held))] = taken[: len(held)]
            room = np.maximum(room - held.reshape(blocks, step).sum(axis=1), 0.0)
        return Grid(cls, np.bincount(cls).astype(float), step, blocks, _area(kind, step, blocks), room)


@dataclass(frozen=True, eq=False)
class Grid:
    """cls: kind of each request (n,); count (n_kinds,); step: D in rounds; blocks: their number; area: token-rounds of
    a block that a start uses, sparse (blocks, n_kinds x blocks); room: token-rounds of each block (blocks,).
    """

    cls: Ints
    count: Floats
    step: int
    blocks: int
    area: Any
    room: Floats


def mean_starts(relaxation: GridRelaxation, instance: Rounds, taken: Floats | None = None) -> Floats:
    """Mean start of each request in the relaxation, in rounds, shape (n,)."""
    if not len(instance):
        return np.zeros(0)
    problem = relaxation.build(instance, taken)
    solved(problem, SolveOptions(time_limit=20.0))
    y = np.asarray(problem.variables()[0].value)
    grid = relaxation.grid(instance, taken)
    mean = y @ np.append(np.arange(grid.blocks), 2 * grid.blocks) * grid.step / grid.count
    return np.asarray(mean[grid.cls])


def kinds(instance: Rounds, most: int) -> tuple[Ints, Floats]:
    """Kind of each request (n,), and mean (prompt, output) of each kind (n_kinds, 2); no more than `most` kinds.

    Requests are of a kind if prompts and outputs are equal or, where that gives too many, lie between the same powers
    of the smallest factor that does not.
    """
    pairs = np.stack([instance.prompt, instance.output], axis=1)
    cls = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    for ladder in LADDERS:
        if cls.max(initial=0) < most:
            break
        cls = round_down(instance, ladder, 1)[0]
    count = np.bincount(cls)
    return cls, np.stack([np.bincount(cls, weights=pairs[:, k]) / count for k in (0, 1)], axis=1)


def _area(kind: Floats, step: int, blocks: int) -> Any:
    """V_k((K - b + 1) D) - V_k((K - b) D) for starts at the beginning of b; sparse (blocks, n_kinds x blocks)."""
    from scipy import sparse

    age = np.minimum(np.arange(blocks + 1)[None, :] * step, kind[:, 1:])
    used = np.diff(kind[:, :1] * age + age * (age + 1) / 2, axis=1)
    k, later = np.nonzero(used)
    copies = blocks - later
    begin = np.concatenate([np.arange(c) for c in copies])
    k, later = np.repeat(k, copies), np.repeat(later, copies)
    entries = (used[k, later], (begin + later, k * blocks + begin))
    return sparse.csr_array(entries, shape=(blocks, len(kind) * blocks))


def _sum(instance: Rounds, taken: Floats | None) -> int:
    """Rounds after which everything is done, one request after the other."""
    return int(instance.output.sum()) + (0 if taken is None else len(taken))
