"""A run folder: requests.jsonl and meta.json, and, where there are, timeseries.csv and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmopt.errors import ScenarioError
from llmopt.runs.records import Curves, Records, read_curves, read_records, read_text
from llmopt.runs.settings import Setting, read_settings

FAR = 60.0
"""Seconds between start and first arrival beyond which the two were not read from one clock."""


@dataclass(frozen=True, eq=False)
class EngineRun:
    """A recorded run: the requests with their times, the engine's settings, and its curves if they were kept."""

    path: str
    records: Records
    settings: Mapping[str, Setting]
    curves: Curves | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return Path(self.path).resolve().name

    def value(self, setting: str) -> Any:
        """The value of a setting, by its vLLM name."""
        return self.settings[setting].value


def read_run(folder: str | Path) -> EngineRun:
    """Read a run folder as LLMServingSim's recorder writes it for vLLM.

    meta.json may lack any setting but the model; absent ones are taken at vLLM's default for that version and marked
    as assumed. The GPU is the recorded device, else `hardware` in config.json, else the part of the folder's name
    before its first underscore. The files may also lie in a subfolder ``vllm``.

    Raises
    ------
    ScenarioError
        If a file is missing, or something in it cannot be: the file, the line or key, what is wrong, what to do.
    """
    home = Path(folder)
    if not home.is_dir():
        what = "is not a folder" if home.exists() else "no such folder"
        raise ScenarioError(f"{folder}: {what}; give a run folder with requests.jsonl and meta.json")
    inner = home / "vllm" if not (home / "requests.jsonl").exists() and (home / "vllm").is_dir() else home
    meta = _json(inner / "meta.json", "the engine's settings")
    records = read_records(inner / "requests.jsonl")
    meta = {**meta, "config": _instance(home / "config.json"), "folder": {"gpu": _named_gpu(home)}}
    settings = read_settings(meta, inner / "meta.json")
    return EngineRun(str(folder), records, settings, read_curves(inner / "timeseries.csv", _shift(meta, records.start)))


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, what))
    except ValueError as error:
        raise ScenarioError(f"{path}: is not valid JSON ({error}); correct the file") from None
    if not isinstance(value, dict):
        raise ScenarioError(f"{path}: is not a JSON object; give {what}")
    return value


def _instance(path: Path) -> dict[str, Any]:
    """The first instance of LLMServingSim's config.json, nothing where the file or the instance is missing."""
    if not path.exists():
        return {}
    node: Any = _json(path, "the cluster as LLMServingSim describes it")
    for key in ("nodes", "instances"):
        items = node.get(key) if isinstance(node, dict) else None
        node = items[0] if isinstance(items, list) and items else {}
    return node if isinstance(node, dict) else {}


def _named_gpu(home: Path) -> str | None:
    gpu, underscore, _ = home.resolve().name.partition("_")
    return gpu if underscore and gpu else None


def _shift(meta: Mapping[str, Any], first: float) -> float:
    """Seconds from the first arrival to the start of the recorder, from which timeseries.csv counts.

    Both are in Unix time; 0 where the start is not recorded, or lies so far away that the clocks must differ.
    """
    try:
        shift = datetime.fromisoformat(str(meta.get("started_at"))).timestamp() - first
    except ValueError:
        return 0.0
    return shift if abs(shift) < FAR else 0.0
