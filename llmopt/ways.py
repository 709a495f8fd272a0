"""Three ways of serving one model on the same devices: colocated, prefill/decode-disaggregated (PD), and AFD.

All three are derived from the same stage times A, C, F of one layer, and each takes the largest batch that a TPOT limit
T and its KV memory allow; AFD also chooses its ratio and how many of its micro-batches are in flight. Per layer

    colocated   a group of u workers' devices attends and then computes the FFN of u b tokens, b (1 + E[P]/E[D]) of
                them a worker and step, since prompts are mixed into the decode steps: tau = A(b) + F(u b) + 2 C,
    PD          the same without prompts, and prefill devices in the proportion of their work,
    AFD         x workers and y servers, tau by the pipeline of the bundle, and the same prefill devices as PD.

The fullest of a group's workers decides, as everywhere (`llmopt.barrier`). With tokens/s  x B / (L tau)  of x w_A +
y w_F units of weight (devices, or USD/hour), the weight-seconds of one output token are

    L tau (x w_A + y w_F) / (x B) + (prefill weight-seconds of a request) / E[D],

and the way with the least of them wins. Every one is non-increasing in b or B for max-affine stages, so that either
memory or T binds; times in a measured table may leap, so that smaller batches are tried too. When AFD wins:
docs/afd_ways.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, inf, nan, sqrt
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import BUDGET, Bundle
from llmopt.hardware import Piece, StepTime
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad, request_means
from llmopt.workload import RequestClass

WAYS = ("colocated", "PD", "AFD")
STRATA, FINE = 32, 64
"""Equally likely parts of the law of the fullest load, each represented by its mean over FINE points."""
GRID = 48
"""Batch sizes at which a cycle is computed; in between it is interpolated."""


@dataclass(frozen=True)
class Demand:
    """What requests ask for: means of prompt P, of decode steps D, of prefill pairs P^2 / 2, and the load of a slot.

    largest: tokens of the largest request; kv_sigmas: margin of KV memory in standard deviations.
    """

    prompt: float
    pairs: float
    decode: float
    theta: float
    deviation: float
    largest: int
    kv_sigmas: float

    @property
    def load(self) -> SlotLoad:
        """The load as the theory of ratios takes it."""
        return SlotLoad(self.theta, self.deviation**2, self.prompt, self.decode)


class Unit(NamedTuple):
    """What one Attention worker, one FFN server and one prefill worker count for: devices, or USD/hour."""

    worker: float
    server: float
    prefill: float


@dataclass(frozen=True)
class Engine:
    """What one way decodes on: bundles of `bundle`'s stages, or colocated groups, which are bundles of one micro-batch.

    shapes: pairs (x, y) to choose from; mixed: whether prompts are computed in the decode steps; prefill: seconds that
    one worker's devices of a prefill group spend on a request, 0 where prompts are mixed; priced: whether USD/hour are
    to be saved, or devices.
    """

    way: str
    bundle: Bundle
    shapes: tuple[tuple[int, int], ...]
    mixed: bool
    prefill: float
    devices: Unit
    dollars: Unit
    priced: bool

    @property
    def variants(self) -> tuple[Engine, ...]:
        """The engine with every number of micro-batches up to its own, which an ideal pipeline does not tell apart."""
        most = self.bundle.micro_batches
        if self.bundle.pipeline == "ideal":
            return (self,)
        return tuple(
            replace(self, bundle=self.bundle.model_copy(update={"micro_batches": m})) for m in range(1, most + 1)
        )

    @property
    def unit(self) -> Unit:
        """The objective's."""
        return self.dollars if self.priced else self.devices

    def cost(self, ask: Demand, x: int, y: int, tokens: Floats | float, unit: Unit | None = None) -> Floats | float:
        """Weight-seconds of an output token where a bundle or group makes `tokens` tokens/s, prefill included."""
        of = unit or self.unit
        return (x * of.worker + y * of.server) / tokens + of.prefill * self.prefill / ask.decode


