"""Tables of benchmark points, one server (model, system, parallelism) each, read from CSV logs of several layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Bools, Floats, Ints
from llmopt.calibrate.bench_model import Load
from llmopt.errors import ScenarioError
from llmopt.explain import suggestion

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = {
    "concurrency": ("concurrency", "max_concurrency", "silicon_concurrency", "users", "batch", "batch_size"),
    "prompt": ("isl", "prompt", "prompt_size", "prompt_tokens", "prompt_len", "input_len", "input_tokens", "input"),
    "output": ("osl", "output", "token_size", "output_tokens", "output_len", "output_size"),
    "ttft": ("ttft", "mean_ttft", "avg_ttft", "median_ttft", "silicon_ttft", "prompt_time"),
    "tpot": ("tpot", "mean_tpot", "avg_tpot", "median_tpot", "silicon_tpot", "token_time", "itl", "mean_itl"),
}
"""Names of the columns of a log; ttft and tpot end in _s, _ms or _us."""
SETTING = {
    "model": ("model", "model_path", "model_name", "model_id"),
    "system": ("system", "hardware", "gpu", "accelerator", "device"),
    "backend": ("backend", "engine", "framework"),
    "version": ("version", "backend_version", "engine_version"),
    "precision": ("precision", "dtype", "quantization"),
    "gemm": ("gemm_quant_mode",),
    "moe": ("moe_quant_mode",),
    "tp": ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size"),
    "pp": ("pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size"),
    "dp": ("dp", "attention_dp_size", "data_parallel", "data_parallel_size"),
    "moe_tp": ("moe_tp_size",),
    "ep": ("ep", "moe_ep_size", "expert_parallel"),
}
"""Columns that tell one server from another."""
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SPLITWISE = {"prompt_size", "batch_size", "token_size", "prompt_time", "token_time"}
"""Columns of Splitwise's perf_model.csv: static batches, times in ms (github.com/Mutinifni/splitwise-sim)."""
SILICON = re.compile(r"silicon_concurrency=(\d+)")
"""Where aiconfigurator's silicon tables keep the concurrency: in a note on the origin of the row."""
ENDED_EARLY, RAN_LONG = 0.9, 1.25
"""Generated over demanded tokens, from the end-to-end time: below the first, the output ended early and its true
length is taken; above the second, the batch cannot have run at once and the point is left out."""


@dataclass(frozen=True, eq=False)
class BenchTable:
    """Benchmark points of one server.

    setting: what tells it from others, by the keys of `SETTING`; load: conditions of the points; ttft, tpot: measured
    means, s (n,); repeats: rows that each point is the median of (n,); source: file.
    """

    setting: Mapping[str, str]
    load: Load
    ttft: Floats
    tpot: Floats
    repeats: Ints
    source: str = ""

    @property
    def label(self) -> str:
        """The setting in a line, degrees of parallelism only where they say something, or the file."""
        said = {key: value for key, value in self.setting.items() if value}
        words = [said[key].rsplit("/", 1)[-1] for key in ("model", "system", "backend", "version") if key in said]
        words += [said[key] for key in ("precision", "gemm") if key in said][:1]
        words += [f"{key} {said[key]}" for key in ("tp", "pp", "dp", "ep") if said.get(key, "0") not in ("0", "1")]
        return " ".join(words) or self.source

    def some(self, chosen: Ints | Bools) -> BenchTable:
        """The points with these indices."""
        parts = (self.load.some(chosen), self.ttft[chosen], self.tpot[chosen], self.repeats[chosen])
        return BenchTable(self.setting, *parts, self.source)


