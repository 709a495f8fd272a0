"""A calibration as a catalog entry: a TOML file that a scenario names, with a source for every constant."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from llmopt.calibrate.result import Calibration
from llmopt.errors import ScenarioError
from llmopt.explain import explain
from llmopt.hardware import FEATURES, Piece
from llmopt.scenario import Pool

UNITS = {
    "price": "USD/hour",
    "kv_capacity": "tokens",
    "max_batch": "sequences",
    "token_budget": "tokens",
    "block_size": "tokens",
    "host_overhead": "s per step",
    "base": "s per step",
    "prefill": "s per prefill token",
    "decode": "s per decode sequence",
    "kv": "s per KV token read by decode attention",
    "pairs": "s per prefill attention pair",
}
ASKED = "as of the engine that the step time was fitted for"


def entry_text(found: Calibration, *, date: str, command: str, description: str = "", source: str = "") -> str:
    """The text of the entry, checked to be one.

    Parameters
    ----------
    date
        When it was fitted, as ``2026-11-24``.
    command
        What was typed to get it.
    description
        One line; made from the machine if absent.
    source
        Where the measurements come from; the names of the files if absent.

    Raises
    ------
    ScenarioError
        If the constants make no pool.
    """
    constants = dict(_constants(found, source or found.source))
    notes = "".join(f"; {note}" for note in found.notes)
    told = f"same; fitted on {date} by {command}: {found.method}; {found.summary}{notes}"
    title = f"{found.machine.title}: {found.kind}"
    return toml_entry(description or title, constants, found.pieces, told)


def toml_entry(
    description: str, constants: Mapping[str, tuple[Any, str]], pieces: tuple[Piece, ...], source: str
) -> str:
    """A file with these keys of a pool, each with its value and source, and these pieces with theirs.

    Raises
    ------
    ScenarioError
        If they make no pool.
    """
    lines = [f"description = {_text(description)}"]
    lines += [_line(key, value) for key, (value, _) in constants.items()]
    for piece in pieces:
        lines += ["", "[[step_time]]", *_piece(piece)]
    lines += ["", "[sources]", *(f"{key} = {_text(why)}" for key, (_, why) in constants.items())]
    text = "\n".join([*lines, f"step_time = {_text(source)}"]) + "\n"
    _check(text)
    return text


def _constants(found: Calibration, source: str) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Keys of a pool in the order of the file, each with its value and source."""
    machine = found.machine
    yield "accelerator", (machine.chip.name if machine.chip else machine.accelerator, source)
    yield "model", (machine.shape.name if machine.shape else machine.model, "same" + _precision(found))
    if machine.tensor_parallel > 1:
        yield "tensor_parallel", (machine.tensor_parallel, f"same: tensor parallel {machine.tensor_parallel}")
    given = dict(found.constants)
    if "price" in given:
        yield "price", given.pop("price")
    for key in ("kv_capacity", "max_batch", "token_budget"):
        yield key, given.pop(key, (getattr(found.caps, key), ASKED))
    if found.host_overhead > 0:
        yield "host_overhead", given.pop("host_overhead", (found.host_overhead, "given by the user"))
    yield from given.items()


def _precision(found: Calibration) -> str:
    return f": in {found.machine.precision}" if found.machine.precision else " measurement"


def _piece(piece: Piece) -> Iterator[str]:
    yield f"name = {_text(piece.name)}"
    yield from (_line(name, getattr(piece, name)) for name in FEATURES if getattr(piece, name))


def _line(key: str, value: Any) -> str:
    plain = (
        _text(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else _number(value)
    )
    return f"{f'{key} = {plain}':<26}# {UNITS[key]}" if key in UNITS else f"{key} = {plain}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}" if value >= 1e-2 else _scientific(value)


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _text(value: str) -> str:
    """A TOML basic string, whose escapes are JSON's."""
    return json.dumps(" ".join(value.split()), ensure_ascii=False)


def _check(text: str) -> None:
    data = tomllib.loads(text)
    data.pop("description")
    data.pop("sources")
    pool = {"name": "entry", "replicas": 1, **data}
    try:
        Pool.model_validate(pool)
    except ValidationError as error:
        raise ScenarioError(explain(error, pool, Pool, "the fitted entry")) from None