def demand(scenario: Scenario, context: float = 1.0) -> Demand:
    """The demand with all prompts `context` times as long; theta and nu as in `llmopt.slots`."""
    workload, first = scenario.workload, scenario.pools[0].first_step
    shares = workload.rates / workload.rates.sum()
    prompt, decode, area, square = shares @ np.array([request_means(c, first, context) for c in workload.classes])
    pairs = context**2 / 2 * (shares @ [c.expect(np.square, np.ones_like) for c in workload.classes])
    theta = area / decode
    return Demand(
        prompt=float(prompt),
        pairs=float(pairs),
        decode=float(decode),
        theta=float(theta),
        deviation=sqrt(max(0.0, float(square / decode - theta**2))),
        largest=max(_largest(c, context) for c in workload.classes),
        kv_sigmas=scenario.fleet.kv_sigmas,
    )


def _largest(cls: RequestClass, context: float) -> int:
    if cls.pairs is not None:
        return int((context * cls.pairs.prompt + cls.pairs.output).max())
    return int(context * cls.prompt.largest) + cls.output.largest


def serial(bundle: Bundle) -> Bundle:
    """The colocated group as a bundle: one micro-batch, so that its stages follow each other, and its own stages."""
    group = bundle.colocated
    assert group is not None
    return bundle.model_copy(
        update={
            "attention": group.attention or bundle.attention,
            "ffn": group.ffn or bundle.ffn,
            "ffn_table": None if group.ffn else bundle.ffn_table,
            "transfer": (group.transfer or bundle.transfer) if group.exchange else (Piece(),),
            "micro_batches": 1,
            "pipeline": "non-blocking",
            "attention_workers": bundle.group_workers,
            "ffn_servers": 1,
            "kv_capacity": group.kv_capacity,
            "attention_price": bundle.attention_price if group.price is None else group.price,
            "ffn_price": 0.0,
            "colocated": None,
        }
    )


def engines(scenario: Scenario, ask: Demand, priced: bool | None = None) -> tuple[Engine, ...]:
    """Colocated groups, PD's decode groups and AFD's bundles, in the order of `WAYS`.

    priced: whether to weigh by USD/hour instead of devices; where all have prices if absent.
    """
    bundle, group, fleet = scenario.bundle, serial(scenario.bundle), scenario.fleet
    prices = Unit(bundle.attention_price, bundle.ffn_price, group.attention_price)
    by_price = min(prices) > 0 if priced is None else priced
    devices = Unit(bundle.attention_devices, bundle.ffn_devices, group.attention_devices)
    # The devices of a group hold no FFN server of their own.
    own_devices, own_prices = (Unit(unit.prefill, 0.0, unit.prefill) for unit in (devices, prices))
    seconds, u = prefill_seconds(group, ask), ((group.attention_workers, 1),)
    sizes = ((x, y) for y in range(1, fleet.most_ffn + 1) for x in range(1, fleet.most_attention + 1))
    shapes = tuple((x, y) for x, y in sizes if gcd(x, y) == 1)  # twice the bundle only has the larger barrier
    return (
        Engine("colocated", group, u, True, 0.0, own_devices, own_prices, by_price),
        Engine("PD", group, u, False, seconds, own_devices, own_prices, by_price),
        Engine("AFD", bundle, shapes, False, seconds, devices, prices, by_price),
    )


def prefill_seconds(group: Bundle, ask: Demand) -> float:
    """Seconds that one worker's devices of a prefill group spend on a request: steps of `BUDGET` prompt tokens each."""
    requests = BUDGET / ask.prompt
    a, c, f = _stages(group, group.attention_workers, np.zeros(1), np.zeros((1, 1)), BUDGET, requests * ask.pairs)
    return float(group.layers * (a[0, 0] + f[0] + 2 * c[0]) / requests)