@dataclass(frozen=True)
class BenchFile:
    """What a log holds: `tables` of one server each, by label; `left_out`: rows that are no such points, by reason."""

    tables: tuple[BenchTable, ...]
    left_out: Mapping[str, int]
    source: str

    def choose(self, select: Mapping[str, str] | None = None) -> BenchTable:
        """The one table whose setting has these values, compared without case and publisher.

        Raises
        ------
        ScenarioError
            If a key is unknown, or not exactly one table fits.
        """
        found = [t for t in self.tables if _fits(t, select or {}, self.source)]
        if len(found) == 1:
            return found[0]
        if not found:
            wanted = ", ".join(f"{k} = {v}" for k, v in (select or {}).items())
            known = "; ".join(dict.fromkeys(t.label for t in self.tables[:4]))
            raise ScenarioError(f"{self.source}: has no points with {wanted}; it has {known} and the like")
        differ = {k: list(dict.fromkeys(t.setting[k] or "none" for t in found)) for k in SETTING}
        told = "; ".join(f"{k} = {', '.join(v[:6])}" for k, v in differ.items() if len(v) > 1)
        raise ScenarioError(f"{self.source}: mixes {len(found)} servers; select one by {told}")


def _fits(table: BenchTable, select: Mapping[str, str], source: str) -> bool:
    def plain(text: str) -> str:
        return text.lower().rsplit("/", 1)[-1]

    for key in select:
        if key not in SETTING:
            raise ScenarioError(f"{source}: servers are not told by {key!r}; {suggestion(key, tuple(SETTING))}")
    return all(plain(table.setting[key]) == plain("" if v == "none" else v) for key, v in select.items())


def read_benchmarks(path: str | Path, columns: Mapping[str, str] | None = None, *, static: bool = False) -> BenchFile:
    """The benchmark points of a CSV log, by server.

    Known layouts are aiconfigurator's ``silicon_sample.csv`` (rows of disaggregated serving are left out) and
    Splitwise's ``perf_model.csv``; any other table needs the columns of `QUANTITIES`, under the names there or those
    of `columns`. Points of equal load are repeats, of which the medians are taken. The concurrency is that of a whole
    deployment and is divided among its attention data-parallel ranks.

    Parameters
    ----------
    columns
        Names of columns by the keys of `QUANTITIES` and `SETTING`, with a unit for times: ``{"ttft": "latency:ms"}``.
    static
        Whether the requests of a point start together and none follows (see `Load`); Splitwise's do.

    Raises
    ------
    ScenarioError
        If a column is missing, a number is impossible, or no point is left.
    """
    data = _rows(Path(path))
    names = _columns(path, list(map(str, data.columns)), columns or {})
    splitwise = set(data.columns) >= SPLITWISE
    keep, left_out = _aggregated(data)
    rows = data[keep].reset_index(drop=True)
    line = np.flatnonzero(keep) + 2
    table = _numbers(path, rows, names, line)
    for key in SETTING:
        table[key] = _text(rows[names[key]]) if key in names else ""
    if "silicon_data_source" in rows:
        told = rows["silicon_data_source"].astype(str).str.extract(SILICON)[0].astype(float)
        ranks = table["dp"].map(lambda v: float(v or 1))
        table["concurrency"] = np.where(told.notna(), told, table["concurrency"] * ranks)
    if splitwise and "e2e_time" in rows:
        table["e2e"] = rows["e2e_time"].to_numpy(dtype=float) * UNITS["ms"]
    tables = tuple(_tables(table, str(path), static or splitwise, left_out))
    if not tables:
        reasons = "; ".join(f"{rows} rows are {why}" for why, rows in left_out.items())
        raise ScenarioError(f"{path}: has no benchmark point of aggregated serving ({reasons or 'no rows'}); add some")
    return BenchFile(tables, left_out, str(path))


def _rows(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path, skipinitialspace=True)
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise ScenarioError(f"{path}: is not readable CSV ({' '.join(str(error).split())}); correct it") from None


def _aggregated(data: pd.DataFrame) -> tuple[Bools, dict[str, int]]:
    if "mode" not in data:
        return np.ones(len(data), dtype=bool), {}
    apart = (data["mode"].astype(str).str.lower() == "disagg").to_numpy()
    return ~apart, {"of disaggregated serving": int(apart.sum())} if apart.any() else {}


