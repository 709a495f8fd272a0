"""What a run measured: requests.jsonl, one line per request, and timeseries.csv, one line per second."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import ScenarioError

LENGTHS = ("input_toks", "output_toks")
TIMES = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
ENGINE = TIMES[1:]
"""Times by the engine's own clock, in the order in which a request meets them."""
LONGEST = 10_000_000
SERIES = {"t": "times", "running": "running", "waiting": "waiting", "kv_cache_pct": "memory"}


@dataclass(frozen=True, eq=False)
class Records:
    """Requests of a run in order of arrival; arrays of shape (n,), times in s from the first arrival.

    arrival: when the client sent it, moved to the engine's clock; queued: when the engine took notice of it;
    scheduled: start of the step that first held it; first_token, finish: its first and last token. start: the first
    arrival by the client's clock, s.
    """

    ids: tuple[str, ...]
    prompt: Ints
    output: Ints
    arrival: Floats
    queued: Floats
    scheduled: Floats
    first_token: Floats
    finish: Floats
    start: float = 0.0

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Curves:
    """Engine state over time; arrays of shape (n_times,).

    times: s from the first arrival; running, waiting: requests in the batch, and queued or preempted, over all
    replicas; memory: KV memory in use, % of all blocks.
    """

    times: Floats
    running: Floats
    waiting: Floats
    memory: Floats


def read_records(path: Path) -> Records:
    """The requests of a requests.jsonl.

    Clients and engines use different clocks (Unix time and time since boot). The arrivals are moved as a whole so
    that the request which waited least for the engine's notice was noticed at once.

    Raises
    ------
    ScenarioError
        If the file is missing or empty, or a line lacks a field, has a value that cannot be, or repeats an id.
    """
    rows = _rows(path)
    ids = _ids(path, rows)
    columns = {name: _numbers(path, rows, name) for name in (*LENGTHS, *TIMES)}
    for name in LENGTHS:
        _check_lengths(path, columns[name], name)
    _check_order(path, columns)
    first = float(columns["arrival_time"].min())
    arrival = columns["arrival_time"] - first
    zero = np.min(columns["queued_ts"] - arrival)
    order = np.argsort(arrival, kind="stable")
    prompt, output = (columns[name][order].astype(np.int64) for name in LENGTHS)
    queued, scheduled, first_token, finish = (columns[name][order] - zero for name in ENGINE)
    names = tuple(ids[i] for i in order)
    return Records(names, prompt, output, arrival[order], queued, scheduled, first_token, finish, first)


def read_curves(path: Path, shift: float) -> Curves | None:
    """The curves of a timeseries.csv, or None where there is none; `shift` (s) is added to its times.

    Raises
    ------
    ScenarioError
        If a column is missing, a value is no number, or the times do not increase.
    """
    if not path.exists():
        return None
    rows = list(csv.DictReader(read_text(path, "a table of the engine's state").splitlines()))
    lines = [(i, row) for i, row in enumerate(rows, 2)]
    if len(lines) < 2:
        raise ScenarioError(f"{path}: has {len(lines)} rows of values; give two or more, or remove the file")
    wanted = [name for name in SERIES if name != "kv_cache_pct" or name in rows[0]]
    columns = {SERIES[name]: _numbers(path, lines, name) for name in wanted}
    if (np.diff(columns["times"]) <= 0).any():
        i = int(np.argmax(np.diff(columns["times"]) <= 0)) + 1
        raise ScenarioError(f"{path}: line {lines[i][0]} has a time t not after the line above; sort the lines by t")
    columns.setdefault("memory", np.full(len(lines), np.nan))
    return Curves(times=columns.pop("times") + shift, **columns)


def read_text(path: Path, what: str) -> str:
    """The text of a file of a run; `what` it holds is named if it is missing.

    Raises
    ------
    ScenarioError
        If it is missing or not a text file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ScenarioError(f"{path}: no such file; a run folder needs {path.name}, {what}") from None
    except UnicodeDecodeError:
        raise ScenarioError(f"{path}: is not a text file; give {what}") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror}); check the file") from None


Rows = Sequence[tuple[int, dict[str, Any]]]
"""Line numbers and values."""


def _rows(path: Path) -> Rows:
    text = read_text(path, "one request per line")
    rows = [(i, _object(path, i, line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise ScenarioError(f"{path}: is empty; give at least one request")
    return rows


def _object(path: Path, i: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise ScenarioError(f"{path}: line {i} is not valid JSON; give one request per line") from None
    if not isinstance(value, dict):
        raise ScenarioError(f"{path}: line {i} is not a JSON object; give one request per line")
    return value


def _ids(path: Path, rows: Rows) -> list[str]:
    """The names of the requests, or their numbers where none has one."""
    if not any("request_id" in row for _, row in rows):
        return [str(k) for k in range(len(rows))]
    ids = [str(_value(path, i, row, "request_id")) for i, row in rows]
    seen: dict[str, int] = {}
    for (i, _), name in zip(rows, ids, strict=True):
        if name in seen:
            raise ScenarioError(
                f"{path}: lines {seen[name]} and {i} both have request_id = {name!r}; keep one line per request"
            )
        seen[name] = i
    return ids


def _value(path: Path, i: int, row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ScenarioError(f"{path}: line {i} has no {name}; every line needs it")
    return row[name]


def _numbers(path: Path, rows: Rows, name: str) -> Floats:
    return np.array([_number(path, i, name, _value(path, i, row, name)) for i, row in rows])


def _number(path: Path, i: int, name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise ScenarioError(f"{path}: line {i} has {name} = {value!r}, which is no finite number; correct it")
    return number


def _check_lengths(path: Path, tokens: Floats, name: str) -> None:
    bad = (tokens < 1) | (tokens > LONGEST) | (tokens != np.floor(tokens))
    if bad.any():
        i = int(np.argmax(bad))
        raise ScenarioError(
            f"{path}: request {i + 1} has {name} = {tokens[i]:g}, no whole number from 1 to {LONGEST}; "
            "leave out requests that failed"
        )


def _check_order(path: Path, columns: dict[str, Floats]) -> None:
    for before, after in pairwise(ENGINE):
        bad = columns[after] < columns[before]
        if bad.any():
            i = int(np.argmax(bad))
            raise ScenarioError(
                f"{path}: request {i + 1} has {after} = {columns[after][i]:.6f} before {before} = "
                f"{columns[before][i]:.6f}; times must follow {' <= '.join(ENGINE)}"
            )
