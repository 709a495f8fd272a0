"""Measured tables of one model on one accelerator: what was timed, per operator, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmopt.arrays import Floats
from llmopt.steptable import interpolate

Part = Literal["attention", "ffn", "model"]

ELEMENTWISE = ("embedding", "layernorm", "rotary_emb", "act_fn", "final_layernorm")
ATTENTION_GEMMS, FFN_GEMMS = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")
DENSE_FFN = ("gate_up_proj", "act_fn", "down_proj")
"""Operators that layers with experts have not."""
EXPERT_OPERATORS = ("moe", "moe_gating_linear", "moe_gating_routing_topk", "moe_shuffling", "moe_grouped_gemm")
FFN = (*DENSE_FFN, *EXPERT_OPERATORS, "post_attention_layernorm")
PER_MODEL = ("embedding", "final_layernorm")
TWICE = ("layernorm", "add")
"""Once on the attention's side of a layer and once on the feed-forward side."""


def part_of(operator: str) -> Part:
    """Where an operator by tokens belongs: to the attention or the feed-forward side of a layer, or to the model."""
    return "model" if operator in PER_MODEL else "ffn" if operator in FFN else "attention"


@dataclass(frozen=True, eq=False)
class Curve:
    """Seconds of one call against one quantity: `at` (n,) increasing, `seconds` (n,)."""

    at: Floats
    seconds: Floats

    def __call__(self, points: Floats) -> Floats:
        """Seconds (m,) at `points` (m,): linear between knots, constant below, along the last two knots above."""
        return interpolate((self.at,), self.seconds, (np.asarray(points, dtype=float),))


@dataclass(frozen=True, eq=False)
class Grid:
    """Seconds of one layer over a full grid.

    axes: increasing knots; seconds: one entry for each combination. filled: share of the entries that were not
    measured but interpolated between measurements; extended: share that lies beyond them. ends: where measurements
    end on each axis, if that is before its last knot.
    """

    axes: tuple[Floats, ...]
    seconds: Floats
    filled: float = 0.0
    extended: float = 0.0
    ends: tuple[float, ...] = ()

    @property
    def limits(self) -> tuple[float, ...]:
        """Where measurements end on each axis."""
        return self.ends or tuple(float(axis[-1]) for axis in self.axes)

    def __call__(self, *points: Floats) -> Floats:
        """Seconds (m,) at points given as one array (m,) per axis, multilinear."""
        return interpolate(self.axes, self.seconds, tuple(np.asarray(p, dtype=float) for p in points))


@dataclass(frozen=True, eq=False)
class Experts:
    """Seconds of one whole mixture-of-experts block by tokens and by the number of experts that they activate.

    tokens (n,); blocks[i]: time against activated experts at tokens[i]. expert_parallel: GPUs among which the experts
    are divided; activated experts are those of one GPU.
    """

    tokens: Floats
    blocks: tuple[Curve, ...]
    expert_parallel: int = 1


@dataclass(frozen=True)
class Link:
    """A link between two GPUs: bytes/s in one direction, and seconds before the first byte."""

    bandwidth: float
    latency: float
    source: str = ""


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything that was measured of one model on one accelerator at one tensor-parallel degree.

    tokens: operators by tokens of a step, seconds of one call on one GPU. sequences: operators by sequences.
    prefill: attention of one chunk of one request by (chunk, cached context), seconds of a layer. decode: attention of
    a decode-only step by (sequences, mean context). mixed: attention by (chunk, cached, sequences >= 1, context).
    experts: the mixture-of-experts block. all_reduce, send_recv: transfers by bytes; exchange: an all-gather and a
    reduce-scatter among the GPUs of all engines that share experts, by bytes of one GPU; link: what a transfer that was
    not measured is estimated from. facts: constants of the model that the files state. layout: in which they were
    written.
    """

    accelerator: str
    model: str
    tensor_parallel: int
    precision: str
    layout: str
    tokens: Mapping[str, Curve] = field(default_factory=dict)
    sequences: Mapping[str, Curve] = field(default_factory=dict)
    prefill: Grid | None = None
    decode: Grid | None = None
    mixed: Grid | None = None
    experts: Experts | None = None
    all_reduce: Curve | None = None
    exchange: Curve | None = None
    send_recv: Curve | None = None
    link: Link | None = None
    facts: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"profile of {self.model} on {self.accelerator} (tensor parallel {self.tensor_parallel})"
