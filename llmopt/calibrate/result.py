"""What a calibration found: the step time, how far it is from what was measured, and what to know before using it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmopt import __version__
from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.hardware import FEATURES, Piece
from llmopt.machines import Accelerator, ModelShape, accelerator, floor, kv_capacity, model_shape, violations
from llmopt.machines.physics import Steps

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4
"""Significant digits of a coefficient: more than any fit is worth, and errors are those of the printed numbers."""


@dataclass(frozen=True)
class Caps:
    """The limits of an engine: sequences and tokens of a step, and the KV tokens that it holds, as of a pool."""

    max_batch: int = 256
    token_budget: int = 2048
    kv_capacity: int = 1_000_000

    def __post_init__(self) -> None:
        """Refuse limits with which no step is possible."""
        for name, value in vars(self).items():
            if value < 1:
                raise ScenarioError(f"{name} = {value} leaves no step to fit; give at least 1")


@dataclass(frozen=True)
class Machine:
    """What was measured: a model on an accelerator. Either is None in `shape`, `chip` where no catalog knows it."""

    accelerator: str
    model: str
    tensor_parallel: int = 1
    precision: str = ""
    shape: ModelShape | None = None
    chip: Accelerator | None = None

    @classmethod
    def named(cls, chip: str, model: str, tensor_parallel: int = 1, precision: str = "") -> Machine:
        """With what the catalogs know of these names."""
        found: list[Any] = [None, None]
        for k, (look, name) in enumerate(((model_shape, model), (accelerator, chip))):
            try:
                found[k] = look(name)
            except ScenarioError:
                continue
        return cls(chip, model, tensor_parallel, precision, *found)

    @property
    def title(self) -> str:
        """``A100 SXM 80GB x 2, Llama-2-70B in bf16``."""
        chip = self.chip.name if self.chip else self.accelerator
        model = self.shape.name if self.shape else self.model
        many = f" x {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        named = f"{chip or 'unnamed accelerator'}{many}, {model or 'unnamed model'}"
        return named + (f" in {self.precision}" if self.precision else "")

    @property
    def unknown(self) -> str:
        """What keeps the catalogs from helping."""
        kind, name = ("model", self.model) if self.shape is None else ("accelerator", self.accelerator)
        return f"{name!r} is in no catalog" if name else f"no {kind} is named"


@dataclass(frozen=True, eq=False)
class Points:
    """Measured against predicted seconds (n,), each with the index of its kind in `kinds` (n,)."""

    measured: Floats
    predicted: Floats
    kind: Ints
    kinds: tuple[str, ...]
    what: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted step time.

    pieces: coefficients of `DIGITS` significant digits, without host overhead; errors: table of relative errors by
    region; points: behind it; summary: the errors in a sentence; kind: of fit, in words; source: what was measured;
    method: how it was fitted; physics: what the peaks say; notes: what is extrapolated, assumed or left out; path:
    error by number of pieces, as (decode pieces, mixed pieces, error); host_overhead: s a step, for the entry;
    constants: further keys of the catalog entry, each with its value and source.
    """

    machine: Machine
    caps: Caps
    pieces: tuple[Piece, ...]
    errors: pd.DataFrame
    points: Points
    summary: str
    kind: str
    source: str
    method: str
    physics: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    path: tuple[tuple[int, int, float], ...] = ()
    host_overhead: float = 0.0
    constants: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def with_constants(self, constants: Mapping[str, tuple[Any, str]]) -> Calibration:
        """With these keys of the catalog entry, in this order, before those it has."""
        rest = {key: value for key, value in self.constants.items() if key not in constants}
        return replace(self, constants={**constants, **rest})

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        machine = {k: v for k, v in vars(self.machine).items() if isinstance(v, str | int)}
        return {
            "llmopt": __version__,
            **machine,
            "caps": vars(self.caps),
            "host_overhead": self.host_overhead,
            "pieces": [piece.model_dump() for piece in self.pieces],
            "errors": self.errors.to_dict(orient="records"),
            "path": [{"decode_pieces": d, "mixed_pieces": m, "error": e} for d, m, e in self.path],
            "summary": self.summary,
            "kind": self.kind,
            "source": self.source,
            "method": self.method,
            "physics": list(self.physics),
            "notes": list(self.notes),
        }


def rounded(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Pieces whose coefficients have `DIGITS` significant digits."""
    return tuple(
        piece.model_copy(update={name: float(f"{getattr(piece, name):.{DIGITS}g}") for name in FEATURES})
        for piece in pieces
    )


def physics(machine: Machine, claims: Mapping[str, tuple[Steps, Floats]], allow: bool) -> Iterator[str]:
    """Sentences on what the peaks of the machine allow, the claims in turn.

    Parameters
    ----------
    claims
        By what they are called, step times and the steps (n, 4) that they claim to know.
    allow
        Whether an impossible step time is only noted.

    Raises
    ------
    ScenarioError
        If a step time is below what peak arithmetic or bandwidth allow, with the figure.
    """
    if machine.shape is None or machine.chip is None:
        yield f"not checked against peak arithmetic and bandwidth, since {machine.unknown}"
        return
    precision = machine.precision or None
    limit = floor(machine.shape, machine.chip, tensor_parallel=machine.tensor_parallel, precision=precision)
    for name, (claim, features) in claims.items():
        found = violations(claim, limit, features)
        if found and not allow:
            raise ScenarioError(
                f"{machine.title}: {name} is impossible: {found.sentence}; correct the measurements or the names, or "
                "pass --allow-unphysical to go on with a warning"
            )
        yield f"{'WARNING, impossible: ' if found else ''}{name}: {found.sentence}"


def memory(machine: Machine, max_batch: int, token_budget: int, given: int | None) -> tuple[int, str]:
    """KV tokens of a replica, given or by the rule of `llmopt.machines`, and where they are from.

    Raises
    ------
    ScenarioError
        If nothing is given and a catalog lacks the model or the accelerator.
    """
    if given is not None:
        return given, "given by the user"
    if machine.shape is None or machine.chip is None:
        raise ScenarioError(f"{machine.title}: has no known KV capacity, since {machine.unknown}; give --kv-capacity")
    room = kv_capacity(
        machine.shape,
        machine.chip,
        tensor_parallel=machine.tensor_parallel,
        precision=machine.precision or None,
        token_budget=token_budget,
        max_batch=max_batch,
    )
    parts = ", ".join(f"{part.name} {part.bytes / 2**30:+.2f} GiB" for part in room.parts)
    return room.tokens, f"computed: {parts}; {room.bytes_per_token:,.0f} B a token on one GPU"