def cycles(engine: Engine, ask: Demand, x: int, y: int, batch: Floats) -> Floats:
    """Mean seconds of a cycle at micro-batch sizes `batch`, shape (n,), with x workers, the fullest of which decides.

    As in `llmopt.barrier` a worker is slowed by the mean of its M loads, the pipeline by the fullest of all M x; both
    are taken at equal quantiles, represented by means over equally likely parts of their laws.
    """
    bundle, ideal = engine.bundle, engine.bundle.pipeline == "ideal"
    m = 1 if ideal else bundle.micro_batches
    requests = batch / ask.decode if engine.mixed else np.zeros_like(batch)
    prompts = (requests * ask.prompt, requests * ask.pairs)
    own, c, f = _stages(bundle, x / y, batch, _loads(ask, batch, batch / m, x), *prompts)
    if ideal:
        return np.asarray(np.maximum(own, np.maximum(c, f)[:, None]).mean(axis=1))
    any_of, _, _ = _stages(bundle, x / y, batch, _loads(ask, batch, batch, m * x), *prompts)
    own += c[:, None] if bundle.pipeline in ("attention-blocking", "blocking") else 0.0
    server = f + c if bundle.pipeline == "blocking" else f
    through = (any_of + (f + 2 * c)[:, None]) / m
    return np.asarray(np.maximum(np.maximum(own, server[:, None]), through).mean(axis=1))


def _loads(ask: Demand, batch: Floats, averaged: Floats, n: int) -> Floats:
    """KV tokens of the fullest of n loads of mean B theta and variance `averaged` nu^2, shape (n, STRATA)."""
    kv = batch[:, None] * ask.theta + np.sqrt(averaged)[:, None] * ask.deviation * _largest_normals(n)
    return np.maximum(kv, 0.0)


def busy(engine: Engine, ask: Demand, ratio: float, batch: float, mixed: bool) -> tuple[float, float]:
    """Mean seconds that a worker and a server compute in a cycle; a batch of 0 tells what stages take at least."""
    b, requests = np.array([batch]), batch / ask.decode if mixed and engine.mixed else 0.0
    a, _, f = _stages(engine.bundle, ratio, b, _loads(ask, b, b, 1), requests * ask.prompt, requests * ask.pairs)
    return float(a.mean()), float(f[0])


def _stages(
    bundle: Bundle, ratio: float, batch: Floats, kv: Floats, prompt: Floats | float, pairs: Floats | float
) -> tuple[Floats, Floats, Floats]:
    """Seconds of Attention, shape of `kv` (n, k), of one hop and of FFN, shape (n,); all arguments of one worker."""
    base = np.column_stack(np.broadcast_arrays(1.0, prompt, batch, 0.0, pairs))
    attention = StepTime.from_pieces(bundle.attention).coefficients
    a = (base @ attention.T)[:, None, :] + kv[:, :, None] * attention[:, 3]
    hop = base * [1.0, *[ratio if bundle.transfer_of == "bundle" else 1.0] * 4]
    c = (hop @ StepTime.from_pieces(bundle.transfer).coefficients.T).max(axis=1)
    served = base * [1.0, *[ratio] * 4]
    if bundle.ffn_table is not None:
        f = np.array([bundle.ffn_table(float(row[1] + row[2])) for row in served])
    else:
        f = (served @ StepTime.from_pieces(bundle.ffn).coefficients.T).max(axis=1)
    return a.max(axis=2), c, f


@lru_cache(maxsize=1024)
def _largest_normals(n: int) -> Floats:
    """Means of the largest of n standard normals over `STRATA` equally likely parts of its law, shape (STRATA,)."""
    from scipy.special import ndtri

    u = (np.arange(STRATA * FINE) + 0.5) / (STRATA * FINE)
    return np.asarray(ndtri(u ** (1.0 / n)).reshape(STRATA, FINE).mean(axis=1))


