"""Step time of a replica: how long one engine step takes, given what the batch holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from llmopt.arrays import Floats
from llmopt.model import InputModel

FEATURES = ("base", "prefill", "decode", "kv", "pairs")
"""What the time of a step depends on: the step itself, prefill tokens, decode sequences, KV tokens read, pairs."""
PerStep = Annotated[float, Field(ge=0, le=10)]
PerToken = Annotated[float, Field(ge=0, le=1)]


class Piece(InputModel):
    """One affine piece of a step time; all coefficients in seconds per unit.

    base: per step; prefill: per prefill token; decode: per decode sequence; kv: per resident KV token read by
    decode attention; pairs: per (query, key) pair of prefill attention. The upper limits catch milliseconds.
    """

    name: str = ""
    base: PerStep = 0.0
    prefill: PerToken = 0.0
    decode: PerToken = 0.0
    kv: PerToken = 0.0
    pairs: PerToken = 0.0


@dataclass(frozen=True)
class StepTime:
    """Max-affine step time  tau = max_i (a_i + p_i P + d_i D + k_i K + q_i Q)  in seconds.

    P prefill tokens, D decode sequences, K KV tokens read by decode attention, Q prefill attention pairs.
    `coefficients` has shape (n_pieces, 5) with columns as in `FEATURES`; `names` labels the pieces.
    """

    coefficients: Floats
    names: tuple[str, ...] = ()

    def __call__(self, prefill: float = 0, decode: float = 0, kv: float = 0, pairs: float = 0) -> float:
        """Duration of one step in seconds."""
        return float((self.coefficients @ np.array([1.0, prefill, decode, kv, pairs])).max())

    def many(self, features: Floats) -> Floats:
        """Durations (n,) of steps with `features` of shape (n, 4): prefill, decode, kv, pairs."""
        return np.asarray((self.coefficients[:, 0] + features @ self.coefficients[:, 1:].T).max(axis=1))

    @classmethod
    def from_pieces(cls, pieces: tuple[Piece, ...]) -> StepTime:
        """Stack validated pieces; unnamed ones are numbered."""
        rows = [[getattr(p, feature) for feature in FEATURES] for p in pieces]
        names = tuple(p.name or f"piece {i}" for i, p in enumerate(pieces, 1))
        return cls(np.array(rows, dtype=float), names)
