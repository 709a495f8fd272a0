"""How old the requests in always occupied slots are, over a run that starts with a new request in each of them.

A slot that serves one request after the other starts a new one in step s with probability u_s, the renewal masses of
the law f of D: u_0 = 1 and u_s = sum_d f_d u_{s-d}. Over K steps a slot is in step j of a request, j = 0, 1, ..., for
the fraction

    (1 / K) sum_{s <= K - 1 - j} u_s  P(D > j),

which tends to P(D > j) / E[D] as K grows. For geometric D it gives Proposition 4.3 of Song et al., arXiv 2601.21351
v1.
"""

from __future__ import annotations

import numpy as np

from llmopt.arrays import Floats


def renewals(masses: Floats, steps: int) -> Floats:
    """u_0 .. u_{steps-1} for P(D = d) = masses[d], shape (n,); masses[0], of requests that stay no step, is left out.

    As power series u (1 - f) = 1, which Newton's iteration u <- u (2 - (1 - f) u) solves to twice as many terms each
    time.
    """
    law = np.zeros(steps)
    known = np.asarray(masses, dtype=float)[:steps]
    law[: len(known)] = known
    law[0] = 0.0
    rest = -law / (np.sum(masses) - masses[0])
    rest[0] = 1.0
    u = np.ones(1)
    while len(u) < steps:
        n = min(2 * len(u), steps)
        correction = -_product(rest[:n], u, n)
        correction[0] += 2.0
        u = np.clip(_product(u, correction, n), 0.0, 1.0)
    return u


def age_weights(masses: Floats, steps: int) -> Floats:
    """For j = 0 .. steps - 1 how often per step a slot would be in step j of a request, had none ended by then.

    That is (1 / K) sum_{s <= K-1-j} u_s with K = steps; times P(D > j) it is the fraction above.
    """
    return np.asarray(np.cumsum(renewals(masses, steps))[::-1] / steps)


def _product(a: Floats, b: Floats, n: int) -> Floats:
    """The first n coefficients of the product of two power series."""
    size = 1 << (len(a) + len(b) - 2).bit_length()
    return np.asarray(np.fft.irfft(np.fft.rfft(a, size) * np.fft.rfft(b, size), size)[:n])
