"""The A/F ratio of a bundle in closed form: cycle rows, regimes, mean-field optimum, intervals, the published rule.

With r = x / y Attention workers per FFN server a cycle lasts tau(r) = max_i (a_i + b_i r) seconds in the mean field,
where every worker holds its mean load, and the bundle makes  Thr = x B / ((x w_A + y w_F) L tau)  tokens/s per unit of
weight. Hence 1 / Thr ~ (w_A + w_F / r) tau(r) = max_i (w_A a_i + w_F b_i + w_A b_i r + w_F a_i / r).

Lemma. For a_i, b_i >= 0 this is convex in r > 0: every term is (a constant, a multiple of r, a multiple of 1 / r, none
of the multiples negative), and so is a maximum of convex functions. Therefore (1) its minimum lies where two rows meet
or where one of them is stationary, at r = sqrt(a_i w_F / (b_i w_A)); and (2) with y servers the best whole x is the
floor or the ceiling of r y, at least 1: to the left of a minimum a convex function does not increase, so that of all
whole numbers there the largest is best, and to the right the smallest. A limit on x only clips it.

With tau = max{A, C, F} and equal weights (1) is Theorem 4.4 of Song et al., arXiv 2601.21351 v1, and the rule of its
versions 2 to 4; other pipelines, pieces, transfers of the whole bundle and prices are generalisations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import PolicyError, ScenarioError
from llmopt.hardware import StepTime
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad

BOUND = {"attention": "Attention-bound", "transfer": "transfer-bound", "ffn": "FFN-bound", "pipeline": "pipeline-bound"}
"""How the regimes are called in which a stage decides the cycle."""


class Row(NamedTuple):
    """One row of the cycle: tau >= constant + per_ratio * r + per_kv * T, in s; T: KV tokens of the fullest worker."""

    stage: str
    constant: float
    per_ratio: float
    per_kv: float


@dataclass(frozen=True)
class Optimum:
    """The best ratio: `ratio` (workers per server), `cycle` (s of a layer), `regime` (the stages that bind there)."""

    ratio: float
    cycle: float
    regime: str


class Published(NamedTuple):
    """The rule of v1, Theorem 4.4: `ratio` = max{r_attention, r_transfer, r_peak}, workers per server.

    At r_attention and r_transfer the FFN time has grown to the Attention and the transfer time (negative or 0 if it
    exceeds them anyway); r_peak is the best ratio where the FFN alone decides.
    """

    r_attention: float
    r_transfer: float
    r_peak: float
    ratio: float


def kept_bundle(scenario: Scenario, policy: str) -> Bundle:
    """The bundle as given, for policies that choose its workers alone.

    Raises
    ------
    PolicyError
        If the given micro-batches, where the fleet has other sizes to choose from, hold too much on average.
    """
    bundle = scenario.bundle
    need = kv_need(bundle, scenario.slot_load)
    if need > bundle.kv_capacity:
        raise PolicyError(
            f"policy {policy!r} keeps batch = {bundle.batch}, with which a worker holds {need:.0f} KV tokens on "
            f"average, more than its {bundle.kv_capacity}; lower batch in [pools.bundle], or take afd-fleet, which "
            "chooses it"
        )
    return bundle


def cycle_rows(bundle: Bundle) -> tuple[Row, ...]:
    """The rows of the bundle's cycle at its micro-batch size B: of an Attention worker's stage, of an FFN server's."""
    b = bundle.batch
    return tuple(
        Row(
            line.stage,
            float(line.worker[0] + line.server[0] + b * line.worker[2]),
            float(b * line.server[2]),
            float(line.worker[3]),
        )
        for line in bundle.lines
    )


def mean_field(bundle: Bundle, load: SlotLoad) -> tuple[Floats, Floats]:
    """Intercepts a_i (s) and slopes b_i (s per unit of r) of tau(r), arrays of shape (n_rows,)."""
    kv = bundle.batch * load.theta
    rows = cycle_rows(bundle)
    return (
        np.array([row.constant + row.per_kv * kv for row in rows]),
        np.array([row.per_ratio for row in rows]),
    )


