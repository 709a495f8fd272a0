"""What a profile measured: operators, ranges, holes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmopt.arrays import Floats
from llmopt.profiles.data import Curve, Grid, Part, Profile, part_of


@dataclass(frozen=True)
class Measured:
    """One measured operator.

    part: the side of a layer it belongs to, or the model, or transfers. ranges: (quantity, smallest, largest, knots)
    of each axis. seconds: smallest and largest time of one call. holes, beyond: shares of the grid that were
    interpolated between measurements, and extrapolated.
    """

    operator: str
    part: Part | str
    ranges: tuple[tuple[str, float, float, int], ...]
    seconds: tuple[float, float]
    holes: float = 0.0
    beyond: float = 0.0


def operators(profile: Profile) -> tuple[Measured, ...]:
    """Everything that a profile holds, in the order attention, feed-forward, model, transfers."""
    order = ("attention", "ffn", "model", "transfer")
    return tuple(sorted(_all(profile), key=lambda one: (order.index(one.part), one.operator)))


def _all(profile: Profile) -> Iterator[Measured]:
    for name, curve in profile.tokens.items():
        yield _curve(name, part_of(name), "tokens", curve)
    for name, curve in profile.sequences.items():
        yield _curve(name, "model", "sequences", curve)
    cached, decode = ("chunk", "cached"), ("sequences", "context")
    for name, grid, axes in (
        ("attention, prefill", profile.prefill, cached),
        ("attention, decode", profile.decode, decode),
        ("attention, mixed", profile.mixed, cached + decode),
    ):
        if grid is not None:
            yield _grid(name, axes, grid)
    if profile.experts is not None:
        most = max(block.at[-1] for block in profile.experts.blocks)
        least = min(block.at[0] for block in profile.experts.blocks)
        times = [float(t) for block in profile.experts.blocks for t in block.seconds]
        active = ("activated experts", float(least), float(most), max(len(b.at) for b in profile.experts.blocks))
        yield Measured("moe", "ffn", (_range("tokens", profile.experts.tokens), active), (min(times), max(times)))
    for name, transfer in (("all_reduce", profile.all_reduce), ("send_recv", profile.send_recv)):
        if transfer is not None:
            yield _curve(name, "transfer", "bytes", transfer)


def _range(name: str, axis: Floats) -> tuple[str, float, float, int]:
    return (name, float(axis[0]), float(axis[-1]), len(axis))


def _curve(name: str, part: Part | str, quantity: str, curve: Curve) -> Measured:
    times = (float(curve.seconds.min()), float(curve.seconds.max()))
    return Measured(name, part, (_range(quantity, curve.at),), times)


def _grid(name: str, axes: tuple[str, ...], grid: Grid) -> Measured:
    ranges = tuple(_range(label, axis) for label, axis in zip(axes, grid.axes, strict=True))
    times = (float(grid.seconds.min()), float(grid.seconds.max()))
    return Measured(name, "attention", ranges, times, grid.filled, grid.extended)
