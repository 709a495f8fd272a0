"""Shapes of bundles that a policy may choose: what each takes and gives, and which ones no best plan needs.

A shape is c = (x, y, B): Attention workers, FFN servers, micro-batch size. Equation numbers of README.md, "A/F ratio".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from llmopt import barrier, ratio
from llmopt.arrays import Floats, Ints
from llmopt.bundle import Bundle, Fleet
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad

Costs = Literal["mean-field", "barrier"]
"""Length of a cycle: every worker holds its mean load, or the fullest of x workers decides (its expectation, under the
exact law of independent loads)."""
MANY = 4000
MICRO = 1e6
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class RatioData:
    """Data of a question about the A/F ratio: bundle, fleet, and the strictest TPOT with its class.

    load: of a slot at the bundle's own B; from a cold start that of another B is `scenario.load_at(B)`.

    tpot: seconds, inf where no class has one.
    """

    bundle: Bundle
    load: SlotLoad
    fleet: Fleet
    tpot: float
    strictest: str
    scenario: Scenario

    @classmethod
    def of(cls, scenario: Scenario) -> RatioData:
        """The data of a scenario."""
        named = [(c.tpot, c.name) for c in scenario.workload.classes if c.tpot is not None]
        tpot, strictest = min(named, default=(float("inf"), ""))
        return cls(scenario.bundle, scenario.run_load, scenario.fleet, tpot, strictest, scenario)

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Micro-batch sizes to choose from, increasing."""
        return tuple(sorted(set(self.fleet.batches or (self.bundle.batch,))))

    @property
    def unit(self) -> tuple[float, str]:
        """Factor from weight x s for a million tokens to what a user pays, and its name."""
        priced = self.bundle.attention_price > 0 and self.bundle.ffn_price > 0
        return (1 / SECONDS_PER_HOUR, "USD") if priced else (1.0, "instance-seconds")

    def kv(self, batch: int) -> float:
        """M B theta + z sqrt(M B) nu, KV tokens for which a worker needs room.                                  (A6)"""
        return ratio.kv_need(self.bundle.sized(1, 1, batch), self.scenario.slot_load, self.fleet.kv_sigmas)

    def cost(self, workers: Floats, servers: Floats, batch: Floats) -> Floats:
        """kappa_c = (x w_A + y w_F) L / (x B), scaled by `unit`: what a million tokens cost per us of cycle.    (A4)"""
        w_a, w_f = self.bundle.weights
        weight = workers * w_a + servers * w_f
        return np.asarray(self.unit[0] * weight * self.bundle.layers / (workers * batch))


@dataclass(frozen=True)
class Shape:
    """A bundle of x workers, y servers and micro-batches of B.

    stages: seconds that a cycle takes at least, by stage; devices: accelerators; kv: tokens that a worker needs room
    for; tokens: tokens/s; cost: of a million tokens, in `RatioData.unit`; tpot: M L tau, s.
    """

    workers: int
    servers: int
    batch: int
    stages: Mapping[str, float]
    devices: int
    kv: float
    tokens: float
    cost: float
    tpot: float

    @property
    def key(self) -> str:
        """Name in the program."""
        return f"{self.workers}A-{self.servers}F-B{self.batch}"

    @property
    def cycle(self) -> float:
        """tau_c, seconds."""
        return max(self.stages.values())


def stage_rows(bundle: Bundle, load: SlotLoad, at: float) -> dict[str, float]:
    """Seconds of a cycle that each stage asks for at A/F ratio `at` in the mean field; their maximum is tau.    (A1)"""
    kv, found = bundle.batch * load.theta, dict[str, float]()
    for row in ratio.rows_at(bundle, at):
        found[row.stage] = max(found.get(row.stage, 0.0), row.constant + row.per_kv * kv)
    return found


def shape(data: RatioData, workers: int, servers: int, batch: int, costs: Costs) -> Shape:
    """A shape with its costs."""
    sized, load = data.bundle.sized(workers, servers, batch), data.scenario.load_at(batch)
    if costs == "barrier":
        stages = {"barrier": barrier.barrier_cycle(sized, load, workers, servers, data.scenario.law_at(batch))}
    else:
        stages = stage_rows(sized, load, workers / servers)
    cycle, layers = max(stages.values()), sized.layers
    return Shape(
        workers,
        servers,
        batch,
        MappingProxyType(stages),
        devices=sized.devices,
        kv=data.kv(batch),
        tokens=workers * batch / (layers * cycle),
        cost=float(data.cost(*np.array([[workers], [servers], [batch]], dtype=float))[0]) * MICRO * cycle,
        tpot=sized.micro_batches * layers * cycle,
    )


Better = Callable[[Any, Any], Any]
"""better(a, b): whether a, one shape or arrays of several, gives as much as b."""


def cheaper(a: Any, b: Any) -> Any:
    """One bundle of a costs no more than one of b."""
    return a.cost <= b.cost


