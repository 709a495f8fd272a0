"""The A/F ratio of a bundle in closed form: cycle rows, regimes, mean-field optimum, intervals.

With r = x / y Attention workers per FFN server a cycle lasts tau(r) = max_i (a_i + b_i r) seconds in the mean field,
where every worker holds its mean load, and the bundle makes  Thr = x B / ((x w_A + y w_F) L tau)  tokens/s per unit of
weight. Hence 1 / Thr ~ (w_A + w_F / r) tau(r) = max_i (w_A a_i + w_F b_i + w_A b_i r + w_F a_i / r), which is convex in
r for a_i >= 0: the optimum is a kink of tau or a stationary point sqrt(a_i w_F / (b_i w_A)), and the best whole number
is next to it (Song et al., arXiv 2601.21351 v1, Theorem 4.4, and v2 to v4, for max{A, C, F}; generalised here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.slots import SlotLoad


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


def cycle(bundle: Bundle, load: SlotLoad, ratio: float) -> float:
    """tau(r) in s, in the mean field; a measured FFN table is used as it is, not its hull."""
    a, c, f = stage_times(bundle, load, ratio)
    if bundle.pipeline == "ideal":
        return max(a, c, f)
    sending_a = c if bundle.pipeline in ("attention-blocking", "blocking") else 0.0
    sending_f = c if bundle.pipeline == "blocking" else 0.0
    return max(a + sending_a, f + sending_f, (a + f + 2 * c) / bundle.micro_batches)


def stage_times(bundle: Bundle, load: SlotLoad, ratio: float) -> tuple[float, float, float]:
    """Mean seconds of Attention, one hop and FFN in one layer."""
    kv = bundle.batch * load.theta
    return float(bundle.attention_time(kv)), bundle.transfer_time(ratio), bundle.ffn_time(ratio)