def most_batch(engine: Engine, ask: Demand) -> float:
    """The largest B, not rounded, with  n theta + z sqrt(n) nu <= KV capacity  for the n = M B sequences of a worker.

    Where prompts are computed in decode steps, those of one step are held too. 0 if the largest request does not fit.
    """
    capacity = engine.bundle.kv_capacity
    if ask.largest > capacity:
        return 0.0
    each = ask.theta + (ask.prompt / ask.decode if engine.mixed else 0.0)
    spread = ask.kv_sigmas * ask.deviation
    root = (sqrt(spread**2 + 4 * each * capacity) - spread) / (2 * each)
    return root**2 / engine.bundle.micro_batches


def costs(engine: Engine, ask: Demand, limits: Floats) -> Floats:
    """Least weight-seconds of one output token under TPOT limits (s) of shape (n,); batches need not be whole here.

    inf where nothing fits.
    """
    best = np.full(len(limits), inf)
    for one in engine.variants:
        for x, y in one.shapes:
            best = np.fmin(best, _costs_of(one, ask, x, y, np.asarray(limits)))
    return best


def _costs_of(engine: Engine, ask: Demand, x: int, y: int, limits: Floats) -> Floats:
    batch, cycle = _curve(engine, ask, x, y)
    if not len(batch):
        return np.full(len(limits), nan)
    layers = engine.bundle.layers
    allowed = limits / (engine.bundle.micro_batches * layers)
    largest = np.interp(allowed, cycle, batch, left=nan)
    each = largest / np.minimum(allowed, cycle[-1])
    smaller = np.maximum.accumulate(batch / cycle)[np.searchsorted(cycle, allowed, side="right") - 1]
    return np.asarray(engine.cost(ask, x, y, x * np.maximum(each, smaller) / layers))


def _curve(engine: Engine, ask: Demand, x: int, y: int) -> tuple[Floats, Floats]:
    """Batch sizes from 1 to the largest that memory allows, and their cycles, shapes (GRID,); empty where none fits."""
    most = most_batch(engine, ask)
    if most < 1:
        return np.zeros(0), np.zeros(0)
    batch = np.geomspace(1.0, most, GRID)
    return batch, np.maximum.accumulate(cycles(engine, ask, x, y, batch))


def best_shape(engine: Engine, ask: Demand, limit: float = inf) -> tuple[Bundle, float] | None:
    """The bundle or group of least weight-seconds under a TPOT limit (s), B whole, and its cycle in s, if any."""

    def cost(chosen: tuple[Bundle, float]) -> float:
        bundle, cycle = chosen
        return float(engine.cost(ask, bundle.attention_workers, bundle.ffn_servers, tokens_of(bundle, cycle)))

    return min(candidates(engine, ask, limit), key=cost, default=None)


def candidates(engine: Engine, ask: Demand, limit: float) -> Iterator[tuple[Bundle, float]]:
    """Every shape at its best whole batch under a TPOT limit (s), and its cycle in s; small ones first."""
    for one in engine.variants:
        for x, y in one.shapes:
            batch, cycle = whole_batch(one, ask, x, y, limit)
            if batch:
                yield one.bundle.sized(x, y, batch), cycle


def tokens_of(bundle: Bundle, cycle: float) -> float:
    """Output tokens/s of a bundle or group with cycles of `cycle` s."""
    return bundle.attention_workers * bundle.batch / (bundle.layers * cycle)


def whole_batch(engine: Engine, ask: Demand, x: int, y: int, limit: float) -> tuple[int, float]:
    """The best whole B that memory and the limit allow, and its cycle (s); (0, inf) if none is."""
    most = int(most_batch(engine, ask) + 1e-9)
    rounds = engine.bundle.micro_batches * engine.bundle.layers

    def cycle(b: int) -> float:
        return float(cycles(engine, ask, x, y, np.array([float(b)]))[0])

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cycle(middle) * rounds <= limit else (low, middle - 1)
    if low and engine.bundle.ffn_table is not None:
        sizes = np.arange(1.0, low + 1)
        low = int(sizes[(cycles(engine, ask, x, y, sizes) / sizes).argmin()])
    return (low, cycle(low)) if low else (0, inf)
