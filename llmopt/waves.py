"""When the requests of a replica start and end together: waves, and what they leave of the capacity.

A saturated replica that holds its memory at the cap M obeys sum_k m_k x(t - k) = M, where x(t) requests start at step
t and m_k is the mean of what one holds at age k (0 if it is gone). A disturbance w^-t survives if sum_k m_k w^k = 0,
and grows if such a w lies inside the unit circle: the steady state is stable if and only if the polynomial has no
zero there. Equal lengths make m_k increase, which puts every zero inside (the eviction-free equilibrium of Ao et al.
2606.15555 is unstable); lengths that vary enough make m_k fall and leave none. Growing waves end in replicas that
admit a batch at once: reservation of peaks in all but name.
"""

from __future__ import annotations

import numpy as np

from llmopt.arrays import Floats
from llmopt.mix import Mix, reserving
from llmopt.saturation import Saturation, saturate

SAMPLE = 1024
BINS = 512


def unstable_modes(mix: Mix) -> int:
    """Number of growing waves: zeros inside the unit circle, counted as turns of the polynomial around 0."""
    held = _held(mix)
    size = 8 * len(held)
    values = np.fft.fft(held, size)
    phase = np.unwrap(np.angle(np.append(values, values[0])))
    return -round(float(phase[-1] - phase[0]) / (2 * np.pi))


def _held(mix: Mix) -> Floats:
    """Mean KV tokens that a request counts for at each age since admission, in at most `BINS` bins.

    Admission counts the whole prompt from the start, so prefill steps do not appear.
    """
    s, d = mix.s[:SAMPLE], mix.d[:SAMPLE]
    width = np.ceil((d.max() + 1) / BINS)
    age = np.arange(0.0, float(d.max()) + 1, width)[:, None]
    return np.asarray(((s + age) * (age <= d)).mean(axis=1))


def locked(mix: Mix) -> Saturation:
    """The replica whose requests run in lockstep: it completes what it could with reserved peaks."""
    return saturate(reserving(mix))


def locked_rate(mix: Mix) -> float:
    """Capacity in lockstep, requests/s.

    With look-ahead it is that of reserved peaks. With restart every step runs with full memory, and all tokens by
    which a wave outgrows the memory, s + d per completion at most, are prefilled again.
    """
    reserved = locked(mix)
    if mix.pool.preemption != "restart":
        return reserved.rate
    rate, memory = reserved.balance.rate, float(mix.pool.kv_blocks * mix.pool.block_size)
    prefill = rate * (mix.prompt + mix.decode)
    running = memory * mix.decode / mix.held
    features = [1.0, prefill, running, memory, prefill * mix.pairs / mix.prompt]
    return min(reserved.rate, rate / float((mix.pool.stepper.coefficients @ features).max()))
