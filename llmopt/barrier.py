"""The cycle with a barrier: every layer waits for the fullest of x Attention workers.

The micro-batch m of worker j holds T_mj KV tokens, those of B slots, and all T_mj are independent. Their law is either
normal, N(B theta, B nu^2), or exact: that of B slots in steady state (`llmopt.slot_law`). Loads change little from
layer to layer, and while they stay the M micro-batches go round once in exactly

    max{ max_j sum_m A'_mj,  M F',  max_mj A_mj + F + 2 C },

with A' = A + C or F' = F + C for devices occupied while they send; for equal loads this is the law of `Bundle.lines`.
A worker attends one micro-batch after the other, an FFN server likewise, and each micro-batch waits for its own slowest
worker. A cycle is an M-th of that, so that Attention workers are slowed by the fullest of x means of M loads, and the
pipeline by the fullest of M x loads. In an ideal pipeline a cycle lasts max{max_j A_j, C, F}.

A stage that is convex piecewise-linear in its load, max_i (c_i + s_i T), is at most u where T <= t(u) =
min_i (u - c_i) / s_i; with the largest of n of them, each of distribution function H,

    E[tau] = G + int_G^inf (1 - product over stages of H(t(u))^n) du,   G: the longest stage without KV load.

The maximum stays inside the expectation: E[max{A, F}] exceeds max{E[A], F}, which exceeds the mean field. With normal
loads in an ideal pipeline this is the Gaussian rule of v2 to v4 of Song et al., arXiv 2601.21351. In the others the
fullest mean and the fullest load are taken as independent, which is safe: being positively correlated they exceed a
level together more often, hence one of them less often, than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.ratio import Row, rows_at, throughput
from llmopt.slot_law import LoadLaw, SlotLaw
from llmopt.slots import SlotLoad

FAR = 12.0
"""Beyond FAR standard deviations a normal is neglected: the probability is 2e-33."""
NODES = 128
"""Nodes of an integral over at most FAR standard deviations, enough for an error of 1e-13 of them up to 2048 loads."""


@dataclass(frozen=True)
class Normal:
    """Normal KV tokens of this mean and standard deviation `spread`.

    nodes: of a Gauss-Legendre rule between two `points`, to integrate functions of the distribution.
    """

    mean: float
    spread: float
    nodes: int = NODES

    @property
    def points(self) -> Floats:
        """Mean and FAR standard deviations around it."""
        return self.mean + self.spread * np.array([-FAR, 0.0, FAR])

    def log_cdf(self, tokens: Floats) -> Floats:
        """Log-probability of at most `tokens`."""
        return _log_phi((tokens - self.mean) / self.spread)


Loads = Normal | LoadLaw
"""Law of the KV tokens of a worker: no mass below its first point, none above its last."""


class Stage(NamedTuple):
    """A stage that lasts max_i (c_i + s_i T) s, for the largest T of `workers` loads.

    c, s: arrays of shape (n_pieces,), in s and s per KV token; every s > 0.
    """

    c: Floats
    s: Floats
    loads: Loads
    workers: int

    def at(self, tokens: Floats) -> Floats:
        """Seconds at KV tokens of shape (n,)."""
        return np.asarray((self.c[:, None] + self.s[:, None] * tokens).max(axis=0))

    def log_below(self, seconds: Floats) -> Floats:
        """Log-probability that the stage lasts at most `seconds`, of any shape (n,)."""
        tokens = ((seconds - self.c[:, None]) / self.s[:, None]).min(axis=0)
        return self.workers * self.loads.log_cdf(tokens)

    def cuts(self) -> Floats:
        """Seconds between which the distribution is smooth."""
        points = self.loads.points
        i, j = np.triu_indices(len(self.c), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            kinks = (self.c[i] - self.c[j]) / (self.s[j] - self.s[i])
        return self.at(np.append(points, kinks[(kinks > points[0]) & (kinks < points[-1])]))


def expected_largest(n: int) -> float:
    """Mean of the largest of n independent standard normals, kappa_n.

    Raises
    ------
    ScenarioError
        If n is not a whole number of at least 1.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ScenarioError(f"the largest of {n!r} loads is not defined; give a whole number of at least 1")
    return _kappa(int(n))


