"""A replica that never runs out of work, in the mean: how many requests a step completes and how long a step takes.

Three budgets bound the completions n per step, each from one conservation law (u, L, s, d per request: KV area,
steps in the batch, prompt tokens, decode steps):

    memory   n (u + waste)    =  M - free - kept         slots   n L  =  max batch
    tokens   n (s + d) + again  =  token budget

`free` is what a blocked head leaves unused: the age of a renewal process of needs at admission. `kept`, `waste` and
`again` come from the boundary walk. Where two budgets are close the smaller one is not reached all the time: the
number of requests that memory holds fluctuates (normal, renewal variance), and the prefill that tokens allow feeds a
reflected Ornstein-Uhlenbeck process whose stationary law is a truncated normal. The capacity is n over the mean of
the step time, taken over the steps of the walk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.mix import Mix
from llmopt.stability import RESOURCES
from llmopt.walk import Turn, Walk, walk

ROUNDS = 3
SWEEPS = 4
TURNS: dict[str, Turn] = {
    "reserve": "stay",
    "lookahead": "ahead",
    "swap": "park",
    "recompute": "back",
    "restart": "back",
}


@dataclass(frozen=True)
class Overhead:
    """What preemption and look-ahead cost in the mean.

    kept: KV tokens kept free; waste: KV area per completion that is thrown away; again: prefill tokens per step that
    are repeated; aged: tokens that a request near the boundary has grown by when it is preempted.
    """

    kept: float = 0.0
    waste: float = 0.0
    again: float = 0.0
    aged: float = 0.0


@dataclass(frozen=True)
class Balance:
    """The mean step at saturation.

    rate: completions per step; limits (3,): what each of `RESOURCES` alone allows; weights (3,): by how much a
    percent more of each limit raises the rate, summing to 1; memory: weight of memory against slots; room: prefill
    tokens a step has room for; life: steps a request spends in the batch; decode: decoding requests; free: KV tokens
    before the blocked head; spread: squared coefficient of variation of the KV tokens that a running request holds.
    """

    rate: float
    limits: Floats
    weights: Floats
    memory: float
    room: float
    life: float
    decode: float
    free: float
    spread: float


@dataclass(frozen=True)
class Saturation:
    """The saturated replica: capacity `rate` (requests/s), mean `step_time` (s), and why.

    balance, overhead: as above; seconds (5,): mean seconds of a step for each of `hardware.FEATURES`, by the piece that
    is largest in each step; piece: index of the piece that takes most of the time; crowded: share of steps whose
    prefill fills the budget; over: share of the step time that goes to over-admitted requests.
    """

    rate: float
    step_time: float
    balance: Balance
    overhead: Overhead
    seconds: Floats
    piece: int
    crowded: float
    over: float

    @property
    def resource(self) -> str:
        """The resource that binds."""
        return RESOURCES[int(self.balance.limits.argmin())]


def saturate(mix: Mix) -> Saturation:
    """Solve for the saturated replica: alternate between the balance and the walk that gives its overhead."""
    overhead, steps = Overhead(), None
    for _ in range(ROUNDS):
        balance = _balance(mix, overhead)
        if balance.memory < 1e-3:
            return _average(mix, balance, overhead, None)
        steps = _memory_walk(mix, balance, overhead)
        overhead = _overhead(mix, balance, steps, overhead)
    return _average(mix, balance, overhead, steps)


def _needs(mix: Mix, aged: float) -> tuple[Floats, float]:
    """KV tokens that the sample requests need at admission, and the lattice on which their sums lie."""
    if mix.pool.preemption == "reserve":
        peak = mix.blocks(mix.s + mix.d)
        return peak, float(np.gcd.reduce(peak.astype(np.int64)))
    return mix.blocks(mix.s + np.minimum(aged, mix.d) / 2), float(mix.pool.block_size)


@dataclass(frozen=True)
class _Lives:
    """Life of a request when prefill gets `room` tokens a step: steps, KV area, mean square KV tokens held."""

    steps: float
    area: float
    square: float


def _lives(mix: Mix, room: float) -> _Lives:
    """Exact means for whole chunks, corrected on the sample for chunks that the token budget cuts to `room`."""
    s, d, chunk = mix.s, mix.d, mix.pool.chunk
    cut = np.ceil(s / min(chunk, room))
    slower = float((cut - np.ceil(s / chunk)).mean())
    steps = mix.prefills + mix.decode + slower
    if mix.pool.preemption == "reserve":
        peak = mix.blocks(s + d)
        return _Lives(steps, mix.held + float((peak * (cut - np.ceil(s / chunk))).mean()), _mean(peak**2 * (cut + d)))
    ramp = (_ramp(s, min(chunk, room)) - _ramp(s, chunk)).mean()
    square = cut * s**2 / 3 + d * s**2 + s * d**2 + d**3 / 3
    return _Lives(steps, mix.held + float(ramp), _mean(square))


def _ramp(s: Floats, chunk: float) -> Floats:
    """Area of prefill in chunks."""
    k = np.ceil(s / chunk)
    return np.asarray(k * s - chunk * k * (k - 1) / 2)


def _mean(x: Floats) -> float:
    return float(x.mean())


def _balance(mix: Mix, over: Overhead) -> Balance:
    """Alternate between the completions per step and the room that decode leaves for prefill."""
    budget = float(mix.pool.token_budget)
    tokens = max(budget - over.again, 0.05 * budget) / (mix.prompt + mix.decode)
    balance = _balanced(mix, over, tokens, tokens)
    for _ in range(SWEEPS):
        balance = _balanced(mix, over, tokens, balance.rate)
    return balance


def _balanced(mix: Mix, over: Overhead, tokens: float, rate: float) -> Balance:
    """The balance if decode takes what `rate` completions per step need; `tokens` is the limit of the budget."""
    pool, (by_slot, by_memory) = mix.pool, mix.variances
    memory = float(pool.kv_blocks * pool.block_size)
    need, lattice = _needs(mix, over.aged)
    free = _mean(need**2) / (2 * _mean(need)) - lattice / 2 + memory % lattice
    decode = min(rate * mix.decode, 0.98 * pool.token_budget)
    room = max(pool.token_budget - decode, 1.0)
    lives = _lives(mix, room)
    spread = max(lives.square * lives.steps / lives.area**2 - 1.0, 0.0)
    fits = max(memory - free - over.kept, 0.05 * memory) / (lives.area + over.waste)
    limits = np.array([fits, pool.max_batch / lives.steps, tokens])
    # A slot is taken when prefill starts, so the request in prefill does not count as missing.
    spare = min(rate * mix.prompt / room, 1.0) / lives.steps
    noise = np.array([spread / lives.steps, by_memory / lives.area**2, by_slot / lives.steps**2])
    rate, weight = _rate(limits, spare, noise)
    raised = [_rate(limits * np.where(np.arange(3) == r, 1.01, 1.0), spare, noise)[0] - rate for r in range(3)]
    weights = np.maximum(raised, 0.0) / max(float(np.maximum(raised, 0.0).sum()), 1e-300)
    return Balance(rate, limits, weights, weight, room, lives.steps, decode, free, spread)


def _rate(limits: Floats, spare: float, noise: Floats) -> tuple[float, float]:
    """Completions per step under all three limits, and the weight of memory against slots.

    noise: variance over mean of the completions that memory allows, and of those in progress where memory or where
    slots bind, all in units of completions per step.
    """
    both, weight = _smaller(float(limits[0]), float(noise[0]), float(limits[1]) + spare)
    variance = weight * noise[1] + (1 - weight) * noise[2]
    rate = float(limits.min())
    for _ in range(3):
        rate = min(_fed(float(limits[2]), variance * rate, both), float(limits[1]))
    return rate, weight


def _smaller(mean: float, spread: float, cap: float) -> tuple[float, float]:
    """E[min(N, cap)] and P(N < cap) for N that memory allows: normal, renewal variance `spread` x mean."""
    from scipy.special import ndtr

    sd = np.sqrt(mean * spread) + 1e-12
    z = (cap - mean) / sd
    below = float(ndtr(z))
    density = float(np.exp(-z * z / 2) / np.sqrt(2 * np.pi))
    return float(mean * below - sd * density + cap * (1 - below)), below


def _fed(mean: float, variance: float, cap: float) -> float:
    """Mean of a normal variable given that it is below `cap`: prefill feeds the replica at `mean`, `cap` reflects."""
    from scipy.special import log_ndtr

    sd = float(np.sqrt(variance))
    z = (cap - mean) / max(sd, 1e-12)
    if z > 8:
        return mean
    if z < -30:
        return cap + sd / z
    return mean - sd * float(np.exp(-z * z / 2 - log_ndtr(z))) / float(np.sqrt(2 * np.pi))


def _memory_walk(mix: Mix, balance: Balance, over: Overhead) -> Walk:
    need, lattice = _needs(mix, over.aged)
    offset = float(mix.pool.kv_blocks * mix.pool.block_size) % lattice
    return walk(mix, balance.rate, balance.room, mix.blocks(mix.s + mix.d), need, TURNS[mix.pool.preemption], offset)


def _overhead(mix: Mix, balance: Balance, steps: Walk, old: Overhead) -> Overhead:
    mode, rate, share = mix.pool.preemption, balance.rate, balance.memory
    again = steps.again * share
    if mode == "restart" and steps.back > 0:
        stay = steps.doomed / (rate * steps.back)
        waste = (steps.doomed_held + steps.doomed * stay) / rate * share
        return Overhead(waste=(old.waste + min(waste, mix.held)) / 2, again=again)
    if mode in ("recompute", "swap"):
        return Overhead(again=again, aged=(old.aged + min(steps.doomed / rate, mix.decode)) / 2)
    return Overhead(kept=steps.kept)


def _average(mix: Mix, balance: Balance, overhead: Overhead, memory: Walk | None) -> Saturation:
    """Mean step time over the steps that memory bounds and those that slots bound, by their weights."""
    parts = [] if memory is None else [(balance.memory, memory)]
    if balance.memory < 1 - 1e-3 or memory is None:
        one = np.ones(len(mix.s))
        parts.append((1 - balance.memory, walk(mix, balance.rate, balance.room, one, one, "stay")))
    total = sum(weight for weight, _ in parts)
    crowded = over = 0.0
    seconds = np.zeros((len(mix.pool.step_time), 5))
    for weight, steps in parts:
        features, full = _features(mix, balance, steps, float(steps is memory))
        seconds += weight / total * _seconds(mix.pool.stepper.coefficients, features)
        crowded += weight / total * full
        over += weight / total * steps.over
    prefill = float(seconds[:, 1].sum() + seconds[:, 4].sum())
    step, piece = float(seconds.sum()), int(seconds.sum(axis=1).argmax())
    over *= prefill / step / max(balance.rate * mix.prompt + overhead.again, 1e-12)
    return Saturation(balance.rate / step, step, balance, overhead, seconds.sum(axis=0), piece, crowded, over)


def _seconds(coefficients: Floats, features: Floats) -> Floats:
    """Mean seconds of a step by piece and feature, shape (n_pieces, 5); each step counts for its largest piece."""
    full = np.column_stack([np.ones(len(features)), features])
    largest = (full @ coefficients.T).argmax(axis=1)
    sums = np.array([full[largest == i].sum(axis=0) for i in range(len(coefficients))])
    return np.asarray(sums * coefficients / len(features))


def _features(mix: Mix, balance: Balance, steps: Walk, memory: float) -> tuple[Floats, float]:
    """Features (n_steps, 4) of the steps, and the share of them whose prefill fills the budget.

    Prefill varies from step to step as in the walk; decode sequences and KV tokens vary slowly and independently of
    it, except that in a memory-bound step what is free or being filled is not read. Means are set to the exact ones.
    """
    rate, slow = balance.rate, _slow(len(steps.prefill))
    full = steps.prefill >= balance.room - 1e-6
    crowded, calm = float(full.mean()), 1 - float(full.mean())
    by_slot, by_memory = mix.variances
    seats = rate * balance.life * balance.spread
    held = mix.held / balance.life
    decode = balance.decode + slow * np.sqrt(crowded * rate * by_slot + calm * memory * seats)
    decode = np.maximum(decode, 0.0)
    offered = rate * mix.prompt + steps.again
    prefill = np.where(full, 0.0, steps.prefill)
    prefill = _with_mean(prefill, max(offered - float((steps.prefill * full).mean()), 0.0))
    prefill = np.where(full, np.maximum(balance.room - decode + balance.decode, 1.0), prefill)
    read = rate * mix.read
    unread = (steps.free - steps.free.mean()) + (prefill - prefill.mean())
    kv = read + slow * np.sqrt(crowded * rate * by_memory + calm * (1 - memory) * seats * held**2)
    kv = _with_mean(np.maximum(kv - memory * calm * unread, 0.0), read)
    pairs = _with_mean(steps.pairs, offered * mix.pairs / mix.prompt) if steps.over == 0 else steps.pairs
    return np.column_stack([prefill, decode, kv, pairs]), crowded


def _with_mean(x: Floats, mean: float) -> Floats:
    """`x` scaled to `mean`, which it misses by the error of a sample only; unscaled where it misses by more."""
    scale = mean / max(float(x.mean()), 1e-12)
    return x * scale if 0.8 < scale < 1.25 else x


def _slow(n: int) -> Floats:
    """Standard normal quantiles in a fixed shuffled order, shape (n,)."""
    from scipy.special import ndtri

    order = np.random.default_rng(9).permutation(n)
    return np.asarray(ndtri((order + 0.5) / n))
