"""What theory says of a bundle's A/F ratio: optimum, interval, regime, throughput, what other ratios lose, and why.

A, C and F are the times of Attention, one hop and the FFN in one layer. Whatever is said of the barrier takes the exact
law of the loads (`llmopt.slot_law`), workers independent; of a cold start, in which loads grow together, the mean law.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, get_args

import numpy as np

from llmopt.barrier import barrier_cycle, best_barrier, imbalance, mean_attention
from llmopt.bundle import Bundle, Pipeline
from llmopt.ratio import (
    Optimum,
    Published,
    best_ratio,
    best_whole,
    cycle,
    horizon_load,
    interval,
    kv_need,
    mean_field,
    published,
    regime,
    stage_times,
    throughput,
)
from llmopt.scenario import Scenario
from llmopt.slot_law import SlotLaw
from llmopt.slots import SlotLoad

EXACT = "exact law of the loads"
FAILS = 0.01
"""Loss of throughput above which the published rule is said to fail."""


class Point(NamedTuple):
    """One bundle of the curve: throughput in the mean field and with the barrier, tokens/s per instance.

    loss: the share of the best bundle's throughput per weight, with the barrier, that this one falls short of it.
    """

    workers: int
    mean_field: float
    barrier: float
    loss: float


@dataclass(frozen=True)
class RatioReport:
    """A bundle's A/F ratio in theory.

    ratio, regime: of the bundle, in the mean field; optimum: best real ratio in the mean field (of a measured FFN
    table its hull); whole, barrier: best numbers of workers beside the bundle's FFN servers, in the mean field and with
    the barrier; interval: best ratios at both ends of theta's interval of the given confidence.

    published: the rule of v1 with theta; horizon: with the mean load of a run from empty slots, for geometric outputs;
    published_loss: what the former loses in the mean field, as a real ratio, against the optimum.

    throughput, throughput_mean_field: tokens/s per instance, with and without the barrier; per_dollar: tokens per
    USD, NaN without prices; tpot: s; idle_attention, idle_ffn: shares of time without computing; imbalance: by what
    fraction the fullest worker holds more than the mean one; kv_mean, kv_need: KV tokens of one worker, on average and
    the fleet's kv_sigmas above.

    curve: 1 to most_attention workers beside those servers; semantics: best mean-field ratio under every pipeline and
    number of micro-batches; sentences: what a reader must know of all this.
    """

    bundle: Bundle
    ratio: float
    regime: str
    optimum: Optimum
    whole: int
    barrier: int
    confidence: float
    interval: tuple[float, float]
    published: Published
    horizon: Published
    published_loss: float
    throughput: float
    throughput_mean_field: float
    per_dollar: float
    tpot: float
    idle_attention: float
    idle_ffn: float
    imbalance: float
    kv_mean: float
    kv_need: float
    curve: tuple[Point, ...]
    semantics: dict[str, float]
    sentences: tuple[str, ...] = ()


def ratio_report(scenario: Scenario, bundle: Bundle | None = None, confidence: float = 0.95) -> RatioReport:
    """The report on `bundle`, or on the scenario's bundle with the best number of workers under the barrier.

    Raises
    ------
    ScenarioError
        If the A/F ratio is not the open decision, no ratio is best, or `confidence` is not between 0 and 1.
    """
    fleet, asked = scenario.fleet, bundle or scenario.bundle
    load, law = scenario.load_at(asked.batch), scenario.law_at(asked.batch)
    y = asked.ffn_servers
    barrier = best_barrier(asked, load, fleet.most_attention, y, law)
    sized = asked if bundle else asked.sized(barrier)
    x, optimum, rule = sized.attention_workers, best_ratio(sized, load), published(sized, load.theta)
    waited, average = barrier_cycle(sized, load, x, y, law), cycle(sized, load, sized.ratio)
    mean_horizon = horizon_load(load.mean_prompt, load.mean_decode, sized.batch, scenario.evaluation.requests)
    report = RatioReport(
        bundle=sized,
        ratio=sized.ratio,
        regime=regime(sized, load, sized.ratio),
        optimum=optimum,
        whole=best_whole(sized, load, fleet.most_attention, y),
        barrier=barrier,
        confidence=confidence,
        interval=interval(sized, load, confidence),
        published=rule,
        horizon=published(sized, mean_horizon),
        published_loss=_loss(sized, load, rule.ratio, optimum.ratio),
        throughput=_per_instance(sized, waited, x),
        throughput_mean_field=_per_instance(sized, average, x),
        per_dollar=3600 * _tokens(sized, waited, x) / sized.price if sized.price > 0 else float("nan"),
        tpot=sized.micro_batches * sized.layers * waited,
        idle_attention=1 - mean_attention(sized, load, law) / waited,
        idle_ffn=1 - sized.ffn_time(sized.ratio) / waited,
        imbalance=imbalance(sized, load, x, law),
        kv_mean=kv_need(sized, scenario.slot_load),
        kv_need=kv_need(sized, scenario.slot_load, fleet.kv_sigmas),
        curve=_curve(sized, load, law, fleet.most_attention),
        semantics=semantics(sized, load),
    )
    return replace(report, sentences=tuple(_sentences(report, scenario)))


def semantics(bundle: Bundle, load: SlotLoad) -> dict[str, float]:
    """Best mean-field ratio under every pipeline, by its name and, where it matters, its number M of micro-batches."""
    found = {}
    for pipeline, m in product(get_args(Pipeline), (1, 2, 3, 4)):
        name = pipeline if pipeline == "ideal" else f"{pipeline} M={m}"
        if name not in found:
            found[name] = best_ratio(_played(bundle, pipeline, m), load).ratio
    return found


def _played(bundle: Bundle, pipeline: str, micro_batches: int) -> Bundle:
    """The same stages in another pipeline; validated anew, because a copy would keep the lines of the old one."""
    return Bundle.model_validate(bundle.model_dump() | {"pipeline": pipeline, "micro_batches": micro_batches})


def _curve(bundle: Bundle, load: SlotLoad, law: SlotLaw, most: int) -> tuple[Point, ...]:
    y, workers = bundle.ffn_servers, range(1, most + 1)
    waited = [barrier_cycle(bundle, load, x, y, law) for x in workers]
    value = np.array([throughput(bundle, tau, x, y) for x, tau in zip(workers, waited, strict=True)])
    return tuple(
        Point(x, _per_instance(bundle, cycle(bundle, load, x / y), x), _per_instance(bundle, tau, x), float(loss))
        for x, tau, loss in zip(workers, waited, 1 - value / value.max(), strict=True)
    )


def _tokens(bundle: Bundle, tau: float, workers: int) -> float:
    """Tokens/s of `workers` workers whose cycle lasts `tau` s."""
    return workers * bundle.batch / (bundle.layers * tau)


def _per_instance(bundle: Bundle, tau: float, workers: int) -> float:
    return _tokens(bundle, tau, workers) / (workers + bundle.ffn_servers)


def _loss(bundle: Bundle, load: SlotLoad, ratio: float, best: float) -> float:
    """Share of the mean-field throughput per weight at `best` that `ratio` falls short of; a table's hull counts."""
    a, b = mean_field(bundle, load)
    made, most = (throughput(bundle, float((a + b * r).max()), r) for r in (ratio, best))
    return max(0.0, 1 - made / most)


