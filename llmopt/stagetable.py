"""Measured times of a stage by its tokens, and the convex function below them that programs use."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from llmopt.hardware import Piece
from llmopt.model import InputModel


class StageTable(InputModel):
    """Measured times of the FFN stage: `seconds[i]` for one layer of `tokens[i]` tokens in one FFN server.

    Linear in between; beyond the ends the first and the last segment go on, never below zero.
    """

    tokens: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=2)]
    seconds: Annotated[tuple[Annotated[float, Field(gt=0, le=10)], ...], Field(strict=False, min_length=2)]

    @model_validator(mode="after")
    def _shape(self) -> StageTable:
        if len(self.tokens) != len(self.seconds):
            raise ValueError(f"has {len(self.tokens)} tokens but {len(self.seconds)} seconds; give one time each")
        for key, values in (("tokens", self.tokens), ("seconds", self.seconds)):
            if any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"has {key} that do not increase; sort them, and drop repeats")
        return self

    def __call__(self, tokens: float) -> float:
        """Seconds for `tokens` tokens."""
        i = int(np.clip(np.searchsorted(self.tokens, tokens), 1, len(self.tokens) - 1))
        (x0, x1), (y0, y1) = self.tokens[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return max(0.0, y0 + (y1 - y0) / (x1 - x0) * (tokens - x0))

    @cached_property
    def hull(self) -> tuple[Piece, ...]:
        """A convex max-affine function below the table: its lower hull, one piece a segment.

        A segment whose line is negative at 0 gives way to the steepest line through 0 that stays below the table.
        """
        points: list[tuple[float, float]] = []
        for point in zip(self.tokens, self.seconds, strict=True):
            while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], point):
                points.pop()
            points.append(point)
        lines = [(a[1] - _slope(a, b) * a[0], _slope(a, b)) for a, b in pairwise(points)]
        if any(base < 0 for base, _ in lines):
            lines.append((0.0, min(y / x for x, y in points)))
        return tuple(Piece(base=base, decode=slope, prefill=slope) for base, slope in lines if base >= 0)


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
