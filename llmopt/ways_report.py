"""Colocated, prefill/decode-disaggregated and AFD serving side by side: at one TPOT limit, under all, and as a map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.output import plain
from llmopt.scenario import Scenario
from llmopt.tables import number
from llmopt.ways import WAYS, Demand, Engine, best_shape, costs, cycles, demand, engines, serial
from llmopt.ways_served import Served, Whole, serve, whole

TIE = 0.01
"""Ways whose figures differ by less are called equal."""
CONTEXTS = (0.125, 8.0, 25)
LIMITS = 64
"""Grid of the map: factors on all prompts (from, to, how many), and TPOT limits."""


@dataclass(frozen=True)
class Check:
    """A way simulated at its chosen point: output tokens/s per device and mean TPOT (s)."""

    way: str
    per_device: float
    tpot: float


@dataclass(frozen=True)
class WaysComparison:
    """The three ways, in the order of `WAYS`.

    limit: the strictest TPOT requirement of the classes, s, inf without one; priced: whether throughput is per USD or
    per device; served: at that limit; whole: most tokens/s in at most fleet.devices accelerators, if that key is given;
    limits (n_limits,), s; curves (3, n_limits): output tokens/s per device, or output tokens per USD, under each limit;
    contexts (n_contexts,): factors on all prompts; value (3, n_contexts, n_limits): the same on the map; checks: what
    was simulated.
    """

    scenario: Scenario
    limit: float
    priced: bool
    ask: Demand
    served: tuple[Served, ...]
    whole: tuple[Whole, ...]
    limits: Floats
    curves: Floats
    contexts: Floats
    value: Floats
    checks: tuple[Check, ...] = field(default=())

    @property
    def unit(self) -> str:
        """What curves and map count."""
        return "output tokens per USD" if self.priced else "output tokens/s per device"

    def figure(self, way: Served) -> float:
        """The objective of one way at the scenario's limit."""
        return 0.0 if way.bundle is None else way.per_dollar if self.priced else way.per_device

    @property
    def ranked(self) -> tuple[Served, ...]:
        """The ways from the best to the worst."""
        return tuple(sorted(self.served, key=self.figure, reverse=True))

    def sentences(self) -> tuple[str, ...]:
        """What follows, in plain sentences."""
        return tuple(_sentences(self))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = []
        for way in self.served:
            shape = way.bundle and {
                key: getattr(way.bundle, key) for key in ("attention_workers", "ffn_servers", "batch")
            }
            names = (
                "way",
                "tokens",
                "tpot",
                "limit",
                "regime",
                "prefill",
                "devices",
                "dollars",
                "per_device",
                "per_dollar",
            )
            rows.append({name: getattr(way, name) for name in names} | (shape or {}) | {"spent": plain(way.spent)})
        keys = ("limit", "priced", "unit", "whole", "limits", "curves", "contexts", "value", "checks")
        return {"ways": rows, "sentences": list(self.sentences())} | {key: plain(getattr(self, key)) for key in keys}


def missing(scenario: Scenario) -> str:
    """Why the ways cannot be compared, in one sentence; empty if they can."""
    bundle = scenario.bundle
    if bundle.colocated is None:
        return "The ways of serving are not compared: that needs [pools.bundle.colocated], with its kv_capacity."
    if not serial(bundle).charges_prompts:
        return "The ways of serving are not compared: that needs prefill coefficients in attention and ffn."
    return ""


def tpot_limit(scenario: Scenario) -> float:
    """The strictest TPOT requirement of all classes, s; inf if there is none."""
    return min((c.tpot for c in scenario.workload.classes if c.tpot is not None), default=inf)


def compare_ways(scenario: Scenario, priced: bool | None = None) -> WaysComparison | None:
    """Derive the comparison; None where `missing` says what it lacks.

    priced: whether to count tokens per USD instead of per device; where all devices have prices if absent. A fleet's
    devices are filled for most tokens/s, whatever they cost.
    """
    if missing(scenario):
        return None
    limit, ask = tpot_limit(scenario), demand(scenario)
    known = engines(scenario, ask, priced)
    served = tuple(serve(engine, ask, limit) for engine in known)
    limits = _limits(known, ask, limit)
    contexts = np.geomspace(*CONTEXTS)
    devices = scenario.fleet.devices
    return WaysComparison(
        scenario=scenario,
        limit=limit,
        priced=known[0].priced,
        ask=ask,
        served=served,
        whole=tuple(whole(e, ask, serial(scenario.bundle), devices, limit) for e in known) if devices else (),
        limits=limits,
        curves=value_under(scenario, 1.0, limits, known[0].priced),
        contexts=contexts,
        value=np.stack([value_under(scenario, float(c), limits, known[0].priced) for c in contexts], axis=1),
    )


