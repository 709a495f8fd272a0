"""The round model of batch scheduling: requests, a KV memory, and schedules that start each request once.

One worker works in rounds of unit time. Request i arrives at a_i with a prompt of s_i tokens and produces o_i output
tokens. Started at p_i >= a_i, and never interrupted, it holds s_i + (t - p_i) tokens of KV memory in each round
t = p_i + 1, ..., p_i + o_i, and completes at c_i = p_i + o_i. No round may hold more than M tokens. Total latency is
sum_i (c_i - a_i).

Source: Jaillet, Jiang, Mellou, Molinaro, Podimata, Zhou, "Online Scheduling for LLM Inference with KV Cache
Constraints", arXiv 2502.07115.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from llmopt.arrays import Bools, Ints
from llmopt.errors import ScenarioError


@dataclass(frozen=True, eq=False)
class Rounds:
    """An instance: `arrival` a, `prompt` s and `output` o, whole numbers of shape (n,), and `capacity` M in tokens.

    Raises
    ------
    ScenarioError
        For arrays that differ in length or are not whole numbers, a negative arrival or prompt, an output below 1,
        and a request that can never fit (s_i + o_i > M).
    """

    arrival: Ints
    prompt: Ints
    output: Ints
    capacity: int

    def __post_init__(self) -> None:
        for field in fields(self)[:3]:
            object.__setattr__(self, field.name, _whole(field.name, getattr(self, field.name), len(self.arrival)))
        _refuse(self.arrival < 0, "arrives at {}, before round 0; count rounds from 0", self.arrival)
        _refuse(self.prompt < 0, "has a prompt of {} tokens; give 0 or more", self.prompt)
        _refuse(self.output < 1, "has an output of {} tokens; give at least 1", self.output)
        never = f"needs {{}} tokens when it completes and can never fit in {self.capacity}; raise capacity or drop it"
        _refuse(self.peak > self.capacity, never, self.peak)

    @classmethod
    def together(cls, pairs: Sequence[tuple[int, int]], capacity: int) -> Rounds:
        """An instance whose requests, given as (prompt, output), have all arrived at round 0."""
        prompt, output = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return cls(np.zeros(len(prompt), dtype=np.int64), prompt, output, capacity)

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival)

    @cached_property
    def peak(self) -> Ints:
        """P_i = s_i + o_i, the tokens held in the last round, shape (n,)."""
        return self.prompt + self.output

    @cached_property
    def volume(self) -> Ints:
        """vol_i = s_i o_i + o_i (o_i + 1) / 2, the token-rounds that a request occupies, shape (n,)."""
        return self.prompt * self.output + self.output * (self.output + 1) // 2

    @property
    def horizon(self) -> int:
        """A round by which some optimal schedule is done: the last arrival and all outputs one after the other.

        Whenever a request waits after the last arrival, an optimal schedule runs something: if it idled, everything
        later could move up by a round.
        """
        return int(self.arrival.max(initial=0) + self.output.sum())

    def part(self, chosen: Bools) -> Rounds:
        """The instance of the chosen requests alone; `chosen` has shape (n,)."""
        return Rounds(self.arrival[chosen], self.prompt[chosen], self.output[chosen], self.capacity)

    def usage(self, start: Ints) -> Ints:
        """Tokens held in rounds 0, 1, ..., max c_i when request i starts at `start[i]`, shape (max c_i + 1,)."""
        length = int((start + self.output).max(initial=0)) + 2
        slope, level = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        np.add.at(slope, start + 1, 1)
        np.add.at(slope, start + self.output + 1, -1)
        np.add.at(level, start + 1, self.prompt)
        np.add.at(level, start + self.output + 1, -self.peak)
        return np.cumsum(np.cumsum(slope) + level)[:-1]

    def feasible(self, start: Ints) -> bool:
        """Whether every request starts after its arrival and no round holds more than M tokens."""
        return bool((start >= self.arrival).all() and self.usage(start).max(initial=0) <= self.capacity)

    def latency(self, start: Ints) -> int:
        """Total latency sum_i (p_i + o_i - a_i) in rounds."""
        return int((start + self.output - self.arrival).sum())


def model_1(seed: int, n: int | None = None) -> Rounds:
    """Published model 1: all at round 0, n ~ U{40..60} unless given, M ~ U{30..50}, s ~ U{1..5}, o ~ U{1..M-s}."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(30, 51))
    n = int(rng.integers(40, 61)) if n is None else n
    return _drawn(rng, np.zeros(n, dtype=np.int64), capacity)


def model_2(seed: int, rounds: int | None = None) -> Rounds:
    """Published model 2: Poisson arrivals, rate ~ U[0.5, 1.5] per round, in T ~ U{40..60} rounds unless given."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(30, 51))
    rounds = int(rng.integers(40, 61)) if rounds is None else rounds
    return _drawn(rng, np.repeat(np.arange(rounds), rng.poisson(rng.uniform(0.5, 1.5), rounds)), capacity)


def _drawn(rng: np.random.Generator, arrival: Ints, capacity: int) -> Rounds:
    prompt = rng.integers(1, 6, len(arrival))
    return Rounds(arrival, prompt, rng.integers(1, capacity - prompt + 1), capacity)


def hand_instances() -> dict[str, Rounds]:
    """Three small instances with known optima: A 22 (equal prompts), B 15 (one long prompt), C 316 (two sizes)."""
    return {
        "A": Rounds.together([(1, 3)] * 3 + [(1, 8)], 10),
        "B": Rounds.together([(17, 1)] + [(1, 2)] * 6, 20),
        "C": Rounds.together([(55, 4)] * 8 + [(1, 5)] * 16, 64),
    }


def _whole(name: str, values: object, n: int) -> Ints:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ScenarioError(f"{name} has shape {array.shape}; give one whole number for each of the {n} requests")
    if n and not np.array_equal(array, np.asarray(array, dtype=np.int64)):
        raise ScenarioError(f"{name} has values that are no whole numbers; the round model counts tokens and rounds")
    return array.astype(np.int64)


def _refuse(wrong: Bools, sentence: str, values: Ints) -> None:
    for i in np.flatnonzero(wrong)[:1]:
        raise ScenarioError(f"request {i} {sentence.format(values[i])}")