def barrier_cycle(bundle: Bundle, load: SlotLoad, workers: int, servers: int = 1, law: SlotLaw | None = None) -> float:
    """Mean seconds of a cycle with `workers` Attention workers, the fullest of which decide, and `servers` servers.

    law: of a slot, whose exact sums are then the loads; without it they are normal, by `load`. A stage of several
    Attention pieces is applied to the mean of a worker's loads. A measured FFN table is used as it is.
    """
    m = bundle.micro_batches
    averaged = 1 if bundle.pipeline == "ideal" else m
    stages = {"attention": (averaged, workers), "pipeline": (1, m * workers)}
    return _expected(rows_at(bundle, workers / servers), stages, bundle, load, law)


def mean_attention(bundle: Bundle, load: SlotLoad, law: SlotLaw | None = None) -> float:
    """Mean seconds of one Attention worker's stage in a layer, over its load: the time it computes in a cycle.

    law: as in `barrier_cycle`.
    """
    pieces = StepTime.from_pieces(bundle.attention).coefficients
    rows = [Row("attention", float(p[0] + p[2] * bundle.batch), 0.0, float(p[3])) for p in pieces]
    return _expected(rows, {"attention": (1, 1)}, bundle, load, law)


def best_barrier(bundle: Bundle, load: SlotLoad, most: int, servers: int = 1, law: SlotLaw | None = None) -> int:
    """The number of Attention workers, 1 to `most`, of largest throughput by `barrier_cycle`; of ties the smallest."""
    made = [throughput(bundle, barrier_cycle(bundle, load, x, servers, law), x, servers) for x in range(1, most + 1)]
    return int(np.argmax(np.array(made) >= max(made) * (1 - 1e-12))) + 1


def imbalance(bundle: Bundle, load: SlotLoad, workers: int, law: SlotLaw | None = None) -> float:
    """By what fraction the fullest of `workers` micro-batches' KV tokens exceed the mean one's, on average.

    law: as in `barrier_cycle`.
    """
    if law is None:
        return expected_largest(workers) * load.deviation / (math.sqrt(bundle.batch) * load.theta)
    tokens = Stage(np.zeros(1), np.ones(1), law.sums(bundle.batch), workers)
    return _largest(0.0, [tokens]) / (bundle.batch * law.mean) - 1


def _expected(
    rows: Sequence[Row], waits: dict[str, tuple[int, int]], bundle: Bundle, load: SlotLoad, law: SlotLaw | None
) -> float:
    """E[max of the rows] in s; waits: by stage, how many loads are averaged, and of how many such means the fullest."""
    low = max((row.constant for row in rows if row.per_kv == 0), default=-math.inf)
    stages = []
    for name, (averaged, count) in waits.items():
        mine = np.array([(r.constant, r.per_kv) for r in rows if r.stage == name and r.per_kv > 0])
        if len(mine):
            stages.append(Stage(mine[:, 0], mine[:, 1], _loads(bundle.batch, averaged, load, law), count))
    return _largest(low, stages)


def _loads(batch: int, averaged: int, load: SlotLoad, law: SlotLaw | None) -> Loads:
    """Law of the mean of `averaged` micro-batches' KV tokens."""
    if law is None:
        return Normal(batch * load.theta, math.sqrt(batch / averaged) * load.deviation)
    return law.sums(averaged * batch).shared(averaged)


def _largest(low: float, stages: Sequence[Stage]) -> float:
    """E[max(low, stages)] in s."""
    if not stages:
        return low
    cuts = [stage.cuts() for stage in stages]
    low = max(low, *(float(c.min()) for c in cuts))
    inner = np.unique(np.concatenate([[low], *cuts]))
    u, weight = _nodes(inner[inner >= low], max(stage.loads.nodes for stage in stages))
    return low + float(weight @ -np.expm1(sum(stage.log_below(u) for stage in stages)))


@lru_cache(maxsize=4096)
def _kappa(n: int) -> float:
    """int_0^inf (1 - Phi(u)^n - Phi(-u)^n) du."""
    u, weight = _nodes(np.array([0.0, FAR]), NODES)
    return float(weight @ (-np.expm1(n * _log_phi(u)) - np.exp(n * _log_phi(-u))))


def _log_phi(z: Floats) -> Floats:
    from scipy.special import log_ndtr

    return np.asarray(log_ndtr(z))


def _nodes(cuts: Floats, many: int) -> tuple[Floats, Floats]:
    """`many` Gauss-Legendre nodes and weights between each two of the increasing `cuts`, arrays of shape (n,)."""
    x, weight = _legendre(many)
    half = np.diff(cuts)[:, None] / 2
    return (cuts[:-1, None] + half * (x + 1)).ravel(), (half * weight).ravel()


@lru_cache(maxsize=2)
def _legendre(many: int) -> tuple[Floats, Floats]:
    x, weight = np.polynomial.legendre.leggauss(many)
    return x, weight
