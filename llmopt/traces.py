"""Real traces: read public layouts found by content, name every row that cannot be used, write them again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.errors import ScenarioError
from llmopt.output import whole
from llmopt.trace_data import Prefixes, Skipped, Trace
from llmopt.trace_files import Table, read_table
from llmopt.trace_formats import Layout, find_layout, format_names
from llmopt.trace_summary import TraceSummary, trace_summary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Prefixes", "Skipped", "Trace", "TraceSummary", "format_names", "read_trace", "trace_summary", "write_trace"]

LONGEST = 10_000_000


def read_trace(path: str | Path, format: str | None = None, columns: Mapping[str, str] | None = None) -> Trace:
    """Read a trace file.

    Rows that are no requests (unreadable, a length that is not a whole number of at least 1, no time) are kept in
    `Trace.skipped` with their line and the reason. A row of zero output tokens is a request that failed, for an
    engine emits at least one token; it is skipped too. Requests out of order are sorted and counted.

    Parameters
    ----------
    path
        CSV, JSON lines, JSON or Parquet, plain or gzipped; found by content.
    format
        One of `format_names()`; by default found by the columns.
    columns
        The columns of any other layout: keys ``arrival`` (s, or a date), or ``arrival_ms``; ``prompt`` and
        ``output`` (tokens); ``hashes``. Without an arrival the trace has lengths only.

    Raises
    ------
    ScenarioError
        If the file cannot be read, lacks a column, or has no usable row.
    """
    table = read_table(path)
    layout = find_layout(path, table.data.columns, format, columns)
    if isinstance(layout, str):
        from llmopt.trace_servegen import sample_servegen

        return sample_servegen(table, Path(path))
    return _trace(table, layout, str(path))


def _trace(table: Table, layout: Layout, path: str) -> Trace:
    data = table.data
    time = np.zeros(len(data)) if layout.arrival is None else _seconds(data[layout.arrival], layout.scale)
    prompt, output = _numbers(data[layout.prompt]), _numbers(data[layout.output])
    good = np.isfinite(time) & _is_length(prompt) & _is_length(output)
    skipped = sorted([*table.skipped, *_reasons(table, layout, time, good)])
    if not good.any():
        first = f", the first is {table.unit} {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise ScenarioError(f"{path}: has no usable request (0 of {len(skipped)} rows{first}); give at least one")
    rows = np.flatnonzero(good)
    order = rows[np.argsort(time[rows], kind="stable")]
    return Trace(
        arrival=time[order] - time[order[0]],
        prompt=prompt[order].astype(np.int64),
        output=output[order].astype(np.int64),
        line=table.line[order],
        format=layout.name,
        path=path,
        unit=table.unit,
        timed=layout.arrival is not None,
        skipped=tuple(skipped),
        reordered=int((np.diff(time[rows]) < 0).sum()),
        prefixes=None if layout.hashes is None else _prefixes(data[layout.hashes], layout.block).take(order),
    )


def _numbers(column: pd.Series[Any]) -> Floats:
    import pandas as pd

    return np.asarray(pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan))


def _seconds(column: pd.Series[Any], scale: float) -> Floats:
    """Seconds of numbers in the layout's unit or of dates; dates with and without fractions and zones mix."""
    import pandas as pd

    numbers = _numbers(column)
    if np.isfinite(numbers).any() or column.isna().all():
        return _epoch_seconds(numbers * scale)
    dates = pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True)
    start = dates.min()
    if pd.isna(start):
        return np.full(len(column), np.nan)
    return np.asarray((dates - start).dt.total_seconds().to_numpy(dtype=float, na_value=np.nan))


def _epoch_seconds(time: Floats) -> Floats:
    """Times beyond the year 5000 are epoch times in milli-, micro- or nanoseconds."""
    largest = np.nanmax(np.abs(time), initial=0.0)
    return time / (1e9 if largest > 1e17 else 1e6 if largest > 1e14 else 1e3 if largest > 1e11 else 1.0)


def _is_length(tokens: Floats) -> Bools:
    return np.asarray((tokens >= 1) & (tokens <= LONGEST) & (tokens == np.floor(tokens)))


def _reasons(table: Table, layout: Layout, time: Floats, good: Bools) -> list[Skipped]:
    """Why each bad row is none; the first reason counts."""
    out = []
    for i in np.flatnonzero(~good):
        row = table.data.iloc[i]
        reason = "" if np.isfinite(time[i]) else f"{layout.arrival} = {row[str(layout.arrival)]!s} is no time"
        reason = reason or _length_reason(layout.prompt, row[layout.prompt])
        reason = reason or _length_reason(layout.output, row[layout.output])
        out.append(Skipped(int(table.line[i]), reason))
    return out


def _length_reason(name: str, value: Any) -> str:
    try:
        tokens = float(value)
    except (TypeError, ValueError):
        tokens = np.nan
    if _is_length(np.array([tokens]))[0]:
        return ""
    if tokens == 0:
        return f"{name} = 0, a request without {name}"
    return f"{name} = {value!s} is no whole number of tokens from 1 to {LONGEST}"


def _prefixes(column: pd.Series[Any], block: int) -> Prefixes:
    import pandas as pd

    lists = [_hashes(value) for value in column]
    start = np.concatenate([[0], np.cumsum([len(one) for one in lists], dtype=np.int64)])
    flat = list(chain.from_iterable(lists))
    try:
        ids = np.array(flat, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        ids = np.asarray(pd.factorize(np.array(flat, dtype=object))[0], dtype=np.int64)
    return Prefixes(ids, start, block)


def _hashes(value: Any) -> list[Any]:
    """A list of hashes; in CSV they stand in one field, apart by spaces."""
    if isinstance(value, str):
        return value.split()
    return value if isinstance(value, list) else list(value) if isinstance(value, (tuple, np.ndarray)) else []


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace in the generic layout (arrival, prompt, output, hashes), as the suffix of `path` says; returns it.

    Suffixes: ``.csv``, ``.jsonl``, ``.parquet``, the first two also with ``.gz``. The layout has no place for the
    size of the hashed blocks; a reader takes them for 512 tokens.

    Raises
    ------
    ScenarioError
        If the suffix is another, the file cannot be written, or Parquet support is not installed.
    """
    import pandas as pd

    columns: dict[str, Any] = {"arrival": trace.arrival} if trace.timed else {}
    columns |= {"prompt": trace.prompt, "output": trace.output}
    kind = Path(path).name.removesuffix(".gz").rsplit(".", 1)[-1]
    if trace.prefixes is not None:
        lists = [trace.prefixes.of(i).tolist() for i in range(len(trace))]
        columns["hashes"] = [" ".join(map(str, one)) for one in lists] if kind == "csv" else lists
    data = pd.DataFrame(columns)
    with whole(path) as temporary:
        if kind == "csv":
            data.to_csv(temporary, index=False)
        elif kind == "jsonl":
            data.to_json(temporary, orient="records", lines=True, double_precision=15)
        elif kind == "parquet":
            _write_parquet(data, temporary)
        else:
            raise ScenarioError(f"{path}: cannot write a trace with this suffix; use .csv, .jsonl or .parquet")
    return Path(path)


def _write_parquet(data: pd.DataFrame, path: str | Path) -> None:
    try:
        data.to_parquet(path, index=False)
    except ImportError:
        raise ScenarioError(
            f"{path}: writing Parquet needs pyarrow; install it with pip install llmopt[parquet]"
        ) from None
