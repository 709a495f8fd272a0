"""The cycle with a barrier: every layer waits for the fullest of x Attention workers.

A worker's micro-batch holds the sum of B slots, about normal: T ~ N(B theta, B nu^2). The fullest of x such loads is
B theta + sqrt(B) nu M_x, with M_x the largest of x standard normals. The cycle is a convex piecewise-linear function
of it, max_i (c_i + k_i T), so that with its kinks z_1 < z_2 < ... in units of M and the jumps of its slope there

    E[tau] = c_1 + k_1 E[M_x] + sum_j jump_j E[(M_x - z_j)^+],    E[(M_x - z)^+] = int_z^inf (1 - Phi(u)^x) du.

The maximum stays inside the expectation: E[max{A, F}] exceeds max{E[A], F}, which exceeds the mean field. For one
Attention piece and the cycle max{A, C, F} this is the Gaussian rule of v2 to v4 of Song et al., arXiv 2601.21351.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.ratio import Row, rows_at, throughput
from llmopt.slots import SlotLoad

FAR = 12.0
"""Below -FAR, Phi is less than 1e-32; the integrands are followed as far above the larger of z and 0."""
NODES = 128
"""Nodes of an integral, enough for an absolute error of 1e-13 up to 512 workers."""


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


def expected_excess(z: float, n: int) -> float:
    """E[(M - z)^+] for the largest M of n independent standard normals."""
    middle, above = max(-FAR, min(z, 0.0)), max(z, 0.0)
    return (middle - min(z, middle)) + _exceeds(middle, 0.0, n) + _exceeds(above, above + FAR, n)


def barrier_cycle(bundle: Bundle, load: SlotLoad, workers: int, servers: int = 1) -> float:
    """Mean seconds of a cycle with `workers` Attention workers, the fullest of which decides, and `servers` servers."""
    return expected_cycle(rows_at(bundle, workers / servers), bundle, load, workers)


def expected_cycle(rows: Iterable[Row], bundle: Bundle, load: SlotLoad, workers: int) -> float:
    """E[max_i (constant_i + per_kv_i T)] in s, T the load of the fullest of `workers` workers."""
    mean, spread = bundle.batch * load.theta, math.sqrt(bundle.batch) * load.deviation
    at_mean = [(row.constant + row.per_kv * mean, row.per_kv * spread) for row in rows]
    if spread == 0:
        return max(at_mean)[0]
    lines = _envelope(at_mean)
    (total, slope), *rest = lines
    total += slope * expected_largest(workers)
    for (c0, k0), (c1, k1) in zip(lines, rest, strict=False):
        total += (k1 - k0) * expected_excess((c0 - c1) / (k1 - k0), workers)
    return total


def best_barrier(bundle: Bundle, load: SlotLoad, most: int, servers: int = 1) -> int:
    """The number of Attention workers, 1 to `most`, of largest throughput by `barrier_cycle`; of ties the smallest."""
    made = [throughput(bundle, barrier_cycle(bundle, load, x, servers), x, servers) for x in range(1, most + 1)]
    return int(np.argmax(np.array(made) >= max(made) * (1 - 1e-12))) + 1


def imbalance(bundle: Bundle, load: SlotLoad, workers: int) -> float:
    """By what fraction the fullest of `workers` workers' KV tokens exceed the mean one's, on average."""
    return expected_largest(workers) * load.deviation / (math.sqrt(bundle.batch) * load.theta)


def _envelope(lines: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lines (c, k) of max (c + k z) that are largest somewhere, by increasing slope k."""
    upper: list[tuple[float, float]] = []
    for c, k in sorted(lines, key=lambda line: (line[1], line[0])):
        if upper and upper[-1][1] == k:
            upper.pop()
        # The middle one of three is nowhere largest if the outer two meet above it.
        while len(upper) > 1 and _meet(upper[-2], (c, k)) <= _meet(upper[-2], upper[-1]):
            upper.pop()
        upper.append((c, k))
    return upper


def _meet(flat: tuple[float, float], steep: tuple[float, float]) -> float:
    return (flat[0] - steep[0]) / (steep[1] - flat[1])


@lru_cache(maxsize=1024)
def _kappa(n: int) -> float:
    """int_0^inf (1 - Phi(u)^n - Phi(-u)^n) du."""
    u, weight = _nodes(0.0, FAR)
    return float(weight @ (_tail(u, n) - np.exp(n * _log_phi(-u))))


def _exceeds(low: float, high: float, n: int) -> float:
    """int_low^high (1 - Phi(u)^n) du, to about 1e-12."""
    if high <= low:
        return 0.0
    u, weight = _nodes(low, high)
    return float(weight @ _tail(u, n))


def _tail(u: Floats, n: int) -> Floats:
    """1 - Phi(u)^n without cancellation."""
    return -np.expm1(n * _log_phi(u))


def _log_phi(u: Floats) -> Floats:
    from scipy.special import log_ndtr

    return np.asarray(log_ndtr(u))


def _nodes(low: float, high: float) -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights on [low, high], arrays of shape (NODES,)."""
    x, weight = _legendre()
    half = (high - low) / 2
    return low + half * (x + 1), half * weight


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    x, weight = np.polynomial.legendre.leggauss(NODES)
    return x, weight