def rows_at(bundle: Bundle, ratio: float) -> tuple[Row, ...]:
    """The rows of the cycle at A/F ratio `ratio`, where tau depends on T alone; a measured FFN table is used as it is.

    One row for each piece of the Attention stage and one for every other stage, by the law of the pipeline
    (`Bundle.lines`).
    """
    c, f, pieces = bundle.transfer_time(ratio), bundle.ffn_time(ratio), StepTime.from_pieces(bundle.attention)
    attention = [(float(p[0] + p[2] * bundle.batch), float(p[3])) for p in pieces.coefficients]
    sends = c if bundle.pipeline in ("attention-blocking", "blocking") else 0.0
    own = [Row("attention", a + sends, 0.0, kv) for a, kv in attention]
    if bundle.pipeline == "ideal":
        return (*own, Row("transfer", c, 0.0, 0.0), Row("ffn", f, 0.0, 0.0))
    m = bundle.micro_batches
    ffn = Row("ffn", f + c if bundle.pipeline == "blocking" else f, 0.0, 0.0)
    return (*own, ffn, *(Row("pipeline", (a + f + 2 * c) / m, 0.0, kv / m) for a, kv in attention))


def cycle(bundle: Bundle, load: SlotLoad, ratio: float) -> float:
    """tau(r) in s, in the mean field; a measured FFN table is used as it is, not its hull."""
    kv = bundle.batch * load.theta
    return max(row.constant + row.per_kv * kv for row in rows_at(bundle, ratio))


def regime(bundle: Bundle, load: SlotLoad, ratio: float) -> str:
    """What decides the mean-field cycle at `ratio`, as in `BOUND`; joined by "and" where several do."""
    kv = bundle.batch * load.theta
    times = [(row.constant + row.per_kv * kv, row.stage) for row in rows_at(bundle, ratio)]
    longest = max(times)[0]
    binding = {stage for seconds, stage in times if seconds >= longest * (1 - 1e-9)}
    return " and ".join(name for stage, name in BOUND.items() if stage in binding)


def stage_times(bundle: Bundle, load: SlotLoad, ratio: float) -> tuple[float, float, float]:
    """Mean seconds of Attention, one hop and FFN in one layer."""
    kv = bundle.batch * load.theta
    return float(bundle.attention_time(kv)), bundle.transfer_time(ratio), bundle.ffn_time(ratio)


def throughput(bundle: Bundle, cycle_s: float, workers: float, servers: float = 1) -> float:
    """Tokens/s per unit of weight, x B / ((x w_A + y w_F) L tau), with a cycle of `cycle_s` s per layer.

    The weights are the prices (then it is tokens/s per USD/hour) or one each (tokens/s per instance): `Bundle.weights`.
    """
    worker, server = bundle.weights
    return workers * bundle.batch / ((workers * worker + servers * server) * bundle.layers * cycle_s)


def best_ratio(bundle: Bundle, load: SlotLoad) -> Optimum:
    """The ratio of largest mean-field throughput, as a real number; of a measured FFN table its hull is used.

    Raises
    ------
    ScenarioError
        If no ratio is best: more workers per server are always better, or fewer.
    """
    rows = mean_field(bundle, load)
    ratio = _minimiser(*rows, bundle.weights)
    if math.isinf(ratio):
        raise ScenarioError(
            "neither the FFN nor the transfer of this bundle takes longer for more tokens, so that in the "
            "mean field more Attention workers per server are always better; give ffn a decode coefficient"
        )
    if ratio == 0:
        raise ScenarioError(
            "the Attention stage of this bundle takes no time to decode, so that fewer workers per server are always "
            "better; give attention a base, decode or kv coefficient"
        )
    return Optimum(ratio, float((rows[0] + rows[1] * ratio).max()), _regime_of_rows(bundle, load, ratio))


def best_whole(bundle: Bundle, load: SlotLoad, most: int, servers: int = 1) -> int:
    """The whole number of Attention workers, 1 to `most`, of largest mean-field throughput beside `servers` servers.

    The floor or the ceiling of the best ratio times `servers` (lemma above); with a measured FFN table all numbers are
    tried, with its own times. Of equally good ones it is the smallest.
    """
    if bundle.ffn_table is not None:
        tried = range(1, most + 1)
    else:
        exact = min(_minimiser(*mean_field(bundle, load), bundle.weights) * servers, float(most))
        tried = range(max(1, math.floor(exact)), max(1, math.ceil(exact)) + 1)
    made = [throughput(bundle, cycle(bundle, load, x / servers), x, servers) for x in tried]
    return tried[int(np.argmax(np.array(made) >= max(made) * (1 - 1e-12)))]


