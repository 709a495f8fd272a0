"""Containers of traces: CSV, JSON lines, JSON and Parquet files, plain or gzipped, read into columns.

The container is found by content, not by name. A row that cannot be parsed is kept as a `Skipped`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.arrays import Ints
from llmopt.errors import ScenarioError
from llmopt.trace_data import Skipped

if TYPE_CHECKING:
    import pandas as pd

SERVEGEN_ROW = re.compile(r"^\d+,[\d.eE+-]+,[\d.eE+-]*,(Gamma|Weibull)?,[\d.eE+-]*,[\d.eE+-]*$")
SERVEGEN_COLUMNS = ["t_s", "rate", "cv", "pattern", "param1", "param2"]
BAD_LINE = re.compile(r"line (\d+): expected (\d+) fields, saw (\d+)")


@dataclass(frozen=True)
class Table:
    """Rows of a file: `data` by column, `line` (n_rows,) where each stands, counted in `unit`s from 1."""

    data: pd.DataFrame
    line: Ints
    unit: str = "line"
    skipped: tuple[Skipped, ...] = ()


def read_table(path: str | Path) -> Table:
    """The rows of a trace file, whatever its container.

    Raises
    ------
    ScenarioError
        If the file is missing, empty, a folder, or none of the containers.
    """
    raw = _bytes(Path(path))
    if raw[:4] == b"PAR1":
        return _parquet(raw, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ScenarioError(f"{path}: is neither text nor Parquet; give CSV, JSON lines or Parquet") from None
    if not text.strip():
        raise ScenarioError(f"{path}: is empty; give a trace with at least one request")
    return (_json if text.lstrip()[0] in "{[" else _csv)(text, path)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError:
        raise ScenarioError(f"{path}: no such trace file; check the path") from None
    except IsADirectoryError:
        raise ScenarioError(f"{path}: is a folder; give a trace file in it") from None
    except (OSError, EOFError) as error:
        raise ScenarioError(f"{path}: cannot be read ({error}); check the file") from None


def _parquet(raw: bytes, path: str | Path) -> Table:
    import pandas as pd

    try:
        data = pd.read_parquet(io.BytesIO(raw))
    except ImportError:
        raise ScenarioError(
            f"{path}: reading Parquet needs pyarrow; install it with pip install llmopt[parquet]"
        ) from None
    except Exception as error:
        raise ScenarioError(f"{path}: is not a readable Parquet file ({error}); write it again") from None
    return Table(data, np.arange(1, len(data) + 1), "row")


def _csv(text: str, path: str | Path) -> Table:
    import pandas as pd

    header = text.lstrip().split("\n", 1)[0].strip()
    names = SERVEGEN_COLUMNS if SERVEGEN_ROW.match(header) else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data = pd.read_csv(
                io.StringIO(text),
                sep=max(",;\t", key=header.count),
                names=names,
                index_col=False,
                on_bad_lines="warn",
                skip_blank_lines=False,
                skipinitialspace=True,
            )
        except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise ScenarioError(f"{path}: is not readable CSV ({error}); correct the file") from None
    skipped = [_bad_line(found) for w in caught for found in BAD_LINE.finditer(str(w.message))]
    return _without_blank_rows(data, skipped, first=1 if names else 2)


def _bad_line(found: re.Match[str]) -> Skipped:
    line, expected, saw = map(int, found.groups())
    return Skipped(line, f"has {saw} fields instead of {expected}")


def _without_blank_rows(data: pd.DataFrame, skipped: list[Skipped], first: int) -> Table:
    """Line numbers count the lines that the parser left out; blank lines are not rows."""
    total = len(data) + len(skipped)
    line = np.setdiff1d(np.arange(first, first + total), [s.line for s in skipped])[: len(data)]
    keep = ~data.isna().all(axis=1).to_numpy()
    return Table(data[keep], line[keep], "line", tuple(skipped))


def _json(text: str, path: str | Path) -> Table:
    """JSON lines; else one JSON document: a list of records, or columns in an object."""
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and not line.isspace()]
    values = _all_at_once([line for _, line in numbered]) or [_document(line) for _, line in numbered]
    rows = [(number, value) for (number, _), value in zip(numbered, values, strict=True) if isinstance(value, dict)]
    if len(rows) < 2 and (whole := _document(text)) is not None:
        return _from_document(whole, path)
    if not rows:
        raise ScenarioError(f"{path}: has no valid JSON object in it; give one request per line")
    skipped = tuple(
        Skipped(number, "is not valid JSON" if value is None else "is not a JSON object")
        for (number, _), value in zip(numbered, values, strict=True)
        if not isinstance(value, dict)
    )
    return Table(_frame([value for _, value in rows]), np.array([number for number, _ in rows]), "line", skipped)


def _all_at_once(lines: list[str]) -> list[Any] | None:
    """The values of lines that are all valid, parsed in one call, which takes half the time; else nothing."""
    values = _document("[" + ",".join(lines) + "]")
    return values if isinstance(values, list) and len(values) == len(lines) else None


def _document(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _from_document(whole: Any, path: str | Path) -> Table:
    """A list of records, or an object whose lists of equal length are columns (vLLM's benchmark result)."""
    import pandas as pd

    if isinstance(whole, list):
        records = [r for r in whole if isinstance(r, dict)]
        skipped = tuple(Skipped(i, "is not a JSON object") for i, r in enumerate(whole, 1) if not isinstance(r, dict))
        line = np.array([i for i, r in enumerate(whole, 1) if isinstance(r, dict)], dtype=np.int64)
        return Table(_frame(records), line, "entry", skipped)
    if isinstance(whole, dict) and isinstance(whole.get("input_lens"), list):
        n = len(whole["input_lens"])
        columns = {key: value for key, value in whole.items() if isinstance(value, list) and len(value) == n}
        return Table(pd.DataFrame(columns), np.arange(1, n + 1), "entry")
    if isinstance(whole, dict) and all(isinstance(v, dict) and "output_tokens" in v for v in whole.values()):
        raise ScenarioError(f"{path}: holds ServeGen length tables; give the client table (…-trace.csv) beside it")
    return Table(_frame([whole] if isinstance(whole, dict) else []), np.array([1]), "entry")


def _frame(records: list[Any]) -> pd.DataFrame:
    """Only the columns of the records, without inference on nested values."""
    import pandas as pd

    keys = dict.fromkeys(key for record in records for key in record)
    return pd.DataFrame({key: [record.get(key) for record in records] for key in keys})
