"""A bundle of the catalog as it is made: stages with points and fit, constants with sources, and the file of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.afd_points import Points
from llmopt.bundle import Bundle
from llmopt.calibrate.fit import FitOptions, fit_step_time
from llmopt.calibrate.result import rounded
from llmopt.hardware import FEATURES, Piece, StepTime
from llmopt.machines import KvCapacity, ModelShape, accelerator, kv_capacity
from llmopt.scenario import Pool

DATE, COMMAND = "2026-11-24", "python -m benchmarks.afd_fits"
EFFORT = FitOptions(kicks=0, thin=100)
ROOM = 512
"""Sequences for which an Attention worker's memory keeps room to sample."""
UNITS = {
    "base": "s", "prefill": "s a prompt token", "decode": "s a token", "kv": "s a KV token", "pairs": "s a pair",
}  # fmt: skip
COMMENTS = {
    "layers": "# of the model",
    "batch": "# sequences of a micro-batch on one Attention worker",
    "micro_batches": "# in flight",
    "kv_capacity": "# tokens of one Attention worker",
    "attention_price": "# USD/hour of one worker",
    "ffn_price": "# USD/hour of one server",
    "ffn_devices": "# accelerators of one server",
}


@dataclass(frozen=True)
class Stage:
    """Pieces of one stage, where they come from, and the points that they are fitted to, unless they are stated."""

    pieces: tuple[Piece, ...]
    source: str
    points: Points | None = None

    def error(self, kind: str) -> tuple[int, float, float, float]:
        """How many points of a kind there are, and the median, 95 % quantile and largest relative error."""
        assert self.points is not None
        which = self.points.of(kind)
        step = StepTime.from_pieces(self.pieces).many(self.points.features[which])
        off = np.abs(step / self.points.seconds[which] - 1)
        return int(which.sum()), float(np.median(off)), float(np.quantile(off, 0.95)), float(off.max())

    def span(self, kind: str) -> str:
        """The range of the points of a kind, in words."""
        assert self.points is not None
        prefill, decode, kv, _ = self.points.features[self.points.of(kind)].T
        spans = [("prompt tokens", prefill), ("tokens" if kv.max() == 0 else "sequences", decode), ("KV tokens", kv)]
        return ", ".join(f"{x.min():,.0f} to {x.max():,.0f} {unit}" for unit, x in spans if x.max() > 0)

    @property
    def told(self) -> str:
        """The source with the quality of the fit."""
        if self.points is None:
            return self.source
        parts = []
        for kind in dict.fromkeys(self.points.kinds):
            n, median, most, worst = self.error(kind)
            name = "" if kind == "decode" else f"{kind}: "
            parts.append(f"{name}{n} points, {self.span(kind)}: median {median:.1%}, 95 % within {most:.1%}, "
                         f"largest {worst:.0%}")  # fmt: skip
        return f"{self.source}; fitted on {DATE} by {COMMAND}: {'; '.join(parts)}; beyond it is extrapolation"


@dataclass(frozen=True)
class Entry:
    """An entry of the catalog: stages by key of a bundle, and other constants with their sources."""

    description: str
    pool: Mapping[str, tuple[str, str]]
    bundle: Mapping[str, tuple[Any, str]]
    stages: Mapping[str, Stage]

    def text(self) -> str:
        """The file, checked to be a pool."""
        lines = [f"description = {_text(self.description)}"]
        lines += [f"{key} = {_text(value)}" for key, (value, _) in self.pool.items()]
        lines += ["", "[bundle]"]
        lines += [
            f"{f'{key} = {json.dumps(value)}':26}{COMMENTS.get(key, '')}".rstrip()
            for key, (value, _) in self.bundle.items()
        ]
        for key, stage in self.stages.items():
            lines += [f"{key} = [", *(f"    {_inline(piece)}," for piece in stage.pieces), f"]{_units(stage.pieces)}"]
        lines += ["", "[sources]", *(f"{key} = {_text(why)}" for key, (_, why) in self.pool.items())]
        lines += [f'"bundle.{key}" = {_text(why)}' for key, (_, why) in self.bundle.items()]
        lines += [f'"bundle.{key}" = {_text(stage.told)}' for key, stage in self.stages.items()]
        text = "\n".join(lines) + "\n"
        Pool.model_validate({"name": "entry", "bundle": tomllib.loads(text)["bundle"]})
        return text

    def parsed(self) -> Bundle:
        """The bundle of the entry."""
        return Bundle.model_validate(tomllib.loads(self.text())["bundle"])


