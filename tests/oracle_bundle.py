"""A naive bundle simulator written from the semantics, not from the package: slots in lists, devices in dictionaries.

It knows nothing of second differences, numpy loops or compiled code: every slot is looked at in every step, and every
event of a pipeline waits, by name, for the events it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llmopt.bundle import Bundle


class Lengths(NamedTuple):
    """A request: prompt tokens and steps in its slot."""

    prompt: int
    decode: int


def slot_loads(requests: Iterator[Lengths], age: int, steps: int) -> list[int]:
    """What one slot holds in each step, its first request being of age `age` in step 0."""
    held: list[int] = []
    current = next(requests)
    while len(held) < steps:
        if age >= current.decode:
            current, age = next(requests), 0
            continue
        held.append(current.prompt + age)
        age += 1
    return held


class Outcome(NamedTuple):
    """Makespan, mean idle shares, and the gaps between tokens of each micro-batch."""

    makespan: float
    idle_attention: float
    idle_ffn: float
    gaps: list[float]


def attention(bundle: Bundle, kv: float) -> float:
    return max(p.base + p.decode * bundle.batch + p.kv * kv for p in bundle.attention)


def hop(bundle: Bundle, workers: int, servers: int) -> float:
    sent = bundle.batch if bundle.transfer_of == "worker" else bundle.batch * workers / servers
    return max(p.base + p.decode * sent for p in bundle.transfer)


def ffn(bundle: Bundle, workers: int, servers: int) -> float:
    tokens = bundle.batch * workers / servers
    if bundle.ffn_table is None:
        return max(p.base + p.decode * tokens for p in bundle.ffn)
    knots = list(zip(bundle.ffn_table.tokens, bundle.ffn_table.seconds, strict=True))
    left = max([i for i, (x, _) in enumerate(knots[:-1]) if x <= tokens], default=0)
    (x0, y0), (x1, y1) = knots[left : left + 2]
    return max(0.0, y0 + (tokens - x0) * (y1 - y0) / (x1 - x0))


def play(bundle: Bundle, loads: list[list[list[float]]], workers: int, servers: int) -> Outcome:
    """`loads[m][k][j]`: KV tokens of worker j's micro-batch m in step k."""
    steps, c, f = len(loads[0]), hop(bundle, workers, servers), ffn(bundle, workers, servers)
    times = [[[attention(bundle, kv) for kv in row[:workers]] for row in one] for one in loads]
    if bundle.pipeline == "ideal":
        return _ideal(bundle, times, c, f)
    free = {("A", j): 0.0 for j in range(workers)} | {("F", 0): 0.0}
    busy = dict.fromkeys(free, 0.0)
    at_workers = {m: 0.0 for m in range(bundle.micro_batches)}
    gaps: list[float] = []
    told = dict(at_workers)
    for turn in range(steps * bundle.layers * bundle.micro_batches):
        m = turn % bundle.micro_batches
        step, layer = divmod(turn // bundle.micro_batches, bundle.layers)
        arrivals = []
        for j in range(workers):
            end = max(free["A", j], at_workers[m]) + times[m][step][j]
            busy["A", j] += times[m][step][j]
            free["A", j] = end + c if "attention-blocking" in bundle.pipeline or bundle.pipeline == "blocking" else end
            arrivals.append(end + c)
        end = max(free["F", 0], *arrivals) + f
        busy["F", 0] += f
        free["F", 0] = end + c if bundle.pipeline == "blocking" else end
        at_workers[m] = end + c
        if layer == bundle.layers - 1:
            gaps.append(at_workers[m] - told[m])
            told[m] = at_workers[m]
    makespan = max(at_workers.values())
    worked = sum(busy["A", j] for j in range(workers)) / workers
    return Outcome(makespan, 1 - worked / makespan, 1 - busy["F", 0] / makespan, gaps)


def _ideal(bundle: Bundle, times: list[list[list[float]]], c: float, f: float) -> Outcome:
    cycles = [max(*row, c, f) for one in times for row in one]
    worked = sum(sum(row) / len(row) for one in times for row in one)
    total = sum(cycles)
    gaps = [bundle.micro_batches * bundle.layers * cycle for cycle in cycles]
    return Outcome(total * bundle.layers, 1 - worked / total, 1 - len(cycles) * f / total, gaps)