def horizon_load(mean_prompt: float, mean_decode: float, batch: int, requests: int | None) -> float:
    """Mean KV tokens of a slot over a run from empty slots to `requests` finished ones; None: an endless run.

    v1, Proposition 4.3, for geometric decode lengths: with p = 1 / mean_decode, m = (1 - p) / p and K = requests /
    (B p) steps it is  mean_prompt + m (1 - (1 - (1 - p)^K) / (K p)).
    """
    if requests is None or mean_decode <= 1:
        return mean_prompt + max(0.0, mean_decode - 1)
    p, steps = 1 / mean_decode, requests * mean_decode / batch
    missing = -math.expm1(steps * math.log1p(-p)) / (steps * p)
    return mean_prompt + (mean_decode - 1) * (1 - missing)


def published(bundle: Bundle, per_slot: float) -> Published:
    """The rule max{r_A, r_C, r_peak} of v1, Theorem 4.4, with `per_slot` KV tokens in a slot.

    It assumes the cycle max{A, C, F}, a hop of one worker's B sequences, equal weights and one piece per stage. Of
    several pieces the one active at the load counts for Attention and transfer; r_A and r_C are where the largest FFN
    piece crosses them, and r_peak is the best ratio for the FFN pieces alone, so that the theorem's proof carries over.

    Raises
    ------
    ScenarioError
        If the FFN time does not grow with its tokens.
    """
    pieces = bundle.ffn or bundle.table_hull
    base, slope = np.array([(p.base, p.decode * bundle.batch) for p in pieces]).T
    r_peak = _minimiser(base, slope, (1.0, 1.0))
    if math.isinf(r_peak):
        raise ScenarioError("the published ratio needs an FFN time that grows with its tokens; give ffn a decode value")
    attention, hop = float(bundle.attention_time(bundle.batch * per_slot)), bundle.transfer_time(1.0)
    r_attention, r_transfer = _reaches(base, slope, attention), _reaches(base, slope, hop)
    return Published(r_attention, r_transfer, r_peak, max(r_attention, r_transfer, r_peak))


def interval(bundle: Bundle, load: SlotLoad, confidence: float) -> tuple[float, float]:
    """Best ratios at both ends of the normal confidence interval of theta; a point for a given law.

    A single request has no standard error: then the upper end is infinite.

    Raises
    ------
    ScenarioError
        If `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ScenarioError(f"an interval cannot have confidence = {confidence!r}; give a number between 0 and 1")
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * load.error
    ends = [replace(load, theta=max(0.0, load.theta + sign * reach)) for sign in (-1, 1)]
    ratios = [
        _minimiser(*mean_field(bundle, end), bundle.weights) if math.isfinite(end.theta) else math.inf for end in ends
    ]
    return min(ratios), max(ratios)


def kv_need(bundle: Bundle, load: SlotLoad, sigmas: float = 0.0) -> float:
    """KV tokens of one Attention worker, M B theta, and `sigmas` standard deviations sqrt(M B) nu more."""
    slots = bundle.micro_batches * bundle.batch
    return slots * load.theta + sigmas * math.sqrt(slots) * load.deviation


def _minimiser(a: Floats, b: Floats, weights: tuple[float, float]) -> float:
    """The smallest r that minimises (w_A + w_F / r) max_i (a_i + b_i r); inf or 0 if it keeps falling that way."""
    worker, server = weights
    if not b.any():
        return math.inf
    if not a.any():
        return 0.0
    i, j = np.triu_indices(len(a), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.concatenate(((a[j] - a[i]) / (b[i] - b[j]), np.sqrt(a * server / (b * worker))))
    r = np.sort(found[np.isfinite(found) & (found > 0)])
    cost = (worker + server / r) * (a[:, None] + b[:, None] * r).max(axis=0)
    return float(r[np.argmax(cost <= cost.min() * (1 + 1e-14))])


def _regime_of_rows(bundle: Bundle, load: SlotLoad, ratio: float) -> str:
    """As `regime`, for the hull of a measured table."""
    a, b = mean_field(bundle, load)
    times = a + b * ratio
    binding = {row.stage for row, t in zip(cycle_rows(bundle), times, strict=True) if t >= times.max() * (1 - 1e-9)}
    return " and ".join(name for stage, name in BOUND.items() if stage in binding)


def _reaches(base: Floats, slope: Floats, seconds: float) -> float:
    """The ratio at which max_i (base_i + slope_i r) reaches `seconds`; 0 if a flat piece is always above."""
    if np.any((slope == 0) & (base > seconds)):
        return 0.0
    grows = slope > 0
    return float(((seconds - base[grows]) / slope[grows]).min())
