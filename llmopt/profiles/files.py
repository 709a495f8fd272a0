"""Rows of profile files, CSV or Parquet, and what every one of them must satisfy; each refusal is one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmopt.arrays import Bools, Floats, Ints
from llmopt.errors import ScenarioError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rows:
    """Rows of one file: `data` by column, `line` (n,) where each stands, counted in `unit`s from 1."""

    path: Path
    data: pd.DataFrame
    line: Ints
    unit: str = "line"

    def take(self, keep: Bools) -> Rows:
        """The rows for which `keep` (n,) holds."""
        return Rows(self.path, self.data[keep], self.line[keep], self.unit)

    def place(self, row: int) -> str:
        """File and line of a row, as sentences start."""
        return f"{self.path}: {self.unit} {self.line[row]}"


def read_rows(path: Path) -> Rows:
    """All rows of a CSV or Parquet file.

    Raises
    ------
    ScenarioError
        If the file is missing, empty or not readable, or Parquet support is not installed.
    """
    import pandas as pd

    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        data = pd.read_csv(path, skip_blank_lines=False, index_col=False, low_memory=False)
    except pd.errors.EmptyDataError:
        raise ScenarioError(f"{path}: is empty; write the measured table into it") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: is not readable CSV ({str(error).strip()}); correct the file") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    keep = ~data.isna().all(axis=1).to_numpy()
    return _some(Rows(path, data[keep], np.flatnonzero(keep) + 2))


def _parquet(path: Path) -> Rows:
    import pandas as pd

    try:
        data = pd.read_parquet(path)
    except ImportError:
        raise ScenarioError(
            f"{path}: reading Parquet needs pyarrow; install it with pip install llmopt[parquet]"
        ) from None
    except Exception as error:
        raise ScenarioError(f"{path}: is not a readable Parquet file ({error}); write it again") from None
    return _some(Rows(path, data, np.arange(1, len(data) + 1), "row"))


def _some(rows: Rows) -> Rows:
    if len(rows.data) == 0:
        raise ScenarioError(f"{rows.path}: is empty (a header without rows); write the measured table into it")
    return rows


def need(rows: Rows, columns: Iterable[str]) -> None:
    """Refuse a file that lacks one of the columns, naming those that it has."""
    missing = [column for column in columns if column not in rows.data.columns]
    if missing:
        found = list(rows.data.columns)
        listed = ", ".join(map(repr, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise ScenarioError(f"{rows.path}: has no column {missing[0]!r} (found {listed}); add it")


def numbers(rows: Rows, column: str) -> Floats:
    """A column as numbers (n,), NaN where it holds something else."""
    import pandas as pd

    need(rows, [column])
    values = pd.to_numeric(rows.data[column], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    return np.asarray(values)


def times(rows: Rows, column: str, zero: bool = False) -> Floats:
    """A column of times (n,), in the file's unit; every one must be positive (or, with `zero`, not negative)."""
    values = numbers(rows, column)
    good = np.isfinite(values) & ((values >= 0) if zero else (values > 0))
    _all(rows, column, good, "is no positive time; measure it again or take the row out")
    return values


def sizes(rows: Rows, column: str, least: int = 0) -> Floats:
    """A column of counts (n,): tokens, sequences, bytes; finite and at least `least`."""
    values = numbers(rows, column)
    _all(rows, column, np.isfinite(values) & (values >= least), f"is no count of at least {least}; correct it")
    return values


def words(rows: Rows, column: str) -> NDArray[np.str_]:
    """A column as text (n,)."""
    need(rows, [column])
    return np.array([str(value) for value in rows.data[column]], dtype=np.str_)


def flags(rows: Rows, column: str) -> Bools:
    """A column of true and false (n,); false where it is missing."""
    if column not in rows.data.columns:
        return np.zeros(len(rows.line), dtype=bool)
    return np.array([str(value).lower() == "true" for value in rows.data[column]], dtype=bool)


def _all(rows: Rows, column: str, good: Bools, complaint: str) -> None:
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        value: Any = rows.data[column].iloc[row]
        more = f" (and {int((~good).sum()) - 1} more rows)" if (~good).sum() > 1 else ""
        raise ScenarioError(f"{rows.place(row)}: {column} = {value!s} {complaint}{more}")


def unique(rows: Rows, columns: list[str]) -> None:
    """Refuse a second row with the same values of `columns`."""
    again = rows.data.duplicated(columns).to_numpy()
    if again.any():
        row = int(np.flatnonzero(again)[0])
        values = rows.data[columns].iloc[row]
        same = (rows.data[columns] == values).all(axis=1).to_numpy()
        first = int(np.flatnonzero(same)[0])
        key = ", ".join(f"{column} = {value!s}" for column, value in values.items())
        raise ScenarioError(
            f"{rows.place(row)}: is a duplicate of {rows.unit} {rows.line[first]} ({key}); keep one of the two"
        )


def one_value(rows: Rows, column: str) -> int:
    """The single value of a column that describes the whole file, such as a number of heads."""
    values = np.unique(numbers(rows, column))
    if len(values) != 1 or not np.isfinite(values[0]):
        listed = ", ".join(f"{value:g}" for value in values[:5])
        raise ScenarioError(f"{rows.path}: {column} has several values ({listed}); keep the rows of one model")
    return int(values[0])
