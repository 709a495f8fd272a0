"""The cycle with a barrier: every layer waits for the fullest of x Attention workers.

The micro-batch m of worker j holds the KV tokens of B slots, about normal and independent: T_mj ~ N(B theta, B nu^2).
They change little from layer to layer, and while they stay the M micro-batches go round once in exactly

    max{ max_j sum_m A'_mj,  M F',  max_mj A_mj + F + 2 C },

with A' = A + C or F' = F + C for devices occupied while they send; for equal loads this is the law of `Bundle.lines`.
A worker attends one micro-batch after the other, an FFN server likewise, and each micro-batch waits for its own slowest
worker. A cycle is an M-th of that, so that Attention workers are slowed by the fullest of x means of M loads, of
deviation sqrt(B / M) nu, and the pipeline by the fullest of M x loads. In an ideal pipeline a cycle lasts
max{max_j A_j, C, F}.

A stage that is convex piecewise-linear in its load, max_i (c_i + s_i z) for a standard normal z, is at most u where
z <= z(u) = min_i (u - c_i) / s_i; with the largest of n of them,

    E[tau] = G + int_G^inf (1 - product over stages of Phi(z(u))^n) du,   G: the longest stage without KV load.

The maximum stays inside the expectation: E[max{A, F}] exceeds max{E[A], F}, which exceeds the mean field. In an ideal
pipeline this is the Gaussian rule of v2 to v4 of Song et al., arXiv 2601.21351. In the others the fullest mean and the
fullest load are taken as independent, which is safe: being positively correlated they exceed a level together more
often, hence one of them less often, than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.ratio import Row, rows_at, throughput
from llmopt.slots import SlotLoad

FAR = 12.0
"""Beyond FAR standard deviations a normal is neglected: the probability is 2e-33."""
NODES = 128
"""Nodes of an integral over at most FAR standard deviations, enough for an error of 1e-13 of them up to 2048 loads."""


class Stage(NamedTuple):
    """A stage that lasts max_i (c_i + s_i z) s, for the largest z of `loads` standard normals.

    c, s: arrays of shape (n_pieces,), in s; every s > 0.
    """

    c: Floats
    s: Floats
    loads: int

    def at(self, z: float) -> float:
        """Seconds at z."""
        return float((self.c + self.s * z).max())

    def log_below(self, seconds: Floats) -> Floats:
        """Log-probability that the stage lasts at most `seconds`, of any shape (n,)."""
        z = ((seconds[:, None] - self.c) / self.s).min(axis=1)
        return self.loads * _log_phi(z)

    def cuts(self) -> list[float]:
        """Seconds between which the distribution is smooth and the normals are within FAR."""
        i, j = np.triu_indices(len(self.c), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            kinks = (self.c[i] - self.c[j]) / (self.s[j] - self.s[i])
        return [self.at(z) for z in (-FAR, 0.0, FAR, *kinks[np.abs(kinks) < FAR])]


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


def barrier_cycle(bundle: Bundle, load: SlotLoad, workers: int, servers: int = 1) -> float:
    """Mean seconds of a cycle with `workers` Attention workers, the fullest of which decide, and `servers` servers.

    A stage of several Attention pieces is applied to the mean of a worker's loads. A measured FFN table is used as it
    is.
    """
    m = bundle.micro_batches
    averaged = 1 if bundle.pipeline == "ideal" else m
    stages = {"attention": (averaged, workers), "pipeline": (1, m * workers)}
    return _expected(rows_at(bundle, workers / servers), stages, bundle, load)


def mean_attention(bundle: Bundle, load: SlotLoad) -> float:
    """Mean seconds of one Attention worker's stage in a layer, over its load: the time it computes in a cycle."""
    pieces = StepTime.from_pieces(bundle.attention).coefficients
    rows = [Row("attention", float(p[0] + p[2] * bundle.batch), 0.0, float(p[3])) for p in pieces]
    return _expected(rows, {"attention": (1, 1)}, bundle, load)


def best_barrier(bundle: Bundle, load: SlotLoad, most: int, servers: int = 1) -> int:
    """The number of Attention workers, 1 to `most`, of largest throughput by `barrier_cycle`; of ties the smallest."""
    made = [throughput(bundle, barrier_cycle(bundle, load, x, servers), x, servers) for x in range(1, most + 1)]
    return int(np.argmax(np.array(made) >= max(made) * (1 - 1e-12))) + 1


def imbalance(bundle: Bundle, load: SlotLoad, workers: int) -> float:
    """By what fraction the fullest of `workers` micro-batches' KV tokens exceed the mean one's, on average."""
    return expected_largest(workers) * load.deviation / (math.sqrt(bundle.batch) * load.theta)


def _expected(rows: Sequence[Row], waits: dict[str, tuple[int, int]], bundle: Bundle, load: SlotLoad) -> float:
    """E[max of the rows] in s; waits: by stage, how many loads are averaged, and of how many such means the fullest."""
    mean, spread = bundle.batch * load.theta, math.sqrt(bundle.batch) * load.deviation
    if spread == 0:
        return max(row.constant + row.per_kv * mean for row in rows)
    low = max((row.constant for row in rows if row.per_kv == 0), default=-math.inf)
    stages = []
    for name, (averaged, count) in waits.items():
        mine = np.array([(r.constant + r.per_kv * mean, r.per_kv) for r in rows if r.stage == name and r.per_kv > 0])
        if len(mine):
            stages.append(Stage(mine[:, 0], mine[:, 1] * spread / math.sqrt(averaged), count))
    return _largest(low, stages)


def _largest(low: float, stages: Sequence[Stage]) -> float:
    """E[max(low, stages)] in s."""
    low = max([low, *(stage.at(-FAR) for stage in stages)])
    high = max([low, *(stage.at(FAR) for stage in stages)])
    if high == low:
        return low
    inner = {cut for stage in stages for cut in stage.cuts() if low < cut < high}
    u, weight = _nodes(np.array(sorted({low, high, *inner})))
    return low + float(weight @ -np.expm1(sum(stage.log_below(u) for stage in stages)))


@lru_cache(maxsize=4096)
def _kappa(n: int) -> float:
    """int_0^inf (1 - Phi(u)^n - Phi(-u)^n) du."""
    u, weight = _nodes(np.array([0.0, FAR]))
    return float(weight @ (-np.expm1(n * _log_phi(u)) - np.exp(n * _log_phi(-u))))


def _log_phi(z: Floats) -> Floats:
    from scipy.special import log_ndtr

    return np.asarray(log_ndtr(z))


def _nodes(cuts: Floats) -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights between each two of the increasing `cuts`, arrays of shape (n,)."""
    x, weight = _legendre()
    half = np.diff(cuts)[:, None] / 2
    return (cuts[:-1, None] + half * (x + 1)).ravel(), (half * weight).ravel()


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    x, weight = np.polynomial.legendre.leggauss(NODES)
    return x, weight
