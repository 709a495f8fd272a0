"""ServeGen client tables: rates and gap laws of clients by 600 s windows, from which requests are sampled.

A table is no list of requests. Each row gives a client's rate in a window and the shape of its gaps (Gamma or
Weibull); the lengths of each client stand in a `...chunk-CLIENT-dataset.json` beside the table. Each window gets
the requests that its rate counted; their gaps are drawn from the fitted law and scaled to fill the window, prompt
and output lengths are drawn independently from the newest length table at or before the window.
Source: github.com/alibaba/ServeGen, Xiang et al., NSDI 2026.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError
from llmopt.trace_data import Skipped, Trace
from llmopt.trace_files import Table

WINDOW = 600.0
LIMIT = 1_000_000
"""Most requests sampled from a table; windows are taken in order of time until it is reached."""


class LengthTable(NamedTuple):
    """Distributions of one client from one point in time on: values and cumulative probabilities."""

    prompt: tuple[Ints, Floats]
    output: tuple[Ints, Floats]


def sample_servegen(table: Table, path: Path, seed: int = 0, limit: int = LIMIT) -> Trace:
    """Requests drawn from a client table; the same seed gives the same trace.

    Windows of clients without lengths are in `Trace.skipped`, as are those after `limit` requests.

    Raises
    ------
    ScenarioError
        If no client of the table has a length table beside it.
    """
    rng = np.random.default_rng(seed)
    data = table.data.assign(line=table.line).sort_values("t_s", kind="stable")
    data = data[data["rate"] > 0]
    clients = [int(c) for c in data["client"].tolist()] if "client" in data else [_client_of(path)] * len(data)
    lengths = {c: _length_tables(path, c) for c in dict.fromkeys(clients)}
    if not any(lengths.values()):
        raise ScenarioError(
            f"{path}: is a ServeGen table of rates without lengths; put the client's …-dataset.json files beside it"
        )
    parts, skipped, total = [], list(table.skipped), 0
    rows: list[Any] = list(data.itertuples())
    for row, client in zip(rows, clients, strict=True):
        if total >= limit:
            skipped.append(Skipped(int(row.line), f"comes after the first {limit} requests"))
        elif not lengths[client]:
            skipped.append(Skipped(int(row.line), f"has no length table for client {client}"))
        else:
            parts.append(_window(row, lengths[client], rng))
            total += len(parts[-1][0])
    return _joined(parts, skipped, path)


def _joined(parts: list[tuple[Floats, Ints, Ints, Ints]], skipped: list[Skipped], path: Path) -> Trace:
    arrival, prompt, output, line = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(arrival):
        raise ScenarioError(f"{path}: its windows with lengths hold no request; take a longer table")
    order = np.argsort(arrival, kind="stable")
    start = arrival[order[0]]
    return Trace(
        arrival[order] - start, prompt[order], output[order], line[order], "servegen", str(path), skipped=tuple(skipped)
    )


def _window(row: Any, tables: dict[int, LengthTable], rng: np.random.Generator) -> tuple[Floats, Ints, Ints, Ints]:
    arrival = row.t_s + _gaps(row.pattern, float(row.param1), float(row.rate), rng)
    n = len(arrival)
    lengths = tables[max((t for t in tables if t <= row.t_s), default=min(tables))]
    return arrival, _draw(lengths.prompt, n, rng), _draw(lengths.output, n, rng), np.full(n, int(row.line))


def _gaps(pattern: str, shape: float, rate: float, rng: np.random.Generator) -> Floats:
    """Arrivals in one window from its start: as many as `rate` stands for, with gaps in proportion to the law's."""
    n = round(rate * WINDOW)
    gaps = rng.weibull(shape, n + 1) if pattern == "Weibull" else rng.standard_gamma(shape, n + 1)
    times = np.cumsum(gaps)
    return np.asarray(WINDOW * times[:n] / max(times[n], np.finfo(float).tiny))


def _draw(law: tuple[Ints, Floats], n: int, rng: np.random.Generator) -> Ints:
    values, cumulative = law
    index = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
    return np.asarray(values[np.minimum(index, len(values) - 1)])


def _client_of(path: Path) -> int:
    found = re.search(r"chunk-(\d+)", path.name)
    return int(found[1]) if found else 0


def _length_tables(path: Path, client: int) -> dict[int, LengthTable]:
    """Length tables of a client by the second from which they hold; empty if there is no file or no token counts."""
    found = sorted(path.parent.glob(f"*chunk-{client}-dataset.json*"))
    names = [f for f in found if _family(f) in ("", _family(path))]
    if not names:
        return {}
    raw = names[0].read_bytes()
    whole = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    parsed = {int(t): _lengths(fields) for t, fields in whole.items()}
    return {t: one for t, one in parsed.items() if one is not None}


def _family(path: Path) -> str:
    """What stands before `chunk-...` or `traces...` in a file name: several tables may share a folder."""
    return re.split(r"chunk-|traces?\b", path.name)[0]


def _lengths(fields: dict[str, str]) -> LengthTable | None:
    if not {"input_tokens", "output_tokens"} <= fields.keys():
        return None
    prompt, output = (_law(fields[key]) for key in ("input_tokens", "output_tokens"))
    return LengthTable(prompt, output) if prompt and output else None


def _law(text: str) -> tuple[Ints, Floats] | None:
    """Values of at least one token and cumulative probabilities from a text like ``{13: 0.5, 14: 0.5}``."""
    masses = {max(int(k), 1): float(v) for k, v in ast.literal_eval(text).items() if v > 0}
    if not masses:
        return None
    values = np.array(sorted(masses), dtype=np.int64)
    return values, np.cumsum([masses[v] for v in values.tolist()])