def _columns(path: str | Path, have: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Column by quantity and setting; times as ``name:unit``."""
    plain = {name.strip().lower(): name for name in have}
    known = {**QUANTITIES, **SETTING}
    for key in given:
        if key not in known:
            raise ScenarioError(f"{path}: {key!r} is no column to name; {suggestion(key, tuple(known))}")
    found = {}
    for key, aliases in known.items():
        column = given.get(key) or _recognised(key, aliases, plain)
        if column is None and key in QUANTITIES:
            more = "_ms" if key in ("ttft", "tpot") else ""
            raise ScenarioError(f"{path}: has no column for {key}; name one of {', '.join(have)} as {aliases[0]}{more}")
        if column is not None:
            name, _, unit = column.rpartition(":") if ":" in column else (column, "", "")
            if name not in have:
                raise ScenarioError(f"{path}: has no column {name!r} for {key}; {suggestion(name, tuple(have))}")
            found[key] = f"{name}:{_unit(path, key, name, unit, have)}" if key in ("ttft", "tpot") else name
    return found


def _recognised(key: str, aliases: Sequence[str], plain: Mapping[str, str]) -> str | None:
    endings = ("", *(f"_{unit}" for unit in UNITS)) if key in ("ttft", "tpot") else ("",)
    return next((plain[a + end] for a in aliases for end in endings if a + end in plain), None)


def _unit(path: str | Path, key: str, name: str, unit: str, have: Sequence[str]) -> str:
    unit = unit or name.rpartition("_")[2].lower()
    if unit not in UNITS and set(have) >= SPLITWISE:
        return "ms"
    if unit not in UNITS:
        raise ScenarioError(f"{path}: column {name!r} has no unit; name it {key}_ms, or give it as {key}={name}:ms")
    return unit


def _numbers(path: str | Path, rows: pd.DataFrame, names: Mapping[str, str], line: Ints) -> pd.DataFrame:
    """Positive numbers of all quantities, times in seconds."""
    import pandas as pd

    table = pd.DataFrame(index=rows.index)
    for key in QUANTITIES:
        name, _, unit = names[key].rpartition(":") if key in ("ttft", "tpot") else (names[key], "", "s")
        values = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=float)
        least = 2.0 if key == "output" else 0.0
        bad = ~(np.isfinite(values) & (values > 0) & (values >= least))
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            need = "2 tokens or more, as one token has no TPOT" if key == "output" else "a positive number"
            raise ScenarioError(f"{path} line {line[i]}: {name} is {rows[name].iloc[i]}; give {need}")
        table[key] = values * UNITS[unit]
    return table


def _text(values: pd.Series) -> pd.Series:
    """Text of a column, whole numbers without a point, nothing for what is missing."""
    return values.map(lambda v: "" if v != v else str(int(v)) if isinstance(v, float) and v == int(v) else str(v))


def _tables(table: pd.DataFrame, source: str, static: bool, left_out: dict[str, int]) -> list[BenchTable]:
    load, times = ["concurrency", "prompt", "output"], [c for c in ("ttft", "tpot", "e2e") if c in table]
    keys = list(SETTING)
    grouped = table.groupby([*keys, *load], sort=True)
    points = grouped[times].median()
    points["repeats"] = grouped.size()
    points = points.reset_index()
    if "e2e" in points:
        points = _really_generated(points, left_out)
    tables = []
    for values, mine in points.groupby(keys, sort=True):
        setting = dict(zip(keys, map(str, values), strict=True))
        c, s, o, ttft, tpot = (mine[k].to_numpy(dtype=float) for k in (*load, "ttft", "tpot"))
        c = c / float(setting["dp"] or 1)
        tables.append(BenchTable(setting, Load(c, s, o, static), ttft, tpot, mine["repeats"].to_numpy(), source))
    return tables


def _really_generated(points: pd.DataFrame, left_out: dict[str, int]) -> pd.DataFrame:
    tokens = 1.0 + (points["e2e"] - points["ttft"]) / points["tpot"]
    part = tokens / points["output"]
    if (long := part > RAN_LONG).any():
        left_out["points whose batch did not run at once"] = int(long.sum())
    points["output"] = points["output"].where(part >= ENDED_EARLY, np.maximum(tokens, 2.0))
    return points[~long]
