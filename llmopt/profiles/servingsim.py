"""Profiles as LLMServingSim's profiler writes them (github.com/casys-kaist/LLMServingSim), times in microseconds.

dense.csv (layer, tokens), per_sequence.csv (layer, sequences), attention.csv (prefill_chunk, kv_prefill or prefill_key,
n_decode, kv_decode) and moe.csv (tokens, activated_experts), each with time_us of one call on one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.errors import ScenarioError
from llmopt.profiles.checks import OPERATOR_FALL
from llmopt.profiles.data import Curve, Experts, Grid, Profile
from llmopt.profiles.files import Rows, need, read_rows, sizes, times, unique, words
from llmopt.profiles.grids import full, on_cached, widened
from llmopt.profiles.tables import attention_table, operator_curves

MICRO = 1e-6
KINDS = ("dense", "per_sequence", "attention", "moe")


def read_servingsim(files: Mapping[str, Path], empty: Profile, expert_parallel: int = 1) -> Profile:
    """The profile in `files` by kind (`KINDS`); `empty` says of what.

    Raises
    ------
    ScenarioError
        If a file is missing or holds something that is no measurement.
    """
    for kind in ("dense", "per_sequence", "attention"):
        if kind not in files:
            beside = next(iter(files.values()))
            raise ScenarioError(f"{beside.parent}: has no {kind} table of the {empty.name}; add {_name(beside, kind)}")
    attention = _attention(read_rows(files["attention"]))
    moe = _experts(read_rows(files["moe"]), expert_parallel) if "moe" in files else None
    return replace(
        empty,
        tokens=_operators(read_rows(files["dense"]), "tokens"),
        sequences=_operators(read_rows(files["per_sequence"]), "sequences"),
        prefill=attention.prefill,
        decode=attention.decode,
        mixed=attention.mixed,
        experts=moe,
        files=tuple(str(path) for path in files.values()),
        notes=empty.notes + attention.notes,
    )


def _name(beside: Path, kind: str) -> str:
    """What the missing file would be called."""
    known = next(k for k in KINDS if beside.stem.endswith(k))
    return f"{beside.stem.removesuffix(known)}{kind}.csv"


def _operators(rows: Rows, axis: str) -> dict[str, Curve]:
    need(rows, ["layer", axis, "time_us"])
    at, seconds = sizes(rows, axis, 1), times(rows, "time_us") * MICRO
    unique(rows, ["layer", axis])
    names, code = np.unique(words(rows, "layer"), return_inverse=True)
    return operator_curves(rows, names.tolist(), at, code.astype(float), seconds, OPERATOR_FALL, axis)


@dataclass(frozen=True)
class _Attention:
    prefill: Grid
    decode: Grid
    mixed: Grid | None
    notes: tuple[str, ...]


def _attention(rows: Rows) -> _Attention:
    """Pure prefill, pure decode and mixed attention; only the kernel `attention`, and one query token a sequence."""
    rows, notes = _plain_rows(rows)
    behind = "prefill_key" if "prefill_key" in rows.data.columns else "kv_prefill"
    names = ("prefill_chunk", behind, "n_decode", "kv_decode")
    need(rows, [*names, "time_us"])
    columns = {name: sizes(rows, name) for name in names}
    seconds = times(rows, "time_us") * MICRO
    unique(rows, list(columns))
    chunk, decodes = columns["prefill_chunk"], columns["n_decode"]
    _must(rows, (chunk == 0) & (decodes > 0), "decode-only steps (prefill_chunk = 0)")
    _must(rows, (chunk > 0) & (decodes == 0), "steps without decode sequences (n_decode = 0)")
    decode = _grid(rows, (chunk == 0) & (decodes > 0), columns, seconds, names[2:])
    prefill = _grid(rows, (chunk > 0) & (decodes == 0), columns, seconds, names[:2])
    mixed = None
    if ((chunk > 0) & (decodes > 0)).any():
        mixed = _grid(rows, (chunk > 0) & (decodes > 0), columns, seconds, names)
        prefill, mixed = widened(prefill, mixed)
    return _Attention(prefill, decode, mixed, notes)


def _plain_rows(rows: Rows) -> tuple[Rows, tuple[str, ...]]:
    notes = []
    if "layer" in rows.data.columns:
        layer = words(rows, "layer")
        others = sorted(set(layer.tolist()) - {"attention"})
        notes += [f"{rows.path.name}: kernels beside attention are not counted: {', '.join(others)}"] if others else []
        rows = rows.take(layer == "attention")
    if "decode_q_len" in rows.data.columns:
        rows = rows.take(sizes(rows, "decode_q_len") == 1)
    if len(rows.data) == 0:
        raise ScenarioError(f"{rows.path}: has no row with layer = attention and decode_q_len = 1; measure them")
    return rows, tuple(notes)


def _must(rows: Rows, keep: Bools, what: str) -> None:
    if not keep.any():
        raise ScenarioError(f"{rows.path}: has no row of {what}; measure them")


def _grid(rows: Rows, keep: Bools, columns: dict[str, Floats], seconds: Floats, names: tuple[str, ...]) -> Grid:
    """A full grid over `names`; prefill_key, the mean number of keys of a query, becomes the cached context."""
    axes, table = attention_table(rows, keep, {name: columns[name] for name in names}, seconds)
    if "prefill_key" in names:
        axes, table = on_cached(axes, table)
    return full(axes, table, (3, 0, 1, 2) if len(axes) == 4 else (0, 1))


def _experts(rows: Rows, expert_parallel: int) -> Experts:
    """The whole mixture-of-experts block of one GPU."""
    need(rows, ["tokens", "activated_experts", "time_us"])
    rows = _of_expert_degree(rows, expert_parallel)
    by = {name: sizes(rows, name, 1) for name in ("tokens", "activated_experts")}
    seconds = times(rows, "time_us") * MICRO
    unique(rows, list(by))
    axes, table = attention_table(rows, np.ones(len(seconds), dtype=bool), by, seconds, "the expert block")
    known = np.isfinite(table)
    blocks = tuple(Curve(axes[1][known[i]], table[i, known[i]]) for i in range(len(axes[0])))
    return Experts(axes[0], blocks, expert_parallel)


def _of_expert_degree(rows: Rows, expert_parallel: int) -> Rows:
    if "ep" not in rows.data.columns:
        if expert_parallel > 1:
            raise ScenarioError(f"{rows.path}: has no column 'ep' for expert parallel {expert_parallel}; measure it")
        return rows
    degrees = sizes(rows, "ep", 1)
    if not (degrees == expert_parallel).any():
        listed = ", ".join(f"{degree:g}" for degree in np.unique(degrees))
        raise ScenarioError(f"{rows.path}: has no rows with ep = {expert_parallel} (it has {listed}); measure them")
    return rows.take(degrees == expert_parallel)