def as_many(a: Any, b: Any) -> Any:
    """floor(d_b / d_a) bundles of a, which have no more devices than one of b, make as many tokens/s."""
    return (b.devices // a.devices) * a.tokens >= b.tokens


def shapes(data: RatioData, costs: Costs, better: Better | None) -> tuple[Shape, ...]:
    """The shapes that the devices allow, but those that another one dominates: some best plan needs none of these.

    Shape a dominates b if it is `better` (None: nothing dominates) and asks for no more KV tokens and TPOT; of more
    than `MANY` shapes only what exceeds the limits is compared. Only coprime (x, y) count: k x workers and k y servers
    cost as much as k bundles of (x, y), and the fullest of more workers is fuller. A cycle with barrier is at least
    that of the mean field, by Jensen's inequality, so that a shape which is dominated even at that bound is left out
    before its cycle is computed.                                               (A16)
    """
    bounds = _bounds(data)
    if better is None:
        return tuple(shape(data, int(x), int(y), int(b), costs) for x, y, b in bounds.sizes)
    least = (0.0, 0.0) if len(bounds.cost) <= MANY else (float(data.bundle.kv_capacity), data.tpot)
    kept: list[Shape] = []
    table: _Table | None = None
    for k in np.lexsort((bounds.devices, bounds.cost)):
        if table is not None and _dominated(table, bounds.row(int(k)), better, least):
            continue
        x, y, b = (int(n) for n in bounds.sizes[k])
        one = shape(data, x, y, b, costs)
        if table is None or not _dominated(table, one, better, least):
            kept.append(one)
            table = _Table.of(kept)
    return tuple(s for i, s in enumerate(kept) if not _dominated(_Table.of(kept[i + 1 :]), s, better, least))


@dataclass(frozen=True)
class _Table:
    """Shapes as arrays of shape (n,), `sizes` of (n, 3)."""

    sizes: Ints
    devices: Ints
    kv: Floats
    tokens: Floats
    cost: Floats
    tpot: Floats

    @classmethod
    def of(cls, known: list[Shape]) -> _Table:
        """Arrays of shapes."""
        columns = {key: np.array([getattr(s, key) for s in known]) for key in ("devices", "kv", "tokens", "cost")}
        return cls(np.zeros((len(known), 3), np.int64), tpot=np.array([s.tpot for s in known]), **columns)

    def row(self, k: int) -> _Table:
        """One row."""
        return replace(self, **{key: value[k] for key, value in vars(self).items()})


def _dominated(table: _Table, one: Any, better: Better, least: tuple[float, float]) -> bool:
    """Whether a row of the table dominates `one`; KV tokens and TPOT below `least` are alike."""
    kv, tpot = least
    lean = (table.kv <= max(one.kv, kv)) & (table.tpot <= max(one.tpot, tpot))
    return bool((lean & better(table, one)).any())


def _bounds(data: RatioData) -> _Table:
    """All coprime sizes that the fleet allows, each with its cycle in the mean field."""
    fleet, bundle = data.fleet, data.bundle
    pairs = [
        (x, y)
        for y in range(1, fleet.most_ffn + 1)
        for x in range(1, fleet.most_attention + 1)
        if gcd(x, y) == 1 and _affordable(data, x, y)
    ]
    x, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    sizes, cycles = [], []
    for batch in data.batches:
        cycles.append(_cycles(bundle.sized(1, 1, batch), data.scenario.load_at(batch), x / y))
        sizes.append(np.column_stack([x, y, np.full(len(x), batch)]))
    size, tau = np.concatenate(sizes), np.concatenate(cycles)
    return _Table(
        sizes=size.astype(np.int64),
        devices=(size[:, :2] @ np.array([bundle.attention_devices, bundle.ffn_devices])).astype(np.int64),
        kv=np.array([data.kv(int(b)) for b in size[:, 2]]),
        tokens=size[:, 0] * size[:, 2] / (bundle.layers * tau),
        cost=data.cost(*size.T) * MICRO * tau,
        tpot=bundle.micro_batches * bundle.layers * tau,
    )


def _cycles(bundle: Bundle, load: SlotLoad, at: Floats) -> Floats:
    """Cycles at A/F ratios `at` in the mean field, shape of `at`; with a measured table as it is, not with its hull."""
    if bundle.ffn_table is not None:
        return np.array([ratio.cycle(bundle, load, float(r)) for r in at])
    a, b = ratio.mean_field(bundle, load)
    return np.asarray((a[:, None] + np.outer(b, at)).max(axis=0))


def _affordable(data: RatioData, x: int, y: int) -> bool:
    """Whether the fleet has devices for it; the smallest shape stays, to tell why there is no plan."""
    devices = x * data.bundle.attention_devices + y * data.bundle.ffn_devices
    return data.fleet.devices is None or devices <= data.fleet.devices or x == y == 1