def _text(value: str) -> str:
    return json.dumps(" ".join(value.split()), ensure_ascii=False)


def _inline(piece: Piece) -> str:
    named = [f"name = {_text(piece.name)}"] if piece.name else []
    return "{ " + ", ".join([*named, *(f"{f} = {getattr(piece, f):.4g}" for f in FEATURES if getattr(piece, f))]) + " }"


def _units(pieces: tuple[Piece, ...]) -> str:
    used = [f"{f} {UNITS[f]}" for f in FEATURES if any(getattr(piece, f) for piece in pieces)]
    return f"  # one layer: {', '.join(used)}"


def fitted(points: Points, source: str, decode: int = 2, mixed: int = 0, prompts: bool = True) -> Stage:
    """The max-affine fit; a stage that only counts tokens charges those of prompts like others."""
    fit = fit_step_time(
        points.features,
        points.seconds,
        decode_pieces=decode,
        mixed_pieces=mixed,
        weights=points.weights,
        options=EFFORT,
    )
    pieces = tuple(piece.model_copy(update={"name": ""}) for piece in rounded(fit.pieces))
    if not mixed and prompts:
        pieces = tuple(piece.model_copy(update={"prefill": piece.decode}) for piece in pieces)
    return Stage(pieces, source, points)


def attention_side(shape: ModelShape) -> ModelShape:
    """The model without feed-forward layers, as an Attention worker holds it."""
    gone = (
        "experts",
        "experts_per_token",
        "expert_intermediate",
        "shared_intermediate",
        "intermediate",
        "dense_layers",
    )
    return shape.model_copy(update=dict.fromkeys(gone, 0))


def memory(shape: ModelShape, chip: str, precision: str = "bf16") -> tuple[int, str]:
    """KV tokens of an Attention worker, computed as for an engine, without the weights of the FFN."""
    room: KvCapacity = kv_capacity(attention_side(shape), accelerator(chip), precision=precision, max_batch=ROOM)
    parts = ", ".join(f"{part.name} {part.bytes / 2**30:+.2f} GiB" for part in room.parts)
    return room.tokens, (
        f"computed for {accelerator(chip).name}: {parts}, {room.bytes_per_token:,.0f} B a token; weights of Attention, "
        f"embedding and output head in {precision}, without those of the FFN; all micro-batches together"
    )


def sizes(shape: ModelShape, chip: str, batch: int, micro: int = 3, precision: str = "bf16") -> dict[str, Any]:
    """Constants of a bundle that every entry has."""
    return {
        "layers": (shape.layers, f"{shape.name}, config.json; each taken like the one measured"),
        "batch": (batch, "a default to start from; choose with fleet.batches"),
        "micro_batches": (micro, "a default: three hide Attention, transfers and FFN behind each other"),
        "kv_capacity": memory(shape, chip, precision),
    }


def table(name: str, stages: Mapping[str, Stage]) -> Iterator[str]:
    """One line for each stage and kind of points."""
    for key, stage in stages.items():
        coefficients = " | ".join(_inline(piece)[2:-2] for piece in stage.pieces)
        if stage.points is None:
            yield f"{name:26} {key:10} stated: {coefficients}"
            continue
        for kind in dict.fromkeys(stage.points.kinds):
            n, median, most, worst = stage.error(kind)
            yield f"{name:26} {key:10} {kind:8} {n:5} {median:7.1%} {most:7.1%} {worst:6.0%}  {stage.span(kind)}"
        yield f"{'':38}{coefficients}"