def value_under(scenario: Scenario, context: float, limits: Floats, priced: bool) -> Floats:
    """Output tokens/s per device, or per USD, of each way under each TPOT limit (s), shape (3, n_limits); 0: none."""
    ask = demand(scenario, context)
    return np.array([(3600 if priced else 1) / costs(e, ask, limits) for e in engines(scenario, ask, priced)])


def _limits(known: tuple[Engine, ...], ask: Demand, limit: float) -> Floats:
    """TPOT limits from where nothing meets them to where memory alone binds, the scenario's own among them."""
    found = []
    for engine in known:
        for one in engine.variants:
            x, y = one.shapes[0]
            found.append(one.bundle.micro_batches * one.bundle.layers * float(cycles(one, ask, x, y, np.ones(1))[0]))
        largest = best_shape(engine, ask)
        found += [largest[0].micro_batches * largest[0].layers * largest[1]] if largest else []
    low, high = 0.85 * min(found), 1.25 * max(found)
    inside = [limit] if low / 2 < limit < 2 * high else []
    return np.unique(np.concatenate([np.geomspace(min([low, *inside]), max([high, *inside]), LIMITS), inside]))


def _sentences(ways: WaysComparison) -> Iterator[str]:
    best, *rest = ways.ranked
    under = f" at a TPOT of at most {number(1e3 * ways.limit)} ms" if isfinite(ways.limit) else " without a TPOT limit"
    if best.bundle is None:
        yield f"None of the ways serves this{under}: {'; '.join(f'{w.way}: {w.limit}' for w in ways.served)}."
        return
    others = ", ".join(f"{_than(ways, best, w)} {w.way}" for w in rest)
    yield f"{best.way} makes {number(ways.figure(best), 4)} {ways.unit}{under}: {others}."
    yield from _account(ways)
    yield from _ranges(ways)
    yield (
        "Moving KV caches from prefill to decode devices is charged to neither PD nor AFD; prompts that are mixed into "
        "decode steps are spread evenly over them."
    )


def _than(ways: WaysComparison, best: Served, other: Served) -> str:
    if other.bundle is None:
        return f"nothing by ({other.limit})"
    gain = ways.figure(best) / ways.figure(other) - 1
    return f"as much within 1 % as {number(ways.figure(other), 4)} of" if gain < TIE else f"{gain:.0%} more than"


def _account(ways: WaysComparison) -> Iterator[str]:
    """Why AFD gains on PD, or does not: what it saves on fixed times against what its roles wait."""
    _, pd, afd = ways.served
    if pd.spent is None or afd.spent is None or pd.bundle is None or afd.bundle is None:
        return
    saved, waits = pd.spent.fixed - afd.spent.fixed, afd.spent.waiting - pd.spent.waiting
    work = afd.spent.work - pd.spent.work
    also = f", {_more(work)} working" if abs(work) > TIE * pd.spent.total else ""
    sizes = (afd.bundle.ratio * afd.bundle.batch, pd.bundle.batch * pd.bundle.attention_workers)
    yield (
        f"An FFN server of AFD reads its weights once for {number(sizes[0])} tokens, a group of PD for "
        f"{number(sizes[1])}: per token AFD spends {_more(-saved)} on fixed time, {_more(waits)} waiting{also}, in "
        "device time."
    )


def _more(seconds: float) -> str:
    """`3.1 us more`, `3.1 us less`."""
    return f"{number(1e6 * abs(seconds))} us {'more' if seconds >= 0 else 'less'}"


def _ranges(ways: WaysComparison) -> Iterator[str]:
    """Which way wins under which TPOT limit."""
    runs: list[tuple[str, float, float]] = []
    for limit, column in zip(ways.limits, ways.curves.T, strict=True):
        if column.max() <= 0:
            continue
        close = [WAYS[k] for k in range(3) if column[k] >= column.max() * (1 - TIE)]
        name = " and ".join(close)
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], limit)
        else:
            runs.append((name, limit, limit))
    parts = [f"{name} from {number(1e3 * low)} ms" for name, low, _ in runs]
    if parts:
        lowest = number(1e3 * runs[0][1])
        yield f"Best by the TPOT limit, within 1 %: {', '.join(parts)}; below {lowest} ms none serves."