def _sentences(report: RatioReport, scenario: Scenario) -> Iterator[str]:
    load = scenario.load_at(report.bundle.batch)
    how = "law of the loads averaged over a cold run" if scenario.evaluation.start == "cold" else EXACT
    yield _of_optimum(report, load, scenario.law_at(report.bundle.batch), how)
    yield _of_interval(report, load)
    yield _of_published(report)
    yield from _of_overlap(report)
    if scenario.evaluation.start == "cold":
        requests = scenario.evaluation.requests
        yield (
            f"From empty slots to {requests:,} requests of each micro-batch the published rule, for geometric outputs, "
            f"gives {report.horizon.ratio:.2f}."
        )
    yield _of_memory(report, scenario.fleet.kv_sigmas)


def _of_optimum(report: RatioReport, load: SlotLoad, law: SlotLaw, how: str) -> str:
    """Regime, stage times and the step from the mean field to the barrier."""
    bundle, best = report.bundle, report.optimum
    a, c, f = (1e6 * t for t in stage_times(bundle, load, best.ratio))
    y, fullest = bundle.ffn_servers, max(0.0, imbalance(bundle, load, report.barrier, law))
    return (
        f"In the mean field {best.ratio:.2f} Attention workers per FFN server are best, where the bundle is "
        f"{best.regime} (A = {a:.1f}, C = {c:.1f}, F = {f:.1f} us in a layer); with the barrier, where the "
        f"fullest of {report.barrier} workers holds {fullest:.1%} more than the mean ({how}, workers "
        f"independent), {report.barrier}A-{y}F is best."
    )


