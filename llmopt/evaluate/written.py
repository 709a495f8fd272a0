"""How comparisons of every kind are written: JSON, CSV and Parquet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llmopt import __version__
from llmopt.output import to_json, write
from llmopt.scenario import Scenario


class Timed(Protocol):
    """A row of a comparison."""

    @property
    def policy(self) -> str:
        """Name of the policy."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall-clock seconds by stage."""
        ...


class Written(ABC):
    """A comparison that has plain data, flat rows and timings, and hence files."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Everything but the timings, as plain data."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """Flat rows, one per policy."""

    @abstractmethod
    def timings(self) -> dict[str, dict[str, float]]:
        """Wall-clock seconds of each policy."""

    @staticmethod
    def seconds_of(outcomes: Iterable[Timed]) -> dict[str, dict[str, float]]:
        """Wall-clock seconds by policy and stage."""
        return {outcome.policy: dict(outcome.seconds) for outcome in outcomes}

    @staticmethod
    def stamp(scenario: Scenario, seeds: Iterable[int]) -> dict[str, Any]:
        """What every flat row begins with: scenario, digest, version and seeds."""
        head = {"scenario": scenario.name, "digest": scenario.digest, "llmopt": __version__}
        return head | {"seeds": " ".join(str(seed) for seed in seeds)}

    @staticmethod
    def heading(scenario: Scenario) -> dict[str, Any]:
        """What the plain data begin with: version, scenario, question, digest and rate (requests/s)."""
        return {
            "llmopt": __version__,
            "scenario": scenario.name,
            "question": scenario.question,
            "digest": scenario.digest,
            "rate": scenario.workload.total_rate,
        }

    def to_json(self, path: str | Path | None = None, timings: bool = True) -> str:
        """JSON text, also written to `path`; the timings are its last block, or left out."""
        text = to_json(self.as_dict() | ({"timings": self.timings()} if timings else {}))
        if path is not None:
            write(path, text)
        return text

    def to_csv(self, path: str | Path) -> Path:
        """`records` as CSV; returns the path."""
        import pandas as pd

        return write(path, pd.DataFrame(self.records()).to_csv(index=False, lineterminator="\n"))

    def to_parquet(self, path: str | Path) -> Path | None:
        """`records` as Parquet; None, and nothing written, where pyarrow (the extra `parquet`) is missing."""
        from importlib.util import find_spec

        import pandas as pd

        if find_spec("pyarrow") is None:
            return None
        return write(path, pd.DataFrame(self.records()).to_parquet(index=False))
