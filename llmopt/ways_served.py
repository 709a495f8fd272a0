"""One way of serving at its best batch: figures, the account of its device time, and whole devices.

For stages that are affine in a batch, on like devices and with hidden transfers, the device-seconds of a decoded token
are, per layer, with alpha_0 + alpha B of Attention and phi_0 + phi n of FFN for n tokens,

    PD    alpha_0 / b + alpha + phi_0 / b + phi,
    AFD   alpha_0 / B + alpha + phi_0 / (r B) + phi + (tau - A) / B + (tau - F) / (r B),

so that AFD wins exactly if reading weights once for B and r B instead of b tokens saves more than its roles idle:

    alpha_0 (1/b - 1/B) + phi_0 (1/b - 1/(r B))  >  (tau - A) / B + (tau - F) / (r B).

`Spent` is this account for any stages, transfers and barriers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nan

import numpy as np

from llmopt.bundle import Bundle
from llmopt.ratio import regime
from llmopt.ways import Demand, Engine, best_shape, busy, candidates, cycles, most_batch, tokens_of


@dataclass(frozen=True)
class Spent:
    """Where the device-seconds of one output token go.

    fixed: what stages take however small the batch (weights are read, kernels start); work: the rest of the time they
    compute for decode; prefill: prompts, wherever; waiting: devices idle at barriers, in transfers or in the other
    role's time.
    """

    fixed: float
    work: float
    prefill: float
    waiting: float

    @property
    def total(self) -> float:
        """All of it, one over the tokens/s per device."""
        return self.fixed + self.work + self.prefill + self.waiting


@dataclass(frozen=True)
class Served:
    """One way at its best whole batch and shape under a TPOT limit.

    bundle: with its workers, servers and batch (a colocated group is one of one micro-batch), None where nothing fits
    and `limit` says why; tokens: output tokens/s of one bundle or group; tpot: s; limit: what keeps the batch from
    growing; regime: the stages that bind; prefill: prefill workers' worth of devices it takes; devices, dollars:
    accelerators and USD/hour with them.
    """

    way: str
    bundle: Bundle | None = None
    tokens: float = 0.0
    tpot: float = nan
    limit: str = ""
    regime: str = ""
    prefill: float = 0.0
    devices: float = nan
    dollars: float = nan
    spent: Spent | None = None

    @property
    def per_device(self) -> float:
        """Output tokens/s per accelerator, prefill devices included."""
        return self.tokens / self.devices if self.bundle else 0.0

    @property
    def per_dollar(self) -> float:
        """Output tokens per USD; nan without prices."""
        return 3600 * self.tokens / self.dollars if self.bundle and self.dollars > 0 else nan


@dataclass(frozen=True)
class Whole:
    """A way in whole devices: `units` of `bundle` and `prefill` prefill groups make `tokens` output tokens/s."""

    bundle: Bundle | None = None
    units: int = 0
    prefill: int = 0
    devices: int = 0
    tokens: float = 0.0


def serve(engine: Engine, ask: Demand, limit: float = inf) -> Served:
    """A way at its best whole batch and shape under a TPOT limit (s)."""
    chosen = best_shape(engine, ask, limit)
    if chosen is None:
        return Served(engine.way, limit=_why(engine, ask))
    bundle, cycle = chosen
    x, y = bundle.attention_workers, bundle.ffn_servers
    tokens = tokens_of(bundle, cycle)
    return Served(
        way=engine.way,
        bundle=bundle,
        tokens=tokens,
        tpot=bundle.micro_batches * bundle.layers * cycle,
        limit=_binds(replace(engine, bundle=bundle), ask, limit),
        regime=regime(bundle, ask.load, x / y) if engine.way == "AFD" else "in turn",
        prefill=tokens / ask.decode * engine.prefill,
        devices=tokens * float(engine.cost(ask, x, y, tokens, engine.devices)),
        dollars=tokens * float(engine.cost(ask, x, y, tokens, engine.dollars)),
        spent=_spent(engine, ask, bundle, cycle),
    )


def _binds(engine: Engine, ask: Demand, limit: float) -> str:
    """Why the engine's bundle has no larger batch."""
    bundle, more = engine.bundle, engine.bundle.batch + 1
    if more > most_batch(engine, ask):
        return "KV memory"
    cycle = cycles(engine, ask, bundle.attention_workers, bundle.ffn_servers, np.array([float(more)]))[0]
    return "TPOT limit" if cycle * bundle.micro_batches * bundle.layers > limit else "FFN times"


def _why(engine: Engine, ask: Demand) -> str:
    if ask.largest > engine.bundle.kv_capacity:
        return "the largest request exceeds its KV memory"
    return "KV memory holds no batch" if most_batch(engine, ask) < 1 else "no batch is fast enough"


def _spent(engine: Engine, ask: Demand, bundle: Bundle, cycle: float) -> Spent:
    """The account of a cycle, in device-seconds of a token."""
    x, y, unit, grouped = bundle.attention_workers, bundle.ffn_servers, engine.devices, engine.way != "AFD"
    # In a group the workers' own devices compute the FFN, all of them at once.
    ffn_devices = x * unit.worker if grouped else y * unit.server
    scale = bundle.layers / (x * bundle.batch)

    def computing(batch: float, mixed: bool) -> float:
        a, f = busy(engine, ask, x / y, batch, mixed)
        return scale * (x * unit.worker * a + ffn_devices * f)

    devices = x * unit.worker + y * unit.server
    fixed, decode, all_of_it = computing(0.0, False), computing(bundle.batch, False), computing(bundle.batch, True)
    prefill = engine.prefill * unit.prefill / ask.decode
    return Spent(fixed, decode - fixed, all_of_it - decode + prefill, scale * devices * cycle - all_of_it)


def whole(engine: Engine, ask: Demand, group: Bundle, devices: int, limit: float = inf) -> Whole:
    """The way with most tokens/s in at most `devices` accelerators under a TPOT limit (s), over all of its shapes.

    group: a prefill group, of which there is a whole number too.
    """
    best = Whole()
    for bundle, cycle in candidates(engine, ask, limit):
        best = max(best, _whole(engine, ask, group, devices, bundle, tokens_of(bundle, cycle)), key=_worth)
    return best


def _worth(found: Whole) -> tuple[float, int]:
    """More tokens/s, then fewer devices; figures that differ by rounding count as equal."""
    return float(f"{found.tokens:.9g}"), -found.devices


def _whole(engine: Engine, ask: Demand, group: Bundle, devices: int, bundle: Bundle, each: float) -> Whole:
    """The best division where every bundle makes `each` tokens/s."""
    unit = round(bundle.attention_workers * engine.devices.worker + bundle.ffn_servers * engine.devices.server)
    prefill_unit, best = group.attention_workers * group.attention_devices, Whole()
    for units in range(1, devices // unit + 1):
        tokens, groups = units * each, 0
        if engine.prefill:
            groups = min((devices - units * unit) // prefill_unit, _groups(tokens, group, engine, ask))
            tokens = min(tokens, groups * group.attention_workers * ask.decode / engine.prefill)
        best = max(best, Whole(bundle, units, groups, units * unit + groups * prefill_unit, tokens), key=_worth)
    return best


def _groups(tokens: float, group: Bundle, engine: Engine, ask: Demand) -> int:
    """Prefill groups that keep up with `tokens` output tokens/s."""
    return int(np.ceil(tokens / ask.decode * engine.prefill / group.attention_workers - 1e-9))