def _of_interval(report: RatioReport, load: SlotLoad) -> str:
    theta, (low, high) = f"theta = {load.theta:,.0f} KV tokens a slot", report.interval
    if load.requests == 0:
        return f"{theta} follows from the given length laws without error, so that the ratio has no interval."
    how = f"sums over {load.blocks} blocks of them, since lengths drift" if load.blocks else "their spread"
    return (
        f"{theta} is estimated from {load.requests:,} requests, with a standard error of {load.error:,.1f} from {how}; "
        f"the {report.confidence:.0%} interval of the ratio, {low:.2f} to {high:.2f}, is that of theta."
    )


def _of_published(report: RatioReport) -> str:
    """Where the published rule holds, or why it does not and what is right."""
    bundle, best, loss = report.bundle, report.optimum.ratio, report.published_loss
    rule = f"The published rule, with theta, max{{r_A, r_C, r_peak}} = {report.published.ratio:.2f}"
    if loss <= FAILS and not _hardly_hides(bundle):
        return f"{rule} loses {loss:.2%} in the mean field here."
    why = "; it ".join(_assumptions(bundle))
    return f"{rule} {why}; the optimum is {best:.2f}, and the rule loses {loss:.1%} in the mean field."


def _hardly_hides(bundle: Bundle) -> bool:
    """Whether this is the pipeline that the rule is published for, yet cannot hide transfers at a balanced ratio."""
    return bundle.pipeline == "non-blocking" and bundle.micro_batches == 2


def _assumptions(bundle: Bundle) -> Iterator[str]:
    """What the published rule assumes and this bundle breaks."""
    if bundle.pipeline != "ideal":
        yield f"assumes that a cycle lasts max{{A, C, F}}; {_hidden(bundle)}"
    if bundle.weights[0] != bundle.weights[1]:
        yield "counts a worker like a server; here their prices differ"
    if bundle.transfer_of == "bundle":
        yield "takes a hop of one worker's sequences; here it carries those of all workers of a server"


def _hidden(bundle: Bundle) -> str:
    """When the pipeline hides its transfers: (A + F + 2 C) / M <= the longer of what occupies the devices."""
    m = bundle.micro_batches
    if m == 1:
        return "here one micro-batch is in flight, nothing overlaps, and it lasts A + F + 2 C"
    if bundle.pipeline == "blocking":
        return "here all devices are occupied while they send, and it lasts at least max{A, F} + C"
    busy = "A + C" if bundle.pipeline == "attention-blocking" else "A"
    if m > 2:
        return f"here communication is hidden only if A + F + 2 C <= {m} max{{{busy}, F}}"
    when = "A >= F or F >= A + 2 C" if busy == "A + C" else "|A - F| >= 2 C"
    occupied = "Attention workers are occupied while they send, and " if busy == "A + C" else ""
    return f"here, with 2 micro-batches in flight, {occupied}communication is hidden only if {when}"


def _of_overlap(report: RatioReport) -> Iterator[str]:
    """What an ideal pipeline leaves out."""
    if report.bundle.pipeline == "ideal":
        two, three = (report.semantics[f"non-blocking M={m}"] for m in (2, 3))
        yield (
            "The ideal pipeline assumes that communication is always hidden; played without blocking, the optimum is "
            f"{two:.2f} with 2 micro-batches, where it is hidden only if |A - F| >= 2 C, and {three:.2f} with 3."
        )


def _of_memory(report: RatioReport, sigmas: float) -> str:
    capacity = report.bundle.kv_capacity
    verdict = f"{report.kv_need / capacity:.0%} of its capacity of {capacity:,}"
    if report.kv_need > capacity:
        verdict += ", which is too much; lower batch or micro_batches, or raise kv_capacity"
    return (
        f"In steady state a worker holds {report.kv_mean:,.0f} KV tokens on average and {report.kv_need:,.0f} at "
        f"{sigmas:g} standard deviations more, {verdict}."
    )
