"""The round model a second time, written plainly and apart from the product: memory by rounds, and brute force."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import strategies as st

from llmopt.rounds import Rounds


def held(instance: Rounds, start) -> dict[int, int]:
    """Tokens in each round, request by request and round by round."""
    tokens: dict[int, int] = {}
    for s, o, p in zip(instance.prompt.tolist(), instance.output.tolist(), list(start), strict=True):
        for t in range(int(p) + 1, int(p) + o + 1):
            tokens[t] = tokens.get(t, 0) + s + (t - int(p))
    return tokens


def checked(instance: Rounds, start) -> int:
    """Total latency of a schedule that keeps every rule; raises otherwise."""
    assert len(start) == len(instance)
    for a, p in zip(instance.arrival.tolist(), list(start), strict=True):
        assert int(p) == p >= a
    assert max(held(instance, start).values(), default=0) <= instance.capacity
    ends = zip(start, instance.output.tolist(), instance.arrival.tolist(), strict=True)
    return sum(int(p) + o - a for p, o, a in ends)


def optimum(instance: Rounds) -> int:
    """Least total latency by trying, round by round, every set of requests that may start then.

    The future depends on the round, on who waits, and on the tokens that those running will hold in later rounds.
    """
    a, s, o = instance.arrival.tolist(), instance.prompt.tolist(), instance.output.tolist()
    last = instance.horizon

    @cache
    def best(now: int, waiting: tuple[int, ...], ahead: tuple[int, ...]) -> float:
        if not waiting:
            return 0
        if now > last:
            return float("inf")
        value = best(now + 1, waiting, ahead[1:])
        for i in {(a[j], s[j], o[j]): j for j in waiting if a[j] <= now}.values():
            rest = tuple(j for j in waiting if j != i)
            use = [s[i] + k for k in range(1, o[i] + 1)]
            total = [
                (use[k] if k < len(use) else 0) + (ahead[k] if k < len(ahead) else 0)
                for k in range(max(len(use), len(ahead)))
            ]
            if max(total) <= instance.capacity:
                value = min(value, now + o[i] - a[i] + best(now, rest, tuple(total)))
        return value

    return int(best(0, tuple(range(len(a))), ()))


def small_instance(rng: np.random.Generator, most: int = 7) -> Rounds:
    """A random instance of at most `most` requests, half of them with arrivals over time."""
    n = int(rng.integers(1, most + 1))
    capacity = int(rng.integers(6, 13 if n < 6 else 10))
    prompt = rng.integers(0, 4, n)
    output = np.array([rng.integers(1, capacity - s + 1) for s in prompt])
    arrival = rng.integers(0, n, n) if rng.random() < 0.5 else np.zeros(n, dtype=int)
    return Rounds(arrival, prompt, output, capacity)


INSTANCES = st.integers(0, 2**32 - 1).map(lambda seed: small_instance(np.random.default_rng(seed), 6))
